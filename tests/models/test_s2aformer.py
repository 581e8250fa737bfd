"""S2AFormer, an independent reading: strips of one channel, how many keys, counts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import crosspatch as xp
from crosspatch.errors import UsageError
from crosspatch.metrics.macs import count_macs, counted
from crosspatch.models.s2aformer import HybridBlock, S2AFormer, StripAttention


def attention(dim: int = 12, heads: int = 3, r: int = 2, **more) -> StripAttention:
    torch.manual_seed(0)
    made = StripAttention(dim, heads, r, **more).eval()
    with torch.no_grad():
        for value in made.parameters():
            value.add_(0.3 * torch.randn_like(value))
    return made


# ---------------------------------------------------------------------- strip attention


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 4), st.integers(1, 3), st.sampled_from([1, 2, 4, 8]),
    st.integers(1, 17), st.integers(1, 17), st.sampled_from(["conv", "mean"]),
)  # fmt: skip
def test_strips_have_one_channel_and_keys_are_fewer(heads, part, r, height, width, how) -> None:
    made = StripAttention(heads * part, heads, r, how)
    seen = {}
    for name in ("q", "k", "v"):
        hook = lambda module, x, y, name=name: seen.__setitem__(name, tuple(y.shape))
        getattr(made, name).register_forward_hook(hook)
    assert made(torch.randn(2, height, width, heads * part)).shape[1:3] == (height, width)
    cells = -(-height // r), -(-width // r)  # N / r^2, where r divides the map
    assert seen["q"] == (2, height, width, heads)
    assert seen["k"] == (2, *cells, heads)
    assert seen["v"] == (2, *cells, heads * part)


def test_attention_by_hand() -> None:
    made, x = attention(), torch.randn(2, 6, 4, 12)
    with torch.no_grad():
        z = made.sr_norm(made.sr(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)).flatten(1, 2)
        q, k, v = made.q(x.flatten(1, 2)), made.k(z), made.v(z)
        outs = []
        for head in range(3):
            row = q[:, :, head, None] * k[:, None, :, head]
            outs.append(row.softmax(dim=2) @ v[:, :, 4 * head : 4 * head + 4])
        expected = made.proj(torch.cat(outs, dim=2)).unflatten(1, (6, 4))
        torch.testing.assert_close(made(x), expected, rtol=1e-4, atol=1e-5)


def test_the_logits_of_a_head_are_of_rank_one() -> None:
    made, x = attention(heads=1, r=1), torch.randn(1, 5, 4, 12)
    with torch.no_grad():
        q, k = made.q(x).flatten(), made.k(made.keys(x)).flatten()
        weights = (q[:, None] * k).softmax(dim=1).log()
    centred = weights - weights.mean(dim=1, keepdim=True)
    values = torch.linalg.svdvals(centred)
    assert values[0] > 1e-2
    assert values[1] < 1e-5 * values[0]


def test_padding_is_zeros_at_the_bottom_and_the_right() -> None:
    made, x = attention(r=4), torch.randn(1, 5, 6, 12)
    padded = F.pad(x, (0, 0, 0, 2, 0, 3))
    with torch.no_grad():
        torch.testing.assert_close(made.keys(x), made.keys(padded))
    flat = attention(r=1)
    assert torch.equal(flat.keys(x), flat.sr_norm(x))


@pytest.mark.parametrize(("dim", "heads", "expected"), [(40, 1, 125), (64, 1, 126), (40, 4, 116)])
def test_what_attention_of_the_first_stage_costs(dim, heads, expected) -> None:
    made = StripAttention(dim, heads, 8).to("meta")
    x = torch.zeros(1, 56, 56, dim, device="meta")
    total = counted(made, x)[0]
    tokens, keys = 56 * 56, 49
    layers = tokens * dim * (heads + dim) + keys * dim * (heads + dim) + tokens * dim
    products = total - layers
    assert products == tokens * keys * (heads + dim)
    assert 2 * tokens**2 * dim / products == pytest.approx(expected, abs=0.6)
    assert counted(StripAttention(dim, heads, 1).to("meta"), x)[0] > 4 * total


# ---------------------------------------------------------------------- blocks


def test_a_block_by_hand() -> None:
    torch.manual_seed(0)
    block = HybridBlock(12, 3, 2, 4, True, 0.0, 0.0).eval()
    block.lim.dw.bn.running_mean.normal_()
    x = torch.randn(2, 6, 5, 12)
    first = lambda layer, t: layer(t.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    with torch.no_grad():
        y = x + first(block.dw, x)
        y = y + block.ssa(block.norm1(y))
        near = first(block.lim.dw, block.norm2(y))
        y = y + block.lim.proj(F.gelu(near))
        y = y + block.mlp(block.norm3(y))
        torch.testing.assert_close(block(x), y)


@pytest.mark.parametrize(("lim", "reduction"), [(False, "conv"), (True, "mean")])
def test_parts_that_can_be_left_out(lim, reduction) -> None:
    model = xp.create_model("s2aformer_micro_32", num_classes=3, lim=lim, reduction=reduction)
    names = {name for name, _ in model.named_parameters()}
    assert any(".lim." in name for name in names) == lim
    assert any(".norm2." in name for name in names) == lim
    assert any(".sr." in name for name in names) == (reduction == "conv")
    assert model.eval()(torch.randn(1, 3, 21, 34)).shape == (1, 3)


# ---------------------------------------------------------------------- counts


@pytest.mark.parametrize(
    ("size", "ours", "published"),
    [
        ("mini", (5.0, 0.43), (5.02, 0.43)),
        ("t", (5.9, 0.66), (5.80, 0.655)),
        ("xs", (6.4, 0.80), (6.54, 0.786)),
        ("s", (10.5, 1.39), (10.69, 1.38)),
        ("m", (25.2, 4.13), (24.87, 4.12)),
    ],
)
def test_sizes(size, ours, published) -> None:
    """A guard on our widths, which were fitted to the published numbers."""
    with torch.device("meta"):
        model = xp.create_model(f"s2aformer_{size}")
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    gmacs = count_macs(model, (3, 224, 224)) / 1e9
    assert parameters == pytest.approx(ours[0], abs=0.051)
    assert gmacs == pytest.approx(ours[1], abs=0.006)
    assert (parameters, gmacs) == pytest.approx(published, rel=0.03)
    assert [info["reduction"] for info in model.feature_info] == [4, 8, 16, 32]


def test_the_small_one_costs_what_its_peers_do() -> None:
    with torch.device("meta"):
        model = xp.create_model("s2aformer_micro_32")
    assert 10.8e6 < count_macs(model, (3, 32, 32)) < 13.1e6


# ---------------------------------------------------------------------- the network


def test_the_head_norms_what_is_pooled() -> None:
    model = xp.create_model("s2aformer_micro_32", num_classes=4).eval()
    with torch.no_grad():
        features = model.forward_features(torch.randn(2, 3, 32, 48))
        assert features.shape == (2, 2, 3, 96)
        expected = F.layer_norm(features.mean(dim=(1, 2)), (96,))
        torch.testing.assert_close(model.forward_head(features, pre_logits=True), expected)


def test_weights_load_under_the_names_of_the_description() -> None:
    model = xp.create_model("s2aformer_micro_32", num_classes=4).eval()
    state = {
        name.replace(".downsample.", ".embed.").replace("norm_head", "head_norm"): value
        for name, value in model.state_dict().items()
    }
    assert "stages.1.embed.c.weight" in state
    other = xp.create_model("s2aformer_micro_32", num_classes=4).eval()
    x = torch.randn(1, 3, 32, 32)
    xp.load_released(other, {"model": state})
    with torch.no_grad():
        assert torch.equal(other(x), model(x))


def test_rates_of_drop_path_grow() -> None:
    model = S2AFormer(dims=(8, 16), depths=(1, 2), num_heads=(1, 2), sr_ratios=(2, 1),
                      mlp_ratios=(2, 2), drop_path_rate=0.2)  # fmt: skip
    rates = [block.drop_path.drop_prob for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_heads": (5, 4, 6, 8)}, "divide by 5 heads"),
        ({"depths": (1, 1)}, "depths has 2"),
        ({"depths": (0, 1, 1, 1)}, "1 or more"),
        ({"reduction": "max"}, "one of conv, mean"),
        ({"global_pool": "token"}, "global_pool"),
    ],
)
def test_impossible_shapes_are_refused(arguments, words) -> None:
    with pytest.raises(UsageError, match=words):
        xp.create_model("s2aformer_micro_32", **arguments)
