"""MedViTV2: the authors' numbers, its counts, pixels and memory cells, the KAN."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import crosspatch as xp
from crosspatch.errors import UsageError
from crosspatch.metrics.macs import count_macs
from crosspatch.models.medvitv2 import MedViTV2, checkpoint_filter_fn
from crosspatch.models.medvitv2_blocks import (
    GlobalBlock,
    Kan,
    KanLayer,
    LocalBlock,
    from_rows,
    to_rows,
)
from support import goldens

MICRO = "medvitv2/medvit_micro_112"
DEAD = {"tiny": 0.98, "small": 2.75, "base": 6.14, "large": 10.9}


def released(name: str, **changes) -> tuple[MedViTV2, goldens.Golden]:
    golden = goldens.read(name)
    return MedViTV2.from_authors(**golden.meta["build"], **changes).eval(), golden


# ---------------------------------------------------------------------- the authors' numbers


CHANGED = [
    "features.0.attn.rpb",
    "features.1.kan.layers.1.spline_linear.weight",
    "features.0.conv.conv.6.fc.2.bias",
    "features.1.mhca.projection.weight",
]


@torch.no_grad()
def test_it_computes_what_the_authors_code_computes() -> None:
    model, golden = released(MICRO)
    state, images, maps = golden.state_dict, golden.images, []
    model.norm.register_forward_pre_hook(lambda _, given: maps.append(given[0]))
    for given in (state, {"state_dict": state}):
        xp.load_released(model, given)
        assert goldens.relative_error(model(images), golden.outputs["out"]) < 1e-4
        assert goldens.relative_error(maps.pop(), golden.outputs["feat"]) < 1e-4
    for name in CHANGED:  # and it notices a changed weight
        xp.load_released(model, state | {name: -state[name] - 1})
        assert goldens.relative_error(model(images), golden.outputs["out"]) > 1e-3
    xp.load_released(model, state)
    pixels = released(MICRO, layout="map")[0]
    pixels.load_state_dict(model.state_dict())  # the weights need the authors' layout
    assert goldens.relative_error(pixels(images), golden.outputs["out"]) > 0.1


@torch.no_grad()
def test_the_whole_depth_in_float64() -> None:
    model, golden = released("medvitv2/medvit_tiny_224_f64")
    xp.load_released(model, golden.state_dict)
    found = model.double()(golden.images[:1].double()).float()
    assert goldens.relative_error(found, golden.outputs["out"][:1]) < 1e-4


def test_what_the_authors_never_use_is_dropped_and_nothing_else() -> None:
    model, golden = released(MICRO)
    state = golden.state_dict
    kept = checkpoint_filter_fn(state, model)
    assert set(kept) == set(model.state_dict())
    dropped = len(state) - len(kept)
    assert dropped == 3 * (len(model.stages[0].blocks[0].conv.state_dict()) + 2)
    own = checkpoint_filter_fn(model.state_dict(), model)
    assert all(torch.equal(own[name], value) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match=r"unexpected: features\.9"):
        xp.load_released(model, state | {"features.9.norm1.weight": torch.ones(1)})


# ---------------------------------------------------------------------- counts


@pytest.mark.parametrize(
    ("name", "parameters", "gmacs"),
    [("tiny", 11.72, 2.64), ("small", 30.09, 3.91), ("base", 67.00, 7.94), ("large", 118.3, 13.0)],
)
def test_sizes(name, parameters, gmacs) -> None:
    with torch.device("meta"):
        model = xp.create_model(f"medvitv2_{name}")
    found = sum(p.numel() for p in model.parameters()) / 1e6
    assert found + DEAD[name] == pytest.approx(parameters, rel=1e-3)
    assert count_macs(model, (3, 224, 224)) / 1e9 == pytest.approx(gmacs, rel=0.01)


def test_a_kan_and_the_preset_for_small_pictures() -> None:
    assert sum(p.numel() for p in Kan(128, 2, 8, "map").parameters()) == 525_056
    model = xp.create_model("medvitv2_micro_32", num_classes=10)
    assert 10.8e6 < count_macs(model, (3, 32, 32)) < 13.1e6


def test_the_order_of_blocks() -> None:
    with torch.device("meta"):
        model = xp.create_model("medvitv2_tiny")
    blocks = [block for stage in model.stages for block in stage.blocks]
    kinds = "".join("L" if isinstance(block, LocalBlock) else "G" for block in blocks)
    assert kinds == "LLLGLLGLLGG"
    kernels = [b.conv.conv[3].kernel_size[0] for b in blocks if isinstance(b, LocalBlock)]
    assert kernels == [7, 7, 3, 3, 3, 3, 3]
    ratios = [b.e_mhsa.sr_ratio for b in blocks if isinstance(b, GlobalBlock)]
    assert ratios == [4, 2, 2, 1]
    build = {"drop_path_rate": 0.1, "num_classes": 2}
    rates = [
        b.drop_path.drop_prob
        for b in xp.create_model("medvitv2_micro_32", **build).stages[0].blocks
    ]
    assert rates == [0.0]


# ---------------------------------------------------------------------- layouts


def test_the_authors_rows_are_cells_of_memory() -> None:
    x = torch.arange(2 * 3 * 4 * 4.0).view(2, 3, 4, 4)
    rows = to_rows(x, "authors")
    assert rows[0, 0, 0].tolist() == [0, 1, 2]
    assert to_rows(x, "map")[0, 0, 0].tolist() == [0, 16, 32]
    last = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(to_rows(last, "authors"), rows)
    for layout in ("map", "authors"):
        assert torch.equal(from_rows(to_rows(x, layout), layout), x)


@pytest.mark.parametrize(("layout", "local"), [("map", True), ("authors", False)])
@torch.no_grad()
def test_only_with_pixels_does_an_impulse_stay_near(layout, local) -> None:
    torch.manual_seed(0)
    made = LocalBlock(8, 8, (16, 16), head_dim=8, kernel_size=3, layout=layout).eval()
    x = torch.randn(1, 8, 16, 16)
    other = x.clone()
    other[0, 3, 8, 8] += 1
    before, after = (from_rows(made.attn(to_rows(y, layout)), layout) for y in (x, other))
    changed = (after - before).abs().amax(dim=(0, 1)) > 0
    assert changed.any()
    changed[7:10, 7:10] = False
    assert changed.any() != local


def test_the_authors_layout_takes_squares_only() -> None:
    with pytest.raises(UsageError, match="square"):
        xp.create_model("medvitv2_micro_32", layout="authors", img_size=(32, 48))
    model = xp.create_model("medvitv2_micro_32", layout="authors", num_classes=2).eval()
    with torch.no_grad():
        assert model(torch.randn(1, 3, 40, 40)).shape == (1, 2)
        with pytest.raises(ValueError, match="layout='map'"):
            model(torch.randn(1, 3, 32, 48))


@pytest.mark.parametrize("size", [(32, 32), (40, 72), (64, 33)])
@torch.no_grad()
def test_small_and_oblong_pictures_run_with_pixels(size) -> None:
    arguments = {"depths": (1, 1, 3, 1), "dims": (32, 128, 128, 128), "num_classes": 3}
    model = xp.create_model("medvitv2_tiny", img_size=size, **arguments).eval()
    last = [-(-side // 32) for side in size]
    assert model.forward_features(torch.randn(1, 3, *size)).shape == (1, 128, *last)


# ---------------------------------------------------------------------- parts


@torch.no_grad()
def test_a_kan_layer_by_hand() -> None:
    torch.manual_seed(0)
    made, x = KanLayer(5, 3), torch.randn(4, 5)
    normed = F.layer_norm(x, (5,), made.layernorm.weight, made.layernorm.bias)
    expected = torch.zeros(4, 3)
    for place in range(5):
        for number in range(8):
            knot = -2 + 4 * number / 7
            basis = 1 - torch.tanh((normed[:, place] - knot) / 0.33) ** 2
            expected += basis[:, None] * made.spline_linear.weight[:, place * 8 + number]
    torch.testing.assert_close(made(x), expected, rtol=1e-4, atol=1e-5)
    assert "grid" not in made.state_dict()


@torch.no_grad()
def test_dilation_and_tiles_are_options() -> None:
    torch.manual_seed(0)
    model = xp.create_model("medvitv2_micro_32", num_classes=3, kernel_size=3).eval()
    x = torch.randn(2, 3, 32, 32)
    same = xp.create_model("medvitv2_micro_32", num_classes=3, kernel_size=3, tile=4).eval()
    apart = xp.create_model(
        "medvitv2_micro_32", num_classes=3, kernel_size=3, dilation=(4, 2, 1, 1)
    )
    for other in (same, apart.eval()):
        other.load_state_dict(model.state_dict())
    torch.testing.assert_close(same(x), model(x), rtol=1e-4, atol=1e-5)
    assert (apart(x) - model(x)).abs().max() > 1e-5


def test_the_authors_arguments() -> None:
    model = MedViTV2.from_authors(
        cls="MedViT", depths=[1, 1, 3, 1], dims=[32, 128, 128, 128], num_classes=2,
        path_dropout=0.3, attn_drop=0.1, drop=0.2, use_checkpoint=True,
    )  # fmt: skip
    assert model.grad_checkpointing
    assert model.stages[0].blocks[0].layout == "authors"
    last = model.stages[3].blocks[0]
    assert last.mlp_drop_path.drop_prob == pytest.approx(0.3)
    assert last.mhsa_drop_path.drop_prob == pytest.approx(0.225)
    assert last.mhca_drop_path.drop_prob == pytest.approx(0.075)
    assert "stages.0.blocks.0.attn.rpb" in model.no_weight_decay()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"layout": "pixels"}, "layout 'pixels'"),
        ({"key_pool": "3d"}, "key_pool '3d'"),
        ({"depths": (1, 1, 4, 1)}, "multiple of 3"),
        ({"dims": (24, 32, 48)}, "dims has 3"),
        ({"dims": (24, 32, 48, 8)}, "positive multiple of 8"),
        ({"dims": (20, 32, 48, 64)}, "divide by heads of 8"),
        ({"kernel_size": 4}, "odd kernel"),
        ({"dilation": (1, 0, 1, 1)}, "dilation 0"),
        ({"global_pool": "token"}, "global_pool"),
    ],
)
def test_impossible_shapes_are_refused(arguments, words) -> None:
    with pytest.raises(UsageError, match=words):
        xp.create_model("medvitv2_micro_32", **arguments)
