"""Batches of audio: what is in them, over ranks, over resumes, and when a file breaks meanwhile."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
import torch

from nemolet.data.audio import AudioArray
from nemolet.data.audio_loader import AudioLoader, AudioStore, AudioValidationLoader, Batcher
from nemolet.data.buckets import BatchPlan, Joining
from nemolet.data.inspection import AudioRules, examine
from nemolet.data.manifest import utterances_of_arrays
from nemolet.data.targets import ClassTarget, SpeechTarget, TextTarget
from nemolet.errors import DataError
from nemolet.tokenizers import CharTokenizer

RATE = 8000
COUNT = 23


def constant(number):
    """Audio that says which it is: its value is its number, its length too."""
    return np.full(800 + 80 * (number * 7 % COUNT), (number + 1) / 64, np.float32)


@pytest.fixture(scope="module")
def usable():
    return examine(utterances_of_arrays([constant(n) for n in range(COUNT)], sample_rate=RATE), AudioRules()).usable


@pytest.fixture
def batcher(usable):
    texts = [chr(97 + n) * (n % 3 + 1) for n in range(COUNT)]
    store = AudioStore(usable, sample_rate=RATE)
    return Batcher(store, TextTarget(texts, CharTokenizer([chr(97 + n) for n in range(COUNT)] + [" "])))


def plan(usable, **options):
    settings = {"batch_seconds": 0.8, "batch_size": 6} | options
    return BatchPlan(np.array([u.seconds for u in usable]), **settings)


def numbers(batch):
    return [round(value.item() * 64) - 1 for value in batch["audio"][:, 0]]


def test_rows_hold_their_utterances_and_their_labels(batcher, usable):
    loader = AudioLoader(batcher, plan(usable))
    seen = []
    for batch in islice(loader, len(loader.plan.epoch(0))):
        assert batch["audio"].dtype == torch.float32
        for row, length, labels, number in zip(batch["audio"], batch["audio_lengths"], batch["labels"], numbers(batch)):
            assert length == len(constant(number))
            np.testing.assert_array_equal(row[:length], constant(number))
            assert not row[length:].any()
            assert labels[labels != -100].tolist() == [number] * (number % 3 + 1)
            seen.append(number)
    assert sorted(seen) == list(range(COUNT))


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_share_the_stream_of_one(batcher, usable, ranks):
    alone = [numbers(batch) for batch in islice(AudioLoader(batcher, plan(usable)), 24)]
    loaders = [AudioLoader(batcher, plan(usable), rank=r, ranks=ranks) for r in range(ranks)]
    together = [numbers(batch) for step in islice(zip(*loaders), 24 // ranks) for batch in step]
    assert together == alone
    assert len({loader.consumed for loader in loaders}) == 1
    assert loaders[0].consumed == sum(map(len, alone))  # over several epochs


@pytest.mark.parametrize("before, after", [(1, 1), (1, 2), (2, 1), (3, 2)])
def test_a_resumed_run_goes_on_where_the_other_stood(batcher, usable, before, after):
    alone = [numbers(batch) for batch in islice(AudioLoader(batcher, plan(usable)), 30)]
    loaders = [AudioLoader(batcher, plan(usable), rank=r, ranks=before) for r in range(before)]
    steps = 5
    for _ in islice(zip(*loaders), steps):
        pass
    resumed = [AudioLoader(batcher, plan(usable), rank=r, ranks=after) for r in range(after)]
    for loader in resumed:
        loader.load_state_dict(loaders[0].state_dict())
    rest = [numbers(batch) for step in islice(zip(*resumed), 4) for batch in step]
    assert rest == alone[steps * before : steps * before + 4 * after]


def test_the_state_is_that_of_the_batch_in_use(batcher, usable):
    loader = AudioLoader(batcher, plan(usable))
    stream = iter(loader)
    assert loader.state_dict() == {"consumed": 0}
    first = next(stream)
    assert loader.state_dict() == {"consumed": len(first["audio"])}


def test_other_batch_sizes_repeat_a_few_but_lose_none(batcher, usable):
    loader = AudioLoader(batcher, plan(usable, batch_size=5, spread=0.0))
    list(islice(loader, 2))
    other = AudioLoader(batcher, plan(usable, batch_size=4, spread=0.0))
    other.load_state_dict(loader.state_dict())
    ends = np.cumsum([len(batch) for batch in other.plan.epoch(0)])
    next(iter(other))
    assert other.consumed == ends[np.searchsorted(ends, loader.consumed, side="right")]


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_validation_sees_each_utterance_once(batcher, usable, ranks):
    loaders = [AudioValidationLoader(batcher, plan(usable, shuffle=False), rank=r, ranks=ranks) for r in range(ranks)]
    assert len({len(loader) for loader in loaders}) == 1
    assert sorted(n for loader in loaders for batch in loader for n in numbers(batch)) == list(range(COUNT))
    short = AudioValidationLoader(batcher, plan(usable, shuffle=False), ranks=ranks, max_batches=1)
    assert len(list(short)) == len(short) == 1


def test_joined_utterances_have_pauses_and_joined_texts(usable):
    store = AudioStore(usable, sample_rate=RATE)
    texts = TextTarget(["ab"] * COUNT, CharTokenizer(["a", "b", " "]))
    loader = AudioLoader(Batcher(store, texts), plan(usable, batch_seconds=5, joining=Joining(3, 3, 0.05, 0.05)))
    batch = next(iter(loader))
    for row, length, labels in zip(batch["audio"], batch["audio_lengths"], batch["labels"]):
        values, counts = torch.unique_consecutive(row[:length], return_counts=True)
        spoken = [round(v.item() * 64) - 1 for v in values if v]
        if len(spoken) == 3:
            assert counts[1] == counts[3] == 400
            assert labels[labels != -100].tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
        assert length == sum(len(constant(n)) for n in spoken) + 400 * (len(spoken) - 1)


def test_what_does_not_fit_into_memory_is_decoded_anew(usable):
    store = AudioStore(usable, sample_rate=RATE, memory_mb=2 * 4 * 800 / 2**20)
    for number in range(COUNT):
        np.testing.assert_array_equal(store.samples(number), constant(number))
    assert 1 <= len(store.kept) <= 2


def test_audio_is_resampled_and_mixed():
    array = AudioArray(np.stack([np.full(800, 0.2), np.full(800, 0.4)], 1), RATE)
    entries = utterances_of_arrays([array.samples], sample_rate=RATE)
    usable = examine(entries, AudioRules()).usable
    samples = AudioStore(usable, sample_rate=2 * RATE).samples(0)
    assert len(samples) == 1600 and samples[800] == pytest.approx(0.3, abs=1e-3)
    assert AudioStore(usable, sample_rate=RATE, channels="first").samples(0)[9] == pytest.approx(0.2)


def test_a_file_that_breaks_meanwhile_is_replaced_by_a_neighbour_and_named(tmp_path, caplog):
    soundfile = pytest.importorskip("soundfile")
    from nemolet.data.manifest import read_audio

    for number in range(4):
        soundfile.write(tmp_path / f"{number}.wav", np.full(800, (number + 1) / 64), RATE)
    usable = examine(read_audio(tmp_path), AudioRules()).usable
    (tmp_path / "1.wav").write_bytes(b"gone")
    (tmp_path / "2.wav").unlink()
    batcher = Batcher(AudioStore(usable, sample_rate=RATE), ClassTarget(list("abcd"), dict(zip("abcd", range(4)))))
    loader = AudioLoader(batcher, BatchPlan(np.full(4, 0.1), batch_seconds=9, batch_size=4))
    for batch in islice(loader, 2):
        assert sorted(batch["labels"].tolist()) == [0, 3, 3, 3]
        assert numbers(batch) == batch["labels"].tolist()  # the label is that of the neighbour
    assert sorted(batcher.store.broken) == [1, 2]
    assert len(caplog.records) == 2 and "1.wav" in caplog.text and "2.wav" in caplog.text
    for number in (0, 3):
        (tmp_path / f"{number}.wav").unlink()
    with pytest.raises(DataError, match="no recording can be read"):
        next(iter(AudioLoader(Batcher(AudioStore(usable, sample_rate=RATE), None), loader.plan)))


def test_numbers_that_are_none_do_not_come_through_unseen():
    entries = utterances_of_arrays([np.full(800, np.nan), np.full(800, 0.5)], sample_rate=RATE)
    usable = examine(entries, AudioRules(), decode=False).usable
    store = AudioStore(usable, sample_rate=RATE)
    assert store.readable(0) == 1 and "no numbers" in str(store.broken[0])


def test_frames_of_speech_follow_the_segments():
    target = SpeechTarget([((0.0, 0.1), (0.25, 9.0)), ((0.05, 0.06),)], [0.5, 0.2], sample_rate=1000, hop=50)
    from nemolet.data.buckets import Row

    labels = target.labels([Row((0,)), Row((1, 0), (0.1,))], [500, 800])
    assert labels[0].tolist() == [1, 1, 0, 0, 0, 1, 1, 1, 1, 1] + [-100] * 6
    assert labels[1].tolist() == [0, 1, 0, 0, 0, 0, 1, 1, 0, 0, 0, 1, 1, 1, 1, 1]
