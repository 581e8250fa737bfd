"""DHVT: goldens, the sheet's figures, head tokens, the scaled class token, parts left out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import crosspatch as xp
from crosspatch.errors import UsageError
from crosspatch.layers.linear import switched
from crosspatch.metrics.macs import count_macs
from crosspatch.models.dhvt import DHVT, VARIANTS, Daff, HeadTokenAttention, OverlappingPatchEmbed
from support import goldens

GOLDENS = (
    "dhvt_tiny_cifar_patch4",
    "dhvt_tiny_cifar_patch4_unit_affine",
    "dhvt_tiny_imagenet_patch16_96px_unit_affine",
)
SIZES = {  # M parameters, GMACs
    "dhvt_tiny_cifar_patch4": (6.01, 0.39),
    "dhvt_small_cifar_patch4": (23.43, 1.53),
    "dhvt_tiny_cifar_patch2": (5.85, 1.71),
    "dhvt_small_cifar_patch2": (22.77, 6.20),
    "dhvt_tiny_domain_patch16": (6.11, 1.36),
    "dhvt_small_domain_patch16": (23.79, 5.03),
    "dhvt_tiny_imagenet_patch16": (6.27, 1.36),
    "dhvt_small_imagenet_patch16": (24.04, 5.03),
}


def released(name: str) -> tuple[goldens.Golden, DHVT, dict]:
    """A golden, its model, and its weights; affines that were left at the identity are left out."""
    golden = goldens.read(f"dhvt/{name}")
    model = DHVT.from_authors(**golden.meta["build"]).eval()
    kept = golden.meta["keep_buffers"]
    return golden, model, {n: v for n, v in golden.state_dict.items() if n not in kept}


def tiny(**arguments) -> DHVT:
    """No parameter and no statistic at its start."""
    torch.manual_seed(0)
    shape = {"embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 5, "mlp_ratio": 2.0}
    model = DHVT(**{**shape, **arguments})
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                value.add_(0.2 * torch.rand_like(value) if "var" in name else
                           0.2 * torch.randn_like(value))  # fmt: skip
    return model.eval()


@pytest.mark.parametrize("products", ["off", "on"])
@pytest.mark.parametrize("name", GOLDENS)
def test_it_computes_what_the_authors_code_computes(name, products) -> None:
    golden, model, state = released(name)
    assert sum(p.numel() for p in model.parameters()) == golden.meta["params"]
    xp.load_released(model, {"model": state})
    with switched(products), torch.no_grad():
        _, collected = model.run(model.embed(golden.images), {0})
        found = {
            "out": model(golden.images),
            "tokens": model.forward_features(golden.images),
            "block0": collected[0].tokens,
        }
    for key, expected in golden.outputs.items():
        assert goldens.relative_error(found[key], expected) < 1e-4


@pytest.mark.parametrize(
    "entry",
    [
        "patch_embed.proj.2.0.weight",
        "blocks.3.attn.pos_embed",
        "blocks.3.attn.ht_norm.weight",
        "blocks.11.mlp.excitation.weight",
        "blocks.3.mlp.bn2.running_var",
    ],
)
def test_a_golden_notices_a_changed_weight(entry: str) -> None:
    golden, model, state = released("dhvt_tiny_cifar_patch4_unit_affine")
    state[entry] = state[entry].flip(-1 if state[entry].ndim < 4 else 0)
    xp.load_released(model, state)
    with torch.no_grad():
        assert goldens.relative_error(model(golden.images), golden.outputs["out"]) > 1e-3


def test_half_of_the_affines_is_not_none_of_them() -> None:
    _, model, state = released("dhvt_tiny_cifar_patch4")
    del state["patch_embed.pre_affine.alpha"]
    with pytest.raises(ValueError, match=r"missing: patch_embed\.pre_affine\.alpha"):
        xp.load_released(model, state)


@pytest.mark.parametrize("name", SIZES)
def test_sizes(name: str) -> None:
    with torch.device("meta"):
        model = xp.create_model(name)
    parameters, macs = SIZES[name]
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(parameters, rel=1e-3)
    assert count_macs(model, (3, *model.img_size)) / 1e9 == pytest.approx(macs, abs=6e-3)
    side = model.default_cfg["pool_size"][0]
    assert model.grid == (side, side)
    assert set(SIZES) == set(VARIANTS)


def test_attention_sees_a_token_of_each_head_and_gives_none_back(monkeypatch) -> None:
    seen, model = [], tiny()
    original = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda q, *rest, **more: seen.append(q.shape[2]) or
        original(q, *rest, **more),
    )  # fmt: skip
    with torch.no_grad():
        tokens = model.forward_features(torch.randn(1, 3, 32, 32))
    assert tokens.shape[1] == 65
    assert seen == [67, 67]


def test_head_tokens_are_made_of_their_channels_and_returned_to_the_class_token() -> None:
    attn: HeadTokenAttention = tiny().blocks[0].attn
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        heads = []
        for g in range(2):
            wide = attn.ht_proj(x[:, :, 8 * g : 8 * g + 8].mean(1)).reshape(2, 2, 8)
            heads.append(F.gelu(attn.ht_norm(wide)).reshape(2, 16) + attn.pos_embed[0, g])
        expected = torch.stack(heads, dim=1)
        torch.testing.assert_close(attn.head_tokens(x), expected)
        q, k, v = attn.project(torch.cat([x, expected], dim=1))
        y = attn.apply_map(attn.map(q, k), v)
        found = attn(x)
    torch.testing.assert_close(found[:, 0], y[:, 0] + (y[:, 5] + y[:, 6]) / 2)
    torch.testing.assert_close(found[:, 1:], y[:, 1:5])


def test_the_factor_of_the_class_token_has_no_sigmoid() -> None:
    daff: Daff = tiny().blocks[0].mlp
    x = torch.randn(2, 7, 16)
    with torch.no_grad():
        plain = daff(x, (2, 3))
        daff.excitation.bias.add_(5)
        torch.testing.assert_close(daff(x, (2, 3))[:, 0] - plain[:, 0], 5 * x[:, 0])
        torch.testing.assert_close(daff(x, (2, 3))[:, 1:], plain[:, 1:])


@pytest.mark.parametrize(("patch", "widths"), [(2, [16]), (4, [8, 16]), (16, [2, 4, 8, 16])])
def test_the_patch_embedding_ends_with_gelu_for_patches_of_two_alone(patch, widths) -> None:
    embed = OverlappingPatchEmbed(3, 16, patch)
    kinds = [type(layer) for layer in embed.proj]
    assert [layer[0].out_channels for layer in embed.proj if isinstance(layer, nn.Sequential)] == (
        widths
    )
    assert kinds.count(nn.GELU) == max(1, len(widths) - 1)
    assert (kinds[-1] is nn.GELU) == (patch == 2)


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 70), st.integers(1, 70), st.sampled_from([2, 4, 8]))
def test_one_set_of_weights_takes_every_size(height, width, patch) -> None:
    model = tiny(patch_size=patch)
    with torch.no_grad():
        x = torch.randn(1, 3, height, width)
        tokens, grid = model.patches(x)
        assert tokens.shape == (1, grid[0] * grid[1], 16)
        assert model(x).isfinite().all()
        [last] = model.forward_intermediates(x, 1, intermediates_only=True)
    assert last.shape == (1, 16, -(-height // patch), -(-width // patch))


def test_pictures_need_not_be_square_and_rows_stay_rows() -> None:
    model, x = tiny(), torch.randn(1, 3, 24, 40)
    with torch.no_grad():
        flipped = x.flip(3)
        one = model.forward_intermediates(x, [0], intermediates_only=True)[0]
        other = model.forward_intermediates(flipped, [0], intermediates_only=True)[0]
    assert one.shape == other.shape == (1, 16, 6, 10)
    assert not torch.allclose(one, other)


@pytest.mark.parametrize("sope", [True, False])
@pytest.mark.parametrize("daff", [True, False])
@pytest.mark.parametrize("head_tokens", [True, False])
def test_every_part_can_be_left_out(sope: bool, daff: bool, head_tokens: bool) -> None:
    parts = {"sope": sope, "daff": daff, "head_tokens": head_tokens, "pos_embed": "learn"}
    model = tiny(**parts).train()
    model(torch.randn(2, 3, 32, 32)).square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    other = tiny(**parts, img_size=(48, 16))
    xp.load_released(other, model.state_dict())
    with torch.no_grad():
        x = torch.randn(2, 3, 48, 16)
        torch.testing.assert_close(other.eval()(x), model.eval()(x))


def test_without_its_parts_it_is_a_deit() -> None:
    plain = DHVT.from_authors(fn="dhvt_tiny_cifar_patch4", apply_dhvt=False, num_classes=7).eval()
    deit = xp.create_model(
        "deit_tiny_patch16_224", img_size=32, patch_size=4, num_heads=4, num_classes=7
    ).eval()
    deit.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(plain(x), deit(x))


@pytest.mark.parametrize("pool", ["avg", "max", ""])
def test_other_poolings(pool: str) -> None:
    model = tiny()
    model.reset_classifier(3, pool)
    with torch.no_grad():
        assert model(torch.randn(2, 3, 12, 16)).shape == ((2, 3) if pool else (2, 3, 4, 3))


def test_affines_embeddings_and_tokens_do_not_decay() -> None:
    names = xp.create_model("dhvt_micro_32").no_weight_decay()
    assert {"cls_token", "blocks.3.attn.pos_embed", "patch_embed.pre_affine.alpha"} <= names
    assert not any("weight" in name for name in names)


def test_what_cannot_be_built_or_run_is_refused() -> None:
    for wrong in ({"patch_size": 3}, {"patch_size": 1}, {"embed_dim": 18, "patch_size": 8}):
        with pytest.raises(UsageError, match="power of two"):
            xp.create_model("dhvt_micro_32", **wrong)
    with pytest.raises(UsageError, match="3 heads"):
        xp.create_model("dhvt_micro_32", num_heads=3)
    with pytest.raises(UsageError, match="none or learn"):
        xp.create_model("dhvt_micro_32", pos_embed="sine")
    with pytest.raises(UsageError, match="global_pool 'seq'"):
        xp.create_model("dhvt_micro_32", global_pool="seq")
    with pytest.raises(ValueError, match="img_size"):
        tiny(sope=False)(torch.randn(1, 3, 32, 30))
    with pytest.raises(ValueError, match="expected one of dhvt_tiny"):
        DHVT.from_authors(fn="dhvt_large")
    with pytest.raises(ValueError, match="arguments of the authors"):
        DHVT.from_authors(fn="dhvt_tiny_cifar_patch4", patches=3)
