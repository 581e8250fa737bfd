"""Head, middle and tail: which classes, and the mean of their accuracies."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crosspatch.metrics.interval import wilson
from crosspatch.metrics.tails import NAMES, group_accuracy, group_sizes, uneven, with_groups
from crosspatch.tasks.classify import Classify


@given(st.integers(1, 3000))
def test_every_class_is_in_one_group(classes):
    sizes = group_sizes(classes)
    assert sum(sizes) == classes
    assert min(sizes) >= 0
    assert sizes[0] == sizes[2]


def test_ten_classes_are_three_four_and_three():
    assert group_sizes(10) == (3, 4, 3)
    assert group_sizes(100) == (30, 40, 30)
    assert group_sizes(3) == (1, 1, 1)
    assert group_sizes(2) == (1, 0, 1)


def test_a_group_is_the_mean_of_its_classes_whatever_their_pictures():
    counts, right, support = [5, 900, 40, 900], [1, 8, 0, 5], [2, 10, 0, 50]
    found = group_accuracy(counts, right, support, (2, 1, 1))
    assert [one["name"] for one in found] == list(NAMES)
    assert [one["classes"] for one in found] == [[1, 3], [2], [0]]
    assert found[0]["accuracy"] == pytest.approx((0.8 + 0.1) / 2)
    assert found[0]["images"] == 60
    assert found[0]["training"] == 1800
    assert found[1]["accuracy"] is None
    assert (found[1]["low"], found[1]["high"]) == (0, 1)
    assert (found[2]["low"], found[2]["high"]) == pytest.approx(wilson(1, 2))


def test_the_interval_of_equal_classes_is_that_of_all_their_pictures():
    found = group_accuracy([9, 8, 7], [5, 7, 6], [10, 10, 10], (3, 0, 0))
    assert len(found) == 1
    assert (found[0]["low"], found[0]["high"]) == pytest.approx(wilson(18, 30))


def test_the_groups_of_the_papers_may_be_said():
    counts = np.arange(100, 0, -1)
    found = group_accuracy(counts, counts * 0 + 1, counts * 0 + 4, (36, 35, 29))
    assert [len(one["classes"]) for one in found] == [36, 35, 29]
    assert found[2]["classes"][-1] == 99
    for sizes in ((36, 35, 28), (50, 50), (101, 0, -1)):
        with pytest.raises(ValueError, match="three sizes"):
            group_accuracy(counts, counts, counts, sizes)


def test_only_uneven_classes_are_told_of():
    assert uneven([100, 10])
    assert not uneven([99, 10])
    assert not uneven([100])
    assert uneven([10, 0])
    probs = np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]])
    figures = Classify("ab").metrics(probs, np.array([0, 1, 1]))
    assert with_groups(figures, ()) is figures
    assert with_groups(figures, (100, 11)) is figures
    found = with_groups(figures, (3, 100))["groups"]
    assert [(one["name"], one["classes"], one["accuracy"]) for one in found] == [
        ("head", ["b"], 0.5),
        ("tail", ["a"], 1.0),
    ]
