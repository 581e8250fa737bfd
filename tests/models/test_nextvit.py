"""Next-ViT: the authors' numbers, counts, merging of norms, keys, sizes."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from timm.models import nextvit as timms
from torch import nn

import crosspatch as xp
from crosspatch.errors import UsageError
from crosspatch.metrics.macs import count_macs
from crosspatch.models.nextvit import NextViT, merge_norms
from crosspatch.models.nextvit_blocks import TransformerBlock, attention_width
from support import goldens

SIZES = {  # parameters, GMACs at 224 and 384
    "nextvit_small": (31_763_368, 5.8, 17.3),
    "nextvit_base": (44_818_856, 8.3, 24.6),
    "nextvit_large": (57_874_344, 10.8, 32.0),
}
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


def answer(model, x):
    with torch.no_grad():
        return model.eval()(x)


def micro(**more) -> NextViT:
    """A small network whose norms are no identities, in float64."""
    torch.manual_seed(0)
    model = xp.create_model("nextvit_micro_32", num_classes=5, **more)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, BATCH_NORMS):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_()
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
    return model.double().eval()


def test_it_computes_what_the_authors_code_computes() -> None:
    golden = goldens.read("nextvit/nextvit_small")
    model = xp.create_model("nextvit_small")
    assert sum(p.numel() for p in model.parameters()) == golden.meta["params"]
    xp.load_released(model, {"model": golden.state_dict})
    out = golden.outputs["out"]
    assert goldens.relative_error(answer(model, golden.images), out) < 5e-4
    one, out = golden.images[:1], out[:1]
    assert goldens.relative_error(answer(model.double(), one.double()), out) < 1e-6
    model.float()
    with torch.no_grad():
        model.stages[1].blocks[3].e_mhsa.v.weight.neg_()
    assert goldens.relative_error(answer(model, one), out) > 1e-2


def test_the_authors_constructor() -> None:
    model = NextViT.from_authors(
        stem_chs=[64, 32, 64], depths=[1, 1, 5, 1], path_dropout=0.1, attn_drop=0.2, drop=0.3,
        num_classes=7, use_checkpoint=True,
    )  # fmt: skip
    block = model.stages[3].blocks[0]
    rates = (block.mhsa_drop_path, block.mhca_drop_path, block.mlp_drop_path)
    assert [r.drop_prob for r in rates] == pytest.approx([0.075, 0.025, 0.1])
    assert (block.e_mhsa.attn_drop.p, block.mlp.drop.p) == (0.2, 0.3)
    assert model.stages[0].grad_checkpointing


@pytest.mark.parametrize("name", SIZES)
def test_sizes(name) -> None:
    parameters, *giga = SIZES[name]
    with torch.device("meta"):
        model = xp.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == parameters
    for side, expected in zip((224, 384), giga[: 2 if "small" in name else 1], strict=False):
        assert count_macs(model, (3, side, side)) / 1e9 == pytest.approx(expected, rel=0.01)
    kinds = [type(block) is TransformerBlock for block in model.stages[2].blocks]
    assert kinds[:10] == [False, False, False, False, True] * 2
    assert [info["num_chs"] for info in model.feature_info] == [96, 256, 512, 1024]
    assert [info["reduction"] for info in model.feature_info] == [4, 8, 16, 32]


@pytest.mark.parametrize("convolutions", [False, True])
@pytest.mark.parametrize("key_pool", ["1d", "2d"])
def test_merged_norms_change_nothing(convolutions, key_pool) -> None:
    model = micro(key_pool=key_pool)
    before, x = copy.deepcopy(model.state_dict()), torch.randn(2, 3, 45, 38).double()
    merged = merge_norms(model, convolutions)
    difference = goldens.relative_error(answer(merged, x), answer(model, x))
    assert difference < 1e-10
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    for block in merged.modules():
        for name in ("norm", "norm1", "norm2"):
            if isinstance(block, TransformerBlock | timms.NextConvBlock) and hasattr(block, name):
                assert isinstance(getattr(block, name), nn.Identity)
        if isinstance(block, timms.EfficientAttention):
            assert not isinstance(block.norm, BATCH_NORMS)
    if convolutions:
        assert not any(isinstance(module, BATCH_NORMS) for module in merged.modules())
    else:
        again = xp.create_model("nextvit_micro_32", num_classes=5, merged=True, key_pool=key_pool)
        again.double().load_state_dict(merged.state_dict())
        assert torch.equal(answer(again, x), answer(merged, x))
        torch.testing.assert_close(answer(merge_norms(merged), x), answer(merged, x))


def test_without_a_classifier_the_last_norm_stays() -> None:
    model = micro()
    model.reset_classifier(0)
    model.double().eval()
    merged = merge_norms(model, convolutions=True)
    x = torch.randn(2, 3, 32, 32).double()
    torch.testing.assert_close(answer(merged, x), answer(model, x))


def test_the_last_norm_is_not_taken_through_a_maximum() -> None:
    model, x = micro(global_pool="max"), torch.randn(1, 3, 32, 32).double()
    with torch.no_grad():
        model.norm.weight.neg_()
    torch.testing.assert_close(answer(merge_norms(model, True), x), answer(model, x))


def test_keys_are_means_of_tokens_in_a_row_or_of_cells() -> None:
    ramp = torch.arange(16.0).view(1, 16, 1).expand(-1, -1, 8)
    for pool, expected in (("1d", [1.5, 5.5, 9.5, 13.5]), ("2d", [2.5, 4.5, 10.5, 12.5])):
        model = xp.create_model("nextvit_micro_32", num_classes=3, key_pool=pool)
        attention = model.stages[2].blocks[4].e_mhsa
        attention.norm = nn.Identity()
        assert attention.sr_ratio == 2
        assert attention.keys(ramp, (4, 4))[0, :, 0].tolist() == expected


@pytest.mark.parametrize(("size", "counts"), [((8, 8), (4, 4)), ((5, 7), (2, 4)), ((2, 3), (1, 1))])
def test_how_many_keys_a_map_has(size, counts) -> None:
    for pool, count in zip(("1d", "2d"), counts, strict=True):
        model = xp.create_model("nextvit_micro_32", num_classes=3, key_pool=pool).eval()
        attention = model.stages[1].blocks[1].e_mhsa
        x = torch.randn(1, size[0] * size[1], attention.q.in_features)
        assert attention.keys(x, size).shape == (1, count, x.shape[2])
        assert answer(model, torch.randn(1, 3, 16, 16)).isfinite().all()


def test_widths_of_attention() -> None:
    assert [attention_width(w, 0.75, 32) for w in (256, 512, 1024)] == [192, 384, 768]
    with pytest.raises(ValueError, match="positive multiple of 32"):
        attention_width(64, 0.75, 32)


def test_weights_of_timm_load_and_give_its_numbers() -> None:
    torch.manual_seed(0)
    build = {"depths": (1, 1, 5, 1), "num_classes": 4}
    other = timm.create_model("nextvit_small", **build).eval()
    assert type(other) is timms.NextViT
    model = xp.create_model("nextvit_small", **build)
    xp.load_released(model, other.state_dict())
    x = torch.randn(1, 3, 64, 96)
    torch.testing.assert_close(answer(model, x), answer(other, x), rtol=1e-4, atol=1e-5)


def test_maps_with_norms_of_their_own() -> None:
    model = xp.create_model("nextvit_micro_32", num_classes=3, stage_norms=True).train()
    maps = model.forward_intermediates(torch.randn(4, 3, 64, 64), intermediates_only=True)
    for one in maps:
        assert one.mean(dim=(0, 2, 3)).abs().max() < 1e-4


def test_impossible_shapes_are_refused() -> None:
    for arguments, words in (
        ({"depths": (1, 1, 4, 1)}, "multiple of 5"),
        ({"key_pool": "3d"}, "expected one of 1d, 2d"),
        ({"dims": (20, 24, 32, 64)}, "heads of 8"),
        ({"dims": (16, 24, 32)}, "four, four and three"),
    ):
        with pytest.raises(UsageError, match=words):
            xp.create_model("nextvit_micro_32", **arguments)
