"""Multi-label metrics against scikit-learn, against brute force, and at their edges."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from crosspatch.metrics import multilabel as numbers


def drawn(n: int, k: int, seed: int, values: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities and labels (n, k); values: how many different probabilities there are."""
    rng = np.random.default_rng(seed)
    labels = (rng.random((n, k)) < rng.random(k)).astype(np.float32)
    probs = 1 / (1 + np.exp(-rng.normal(size=(n, k)) - labels))
    if values:
        probs = np.rint(probs * values) / values
    return probs.astype(np.float32), labels


shapes = (st.integers(1, 40), st.integers(2, 5), st.integers(0, 10_000), st.sampled_from([0, 2, 5]))


@settings(max_examples=80, deadline=None)
@given(*shapes)
def test_average_precision_is_scikit_learns(n, k, seed, values):
    probs, labels = drawn(n, k, seed, values)
    found = numbers.average_precision(probs, labels)
    for place in range(k):
        if not labels[:, place].any():
            assert math.isnan(found[place])
        else:
            theirs = sk.average_precision_score(labels[:, place], probs[:, place])
            assert found[place] == pytest.approx(theirs, abs=1e-6)
    known = labels.any(axis=0)
    mean = numbers.mean_average_precision(probs, labels)
    if known.any():
        theirs = sk.average_precision_score(labels[:, known], probs[:, known], average="macro")
        assert mean == pytest.approx(theirs, abs=1e-6)
    else:
        assert math.isnan(mean)


@settings(max_examples=50, deadline=None)
@given(*shapes)
def test_f1_precision_recall_and_hamming_are_scikit_learns(n, k, seed, values):
    probs, labels = drawn(n, k, seed, values)
    said = probs >= 0.5
    precision, recall, f1, support = sk.precision_recall_fscore_support(
        labels, said, average=None, zero_division=np.nan
    )
    found = numbers.per_class(said, labels)
    np.testing.assert_allclose(found.precision, precision)
    np.testing.assert_allclose(found.recall, recall)
    np.testing.assert_allclose(found.f1, f1)
    np.testing.assert_array_equal(found.support, support)
    micro = sk.f1_score(labels, said, average="micro", zero_division=np.nan)
    np.testing.assert_allclose(numbers.micro_f1(said, labels), micro)
    occurs = said.any(axis=0) | labels.any(axis=0)
    macro = f1[occurs].mean() if occurs.any() else np.nan
    np.testing.assert_allclose(numbers.macro_f1(said, labels), macro)
    assert numbers.hamming_loss(said, labels) == pytest.approx((said != labels).mean())
    assert numbers.exact(said, labels) == sum(
        all(a == b for a, b in zip(one, other, strict=True))
        for one, other in zip(said, labels, strict=True)
    )


@settings(max_examples=80, deadline=None)
@given(*shapes)
def test_no_threshold_has_a_better_f1_and_of_equals_the_nearest_to_a_half_is_taken(
    n, k, seed, values
):
    probs, labels = drawn(n, k, seed, values)
    found = numbers.best_thresholds(probs, labels)
    for place, threshold in enumerate(found):
        column, truth = probs[:, place].astype(np.float64), labels[:, place] > 0
        if not truth.any():
            assert threshold == 0.5
            continue
        edges = np.unique(column)
        tried = [0.5, 0.0, 1.0, *edges, *((edges[1:] + edges[:-1]) / 2)]
        score = lambda t, c=column, y=truth: 2 * (y & (c >= t)).sum() / (y.sum() + (c >= t).sum())
        best = max(map(score, tried))
        assert score(threshold) == pytest.approx(best, abs=1e-12)
        if score(0.5) >= best - 1e-12:
            assert threshold == 0.5
        assert 0 <= threshold <= 1


def test_one_class_is_enough():
    probs, labels = drawn(40, 1, 3)
    theirs = sk.average_precision_score(labels[:, 0], probs[:, 0])
    assert numbers.mean_average_precision(probs, labels) == pytest.approx(theirs, abs=1e-6)
    assert numbers.micro_f1(probs >= 0.5, labels) == numbers.macro_f1(probs >= 0.5, labels)


def test_a_threshold_lies_between_probabilities_not_on_one():
    probs = np.array([[0.1], [0.2], [0.3], [0.4]])
    labels = np.array([[0], [0], [1], [1]])
    assert numbers.best_thresholds(probs, labels)[0] == pytest.approx(0.25)
    assert numbers.best_thresholds(1 - probs, 1 - labels)[0] == pytest.approx(0.75)


def test_the_interval_covers_what_it_should():
    """95 % intervals of the mAP of 150 pictures hold the mAP of very many nearly always."""
    whole = numbers.mean_average_precision(*_scored(40_000, 0))
    held = 0
    for seed in range(1, 61):
        low, high = numbers.map_interval(*_scored(150, seed), draws=200)
        assert 0 <= low < high <= 1
        held += low <= whole <= high
    assert held >= 50


def _scored(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = (rng.random((n, 3)) < [0.3, 0.5, 0.2]).astype(np.float32)
    return 1 / (1 + np.exp(-rng.normal(size=(n, 3)) - 1.5 * labels)), labels


def test_the_interval_is_that_of_drawing_one_by_one():
    """The weighted ranking equals the ranking of a set in which pictures stand several times."""
    probs, labels = drawn(30, 3, 5, values=6)
    for weights in numbers._resampled(30, 5, 0):
        for row in weights.T:
            index = np.repeat(np.arange(30), row.astype(int))
            assert len(index) == 30
            for place in range(3):
                once = numbers._precisions(probs[:, place], labels[:, place], row[:, None])[0]
                again = numbers.average_precision(probs[index], labels[index])[place]
                assert once == pytest.approx(again, abs=1e-6, nan_ok=True)


def test_the_interval_is_a_pure_function():
    probs, labels = drawn(200, 4, 0)
    first = numbers.map_interval(probs, labels)
    assert numbers.map_interval(probs, labels) == first
    assert numbers.map_interval(probs, labels, seed=1) != first
    ap = numbers.mean_average_precision(probs, labels)
    assert first[0] < ap < first[1]


def test_figures_without_a_denominator_are_nan():
    none, some = np.zeros((3, 2), np.float32), np.full((3, 2), 0.25, np.float32)
    assert math.isnan(numbers.mean_average_precision(some, none))
    assert all(map(math.isnan, numbers.map_interval(some, none)))
    assert math.isnan(numbers.micro_f1(some >= 0.5, none))
    assert math.isnan(numbers.macro_f1(some >= 0.5, none))
    for figure in (numbers.nll, numbers.ece, numbers.hamming_loss):
        assert math.isnan(figure(none[:0], none[:0]))
    # a ranking without a fault: no draw differs, so there is no interval
    assert all(map(math.isnan, numbers.map_interval(np.eye(4), np.eye(4))))


@given(st.integers(0, 1000))
def test_likelihood_and_calibration_follow_their_definitions(seed):
    probs, labels = drawn(25, 3, seed)
    naive = [
        -sum(math.log(p if y else 1 - p) for p, y in zip(row, truth, strict=True))
        for row, truth in zip(probs.astype(float), labels, strict=True)
    ]
    assert numbers.nll(probs, labels) == pytest.approx(sum(naive) / 25, rel=1e-6)
    total, flat, truth = 0.0, probs.ravel().astype(float), labels.ravel()
    for b in range(15):
        inside = (flat > b / 15) & (flat <= (b + 1) / 15)
        if inside.any():
            total += abs(flat[inside].mean() - truth[inside].mean()) * inside.mean()
    assert numbers.ece(probs, labels) == pytest.approx(total, abs=1e-6)
