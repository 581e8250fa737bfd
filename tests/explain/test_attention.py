"""Maps sum to 1 or to what heads contribute; branches add up."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from crosspatch.errors import UsageError
from crosspatch.explain import class_maps, dla, rollout, shares
from crosspatch.explain.attention import layout, written_from
from crosspatch.explain.forward import HEADED, Part
from crosspatch.explain.overlay import shade, signed
from crosspatch.models.class_row import logits_and_class_rows
from support.explainable import MODELS, crossvit, pictures, trunk

FLAT = [name for name in MODELS if name != "vit of uneven blocks"]


@pytest.mark.parametrize("name", FLAT)
def test_maps_and_rollouts_sum_to_one(name: str) -> None:
    model, images = MODELS[name](), pictures(2)
    maps = class_maps(model, images)
    assert maps
    for one in maps:
        assert (one.heads >= 0).all()
        assert one.heads.sum(axis=(2, 3)) + one.elsewhere == pytest.approx(1, abs=1e-5)
    for one in rollout(model, images):
        whole = sum(m.sum(axis=(1, 2)) for m in one.maps.values()) + one.elsewhere
        assert whole == pytest.approx(1, abs=1e-5)
        assert all((m >= -1e-12).all() for m in one.maps.values())
        assert (one.elsewhere >= -1e-5).all()


@pytest.mark.parametrize("name", ["vit", "lvvit", "crossvit"])
def test_the_last_map_is_what_the_network_itself_shows(name: str) -> None:
    model, images = MODELS[name](), pictures(2)
    with torch.no_grad():
        _, rows = logits_and_class_rows(model, images)
    maps = class_maps(model, images)[-len(rows) :]
    for mine, own in zip(maps, rows, strict=True):
        assert mine.heads.mean(axis=1).reshape(2, -1) == pytest.approx(
            own.attention.numpy(), abs=1e-5
        )
        assert mine.heads.shape[2:] == own.grid


def test_a_fusion_lets_the_other_branch_in_and_none_does_not() -> None:
    images = pictures(2)
    for fusion, lets in (("cross", True), ("class_token", True), ("all", True), ("none", False)):
        fine, coarse = rollout(crossvit(fusion=fusion), images)
        for one, other in ((fine, "coarse"), (coarse, "fine")):
            assert (one.maps[other].sum() > 0) == lets, fusion
    into = {(m.branch, m.onto) for m in class_maps(crossvit(), images) if m.fusion}
    assert into == {("fine", "coarse"), ("coarse", "fine")}


@pytest.mark.parametrize("name", ["vit", "vit avg", "deit distilled", "crossvit", "crossvit all"])
def test_what_heads_wrote_patch_by_patch_adds_up_to_what_they_contribute(name: str) -> None:
    model, images = MODELS[name](), pictures(2)
    found = dla(model, images, 0, 1, sources=True)
    shape = layout(model, images)
    maps = written_from(shape, found)
    heads = [part.kind in HEADED and part.kind != "fusion own" for part in found.parts]
    whole = found.values[:, heads, 0].sum(axis=1)
    patches = sum(m.sum(axis=(1, 2)) for m in maps.values())
    rest = np.zeros(2)
    for part, slope in found.slopes.items():
        if part.kind == "head" or part == Part("all", "fusion head", part.block):
            sources, rows = found.seen[part, "sources"], found.seen[part, "attention"]
            keys = torch.einsum("bhnc,bhkc,bhnk->bk", slope[0], sources, rows).numpy()
            starts = np.cumsum([0, *shape.counts[:-1]]) if part.branch == "all" else [0]
            rest += sum(keys[:, s : s + shape.prefix].sum(axis=1) for s in starts)
    assert patches + rest == pytest.approx(whole)


def test_sources_must_have_been_kept_and_stages_need_one_grid() -> None:
    model, images = trunk(), pictures(2)
    with pytest.raises(UsageError, match="without sources"):
        written_from(layout(model, images), dla(model, images, 0))
    with pytest.raises(UsageError, match="grids of their own"):
        class_maps(MODELS["vit of uneven blocks"](), images)


@pytest.mark.parametrize("fusion", ["cross", "class_token", "all", "none"])
def test_what_the_branches_wrote_and_what_was_read_of_them_add_up(fusion: str) -> None:
    model, images = crossvit(fusion=fusion), pictures()
    found = shares(model, images, 0, 1)
    assert sum(found.written.values()) == pytest.approx(found.difference)
    assert sum(found.read.values()) == pytest.approx(found.difference, abs=1e-5)
    assert found.difference == pytest.approx(found.logits[:, 0] - found.logits[:, 1], abs=1e-5)
    taken = fusion in ("cross", "all")
    assert ("exchange" in found.without) == taken
    assert (np.abs(found.written["exchange"]) > 0).all() == taken
    for blind in ("fine", "coarse"):
        assert not np.allclose(found.without[blind], found.logits)


def test_a_branch_that_sees_a_plain_picture_anyway_is_not_missed() -> None:
    plain = torch.full((2, 3, 32, 32), 0.3)
    found = shares(crossvit(), plain, 0)
    for blind in ("fine", "coarse"):
        assert found.without[blind] == pytest.approx(found.logits, abs=1e-5)


def test_one_branch_has_no_shares() -> None:
    with pytest.raises(UsageError, match="one branch"):
        shares(trunk(), pictures(), 0)


def test_overlays_are_coloured_where_it_looks_and_by_sign() -> None:
    for level in (0, 200):  # on black as on light pictures
        pixels = np.full((32, 32, 3), level, np.uint8)
        shown = np.asarray(shade(pixels, np.array([[1.0, 0.0], [0.5, 0.0]]))).astype(int)
        assert shown.shape == (192, 192, 3)
        green = shown[..., 1] - shown[..., 0]
        assert green[0, 0] > green[-1, 0] + 20 > 40
        assert green[0, -1] == green[-1, -1] == 0
        coloured = np.asarray(signed(pixels, np.array([[1.0, -1.0], [0.0, 0.0]]))).astype(int)
        assert coloured[0, 0, 0] > coloured[0, 0, 2] + 80
        assert coloured[0, -1, 2] > coloured[0, -1, 0] + 80
        assert len(set(coloured[-1, 0])) == 1
    shade(pixels, np.zeros((2, 2)))
