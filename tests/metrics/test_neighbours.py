"""Neighbours are those of all distances, and no picture votes for itself."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crosspatch.metrics import neighbours
from crosspatch.metrics.neighbours import (
    class_means,
    crossvalidated_neighbours,
    nearest,
    nearest_mean,
)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 99), st.integers(1, 12), st.integers(1, 30), st.integers(1, 8))
def test_nearest_are_the_least_of_all_distances(seed, asked, known, k):
    rng = np.random.default_rng(seed)
    queries, gallery = rng.normal(5, 2, (asked, 4)), rng.normal(5, 2, (known, 4))
    places, distances = nearest(queries, gallery, k)
    whole = np.linalg.norm(queries[:, None] - gallery[None], axis=2)
    assert places.shape == distances.shape == (asked, min(k, known))
    np.testing.assert_allclose(distances, np.sort(whole, axis=1)[:, :k], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.take_along_axis(whole, places, 1), distances, rtol=1e-4,
                               atol=1e-5)  # fmt: skip


def test_chunks_change_nothing_and_ties_go_to_the_first(monkeypatch):
    rng = np.random.default_rng(0)
    queries, gallery = rng.normal(size=(50, 3)), rng.normal(size=(20, 3))
    before = nearest(queries, gallery, 3)
    monkeypatch.setattr(neighbours, "CHUNK", 60)
    np.testing.assert_array_equal(before[0], nearest(queries, gallery, 3)[0])
    same = np.tile(gallery[:1], (4, 1))
    np.testing.assert_array_equal(nearest(gallery[:1], same, 3)[0], [[0, 1, 2]])


def test_far_from_zero_nothing_is_lost():
    gallery = np.arange(6, dtype=np.float64)[:, None] * 0.25 + 1e5
    places, distances = nearest(gallery + 0.05, gallery, 1)
    np.testing.assert_array_equal(places[:, 0], np.arange(6))
    np.testing.assert_allclose(distances, 0.05, rtol=1e-2)


def test_class_means_and_the_nearest_of_them():
    features = np.array([[0.0, 0], [2, 0], [10, 10]])
    means = class_means(features, np.array([0, 0, 2]), 4)
    np.testing.assert_array_equal(means[[0, 2]], [[1, 0], [10, 10]])
    assert np.isnan(means[[1, 3]]).all()
    np.testing.assert_array_equal(nearest_mean(np.array([[9.0, 9], [0, 1]]), means), [2, 0])


def test_a_wrong_label_has_no_vote_for_itself():
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], 20)
    features = rng.normal(size=(40, 3)) + 10 * labels[:, None]
    given_labels = labels.copy()
    given_labels[5] = 1
    probs = crossvalidated_neighbours(features, given_labels, 5)
    np.testing.assert_allclose(probs.sum(axis=1), 1)
    assert probs.min() > 0
    np.testing.assert_array_equal(probs.argmax(axis=1), labels)
    assert probs[5, 1] < 0.2


def test_copies_vote_and_lonely_pictures_get_what_all_have():
    features = np.zeros((4, 2))
    probs = crossvalidated_neighbours(features, np.array([0, 1, 1, 1]), 2)
    assert np.isfinite(probs).all()
    assert probs[0].argmax() == 1
    np.testing.assert_array_equal(
        crossvalidated_neighbours(features[:1], np.array([1]), 3, classes=3), [[0, 1, 0]]
    )
    assert crossvalidated_neighbours(features[:0], np.zeros(0, int), 3, 2).shape == (0, 2)


def test_what_does_not_fit_is_refused():
    ones = np.ones((3, 2))
    for bad in (lambda: nearest(ones, np.ones((2, 3)), 1), lambda: nearest(ones, ones, 0),
                lambda: nearest(ones, ones[:0], 1), lambda: class_means(ones, np.arange(3), 2),
                lambda: crossvalidated_neighbours(ones, np.zeros(2, int)),
                lambda: crossvalidated_neighbours(ones, np.zeros(3, int), 0)):  # fmt: skip
        with pytest.raises(ValueError, match=r"\d"):
            bad()
