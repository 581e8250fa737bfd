# SPDX-License-Identifier: Apache-2.0
"""MaskMix, progressive labels and TransMix: the authors' numbers, and the laws."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from crosspatch.layers.box import box
from crosspatch.mixing import AREA, HALFWAY, PROGRESSIVE, Mixing, draws
from crosspatch.mixing.deit import BatchCutmix, paste
from crosspatch.mixing.mixpro import (
    MaskMix,
    attention_share,
    blend,
    cell_for,
    draw_cells,
    mask_of,
    progressive,
    trust,
)
from crosspatch.mixing.transmix import TransMix
from crosspatch.models.class_row import ClassRow
from crosspatch.objectives.supervised import attended_lam
from crosspatch.tasks.classify import Classify
from support import goldens

TASK = Classify([str(k) for k in range(10)])
LABELS = torch.tensor([1, 2, 3, 4])
PUBLIC = [("maskmix_mask112_patch14", 112, 14)]


def noise(count: int, height: int, width: int) -> torch.Tensor:
    made = np.random.RandomState(0).standard_normal((count, 3, height, width))
    return torch.from_numpy(made.astype("float32"))


@pytest.mark.parametrize(("name", "cell", "patch"), PUBLIC)
def test_mixing_and_progressive_labels_are_the_authors(name, cell, patch):
    wanted = {k: torch.from_numpy(v) for k, v in goldens.arrays(f"mixpro/{name}").items()}
    side, tokens = math.ceil(224 / cell), 224 // patch
    cells = draw_cells(4, (side, side), 1.0, np.random.RandomState(1))
    mask = mask_of(torch.from_numpy(cells), cell, (224, 224))
    partner = torch.tensor([2, 0, 3, 1])
    mixed, mixing = blend(noise(4, 224, 224), partner, mask, PROGRESSIVE)
    assert torch.equal(mixed[:, :, ::8, ::8], wanted["mixed"])
    assert torch.allclose(mixing.lam, wanted["mask_ratio"])
    soft = TASK.targets(LABELS, mixing, 0.1)
    assert goldens.relative_error(soft, wanted["target"]) < 1e-6

    kept = mask[:, 0, ::patch, ::patch].flatten(1)
    assert torch.equal(kept.view(4, tokens, tokens), wanted["mask_tokens"].float())
    share = attention_share(wanted["attn"], kept)
    logits = wanted["logits"].requires_grad_()
    lam = progressive(mixing.lam, share, soft, logits)
    for got, key in ((share, "lam_attn"), (trust(soft, logits), "sim"), (lam, "lam")):
        assert goldens.relative_error(got.detach(), wanted[key]) < 1e-5
    rows = (ClassRow(wanted["attn"], (tokens, tokens), (224, 224)),)
    assert torch.allclose(attended_lam(mixing, rows, soft, logits), lam)
    loss = TASK.loss(logits, TASK.targets(LABELS, mixing._replace(lam=lam), 0.0)).mean()
    assert goldens.relative_error(loss.detach()[None], wanted["loss"]) < 1e-5
    # the gradient goes through the trust in the attention
    fixed = TASK.loss(logits, TASK.targets(LABELS, mixing._replace(lam=lam.detach()), 0.0)).mean()
    through, past = (torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (loss, fixed))
    assert not torch.allclose(through, past)


def test_transmix_is_the_authors():
    wanted = {k: torch.from_numpy(v) for k, v in goldens.arrays("mixpro/transmix_label").items()}
    drawn = np.random.RandomState(3)
    lam = drawn.beta(1.0, 1.0)
    where = box(224, 224, lam, drawn.randint(0, 224), drawn.randint(0, 224))
    assert list(where[:4]) == wanted["box"].tolist()
    mixed, mixing = paste(noise(4, 224, 224), where)
    assert torch.equal(mixed[:, :, ::8, ::8], wanted["mixed"])
    area = TASK.targets(LABELS, mixing, 0.1)
    assert goldens.relative_error(area, wanted["area_target"]) < 1e-6
    rows = (ClassRow(wanted["attn"], (14, 14), (224, 224)),)
    told = mixing._replace(rule=HALFWAY)
    told = told._replace(lam=attended_lam(told, rows, area, torch.zeros(4, 10)))
    assert goldens.relative_error(TASK.targets(LABELS, told, 0.1), wanted["target"]) < 1e-6


@settings(max_examples=50, deadline=None)
@given(
    st.integers(1, 6), st.integers(1, 5), st.integers(1, 5), st.sampled_from([2, 3]),
    st.integers(1, 3), st.integers(0, 10_000),
)  # fmt: skip
def test_every_patch_comes_from_one_picture(count, rows, columns, patch, times, step):
    images = noise(count, rows * patch, columns * patch)
    cell = patch * times
    mixed, mixing = MaskMix(cell=cell)(images, draws(0, step))
    cut = [F.unfold(x, patch, stride=patch) for x in (mixed, images, images[mixing.partner])]
    own, other = ((cut[0] == cut[i]).all(dim=1) for i in (1, 2))
    assert (own | other).all()
    kept = F.max_pool2d(mixing.mask, patch).flatten(1).bool()
    assert own[kept].all()
    assert other[~kept].all()
    assert torch.allclose(mixing.lam, mixing.mask.mean(dim=(1, 2, 3)))
    assert mixing.rule == AREA


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 6), st.integers(0, 10_000))
def test_every_picture_keeps_as_many_cells_but_others(count, rows, columns, seed):
    cells = draw_cells(count, (rows, columns), 1.0, np.random.default_rng(seed))
    r = np.random.default_rng(seed).beta(1.0, 1.0)
    assert (cells.sum(axis=(1, 2)) == math.ceil(rows * columns * r)).all()


def test_subsets_differ_between_pictures_and_cover_everything():
    cells = draw_cells(200, (4, 4), 50.0, np.random.default_rng(1))  # about half of the cells
    assert len(np.unique(cells.reshape(200, -1), axis=0)) > 150
    assert (cells.mean(axis=0) > 0.3).all()


def test_the_area_of_a_cropped_mask_is_what_is_left_of_it():
    mixing = MaskMix(cell=4)(noise(8, 10, 6), draws(0, 3))[1]
    assert torch.allclose(mixing.lam, mixing.mask.mean(dim=(1, 2, 3)))
    assert len(set(mixing.lam.tolist())) > 1


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 8), st.integers(2, 6), st.integers(0, 10_000))
def test_the_ends_of_progressive_labels(count, classes, seed):
    torch.manual_seed(seed)
    area, share = torch.rand(count), torch.rand(count)
    one, two = torch.eye(classes)[0], torch.eye(classes)[1]
    far = torch.where(two > 0, 1e4, 0.0).expand(count, -1)
    assert torch.allclose(progressive(area, share, one.expand(count, -1), far), area)
    assert torch.allclose(progressive(area, share, two.expand(count, -1), far), share)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 6), st.integers(1, 4), st.integers(0, 10_000), st.booleans())
def test_even_attention_gives_the_area(count, cells, step, halfway):
    images = noise(count, 8 * cells, 8 * cells)
    if halfway:
        mixing = Mixing(*MaskMix(cell=8)(images, draws(0, step))[1][:3], HALFWAY)
    else:
        mixing = MaskMix(cell=8, progressive=True)(images, draws(0, step))[1]
    grid = (2 * cells, 2 * cells)
    row = ClassRow(torch.full((count, 4 * cells**2), 0.3), grid, images.shape[2:])
    lam = attended_lam(mixing, (row,), torch.rand(count, 3), torch.randn(count, 3))
    assert torch.allclose(lam, mixing.lam, atol=1e-6)


def test_a_picture_that_nothing_attends_to_counts_by_area():
    kept = torch.tensor([[1.0, 0, 0, 0]])
    assert attention_share(torch.zeros(1, 4), kept).item() == pytest.approx(0.25)


def test_only_the_part_that_has_patches_is_asked():
    mask = torch.zeros(1, 1, 10, 10)
    mask[..., :4, :4] = 1  # the first of four patches of 4 pixels; two pixels are left over
    mixing = Mixing(torch.tensor([0]), torch.tensor([0.16]), mask, PROGRESSIVE)
    row = ClassRow(torch.tensor([[1.0, 0, 0, 0]]), (2, 2), (8, 8))
    logits = torch.tensor([[50.0, 0.0]])
    lam = attended_lam(mixing, (row,), torch.tensor([[1.0, 0.0]]), logits)
    assert lam.item() == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("patch", "size", "cell"),
    [(14, (224, 224), 56), (16, (224, 224), 32), (4, (32, 32), 8), (1, (30, 30), 6),
     (8, (32, 32), 8), (16, (16, 16), 16), (5, (32, 32), 10), (4, (32, 48), 8)],
)  # fmt: skip
def test_the_cell_of_a_model(patch, size, cell):
    assert cell_for(patch, size) == cell


def test_transmix_draws_deits_box_and_says_its_rule():
    images = noise(4, 8, 12)
    mixed, mixing = TransMix()(images, draws(0, 1))
    assert mixing.rule == HALFWAY
    assert torch.equal(mixed, torch.where(mixing.mask.bool(), images, images.flip(0)))
    assert torch.equal(mixed, BatchCutmix()(images, draws(0, 1))[0])


def test_impossible_settings_are_refused():
    with pytest.raises(ValueError, match="cell"):
        MaskMix(cell=0)
    with pytest.raises(ValueError, match="alpha"):
        MaskMix(0)
    mixing = Mixing(torch.tensor([0]), torch.tensor([0.5]), None, HALFWAY)
    with pytest.raises(ValueError, match="mask"):
        attended_lam(mixing, (), torch.ones(1, 2), torch.ones(1, 2))
