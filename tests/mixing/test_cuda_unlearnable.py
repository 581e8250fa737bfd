"""Unlearnable copies: goldens, the structure of filters and pictures, the shortcut they hide."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import RidgeClassifier
from sklearn.preprocessing import StandardScaler

from crosspatch.data.spectrum import log_spectrum
from crosspatch.mixing.cuda_unlearnable import filtered, make_filters, protect
from support import goldens
from support.natural import pictures


def public() -> tuple[np.ndarray, list[int]]:
    rng = np.random.RandomState(11)
    return rng.randint(0, 256, (20, 32, 32, 3)).astype(np.uint8), [*range(10), *range(10)]


@pytest.mark.parametrize("part", [1.0, 0.5])
def test_filters_and_pictures_are_the_authors_to_the_bit(part: float) -> None:
    golden = goldens.arrays(f"cuda-unlearnable/cifar_seed0_pb0.3_mix{part}")
    images, labels = public()
    assert np.array_equal(make_filters(0, 10).weights, golden["filters"])
    found = np.stack(protect(images, labels, 0, classes=10, part=part))
    assert np.array_equal(found, golden["images"])
    assert (found != images).any(axis=(1, 2, 3)).sum() == (20 if part == 1 else 13)
    other = np.stack(protect(images, labels, 1, classes=10, part=part))
    assert not np.array_equal(other, found)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**80), st.integers(1, 12), st.floats(0.01, 1.0), st.sampled_from([3, 5, 7]))
def test_a_filter_has_a_single_one_and_is_the_same_in_all_channels(key, classes, blur, kernel):
    weights = make_filters(key, classes, blur=blur, kernel=kernel).weights
    assert weights.shape == (classes, 3, kernel, kernel)
    assert (weights == weights[:, :1]).all()
    rest = np.sort(weights[:, 0].reshape(classes, -1), axis=1)
    assert (rest[:, -1] == 1).all()
    assert (rest[:, 0] >= 0).all()
    assert (rest[:, -2] <= np.float32(blur)).all()


def test_a_class_that_is_added_leaves_the_filters_of_the_others() -> None:
    for key in (3, 2**70 + 3):
        few, more = (make_filters(key, count).weights for count in (4, 9))
        assert np.array_equal(more[:4], few)
        assert not np.array_equal(make_filters(key + 2**32, 4).weights, few)


def test_every_picture_reaches_white_and_a_black_one_stays_black() -> None:
    images, labels = pictures(30, classes=3)
    found = protect(images, labels, 2, classes=3)
    assert {int(picture.max()) for picture in found} == {255}
    weights = make_filters(0, 1).weights[0]
    black = np.zeros((5, 7, 3), np.uint8)
    assert np.array_equal(filtered(black, weights), black)
    assert protect([], [], 0, classes=2) == []


def test_with_the_key_the_class_of_every_picture_is_recovered() -> None:
    images, labels = pictures(60, classes=6)
    weights = make_filters(0, 6).weights
    for clean, copy, label in zip(
        images, protect(images, labels, 0, classes=6), labels, strict=True
    ):
        apart = [np.abs(filtered(clean, w).astype(int) - copy).sum() for w in weights]
        assert int(np.argmin(apart)) == label


@pytest.mark.parametrize(("blur", "least"), [(0.1, 0.35), (0.3, 0.7), (0.5, 0.8)])
def test_a_linear_classifier_learns_the_filter_and_nothing_else(blur: float, least: float) -> None:
    images, labels = pictures(1000, classes=5)
    copies = protect(images, labels, 0, classes=5, blur=blur)
    clean, spoilt = (
        np.stack([log_spectrum(one, 32)[:, :17].ravel() for one in some])
        for some in (images, copies)
    )
    train, test = slice(0, 700), slice(700, None)
    scaler = StandardScaler().fit(spoilt[train])
    ridge = RidgeClassifier(alpha=1000.0).fit(scaler.transform(spoilt[train]), labels[train])
    assert ridge.score(scaler.transform(spoilt[test]), labels[test]) > least
    assert ridge.score(scaler.transform(clean[test]), labels[test]) < 0.35


def test_what_is_out_of_range_is_refused() -> None:
    for wrong in ({"key": -1}, {"classes": 0}, {"blur": 0.0}, {"blur": 1.5}, {"kernel": 4}):
        with pytest.raises(ValueError, match="expected a key"):
            make_filters(**{"key": 0, "classes": 2, **wrong})
    images, labels = public()
    with pytest.raises(ValueError, match="a label below 5"):
        protect(images, labels, 0, classes=5)
    with pytest.raises(ValueError, match="share in"):
        protect(images, labels, 0, classes=10, part=1.5)
