"""PatchDropout: how many stay, which, and that evaluation never notices."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import crosspatch as xp
from crosspatch.layers.stage import StageSpec
from crosspatch.tokens.host import attach, hosts_of, reducers_of
from crosspatch.tokens.patch_drop import PatchDrop
from support.reductions import pictures, tiny_crossvit, tiny_host


def dropping(host=(), **options):
    """As `xp.reduce` makes it, without the count of multiply-adds, which takes longer."""
    model = tiny_host(**dict(host))
    attach(model, [PatchDrop(hosts_of(model)[0], **options)])
    return model.train()


@settings(max_examples=20, deadline=None)
@given(rate=st.floats(0.001, 0.999), block=st.integers(0, 5), seed=st.integers(0, 99))
def test_the_right_number_stays_untouched_and_in_order(rate, block, seed):
    model = dropping({"reg_tokens": 1}, rate=rate, block=block)
    count = max(1, int(16 * (1 - rate)))
    assert model.reducer.counts == (18,) * (block + 1) + (2 + count,) * (6 - block)
    torch.manual_seed(seed)
    with torch.no_grad():
        state = model.embed(pictures())
        left = model.reducer.before_attention(state, block)
    assert left.tokens.shape[1] == 2 + count
    assert torch.equal(left.tokens[:, :2], state.tokens[:, :2])
    stays = left.source >= 0
    assert (stays.sum(dim=1) == count).all()
    for picture in range(3):
        where = left.source[picture][stays[picture]]
        assert where.tolist() == list(range(2, 2 + count))
        assert torch.equal(left.patches[picture], state.patches[picture][stays[picture]])


def test_evaluation_is_untouched():
    for options in ({"rate": 0.9}, {"rate": 0.5, "block": 3}):
        model = dropping(**options)
        with torch.no_grad():
            assert torch.equal(model.eval()(pictures()), tiny_host()(pictures()))
            trained = model.train()(pictures())
        assert not torch.equal(trained, tiny_host()(pictures()))


def test_draws_come_from_torchs_generator_and_differ_between_pictures():
    model = dropping(rate=0.5)
    same = pictures(1).expand(8, -1, -1, -1)
    sources = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        with torch.no_grad():
            sources.append(model.reducer.before_attention(model.embed(same), 0).source)
    assert torch.equal(sources[0], sources[1])
    assert not torch.equal(sources[0], sources[2])
    assert len({tuple((row >= 0).tolist()) for row in sources[0]}) > 1


def test_every_patch_is_as_likely_to_stay():
    model = dropping(rate=0.25)
    torch.manual_seed(0)
    many = torch.zeros(4000, 3, 32, 32)
    with torch.no_grad():
        seen = (model.reducer.before_attention(model.embed(many), 0).source >= 0).float().mean(0)
    assert (seen - 0.75).abs().max() < 5 * (0.75 * 0.25 / 4000) ** 0.5


def test_shuffled_patches_with_their_draws_change_nothing(monkeypatch):
    model = dropping({"global_pool": "avg"}, rate=0.5)
    noise, index = torch.rand(3, 16), torch.randperm(16)
    with torch.no_grad():
        state = model.embed(pictures())
        outputs = []
        for order in (torch.arange(16), index):
            tokens = torch.cat([state.tokens[:, :1], state.patches[:, order]], dim=1)
            monkeypatch.setattr(torch, "rand", lambda *_, order=order, **__: noise[:, order])
            final, _ = model.run(state._replace(tokens=tokens))
            outputs.append(model.classify(model.pool(final)))
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)


def test_each_branch_of_a_crossvit_draws_for_itself():
    model = tiny_crossvit().train()
    fine, coarse = hosts_of(model)
    attach(model, [PatchDrop(fine, rate=0.5), PatchDrop(coarse, rate=0.75)])
    assert [r.counts[-1] for r in reducers_of(model)] == [33, 5]
    with torch.no_grad():
        states, _ = model.run(model.embed(pictures()))
    assert [s.tokens.shape[1] for s in states] == [33, 5]


def test_what_cannot_be_is_refused():
    for options, told in (
        ({"rate": 1}, "from 0 to below 1"),
        ({"rate": -0.1}, "rate = -0.1"),
        ({"block": 6}, "block 6"),
        ({"block": -1}, "block -1"),
    ):
        with pytest.raises(ValueError, match=told):
            PatchDrop(hosts_of(tiny_host())[0], **options)
    with pytest.raises(ValueError, match="cannot be put on the model") as caught:
        xp.reduce(tiny_host(), "patch-drop", rate="half")
    assert caught.value.exit_code == 2


def test_a_shared_map_is_for_the_same_patches():
    one = tiny_host().stages[0].blocks[0]
    blocks = (one, one, one, replace(one, shares=1), one, one)
    (host,) = hosts_of(tiny_host(stages=(StageSpec(24, blocks),)))
    for block in (1, 2):
        with pytest.raises(ValueError, match=f"block = {block} stands between block 1 and block 3"):
            PatchDrop(host, block=block)
    for block in (0, 4):
        model = dropping({"stages": (StageSpec(24, blocks),)}, block=block)
        assert model(pictures()).shape == (3, 5)
