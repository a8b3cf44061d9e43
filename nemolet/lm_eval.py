"""Models of nemolet in the Language Model Evaluation Harness (the extra ``eval``).

The harness finds models by names that are registered in its own process, so its command line runs from here, with
all of its options::

    python -m nemolet.lm_eval --model nemolet --model_args path=model.nemolet --tasks TASK

In Python, ``import nemolet.lm_eval`` is enough: ``lm_eval.simple_evaluate(model="nemolet", ...)``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from nemolet.archive import load
from nemolet.data.chat import token_names
from nemolet.data.chat_template import ChatTemplate
from nemolet.errors import ConfigError
from nemolet.language.decoding import beginning, generate
from nemolet.language.likelihood import Likelihood, likelihoods
from nemolet.nn.prepacking import pack
from nemolet.sampling import Sampling

_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_AUTO = 8  # pairs at once where the harness leaves it to the model


@register_model("nemolet")
class HarnessModel(TemplateLM):
    """An archive or a Hugging Face folder as a model of the harness (final).

    Args:
        path: of the archive or folder, with a causal language model and its tokenizer.
        device: where to compute.
        batch_size: requests at once; ``"auto"`` for 8.
        max_batch_size: the harness passes it; nothing depends on it.
        max_gen_toks: length limit of a continuation, where a task sets none.
        add_bos: whether a text begins with what opens every document and prompt of the tokenizer, as in generation.

    Raises:
        ConfigError: for an archive without tokenizer, or of another kind of model.
    """

    def __init__(
        self,
        path: str,
        device: str | None = None,
        batch_size: int | str = _AUTO,
        max_batch_size: int | None = None,
        max_gen_toks: int = 256,
        add_bos: bool = True,
    ) -> None:
        super().__init__()
        asked = device or "cpu"
        if asked.startswith("cuda") and not torch.cuda.is_available():
            asked = "cpu"  # the harness asks for a GPU wherever nothing is said
        archive = load(path, device=asked)
        if archive.tokenizer is None or not hasattr(archive.model, "new_cache"):
            raise ConfigError(
                "this archive cannot be evaluated as a language model",
                where=path,
                expected="a causal language model with its tokenizer",
                found=f"{type(archive.model).__name__}, "
                + ("without a tokenizer" if archive.tokenizer is None else "with a tokenizer"),
            )
        pack(archive.model)
        self.model, self.text = archive.model, archive.tokenizer
        self.template = ChatTemplate.of(archive.extra) or ChatTemplate()
        self.max_length: int = vars(archive.model)["context"]
        self.batch_size = _AUTO if str(batch_size).startswith("auto") else int(batch_size)
        self.max_gen_toks = int(max_gen_toks)
        self.add_bos = add_bos

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return beginning(self.text) if self.text.eos_id is None else self.text.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The token that an empty context is: what is named as a beginning, even where no text begins with it."""
        named = self.text.special_tokens.get(self.template.tokens.get("bos_token", ""))
        return beginning(self.text) if named is None else named

    @property
    def tokenizer_name(self) -> str:
        """By which the harness tells its stored requests apart."""
        return f"nemolet-{self.text.fingerprint}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of a text; special tokens in it are read, as few-shot prompts of chats contain them."""
        begins = self.add_bos and add_special_tokens is not False
        encode = self.text.encode_prompt if begins else self.text.encode
        return encode(string, special=True)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[Likelihood]:
        found = likelihoods(self.model, [(c, a) for _, c, a in requests], batch_size=self.batch_size)
        for (texts, _, _), one in zip(requests, found):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, one)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of whole texts, each token with as much before it as windows allow."""
        windows: list[tuple[int, list[int], list[int]]] = []
        for index, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            parts = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1)
            windows += [(index, *make_disjoint_window(part)) for part in parts]
        sums = [0.0] * len(requests)
        found = self._loglikelihood_tokens([(None, before, after) for _, before, after in windows])
        for (index, _, _), one in zip(windows, found):
            sums[index] += one.log_prob
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations; requests with the same settings run together."""
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(index)
        texts: dict[int, str] = {}
        for numbers in groups.values():
            for start in range(0, len(numbers), self.batch_size):
                some = numbers[start : start + self.batch_size]
                texts |= dict(zip(some, self._generate([requests[i].args[0] for i in some], requests[some[0]].args[1])))
        for index, request in enumerate(requests):
            self.cache_hook.add_partial("generate_until", request.args, texts[index])
        return [texts[index] for index in range(len(requests))]

    def _generate(self, prompts: list[str], settings: dict[str, Any]) -> Iterable[str]:
        until = settings.get("until") or []
        sampled = bool(settings.get("do_sample", float(settings.get("temperature") or 0) > 0))
        temperature = float(settings.get("temperature") or 1.0) if sampled else 0.0
        sampling = Sampling(
            temperature=temperature,
            top_k=int(settings.get("top_k", 50)) if sampled else 0,  # as transformers, where nothing is said
            top_p=float(settings.get("top_p", 1.0)),
            min_p=float(settings.get("min_p") or 0.0),
        )
        room = int(next((settings[key] for key in _LENGTHS if settings.get(key) is not None), self.max_gen_toks))
        if not 0 < room < self.max_length:
            raise ConfigError(
                "there is no room for a context",
                where="max_gen_toks",
                expected=f"at least 1 and below the {self.max_length} tokens that the model reads",
                found=room,
                fix="set max_gen_toks, of the task or in model_args",
            )
        stop = [until] if isinstance(until, str) else [text for text in until if text]
        ids = [self.tok_encode(prompt)[room - self.max_length :] or [self.prefix_token_id] for prompt in prompts]
        found = generate(self.model, self.text, ids, max_new_tokens=room, sampling=sampling, stop=stop)
        return [_cut(self.text.decode(completion.tokens), stop) for completion in found]

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template of the archive, or our plain one."""
        return None if chat_template is False else self.template.source

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as a prompt; without a prompt for an answer, its last message goes on."""
        names = token_names(self.text)
        if add_generation_prompt:
            return self.template.render(chat_history, add_generation_prompt=True, **names)
        return self.template.render_open(chat_history, **names)


def _cut(text: str, stop: Sequence[str]) -> str:
    """A text up to each of these, one after the other, as the harness does it for every model."""
    for end in stop:
        text = text.split(end)[0]
    return text


def main() -> None:
    """The command line of the harness, which now knows the model ``nemolet``."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
