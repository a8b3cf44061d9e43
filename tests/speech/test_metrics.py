"""Confusion, verification and detection against plain counting; pictures are well-formed."""

from __future__ import annotations

from xml.etree import ElementTree

import numpy as np
import pytest

from nemolet.errors import DataError
from nemolet.speech.charts import confusion_matrix, histogram
from nemolet.speech.metrics import (
    Confusion,
    DetectionScore,
    detection_curve,
    frames_of,
    segments_of,
    verification,
)


def brute(scores, same, prior):
    """Rates at every possible threshold, by counting."""
    rates = []
    for threshold in [*sorted(set(scores)), np.inf]:
        missed = np.mean([s < threshold for s, t in zip(scores, same) if t])
        false = np.mean([s >= threshold for s, t in zip(scores, same) if not t])
        rates.append((missed, false))
    costs = [m * prior + f * (1 - prior) for m, f in rates]
    return rates, min(costs) / min(prior, 1 - prior)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("rounded", [False, True])
def test_verification_is_what_counting_gives(seed, rounded):
    random = np.random.default_rng(seed)
    same = random.random(300) < 0.3
    scores = random.standard_normal(300) + 1.5 * same
    scores = scores.round(1) if rounded else scores  # many equal scores
    rates, cost = brute(scores, same, 0.05)
    misses, falses, thresholds = detection_curve(scores, same)
    np.testing.assert_allclose(np.stack([misses, falses], 1), rates)
    assert thresholds[-1] == np.inf
    found = verification(scores, same, prior=0.05)
    assert found.minimum_cost == pytest.approx(cost)
    before = max(i for i, (m, f) in enumerate(rates) if m <= f)
    low, high = sorted((rates[before], rates[min(before + 1, len(rates) - 1)]))
    assert min(low) - 1e-9 <= found.equal_error_rate <= max(high) + 1e-9
    closest = min(abs(m - f) for m, f in rates)
    nearest = next((m + f) / 2 for m, f in rates if abs(m - f) == closest)
    assert found.equal_error_rate == pytest.approx(nearest, abs=closest + 1e-9)


def test_perfect_and_useless_scores():
    assert verification([3.0, 2.0, 1.0, 0.0], [1, 1, 0, 0]) == (0.0, 2.0, 0.0)
    useless = verification([1.0] * 10, [True] * 5 + [False] * 5)
    assert useless.equal_error_rate == pytest.approx(0.5) and useless.minimum_cost == pytest.approx(1.0)


@pytest.mark.parametrize("scores, same", [([1.0], [True]), ([np.nan, 1.0], [True, False]), ([1.0, 2.0], [True])])
def test_scores_that_say_nothing_are_refused(scores, same):
    with pytest.raises(DataError, match="nothing can be said"):
        verification(scores, same)


def test_confusion_counts_and_ignores_what_has_no_label():
    random = np.random.default_rng(0)
    labels, predictions = random.integers(-1, 4, 200), random.integers(0, 4, 200)
    labels[labels < 0] = -100
    confusion = Confusion.of(labels, predictions, names=list("abcd"))
    kept = labels >= 0
    assert confusion.counts.sum() == kept.sum()
    assert confusion.accuracy == pytest.approx((labels == predictions)[kept].mean())
    for index in range(4):
        assert confusion.recall[index] == pytest.approx((predictions[labels == index] == index).mean())
        assert confusion.precision[index] == pytest.approx((labels[kept & (predictions == index)] == index).mean())
    most = confusion.worst(1)[0]
    assert most[2] == max(confusion.counts[i, j] for i in range(4) for j in range(4) if i != j)


def test_frames_of_speech_are_scored():
    labels, predictions = np.array([1, 1, 0, 0, 1, -100]), np.array([1, 0, 1, 0, 1, 1])
    score = DetectionScore.of_frames(labels, predictions)
    assert (score.found, score.missed, score.false, score.frames) == (2, 1, 1, 5)
    assert score.precision == score.recall == score.f1 == pytest.approx(2 / 3)
    assert score.error_rate == pytest.approx(2 / 3)
    assert score + score == DetectionScore(4, 2, 2, 10)
    assert "F1 66.67%" in str(score)
    assert DetectionScore.of_frames([0, 0], [0, 0]).f1 == 0.0


def test_segments_and_frames_are_two_ways_to_say_one_thing():
    frames = np.random.default_rng(0).random(500) < 0.5
    assert (frames_of(segments_of(frames), seconds=5.0) == frames).all()
    score = DetectionScore.of_segments([(1.0, 2.0)], [(1.5, 2.5)], seconds=4.0)
    assert (score.found, score.missed, score.false, score.frames) == (50, 50, 50, 400)
    assert not frames_of([(7.0, 9.0), (-3.0, -1.0)], seconds=5.0).any()


def test_pictures_are_drawings_that_hold_their_numbers(tmp_path):
    confusion_matrix(Confusion.of([0, 0, 1], [0, 1, 1], names=["<no>", "yes"]), tmp_path / "c.svg")
    histogram([0.5, 1.0, 1.0, 9.0], tmp_path / "h.svg", title="Länge & mehr", unit="s", bins=4)
    texts = {name: "".join(ElementTree.parse(tmp_path / name).getroot().itertext()) for name in ("c.svg", "h.svg")}
    assert "66.7% of 3 right" in texts["c.svg"] and "<no>" in texts["c.svg"]
    assert "Länge & mehr" in texts["h.svg"]
    bars = ElementTree.parse(tmp_path / "h.svg").findall(".//{*}rect/{*}title")
    assert [int(bar.text) for bar in bars] == [3, 0, 0, 1]
