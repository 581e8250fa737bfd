"""Metrics against scikit-learn and against naive loops written from the definitions."""

from __future__ import annotations

import math

import crosspatch._torchvision  # noqa: F401  (torchmetrics needs it first)

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crosspatch.metrics import classification as numbers


def drawn(n: int, k: int, seed: int = 0, sharp: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(n, k)) * sharp
    probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return probs.astype(np.float32), rng.integers(0, k, n)


def naive_ece(probs, labels, bins):
    total = 0.0
    for b in range(bins):
        inside = [i for i in range(len(labels)) if b / bins < probs[i].max() <= (b + 1) / bins]
        if inside:
            right = sum(probs[i].argmax() == labels[i] for i in inside) / len(inside)
            sure = sum(float(probs[i].max()) for i in inside) / len(inside)
            total += len(inside) / len(labels) * abs(right - sure)
    return total


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 60), st.integers(2, 7), st.integers(0, 1000))
def test_figures_equal_naive_twins(n, k, seed):
    probs, labels = drawn(n, k, seed)
    said = probs.argmax(1)
    assert numbers.accuracy(probs, labels) == pytest.approx(float((said == labels).mean()))
    for depth in (1, 2, 5, 99):
        kept = min(depth, k)
        right = [labels[i] in np.argsort(-probs[i], kind="stable")[:kept] for i in range(n)]
        assert numbers.topk(probs, labels, depth) == pytest.approx(float(np.mean(right)))
    naive = -sum(math.log(probs[i, labels[i]]) for i in range(n)) / n
    assert numbers.nll(probs, labels) == pytest.approx(naive, rel=1e-5)
    assert numbers.ece(probs, labels, 15) == pytest.approx(naive_ece(probs, labels, 15), abs=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_tables_equal_scikit_learn(seed):
    from sklearn import metrics as reference

    probs, labels = drawn(40, 5, seed)
    said = probs.argmax(1)
    table = numbers.confusion(said, labels, 6)  # the sixth class does not occur
    assert np.array_equal(table, reference.confusion_matrix(labels, said, labels=range(6)))
    found = numbers.per_class(table)
    wanted = reference.precision_recall_fscore_support(
        labels, said, labels=range(5), zero_division=np.nan
    )
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine[:5] == pytest.approx(theirs, nan_ok=True)
    assert np.isnan(found.f1[5])
    assert numbers.macro_f1(table) == pytest.approx(
        reference.f1_score(labels, said, average="macro")
    )


def test_calibration_equals_torchmetrics():
    import torch
    from torchmetrics.functional.classification import multiclass_calibration_error

    probs, labels = drawn(500, 4, seed=3, sharp=3)
    theirs = multiclass_calibration_error(
        torch.from_numpy(probs), torch.from_numpy(labels), num_classes=4, n_bins=15
    )
    assert numbers.ece(probs, labels) == pytest.approx(float(theirs), abs=1e-5)


def test_equal_probabilities_count_once():
    probs = np.full((3, 3), 1 / 3, dtype=np.float32)
    labels = np.array([0, 1, 2])
    assert numbers.accuracy(probs, labels) == pytest.approx(1 / 3)
    assert numbers.topk(probs, labels, 2) == pytest.approx(2 / 3)


def test_a_certain_error_has_a_finite_loss():
    probs = np.array([[1.0, 0.0]], dtype=np.float32)
    assert 20 < numbers.nll(probs, np.array([1])) < 40


def test_no_pictures_no_numbers():
    probs, labels = np.zeros((0, 3), np.float32), np.zeros(0, np.int64)
    for figure in (numbers.accuracy, numbers.nll, numbers.ece):
        assert math.isnan(figure(probs, labels))
    assert numbers.accuracy_interval(probs, labels) == (0.0, 1.0)
    assert math.isnan(numbers.macro_f1(numbers.confusion(labels, labels, 3)))
