"""Laws of reductions as data, for any of them: what a merge keeps, and where every patch is."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from crosspatch.layers.tokens import (
    Merge,
    TokenState,
    apply_merge,
    as_map,
    counts_of,
    mean_patch,
    order,
    recover,
    select_patches,
)

BATCH = 2
law = partial(settings, max_examples=60, deadline=None)


@st.composite
def generators(draw) -> torch.Generator:
    return torch.Generator().manual_seed(draw(st.integers(0, 2**31)))


@st.composite
def started(draw) -> tuple[TokenState, torch.Generator]:
    """A full grid with 0 to 2 prefix tokens, and a generator for what is done to it."""
    grid, n_prefix = (draw(st.integers(1, 4)), draw(st.integers(2, 5))), draw(st.integers(0, 2))
    g = draw(generators())
    tokens = torch.randn(BATCH, n_prefix + grid[0] * grid[1], 3, generator=g, dtype=torch.float64)
    return TokenState(tokens, None, None, n_prefix, grid), g


def drawn(state: TokenState, g: torch.Generator, *, merged=True, dropped=True) -> Merge:
    """A random reduction of the present patches: some merged away, some dropped, at least one
    kept."""
    n, prefix = state.tokens.shape[1] - state.n_prefix, state.n_prefix
    kept = int(torch.randint(1, n + 1, (), generator=g))
    last = int(torch.randint(kept, n + 1, (), generator=g)) if dropped else n
    last = kept if not merged else last
    index = torch.stack([torch.randperm(n, generator=g) for _ in range(BATCH)]) + prefix
    keep = torch.cat([torch.arange(prefix).expand(BATCH, -1), index[:, :kept]], dim=1)
    src = index[:, kept:last]
    return Merge(keep, src, torch.randint(prefix, keep.shape[1], src.shape, generator=g))


def moved(merge: Merge, b: int, token: int) -> int:
    """Where a token of picture b is after a merge, -1 where it was dropped; -1 stays -1."""
    keep, src = merge.keep[b].tolist(), merge.src[b].tolist()
    if token in keep:
        return keep.index(token)
    return int(merge.dst[b, src.index(token)]) if token in src else -1


def mass(state: TokenState) -> torch.Tensor:
    return (state.tokens * state.full_sizes[..., None]).sum(dim=1)


@law()
@given(started())
def test_a_merge_keeps_sizes_and_the_weighted_sum(given):
    state, g = given
    for _ in range(3):  # from equal sizes, then from unequal ones
        after = apply_merge(state, drawn(state, g, dropped=False))
        assert_close(after.full_sizes.sum(dim=1), state.full_sizes.sum(dim=1), rtol=0, atol=0)
        assert_close(mass(after), mass(state))
        prefix = slice(0, state.n_prefix)
        assert_close(after.tokens[:, prefix], state.tokens[:, prefix], rtol=0, atol=0)
        assert_close(
            mean_patch(after.tokens, state.n_prefix, after.full_sizes),
            mean_patch(state.tokens, state.n_prefix, state.full_sizes),
        )
        state = after


@law()
@given(started())
def test_a_merge_is_a_weighted_mean_token_by_token(given):
    state, g = given
    state = apply_merge(state, drawn(state, g))
    merge = drawn(state, g)
    after, sizes = apply_merge(state, merge), state.full_sizes.double()
    for b in range(BATCH):
        for slot, kept in enumerate(merge.keep[b].tolist()):
            members = [kept, *merge.src[b][merge.dst[b] == slot].tolist()]
            weights = sizes[b, members]
            wanted = (weights[:, None] * state.tokens[b, members]).sum(dim=0) / weights.sum()
            assert_close(after.tokens[b, slot], wanted)
            assert after.full_sizes[b, slot] == weights.sum()


@law()
@given(started())
def test_what_is_dropped_takes_its_mass_along(given):
    state, g = given
    state = apply_merge(state, drawn(state, g, dropped=False))
    merge = drawn(state, g)
    after = apply_merge(state, merge)
    for b in range(BATCH):
        stays = [*merge.keep[b].tolist(), *merge.src[b].tolist()]
        weighted = state.tokens[b, stays] * state.full_sizes[b, stays, None]
        assert_close(mass(after)[b], weighted.sum(dim=0))
        assert after.full_sizes[b].sum() == state.full_sizes[b, stays].sum()


@law()
@given(started())
def test_two_reductions_compose(given):
    """`source` after both is the map of the first, then of the second; -1 stays -1."""
    state, g = given
    first = drawn(state, g)
    once = apply_merge(state, first)
    second = drawn(once, g)
    twice = apply_merge(once, second)
    for b in range(BATCH):
        for patch, token in enumerate(state.full_source[b].tolist()):
            assert once.source[b, patch] == moved(first, b, token)
            assert twice.source[b, patch] == moved(second, b, moved(first, b, token))
    assert (twice.source[once.source < 0] == -1).all()
    assert (twice.source < twice.tokens.shape[1]).all()


@law()
@given(started())
def test_sizes_count_the_patches_that_a_token_stands_for(given):
    state, g = given
    for _ in range(3):
        state = apply_merge(state, drawn(state, g))
        for b in range(BATCH):
            seen = state.source[b][state.source[b] >= 0]
            counted = seen.bincount(minlength=state.tokens.shape[1])[state.n_prefix :]
            if state.sizes is not None:
                assert torch.equal(counted.float(), state.sizes[b, state.n_prefix :])
            else:
                assert (counted == 1).all()


@law()
@given(started())
def test_two_steps_are_as_good_as_one(given):
    """Merging one half of the patches that go, then the other, is merging both."""
    state, g = given
    keep, src, dst = drawn(state, g, dropped=False)
    half = src.shape[1] // 2
    now, later = src[:, :half], src[:, half:]
    middle = apply_merge(state, Merge(torch.cat([keep, later], dim=1), now, dst[:, :half]))
    index = torch.arange(middle.tokens.shape[1]).expand(BATCH, -1)
    kept, rest = index[:, : keep.shape[1]], index[:, keep.shape[1] :]
    stepwise = apply_merge(middle, Merge(kept, rest, dst[:, half:]))
    once = apply_merge(state, Merge(keep, src, dst))
    assert_close(stepwise.tokens, once.tokens)
    assert torch.equal(stepwise.full_sizes, once.full_sizes)
    assert torch.equal(stepwise.full_source, once.full_source)


@law()
@given(started())
def test_the_order_of_what_is_merged_says_nothing(given):
    state, g = given
    keep, src, dst = drawn(state, g)
    shuffle = torch.randperm(src.shape[1], generator=g)
    a = apply_merge(state, Merge(keep, src, dst))
    b = apply_merge(state, Merge(keep, src[:, shuffle], dst[:, shuffle]))
    assert_close(a.tokens, b.tokens)
    assert torch.equal(a.full_sizes, b.full_sizes)
    assert torch.equal(a.source, b.source)


@law()
@given(started())
def test_pruning_is_a_merge_of_nothing(given):
    state, g = given
    merge = drawn(state, g, merged=False)
    after = apply_merge(state, merge)
    assert after.sizes is None
    for b in range(BATCH):
        assert torch.equal(after.tokens[b], state.tokens[b, merge.keep[b]])
        gone = set(range(state.n_prefix, state.tokens.shape[1])) - set(merge.keep[b].tolist())
        lost = (after.source[b] < 0).nonzero()[:, 0] + state.n_prefix
        assert set(lost.tolist()) == gone
    selected = select_patches(state, merge.keep[:, state.n_prefix :] - state.n_prefix)
    assert torch.equal(selected.tokens, after.tokens)
    assert torch.equal(selected.source, after.source)
    merged = apply_merge(state, drawn(state, g, dropped=False))
    pruning = drawn(merged, g, merged=False)
    if merged.sizes is not None:  # kept tokens keep their sizes, whatever else goes
        left = apply_merge(merged, pruning).sizes
        assert torch.equal(left, merged.sizes.gather(1, pruning.keep))


@law()
@given(started())
def test_recovering_reads_the_token_that_stands_for_a_patch(given):
    state, g = given
    assert torch.equal(recover(state), state.patches)
    for _ in range(2):
        state = apply_merge(state, drawn(state, g))
    grid = recover(state)
    for b in range(BATCH):
        for patch, token in enumerate(state.source[b].tolist()):
            wanted = state.tokens[b, token] if token >= 0 else torch.zeros(3, dtype=torch.float64)
            assert torch.equal(grid[b, patch], wanted)
    rows, columns = state.grid
    image, prefix = as_map(state, "NCHW", True)
    assert torch.equal(image.flatten(2).transpose(1, 2), grid)
    assert image.shape == (BATCH, 3, rows, columns)
    assert torch.equal(prefix, state.tokens[:, : state.n_prefix])


@law()
@given(generators(), st.integers(1, 30), st.booleans())
def test_order_is_from_the_largest_and_stable(g, n, ties):
    """Equal scores keep their places; without any, it is topk."""
    if ties:
        scores = torch.randint(0, 4, (3, 2, n), generator=g).float()
    else:
        scores = torch.randperm(6 * n, generator=g).reshape(3, 2, n).float()
        assert torch.equal(order(scores), scores.topk(n, dim=-1).indices)
    for row, found in zip(scores.reshape(6, n).tolist(), order(scores).reshape(6, n), strict=True):
        assert found.tolist() == sorted(range(n), key=lambda i: -row[i])  # Python's is stable


def test_order_is_topk_in_a_graph():
    class Ordered(torch.nn.Module):
        def forward(self, x):
            return order(x)

    scores = torch.randperm(50).reshape(2, 25).float()
    program = torch.export.export(Ordered(), (scores,))
    assert "topk" in str(program.graph)
    assert torch.equal(program.module()(scores), order(scores))


@law()
@given(st.lists(st.integers(0, 6), min_size=1, max_size=8), st.integers(0, 2), st.integers(1, 50))
def test_counts_are_the_schedule_summed_up(schedule, n_prefix, patches):
    schedule, tokens = tuple(schedule), n_prefix + patches
    if sum(schedule) >= patches:
        with pytest.raises(ValueError, match="at least one must stay"):
            counts_of(schedule, tokens, n_prefix, len(schedule))
        return
    counts = counts_of(schedule, tokens, n_prefix, len(schedule))
    assert counts[0] == tokens
    assert tuple(a - b for a, b in pairwise(counts)) == schedule
    with pytest.raises(ValueError, match="blocks"):
        counts_of(schedule, tokens, n_prefix, len(schedule) + 1)
    with pytest.raises(ValueError, match="would remove -1"):
        counts_of((-1, *schedule[1:]), tokens, n_prefix, len(schedule))
