"""Differences over pictures and seeds: the intervals cover what they say, and the rest of it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crosspatch.metrics.paired import by_class, crossed, holm, needed


def drawn(rng, seeds, pictures, of_picture, of_seed, rest):
    """Differences (S, N) of mean 0 with these standard deviations of pictures, seeds, the rest."""
    table = of_picture * rng.standard_normal(pictures) + rest * rng.standard_normal(
        (seeds, pictures)
    )
    return table + of_seed * rng.standard_normal((seeds, 1))


@pytest.mark.parametrize(
    ("seeds", "pictures", "of_seed", "least"),
    [(3, 300, 0.0, 0.95), (3, 300, 0.03, 0.92), (5, 300, 0.02, 0.94), (10, 200, 0.05, 0.93)],
)
def test_the_interval_covers_the_truth_for_new_pictures_and_new_seeds(
    seeds, pictures, of_seed, least
):
    rng, inside = np.random.default_rng(0), 0
    for _ in range(1000):
        found = crossed(drawn(rng, seeds, pictures, 0.1, of_seed, 0.3))
        inside += found.low <= 0 <= found.high
    assert least <= inside / 1000 <= 0.995


@pytest.mark.parametrize("chosen", [[7, 8, 9], None])
def test_weighted_intervals_are_as_wide_as_the_counted_pictures_make_them(chosen):
    """Of 300 pictures of a tail, 80 % right, the error is that of 300 pictures, not of all 1000."""
    rng, inside, half = np.random.default_rng(0), 0, []
    labels = np.repeat(np.arange(10), 100)
    weights = by_class(labels, chosen)
    for _ in range(400):
        found = crossed(rng.random((1, 1000)) < 0.8, weights)
        inside += found.low <= 0.8 <= found.high
        half.append(found.high - found.mean)
    assert 0.92 <= inside / 400 <= 0.98
    pictures = 1000 if chosen is None else 300
    assert np.mean(half) == pytest.approx(1.96 * math.sqrt(0.16 / pictures), rel=0.05)


@pytest.mark.parametrize(("seeds", "least"), [(2, 0.85), (3, 0.91), (5, 0.93)])
def test_where_seeds_outweigh_pictures_but_not_all_of_them(seeds, least):
    """The worst case for Satterthwaite's degrees of freedom, as the module says."""
    rng, inside = np.random.default_rng(0), 0
    for _ in range(2000):
        found = crossed(drawn(rng, seeds, 300, 0.17, 0.03 * math.sqrt(seeds), 0.0))
        inside += found.low <= 0 <= found.high
    assert least <= inside / 2000 <= 0.97


def test_pictures_alone_would_be_too_sure():
    """What the share of the seeds is for: without it the interval misses too often."""
    rng, inside = np.random.default_rng(0), 0
    for _ in range(500):
        table = drawn(rng, 3, 300, 0.1, 0.03, 0.3)
        found = crossed(table)
        inside += abs(found.mean) <= 1.97 * math.sqrt(found.of_pictures)
    assert inside / 500 < 0.85


def test_of_one_seed_the_interval_is_that_of_a_mean_of_pictures():
    values = np.random.default_rng(0).random((1, 400)) < 0.3
    found = crossed(values)
    error = values.std(ddof=1) / 20
    assert found.mean == pytest.approx(values.mean())
    assert found.high - found.mean == pytest.approx(1.9659 * error, rel=1e-3)
    assert found.of_seeds == 0


def test_p_and_interval_say_the_same():
    rng = np.random.default_rng(1)
    for shift in (0.0, 0.02, 0.04, 0.06, -0.05):
        found = crossed(drawn(rng, 3, 200, 0.1, 0.01, 0.2) + shift)
        assert (found.p < 0.05) == (found.low > 0 or found.high < 0)


def test_where_all_agree_something_is_left_unsure():
    found = crossed(np.zeros((3, 50)))
    assert found.low < 0 < found.high
    assert found.p == 1
    with pytest.raises(ValueError, match="0 pictures"):
        crossed(np.zeros((3, 0)))


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60))
def test_class_weights_make_a_mean_of_class_means(labels):
    labels = np.array(labels)
    values = np.random.default_rng(len(labels)).random(len(labels))
    wanted = np.mean([values[labels == c].mean() for c in np.unique(labels)])
    weights = by_class(labels)
    assert weights.sum() == pytest.approx(len(labels))
    assert (values * weights).mean() == pytest.approx(wanted)


def test_weights_of_chosen_classes():
    labels = np.array([0, 0, 0, 1, 1, 2])
    assert by_class(labels, [1, 2]).tolist() == [0, 0, 0, 1.5, 1.5, 3]
    with pytest.raises(ValueError, match="no picture"):
        by_class(labels, [5])


def test_holm():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_what_would_be_needed():
    rng = np.random.default_rng(0)
    found = crossed(drawn(rng, 5, 300, 0.2, 0.0, 0.3))
    pictures, seeds = needed(found, 0.01)
    more, _ = needed(found, 0.005)
    assert pictures is None or pictures > 300
    assert seeds is None or seeds > 5
    assert pictures is None or more is None or more > pictures
    noisy = crossed(drawn(rng, 3, 300, 0.1, 0.2, 0.1))
    assert needed(noisy, 0.01)[0] is None  # more pictures do not help against seeds
    assert needed(crossed(drawn(rng, 1, 300, 0.1, 0.0, 0.1)))[1] is None
