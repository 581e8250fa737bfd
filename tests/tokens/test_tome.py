"""ToMe beside a plain loop over its published description."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import crosspatch as xp
from crosspatch.errors import UsageError
from crosspatch.layers.tokens import TokenState, apply_merge
from crosspatch.tokens.host import hosts_of
from crosspatch.tokens.tome import ToMe, matched
from support.goldens import relative_error
from support.reductions import pictures, tiny_host


def merged_by_loops(x, keys, sizes, r, n_prefix):
    """Section 3's matching of one picture, token by token: the new tokens and their sizes.

    Every other patch belongs to A; each of these draws an edge to the most similar one in B; the r
    strongest edges are kept and what they connect becomes its size-weighted mean.
    """
    unit = keys / np.linalg.norm(keys, axis=1, keepdims=True)
    patches = range(n_prefix, len(x))
    b, a = list(patches)[0::2], list(patches)[1::2]
    edge = {i: max(b, key=lambda j: unit[i] @ unit[j]) for i in a}
    groups = {i: [i] for i in range(len(x))}
    for i in sorted(a, key=lambda i: -(unit[i] @ unit[edge[i]]))[:r]:
        groups[edge[i]] += groups.pop(i)
    order = [*range(n_prefix), *(i for i in a if i in groups), *b]
    tokens = [np.average(x[groups[i]], axis=0, weights=sizes[groups[i]]) for i in order]
    return np.stack(tokens), [sizes[groups[i]].sum() for i in order]


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 21), st.integers(0, 3), st.floats(0, 1), st.integers(0, 2**31))
def test_a_merge_is_what_plain_loops_find(patches, n_prefix, share, seed):
    g = torch.Generator().manual_seed(seed)
    n, r = patches + n_prefix, int(share * (patches // 2))
    x, keys = (torch.randn(2, n, 6, generator=g) for _ in range(2))
    sizes = torch.randint(1, 6, (2, n), generator=g).float()
    state = TokenState(x, sizes, None, n_prefix, (1, patches))
    after = apply_merge(state, matched(keys, r, n_prefix))
    for row in range(2):
        parts = (t[row].double().numpy() for t in (x, keys, sizes))
        tokens, found = merged_by_loops(*parts, r, n_prefix)
        np.testing.assert_allclose(after.tokens[row], tokens, rtol=1e-4, atol=1e-5)
        assert after.sizes[row].tolist() == found


@pytest.mark.parametrize("proportional", [True, False])
@pytest.mark.parametrize("r", [2, [3, 0, 2, 1, 0, 2]])
def test_a_network_is_what_its_description_says(r, proportional):
    """Merging between attention and MLP by the mean key; attention weighs keys by their sizes."""
    model = tiny_host(reg_tokens=1)
    reduced, _ = xp.reduce(model, "tome", r=r, proportional=proportional)
    images, n_prefix = pictures(1), 2
    with torch.no_grad():
        x = model.embed(images).tokens
        sizes = torch.ones(1, x.shape[1])
        for number, block in enumerate(model.blocks):
            q, k, v = block.attn.project(block.norm1(x))
            logits = (q @ k.transpose(2, 3)) * k.shape[-1] ** -0.5
            if proportional:
                logits = logits + sizes.log()[:, None, None]
            x = x + block.attn.merge_heads(logits.softmax(dim=-1) @ v)
            count = r if isinstance(r, int) else r[number]
            if count:
                parts = (t[0].double().numpy() for t in (x, k.mean(dim=1), sizes))
                tokens, found = merged_by_loops(*parts, count, n_prefix)
                x, sizes = torch.tensor(tokens)[None].float(), torch.tensor([found]).float()
            x = x + block.mlp(block.norm2(x))
        assert relative_error(reduced.forward_features(images), model.norm(x)) < 1e-5


def test_schedules():
    host = hosts_of(tiny_host())[0]
    assert ToMe(host, r=2).counts == (17, 15, 13, 11, 9, 7, 5)
    assert ToMe(host, r=6).counts == (17, 11, 6, 4, 3, 2, 2)  # at most half of what is left
    assert ToMe(host, r=[3, 0, 2, 1, 0, 2]).counts == (17, 14, 14, 12, 11, 11, 9)
    for wrong in (17, -1, [1, 2], [9, 0, 0, 0, 0, 0], [0.5] * 6):
        with pytest.raises(UsageError, match=r"\d"):
            xp.reduce(tiny_host(), "tome", r=wrong)
