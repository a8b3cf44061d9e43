"""Compose a model with a module of your own, train it, and load it again: ``python examples/compose_and_train.py``."""

from pathlib import Path
from tempfile import TemporaryDirectory

from my_modules import recurrent_lm

import nemolet as nl
from nemolet.training import Optim, Schedule, Training


def main(folder: Path) -> None:
    """Train for a few seconds in a folder."""
    text = folder / "rain.txt"
    text.write_text("the rain in spain stays mainly in the plain.\n" * 400)
    corpus = nl.data.Corpus(str(text), sequence_length=32, batch_size=8, cache=str(folder / "cache"))
    data = corpus.prepare(nl.data.TokenizerSpec("char"))
    model = recurrent_lm(vocab_size=data.tokenizer.vocab_size)
    print(model.summary())
    result = nl.training.fit(
        model,
        nl.language.CrossEntropy(),
        data,
        folder=folder / "run",
        optim=Optim(lr=1e-2),
        schedule=Schedule(warmup_steps=5),
        training=Training(max_steps=100, valid_every=50),
    )
    archive = nl.load(result.archive)
    assert archive.tokenizer is not None
    print(nl.language.generate(archive.model, archive.tokenizer, ["the rain"], max_new_tokens=30)[0].text)


if __name__ == "__main__":
    with TemporaryDirectory() as folder:
        main(Path(folder))
