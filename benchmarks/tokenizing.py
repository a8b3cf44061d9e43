"""Tokenising speed side by side: nemolet's files on disk, sentencepiece's own encode, and datasets.map.

Per CPU-second, summed over processes, medians of several rounds in which the contenders take turns. Also: wall
time on two workers against one, and peak memory for a file ten times as large.

    python benchmarks/tokenizing.py
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
VOCAB = 8000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(*arguments.worker)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, arguments.megabytes)
        contenders = ("nemolet", "nemolet-2", "sentencepiece", "datasets")
        rates: dict[str, list[tuple[float, float]]] = {c: [] for c in contenders}
        for _ in range(arguments.rounds):
            for contender in contenders:
                rates[contender].append(measure(contender, folder / "text.jsonl")[:2])
        print(
            f"{arguments.megabytes} MB of English and Python, vocabulary {VOCAB}: medians of {arguments.rounds} rounds"
        )
        cpu = {c: statistics.median(r[0] for r in rates[c]) for c in contenders}
        wall = {c: statistics.median(r[1] for r in rates[c]) for c in contenders}
        for c in contenders:
            print(f"  {c:<14} {cpu[c]:6.2f} MB per CPU-second  {wall[c]:6.2f} MB per second")
        print(
            f"  nemolet / sentencepiece {cpu['nemolet'] / cpu['sentencepiece']:.2f}, nemolet / datasets "
            f"{cpu['nemolet'] / cpu['datasets']:.2f}, "
            f"two workers / one (wall) {wall['nemolet-2'] / wall['nemolet']:.2f}"
        )
        large = folder / "large.jsonl"
        with large.open("wb") as file:
            for _ in range(10):
                file.write((folder / "text.jsonl").read_bytes())
        small_memory, large_memory = measure("nemolet", folder / "text.jsonl")[2], measure("nemolet", large)[2]
        print(
            f"  peak memory: {small_memory:.0f} MB for {arguments.megabytes} MB, "
            f"{large_memory:.0f} MB for {10 * arguments.megabytes} MB"
        )


def prepare(folder: Path, megabytes: int) -> None:
    """One record per document, a SentencePiece model, and a fast tokenizer of the same size."""
    import json

    import tokenizers

    from nemolet.data import EmbeddedText
    from nemolet.tokenizers import SentencePieceTokenizer, save_tokenizer

    texts = [piece.text for piece in EmbeddedText().pieces()]
    with (folder / "text.jsonl").open("w") as file:
        size = 0
        while size < megabytes * 1_000_000:
            for text in texts:
                file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                size += len(text.encode())
    save_tokenizer(SentencePieceTokenizer.train(texts, vocab_size=VOCAB), folder / "sp")
    fast = tokenizers.Tokenizer(tokenizers.models.BPE())
    fast.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(vocab_size=VOCAB, show_progress=False))
    fast.save(str(folder / "tokenizer.json"))


def measure(contender: str, path: Path) -> tuple[float, float, float]:
    """MB per CPU-second, MB per second, and peak MB, of a fresh process that says so itself."""
    with tempfile.TemporaryDirectory() as out:
        run = subprocess.run(
            [sys.executable, __file__, "--worker", contender, str(path), out],
            capture_output=True,
            text=True,
            check=True,
        )
    cpu, wall, memory = map(float, run.stdout.split()[-3:])
    return cpu, wall, memory


def work(contender: str, path: str, out: str) -> None:
    """Tokenise a file; the start of the process and of its libraries is not counted."""
    folder = Path(path).parent
    size = 0
    if contender.startswith("nemolet"):
        from nemolet.data import TextFiles, tokenize
        from nemolet.tokenizers import load_tokenizer

        tokenizer = load_tokenizer(folder / "sp")
        mark = clocks()
        workers = 2 if contender.endswith("2") else 1
        size = tokenize(TextFiles([path]), Path(out) / "tokens", tokenizer, workers=workers).text_bytes
    elif contender == "sentencepiece":
        import json

        import sentencepiece

        processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "sp" / "sentencepiece.model"))
        lines = Path(path).read_text().split("\n")[:-1]
        texts = [json.loads(line)["text"] for line in lines]  # reading is not counted against it
        size = sum(len(t.encode()) for t in texts)
        mark = clocks()
        for text in texts:
            processor.encode(text)
    else:
        import datasets
        from transformers import PreTrainedTokenizerFast

        datasets.disable_progress_bars()
        fast = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
        data = datasets.load_dataset("json", data_files=path, split="train", cache_dir=out)
        size = sum(len(t.encode()) for t in data["text"])
        mark = clocks()
        data.map(lambda batch: fast(batch["text"]), batched=True, remove_columns=["text"], load_from_cache_file=False)
    cpu, wall = (b - a for a, b in zip(mark, clocks()))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(size / 1e6 / cpu, size / 1e6 / wall, memory)


def clocks() -> tuple[float, float]:
    """CPU seconds of this process and of its finished children, and wall seconds."""
    usages = (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    return sum(u.ru_utime + u.ru_stime for u in usages), time.perf_counter()


if __name__ == "__main__":
    main()
