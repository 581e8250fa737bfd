"""DeiT's mixing: the boxes of the authors' code, number by number, and the laws of the seam."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crosspatch.mixing import draws
from crosspatch.mixing.deit import BatchCutmix, BatchMixup, blend, box, paste
from support import goldens

ROWS = range(6)


@pytest.mark.parametrize("row", ROWS)
def test_boxes_are_the_authors(row):
    given = goldens.arrays("deit/recipe")["cutmix_seed_lam_yl_yh_xl_xh_lamcorr"][row]
    drawn = np.random.RandomState(row)  # the authors draw from numpy's global generator
    lam = drawn.beta(1.0, 1.0)
    assert lam == pytest.approx(given[0], rel=1e-12)
    centre = drawn.randint(0, 224), drawn.randint(0, 224)
    found = box(224, 224, lam, *centre)
    assert found[:4] == tuple(given[1:5])
    assert found.lam == pytest.approx(given[5], rel=1e-12)


def batch(count: int, height: int = 12, width: int = 9) -> torch.Tensor:
    """Image b is constantly b."""
    return torch.arange(count, dtype=torch.float32).view(-1, 1, 1, 1).expand(-1, 3, height, width)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(0, 10_000), st.booleans())
def test_one_draw_mixes_the_batch_with_its_reverse_as_it_says(count, step, pastes):
    images = batch(count)
    mixed, mixing = (BatchCutmix() if pastes else BatchMixup())(images, draws(0, step))
    assert mixing.partner.tolist() == list(range(count))[::-1]
    assert len(set(mixing.lam.tolist())) == 1
    keep = mixing.mask if pastes else mixing.lam.view(-1, 1, 1, 1)
    assert torch.allclose(mixed, keep * images + (1 - keep) * images.flip(0), atol=1e-5)
    if pastes:
        assert torch.allclose(mixing.lam, mixing.mask.mean((1, 2, 3)))


def test_extremes_keep_and_exchange_everything():
    images = batch(4)
    assert torch.equal(blend(images, 1.0)[0], images)
    assert torch.equal(blend(images, 0.0)[0], images.flip(0))
    assert torch.equal(paste(images, box(12, 9, 1.0, 6, 4))[0], images)
    whole = box(12, 8, 0.0, 6, 4)
    assert whole == (0, 12, 0, 8, 0.0)


def test_draws_are_a_function_of_the_step():
    images = batch(6)
    for mixer in (BatchMixup(), BatchCutmix()):
        assert torch.equal(mixer(images, draws(3, 7))[0], mixer(images, draws(3, 7))[0])
        assert not torch.equal(mixer(images, draws(3, 7))[0], mixer(images, draws(3, 8))[0])


def test_impossible_settings_are_refused():
    for mixer in (BatchMixup, BatchCutmix):
        with pytest.raises(ValueError, match="alpha"):
            mixer(0)
