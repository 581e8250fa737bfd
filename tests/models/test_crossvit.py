"""CrossViT: sizes, fusions, branches, drop paths, structural claims of the paper."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import crosspatch as xp
from crosspatch.layers.attention import Attention
from crosspatch.models.crossvit import SMALL, TIMM_NAMES, VARIANTS, CrossViT, checkpoint_filter_fn
from crosspatch.models.crossvit_fusion import CrossAttention

# the sheet's table: millions of parameters, billions of multiply-adds
TABLE = {
    "crossvit_tiny_224": (7.01, 1.56),
    "crossvit_small_224": (26.86, 5.62),
    "crossvit_base_224": (105.03, 21.19),
    "crossvit_9_224": (8.55, 1.84),
    "crossvit_15_224": (27.53, 5.79),
    "crossvit_18_224": (43.27, 9.03),
    "crossvit_9_dagger_224": (8.78, 1.98),
    "crossvit_15_dagger_224": (28.21, 6.11),
    "crossvit_18_dagger_224": (44.27, 9.47),
    "crossvit_15_dagger_384": (28.50, 21.40),
    "crossvit_18_dagger_384": (44.61, 32.41),
}


def tiny(**arguments) -> CrossViT:
    """A two-branch model that runs in milliseconds."""
    torch.manual_seed(0)
    return CrossViT(
        **{
            "img_size": 32,
            "patch_size": (4, 8),
            "scales": (1.0, 1.0),
            "num_classes": 5,
            "embed_dim": (16, 32),
            "depth": ((1, 2, 0),) * 2,
            "num_heads": (2, 2),
            "mlp_ratio": (2.0, 2.0),
            **arguments,
        }
    )


def gmacs(model: torch.nn.Module, *inputs: torch.Tensor) -> float:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*inputs)
    return counter.get_total_flops() / 2e9


@pytest.fixture
def keys_and_values(monkeypatch) -> None:
    """The fusion computes every key and value, as the authors do and the sheet counts."""
    monkeypatch.setattr(CrossAttention, "folded", False)


@pytest.mark.usefixtures("keys_and_values")
@pytest.mark.parametrize("name", TABLE)
def test_parameters_and_macs_of_the_table(name: str) -> None:
    parameters, expected = TABLE[name]
    with torch.device("meta"):
        model = xp.create_model(name).eval()
        assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(
            parameters, abs=0.006
        )
        image = torch.zeros(1, 3, *model.img_size)
        resizing = sum(gmacs(r, image) for r in model.resize)
        assert gmacs(model, image) - resizing == pytest.approx(expected, rel=0.005)


@pytest.mark.usefixtures("keys_and_values")
@pytest.mark.parametrize(
    ("patches", "cross", "full"),
    [(196, 58.5, 146), (392, 116.5, 350), (784, 232.4, 936), (1568, 464.2, 2816)],
)
def test_cross_attention_is_linear_in_the_patches(patches, cross, full) -> None:
    with torch.device("meta"):
        x = torch.zeros(1, 1 + patches, 384)
        assert 1e3 * gmacs(CrossAttention(384, 6), x) == pytest.approx(cross, abs=0.1)
        assert 1e3 * gmacs(Attention(384, 6), x) == pytest.approx(full, rel=0.01)


def test_the_fusion_is_cheap() -> None:
    """Sheet, claim 3: fusion and projections of CrossViT-S hold 3.12 of 26.86 M parameters."""
    with torch.device("meta"):
        whole = xp.create_model("crossvit_small_224")
        bare = xp.create_model("crossvit_small_224", fusion="none")
    counts = [sum(p.numel() for p in m.parameters()) / 1e6 for m in (whole, bare)]
    assert counts[0] - counts[1] == pytest.approx(3.12, abs=0.01)
    assert counts[1] == pytest.approx(23.74, abs=0.01)


@pytest.mark.parametrize(
    ("asked", "fine", "coarse"),
    [
        (224, (240, 240), (224, 224)),
        (384, (408, 408), (384, 384)),
        (256, (276, 276), (256, 256)),
        (288, (312, 312), (288, 288)),
        (320, (348, 348), (320, 320)),
        (96, (108, 108), (96, 96)),
        ((224, 160), (240, 168), (224, 160)),
    ],
)
def test_img_size_sets_each_side_of_each_branch(asked, fine, coarse) -> None:
    with torch.device("meta"):
        model = xp.create_model("crossvit_9_dagger_224", img_size=asked)
    assert model.branch_sizes == (fine, coarse)


@pytest.mark.parametrize("side", [224, 256, 288, 320])
def test_sizes_at_which_timms_crossvit_crashes(side: int) -> None:
    shape = {"embed_dim": (32, 64), "depth": ((1, 1, 0),), "num_classes": 4}
    model = xp.create_model("crossvit_9_240", img_size=side, **shape).eval()
    with torch.no_grad():
        assert model(torch.randn(1, 3, side, side)).shape == (1, 4)


@settings(max_examples=15, deadline=None)
@given(st.integers(24, 90), st.integers(24, 90), st.sampled_from([1, 3, 4]))
def test_any_size_and_any_number_of_channels_run(height: int, width: int, channels: int) -> None:
    model = tiny(
        img_size=(height, width), patch_size=(12, 16), scales=None, in_chans=channels
    ).eval()
    with torch.no_grad():
        assert model(torch.randn(2, channels, height, width)).shape == (2, 5)
        assert model(torch.randn(1, channels, 40, 56)).shape == (1, 5)  # resized to its branches


def test_no_resize_where_sizes_match() -> None:
    model, image = tiny(), torch.randn(1, 3, 32, 32)
    assert all(resize(image) is image for resize in model.resize)


def test_the_mean_of_patches_instead_of_the_class_tokens() -> None:
    model, image = tiny(global_pool="avg").eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        features = model.forward_features(image)
        assert torch.allclose(model.forward_head(features), model(image), atol=1e-6)
        logits = [h(x[:, 1:].mean(1)) for h, x in zip(model.head, features, strict=True)]
        assert torch.allclose(model(image), (logits[0] + logits[1]) / 2, atol=1e-6)
    with pytest.raises(ValueError, match="expected 'token' or 'avg'"):
        tiny(global_pool="max")


@pytest.mark.parametrize("fusion", ["cross", "class_token", "all", "none"])
def test_every_fusion_trains(fusion: str) -> None:
    model = tiny(fusion=fusion, drop_path_rate=0.1).train()
    model(torch.randn(4, 3, 32, 32)).square().mean().backward()
    without = [n for n, p in model.named_parameters() if p.grad is None]
    assert without == []


def test_without_fusion_the_branches_do_not_know_of_each_other() -> None:
    model, image = tiny(fusion="none").eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        before = model.forward_features(image)[0]
        model.patch_embed[1].proj.weight.zero_()
        assert torch.equal(before, model.forward_features(image)[0])
        fused = tiny().eval()
        before = fused.forward_features(image)[0]
        fused.patch_embed[1].proj.weight.normal_()
        assert not torch.allclose(before, fused.forward_features(image)[0])


def test_the_fusion_leaves_patches_alone_and_is_simultaneous() -> None:
    model, image = tiny(depth=((0, 0, 0),)).eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        before = model.embed(image)
        after, _ = model.run(before)
        for old, new in zip(before, after, strict=True):
            assert torch.equal(old.patches, new.patches)
            assert not torch.allclose(old.tokens[:, 0], new.tokens[:, 0])
        encoder = model.blocks[0]
        c = encoder.projs[1](before[1].tokens[:, :1])  # branch 1 asks branch 0 as it was
        y = encoder.fusion[1](torch.cat([c, before[0].patches], dim=1))
        expected = encoder.revert_projs[1](y)
        assert torch.allclose(after[1].tokens[:, :1], expected, atol=1e-6)


def test_three_branches_run_and_train() -> None:
    model = tiny(
        patch_size=(4, 8, 16),
        scales=(1.0, 1.0, 1.0),
        embed_dim=(16, 24, 32),
        depth=((1, 1, 2, 0),) * 2,
        num_heads=(2, 2, 2),
        mlp_ratio=(2, 2, 2),
    )
    assert [len(f) for f in (model.head, model.blocks[0].fusion)] == [3, 3]
    assert model.blocks[0].projs[2][2].out_features == 16  # branch 2 asks branch 0
    model(torch.randn(4, 3, 32, 32)).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_fusion_depth_of_one_differs_in_names_alone() -> None:
    flat, deep = tiny(), tiny(depth=((1, 2, 1),) * 2)
    state = {}
    for name, value in flat.state_dict().items():
        head, dot, tail = name.partition(".fusion.")
        branch, _, rest = tail.partition(".")
        state[f"{head}.fusion.{branch}.0.{rest}" if dot else name] = value
    xp.load_released(deep, state)
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(flat.eval()(image), deep.eval()(image))


def test_stochastic_depth_follows_the_authors_schedule() -> None:
    with torch.device("meta"):
        model = xp.create_model("crossvit_9_224", drop_path_rate=0.1)

    def rate(module) -> float:
        return getattr(module, "drop_prob", 0.0)

    coarse = [rate(b.drop_path1) for e in model.blocks for b in e.blocks[1]]
    assert coarse == pytest.approx([0.0125 * i for i in range(9)], abs=1e-6)
    fine = [rate(e.blocks[0][0].drop_path2) for e in model.blocks]
    assert fine == pytest.approx([0, 0.0375, 0.075], abs=1e-6)
    fusion = [rate(e.fusion[0].drop_path) for e in model.blocks]
    assert fusion == pytest.approx([0.025, 0.0625, 0.1], abs=1e-6)


def test_timms_weights_give_timms_numbers() -> None:
    theirs = timm.create_model("crossvit_9_dagger_240", num_classes=7).eval()
    ours = xp.create_model("crossvit_9_dagger_224", num_classes=7).eval()
    xp.load_released(ours, theirs.state_dict())
    image = torch.randn(1, 3, 240, 240)
    with torch.no_grad():
        assert torch.allclose(ours(image), theirs(image), atol=1e-5)


def test_positions_of_another_size_are_resized() -> None:
    small, large = tiny(), tiny(img_size=(64, 48))
    xp.load_released(large, small.state_dict())
    assert torch.equal(large.pos_embed[0][:, 0], small.pos_embed[0][:, 0])
    assert large.pos_embed[0].shape == (1, 1 + 16 * 12, 16)
    state = checkpoint_filter_fn(small.state_dict(), small)
    assert torch.equal(state["pos_embed.1"], small.pos_embed[1])


def test_the_decay_switch() -> None:
    assert tiny().no_weight_decay() == {"pos_embed.0", "pos_embed.1", "cls_token.0", "cls_token.1"}
    assert tiny(authors_decay=True).no_weight_decay() == set()
    names = {n for n, _ in tiny().named_parameters()}
    assert tiny().no_weight_decay() <= names


def test_feature_maps_with_their_true_strides() -> None:
    model = timm.create_model("crossvit_9_224", features_only=True)
    assert model.feature_info.channels() == [128, 256]
    assert model.feature_info.reduction() == pytest.approx([12, 240 / 14])
    with torch.no_grad():
        fine, coarse = model(torch.randn(1, 3, 240, 240))
    assert fine.shape == (1, 128, 20, 20)
    assert coarse.shape == (1, 256, 14, 14)


def test_intermediates_agree_with_the_final_tokens() -> None:
    model, image = tiny().eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        final, maps = model.forward_intermediates(image, norm=True)
        assert [tuple(m.shape) for m in maps] == [(2, 16, 8, 8)] * 2 + [(2, 32, 4, 4)] * 2
        assert torch.allclose(maps[1].flatten(2).transpose(1, 2), final[0][:, 1:], atol=1e-6)
        last = model.forward_intermediates(image, indices=[-1], intermediates_only=True)
        pruned = tiny().eval()
        index = pruned.prune_intermediate_layers([-3])  # the fine branch after the last encoder
        assert index == [1]
        again = pruned.forward_intermediates(image, indices=index, intermediates_only=True)
        raw = model.forward_intermediates(image, indices=[1], intermediates_only=True)
        assert torch.equal(again[0], raw[0])
        assert last[0].shape == (2, 32, 4, 4)


def test_a_subset_of_the_patches() -> None:
    model, image = tiny(fusion="none").eval(), torch.randn(2, 3, 32, 32)
    keep = torch.stack([torch.randperm(64)[:10] for _ in range(2)])
    with torch.no_grad():
        states = model.embed(image, keep=[keep, None])
        whole = model.embed(image)
        assert states[0].tokens.shape == (2, 11, 16)
        expected = whole[0].patches.gather(1, keep[..., None].expand(-1, -1, 16))
        assert torch.equal(states[0].patches, expected)
        every = torch.arange(64).expand(2, -1)
        same = model.pool(model.run(model.embed(image, keep=[every, None]))[0])
        assert torch.allclose(same[0], model.pool(model.run(whole)[0])[0], atol=1e-6)


def test_names_of_timm_lead_to_the_same_models() -> None:
    assert TIMM_NAMES["crossvit_15_dagger_408"] == VARIANTS["crossvit_15_dagger_384"]
    assert set(TIMM_NAMES) <= set(timm.list_models("crossvit*"))
    assert timm.create_model("crossvit_tiny_240").__class__.__module__ == "timm.models.crossvit"


@pytest.mark.parametrize("name", SMALL)
def test_small_presets_see_the_picture_as_it_is(name: str) -> None:
    model = xp.create_model(name, num_classes=3)
    assert set(model.branch_sizes) == {model.img_size}
    assert math.prod(model.grids[0]) > math.prod(model.grids[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fusion": "sum"}, "expected one of cross, class_token, all, none"),
        ({"stem": "dagger"}, "defined for patches of 12 and 16"),
        ({"depth": ((1, 2),)}, "expected 3"),
        ({"num_heads": (2,)}, "num_heads has 1 entries for 2 branches"),
        ({"embed_dim": (16, 33)}, "must divide by 2 heads"),
        ({"img_size": None, "branch_sizes": (30, 32)}, "not made of patches of 4"),
    ],
)
def test_shapes_that_do_not_agree_are_named(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**arguments)
