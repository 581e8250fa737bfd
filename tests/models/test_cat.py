"""CAT: the authors' numbers, attention across patches against a loop, how far a triple sees."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import nn

import crosspatch as xp
from crosspatch.errors import DataError
from crosspatch.layers.linear import switched
from crosspatch.layers.position import resize_table
from crosspatch.layers.windows import WindowAttention
from crosspatch.metrics.macs import count_macs
from crosspatch.models.cat import CAT, CrossPatchAttention, Embed, Triple
from support import goldens

GOLDENS = ["cat_tiny", "cat_tiny_448"]


def triple(size: tuple[int, int], patch: int, dim: int = 8, heads: int = 2) -> Triple:
    torch.manual_seed(0)
    made = Triple(
        dim, heads, (patch, patch), size, 0.0, mlp_ratio=2.0, qkv_bias=True, drop=0.0,
        ipsa_drop=0.0, cpsa_drop=0.0, norm=nn.LayerNorm,
    ).eval()  # fmt: skip
    for name, value in made.named_parameters():
        if "bias" in name:
            value.data.normal_(std=0.3)
    return made


# ---------------------------------------------------------------------- the authors' numbers


@pytest.mark.parametrize("name", GOLDENS)
def test_the_authors_logits(name) -> None:
    golden = goldens.read(f"cat/{name}")
    model = CAT.from_authors(**golden.meta["build"]).eval()
    assert sum(p.numel() for p in model.parameters()) == golden.meta["params"]
    xp.load_released(model, {"model": golden.state_dict})
    for products in ("off", "on") if name == GOLDENS[0] else ("off",):
        with torch.no_grad(), switched(products):
            found = model(golden.images)
        assert goldens.relative_error(found, golden.outputs["out"]) < 1e-4


@pytest.mark.parametrize(
    "changed", ["layers.1.cpsa_blocks.0.attn.qkv.weight", "layers.1.downsample.reduction.weight"]
)
def test_a_golden_notices_a_changed_weight(changed) -> None:
    golden = goldens.read("cat/cat_tiny")
    model, state = xp.create_model("cat_tiny").eval(), golden.state_dict
    xp.load_released(model, state | {changed: -state[changed]})
    with torch.no_grad():
        found = model(golden.images)
    assert goldens.relative_error(found, golden.outputs["out"]) > 1e-3


@pytest.mark.parametrize(
    ("name", "parameters", "macs"),
    [("tiny", 16_870_996, 2.77), ("small", 37_294_258, 6.06), ("base", 51_531_922, 8.93)],
)
def test_parameters_and_macs(name, parameters, macs) -> None:
    with torch.device("meta"):
        model = xp.create_model(f"cat_{name}")
        assert sum(p.numel() for p in model.parameters()) == parameters
        assert count_macs(model, (3, 224, 224)) / 1e9 == pytest.approx(macs, abs=0.006)
    assert (model.default_cfg["pool_size"], model.window(3)) == ((7, 7), (7, 7))


def test_only_positions_depend_on_the_size() -> None:
    with torch.device("meta"):
        small, large, plain = (
            {k: v.shape for k, v in xp.create_model("cat_tiny", **build).state_dict().items()}
            for build in ({}, {"img_size": 448}, {"ape": False})
        )
    assert {name for name in small if small[name] != large[name]} == {"stem.ape"}
    assert set(small) - set(plain) == {"stem.ape"}


def test_positions_are_resized() -> None:
    build = {"num_classes": 3, "ape": True, "img_size": (40, 24), "fit_windows": False}
    given = xp.create_model("cat_micro_32", **(build | {"img_size": 32})).eval()
    other = xp.create_model("cat_micro_32", **build).eval()
    state = given.state_dict()
    xp.load_released(other, {"ape" if k == "stem.ape" else k: v for k, v in state.items()})
    expected = resize_table(state["stem.ape"], (16, 16), (20, 12), 0)
    assert torch.equal(other.stem.ape, expected)
    x = torch.randn(2, 3, 40, 24)
    with torch.no_grad():
        torch.testing.assert_close(given(x), other(x))
    names = {n for n, _ in given.named_parameters() if n.endswith(("ape", "bias_table"))}
    assert given.no_weight_decay() == names
    assert len(names) == 5


def test_older_names_are_refused() -> None:
    model = xp.create_model("cat_micro_32", num_classes=3)
    state = {name.replace("cpsa", "cross"): value for name, value in model.state_dict().items()}
    with pytest.raises(DataError, match=r"missing: stages\.0\.blocks\.0\.cpsa\.norm1\.weight"):
        xp.load_released(model, state)


# ---------------------------------------------------------------------- attention


@pytest.mark.parametrize(
    ("attention", "macs"),
    [(CrossPatchAttention((7, 7)), 65.0), (WindowAttention(64, 2, 7, size=(56, 56)), 71.0)],
)
def test_macs_of_the_two_attentions(attention, macs) -> None:
    with torch.device("meta"):
        x = torch.zeros(1, 56, 56, 64)
        assert count_macs(_Shaped(attention.to("meta"), x), (1,)) / 1e6 == pytest.approx(
            macs, abs=0.06
        )


class _Shaped(nn.Module):
    """A layer that is given `x` whatever is asked."""

    def __init__(self, layer: nn.Module, x: torch.Tensor) -> None:
        super().__init__()
        self.layer, self.x = layer, x

    def forward(self, _: torch.Tensor) -> torch.Tensor:
        return self.layer(self.x)


@pytest.mark.parametrize("size", [(6, 9), (5, 7), (2, 3)])
def test_attention_across_patches_is_what_the_sheet_says(size) -> None:
    torch.manual_seed(0)
    attention, side = CrossPatchAttention((3, 3)).eval(), 3
    x = torch.randn(2, *size, 4)
    rows, columns = (-(-n // side) for n in size)
    padded = torch.zeros(2, rows * side, columns * side, 4)
    padded[:, : size[0], : size[1]] = x
    expected = torch.zeros_like(padded)
    corners = [(side * r, side * c) for r, c in product(range(rows), range(columns))]
    with torch.no_grad():
        for sample, channel in product(range(2), range(4)):
            one = padded[sample, :, :, channel]
            tokens = torch.stack([one[r : r + 3, c : c + 3].flatten() for r, c in corners])
            q, k, v = attention.qkv(tokens).split(9, dim=1)
            y = attention.proj((q @ k.T / math.sqrt(9)).softmax(-1) @ v)
            for (r, c), patch in zip(corners, y, strict=True):
                expected[sample, r : r + 3, c : c + 3, channel] = patch.reshape(3, 3)
        found = attention(x)
    torch.testing.assert_close(found, expected[:, : size[0], : size[1]])


@pytest.mark.parametrize("place", [(0, 0), (13, 21), (27, 27)])
def test_a_triple_sees_the_whole_map_and_its_first_block_a_patch(place) -> None:
    made, x = triple((28, 28), 7).double(), torch.randn(1, 28, 28, 8).double()
    other = x.clone()
    other[0, place[0], place[1]] += torch.randn(8).double()
    with torch.no_grad():
        inside = (made.pre_ipsa(x) != made.pre_ipsa(other)).any(dim=-1)[0]
        everywhere = (made(x) != made(other)).any(dim=-1)[0]
    assert inside.sum() == 49
    top, left = (7 * (n // 7) for n in place)
    assert inside[top : top + 7, left : left + 7].all()
    assert everywhere.all()


def test_one_patch_makes_attention_across_patches_linear() -> None:
    attention = CrossPatchAttention((4, 4)).eval()
    x, y = torch.randn(2, 2, 4, 4, 3).unbind()
    with torch.no_grad():
        torch.testing.assert_close(attention((x + y) / 2), (attention(x) + attention(y)) / 2)


def test_padding_is_not_seen_inside_patches() -> None:
    """A map of 5x6 with patches of 4: what stands in the same patch alone decides."""
    made, x = triple((5, 6), 4), torch.randn(1, 5, 6, 8)
    attention = made.pre_ipsa.attn
    with torch.no_grad():
        found = attention(x)[0, 4, 4:]
        tokens = x[0, 4, 4:]
        q, k, v = (t.reshape(2, 2, 4).transpose(0, 1) for t in attention.qkv(tokens).chunk(3, -1))
        bias = attention.relative_position_bias_table[attention.index[:2, :2]].permute(2, 0, 1)
        y = (q @ k.transpose(1, 2) / 2 + bias).softmax(-1) @ v
        torch.testing.assert_close(found, attention.proj(y.transpose(0, 1).flatten(1)))


# ---------------------------------------------------------------------- stems, patches, options


def test_the_stem_of_slices_is_a_convolution_of_patches() -> None:
    """Channel 3 * (4 * a + b) + c of a token is channel c of pixel b of cell a."""
    torch.manual_seed(0)
    sliced = Embed(3, 8, 4, "slice", None, nn.Identity, 0.0)
    plain = Embed(3, 8, 4, "conv", None, nn.Identity, 0.0)
    weight = torch.zeros(8, 3, 4, 4)
    cells = [(0, 0), (1, 0), (0, 1), (1, 1)]
    for (second, (down, right)), (first, (r, c)) in product(enumerate(cells), enumerate(cells)):
        channels = slice(12 * second + 3 * first, 12 * second + 3 * first + 3)
        weight[:, :, 2 * down + r, 2 * right + c] = sliced.proj.weight[:, channels, 0, 0].detach()
    plain.proj.weight.data, plain.proj.bias.data = weight, sliced.proj.bias.data
    x = torch.randn(2, 3, 13, 18)
    with torch.no_grad():
        torch.testing.assert_close(sliced(x), plain(x))
        padded = F.pad(x, (0, 2, 0, 3))
        torch.testing.assert_close(plain(x), plain.proj(padded).permute(0, 2, 3, 1))
    model = xp.create_model("cat_micro_32", num_classes=2, stem="slice", patch_size=4)
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 2)


def test_patches_are_cut_to_smaller_maps_unless_kept() -> None:
    with torch.device("meta"):
        cut = xp.create_model("cat_tiny", img_size=(96, 160))
        kept = xp.create_model("cat_tiny", img_size=(96, 160), fit_windows=False)
    assert [cut.window(i) for i in range(4)] == [(7, 7), (7, 7), (6, 6), (3, 3)]
    assert [kept.window(i) for i in range(4)] == [(7, 7)] * 4


@pytest.mark.parametrize("size", [(224, 224), (33, 17), (3, 200)])
def test_any_size_runs(size) -> None:
    model = xp.create_model("cat_micro_32", num_classes=3, ape=True).eval()
    with torch.no_grad():
        assert model(torch.randn(1, 3, *size)).isfinite().all()


def test_a_triple_has_one_rate_of_drop_path() -> None:
    model = xp.create_model("cat_micro_32", depths=(1, 2), drop_path_rate=0.2)
    rates = [
        [m.drop_prob if isinstance(m, DropPath) else 0.0
         for m in (t.pre_ipsa.drop_path, t.cpsa.drop_path, t.post_ipsa.drop_path)]
        for stage in model.stages for t in stage.blocks
    ]  # fmt: skip
    assert rates == [[0] * 3, [pytest.approx(0.1)] * 3, [pytest.approx(0.2)] * 3]


def test_the_authors_arguments() -> None:
    build = {"embed_dim": 8, "depths": [1], "num_heads": [2], "img_size": 28, "num_classes": 3}
    model = CAT.from_authors(**build, drop_rate=0.1, attn_drop_rate=0.2, use_checkpoint=True)
    one = model.stages[0].blocks[0]
    assert (one.cpsa.attn.attn_drop, one.pre_ipsa.attn.attn_drop) == (0.2, 0.2)
    assert (one.cpsa.mlp.drop1.p, model.drop_rate, model.grad_checkpointing) == (0.1, 0.0, True)
    assert model.stem.ape is None
    with pytest.raises(ValueError, match="qk_scale"):
        CAT.from_authors(**build, qk_scale=0.5)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_heads": (1, 5)}, "must divide by 5 heads"),
        ({"num_heads": (1,)}, "num_heads has 1 entries for 2 stages"),
        ({"stem": "cell"}, "expected one of conv, slice"),
        ({"stem": "slice", "patch_size": 6}, "takes a power of two"),
        ({"global_pool": "token"}, "expected avg, max"),
    ],
)
def test_impossible_shapes_are_refused(changed, message) -> None:
    with pytest.raises(ValueError, match=message):
        xp.create_model("cat_micro_32", **changed)
