"""DCAL: rollout, GLCA and PWCA against explicit computations, and the published figures."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

import crosspatch as xp
from crosspatch.errors import UsageError
from crosspatch.layers.block import BlockSpec
from crosspatch.layers.stage import StageSpec
from crosspatch.layers.tokens import take
from crosspatch.metrics.macs import count_macs, counted
from crosspatch.tokens.dcal import PairWise, class_row, pair, paired, product
from crosspatch.tokens.reduce import replay
from support.reductions import pictures, tiny_crossvit, tiny_host


def dcal(host=None, **options):
    """A tiny host with GLCA; `replay` counts nothing, so it is quicker than `xp.reduce`."""
    model = tiny_host(**(host or {}))
    replay(model, {"kind": "reduce", "method": "dcal", "options": options})
    return model


def rolled(model, images):
    """The rollout (B, N, N) from maps that are computed explicitly, block by block."""
    x, total = model.embed(images).tokens, None
    for block in model.blocks:
        attention = block.attn.map(*block.attn.qk(block.norm1(x))).mean(dim=1)
        step = 0.5 * attention + 0.5 * torch.eye(x.shape[1])
        total = step if total is None else step @ total
        x = block(x)
    return total


def test_published_figures():
    with torch.device("meta"):
        model = xp.create_model("deit_tiny_patch16_224", num_classes=200, img_size=448)
    reduced, _ = xp.reduce(model, "dcal")
    count = lambda module: sum(p.numel() for p in module.parameters())
    glca = reduced.reducer.glca
    assert count(glca.block) == 444_864
    assert count(glca) == count(reduced) - count(model) == 444_864 + 2 * 192 + 193 * 200
    assert round(count(glca) / (count(model) - count(model.head)), 3) == 0.086
    with torch.no_grad():
        state = model.embed(torch.empty(1, 3, 448, 448, device="meta"))
        trunk = counted(model.run, state)[0]
        full, lean = (counted(glca.block, state.tokens, rows)[0] for rows in (1 + 78, 1))
    assert round(full / trunk, 3) == 0.016
    assert (full, lean) == (110_812_800, 58_546_560)


def test_what_our_counter_finds():
    """Our trunk computes the class token alone in the last block; GLCA needs all of it."""
    with torch.device("meta"):
        models = [xp.create_model("deit_tiny_patch16_224", num_classes=200, img_size=448)] * 5
    models = [copy.deepcopy(model) for model in models]
    several = ({}, {"feature": "mean"}, {"feature": "mean", "running": True}, {"branch": "sa"})
    for model, options in zip(models[1:], several, strict=True):
        replay(model, {"kind": "reduce", "method": "dcal", "options": options})
    base, *macs = (count_macs(model, (3, 448, 448)) for model in models)
    assert [round(one / base, 3) for one in macs] == [1.089, 1.295, 2.027, 1.0]


@pytest.mark.parametrize("running", [False, True])
def test_the_rollout_is_the_product_of_all_maps(running):
    model = dcal(feature="mean", running=running)
    with torch.no_grad():
        wanted = rolled(model, pictures())
        final, between = model.run(model.embed(pictures()), collect={4})
        assert_close(wanted.sum(dim=-1), torch.ones(3, 17))
        found = torch.stack([m.sum(dim=-1) for m in between[4].carry.maps])
        assert_close(found, torch.ones_like(found))
        assert len(final.carry.maps) == (1 if running else 6)
        index, queries = model.reducer.select(final)
    assert queries == 1 + round(0.1 * 16)
    best = wanted[:, 0, 1:].argsort(dim=-1, descending=True)
    assert torch.equal(index[:, 1:], best + 1)
    assert (index[:, 0] == 0).all()


def test_only_the_class_row_is_kept_exact():
    model = dcal(feature="mean")
    with torch.no_grad():
        final, _ = model.run(model.embed(pictures()))
        assert_close(class_row(final.carry.maps), rolled(model, pictures())[:, 0])


@pytest.mark.parametrize("running", [False, True])
def test_the_rollout_is_float32_under_autocast_and_has_no_gradient(running):
    model = dcal(feature="mean", running=running).train()
    with torch.autocast("cpu", torch.bfloat16):
        state = model.embed(pictures())
        final, _ = model.run(state._replace(tokens=state.tokens.bfloat16()))
        assert final.tokens.dtype == torch.bfloat16
        maps = final.carry.maps
        row = class_row(maps)
        squared = product(wanted := torch.rand(3, 17, 17), wanted)
    assert all(m.dtype == torch.float32 and not m.requires_grad for m in (*maps, row))
    exact = wanted.double() @ wanted.double()
    assert (squared / exact - 1).abs().max() < 1e-6  # 1e-3 in bfloat16


def test_all_patches_make_an_ordinary_block():
    model = dcal(feature="mean", ratio=1.0)
    with torch.no_grad():
        final, _ = model.run(model.embed(pictures()))
        glca = model.reducer.glca
        assert_close(model.reducer.features(final), glca.norm(glca.block(final.tokens)).mean(dim=1))


def test_queries_are_the_class_token_and_the_selected_patches():
    """Against attention computed for them alone, with a register that is no query."""
    model = dcal({"reg_tokens": 1}, feature="mean", ratio=0.25)
    with torch.no_grad():
        final, _ = model.run(model.embed(pictures()))
        index, queries = model.reducer.select(final)
        chosen = take(final.tokens, index[:, :queries])
        assert (queries, index[:, queries].tolist()) == (5, [1, 1, 1])
        block = model.reducer.glca.block
        q, _ = block.attn.qk(block.norm1(chosen))
        _, k, v = block.attn.project(block.norm1(final.tokens))
        wanted = chosen + block.attn.apply_map(block.attn.map(q, k), v)
        wanted = model.reducer.glca.norm(block.add_mlp(wanted))
        assert_close(model.reducer.features(final), wanted.mean(dim=1))


def test_selected_patches_cannot_reach_the_class_token_of_one_block():
    """So none is computed where that token is read: the docstring's claim."""
    model = dcal(feature="mean", ratio=0.5)
    with torch.no_grad():
        final, _ = model.run(model.embed(pictures()))
        index, queries = model.reducer.select(final)
        full = model.reducer.glca(take(final.tokens, index), queries)[:, 0]
        assert_close(model.reducer.glca(final.tokens, 1)[:, 0], full)
        assert not torch.equal(dcal(feature="mean")(pictures()), model(pictures()))
        assert torch.equal(dcal(ratio=0.9)(pictures()), dcal()(pictures()))


def test_the_answer_is_the_mean_of_both():
    both, glca = dcal(), dcal(branch="glca")
    glca.load_state_dict(both.state_dict())
    with torch.no_grad():
        sa, mine = tiny_host()(pictures()), glca(pictures())
        assert_close(both(pictures()).softmax(dim=-1), (sa.softmax(-1) + mine.softmax(-1)) / 2)
        assert torch.equal(dcal(branch="sa")(pictures()), sa)
        several = dcal(multilabel=True)
        several.load_state_dict(both.state_dict())
        assert_close(several(pictures()).sigmoid(), (sa.sigmoid() + mine.sigmoid()) / 2)
        both.reducer.glca.head.bias.fill_(0).index_fill_(0, torch.tensor(0), 1e4)
        assert both(pictures()).isfinite().all()  # a sure head leaves no infinite logit


def test_without_classes_the_features_stand_side_by_side():
    host = {"num_classes": 0}
    with torch.no_grad():
        sa, mine = dcal(host, branch="sa")(pictures()), dcal(host, branch="glca")(pictures())
        assert_close(dcal(host)(pictures()), torch.cat([sa, mine], dim=-1))
        assert mine.shape == (3, 24)


def test_the_block_starts_as_the_hosts_last():
    model, fresh = dcal(), dcal(fresh=True)
    last = model.blocks[-1].state_dict()
    for name, value in model.reducer.glca.block.state_dict().items():
        assert torch.equal(value, last[name])
    assert not torch.equal(fresh.reducer.glca.block.mlp.fc1.weight, last["mlp.fc1.weight"])
    assert fresh.reducer.glca.block.mlp.fc1.weight.std() < 0.03
    assert (fresh.reducer.glca.norm.weight == 1).all()
    assert {name.split(".")[0] for name in model.reducer.state_dict()} == {"glca"}


@pytest.mark.parametrize("options", [{}, {"feature": "mean"}])
@pytest.mark.parametrize(
    "host",
    [
        {"dist_token": True, "qk_norm": True},
        {"global_pool": "avg", "init_values": 0.3},
        {"stages": (StageSpec(24, (BlockSpec(3, 24, 24, 48),) * 2),
                    StageSpec(16, (BlockSpec(2, 8, 16, 32), BlockSpec(0, 0, 0, 16),
                                   BlockSpec(2, 8, 8, 8, exists=False))))},
    ],
)  # fmt: skip
def test_any_host_with_a_class_token(host, options):
    model = dcal(host, **options).train()
    model(pictures()).square().mean().backward()
    assert all(p.grad is not None for p in model.reducer.parameters())


def test_a_pair_of_logits_is_left_alone():
    model = dcal({"dist_token": True}).train()
    model.set_distilled_training()
    assert len(model(pictures())) == 2


@pytest.mark.parametrize(
    ("host", "options", "says"),
    [
        ({}, {"ratio": 0}, "above 0 and at most 1"),
        ({}, {"ratio": 1.1}, "above 0 and at most 1"),
        ({}, {"branch": "pwca"}, "branch 'pwca'"),
        ({}, {"feature": "max"}, "feature 'max'"),
        ({"class_token": False, "global_pool": "avg"}, {}, "has none"),
        ({"depth": 0}, {}, "no block with an attention"),
        (
            {"stages": (StageSpec(24, (BlockSpec(3, 24, 24, 48),
                                       BlockSpec(3, 0, 24, 48, shares=0))),)},
            {},
            "block 1 shares the attention",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(host, options, says):
    with pytest.raises(UsageError, match=says):
        xp.reduce(tiny_host(**host), "dcal", **options)


def test_the_branches_of_a_crossvit_answer_each():
    model = tiny_crossvit()
    one, _ = xp.reduce(model, "dcal", fine=None)
    with torch.no_grad():
        finals, _ = one.run(one.embed(pictures()))
        fine, coarse = (h(x) for h, x in zip(one.head, one.pool(finals), strict=True))
        mine = one.reducers[1].logits(finals[1])
        decided = ((coarse.softmax(-1) + mine.softmax(-1)) / 2).log()
        assert_close(one(pictures()), (fine + decided) / 2)


# ------------------------------------------------------------------ PWCA


def distracted(model, images, partner):
    state = paired(model.embed(images), partner)
    return model.run(state, reducer=PairWise())[0].tokens


@pytest.mark.parametrize("host", [{}, {"qk_norm": True, "init_values": 0.3, "dist_token": True}])
def test_a_picture_is_no_distraction_from_itself(host):
    model = tiny_host(**host)
    with torch.no_grad():
        sa = model.run(model.embed(pictures()))[0].tokens
        assert_close(distracted(model, pictures(), torch.arange(3)), sa, rtol=0, atol=1e-5)
        assert not torch.allclose(distracted(model, pictures(), torch.tensor([1, 2, 0])), sa)


def test_a_pair_is_one_sequence():
    """Two pictures that distract each other attend as one sequence of all their tokens would."""
    model = tiny_host()
    with torch.no_grad():
        found = distracted(model, pictures(2), torch.tensor([1, 0]))
        x = model.embed(pictures(2)).tokens.flatten(0, 1)[None]
        for block in model.blocks:
            x = block(x)
    assert_close(found.flatten(0, 1)[None], x)
    assert not list(PairWise().parameters())


def test_checkpoints_change_no_gradient():
    model, grads = tiny_host().train(), []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        distracted(model, pictures(), torch.tensor([1, 2, 0])).square().mean().backward()
        grads.append([p.grad.clone() for p in model.blocks.parameters()])
    for a, b in zip(*grads, strict=True):
        assert_close(a, b)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 40), st.integers(0, 2**31))
def test_nobody_is_paired_with_itself(batch, seed):
    partner = pair(batch, np.random.default_rng(seed))
    assert sorted(partner.tolist()) == list(range(batch))
    assert (partner != torch.arange(batch)).all()
    assert torch.equal(partner, pair(batch, np.random.default_rng(seed)))


def test_partners_are_drawn_evenly():
    rng = np.random.default_rng(0)
    counts = torch.zeros(5, 5)
    for _ in range(2000):
        counts[torch.arange(5), pair(5, rng)] += 1
    others = counts[~torch.eye(5, dtype=torch.bool)]
    assert ((others - 500).abs() < 100).all()
    assert pair(1, rng).tolist() == [0]
    assert pair(0, rng).tolist() == []
