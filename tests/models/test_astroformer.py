"""Astroformer: the authors' numbers, its counts, where attention stands, maps of any size."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from timm.models import maxxvit as timms
from torch import nn

import crosspatch as xp
from crosspatch.errors import UsageError
from crosspatch.layers.windows import resize_bias_table
from crosspatch.metrics.macs import count_macs
from crosspatch.models.astroformer import (
    Astroformer,
    GlobalAttention,
    RelativeBias,
    checkpoint_filter_fn,
)
from support import goldens

GOLDENS = ["astroformer_0_64", "astroformer_0_128", "astroformer_micro_96"]
SMALLEST = {
    "img_size": 64, "embed_dim": (16, 32), "depths": (1, 2), "stem_width": 8, "dim_head": 16,
    "num_classes": 3,
}  # fmt: skip


def tiny(**arguments) -> Astroformer:
    """With no weight at a value that would hide a mistake."""
    torch.manual_seed(0)
    model = Astroformer(**{**SMALLEST, **arguments}).eval()
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.1 * torch.randn_like(value))
    return model


def attention(size=(3, 4)) -> GlobalAttention:
    torch.manual_seed(0)
    cfg = timms.MaxxVitTransformerCfg(dim_head=8)
    made = GlobalAttention(12, 16, cfg, size).eval()
    nn.init.normal_(made.rel_pos.relative_position_bias_table)
    return made


# ---------------------------------------------------------------------- the authors' numbers


@pytest.mark.parametrize("name", GOLDENS)
def test_it_computes_what_the_authors_code_computes(name) -> None:
    golden = goldens.read(f"astroformer/{name}")
    model = Astroformer.from_authors(**golden.meta["build"]).eval()
    assert sum(p.numel() for p in model.parameters()) == golden.meta["params"]
    state = golden.state_dict
    xp.load_released(model, {"state_dict": state})
    with torch.no_grad():
        features = model.forward_features(golden.images)
        out = model.forward_head(features)
    assert goldens.relative_error(out, golden.outputs["out"]) < 1e-4
    assert goldens.relative_error(features, golden.outputs["feat"]) < 1e-4
    if name.endswith("micro_96"):
        key = "stages.3.blocks.1.attn.rel_pos.relative_position_bias_table"
        xp.load_released(model, state | {key: -3 * state[key]})
        with torch.no_grad():
            assert goldens.relative_error(model(golden.images), golden.outputs["out"]) > 1e-3


@pytest.mark.parametrize(
    ("size", "parameters", "gmacs"),
    [(0, 22.8, 5.2), (1, 37.4, 8.9), (2, 66.4, 17.4), (3, 148.9, 39.0), (4, 241.1, 63.4),
     (5, 593.6, 141.3)],
)  # fmt: skip
def test_sizes(size, parameters, gmacs) -> None:
    with torch.device("meta"):
        model = xp.create_model(f"astroformer_{size}", num_classes=10)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(parameters, abs=0.05)
    assert count_macs(model, (3, 256, 256)) / 1e9 == pytest.approx(gmacs, abs=0.05)
    if size == 0:
        found = [type(b).__name__ for stage in model.stages for b in stage.blocks]
        assert found == ["MbConvBlock"] * 10 + ["TransformerBlock2d"] * 2


def test_cost_is_nearly_linear_in_pixels() -> None:
    found = []
    for side in (32, 64, 128):
        with torch.device("meta"):
            model = xp.create_model("astroformer_0", img_size=side, num_classes=10)
        found.append(count_macs(model, (3, side, side)) / 1e9)
    assert found == pytest.approx([0.084, 0.328, 1.303], rel=5e-3)


def test_the_small_preset_costs_what_others_of_its_size_do() -> None:
    with torch.device("meta"):
        model = xp.create_model("astroformer_micro_32", num_classes=10)
    assert 10.8e6 < count_macs(model, (3, 32, 32)) < 13.1e6


# ---------------------------------------------------------------------- attention


def test_attention_step_by_step() -> None:
    made, x = attention(), torch.randn(2, 12, 3, 4)
    with torch.no_grad():
        qkv = F.conv2d(x, made.qkv.weight, made.qkv.bias).flatten(2)
        table = made.rel_pos.relative_position_bias_table
        heads = []
        for head in range(2):
            q, k, v = qkv[:, 24 * head : 24 * head + 24].split(8, dim=1)
            logits = q.transpose(1, 2) @ k / 8**0.5
            for i in range(12):
                for j in range(12):
                    down, right = i // 4 - j // 4 + 2, i % 4 - j % 4 + 3
                    logits[:, i, j] += table[7 * down + right, head]
            heads.append(v @ logits.softmax(dim=2).transpose(1, 2))
        expected = made.proj(torch.cat(heads, dim=1).unflatten(2, (3, 4)))
        torch.testing.assert_close(made(x), expected, rtol=1e-4, atol=1e-5)


def test_a_bias_table_is_resized_on_the_way() -> None:
    made = attention()
    table = made.rel_pos.relative_position_bias_table
    other = RelativeBias((5, 2), 2)
    with torch.no_grad():
        other.relative_position_bias_table.copy_(resize_bias_table(table, (3, 4), (5, 2)))
        torch.testing.assert_close(made.rel_pos((5, 2)), other((5, 2)))
        assert made(torch.randn(1, 12, 5, 2)).shape == (1, 16, 5, 2)


def test_weights_of_another_size_answer_as_if_resized_on_the_way() -> None:
    model = tiny()
    names = {"norm_head.norm.": "head.norm.", "norm_head.fc.": "head.pre_logits.fc."}
    names["head."] = "head.fc."
    state = {}
    for name, value in model.state_dict().items():
        ours = next((n for n in names if name.startswith(n)), "")
        state[names[ours] + name.removeprefix(ours) if ours else name] = value
    state["stages.1.blocks.0.attn.rel_pos.relative_position_index"] = torch.zeros(4)
    other = tiny(img_size=(48, 96))
    xp.load_released(other, state)
    x = torch.randn(2, 3, 48, 96)
    with torch.no_grad():
        torch.testing.assert_close(other(x), model(x), rtol=1e-4, atol=1e-5)
    own = checkpoint_filter_fn(other.state_dict(), other)
    assert all(torch.equal(own[name], value) for name, value in other.state_dict().items())
    assert len(model.no_weight_decay()) == 2


# ---------------------------------------------------------------------- the network


@pytest.mark.parametrize("size", [(33, 47), (64, 90), (1, 1), (7, 2)])
def test_any_size_runs_and_maps_are_rounded_up(size) -> None:
    model = tiny(img_size=size)
    with torch.no_grad():
        found = model.forward_features(torch.randn(1, 3, *size))
    assert found.shape[2:] == tuple(-(-side // 8) for side in size)
    assert model.stages[1].blocks[0].attn.rel_pos.size == tuple(found.shape[2:])


def test_a_cell_at_the_border_is_the_mean_of_what_lies_in_it() -> None:
    pool = tiny().stages[0].blocks[0].shortcut.pool
    x = torch.arange(15.0).view(1, 1, 3, 5)
    expected = torch.tensor([[3.0, 5.0, 6.5], [10.5, 12.5, 14.0]])
    torch.testing.assert_close(pool(x)[0, 0], expected)


def test_the_head_is_a_norm_a_layer_and_tanh() -> None:
    model = tiny(head_hidden_size=20)
    with torch.no_grad():
        features = model.forward_features(torch.randn(2, 3, 64, 64))
        mean = features.mean(dim=(2, 3))
        y = F.layer_norm(mean, (32,), model.norm_head.norm.weight, model.norm_head.norm.bias, 1e-6)
        y = model.norm_head.fc(y).tanh()
        torch.testing.assert_close(model.forward_head(features, pre_logits=True), y)
        torch.testing.assert_close(model.forward_head(features), model.head(y))
        assert model.head_hidden_size == 20
        model.reset_classifier(0, "")
        assert model(torch.randn(2, 3, 64, 64)).shape == (2, 20, 8, 8)


def test_options_of_the_constructor() -> None:
    model = tiny(
        depths=(2, 2), strides=(1, 2), stem_width=(8, 16), expand_ratio=2, se_ratio=0.5,
        kernel_size=5, mlp_ratio=3, drop_path_rate=0.3, attn_drop_rate=0.1, proj_drop_rate=0.2,
    )  # fmt: skip
    first, second = model.stages[0].blocks[0], model.stages[1].blocks[1]
    assert first.conv1_1x1.out_channels == 32
    assert first.conv2_kxk.kernel_size == (5, 5)
    assert first.se.fc1.out_channels == 8
    assert isinstance(first.shortcut, nn.Identity)
    assert second.mlp.fc1.out_channels == 96
    assert (second.attn.attn_drop.p, second.attn.proj_drop.p) == (0.1, 0.2)
    assert [info["reduction"] for info in model.feature_info] == [2, 4]
    rates = [getattr(b, "drop_path", None) or b.drop_path1 for s in model.stages for b in s.blocks]
    found = [getattr(rate, "drop_prob", 0.0) for rate in rates]
    assert found == pytest.approx([0, 0.1, 0.2, 0.3])
    mixed = tiny(block_type="TC")
    assert isinstance(mixed.stages[0].blocks[0].attn, GlobalAttention)
    assert mixed(torch.randn(1, 3, 40, 24)).shape == (1, 3)


def test_another_configuration_is_refused() -> None:
    with pytest.raises(ValueError, match="expected one of astroformer_0"):
        Astroformer.from_authors("coatnet_0")


def test_first_weights() -> None:
    torch.manual_seed(0)
    model = Astroformer(**SMALLEST)
    conv, block = model.stages[0].blocks[0].conv2_kxk, model.stages[1].blocks[1]
    assert conv.weight.std().item() == pytest.approx((2 / 9) ** 0.5, rel=0.1)
    bound = (6 / (32 + 96)) ** 0.5
    assert block.attn.qkv.weight.abs().max().item() == pytest.approx(bound, rel=0.01)
    assert not block.attn.qkv.bias.any()
    assert 0 < block.mlp.fc1.bias.abs().max() < 1e-5
    assert model.head.bias.abs().max() > 1e-3
    torch.manual_seed(0)
    other = Astroformer(**SMALLEST, weight_init="normal")
    assert other.stages[0].blocks[0].conv2_kxk.weight.std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"depths": (1, 1)}, "one a stage"),
        ({"depths": (1, 0, 1)}, "blocks in every stage"),
        ({"block_type": "CCM"}, "'M'"),
        ({"strides": (1, 2, 4)}, "strides 4"),
        ({"strides": (1, 1, 2)}, "keeps its width"),
        ({"dim_head": 36}, "heads of 36"),
        ({"weight_init": "zeros"}, "'zeros'"),
        ({"global_pool": "token"}, "global_pool"),
    ],
)
def test_impossible_shapes_are_refused(arguments, words) -> None:
    with pytest.raises(UsageError, match=words):
        xp.create_model("astroformer_micro_32", **arguments)
