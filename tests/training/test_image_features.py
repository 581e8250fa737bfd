"""Features without learning: the authors' numbers, and laws."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from crosspatch.training.image_features import (
    image_statistics,
    learn_patches,
    patch_features,
    patch_filters,
    random_features,
    random_filters,
    whiten,
)
from support.goldens import arrays

GOLDEN = arrays("rs-benchmark/imagestats_zca")
PICTURES = torch.from_numpy(np.random.default_rng(0).normal(size=(5, 3, 16, 12))).float()


def test_statistics_are_the_authors():
    drawn = np.random.RandomState(0).standard_normal((4, 13, 32, 32)).astype("float32")
    found = image_statistics(torch.from_numpy(drawn)).numpy()
    np.testing.assert_allclose(found, GOLDEN["stats"], rtol=1e-4, atol=1e-6)


def test_whitened_patches_are_the_authors():
    found = whiten(torch.from_numpy(GOLDEN["patches"])).numpy()
    assert np.linalg.norm(found - GOLDEN["zca"]) < 1e-4 * np.linalg.norm(GOLDEN["zca"])


def test_random_features_are_means_of_both_sides_of_a_threshold():
    filters = random_filters(8)
    maps = F.conv2d(PICTURES, filters) - 1
    wanted = torch.cat([maps.relu().mean((2, 3)), (-maps).relu().mean((2, 3))], dim=1)
    torch.testing.assert_close(random_features(PICTURES, filters), wanted)
    assert random_features(PICTURES).shape == (5, 256)
    assert random_features(PICTURES[:, :, :2, :1]).shape == (5, 256)
    assert random_features(PICTURES[:0]).shape == (0, 256)


def test_patches_come_from_the_pictures_and_are_repeated():
    one, again = (patch_filters(PICTURES, 6, seed=3) for _ in range(2))
    assert torch.equal(one, again)
    assert not torch.equal(one, patch_filters(PICTURES, 6, seed=4))
    with pytest.raises(ValueError, match="patches of 3"):
        patch_filters(PICTURES[:, :, :2])
    assert torch.isfinite(whiten(torch.ones(4, 3, 3, 3))).all()


def test_patch_features_forget_brightness_and_with_a_mirror_the_side():
    filters = learn_patches(PICTURES, 16)
    found = patch_features(PICTURES, filters)
    assert found.shape == (5, 128)
    torch.testing.assert_close(patch_features(PICTURES + 7, filters), found, atol=1e-4, rtol=1e-4)
    mirrored = patch_features(PICTURES.flip(3), filters, mirror=True)
    same = patch_features(PICTURES, filters, mirror=True)
    quarters = same.view(5, 32, 2, 2)
    torch.testing.assert_close(mirrored, same, atol=1e-5, rtol=1e-4)
    assert quarters.shape == (5, 32, 2, 2)
    small = patch_features(PICTURES[:, :, :3, :3], learn_patches(PICTURES[:, :, :3, :3], 4))
    assert torch.isfinite(small).all()
    assert torch.isfinite(patch_features(torch.zeros(1, 3, 8, 8), filters)).all()
