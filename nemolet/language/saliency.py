"""Which tokens or words a classification depends on: gradients, and integrated gradients."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from nemolet.data.encoding import LongText, TextEncoding
from nemolet.errors import ConfigError
from nemolet.language.classification import TextClassifier
from nemolet.language.spelling import SpelledEmbedding, SpelledWords
from nemolet.nn.embedding import Embedding
from nemolet.png import colour_png
from nemolet.tokenizers import Tokenizer

_FOR, _AGAINST = (46, 160, 67), (218, 54, 51)  # green and red


@dataclass(frozen=True)
class Attribution:
    """What each token, or each word, adds to the score of a label; below zero it speaks against it."""

    label: str
    pieces: tuple[str, ...]
    scores: tuple[float, ...]

    def html(self) -> str:
        """The text with each token coloured: green speaks for the label, red against it."""
        largest = max((abs(score) for score in self.scores), default=0.0) or 1.0
        spans = []
        for piece, score in zip(self.pieces, self.scores):
            colour = ",".join(map(str, _FOR if score > 0 else _AGAINST))
            style = f"background:rgba({colour},{abs(score) / largest:.2f})"
            spans.append(f'<span style="{style}" title="{score:+.3f}">{html.escape(piece)}</span>')
        return f'<p><b>{html.escape(self.label)}</b> <span style="white-space:pre-wrap">{"".join(spans)}</span></p>'

    def png(self, *, cell: int = 24) -> bytes:
        """A strip with a field for each token, in the colours of :meth:`html`.

        Args:
            cell: pixels of a side of a field.
        """
        scores_T = np.array(self.scores, np.float64)
        share_T1 = np.abs(scores_T)[:, None] / (np.abs(scores_T).max(initial=0.0) or 1.0)
        full_T3 = np.where(scores_T[:, None] > 0, _FOR, _AGAINST)
        fields_T3 = np.round(255 + share_T1 * (full_T3 - 255)).astype(np.uint8)
        return colour_png(np.broadcast_to(fields_T3.repeat(cell, 0), (cell, cell * len(fields_T3), 3)))


def explain(
    model: TextClassifier,
    tokenizer: Tokenizer,
    text: str,
    *,
    label: str | None = None,
    method: Literal["gradient", "integrated"] = "integrated",
    steps: int = 32,
) -> Attribution:
    """What each token adds to the score of a label; each word, where the encoder has vectors of words.

    Args:
        model: any text classifier.
        tokenizer: the one it was trained with.
        text: to be classified.
        label: whose score is explained; None for the likeliest.
        method: ``"gradient"`` multiplies the gradient with the vector of the token; ``"integrated"`` averages the
            gradient on the way from nothing to the text (Sundararajan et al., 2017), so that the parts add up to the
            difference between the two scores.
        steps: points on that way.

    Raises:
        ConfigError: for an unknown label, or an encoder without embeddings.
    """
    if label is not None and label not in model.labels:
        raise ConfigError("there is no such label", where="label", expected=", ".join(model.labels), found=label)
    too_long: LongText = "error" if model.too_long == "error" else "truncate"
    ids = TextEncoding(tokenizer, model.context, too_long).text(text, "text") or []
    tokens = torch.tensor([ids], device=next(model.parameters()).device)
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            logits_V = model(tokens)[0]
        index = int(logits_V.argmax()) if label is None else model.labels.index(label)
        parts = [weight * _scaled(model, tokens, index, point) for point, weight in _way(method, steps)]
    finally:
        for module in training:
            module.training = True
    pieces = tuple(tokenizer.decode(piece, special=True) for piece in _pieces(model, tokens))
    return Attribution(model.labels[index], pieces, tuple(torch.stack(parts).sum(0).tolist()))


def _pieces(model: TextClassifier, tokens_BT: Tensor) -> list[list[int]]:
    """The ids that have a vector together: each for itself, or those of a word."""
    spelled = _spelled(model)
    ids = tokens_BT[0].tolist()
    if spelled is None:
        return [[token] for token in ids]
    words = spelled.places(tokens_BT).word[0].tolist()
    return [[token for token, word in zip(ids, words) if word == each] for each in sorted(set(words))]


def _spelled(model: TextClassifier) -> SpelledEmbedding | None:
    return next((part for part in model.encoder.modules() if isinstance(part, SpelledEmbedding)), None)


def _way(method: Literal["gradient", "integrated"], steps: int) -> list[tuple[float, float]]:
    """Points from 0 to 1 and their weights; dense near 0, where a normalisation makes scores steep."""
    if method == "gradient":
        return [(1.0, 1.0)]
    middles = [(step + 0.5) / steps for step in range(steps)]
    return [(middle**4, 4 * middle**3 / steps) for middle in middles]


def _scaled(model: TextClassifier, tokens_BT: Tensor, index: int, factor: float) -> Tensor:
    """Gradient times vector of each token or word where all vectors are scaled by a factor. Shape: [T] or [U]."""
    whole: list[Tensor] = []
    scaled: list[Tensor] = []

    spelled = _spelled(model)

    def scale(module: nn.Module, inputs: object, output: Tensor | SpelledWords) -> Tensor | SpelledWords:
        vectors = output.hidden if isinstance(output, SpelledWords) else output
        if spelled is None and vectors.shape[1] != tokens_BT.shape[1]:
            return output  # one vector for all tokens, as of their type: it belongs to none of them
        whole.append(vectors.detach())
        scaled.append((vectors.detach() * factor).requires_grad_(True))
        return output._replace(hidden=scaled[-1]) if isinstance(output, SpelledWords) else scaled[-1]

    tables = [spelled] if spelled else [part for part in model.encoder.modules() if isinstance(part, Embedding)]
    hooks = [table.register_forward_hook(scale) for table in tables]
    try:
        score = model(tokens_BT)[0, index]
    finally:
        for hook in hooks:
            hook.remove()
    if not scaled:
        raise ConfigError("the encoder has no embedding", where="model.encoder", expected="a nemolet.nn.Embedding")
    gradients = torch.autograd.grad(score, scaled, allow_unused=True)
    parts = [(g * w)[0].sum(-1) for g, w in zip(gradients, whole) if g is not None]
    return torch.stack(parts).sum(0).cpu()


def page(attributions: Sequence[Attribution], *, title: str = "nemolet") -> str:
    """An HTML page of several texts."""
    body = "\n".join(attribution.html() for attribution in attributions)
    return (
        f'<!doctype html><html><head><meta charset="utf-8"><title>{html.escape(title)}</title></head>'
        f'<body style="font-family:sans-serif;max-width:60em;margin:2em auto">\n{body}\n</body></html>\n'
    )
