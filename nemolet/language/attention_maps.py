"""Which tokens a transformer looks at, layer by layer and head by head, as HTML and PNG."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nemolet.data.encoding import TextEncoding
from nemolet.errors import ConfigError
from nemolet.language.decoding import beginning, encode_prompt
from nemolet.language.models import CausalLM
from nemolet.language.tasks import evaluating
from nemolet.module import NeuralModule
from nemolet.nn.attention import CrossAttention
from nemolet.nn.observation import recorded_attention
from nemolet.nn.transformer import Encoder
from nemolet.png import grey_png
from nemolet.tokenizers import Tokenizer


@dataclass(frozen=True)
class AttentionMap:
    """What one layer looks at.

    Args:
        layer: its name in the model.
        queries: the tokens that look, one for each row.
        keys: the tokens that are looked at, one for each column.
        weights: for each head and row shares that add up to one, ``[H, T, S]``.
    """

    layer: str
    queries: tuple[str, ...]
    keys: tuple[str, ...]
    weights: Tensor

    def png(self, head: int | None = None, *, cell: int = 12) -> bytes:
        """A picture: the darker, the more a row looks at a column; black is 1.

        Args:
            head: which one; None for all of them, side by side.
            cell: pixels of a side of a field.
        """
        chosen = self.weights if head is None else self.weights[head, None]
        fields = chosen.repeat_interleave(cell, 1).repeat_interleave(cell, 2)
        gap = torch.zeros(fields.shape[1], cell)
        parts = [part for map_TS in fields for part in (map_TS, gap)]
        return grey_png(torch.cat(parts[:-1], 1).numpy(), low=0.0, high=1.0)

    def html(self) -> str:
        """The mean over heads as a table, whose fields tell their number, and a small picture of each head."""
        columns = "".join(f'<th style="writing-mode:vertical-rl">{html.escape(key)}</th>' for key in self.keys)
        rows = [f"<tr><th></th>{columns}</tr>"]
        for query, mean in zip(self.queries, self.weights.mean(0).tolist()):
            fields = "".join(_field(f"{query} to {key}", share) for key, share in zip(self.keys, mean))
            rows.append(f'<tr><th style="text-align:right">{html.escape(query)}</th>{fields}</tr>')
        pictures = "".join(
            f'<img alt="head {head}" title="head {head}" style="margin:4px;border:1px solid #ccc" '
            f'src="data:image/png;base64,{base64.b64encode(self.png(head, cell=4)).decode()}">'
            for head in range(len(self.weights))
        )
        table = '<table style="border-spacing:1px;font-size:80%;white-space:pre">' + "".join(rows) + "</table>"
        return f"<h3>{html.escape(self.layer)}</h3>\n{table}\n<p>{pictures}</p>"


def attention_maps(
    model: NeuralModule, tokenizer: Tokenizer, text: str | Sequence[int], *, written: str | Sequence[int] | None = None
) -> list[AttentionMap]:
    """What each attention layer of a model looks at while it reads a text, in the order of the layers.

    Args:
        model: any that reads tokens: a language model, an encoder, a classifier, an encoder-decoder.
        tokenizer: the one it was trained with.
        text: what is read; ids are taken as they are.
        written: what an encoder-decoder has written; ids are taken as they are.

    Raises:
        ConfigError: for a model without attention layers, or an encoder-decoder where nothing is written.
        DataError: for an empty text.

    Example:
        >>> import nemolet as nl
        >>> from nemolet.tokenizers import ByteTokenizer
        >>> model = nl.language.CausalLM(vocab_size=257, layers=1, width=8, heads=2)
        >>> found = attention_maps(model, ByteTokenizer(), "abc")[0]
        >>> found.queries, found.weights.shape
        (('<|endoftext|>', 'a', 'b', 'c'), torch.Size([2, 4, 4]))
    """
    writes = "source" in model.declared().inputs
    if writes != (written is not None):
        raise ConfigError(
            "an encoder-decoder reads one text and writes another" if writes else "this model reads one text only",
            where="written",
            expected="what was written" if writes else "nothing",
            found=written,
        )
    call = {"source" if writes else "tokens": _ids(model, tokenizer, text)}
    if written is not None:
        call["tokens"] = _begun(model, tokenizer, written)
    device = next(model.parameters()).device
    with evaluating(model), recorded_attention(model) as found:
        model(**{name: torch.tensor([ids], device=device) for name, ids in call.items()})
    pieces = {name: tuple(tokenizer.decode([token], special=True) for token in ids) for name, ids in call.items()}
    reading = [f"{name}." for name, stack in model.named_modules() if writes and isinstance(stack, Encoder)]
    maps = []
    for layer, weights_BHTS in found.items():
        rows = pieces["source" if layer.startswith(tuple(reading)) else "tokens"]
        columns = pieces["source"] if isinstance(model.get_submodule(layer), CrossAttention) else rows
        maps.append(AttentionMap(layer, rows, columns, weights_BHTS[0].cpu()))
    return maps


def attention_page(maps: Sequence[AttentionMap], *, title: str = "nemolet") -> str:
    """An HTML page of several maps."""
    body = "\n".join(each.html() for each in maps)
    return (
        f'<!doctype html><html><head><meta charset="utf-8"><title>{html.escape(title)}</title></head>'
        f'<body style="font-family:sans-serif;margin:2em">\n{body}\n</body></html>\n'
    )


def _field(title: str, share: float) -> str:
    return f'<td style="background:rgba(31,111,235,{share:.3f})" title="{html.escape(title)}: {share:.3f}"></td>'


def _ids(model: NeuralModule, tokenizer: Tokenizer, text: str | Sequence[int]) -> list[int]:
    """As the model is used: a language model reads a beginning, others a whole text."""
    if not isinstance(text, str):
        return list(text)
    if isinstance(model, CausalLM):
        return encode_prompt(tokenizer, text)
    return TextEncoding(tokenizer, getattr(model, "context", 512), "truncate").text(text, "text") or []


def _begun(model: NeuralModule, tokenizer: Tokenizer, text: str | Sequence[int]) -> list[int]:
    """What was written, after the token that stands before all that the model writes."""
    if not isinstance(text, str):
        return list(text)
    start = getattr(model, "start", None)
    return [beginning(tokenizer) if start is None else start, *tokenizer.encode(text)]
