"""MCTF: the authors' numbers, one fusion beside a plain loop, schedules, modes, figures."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import crosspatch as xp
from crosspatch.errors import UsageError
from crosspatch.layers.linear import switched
from crosspatch.layers.tokens import TokenState, apply_merge
from crosspatch.tokens.host import hosts_of
from crosspatch.tokens.mctf import MCTF, Criteria, _ahead, fuse, fuse_map, informativeness
from support import goldens
from support.reductions import pictures, tiny_host

R16 = (197, 197, *range(181, 20, -16))
FAST = (197, 197, 197, 197, 129, 129, 129, 85, 85, 85, 56, 56, 56)


def close(got, expected, limit=1e-4):
    return goldens.relative_error(got, expected) < limit


def map_of(state: TokenState, heads: int = 3) -> torch.Tensor:
    """Attention of tokens to themselves, proportional to sizes where there are any."""
    q = state.tokens.unflatten(2, (heads, -1)).transpose(1, 2)
    logits = q @ q.transpose(2, 3) * q.shape[-1] ** -0.5
    if state.sizes is not None:
        logits = logits + state.sizes.log()[:, None, None]
    return logits.softmax(dim=-1)


def fused_twice(name: str, **changed):
    """The golden's outputs and ours, of two fusions in a row."""
    golden = goldens.read(f"mctf/{name}")
    build = golden.meta["build"]
    criteria = Criteria(build["tau_sim"], build["tau_info"], build["tau_size"])
    options = {"bidirectional": bool(build["bidirection"]), "pooling": build["pooling_type"]}
    state, found = TokenState(golden.images[:, 0], None, None, 1, (8, 8)), {}
    for turn in ("1", "2"):
        attention = map_of(state)
        state, groups = fuse(
            state,
            informativeness(attention),
            build["r"],
            **{"criteria": criteria, **options, **changed},
        )
        found |= {"x" + turn: state.tokens, "size" + turn: state.full_sizes[..., None]}
        found["attn" + turn] = fuse_map(attention, groups)
    return golden.outputs, found


@pytest.mark.parametrize("name", ["fuse_step_bi0_pool0", "fuse_step_bi1_pool1"])
def test_one_fusion_and_the_next_are_the_authors(name):
    expected, found = fused_twice(name)
    assert expected.keys() == found.keys()
    assert all(close(found[key], expected[key], 1e-6) for key in expected)


@pytest.mark.parametrize(
    "changed",
    [
        {"criteria": Criteria(0, 20, 40)},
        {"criteria": Criteria(1, 0, 40)},
        {"criteria": Criteria(1, 20, 0)},
        {"bidirectional": False},
        *({"pooling": kind} for kind in (0, 2, 3)),
    ],
)
def test_every_part_of_a_fusion_counts(changed):
    expected, found = fused_twice("fuse_step_bi1_pool1", **changed)
    assert not close(found["x2"], expected["x2"], 1e-2)


@pytest.mark.parametrize("products", ["off", "on"])
@pytest.mark.parametrize(("name", "r"), [("deit_tiny_r16", 16), ("deit_tiny_96px_r4", 4)])
def test_a_whole_network_is_the_authors(name, r, products):
    golden = goldens.read(f"mctf/{name}")
    build = golden.meta["build"]
    size = {"img_size": build["input_size"], "num_classes": build["num_classes"]}
    model = xp.create_model("deit_tiny_patch16_224", **size).eval()
    xp.load_released(model, golden.state_dict)
    reduced, _ = xp.reduce(model, "mctf", r=r)
    with torch.no_grad(), switched(products):
        assert close(reduced(golden.images), golden.outputs["out"])
        assert not close(model(golden.images), golden.outputs["out"], 1e-2)


# ------------------------------------------------------------------ one fusion, by hand


def by_loops(x, attention, sizes, r, n_prefix, criteria, bidirectional):
    """The groups of one picture (lists of positions, in the new order), and the worth of tokens."""
    n = len(x)
    patches = range(n_prefix, n)
    info = attention.mean(axis=(0, 1))
    power = lambda value, tau: value ** (1 / tau) if tau else 1.0

    def weight(i, j):
        cosine = x[i] @ x[j] / np.linalg.norm(x[i]) / np.linalg.norm(x[j])
        sim = power((cosine + 1) / 2, criteria.tau_sim)
        told = power(info.min() ** 2 / (info[i] * info[j]), criteria.tau_info)
        return sim * told * power(1 / (sizes[i] * sizes[j]), criteria.tau_size)

    a, b = ([i for i in patches if i % 2 == odd] for odd in (0, 1))
    w = {(i, j): weight(i, j) for i in a for j in b}
    groups = {i: [i] for i in range(n)}
    forth = r // 2 if bidirectional else r
    best = {i: max(b, key=lambda j: w[i, j]) for i in a}
    for i in sorted(a, key=lambda i: -w[i, best[i]])[:forth]:
        groups[best[i]] += groups.pop(i)
    a = [i for i in a if i in groups]
    if bidirectional:
        best = {j: max(a, key=lambda i: w[i, j]) for j in b}
        b = sorted(b, key=lambda j: -w[best[j], j])
        for j in b[: r - forth]:
            groups[best[j]] += groups.pop(j)
        b = b[r - forth :]
    return [groups[i] for i in [*range(n_prefix), *a, *b]], info


def pooled_by_loops(rows, groups, weights):
    """Means of rows (N, D) by weights (N,), or maxima where there are none."""
    if weights is None:
        return np.stack([rows[group].max(axis=0) for group in groups])
    return np.stack([np.average(rows[group], axis=0, weights=weights[group]) for group in groups])


@settings(max_examples=60, deadline=None)
@given(
    patches=st.integers(2, 23),
    n_prefix=st.integers(0, 3),
    share=st.floats(0, 1),
    taus=st.tuples(*[st.sampled_from([0.5, 1.0, 2.0, 20.0])] * 3),
    off=st.sampled_from([None, 0, 1, 2]),
    bidirectional=st.booleans(),
    pooling=st.integers(0, 3),
    seed=st.integers(0, 2**31),
)
def test_a_fusion_is_what_plain_loops_find(
    patches, n_prefix, share, taus, off, bidirectional, pooling, seed
):
    g = torch.Generator().manual_seed(seed)
    n, r = patches + n_prefix, max(1, int(share * (patches // 2)))
    criteria = Criteria(*(0 if i == off else tau for i, tau in enumerate(taus)))
    sizes = torch.randint(1, 5, (2, n), generator=g).float()
    sizes[:, :n_prefix] = 1
    x = torch.randn(2, n, 6, generator=g)
    state = TokenState(x, sizes, None, n_prefix, (1, patches))
    attention = (2 * torch.randn(2, 3, n, n, generator=g)).softmax(dim=-1)
    options = {"bidirectional": bidirectional, "pooling": pooling}
    after, found = fuse(state, informativeness(attention), r, criteria, **options)
    smaller = fuse_map(attention, found)
    for row in range(2):
        one, map_, size = (t[row].double().numpy() for t in (x, attention, sizes))
        groups, info = by_loops(one, map_, size, r, n_prefix, criteria, bidirectional)
        weights = [size, info * size, None, np.ones(n)][pooling]
        assert after.sizes[row].tolist() == [size[group].sum() for group in groups]
        wanted = pooled_by_loops(one, groups, weights)
        np.testing.assert_allclose(after.tokens[row], wanted, rtol=1e-4, atol=1e-5)
        summed = np.stack([map_[..., group].sum(axis=-1) for group in groups], axis=-1)
        for head in range(3):
            wanted = pooled_by_loops(summed[head], groups, weights)
            np.testing.assert_allclose(smaller[row, head], wanted, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("pooling", range(4))
def test_the_map_need_not_be_fused_to_be_applied(pooling):
    """`_ahead` gathers what the fused map does, and rows of that sum to one where they should."""
    block = tiny_host().blocks[0]
    state = TokenState(torch.randn(2, 17, 24), None, None, 1, (4, 4))
    attention = map_of(state)
    after, groups = fuse(state, informativeness(attention), 5, pooling=pooling)
    values = block.attn.values(after.tokens)
    smaller = fuse_map(attention, groups)
    expected = block.attn.apply_map(smaller, values)
    assert close(_ahead(block.attn, attention, values, groups), expected, 1e-5)
    ones = torch.ones(2, 3, 12)
    assert torch.allclose(smaller.sum(dim=-1), ones) == (pooling != 2)


# ------------------------------------------------------------------ modes


def block_by_hand(block, tokens, bias, attention=None):
    """A block whose attention map is given, or its own."""
    normed = block.norm1(tokens)
    q, k = block.attn.qk(normed)
    attention = block.attn.map(q, k, bias) if attention is None else attention
    y = block.attn.apply_map(attention, block.attn.values(normed))
    return block.add_mlp(block.add_attention(tokens, y)), attention


@pytest.mark.parametrize("proportional", [True, False])
@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_when_attention_is_computed(ahead, proportional):
    """Before the fusion, again after it, or the fusion after the block; with sizes or without."""
    model = tiny_host()
    options = {"r": 3, "blocks": [1, 3], "ahead": ahead, "proportional": proportional}
    reduced, _ = xp.reduce(model, "mctf", **options)
    state = model.embed(pictures())
    log_size = lambda s: s.sizes.log() if proportional and s.sizes is not None else None
    with torch.no_grad():
        _, collected = reduced.run(state, collect=range(6))
        for number, block in enumerate(model.blocks):
            before, bias = state, log_size(state)
            tokens, attention = block_by_hand(block, state.tokens, bias)
            if number not in (1, 3):
                state = state._replace(tokens=tokens)
            elif ahead == 0:
                state, _ = fuse(state._replace(tokens=tokens), informativeness(attention), 3)
            else:
                after, groups = fuse(before, informativeness(attention), 3)
                map_ = fuse_map(attention, groups) if ahead == 1 else None
                tokens, _ = block_by_hand(block, after.tokens, log_size(after), map_)
                state = after._replace(tokens=tokens)
            assert close(collected[number].tokens, state.tokens, 1e-5)


@pytest.mark.parametrize("options", [{"r": 1, "ahead": 0}, {"r": 1, "blocks": [1, 3]}, {"r": 1}])
def test_the_last_block_computes_no_patch_that_nobody_sees(options):
    model, _ = xp.reduce(tiny_host(), "mctf", **options)
    short = options.get("ahead") == 0 or "blocks" in options
    with torch.no_grad():
        state, _ = model.run(model.embed(pictures()))
        quick, _ = model.run(model.embed(pictures()), pooled=True)
    assert (quick.tokens.shape[1] == 1) == short
    assert close(quick.tokens[:, 0], state.tokens[:, 0], 1e-5)


def test_attention_learns_and_the_matching_does_not():
    """A's gradient flows through the fused map alone: it is that of a fixed merge and weights."""
    block = tiny_host().blocks[0]
    tokens = torch.randn(2, 17, 24)
    logits = torch.randn(2, 3, 17, 17, requires_grad=True)
    grads = []
    for fixed in (False, True):
        attention = logits.softmax(dim=-1)
        state = TokenState(tokens, None, None, 1, (4, 4))
        after, groups = fuse(state, informativeness(attention), 5)
        if fixed:
            weights = groups.weights.clone().detach()
            groups = groups._replace(weights=weights)
            after = apply_merge(state, groups.merge, weights)
        _ahead(block.attn, attention, block.attn.values(after.tokens), groups).sum().backward()
        grads.append(logits.grad.clone())
        logits.grad = None
    assert grads[0].abs().sum() > 0
    assert torch.equal(*grads)


@pytest.mark.parametrize(
    "options",
    [
        {"r": 3, "ahead": 0, "pooling": 0, "bidirectional": False},
        {"r": [0, 1, 0.3, 0, 0, 1], "ahead": 2, "pooling": 3, "tau_sim": 0.5},
        {"pooling": 2, "proportional": False},
    ],
)
def test_every_mode_trains(options):
    model, _ = xp.reduce(tiny_host(reg_tokens=1), "mctf", **options)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert model(pictures(3)).isfinite().all()
    model.train()(pictures(3)).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


# ------------------------------------------------------------------ schedules


def counts(model, **options):
    return MCTF(hosts_of(model)[0], **options).counts


def deit(name="tiny", **more):
    with torch.device("meta"):
        return xp.create_model(f"deit_{name}_patch16_224", **more)


def test_schedules_of_the_paper():
    model = deit()
    assert counts(model, r=16) == R16
    assert counts(model) == FAST == counts(model, r=0.35, blocks=[3, 6, 9])
    assert counts(model, r=16, blocks=[0]) == (197,) + (181,) * 12
    listed = [0, 0, 60, 0.5, *[0] * 8]
    assert counts(model, r=listed) == (197, 197, 197, 137, *[69] * 9)
    assert counts(model, r=[60, 0.5], blocks=[2, 3]) == counts(model, r=listed)
    assert counts(model, r=0.9)[2] == 99  # not more than half


def test_small_pictures_keep_ten_tokens_of_a_count_for_all():
    assert counts(deit(img_size=96), r=4) == (37, 37, 33, 29, 25, 21, 17, 13, *[10] * 5)
    assert counts(tiny_host(), r=7) == (17, 17, *[10] * 5)
    assert counts(tiny_host(img_size=16), r=3) == (5,) * 7
    assert counts(tiny_host(reg_tokens=2), r=15) == (19, 19, 11, *[10] * 4)
    assert counts(tiny_host(), r=[8, 4, 2, 1, 0, 0]) == (17, 9, 5, 3, 2, 2, 2)
    assert counts(tiny_host(img_size=8), r=0.5) == (2,) * 7


@pytest.mark.parametrize("depth", range(1, 8))
def test_the_default_is_at_a_quarter_half_and_three_quarters(depth):
    reducer = MCTF(hosts_of(tiny_host(depth=depth))[0])
    assert reducer.counts[-1] < 17
    assert 0 not in reducer.blocks or depth == 1
    assert len(reducer.blocks) <= 3


@pytest.mark.parametrize(
    "wrong",
    [
        {"r": 17},
        {"r": -1},
        {"r": 1.5},
        {"r": math.nan},
        {"r": [0, 9, 0, 0, 0, 0]},
        {"r": [0, 0, 0]},
        {"r": [4], "blocks": [1, 2]},
        {"r": 2, "blocks": [6]},
        {"r": 2, "blocks": [1, 1]},
        {"tau_info": -1},
        {"tau_sim": math.inf},
        {"pooling": 4},
        {"ahead": 3},
    ],
)
def test_what_cannot_be_is_refused(wrong):
    with pytest.raises(UsageError, match=r"\d"):
        xp.reduce(tiny_host(), "mctf", **wrong)


# ------------------------------------------------------------------ figures


def macs(tokens, width):
    """Multiply-adds of a ViT of patches of 16 whose blocks are entered by `tokens`, counted as the
    paper's are: with the similarity of a and b, and nothing for the pooling; every token of the
    last block is computed."""
    total = 196 * 768 * width + 1000 * width
    for n, m in itertools.pairwise(tokens):
        total += 2 * n * width**2 + n * n * width  # queries, keys and the map
        total += m * width**2 + m * m * width + 9 * m * width**2  # values, output and the MLP
        if m < n:
            total += math.ceil(n / 2) * (n // 2) * width
    return total


@pytest.mark.parametrize(
    ("name", "width", "expected", "saved"), [("tiny", 192, 0.705, 43.7), ("small", 384, 2.59, 43.6)]
)
def test_multiply_adds_are_the_paper_s(name, width, expected, saved):
    model = deit(name)
    got, base = macs(counts(model, r=16), width), macs((197,) * 13, width)
    assert got / 1e9 == pytest.approx(expected, abs=0.005 if name == "small" else 0.0005)
    assert round(100 * (1 - got / base), 1) == saved


def test_our_counter_sees_the_reduction():
    """It counts the products of the pooling too, and of the unreduced model the last block's class
    token alone."""
    _, saved = xp.reduce(deit("small"), "mctf", r=16)
    assert saved.base / 1e9 == pytest.approx(4.27, abs=0.03)
    assert saved.macs / macs(R16, 384) == pytest.approx(1.0, abs=0.03)
    _, fast = xp.reduce(deit("small"), "mctf")
    assert fast.saved == pytest.approx(0.36, abs=0.02)
    assert [(one.entering, one.leaving) for one in fast.blocks] == list(itertools.pairwise(FAST))


def test_blocks_without_a_fusion_take_the_fused_kernel():
    """Before the first fusion the untouched path, after it the fused kernel with the sizes."""
    model = tiny_host()
    host = hosts_of(model)[0]
    reducer = MCTF(host, r=2, blocks=[2, 4])
    assert [reducer.active(block) for block in range(6)] == [False, False, True, True, True, True]
    state = TokenState(torch.randn(1, 5, 24), torch.full((1, 5), 2.0), None, 1, (2, 2))
    assert reducer.instead(model.blocks[3], state, 3) is None
    assert reducer.wants(3) == frozenset()
    assert torch.equal(reducer.bias(state, 3), state.sizes.log())
    plain = MCTF(host, r=2, blocks=[2, 4], proportional=False)
    assert [plain.active(block) for block in range(6)] == [False, False, True, False, True, False]
    assert plain.bias(state, 2) is None
