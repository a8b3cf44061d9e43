"""``nemolet tokenize``: text to token files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nemolet.cli.train import progress_bar
from nemolet.data.corpus import TokenizerSpec


@dataclass(frozen=True)
class Settings:
    """What to tokenise into what.

    Args:
        path: text, JSON lines (also compressed), or a folder of them; null for the text that Python carries.
        out: common prefix of the ``.bin`` and ``.idx`` files; the tokenizer goes to ``<out>.tokenizer``.
        tokenizer: the tokenizer; characters and SentencePiece are learned from the text, ``kind=file`` is read.
        workers: processes.
        text_key: where the text lies in a JSON record.
        invalid_utf8: what to do with bytes that are no UTF-8: stop, write U+FFFD, or leave them out.
        max_line_bytes: longest line of a JSON lines file.
        marks: whether documents begin and end with the tokens for that, where the tokenizer has them.
    """

    out: str
    tokenizer: TokenizerSpec
    path: str | None = None
    workers: int = 1
    text_key: str = "text"
    invalid_utf8: Literal["error", "replace", "ignore"] = "error"
    max_line_bytes: int = 1 << 26
    marks: bool = True

    CONFIG_RULES = (
        ("tokenizer.kind != 'file' or tokenizer.path is not None", "kind=file needs tokenizer.path"),
        ("workers >= 1", "workers is at least 1"),
        ("len(out) > 0", "out is empty; it is the common prefix of the files"),
        ("len(path) > 0", "path is empty; null for the text that Python carries"),
    )


def run(settings: Settings) -> None:
    """Write the token files and their tokenizer."""
    from nemolet.data.embedded import EmbeddedText
    from nemolet.data.indexed import prefix_of
    from nemolet.data.sources import TextFiles
    from nemolet.data.tokenization import tokenize
    from nemolet.tokenizers import save_tokenizer

    source: EmbeddedText | TextFiles = EmbeddedText()
    if settings.path is not None:
        source = TextFiles([settings.path], settings.text_key, settings.invalid_utf8, settings.max_line_bytes)
    tokenizer, prefix = settings.tokenizer.make(source), prefix_of(settings.out)
    bar = progress_bar("tokenise", source.total_bytes())
    done = tokenize(source, prefix, tokenizer, workers=settings.workers, marks=settings.marks, progress=bar)
    folder = Path(f"{prefix}.tokenizer")
    save_tokenizer(tokenizer, folder)
    print(f"{prefix}.bin, .idx: {done}; tokenizer {folder}")
