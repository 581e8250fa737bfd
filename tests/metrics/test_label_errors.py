"""Scores of suspicion: what they order first, and what they refuse."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crosspatch.metrics.label_errors import SCORES, pooled, scores, suggested, suspects, thresholds

PROBS = np.array([[0.9, 0.1, 0.0], [0.05, 0.9, 0.05], [0.3, 0.4, 0.3], [0.0, 0.2, 0.8]])


def test_the_least_likely_label_comes_first():
    found = suspects(PROBS, np.array([0, 0, 0, 1]))
    np.testing.assert_array_equal(found.indices, [1, 3, 2])
    np.testing.assert_allclose(found.scores, [0.95, 0.8, 0.7])
    np.testing.assert_array_equal(suggested(PROBS, np.array([0, 0, 0, 1])), [1, 1, 1, 2])
    margin = scores(PROBS, np.array([0, 0, 0, 1]), "margin")
    np.testing.assert_allclose(margin, [-0.8, 0.85, 0.1, 0.6])


def test_a_class_that_is_never_sure_is_not_held_against_its_pictures():
    probs = np.array([[0.8, 0.2], [0.8, 0.2], [0.6, 0.4], [0.6, 0.4], [0.9, 0.1]])
    labels = np.array([0, 0, 1, 1, 1])
    np.testing.assert_allclose(thresholds(probs, labels), [0.8, 0.3])
    found = scores(probs, labels, "confident")
    assert found[4] > found[2]
    assert found[2] < scores(probs, labels, "margin")[2]
    assert thresholds(probs, np.zeros(5, int))[1] == 1


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 99), st.sampled_from(SCORES), st.integers(2, 6))
def test_suspects_are_those_to_whom_another_class_is_more_likely(seed, how, classes):
    rng = np.random.default_rng(seed)
    probs, labels = rng.dirichlet(np.ones(classes), 30), rng.integers(0, classes, 30)
    found = suspects(probs, labels, how)
    expected = np.flatnonzero(probs.argmax(axis=1) != labels)
    np.testing.assert_array_equal(np.sort(found.indices), expected)
    assert (np.diff(found.scores) <= 0).all()
    np.testing.assert_array_equal(suggested(probs, labels)[expected], probs.argmax(1)[expected])


def test_opinions_are_pooled():
    np.testing.assert_allclose(pooled(PROBS[1:3], PROBS[1:3]), PROBS[1:3], atol=1e-9)
    one, other = np.array([[0.8, 0.2]]), np.array([[0.2, 0.8]])
    np.testing.assert_allclose(pooled(one, other), [[0.5, 0.5]])
    sure = pooled(np.array([[1.0, 0.0]]), np.array([[0.1, 0.9]]))
    assert 0 < sure[0, 1] < 0.01


def test_planted_errors_are_found():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 5, 400)
    probs = 0.75 * np.eye(5)[truth] + 0.25 * rng.dirichlet(np.ones(5), 400)
    labels = truth.copy()
    labels[:20] = (labels[:20] + 1) % 5
    assert set(suspects(probs, labels).indices[:20].tolist()) == set(range(20))


def test_what_does_not_fit_is_refused():
    for bad in (lambda: scores(PROBS, np.array([0, 0, 0, 3])), lambda: scores(PROBS, np.zeros(3)),
                lambda: suspects(PROBS, np.zeros(4, int), "luck"),
                lambda: suggested(PROBS[:, :1], np.zeros(4, int))):  # fmt: skip
        with pytest.raises(ValueError, match=r"label|none of|other"):
            bad()
    assert len(suspects(PROBS[:0], np.zeros(0, int)).indices) == 0
