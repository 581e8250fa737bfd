"""Layers against naive twins and library operators; laws of the token state."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from crosspatch.layers.attention import Attention
from crosspatch.layers.patch_embed import ConvStem, PatchEmbed
from crosspatch.layers.position import resize_table, square_grid
from crosspatch.layers.resize import FixedResize, resize_matrix
from crosspatch.layers.tokens import (
    Merge,
    TokenState,
    apply_merge,
    counts_of,
    order,
    recover,
    select_patches,
)


@settings(max_examples=40, deadline=None)
@given(st.tuples(*[st.integers(5, 90)] * 4))
def test_the_fixed_resize_is_torchs_bicubic(sizes) -> None:
    h, w, out_h, out_w = sizes
    x = torch.rand(1, 2, h, w)
    expected = F.interpolate(x, (out_h, out_w), mode="bicubic", align_corners=False)
    for nominal in ((h, w), (7, 7)):  # from constants, and computed on the way
        got = FixedResize((out_h, out_w), nominal)(x)
        assert (got - expected).abs().max() < 1e-5


def test_the_authors_two_resizes() -> None:
    x = torch.randn(2, 3, 224, 224)
    expected = F.interpolate(x, (240, 240), mode="bicubic", align_corners=False)
    assert (FixedResize((240, 240), (224, 224))(x) - expected).abs().max() < 1e-5
    assert torch.allclose(resize_matrix(224, 240).sum(dim=1), torch.ones(240))


def test_the_resize_keeps_full_precision_under_autocast() -> None:
    x = torch.randn(1, 3, 24, 24)
    resize = FixedResize((20, 20), (24, 24))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(resize(x), resize(x.clone()))
        assert resize(x).dtype == torch.float32
    assert list(resize.state_dict()) == []


def naive_attention(layer: Attention, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Loops over batch, head and query."""
    q, k, v = layer.project(x)
    out = torch.zeros(*x.shape[:2], layer.value_width)
    d = v.shape[-1]
    for b in range(x.shape[0]):
        for h in range(layer.num_heads):
            for i in range(x.shape[1]):
                logits = torch.stack([q[b, h, i] @ key for key in k[b, h]]) / math.sqrt(q.shape[-1])
                if bias is not None:
                    logits = logits + bias[b]
                out[b, i, h * d : (h + 1) * d] = logits.softmax(0) @ v[b, h]
    return layer.proj(out)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("qk", "value"), [(12, 12), (6, 9)])
def test_attention_equals_its_loop(biased: bool, qk: int, value: int) -> None:
    layer, x = Attention(12, 3, qk, value), torch.randn(2, 5, 12)
    bias = torch.randn(2, 5) if biased else None
    with torch.no_grad():
        expected = naive_attention(layer, x, bias)
        assert torch.allclose(layer(x, bias), expected, atol=1e-5)
        q, k = layer.qk(x)
        full = layer.map(q, k, bias)
        assert torch.allclose(layer.apply_map(full, layer.values(x)), expected, atol=1e-5)
        assert torch.allclose(layer.class_row(q, k, bias), full[:, :, 0], atol=1e-6)
        y, stats = layer.inspected(x, bias, frozenset({"keys", "class_row"}))
        assert torch.allclose(y, expected, atol=1e-5)
        assert torch.allclose(stats.class_row, full[:, :, 0], atol=1e-6)
        assert torch.equal(stats.keys, k)


def test_position_tables() -> None:
    table = torch.randn(1, 1 + 16, 8)
    assert resize_table(table, (4, 4), (4, 4), 1) is table
    larger = resize_table(table, (4, 4), (6, 3), 1)
    assert larger.shape == (1, 19, 8)
    assert torch.equal(larger[:, 0], table[:, 0])
    flat = torch.ones(1, 16, 2)
    assert torch.allclose(resize_table(flat, (4, 4), (7, 5), 0), torch.ones(1, 35, 2))
    with pytest.raises(ValueError, match="expected 10 for 1 prefix tokens and a grid of 3x3"):
        resize_table(table, (3, 3), (4, 4), 1)
    assert square_grid(196) == (14, 14)
    with pytest.raises(ValueError, match="no square grid"):
        square_grid(195)


@pytest.mark.parametrize("patch", [2, 4, 8, 16])
def test_stems_give_the_grid_of_plain_patches(patch: int) -> None:
    x = torch.randn(2, 3, 32, 48)
    expected = PatchEmbed(3, 24, patch)(x).shape
    assert ConvStem(3, 24, patch)(x).shape == expected


def test_a_conv_stem_needs_a_power_of_two() -> None:
    with pytest.raises(ValueError, match="2, 4, 8 or 16, not 12"):
        ConvStem(3, 24, 12)


@st.composite
def merges(draw) -> tuple[TokenState, Merge]:
    """A state of 2 pictures with a random merge or pruning of its patches."""
    rows, columns, n_prefix = (
        draw(st.integers(1, 4)),
        draw(st.integers(2, 4)),
        draw(st.integers(0, 2)),
    )
    n, removed = rows * columns, draw(st.integers(0, rows * columns - 1))
    seed, prune = draw(st.integers(0, 2**31)), draw(st.booleans())
    g = torch.Generator().manual_seed(seed)
    perm = torch.stack([torch.randperm(n, generator=g) for _ in range(2)]) + n_prefix
    prefix = torch.arange(n_prefix).expand(2, -1)
    keep = torch.cat([prefix, perm[:, removed:]], dim=1)
    src = perm[:, :0] if prune else perm[:, :removed]
    dst = torch.randint(n_prefix, keep.shape[1], src.shape, generator=g)
    tokens = torch.randn(2, n_prefix + n, 3, generator=g, dtype=torch.float64)
    return TokenState(tokens, None, None, n_prefix, (rows, columns)), Merge(keep, src, dst)


@settings(max_examples=80, deadline=None)
@given(merges(), merges())
def test_laws_of_merging(first, second) -> None:
    state, merge = first
    after = apply_merge(state, merge)
    n = state.n_prefix
    assert torch.equal(after.tokens[:, :n], state.tokens[:, :n])
    seen = after.full_source >= 0
    if merge.src.shape[1]:
        assert torch.equal(after.sizes.sum(1), torch.full((2,), float(state.tokens.shape[1])))
        mass = (after.tokens * after.sizes[..., None]).sum(1)
        assert torch.allclose(mass, state.tokens.sum(1))
        assert seen.all()
    else:
        assert (seen.sum(1) == merge.keep.shape[1] - n).all()
    counted = torch.zeros(after.tokens.shape[:2])
    for b in range(2):  # every token stands for as many patches as point at it
        for patch in after.full_source[b][seen[b]]:
            counted[b, patch] += 1
    assert torch.equal(counted[:, n:], after.full_sizes[:, n:])
    grid = recover(after)
    kept_first = merge.keep[0, n] - n if merge.keep.shape[1] > n else None
    if kept_first is not None:
        assert torch.equal(grid[0, kept_first], after.tokens[0, n])


def test_merging_twice_keeps_track_of_the_first_patches() -> None:
    state = TokenState(torch.arange(8.0).reshape(1, 8, 1), None, None, 0, (2, 4))
    one = apply_merge(
        state, Merge(torch.tensor([[0, 2, 4, 6]]), torch.tensor([[1, 3]]), torch.tensor([[0, 1]]))
    )
    two = apply_merge(one, Merge(torch.tensor([[1, 2]]), torch.tensor([[0]]), torch.tensor([[0]])))
    assert two.tokens.flatten().tolist() == [(0 + 1 + 2 + 3) / 4, 4.0]
    assert two.sizes.tolist() == [[4.0, 1.0]]
    assert two.source.tolist() == [[0, 0, 0, 0, 1, -1, -1, -1]]


def test_order_is_stable_and_topk_agrees() -> None:
    scores = torch.tensor([[1.0, 3.0, 3.0, 2.0]])
    assert order(scores).tolist() == [[1, 2, 3, 0]]
    distinct = torch.randn(3, 50)
    assert torch.equal(order(distinct), distinct.topk(50).indices)


def test_selecting_from_a_selection() -> None:
    state = TokenState(torch.arange(5.0).reshape(1, 5, 1), None, None, 1, (2, 2))
    once = select_patches(state, torch.tensor([[3, 1, 0]]))
    twice = select_patches(once, torch.tensor([[2, 0]]))
    assert twice.tokens.flatten().tolist() == [0, 1, 4]
    assert twice.source.tolist() == [[1, -1, -1, 2]]


def test_schedules_are_resolved_and_impossible_ones_refused() -> None:
    assert counts_of((0, 4, 4), 17, 1, 3) == (17, 17, 13, 9)
    with pytest.raises(ValueError, match="at least one must stay"):
        counts_of((8, 8), 17, 1, 2)
    with pytest.raises(ValueError, match="2 entries for 3 blocks"):
        counts_of((1, 1), 17, 1, 3)
