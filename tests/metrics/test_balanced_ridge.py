"""A linear classifier in one solve."""

import numpy as np
import pytest

from crosspatch.metrics.balanced_ridge import balanced_answers


def drawn(count: int, seed: int, classes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    features = rng.standard_normal((count, 6)) * 0.3 + np.eye(6)[labels] * 50
    return features * 1e3, labels


def test_what_can_be_divided_is_divided_whatever_its_scale() -> None:
    known, asked = drawn(60, 0), drawn(30, 1)
    assert (balanced_answers(*known, asked[0], 3) == asked[1]).all()


def test_classes_count_alike_and_those_never_seen_are_never_said() -> None:
    features, labels = drawn(300, 2)
    kept = (labels != 1) | (np.arange(300) < 9)  # three pictures of one class
    asked = drawn(90, 3)
    said = balanced_answers(features[kept], labels[kept], asked[0], 5)
    assert (said == asked[1]).mean() > 0.95
    assert said.max() < 3


def test_nothing_to_learn_from() -> None:
    with pytest.raises(ValueError, match="nothing to learn"):
        balanced_answers(np.zeros((0, 2)), np.zeros(0, int), np.zeros((1, 2)), 2)
