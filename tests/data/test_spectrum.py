"""The look for class-wise filters: found where they are, and nowhere else."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageFilter
from sklearn.datasets import load_digits

from crosspatch.data.spectrum import class_kernels, log_spectrum, mirrored
from crosspatch.mixing.cuda_unlearnable import protect
from support.natural import pictures


@pytest.mark.parametrize(("blur", "part"), [(0.1, 1.0), (0.3, 1.0), (0.3, 0.5), (0.5, 0.5)])
def test_filters_of_each_class_are_found(blur: float, part: float) -> None:
    images, labels = pictures(1000, classes=5)
    found = class_kernels(protect(images, labels, 4, classes=5, blur=blur, part=part), labels)
    assert found is not None
    assert found.suspicious
    assert found.mirrored > found.needed > found.chance == 0.2
    assert "fail on other pictures" in found.text


def test_clean_pictures_and_those_of_one_filter_are_not_suspected() -> None:
    images, labels = pictures(1000, classes=5)
    same = protect(images, np.zeros(1000, int), 4, classes=1)
    for some in (images, same):
        found = class_kernels(some, labels)
        assert found is not None
        assert not found.suspicious
        assert found.text.startswith("No sign")


def test_classes_of_another_sharpness_are_not_suspected_although_their_spectra_differ() -> None:
    images, labels = pictures(600, classes=3)
    blurred = [
        np.asarray(Image.fromarray(one).filter(ImageFilter.GaussianBlur(0.2 + 0.4 * int(label))))
        for one, label in zip(images, labels, strict=True)
    ]
    found = class_kernels(blurred, labels)
    assert found is not None
    assert found.spectrum > 0.9
    assert not found.suspicious


@pytest.mark.parametrize("side", [16, 32])
def test_digits_are_easy_classes_and_not_suspected(side: int) -> None:
    digits = load_digits()
    grey = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    images = [np.asarray(Image.fromarray(one).resize((side, side)).convert("RGB")) for one in grey]
    found = class_kernels(images, digits.target)
    assert found is not None
    assert found.spectrum > 0.6
    assert not found.suspicious


def test_too_small_or_too_few_pictures_tell_nothing() -> None:
    images, labels = pictures(99, classes=3)
    assert class_kernels(images, labels) is None
    images, labels = pictures(120, classes=1)
    assert class_kernels(images, labels) is None
    images, labels = pictures(200, classes=100)
    assert class_kernels(images, labels) is None
    assert class_kernels([one[:15] for one in images], labels % 2) is None
    assert class_kernels([], []) is None
    with pytest.raises(ValueError, match="3 pictures and 2 labels"):
        class_kernels(images[:3], [0, 1])


def test_sizes_may_differ_and_a_seed_decides() -> None:
    images, labels = pictures(150, classes=2, side=48)
    cut = [one[: 30 + number % 18, : 48 - number % 10] for number, one in enumerate(images)]
    one, two = (class_kernels(cut, labels, seed=3) for _ in range(2))
    assert one is not None
    assert one == two
    assert one.pictures < 150


def test_a_mirror_changes_the_sign_and_nothing_else() -> None:
    images, _ = pictures(4, classes=1)
    there = np.stack([log_spectrum(one, 32) for one in images])
    back = np.stack([log_spectrum(one[:, ::-1], 32) for one in images])
    np.testing.assert_allclose(mirrored(there, 1, 3), -mirrored(back, 1, 3), atol=1e-9)
    assert mirrored(there, 1, 3).shape == (4, 9)
    assert mirrored(there, 5, 8).shape == (4, 48)
