"""The curve of abstaining, and the threshold that a wanted precision asks for."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crosspatch.metrics.abstain import answered, curve, threshold_for

ANSWERS = st.lists(
    st.tuples(st.sampled_from([0.2, 0.5, 0.7, 0.9, 1.0]), st.booleans()), max_size=60
)


def test_the_curve_by_hand() -> None:
    found = curve(np.array([0.9, 0.5, 0.5, 0.4]), np.array([True, True, False, False]))
    assert found.threshold.tolist() == [0.9, 0.5, 0.4]
    assert found.coverage.tolist() == [0.25, 0.75, 1.0]
    assert found.precision.tolist() == pytest.approx([1, 2 / 3, 0.5])


@given(ANSWERS, st.sampled_from([0.3, 0.5, 0.8, 1.0]), st.integers(1, 5))
def test_the_threshold_keeps_its_word_and_no_lower_one_does(answers, wanted, least) -> None:
    sure = np.array([one for one, _ in answers])
    right = np.array([one for _, one in answers], bool)
    found = threshold_for(sure, right, wanted, least)
    good = [
        value
        for value in set(sure.tolist())
        if (sure >= value).sum() >= least and right[sure >= value].mean() >= wanted
    ]
    assert found == (min(good) if good else None)
    if found is not None:
        left = answered(sure, right, found)
        assert left.precision is not None
        assert left.precision >= wanted
        assert left.low <= left.precision <= left.high


def test_nothing_answered_has_no_precision() -> None:
    left = answered(np.array([0.2]), np.array([True]), 0.9)
    assert (left.answered, left.precision, left.coverage) == (0, None, 0.0)
    assert (left.low, left.high) == (0, 1)
    assert len(curve(np.zeros(0), np.zeros(0, bool)).threshold) == 0
