"""Errors of a recognizer of CMU AN4's cepstra on the speakers that were set aside.

    python benchmarks/an4.py runs/an4_transducer an4_mfcc/train.jsonl an4_mfcc/train.npz out.jsonl

Where the model has a transducer, its errors are printed beside those of CTC on the same encoder.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from nemolet.archive import Archive, load
from nemolet.data.feature_corpus import FeatureCorpus, PreparedFeatures
from nemolet.speech.decoding import greedy_ctc, greedy_transducer
from nemolet.speech.prediction import TransducerDecoder
from nemolet.speech.word_error import character_error_rate, word_error_rate
from nemolet.types import IGNORED


@torch.inference_mode()
def heard(archive: Archive, prepared: PreparedFeatures) -> Iterator[dict[str, str]]:
    """What was said and what each way of decoding wrote, utterance by utterance."""
    parts, tokenizer = dict(archive.model.eval().named_children()), archive.tokenizer
    decoder = parts.get("decoder")
    assert tokenizer is not None
    for batch in prepared.valid_loader():
        spectrogram = parts["normalize"](batch["spectrogram"], batch["lengths"])
        hidden, lengths = parts["encoder"](spectrogram, batch["lengths"])
        found = {"ctc": greedy_ctc(parts["head"](hidden), lengths)}
        if isinstance(decoder, TransducerDecoder):
            found["transducer"] = greedy_transducer(decoder, hidden, lengths)
        for row, labels in enumerate(batch["labels"].tolist()):
            texts = {name: tokenizer.decode(rows[row].labels).strip() for name, rows in found.items()}
            yield {"text": tokenizer.decode([label for label in labels if label != IGNORED]), **texts}


def main(model: str, manifest: str, arrays: str, out: str) -> None:
    """Print error rates and write every utterance."""
    archive = load(model)
    prepared = FeatureCorpus(path=manifest, arrays=arrays, valid_speakers=15).prepare(archive.tokenizer)
    entries = list(heard(archive, prepared))
    said = [entry["text"] for entry in entries]
    for name in list(entries[0])[1:]:
        written = [entry[name] for entry in entries]
        print(f"{name}: words {word_error_rate(said, written)}, characters {character_error_rate(said, written)}")
    Path(out).write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
