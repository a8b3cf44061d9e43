"""What goes wrong is said before or while it does."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

import nemolet as nl
from nemolet.data.audio_corpus import AudioCorpus
from nemolet.data.manifest import utterances_of_arrays
from nemolet.errors import DataError
from nemolet.speech.guards import BlankShare, frames_given, frames_needed, probable_cause, refuse_misfits
from nemolet.speech.losses import CTC


def prepared(texts, letters, seconds=0.2, **settings):
    rng = np.random.default_rng(0)
    arrays = [rng.normal(0, 0.1, round(8000 * seconds)).astype(np.float32) for _ in texts]
    entries = utterances_of_arrays(arrays, sample_rate=8000, texts=texts)
    return AudioCorpus(sample_rate=8000, valid_fraction=0.3, **settings).prepare(letters, entries=entries)


def test_frames_that_ctc_needs_are_those_without_which_there_is_no_path():
    for labels in ([0, 1, 1], [0, 0, 0], [2]):
        needed = frames_needed(labels)
        for frames, possible in ((needed, True), (needed - 1, False)):
            loss = torch.nn.functional.ctc_loss(
                torch.zeros(max(1, frames), 1, 4).log_softmax(-1), torch.tensor([labels]), [frames], [len(labels)], 3
            )
            assert loss.isfinite().item() == possible


def test_labels_without_room_are_named_before_training(recognizer, letters, tmp_path):
    model = recognizer()
    assert frames_given(model, 1600) == model.encode(torch.zeros(1, 1600), torch.tensor([1600])).lengths.item() == 5
    data = prepared(["ab", "abcab", "aaab", "abc"], letters)
    with pytest.raises(DataError, match="1 utterances have more labels") as error:
        nl.training.fit(model.train(), CTC(), data, folder=tmp_path / "run")
    assert "array 2: 6 labels in 5 frames (0.20 s)" in str(error.value)
    assert not (tmp_path / "run" / "checkpoints").exists()
    refuse_misfits(recognizer("rnnt"), prepared(["ab"] * 4, letters))


def test_joined_labels_without_room_are_named_before_training(recognizer, letters):
    model = recognizer()
    roomy = prepared(["ab", "abc", "ab", "abc"], letters, join=(2, 3), pause=(0.1, 0.2))
    refuse_misfits(model, roomy)
    # 5 frames each: 4 labels and a space or 2.5 frames of pause between; without a pause two do not fit together.
    tight = ["abca"] * 4
    refuse_misfits(model, prepared(tight, letters, join=(2, 3), pause=(0.1, 0.2)))
    refuse_misfits(model, prepared(["abcab"] * 4, letters, join=(1, 1), pause=(0.0, 0.0)))
    with pytest.raises(DataError, match="more labels than the encoder") as error:
        refuse_misfits(model, prepared(["abcab"] * 4, letters, join=(2, 3), pause=(0.0, 0.2)))
    assert "array 0: 5 labels in 5.0 frames (0.20 s), joined" in str(error.value)


@pytest.mark.parametrize("seed", range(5))
def test_what_passes_has_an_alignment_in_every_epoch(recognizer, letters, seed):
    """Against the rows of real epochs."""
    model, rng = recognizer(), np.random.default_rng(seed)
    texts = ["".join(rng.choice(list("abcd"), rng.integers(1, 3 if seed > 2 else 6))) for _ in range(12)]
    data = prepared(texts, letters, join=(1, 3), pause=(0.04 * seed, 0.3))
    loader = data.train_loader()
    short = False
    for _, batch in zip(range(60), loader):
        for length, row in zip(batch["audio_lengths"].tolist(), batch["labels"].tolist()):
            short |= frames_needed([label for label in row if label >= 0]) > frames_given(model, length)
    try:
        refuse_misfits(model, data)
        assert not short
    except DataError:
        assert seed < 3  # short texts are not refused


@pytest.mark.parametrize("kind", ["ctc", "hybrid"])
@pytest.mark.parametrize("samples, text", [(1600, [1]), (330, []), (80, [2]), (30, [])])
def test_a_batch_of_one_with_next_to_nothing_in_it_has_a_loss(recognizer, kind, samples, text):
    model = recognizer(kind).train()
    labels = torch.tensor([text or [-100]])
    audio, lengths = torch.zeros(1, samples), torch.tensor([samples])
    scores = model(audio, lengths, *([labels] if kind == "hybrid" else []))
    loss = (nl.speech.Hybrid() if kind == "hybrid" else CTC())(*scores, labels).loss
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_frames_of_blanks_are_counted():
    logits = torch.zeros(2, 3, 4)
    logits[..., 3] = 1
    logits[0, 0, 1] = 2
    share = BlankShare()(logits, torch.tensor([3, 1]))
    assert (share.part.item(), share.whole.item()) == (3, 4)


def batch(audio=0.1, labels=((1, 2),)):
    return {"audio": torch.full((1, 800), audio), "labels": torch.tensor(labels)}


@pytest.mark.parametrize(
    "changed, settings, reason",
    [
        ({"audio": 0.0}, {}, "silent"),
        ({"labels": ((-100, -100),)}, {}, "empty"),
        ({}, {"frames_B": torch.tensor([2])}, "hardly room"),
        ({}, {"gradient_norm": 1e-6}, "optim.lr"),
        ({}, {"step": 20}, "20 steps are few"),
        ({}, {}, "too high"),
    ],
)
def test_the_likeliest_reason_is_given(changed, settings, reason):
    given = {"frames_B": torch.tensor([50]), "step": 5000, "gradient_norm": 1.0, **settings}
    assert reason in probable_cause(batch(**changed), **given)


def test_collapse_is_told_while_training(recognizer, letters, tmp_path, caplog):
    model = recognizer()
    model.head.weight.data.zero_()
    with torch.no_grad():
        model.head.weight[-1] = 1.0  # blanks, whatever is heard
        for parameter in model.encoder.blocks[-1].norm.parameters():
            parameter.fill_(1.0)
    training = nl.training.Training(max_steps=1, valid_every=1, loggers=(), progress=False, accelerator="cpu")
    with caplog.at_level(logging.WARNING, "nemolet"):
        nl.training.fit(
            model.train(),
            CTC(),
            prepared(["a"] * 6, letters),
            folder=tmp_path / "run",
            metrics={"blanks": BlankShare()},
            optim=nl.training.Optim(lr=1e-9),
            training=training,
        )
    assert "of all frames are blank" in caplog.text
    assert "steps are few" in caplog.text
