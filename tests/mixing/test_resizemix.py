# SPDX-License-Identifier: Apache-2.0
"""ResizeMix: the public port's pictures from the port's random numbers, and the laws."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from crosspatch.mixing import draws
from crosspatch.mixing.resizemix import SCALES, ResizeMix, hole, paste
from support import goldens

PUBLIC = [("uniform_64", 0, 64, "nearest"), ("bilinear_32", 1, 32, "bilinear")]


def noise(count: int, height: int, width: int) -> torch.Tensor:
    made = np.random.RandomState(0).standard_normal((count, 3, height, width))
    return torch.from_numpy(made.astype("float32"))


@pytest.mark.parametrize(("name", "seed", "side", "mode"), PUBLIC)
def test_pictures_are_the_ports(name, seed, side, mode):
    wanted = goldens.arrays(f"resizemix/{name}")
    partner = torch.randperm(4, generator=torch.Generator().manual_seed(seed))
    drawn = np.random.RandomState(seed)  # the port draws from the global generators
    tau, column, row = drawn.uniform(0.1, 0.8), drawn.randint(side), drawn.randint(side)
    mixed, mixing = paste(noise(4, side, side), partner, hole(side, side, tau, row, column), mode)
    labels = torch.tensor([1, 2, 3, 4])
    assert torch.equal(labels[mixing.partner], torch.from_numpy(wanted["y_b"]))
    assert mixing.lam.tolist() == pytest.approx([float(wanted["lam"][0])] * 4, rel=1e-6)
    assert goldens.relative_error(mixed, torch.from_numpy(wanted["mixed"])) < 1e-6


sides = st.integers(1, 17)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 7), sides, sides, st.integers(0, 10_000), st.sampled_from(SCALES))
def test_the_box_has_the_partner_and_the_rest_is_untouched(count, height, width, step, scale):
    images = noise(count, height, width)
    for mode in ("nearest", "bilinear"):
        mixed, mixing = ResizeMix(scale=scale, mode=mode)(images, draws(0, step))
        kept = mixing.mask.bool().expand_as(images)
        assert torch.equal(mixed[kept], images[kept])
        rows, columns = (int((mixing.mask[0, 0].amin(i) == 0).sum()) for i in (1, 0))
        small = F.interpolate(images[mixing.partner], (rows, columns), mode=mode)
        assert torch.equal(mixed[~kept], small.flatten())
        assert sorted(mixing.partner.tolist()) == list(range(count))
        inside = 1 - mixing.mask.mean(dim=(1, 2, 3))
        assert torch.allclose(1 - mixing.lam, inside, atol=1e-6)
        assert inside.min() >= 1 / (height * width) - 1e-6


def test_inside_depends_on_the_partner_alone():
    images, partner = noise(3, 12, 20), torch.tensor([1, 2, 0])
    where = hole(12, 20, 0.5, 6, 3)
    assert where[:4] == (3, 9, 0, 8)  # of 6 x 10, clipped at the left
    changed = images.clone()
    changed[0] += 1
    one, two = (paste(x, partner, where)[0][:, :, 3:9, :8] for x in (images, changed))
    assert torch.equal(one[:2], two[:2])
    assert torch.allclose(one[2] + 1, two[2])
    whole = paste(images, partner, hole(12, 20, 0.99, 6, 10))[0]
    assert torch.equal(whole[0, :, 1, 1], images[1, :, 0, 0])  # the corner is not cropped off


@pytest.mark.parametrize("scale", SCALES)
def test_pasted_area(scale):
    rng, mixer, areas = np.random.default_rng(0), ResizeMix(scale=scale), []
    for _ in range(20_000):
        tau = mixer.tau(rng)
        areas.append(1 - hole(224, 224, tau, *rng.integers(0, 224, 2)).lam)
    if scale == "uniform":
        assert np.mean(areas) == pytest.approx(0.175, abs=0.005)
        assert 0.002 < min(areas) < 0.01
    assert max(areas) < {"kept": 0.91}.get(scale, 0.64)


def test_a_tiny_picture_has_a_box_of_a_pixel():
    for row in range(4):
        assert hole(4, 4, 0.1, row, 0)[:4] == (row, row + 1, 0, 1)


def test_impossible_settings_are_refused():
    for bad in ({"alpha": 0}, {"scale": "x"}, {"mode": "area"}, {"low": 0.8, "high": 0.2}):
        with pytest.raises(ValueError, match=r"expected|alpha"):
            ResizeMix(**bad)
