"""DWNet: the authors' numbers, its counts, what static and predicted kernels have in common."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import crosspatch as xp
from crosspatch.errors import DataError, UsageError
from crosspatch.layers.windows import PatchMerging
from crosspatch.metrics.macs import count_macs
from crosspatch.models.dwnet import DWNet, checkpoint_filter_fn
from crosspatch.models.dwnet_blocks import (
    DwBlock,
    DynamicConv,
    InhomogeneousConv,
    LocalSpec,
    _by_places,
    _by_rows,
    local_sum,
)
from support import goldens

KINDS = ["dwnet", "dynamic_dwnet", "i_dynamic_dwnet"]
SMALLEST = {"img_size": 16, "patch_size": 2, "embed_dim": 16, "depths": (1, 1), "num_classes": 3}


def tiny(**arguments) -> DWNet:
    """With no weight at a value that would hide a mistake."""
    torch.manual_seed(0)
    model = DWNet(**{**SMALLEST, **arguments}).eval()
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.1 * torch.randn_like(value))
    return model


def theirs(model: DWNet) -> dict[str, torch.Tensor]:
    """The state dict under the authors' names."""
    found = {}
    for name, value in model.state_dict().items():
        parts = name.replace("stem.absolute", "absolute").replace("stem.", "patch_embed.")
        parts = parts.split(".")
        if parts[0] == "stages":
            parts[0] = "layers"
            parts[1] = str(int(parts[1]) - (parts[2] == "downsample"))
        found[".".join(parts)] = value
    return found


# ---------------------------------------------------------------------- the authors' numbers


@pytest.mark.parametrize("kind", KINDS)
def test_it_computes_what_the_authors_code_computes(kind) -> None:
    golden = goldens.read(f"dwnet/{kind}_tiny_96")
    with torch.device("meta"):
        model = DWNet.from_authors(**golden.meta["build"]).eval()
    model.to_empty(device="cpu")
    assert sum(p.numel() for p in model.parameters()) == golden.meta["params"]
    state = golden.state_dict
    xp.load_released(model, {"model": state})
    with torch.no_grad():
        features = model.forward_features(golden.images)
        out = model.forward_head(features)
    assert goldens.relative_error(out, golden.outputs["out"]) < 1e-4
    tokens = golden.outputs["tokens"]
    assert goldens.relative_error(features.flatten(1, 2), tokens) < 1e-4
    with torch.no_grad():
        model.stages[1].downsample.norm.weight[:192].neg_()
        assert goldens.relative_error(model(golden.images), golden.outputs["out"]) > 1e-2


@pytest.mark.parametrize(
    ("name", "parameters", "gmacs"),
    [
        ("dwnet_tiny", 24.17, 3.73),
        ("dynamic_dwnet_tiny", 51.13, 3.75),
        ("i_dynamic_dwnet_tiny", 26.24, 4.30),
        ("dwnet_base", 74.35, 12.81),
        ("dynamic_dwnet_base", 161.6, 12.90),
        ("i_dynamic_dwnet_base", 80.25, 14.19),
    ],
)
def test_sizes(name, parameters, gmacs) -> None:
    with torch.device("meta"):
        model = xp.create_model(name)
    found = sum(p.numel() for p in model.parameters()) / 1e6
    assert found == pytest.approx(parameters, abs=5e-3 if parameters < 100 else 5e-2)
    assert count_macs(model, (3, 224, 224)) / 1e9 == pytest.approx(gmacs, abs=5e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_the_small_presets_cost_what_others_of_their_size_do(kind) -> None:
    with torch.device("meta"):
        model = xp.create_model(f"{kind}_micro_32", num_classes=10)
    assert 10.8e6 < count_macs(model, (3, 32, 32)) < 13.1e6


def test_groups_of_as_many_channels_as_are_called_heads() -> None:
    with torch.device("meta"):
        model = xp.create_model("i_dynamic_dwnet_tiny")
        other = xp.create_model("i_dynamic_dwnet_tiny", inhomo_heads=(32,) * 4)
    for stage in model.stages:
        assert stage.blocks[0].attn2conv.conv.conv2[0].out_channels == 32 * 49
    assert sum(p.numel() for p in other.parameters()) / 1e6 == pytest.approx(25.3, abs=0.05)


# ---------------------------------------------------------------------- the authors' mistake


def test_the_authors_switch_builds_the_static_network() -> None:
    faithful = tiny(dynamic=True, original=True)
    corrected = tiny(dynamic=True)
    assert isinstance(faithful.stages[0].blocks[0].attn2conv.conv, nn.Conv2d)
    assert isinstance(corrected.stages[0].blocks[0].attn2conv.conv, DynamicConv)
    assert faithful.state_dict().keys() == tiny().state_dict().keys()
    xp.load_released(corrected, theirs(tiny(dynamic=True)))
    with pytest.raises(DataError, match=r"attn2conv\.conv\.conv1\.weight"):
        xp.load_released(faithful, theirs(corrected))
    both = tiny(dynamic=True, inhomogeneous=True, inhomo_heads=(4, 8), original=True)
    assert isinstance(both.stages[0].blocks[0].attn2conv.conv, InhomogeneousConv)


# ---------------------------------------------------------------------- local layers


@pytest.mark.parametrize("size", [(5, 6), (1, 2), (9, 9)])
@pytest.mark.parametrize("kernel", [3, 7])
def test_predicted_kernels_that_are_constant_are_a_static_convolution(size, kernel) -> None:
    torch.manual_seed(0)
    static = LocalSpec("static", kernel, 0, 4).build(8)
    dynamic = LocalSpec("dynamic", kernel, 0, 4).build(8).eval()
    placed = LocalSpec("inhomogeneous", kernel, 1, 4).build(8).eval()
    with torch.no_grad():
        dynamic.bias.copy_(static.bias)
        for made in (dynamic.conv2, placed.conv2[0]):
            made.weight.zero_()
            made.bias.copy_(static.weight.flatten())
        x = torch.randn(3, 8, *size)
        expected = static(x)
        torch.testing.assert_close(dynamic(x), expected, rtol=1e-4, atol=1e-5)
        bias = static.bias[:, None, None]
        torch.testing.assert_close(placed(x) + bias, expected, rtol=1e-4, atol=1e-5)


def test_every_picture_has_kernels_of_its_own() -> None:
    torch.manual_seed(0)
    made, x = DynamicConv(8, 3, 4).eval(), torch.randn(2, 8, 6, 5)
    nn.init.normal_(made.bias)
    with torch.no_grad():
        hidden = F.relu(made.bn(made.conv1(x.mean(dim=(2, 3), keepdim=True))))
        kernels = made.conv2(hidden).view(2, 8, 1, 3, 3)
        found = made(x)
        for i in range(2):
            expected = F.conv2d(x[i : i + 1], kernels[i], made.bias, padding=1, groups=8)
            torch.testing.assert_close(found[i : i + 1], expected, rtol=1e-4, atol=1e-5)
        assert (kernels[0] - kernels[1]).abs().max() > 1e-3


def test_every_place_has_kernels_of_its_own_shared_by_a_group() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(2, 6, 4, 5), torch.randn(2, 3, 9, 4, 5)
    near = F.unfold(x, 3, padding=1).view(2, 6, 9, 4, 5)
    expected = (near * weight.repeat_interleave(2, dim=1)).sum(dim=2)
    torch.testing.assert_close(local_sum(x, weight, 3), expected)
    for add in (_by_places, _by_rows):
        torch.testing.assert_close(add(F.pad(x, (1,) * 4), weight, 3), expected)


@pytest.mark.parametrize("kind", ["dynamic", "inhomogeneous"])
def test_compiled_kernels_are_the_same(kind) -> None:
    torch.manual_seed(0)
    made, x = LocalSpec(kind, 5, 2, 4).build(8).eval(), torch.randn(2, 8, 6, 5)
    with torch.no_grad():
        compiled = torch.compile(made, fullgraph=True, backend="eager")(x)
        torch.testing.assert_close(compiled, made(x), rtol=1e-4, atol=1e-5)
    torch.compiler.reset()


def test_one_picture_trains_with_the_running_statistics() -> None:
    torch.manual_seed(0)
    made, x = DynamicConv(8, 3, 4), torch.randn(1, 8, 6, 6)
    found = made(x)
    assert made.bn.num_batches_tracked == 0
    torch.testing.assert_close(found, made.eval()(x))
    made.train()(torch.randn(2, 8, 6, 6))
    assert made.bn.num_batches_tracked == 1


def test_a_block_step_by_step() -> None:
    torch.manual_seed(0)
    made = DwBlock(8, LocalSpec("static", 7, 0, 4), 4.0, 0.0, 0.0)
    d, x = made.attn2conv, torch.randn(2, 6, 5, 8)
    y = F.relu(d.bn0(d.conv0(x.permute(0, 3, 1, 2))))
    y = d.bn2(d.conv2(F.relu(d.bn(d.conv(y))))).permute(0, 2, 3, 1)
    y = x + y
    z = made.mlp(made.bn(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
    torch.testing.assert_close(made(x), y + z)
    assert d.conv0.bias is None
    assert d.conv2.bias is None


# ---------------------------------------------------------------------- the network


def test_cells_are_merged_row_before_column() -> None:
    made = tiny().stages[1].downsample
    assert isinstance(made, PatchMerging)
    x = torch.randn(1, 2, 2, 16)
    cell = torch.cat([x[0, 0, 0], x[0, 1, 0], x[0, 0, 1], x[0, 1, 1]])
    torch.testing.assert_close(made(x)[0, 0, 0], made.reduction(made.norm(cell)))


def test_cost_is_linear_in_pixels() -> None:
    with torch.device("meta"):
        model = xp.create_model("dwnet_micro_32", num_classes=0)
    once, twice = (count_macs(model, (3, 32, width)) for width in (32, 64))
    assert twice == 2 * once


def test_a_position_table_is_resized() -> None:
    model, other = tiny(ape=True), tiny(ape=True, img_size=(24, 20))
    assert model.no_weight_decay() == {"stem.absolute_pos_embed"}
    xp.load_released(other, {"model": theirs(model)})
    x = torch.randn(2, 3, 24, 20)
    with torch.no_grad():
        torch.testing.assert_close(other(x), model(x))
    own = checkpoint_filter_fn(other.state_dict(), other)
    assert all(torch.equal(own[name], value) for name, value in other.state_dict().items())


def test_options_of_the_constructor() -> None:
    model = DWNet(**SMALLEST, drop_path_rate=0.2, patch_norm=False, window_size=3, mlp_ratio=2)
    rates = [getattr(s.blocks[0].drop_path, "drop_prob", 0.0) for s in model.stages]
    assert rates == pytest.approx([0.0, 0.2])
    assert isinstance(model.stem.norm, nn.Identity)
    assert model.stages[0].blocks[0].attn2conv.conv.kernel_size == (3, 3)
    assert model.stages[1].blocks[0].mlp.fc1.out_features == 64
    build = {**SMALLEST, "num_heads": (1, 2), "qkv_bias": True, "drop_rate": 0.3}
    made = DWNet.from_authors(**build, use_checkpoint=True)
    assert made.stages[0].grad_checkpointing
    assert made.stages[0].blocks[0].mlp.drop1.p == made.stem.drop.p == 0.3
    assert made.drop_rate == 0.0


def test_unpooled_features_are_a_map() -> None:
    model = tiny()
    model.reset_classifier(0, "")
    with torch.no_grad():
        assert model(torch.randn(2, 3, 18, 15)).shape == (2, 5, 4, 32)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"inhomogeneous": True}, "dynamic=True"),
        ({"dynamic": True, "inhomogeneous": True, "inhomo_heads": (8,)}, "1 entries for 3"),
        ({"dynamic": True, "inhomogeneous": True, "inhomo_heads": (5, 5, 5)}, "do not divide"),
        ({"dynamic": True, "inhomogeneous": True, "embed_dim": 16}, "do not divide"),
        ({"window_size": 4}, "odd"),
        ({"reduction_ratio": 0}, "reduction_ratio 0"),
        ({"global_pool": "token"}, "global_pool"),
    ],
)
def test_impossible_shapes_are_refused(arguments, words) -> None:
    with pytest.raises(UsageError, match=words):
        xp.create_model("dwnet_micro_32", **arguments)
