"""Ratios of turns that were neighbours, and an interval that holds the median."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from crosspatch.deploy.shrink.timing import speed
from crosspatch.metrics.latency import timing


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=60), st.floats(0.1, 10))
def test_what_the_machine_does_to_both_falls_out(turns, factor):
    found = speed(timing([factor * one for one in turns]), timing(turns))
    assert np.allclose(found, factor)


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=60))
def test_the_median_lies_in_its_interval(turns):
    found = speed(timing(turns), timing([1.0] * len(turns)))
    assert min(turns) <= found.low <= found.median <= found.high <= max(turns)


def test_the_interval_holds_the_true_median_in_95_of_100():
    rng = np.random.default_rng(0)
    for count in (11, 40, 120):
        held = 0
        for _ in range(1000):
            turns = rng.lognormal(0, 0.5, count).tolist()
            found = speed(timing(turns), timing([1.0] * count))
            held += found.low <= 1.0 <= found.high
        assert held >= 940
