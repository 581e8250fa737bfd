"""Bins hold every answer once, and say what was right."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crosspatch.metrics.classification import ece
from crosspatch.metrics.reliability import of_answers, reliability


def test_bins_by_hand() -> None:
    low, high = reliability(np.array([0.15, 0.2, 0.95]), np.array([True, False, True]))
    assert (low["low"], low["high"], low["count"]) == (0.1, 0.2, 2)
    assert (low["confidence"], low["right"]) == (pytest.approx(0.175), 0.5)
    assert (high["count"], high["right"]) == (1, 1.0)
    assert high["right_low"] < 0.5 < high["right_high"]


@given(st.integers(1, 60), st.integers(2, 5), st.integers(0, 99))
def test_their_gaps_are_the_calibration_error(count: int, classes: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    probs = rng.dirichlet(np.ones(classes), count)
    labels = rng.integers(0, classes, count)
    bins = of_answers(probs, labels, 15)
    assert sum(one["count"] for one in bins) == count
    gap = sum(one["count"] * abs(one["confidence"] - one["right"]) for one in bins) / count
    assert gap == pytest.approx(ece(probs, labels), abs=1e-9)


def test_several_labels_count_each_by_itself() -> None:
    bins = of_answers(np.array([[0.95, 0.05]]), np.array([[1.0, 0.0]]))
    assert [(one["count"], one["right"]) for one in bins] == [(1, 0.0), (1, 1.0)]


def test_no_answer_is_no_bin() -> None:
    assert reliability(np.zeros(0), np.zeros(0, bool)) == []
