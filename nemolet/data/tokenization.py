"""Text to token files, on several cores, in bounded memory."""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from nemolet.data.indexed import IndexedWriter
from nemolet.data.sources import Piece
from nemolet.errors import DataError
from nemolet.tokenizers.base import Tokenizer

_BATCH = 1 << 20  # characters that one worker gets at a time


class Source(Protocol):
    """Anything that yields documents."""

    def pieces(self) -> Iterator[Piece]: ...


@dataclass(frozen=True)
class Tokenized:
    """What was written."""

    documents: int
    tokens: int
    text_bytes: int

    def __str__(self) -> str:
        return (
            f"{self.documents:,} documents, {self.text_bytes:,} bytes, {self.tokens:,} tokens"
            f" ({self.text_bytes / max(1, self.tokens):.2f} bytes per token)"
        )


Part = tuple[str, bool, bool]  # text, whether a document begins with it, whether one ends with it
Encoded = tuple[NDArray[np.generic], list[int], int]  # ids, document ends among them, bytes of text


def tokenize(
    source: Source,
    prefix: str | Path,
    tokenizer: Tokenizer,
    *,
    workers: int = 1,
    marks: bool = True,
    progress: Callable[[int], Any] | None = None,
) -> Tokenized:
    """Write the documents of a source as ``prefix.bin`` and ``prefix.idx``.

    The result does not depend on the number of workers. At most a few million characters per worker are in
    memory at a time.

    Args:
        source: the documents.
        prefix: where to write.
        tokenizer: turns text into ids.
        workers: processes; 1 works in this one.
        marks: begin and end each document with the tokens for that, where the tokenizer has them.
        progress: is told the number of bytes that each step has done.

    Raises:
        DataError: for bad input, naming file and line; nothing half-written is left.
    """
    documents = tokens = text_bytes = 0
    with IndexedWriter(prefix, vocab_size=tokenizer.vocab_size) as writer:
        for ids, ends, size in _encoded(source, tokenizer, marks, workers):
            writer.write(ids, ends)
            documents, tokens, text_bytes = documents + len(ends), tokens + len(ids), text_bytes + size
            if progress is not None:
                progress(size)
        if not tokens:
            raise DataError("there is no text", where=str(prefix), fix="check data.path")
    return Tokenized(documents, tokens, text_bytes)


def _encoded(source: Source, tokenizer: Tokenizer, marks: bool, workers: int) -> Iterator[Encoded]:
    batches = _batches(source.pieces())
    if workers <= 1:
        for batch in batches:
            yield _encode(tokenizer, marks, batch)
        return
    context = multiprocessing.get_context("spawn")  # a forked copy of a process with threads may hang
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(tokenizer, marks)) as pool:
        waiting: deque[Future[Encoded]] = deque()
        try:
            for batch in batches:
                waiting.append(pool.submit(_work, batch))
                if len(waiting) > workers + 1:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Part]]:
    batch: list[Part] = []
    size, first = 0, True
    for text, last in pieces:
        batch.append((text, first, last))
        first, size = last, size + len(text)
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode(tokenizer: Tokenizer, marks: bool, batch: list[Part]) -> Encoded:
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32
    arrays: list[NDArray[Any]] = []
    ends: list[int] = []
    length = size = 0
    for text, first, last in batch:
        ids = tokenizer.encode(text)
        if first and marks and tokenizer.bos_id is not None:
            ids.insert(0, tokenizer.bos_id)
        if last and marks and tokenizer.eos_id is not None:
            ids.append(tokenizer.eos_id)
        arrays.append(np.array(ids, dtype))
        length, size = length + len(ids), size + len(text.encode())
        if last:
            ends.append(length)
    return np.concatenate(arrays), ends, size


_worker: dict[str, Any] = {}  # what a worker process was started with; processes have no other memory


def _start(tokenizer: Tokenizer, marks: bool) -> None:
    _worker.update(tokenizer=tokenizer, marks=marks)


def _work(batch: list[Part]) -> Encoded:
    return _encode(_worker["tokenizer"], _worker["marks"], batch)
