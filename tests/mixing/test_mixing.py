"""Laws of batch mixing: what is said to be mixed is what is mixed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crosspatch.mixing import OneOf, draws
from crosspatch.mixing.cutmix import Cutmix, boxes
from crosspatch.mixing.mixup import Mixup


def batch(count: int, height: int = 12, width: int = 9) -> torch.Tensor:
    """Image b is constantly b."""
    return torch.arange(count, dtype=torch.float32).view(-1, 1, 1, 1).expand(-1, 3, height, width)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(0, 10_000), st.floats(0.1, 4))
def test_mixup_blends_as_it_says(count, step, alpha):
    mixed, mixing = Mixup(alpha)(batch(count), draws(0, step))
    own = torch.arange(count, dtype=torch.float32)
    wanted = mixing.lam * own + (1 - mixing.lam) * mixing.partner
    assert torch.allclose(mixed.amax((1, 2, 3)), wanted, atol=1e-5)
    assert torch.allclose(mixed.amin((1, 2, 3)), wanted, atol=1e-5)
    assert mixing.mask is None
    assert ((mixing.lam >= 0.5) & (mixing.lam <= 1)).all()
    assert sorted(mixing.partner.tolist()) == list(range(count))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(0, 10_000), st.floats(0.1, 4))
def test_cutmix_pastes_as_it_says(count, step, alpha):
    images = batch(count)
    mixed, mixing = Cutmix(alpha)(images, draws(0, step))
    assert mixing.mask is not None
    assert mixing.mask.shape == (count, 1, 12, 9)
    wanted = torch.where(mixing.mask.bool(), images, images[mixing.partner])
    assert torch.equal(mixed, wanted)
    assert torch.allclose(mixing.lam, mixing.mask.mean((1, 2, 3)))


def test_cutmix_box_has_the_asked_area_before_clipping():
    rng = np.random.default_rng(0)
    lam = np.full(4000, 0.75)
    top, bottom, left, right = boxes(32, 32, lam, rng)
    assert ((bottom - top) <= 16).all()
    assert ((right - left) <= 16).all()
    inside = (top > 0) & (bottom < 32) & (left > 0) & (right < 32)
    assert ((bottom - top)[inside] == 16).all()
    assert top.min() == 0
    assert bottom.max() == 32


def test_draws_are_a_function_of_seed_step_and_rank():
    images = batch(5)
    again = [Mixup()(images, draws(3, 7, 1))[0] for _ in range(2)]
    assert torch.equal(*again)
    for other in (draws(4, 7, 1), draws(3, 8, 1), draws(3, 7, 0)):
        assert not torch.equal(again[0], Mixup()(images, other)[0])


def test_one_of_picks_by_its_probabilities():
    choice = OneOf([Mixup(), Cutmix()], [0.25, 0.5])
    kinds = {"mixup": 0, "cutmix": 0, "none": 0}
    for step in range(600):
        _, mixing = choice(batch(2, 4, 4), draws(0, step))
        kind = "none" if mixing is None else "mixup" if mixing.mask is None else "cutmix"
        kinds[kind] += 1
    assert kinds["mixup"] == pytest.approx(150, abs=45)
    assert kinds["cutmix"] == pytest.approx(300, abs=50)


def test_impossible_settings_are_refused():
    with pytest.raises(ValueError, match="alpha"):
        Mixup(0)
    with pytest.raises(ValueError, match="alpha"):
        Cutmix(-1)
    with pytest.raises(ValueError, match="probabilities"):
        OneOf([Mixup()], [0.5, 0.5])
    with pytest.raises(ValueError, match="sum"):
        OneOf([Mixup(), Cutmix()], [0.9, 0.5])
