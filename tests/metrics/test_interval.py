"""Wilson's interval against published values and its own definition."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crosspatch.metrics.interval import Z95, paired, wilson


def test_values_computed_by_hand():
    # 15 of 20: (p + z2/2n +- z sqrt(p(1-p)/n + z2/4n2)) / (1 + z2/n)
    low, high = wilson(15, 20)
    assert low == pytest.approx(0.531297, abs=1e-5)
    assert high == pytest.approx(0.888138, abs=1e-5)


def test_ends_and_no_data():
    low, high = wilson(0, 10)
    assert low == 0
    assert 0 < high < 0.3
    assert wilson(10, 10)[1] == pytest.approx(1)
    assert wilson(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(("k", "n"), [(-1, 4), (5, 4)])
def test_impossible_counts_are_refused(k, n):
    with pytest.raises(ValueError, match=r"0\.\.n"):
        wilson(k, n)


@given(st.integers(1, 5000), st.data())
def test_bounds_solve_the_score_equation(n, data):
    k = data.draw(st.integers(1, n - 1)) if n > 1 else 0
    low, high = wilson(k, n)
    assert 0 <= low <= k / n <= high <= 1
    for bound in (low, high):
        if 0 < bound < 1:
            score = abs(k / n - bound) / math.sqrt(bound * (1 - bound) / n)
            assert score == pytest.approx(Z95, rel=1e-6)


def test_a_paired_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    for n, both in ((60, (0.1, 0.05)), (400, (0.03, 0.03)), (1000, (0.02, 0.001))):
        gain, loss = both
        hits = 0
        for _ in range(2000):
            gained, lost, _ = rng.multinomial(n, [gain, loss, 1 - gain - loss])
            low, high = paired(int(gained), int(lost), n)
            hits += low <= gain - loss <= high
        assert 0.93 <= hits / 2000 <= 0.98


@given(st.integers(0, 50), st.integers(0, 50), st.integers(0, 500))
def test_a_paired_interval_is_antisymmetric_and_holds_the_middle(gained, lost, rest) -> None:
    n = gained + lost + rest
    low, high = paired(gained, lost, n)
    assert (-high, -low) == pytest.approx(paired(lost, gained, n))
    if n:
        assert low <= (gained - lost) / n <= high


def test_equal_answers_leave_little_doubt_only_on_many_pictures() -> None:
    assert paired(0, 0, 10_000)[1] < 0.0003
    assert paired(0, 0, 10)[1] > 0.1
    assert paired(0, 0, 0) == (-1, 1)
    with pytest.raises(ValueError, match="of 3"):
        paired(2, 2, 3)
