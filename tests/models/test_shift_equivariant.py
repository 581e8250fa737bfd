"""PolyViT, PolyTwins, PolySwin: the authors' numbers, and the law of circular shifts."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.twins import Twins
from torch.nn.functional import pad

import crosspatch as xp
from crosspatch.errors import UsageError
from crosspatch.metrics.macs import count_macs
from crosspatch.models import shift_equivariant_blocks as blocks
from crosspatch.models.shift_equivariant import PolyOrder, PolyTwins, PolyViT
from crosspatch.models.shift_equivariant_blocks import anchored, fitting_window, strongest_phase
from support import goldens

MICRO = ("polyvit_micro_32", "polytwins_micro_32", "polyswin_micro_32")
AXIS = st.integers(-64, 64)


@cache
def micro(name: str, **arguments):
    """A model whose weights are large enough for pictures to differ in their logits."""
    torch.manual_seed(0)
    model = xp.create_model(name, num_classes=5, **arguments).eval()
    for value in model.parameters():
        value.data.add_(torch.randn_like(value) * (0.1 if value.ndim > 1 else 0.02))
    return model


def each_rolled(x: torch.Tensor, shifts) -> torch.Tensor:
    """Every picture with a shift of its own."""
    return torch.stack([one.roll(shift, (1, 2)) for one, shift in zip(x, shifts, strict=True)])


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The greatest relative one of a picture."""
    return float(((found - expected).norm(dim=1) / expected.norm(dim=1)).max())


# ---------------------------------------------------------------------- the authors' numbers


def test_anchoring_is_the_authors_bit_for_bit() -> None:
    golden = goldens.read("shift-equivariant/polyorder_28_p7")
    assert torch.equal(PolyOrder(7)(golden.images), golden.outputs["out"])
    assert torch.equal(PolyOrder((4, 4))(golden.images), golden.outputs["out4"])
    assert not torch.equal(PolyOrder(2)(golden.images), golden.outputs["out4"])
    assert list(PolyOrder(7).parameters()) == []


def test_a_released_polyvit_computes_what_the_authors_code_computes() -> None:
    golden = goldens.read("shift-equivariant/polyvit_tiny_224")
    model = PolyViT.from_authors(**golden.meta["build"]).eval()
    xp.load_released(model, {"model": golden.state_dict})
    with torch.no_grad():
        tokens = model.forward_features(golden.images)
        assert goldens.relative_error(tokens, golden.outputs["tokens"]) < 1e-4
        assert goldens.relative_error(model(golden.images), golden.outputs["out"]) < 1e-4
    assert sum(p.numel() for p in model.parameters()) == golden.meta["params"]
    name = "pos_conv.proj.weight"
    state = golden.state_dict | {name: golden.state_dict[name].flip(2)}
    xp.load_released(model, state)
    with torch.no_grad():
        assert goldens.relative_error(model(golden.images), golden.outputs["out"]) > 1e-3


def test_polytwins_is_timms_twins_but_for_anchors_and_borders(monkeypatch) -> None:
    torch.manual_seed(0)
    shape = {"img_size": 56, "patch_size": 2, "num_classes": 5, "embed_dims": (16, 32, 48)}
    shape |= {"depths": (2, 2, 4), "num_heads": (1, 2, 3), "sr_ratios": (4, 2, 1)}
    theirs = Twins(**shape, mlp_ratios=(4, 4, 4), wss=(7, 7, 7)).eval()
    model = PolyTwins(**shape).eval()
    xp.load_released(model, theirs.state_dict())
    x = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        assert difference(model(x), theirs(x)) > 1e-4
        monkeypatch.setattr(blocks, "anchored", lambda x, stride: x)
        monkeypatch.setattr(blocks, "wrapped", lambda x: pad(x, (0, 0, 1, 1, 1, 1)))
        assert difference(model(x), theirs(x)) < 1e-5


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("polyvit_tiny_patch16_224", 5.681896),
        ("polyvit_small_patch16_224", 21.98),
        ("polyvit_base_patch16_224", 86.43),
        ("polytwins_svt_small", 24.06),
        ("polytwins_svt_base", 56.07),
        ("polytwins_svt_large", 99.27),
        ("polyswin_tiny", 28.29),
        ("polyswin_small", 49.60),
        ("polyswin_base", 87.77),
    ],
)
def test_parameters(name, parameters) -> None:
    with torch.device("meta"):
        model = xp.create_model(name)
    found = sum(p.numel() for p in model.parameters()) / 1e6
    assert found == pytest.approx(parameters, rel=2e-3)


@pytest.mark.parametrize(
    ("name", "macs"),
    [
        ("polyvit_tiny_patch16_224", 1.167),
        ("polytwins_svt_small", 2.927),
        ("polyvit_micro_32", 0.01209),
        ("polytwins_micro_32", 0.01251),
        ("polyswin_micro_32", 0.01261),
    ],
)
def test_multiply_adds(name, macs) -> None:
    with torch.device("meta"):
        model = xp.create_model(name)
    assert count_macs(model, (3, *model.img_size)) / 1e9 == pytest.approx(macs, rel=0.001)


def test_the_authors_names_choose_shapes() -> None:
    with torch.device("meta"):
        model = PolyTwins.from_authors(cls="PolyTwins", model_type="twins_svt_base", num_classes=3)
    assert model.num_features == 768
    assert model.unit == (32, 32)
    small = PolyViT.from_authors(model_type="vit_small_patch16_224", img_size=64, depth=1)
    assert (small.num_features, small.img_size) == (384, (64, 64))
    for family in (PolyTwins, PolyViT):
        with pytest.raises(ValueError, match="model_type 'resnet18'"):
            family.from_authors(model_type="resnet18")
    with pytest.raises(ValueError, match="stem: PolyViT's own"):
        PolyViT(stem="conv")


# ---------------------------------------------------------------------- anchoring


@settings(deadline=None, max_examples=30)
@given(st.data())
def test_anchoring_by_hand(data) -> None:
    rows, columns = (data.draw(st.integers(1, 5)) for _ in range(2))
    height, width = rows * data.draw(st.integers(1, 4)), columns * data.draw(st.integers(1, 4))
    x = torch.randn(2, height, width, 3)
    found = anchored(x, (rows, columns))
    for one, got in zip(x, found, strict=True):
        phases = [(i, j) for i in range(rows) for j in range(columns)]
        norms = [one[i::rows, j::columns].double().norm() for i, j in phases]
        p, q = phases[norms.index(max(norms))]
        assert torch.equal(got, one.roll((-p, -q), (0, 1)))


@settings(deadline=None, max_examples=30)
@given(AXIS, AXIS)
def test_anchored_shifts_differ_by_whole_strides(down, right) -> None:
    x = torch.randn(1, 12, 20, 3)
    one, other = (anchored(y, (3, 4)) for y in (x, x.roll((down, right), (1, 2))))
    rolls = [one.roll((3 * i, 4 * j), (1, 2)) for i in range(4) for j in range(5)]
    assert any(torch.equal(other, rolled) for rolled in rolls)


def test_the_first_of_equal_phases_in_row_major_order() -> None:
    x = torch.zeros(4, 4, 6, 1)
    x[1, 1, 2] = x[1, 2, 1] = 1  # phases (1, 2) and (0, 1) of (2, 3)
    x[2, 1, 0] = x[2, 0, 5] = -1  # (1, 0) and (0, 2)
    x[3, 1, 1] = 1
    p, q = strongest_phase(x, (2, 3))
    assert list(zip(p.tolist(), q.tolist(), strict=True)) == [(0, 0), (0, 1), (0, 2), (1, 1)]
    flat = torch.full((1, 32, 32, 3), 0.3)
    assert [int(i) for i in strongest_phase(flat, (16, 16))] == [0, 0]


def test_halves_choose_as_their_floats_do_and_the_choice_has_no_gradient() -> None:
    x = (300 * torch.randn(3, 8, 8, 64)).half()  # squares overflow in float16
    for a, b in zip(strongest_phase(x, (4, 4)), strongest_phase(x.float(), (4, 4)), strict=True):
        assert torch.equal(a, b)
        assert not a.requires_grad


def test_the_gradient_is_the_inverse_roll() -> None:
    x = torch.randn(3, 4, 12, 8, requires_grad=True)
    told = torch.randn(3, 4, 12, 8)
    y = PolyOrder(4)(x)
    y.backward(told)
    p, q = strongest_phase(x.permute(0, 2, 3, 1), (4, 4))
    assert len({*zip(p.tolist(), q.tolist(), strict=True)}) > 1
    shifts = list(zip(p.tolist(), q.tolist(), strict=True))
    assert torch.equal(each_rolled(y.detach(), shifts), x.detach())
    assert torch.equal(each_rolled(told, shifts), x.grad)


def test_strides_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="9x8 has no phases of 4x4"):
        PolyOrder(4)(torch.zeros(1, 3, 9, 8))


# ---------------------------------------------------------------------- circular shifts


@pytest.mark.parametrize("name", MICRO)
def test_a_hundred_circular_shifts_leave_the_logits(name) -> None:
    """Each picture of the batch is shifted by another way."""
    model = micro(name)
    torch.manual_seed(1)
    x, shifts = torch.randn(100, 3, 32, 32), torch.randint(-40, 40, (100, 2)).tolist()
    with torch.no_grad():
        before, after = model(x), model(each_rolled(x, shifts))
    assert difference(after, before) < 1e-5
    assert torch.equal(after.argmax(1), before.argmax(1))
    assert difference(before.roll(1, 0), before) > 1e-2
    assert len(before.argmax(1).unique()) > 1


@pytest.mark.parametrize("name", MICRO)
def test_new_networks_keep_the_law(name) -> None:
    """The first norm would otherwise make the energies of all phases equal."""
    torch.manual_seed(3)
    model = xp.create_model(name, num_classes=5).eval()
    x, shifts = torch.randn(64, 3, 32, 32), torch.randint(0, 32, (64, 2)).tolist()
    with torch.no_grad():
        assert difference(model(each_rolled(x, shifts)), model(x)) < 1e-5


@settings(deadline=None, max_examples=5)
@given(st.sampled_from(MICRO), st.data(), AXIS, AXIS)
def test_the_law_holds_for_every_size_that_runs(name, data, down, right) -> None:
    model = micro(name)
    unit = getattr(model, "unit", model.patch_size if name == MICRO[0] else None)
    height, width = (side * data.draw(st.integers(1, 64 // side)) for side in unit)
    x = torch.randn(2, 3, height, width)
    with torch.no_grad():
        before, after = model(x), model(x.roll((down, right), (2, 3)))
    assert difference(after, before) < 1e-5


@pytest.mark.parametrize("name", MICRO)
def test_without_anchors_there_is_no_law(monkeypatch, name) -> None:
    model, x = micro(name), torch.randn(4, 3, 32, 32)
    monkeypatch.setattr(blocks, "anchored", lambda x, stride: x)
    with torch.no_grad():
        assert difference(model(x.roll((1, 3), (2, 3))), model(x)) > 1e-3


def test_translations_that_bring_new_pixels_in_are_not_covered() -> None:
    x, moved = torch.randn(4, 3, 32, 32), torch.zeros(4, 3, 32, 32)
    moved[:, :, 3:, 5:] = x[:, :, :-3, :-5]
    for name in MICRO:
        with torch.no_grad():
            assert difference(micro(name)(moved), micro(name)(x)) > 1e-3


def test_features_of_a_shifted_picture_are_rolled() -> None:
    model, x = micro("polytwins_micro_32"), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        _, one = model.forward_intermediates(x)
        _, other = model.forward_intermediates(x.roll((7, 12), (2, 3)))
    for a, b in zip(one, other, strict=True):
        side = a.shape[2]
        rolls = [b.roll((i, j), (2, 3)) for i in range(side) for j in range(side)]
        assert min(float((a - r).norm() / a.norm()) for r in rolls) < 1e-5


def test_a_stage_that_ends_with_windows_is_anchored_again() -> None:
    shape = {"depths": (1, 3, 2), "sr_ratios": (4, 1, 1)}
    model, x = micro("polytwins_micro_32", **shape), torch.randn(8, 3, 32, 32)
    assert [stage.downsample.anchors for stage in model.stages[1:]] == [True, True]
    usual = micro("polytwins_micro_32").stages[1:]
    assert [stage.downsample.anchors for stage in usual] == [False, False]
    shifts = torch.randint(0, 32, (8, 2)).tolist()
    with torch.no_grad():
        assert difference(model(each_rolled(x, shifts)), model(x)) < 1e-5


# ---------------------------------------------------------------------- sizes


def test_windows_fit_their_map() -> None:
    assert fitting_window(7, (56, 28)) == (7, 7)
    assert fitting_window(7, (8, 10)) == (8, 5)
    assert fitting_window(7, (11, 23)) == (11, 23)
    assert fitting_window(7, (1, 64)) == (1, 8)


@pytest.mark.parametrize("name", MICRO)
def test_sizes_that_do_not_fit_are_refused_with_one_that_does(name) -> None:
    model = xp.create_model(name, num_classes=2, img_size=(37, 45)).eval()
    with torch.no_grad():
        assert model(torch.randn(1, 3, *model.img_size)).shape == (1, 2)
    fits = f"{model.img_size[0]}x{model.img_size[1]}"
    with pytest.raises(ValueError, match=rf"37x45; circular.*such as {fits}.*img_size="):
        model(torch.randn(1, 3, 37, 45))
    with pytest.raises(ValueError, match="img_size="):
        model.forward_intermediates(torch.randn(1, 3, 37, 45))


def test_impossible_shapes_are_refused() -> None:
    for name, arguments, words in (
        ("polytwins_micro_32", {"num_heads": (2, 3, 6)}, "must divide by 3 heads"),
        ("polytwins_micro_32", {"depths": (2, 2)}, "one a stage"),
        ("polyswin_micro_32", {"num_heads": (2, 2)}, "one a stage"),
        ("polyvit_micro_32", {"pos_embed": "learn"}, "pos_embed"),
    ):
        with pytest.raises(UsageError, match=words):
            xp.create_model(name, **arguments)
