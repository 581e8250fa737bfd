"""STViT against the equations written out, its costs, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import crosspatch as xp
from crosspatch.layers.tokens import recover
from crosspatch.metrics.macs import count_macs
from crosspatch.tokens.host import attach, hosts_of
from crosspatch.tokens.stvit import STViT, cells_of, pool_to
from support.reductions import pictures, tiny_crossvit, tiny_host

SIDE = st.integers(1, 9)


@settings(deadline=None, max_examples=40)
@given(st.tuples(SIDE, SIDE), st.integers(1, 5), st.integers(0, 99))
def test_pooling_is_adaptive_max_pooling_of_any_grid(grid, side, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(2, 3, *grid, generator=generator)
    expected = F.adaptive_max_pool2d(image, side).flatten(2).transpose(1, 2)
    assert torch.equal(pool_to(image.flatten(2).transpose(1, 2), grid, side), expected)


@settings(deadline=None, max_examples=40)
@given(st.tuples(SIDE, SIDE), st.integers(1, 5))
def test_every_patch_lies_in_the_window_of_its_cell(grid, side) -> None:
    """Raising one patch above all others raises the cell it is said to be in."""
    side = min(side, *grid)
    cells = cells_of(grid, side, None)
    image = torch.eye(grid[0] * grid[1])[None]  # channel p: patch p alone
    pooled = pool_to(image.transpose(1, 2), grid, side)[0]
    assert (pooled[cells, torch.arange(len(cells))] == 1).all()
    assert cells.unique().tolist() == list(range(side * side))


def attention(block, queries, context):
    """Multi-head attention as in the paper, from the rows of the host's own qkv."""
    attn, width, b = block.attn, queries.shape[-1], len(queries)
    q, k, v = attn.qkv.weight.chunk(3)
    bias = attn.qkv.bias.chunk(3)
    x, y = block.norm1(queries), block.norm1(context)
    heads = [
        t.reshape(b, -1, attn.num_heads, width // attn.num_heads).transpose(1, 2)
        for t in (x @ q.T + bias[0], y @ k.T + bias[1], y @ v.T + bias[2])
    ]
    scores = heads[0] @ heads[1].transpose(2, 3) * (width // attn.num_heads) ** -0.5
    return attn.proj((scores.softmax(dim=-1) @ heads[2]).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("shortcut", [True, False])
@pytest.mark.parametrize("centres", [True, False])
def test_the_two_blocks_are_the_papers_equations(shortcut, centres) -> None:
    """Without a class token, as the paper has it."""
    host = tiny_host(class_token=False, global_pool="avg")
    model, _ = xp.reduce(host, "stvit", tokens=4, base=1, centres=centres, shortcut=shortcut)
    b1, b2 = host.blocks[1], host.blocks[2]
    with torch.no_grad():
        x = host.blocks[0](host.embed(pictures()).tokens)
        p = F.adaptive_max_pool2d(x.transpose(1, 2).unflatten(2, (4, 4)), 2)
        p = p.flatten(2).transpose(1, 2)
        s = attention(b1, p, torch.cat([p, x], dim=1)) + (p if shortcut else 0)
        s = s + b1.mlp(b1.norm2(s))
        q = s + model.reducer.centres if centres else s
        t = q + attention(b2, q, torch.cat([s, x], dim=1))
        t = t + b2.mlp(b2.norm2(t))
        final, found = model.run(model.embed(pictures()), collect={1, 2})
        torch.testing.assert_close(found[1].tokens, s, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found[2].tokens, t, rtol=1e-4, atol=1e-4)
        for block in host.blocks[3:]:
            t = block(t)
        expected = host.head(host.fc_norm(t.mean(dim=1)))
        torch.testing.assert_close(model(pictures()), expected, rtol=1e-4, atol=1e-4)
    assert final.sizes is None
    assert recover(final).shape == (3, 16, 24)


def test_as_many_tokens_as_patches_and_no_centres_are_two_copies_of_the_grid() -> None:
    """Pooled to its own grid every patch is its own semantic token; the keys are there twice, which
    changes no softmax over patches alone."""
    host = tiny_host(class_token=False, global_pool="avg")
    model, _ = xp.reduce(host, "stvit", tokens=16, base=0, centres=False)
    with torch.no_grad():
        _, found = model.run(model.embed(pictures()), collect={0})
        _, plain = host.run(host.embed(pictures()), collect={0})
    torch.testing.assert_close(found[0].tokens, plain[0].tokens, rtol=1e-4, atol=1e-4)
    assert torch.equal(found[0].source, torch.arange(16).expand(3, 16))


def test_prefix_tokens_attend_beside_the_semantic_ones() -> None:
    """The class token takes from [class; P; X] and gives to them."""
    host = tiny_host()
    model, _ = xp.reduce(host, "stvit", tokens=4, base=0, centres=False)
    block = host.blocks[0]
    with torch.no_grad():
        state = host.embed(pictures())
        p = pool_to(state.patches, (4, 4), 2)
        context = torch.cat([state.tokens[:, :1], p, state.patches], dim=1)
        y = block.add_mlp(context[:, :5] + attention(block, context[:, :5], context))
        found = model.run(state, collect={0})[1][0]
    torch.testing.assert_close(found.tokens, y, rtol=1e-4, atol=1e-4)
    assert found.source[0].tolist() == [1, 1, 2, 2, 1, 1, 2, 2, 3, 3, 4, 4, 3, 3, 4, 4]


def formula(width: int, tokens: int = 16, base: int = 4) -> tuple[int, int]:
    """Multiply-adds of DeiT and of STViT on its class-token-free form, at 224."""

    def block(queries: int, keys: int) -> int:
        return (10 * queries + 2 * keys) * width**2 + 2 * queries * keys * width

    ends = 768 * 196 * width + 1000 * width
    reduced = base * block(196, 196) + 2 * block(tokens, 196 + tokens)
    return ends + 12 * block(197, 197), ends + reduced + (10 - base) * block(tokens, tokens)


@pytest.mark.parametrize(
    ("size", "width", "gmacs", "saved"),
    [("tiny", 192, 0.52, 0.583), ("small", 384, 1.91, 0.585), ("base", 768, 7.26, 0.586)],
)
def test_sixteen_tokens_cost_what_the_formula_says(size, width, gmacs, saved) -> None:
    with torch.device("meta"):
        model = xp.create_model(f"deit_{size}_patch16_224", class_token=False, global_pool="avg")
    before = set(model.state_dict())
    attach(model, [STViT(hosts_of(model)[0])])
    whole, expected = formula(width)
    assert count_macs(model, (3, 224, 224)) == expected
    assert expected / 1e9 == pytest.approx(gmacs, rel=0.008)
    assert 1 - expected / whole == pytest.approx(saved, abs=0.0015)
    assert set(model.state_dict()) - before == {"reducer.centres"}
    assert model.reducer.centres.shape == (1, 16, width)
    assert model.reducer.counts == (196,) * 5 + (16,) * 8


def test_layer_scales_begin_as_asked_and_only_in_the_two_blocks() -> None:
    host = tiny_host()
    model, _ = xp.reduce(host, "stvit", tokens=4, base=2, layer_scale=1e-5, centres=False)
    gammas = [name for name in model.state_dict() if name.endswith("gamma")]
    assert gammas == [f"blocks.{i}.ls{j}.gamma" for i in (2, 3) for j in (1, 2)]
    with torch.no_grad():
        _, found = model.run(model.embed(pictures()), collect={1, 2})
        p = pool_to(found[1].patches, (4, 4), 2)
    torch.testing.assert_close(found[2].tokens[:, 1:], p, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("host", "options", "message"),
    [
        ({}, {"tokens": 5}, "tokens = 5; expected a square number"),
        ({}, {"tokens": 0}, "tokens = 0"),
        ({}, {"tokens": 25}, "t from 1 to 4"),
        ({}, {"tokens": 4, "base": 5}, "expected 0 to 4"),
        ({}, {"tokens": 4, "base": -1}, "base = -1"),
        ({"depth": 1}, {"tokens": 4}, "two of the 1 blocks"),
        ({"init_values": 0.1}, {"tokens": 4, "layer_scale": 0.1}, "LayerScales of their own"),
    ],
)
def test_what_cannot_be_is_refused(host, options, message) -> None:
    with pytest.raises(xp.errors.UsageError, match=message):
        xp.reduce(tiny_host(**host), "stvit", **options)


def test_a_subset_of_the_patches_cannot_be_pooled() -> None:
    model, _ = xp.reduce(tiny_host(), "stvit", tokens=4)
    with pytest.raises(ValueError, match="every patch of the grid"):
        model.run(model.embed(pictures(), keep=torch.arange(9).expand(3, -1)))


def test_a_branch_hands_its_semantic_tokens_to_the_fusion() -> None:
    model, report = xp.reduce(tiny_crossvit(), "stvit", tokens=4, fine={"base": 0}, coarse=None)
    left = [one.leaving for one in report.blocks if one.branch == "fine"]
    assert left == [5, 5]
    assert model(pictures()).isfinite().all()


@pytest.mark.long
def test_windows_that_do_not_divide_run_in_onnx_runtime() -> None:
    ort = pytest.importorskip("onnxruntime")
    from crosspatch.deploy.graph import to_onnx

    host = tiny_host(img_size=56, depth=2, embed_dim=12)
    model, _ = xp.reduce(host, "stvit", tokens=16)
    batch = torch.export.Dim("batch", min=1, max=64)
    with torch.no_grad():
        program = torch.export.export(model, (pictures(2, 56),), dynamic_shapes=({0: batch},))
        written = to_onnx(program).SerializeToString()
        session = ort.InferenceSession(written, providers=["CPUExecutionProvider"])
        (got,) = session.run(None, {session.get_inputs()[0].name: pictures(3, 56).numpy()})
        np.testing.assert_allclose(got, model(pictures(3, 56)).numpy(), rtol=1e-4, atol=1e-4)
