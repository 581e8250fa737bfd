# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crosspatch.metrics import multilabel
from crosspatch.metrics.calibration import (
    GREATEST,
    LEAST,
    apply_binary_temperature,
    apply_temperature,
    fit_binary_temperature,
    fit_temperature,
)
from crosspatch.metrics.classification import nll


def softmax(logits: np.ndarray) -> np.ndarray:
    scaled = np.exp(logits - logits.max(axis=1, keepdims=True))
    return scaled / scaled.sum(axis=1, keepdims=True)


def drawn(seed: int, sharpness: float, n: int = 4000, k: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities `sharpness` times too sharp, and labels drawn from the right ones."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(n, k)) * 2
    right = softmax(logits).cumsum(axis=1)
    labels = (rng.random((n, 1)) > right).sum(axis=1).clip(max=k - 1)
    return softmax(logits * sharpness), labels


@pytest.mark.parametrize("sharpness", [0.5, 1.0, 3.0])
def test_the_temperature_that_made_the_labels_is_found(sharpness: float) -> None:
    probs, labels = drawn(0, sharpness)
    assert fit_temperature(probs, labels) == pytest.approx(sharpness, rel=0.08)


@given(st.integers(0, 10_000), st.floats(0.3, 4.0))
def test_no_other_temperature_is_likelier(seed: int, sharpness: float) -> None:
    probs, labels = drawn(seed, sharpness, n=500)
    best = fit_temperature(probs, labels)
    least = nll(apply_temperature(probs, best), labels)
    for factor in (0.5, 0.9, 0.99, 1.01, 1.1, 2.0):
        assert least <= nll(apply_temperature(probs, best * factor), labels) + 1e-3


@given(st.floats(LEAST, GREATEST))
def test_a_temperature_keeps_the_order_and_the_sum(temperature: float) -> None:
    probs, _ = drawn(1, 1.0, n=50)
    warm = apply_temperature(probs, temperature)
    np.testing.assert_allclose(warm.sum(axis=1), 1, atol=1e-5)
    assert (warm.argmax(axis=1) == probs.argmax(axis=1)).all()


def test_temperature_one_changes_nothing_and_no_picture_means_one() -> None:
    probs, _ = drawn(2, 1.0, n=50)
    np.testing.assert_allclose(apply_temperature(probs, 1.0), probs, atol=1e-6)
    assert fit_temperature(probs[:0], np.zeros(0, np.int64)) == 1.0


def test_pictures_that_are_all_right_do_not_call_for_certainty() -> None:
    """100 of 100 right: the rule of succession says 101 of 102, and so does the confidence."""
    probs, labels = softmax(np.tile(np.eye(4), (25, 1)) * 9), np.tile(np.arange(4), 25)
    warm = apply_temperature(probs, fit_temperature(probs, labels))
    np.testing.assert_allclose(warm.max(axis=1), 101 / 102, rtol=1e-3)


def scored(seed: int, sharpness: float, n: int = 3000) -> tuple[np.ndarray, np.ndarray]:
    """Sigmoids (n, 3) `sharpness` times too sharp, and labels drawn from the right ones."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(n, 3)) * 2
    labels = (rng.random((n, 3)) < 1 / (1 + np.exp(-logits))).astype(np.float32)
    return 1 / (1 + np.exp(-logits * sharpness)), labels


@pytest.mark.parametrize("sharpness", [0.5, 1.0, 3.0])
def test_one_temperature_of_all_sigmoids_is_found(sharpness: float) -> None:
    probs, labels = scored(0, sharpness)
    best = fit_binary_temperature(probs, labels)
    assert best == pytest.approx(sharpness, rel=0.08)
    least = multilabel.nll(apply_binary_temperature(probs, best), labels)
    for factor in (0.7, 0.95, 1.05, 1.4):
        assert least <= multilabel.nll(apply_binary_temperature(probs, best * factor), labels)


def test_a_temperature_of_sigmoids_keeps_order_and_one_changes_nothing() -> None:
    probs, _ = scored(1, 1.0, n=50)
    np.testing.assert_allclose(apply_binary_temperature(probs, 1.0), probs, atol=1e-6)
    warm = apply_binary_temperature(probs, 3.0)
    np.testing.assert_array_equal(warm.ravel().argsort(), probs.ravel().argsort())
    assert ((warm > 0.5) == (probs > 0.5)).all()
    assert fit_binary_temperature(probs[:0], probs[:0]) == 1.0
