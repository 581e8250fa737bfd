"""Augmentation is a pure function of (seed, epoch, position), and does what its config says."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from crosspatch.data.augment import (
    AugmentConfig,
    _amounts,
    _planar,
    augment,
    draws,
    normalise,
    sample,
    steer,
)
from crosspatch.data.preprocess import Preprocess

SIZE = Preprocess((12, 16), (12, 16))
ROOMY = Preprocess((12, 16), (14, 20))
STRONG = AugmentConfig(
    flip=True, crop_scale=(0.4, 1.0), ratio=(0.75, 1.33), shift=0.1, rotate=20, shear=10,
    brightness=0.4, contrast=0.4, saturation=0.4, erase=0.5, ops=3,
)  # fmt: skip


def pictures(count: int, preprocess: Preprocess = SIZE) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    coarse = torch.randint(0, 256, (count, 3, 4, 5), generator=generator).float()
    smooth = F.interpolate(coarse, preprocess.store, mode="bilinear", align_corners=True)
    return smooth.permute(0, 2, 3, 1).contiguous().to(torch.uint8)


def run(images, config, positions=None, preprocess=SIZE, epoch=0, seed=0):
    positions = torch.arange(len(images)) if positions is None else positions
    return augment(images, positions, epoch=epoch, seed=seed, config=config, preprocess=preprocess)


positions = st.lists(st.integers(0, 5000), min_size=1, max_size=20).map(torch.tensor)


@given(positions, st.integers(0, 2**32), st.integers(0, 1000))
def test_a_draw_depends_on_its_position_alone(chosen, seed, epoch):
    together = draws(chosen, seed=seed, epoch=epoch)
    for position, row in zip(chosen, together, strict=True):
        np.testing.assert_array_equal(draws(position[None], seed=seed, epoch=epoch)[0], row)


def test_draws_are_uniform_and_unlike_each_other():
    table = draws(torch.arange(4000), seed=1, epoch=1)
    assert abs(table.mean(0) - 0.5).max() < 0.03
    assert abs(np.corrcoef(table.T) - np.eye(24)).max() < 0.08
    for other in ({"seed": 2, "epoch": 1}, {"seed": 1, "epoch": 2}):
        assert abs(np.corrcoef(table[:, 0], draws(torch.arange(4000), **other)[:, 0])[0, 1]) < 0.06


def test_a_batch_is_the_sum_of_its_pictures():
    images, chosen = pictures(6), torch.tensor([9, 3, 40, 41, 0, 7])
    together = run(images, STRONG, chosen)
    alone = [run(images[i : i + 1], STRONG, chosen[i : i + 1]) for i in range(6)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)
    assert torch.equal(together, run(images, STRONG, chosen))
    assert not torch.allclose(together, run(images, STRONG, chosen, epoch=1))
    assert not torch.allclose(together, run(images, STRONG, chosen, seed=1))


@pytest.mark.parametrize("preprocess", [SIZE, ROOMY])
def test_the_neutral_config_is_the_evaluation_path(preprocess):
    images = pictures(3, preprocess)
    expected = normalise(images, preprocess)
    assert expected.shape == (3, 3, 12, 16)
    assert torch.equal(run(images, AugmentConfig(), preprocess=preprocess), expected)


def test_normalise_is_what_it_says():
    images = pictures(2, ROOMY)
    value = images[1, 1 + 5, 2 + 7, 2].item() / 255
    expected = (value - ROOMY.mean[2]) / ROOMY.std[2]
    assert normalise(images, ROOMY)[1, 2, 5, 7].item() == pytest.approx(expected, abs=1e-5)


def test_the_input_is_never_changed():
    images = pictures(4)
    before = images.clone()
    run(images, STRONG)
    normalise(images, SIZE)
    assert torch.equal(images, before)


def test_flips_mirror_half_of_the_pictures():
    images = pictures(64)
    plain, flipped = normalise(images, SIZE), run(images, AugmentConfig(flip=True))
    mirrored = (flipped - plain.flip(3)).abs().amax((1, 2, 3)) < 1e-3
    same = (flipped - plain).abs().amax((1, 2, 3)) < 1e-3
    assert torch.all(mirrored ^ same)
    assert 16 < mirrored.sum() < 48


def test_padding_shifts_whole_pictures_by_up_to_its_part_of_the_side():
    table = np.full((3, 24), 0.5)
    table[:, 16], table[:, 17] = [0.0, 0.5, 1.0], [0.5, 0.5, 1.0]
    warp = steer(table, AugmentConfig(pad=0.25), SIZE).warp  # in units of half a side
    assert warp[:, 0, 2].tolist() == [-0.5, 0.0, 0.5]
    assert warp[:, 1, 2].tolist() == [0.0, 0.0, 0.5]
    assert torch.equal(warp[:, :, :2], torch.eye(2).expand(3, 2, 2))
    images = pictures(40)
    moved = run(images, AugmentConfig(pad=0.25))
    assert not torch.allclose(moved, normalise(images, SIZE))


def test_a_half_turn_is_exact():
    """`steer` for the extreme draw of a rotation by 180 degrees equals flipping both axes."""
    config = AugmentConfig(rotate=180.0)
    table = np.full((1, 24), 0.5)
    table[0, 7] = 1.0
    images = pictures(1)
    warp = steer(table, config, SIZE).warp
    torch.testing.assert_close(sample(_planar(images), warp, (12, 16)), _planar(images).flip(2, 3))


def test_a_quarter_turn_keeps_squares_square():
    config, table = AugmentConfig(rotate=90.0), np.full((1, 24), 0.5)
    table[0, 7] = 1.0
    linear = steer(table, config, Preprocess((10, 20), (10, 20))).warp[0, :, :2]
    np.testing.assert_allclose(linear, [[0, -0.5], [2, 0]], atol=1e-6)


def test_the_grid_is_torchs_affine_grid():
    images = _planar(pictures(8))
    warp = steer(draws(torch.arange(8), seed=0, epoch=0), STRONG, SIZE).warp
    grid = F.affine_grid(warp, [8, 3, 9, 7], align_corners=False)
    expected = F.grid_sample(images, grid, "bilinear", "reflection", align_corners=False)
    torch.testing.assert_close(sample(images, warp, (9, 7)), expected, rtol=1e-4, atol=1e-2)


@given(st.floats(0.1, 1.0), st.floats(0.5, 1.0), st.integers(0, 100))
def test_crops_lie_inside_and_have_the_area(scale, ratio, seed):
    config = AugmentConfig(crop_scale=(scale, scale), ratio=(ratio, ratio))
    warp = steer(draws(torch.arange(16), seed=seed, epoch=0), config, SIZE).warp.double().numpy()
    width, height = warp[:, 0, 0], warp[:, 1, 1]
    assert (abs(warp[:, 0, 2]) + width <= 1 + 1e-6).all()
    assert (abs(warp[:, 1, 2]) + height <= 1 + 1e-6).all()
    if scale / ratio <= 1:
        np.testing.assert_allclose(width * height, scale, rtol=1e-5)
        np.testing.assert_allclose(width / height, ratio, rtol=1e-5)


OPS = ("shift", "rotate", "shear", "brightness", "contrast", "saturation")


@given(st.sets(st.sampled_from(OPS), min_size=1), st.integers(0, 6))
def test_exactly_so_many_ops_act(used, ops):
    config = AugmentConfig(**dict.fromkeys(used, 0.3), ops=ops)
    table = draws(torch.arange(30), seed=0, epoch=0)
    amounts = _amounts(table[:, :6], table[:, 6:14], config)
    acting = sum((value.reshape(30, -1) != 0).any(1).astype(int) for value in amounts.values())
    np.testing.assert_array_equal(acting, min(ops, len(used)))
    assert all(abs(value).max() <= 0.3 for value in amounts.values())


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_colours_follow_their_naive_twin(name):
    images = pictures(5)
    config = AugmentConfig(**{name: 0.5})
    table = draws(torch.arange(5), seed=0, epoch=0)
    factor = 1 + _amounts(table[:, :6], table[:, 6:14], config)[name].reshape(-1, 1, 1, 1)
    pixels = images.numpy() / 255
    luma = np.array([0.299, 0.587, 0.114])
    anchor = {
        "brightness": 0.0,
        "contrast": np.array(SIZE.mean) @ luma,
        "saturation": (pixels @ luma)[..., None],
    }[name]
    expected = ((anchor + factor * (pixels - anchor)) - SIZE.mean) / SIZE.std
    ours = run(images, config).permute(0, 2, 3, 1)
    torch.testing.assert_close(ours, torch.from_numpy(expected).float(), rtol=1e-4, atol=1e-4)


def test_erasing_blanks_one_rectangle():
    images = torch.full((400, 20, 20, 3), 255, dtype=torch.uint8)
    square = Preprocess((20, 20), (20, 20))
    blank = (run(images, AugmentConfig(erase=0.25), preprocess=square) == 0).all(1)
    share = blank.float().mean((1, 2))
    hit = share > 0
    assert 60 < hit.sum() < 140
    assert 0.1 < share[hit].mean() < 0.25
    for mask in blank[hit]:
        rows, columns = mask.any(1), mask.any(0)
        assert torch.equal(mask, rows[:, None] & columns)


def test_an_empty_batch_and_a_store_larger_than_the_size():
    assert run(pictures(0), STRONG).shape == (0, 3, 12, 16)
    assert run(pictures(3, ROOMY), STRONG, preprocess=ROOMY).shape == (3, 3, 12, 16)


def test_the_config_is_plain_values():
    assert AugmentConfig(**dataclasses.asdict(STRONG)) == STRONG


def test_a_shift_is_a_part_of_the_side():
    ramp = torch.arange(16, dtype=torch.uint8)[None, None, :, None].expand(1, 12, 16, 3) * 10
    table = np.full((1, 24), 0.5)
    table[0, 6] = 1.0
    warp = steer(table, AugmentConfig(shift=2 / 16), SIZE).warp
    moved = sample(_planar(ramp), warp, (12, 16))
    torch.testing.assert_close(moved[0, 0, 5, :14], torch.arange(2.0, 16.0) * 10)


def test_a_shear_leans_the_rows_and_leaves_the_middle():
    table = np.full((1, 24), 0.5)
    table[0, 8] = 1.0
    warp = steer(table, AugmentConfig(shear=45.0), Preprocess((10, 20), (10, 20))).warp[0]
    torch.testing.assert_close(warp, torch.tensor([[1.0, 0.5, 0.0], [0.0, 1.0, 0.0]]))
