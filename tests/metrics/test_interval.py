"""Wilson's interval against published values and its own definition."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crosspatch.metrics.interval import Z95, wilson


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
