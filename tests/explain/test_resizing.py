"""The settings that do not fit are named; what size and normalisation do is counted."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import crosspatch as xp
from crosspatch.data.preprocess import Preprocess
from crosspatch.errors import UsageError
from crosspatch.explain.resizing import (
    MODEL,
    RANDOM,
    STATISTICS,
    Score,
    conclusions,
    expectations,
    look,
    measure,
)
from crosspatch.training.package import Trained

MEAN = tuple(0.5 for _ in range(3))
WANTED = Preprocess.for_pictures(32, mean=MEAN, std=(0.29,) * 3)
RNG = np.random.default_rng(0)


def pictures(side: int = 32, channels: int = 3, most: int = 256, count: int = 6):
    return [RNG.integers(0, most, (side, side, channels)).astype(np.uint16) for _ in range(count)]


def titles(pictures, preprocess=WANTED) -> list[tuple[str, str]]:
    return [(one.level, one.title) for one in expectations(preprocess, look(pictures))]


def test_pictures_as_the_model_expects_them():
    assert titles(pictures()) == [("good", "The pictures are what the model expects")]
    seen = look(pictures())
    assert seen.deviation == pytest.approx((0.29,) * 3, abs=0.01)
    grey = look([np.full((4, 6), 51, np.uint8)])
    assert (grey.side, grey.channels, grey.mean, grey.deviation) == (4, 1, (0.2,), (0.0,))


@pytest.mark.parametrize(
    ("given", "level", "word"),
    [
        (pictures(15), "warn", "far smaller"),
        (pictures(channels=13), "bad", "number of channels"),
        (pictures(channels=1), "warn", "number of channels"),
        (pictures(most=4096), "bad", "larger than 8 bits"),
        (pictures(most=2), "bad", "scaled already"),
        (pictures(most=30), "warn", "Brightness or contrast"),
    ],
)
def test_each_trap_is_named(given, level, word):
    ((found, title),) = titles(given)
    assert found == level
    assert word in title


def test_a_picture_of_half_the_size_is_large_enough():
    assert titles(pictures(16))[0][0] == "good"
    assert "of 12 bits" in expectations(WANTED, look(pictures(most=4096)))[0].text
    with pytest.raises(ValueError, match="no picture"):
        look([])


def test_ways_are_scored_and_told():
    def model(seed):
        torch.manual_seed(seed)
        module = xp.create_model("crossvit_micro_32", num_classes=2).eval()
        return Trained(module, ("a", "b"), replace(WANTED), 1.0, 0)

    shown = [RNG.integers(0, 90 + 160 * (i % 2), (16, 16, 3)).astype(np.uint8) for i in range(24)]
    scores = measure(model(0), model(1), [*shown, b"torn"], [i % 2 for i in range(24)] + [0],
                     side=16)  # fmt: skip
    assert {one.features for one in scores} == {MODEL, RANDOM, STATISTICS}
    assert all(len(one.neighbours) == len(one.linear) == 12 for one in scores)
    assert scores[0].neighbours.all()  # brightness is in the statistics
    wrong = [one for one in scores if not one.normalised]
    assert wrong
    assert all(one.features == MODEL for one in wrong)
    (finding,) = conclusions(scores)
    assert len(finding.items) == len(scores)
    assert "Without normalisation kNN-5 changes by" in finding.text
    with pytest.raises(UsageError, match="0 pictures that can be read"):
        measure(model(0), model(1), [b"torn"], [0], side=16)


def test_a_network_that_is_no_better_than_its_control_is_said_to_be_so():
    def score(whose, right, size=(32, 32), normalised=True):
        hits = np.arange(200) < right
        return Score(whose, size, normalised, hits, hits)

    rest = [score(MODEL, 150, normalised=False), score(MODEL, 120, (16, 16)), score(RANDOM, 60)]
    good = conclusions([score(STATISTICS, 50), score(MODEL, 180), *rest])[0]
    assert good.level == "good"
    assert "At 16x16 pixels instead of 32x32 pixels kNN-5 changes by -30.0" in good.text
    bad = conclusions([score(STATISTICS, 182), score(MODEL, 180), *rest])[0]
    assert bad.level == "warn"
    assert "not shown to be better than image statistics." in bad.text
