"""The trunk: parts that compose, free shapes, hooks, subsets, DeiT's structure."""

from __future__ import annotations

import copy
import io
import pickle
from typing import NamedTuple

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import crosspatch as xp
from crosspatch.layers.block import BlockSpec
from crosspatch.layers.reducer import Reducer
from crosspatch.layers.stage import StageSpec
from crosspatch.layers.tokens import Merge, TokenState, apply_merge, order, recover
from crosspatch.models.vit import VisionTransformer

TABLE = {  # the sheet's: millions of parameters, billions of multiply-adds
    "deit_tiny_patch16_224": (5.72, 1.25),
    "deit_small_patch16_224": (22.05, 4.60),
    "deit_base_patch16_224": (86.57, 17.56),
    "deit_base_patch16_384": (86.86, 55.48),
    "deit_tiny_distilled_patch16_224": (5.91, 1.26),
    "deit_small_distilled_patch16_224": (22.44, 4.62),
    "deit_base_distilled_patch16_224": (87.34, 17.66),
    "deit_base_distilled_patch16_384": (87.63, None),
}


def tiny(**arguments) -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(
        **{
            "img_size": 32,
            "patch_size": 8,
            "num_classes": 5,
            "embed_dim": 24,
            "depth": 3,
            "num_heads": 2,
            **arguments,
        }
    )


IMAGE = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", TABLE)
def test_parameters_and_macs_of_the_table(name: str) -> None:
    parameters, gmacs = TABLE[name]
    with torch.device("meta"):
        model = xp.create_model(name).eval()
        image = torch.zeros(1, 3, *model.img_size)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.forward_head(model.forward_features(image))  # every token of the last block
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(parameters, abs=0.006)
    if gmacs is not None:
        assert counter.get_total_flops() / 2e9 == pytest.approx(gmacs, rel=0.005)


def test_the_distilled_model_has_2d_and_one_head_more() -> None:
    with torch.device("meta"):
        plain = xp.create_model("deit_tiny_patch16_224")
        distilled = xp.create_model("deit_tiny_distilled_patch16_224")
    counts = [sum(p.numel() for p in m.parameters()) for m in (plain, distilled)]
    assert counts[1] - counts[0] == 193_384


def test_two_heads_are_averaged_and_both_are_replaced() -> None:
    model = tiny(dist_token=True).eval()
    with torch.no_grad():
        tokens = model.forward_features(IMAGE)
        mean = (model.head(tokens[:, 0]) + model.head_dist(tokens[:, 1])) / 2
        torch.testing.assert_close(model(IMAGE), mean, rtol=1e-5, atol=1e-6)
        model.reset_classifier(7)
        assert model(IMAGE).shape == (2, 7)
    assert [head.out_features for head in model.get_classifier()] == [7, 7]


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"global_pool": "avg", "class_token": False},
        {"global_pool": "avg", "reg_tokens": 3},
        {"global_pool": "max"},
        {"init_values": 0.3, "qk_norm": True, "no_embed_class": True, "reg_tokens": 2},
        {"pre_norm": True, "act_layer": "quick_gelu", "pos_embed": "none"},
        {"stem": "conv"},
        {"dist_token": True, "drop_path_rate": 0.2},
    ],
)
def test_the_parts_compose_to_the_whole(arguments) -> None:
    model = tiny(**arguments)
    model.train()
    model(IMAGE).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    model.eval()
    with torch.no_grad():
        whole = model(IMAGE)
        torch.testing.assert_close(full(model, IMAGE), whole, rtol=1e-5, atol=1e-6)
        state, _ = model.run(model.embed(IMAGE))
        torch.testing.assert_close(model.classify(model.pool(state)), whole, rtol=1e-5, atol=1e-6)
        features = model.forward_head(model.forward_features(IMAGE), pre_logits=True)
        assert features.shape == (2, 24)


def test_run_collects_states_after_blocks() -> None:
    model = tiny().eval()
    with torch.no_grad():
        state = model.embed(IMAGE)
        final, collected = model.run(state, collect={0, 2})
        first = model.blocks[0](state.tokens)
    assert set(collected) == {0, 2}
    assert torch.equal(collected[0].tokens, first)
    assert torch.equal(collected[2].tokens, final.tokens)


def test_all_patches_kept_in_another_order_change_nothing() -> None:
    model = tiny().eval()
    keep = torch.stack([torch.randperm(16) for _ in range(2)])
    with torch.no_grad():
        state, _ = model.run(model.embed(IMAGE, keep=keep))
        whole, _ = model.run(model.embed(IMAGE))
        assert torch.allclose(model.pool(state), model.pool(whole), atol=1e-6)
        assert torch.allclose(recover(state), recover(whole), atol=1e-6)


def test_unseen_patches_are_marked_and_recovered_as_zero() -> None:
    model = tiny().eval()
    keep = torch.tensor([[3, 0], [15, 7]])
    state = model.embed(IMAGE, keep=keep)
    assert state.source is not None
    assert [(state.source[b] >= 0).nonzero().flatten().tolist() for b in (0, 1)] == [
        [0, 3],
        [7, 15],
    ]
    full = recover(state)
    assert torch.equal(full[0, 3], state.patches[0, 0])
    assert torch.equal(full[0, 1], torch.zeros(24))


def test_a_size_the_positions_are_not_laid_out_for() -> None:
    with pytest.raises(ValueError, match=r"this model takes 32x32; build it with img_size="):
        tiny()(torch.randn(1, 3, 40, 32))
    assert tiny(dynamic_img_size=True)(torch.randn(1, 3, 40, 64)).shape == (1, 5)


def test_heterogeneous_blocks_run_and_share_attention() -> None:
    specs = (
        BlockSpec(heads=3, qk=12, value=18, hidden=40),
        BlockSpec(heads=3, qk=0, value=12, hidden=0, shares=0),
        BlockSpec(heads=0, qk=0, value=0, hidden=16),
        BlockSpec(heads=2, qk=8, value=8, hidden=8, exists=False),
    )
    model = tiny(stages=(StageSpec(24, specs), StageSpec(32, specs[:1], stride=2)))
    model(IMAGE).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert model.blocks[1].attn.qkv.out_features == 12
    assert not list(model.blocks[3].parameters())
    maps = model.forward_intermediates(IMAGE, intermediates_only=True)
    assert [tuple(m.shape) for m in maps] == [(2, 24, 4, 4)] * 4 + [(2, 32, 2, 2)]
    assert [info["reduction"] for info in model.feature_info] == [8, 8, 8, 8, 16]
    with torch.no_grad():  # the second block reads the first one's map
        state = model.embed(IMAGE)
        x = state.tokens
        first, second = model.blocks[0], model.blocks[1]
        q, k, _ = first.attn.project(first.norm1(x))
        expected = first(x)
        values = second.attn.values(second.norm1(expected))
        expected = expected + second.attn.apply_map(first.attn.map(q, k), values)
        _, collected = model.run(state, collect={1})
        assert torch.allclose(collected[1].tokens, expected, atol=1e-6)


@pytest.mark.parametrize("shares", [1, 2, -1])
def test_sharing_needs_an_earlier_block(shares: int) -> None:
    block = BlockSpec(heads=2, qk=8, value=8, hidden=8)
    shared = BlockSpec(heads=2, qk=0, value=8, hidden=8, shares=shares)
    with pytest.raises(ValueError, match="expected an earlier, existing block with 2 heads"):
        tiny(stages=(StageSpec(24, (block, shared)),))


def test_the_neutral_reducer_computes_what_no_reducer_does() -> None:
    class Neutral(Reducer):
        needs = frozenset({"keys", "class_row"})

    model = tiny(init_values=0.3, qk_norm=True).eval()
    with torch.no_grad():
        before = model(IMAGE)
        model.reducer = Neutral()
        assert torch.allclose(model(IMAGE), before, atol=1e-6)


class Trace(NamedTuple):
    removed: int


class DropLeastAttended(Reducer):
    """Prunes to `left` patches at block `at` by the class row, and counts in `carry`."""

    needs = frozenset({"class_row"})

    def __init__(self, at: int, left: int, *, merge: bool) -> None:
        super().__init__()
        self.at, self.left, self.merge = at, left, merge

    def active(self, block: int) -> bool:
        return block >= self.at

    def after_attention(self, state, block, stats):
        if block != self.at:
            return state
        scores = stats.class_row.mean(dim=1)[:, state.n_prefix :]
        rank = order(scores) + state.n_prefix
        prefix = torch.arange(state.n_prefix).expand(rank.shape[0], -1)
        keep = torch.cat([prefix, rank[:, : self.left]], dim=1)
        src = rank[:, self.left :]
        dst = torch.full_like(src, state.n_prefix)
        if not self.merge:
            src, dst = src[:, :0], dst[:, :0]
        return apply_merge(state, Merge(keep, src, dst))._replace(carry=Trace(16 - self.left))


@pytest.mark.parametrize("merge", [True, False])
def test_a_reducer_reduces_through_the_hooks(merge: bool) -> None:
    model = tiny().eval()
    model.reducer = DropLeastAttended(1, 6, merge=merge)
    with torch.no_grad():
        state, collected = model.run(model.embed(IMAGE), collect={0, 1, 2})
    assert [collected[i].tokens.shape[1] for i in range(3)] == [17, 7, 7]
    assert state.carry == Trace(10)
    if merge:
        assert torch.equal(state.sizes.sum(dim=1), torch.full((2,), 17.0))
        assert (state.source >= 0).all()
    else:
        assert (state.source >= 0).sum(dim=1).tolist() == [6, 6]
    model.train()
    model(IMAGE).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_full_map_reducers_get_between_softmax_and_values() -> None:
    class OnlyItself(Reducer):
        needs = frozenset({"full_map"})

        def between(self, state, attention, block):
            return state, torch.eye(attention.shape[-1]).expand_as(attention)

    model = tiny(depth=1).eval()
    model.reducer = OnlyItself()
    with torch.no_grad():
        state = model.embed(IMAGE)
        block = model.blocks[0]
        normed = block.norm1(state.tokens)
        v = block.attn.values(normed)
        expected = block.add_mlp(state.tokens + block.attn.merge_heads(v))
        assert torch.allclose(model.run(state)[0].tokens, expected, atol=1e-6)


def test_reduced_tokens_weigh_by_size_in_the_mean() -> None:
    model = tiny(global_pool="avg", class_token=False, depth=0).eval()
    with torch.no_grad():
        state = model.embed(IMAGE)
        merge = Merge(
            torch.arange(12).expand(2, -1),
            torch.arange(12, 16).expand(2, -1),
            torch.zeros(2, 4).long(),
        )
        merged = apply_merge(state, merge)
        model.fc_norm = torch.nn.Identity()
        assert torch.allclose(model.pool(merged), model.pool(state), atol=1e-6)


def test_states_survive_deepcopy_and_pickle() -> None:
    state = TokenState(torch.ones(1, 2, 3), torch.ones(1, 2), None, 1, (1, 1), Trace(4))
    again = pickle.loads(pickle.dumps(copy.deepcopy(state._replace(carry=None))))
    assert torch.equal(again.tokens, state.tokens)
    assert again.grid == (1, 1)


def test_models_survive_deepcopy_and_state_dicts() -> None:
    model = tiny(stem="conv").eval()
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other = tiny(stem="conv").eval()
    other.load_state_dict(torch.load(buffer, weights_only=True))
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(model)(IMAGE), other(IMAGE))


def test_gradient_checkpointing_changes_no_gradient() -> None:
    grads = []
    for enable in (False, True):
        model = tiny()
        model.set_grad_checkpointing(enable)
        model(IMAGE).square().mean().backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*grads, strict=True))


def test_pruning_to_intermediates() -> None:
    model = tiny().eval()
    with torch.no_grad():
        expected = model.forward_intermediates(IMAGE, indices=[1], intermediates_only=True)[0]
        assert model.prune_intermediate_layers([1]) == [1]
        got = model.forward_intermediates(IMAGE, indices=[1], intermediates_only=True)[0]
    assert len(model.blocks) == 2
    assert torch.equal(got, expected)


def test_maps_of_reduced_tokens_lie_on_the_full_grid() -> None:
    model = tiny().eval()
    model.reducer = DropLeastAttended(1, 6, merge=True)
    with torch.no_grad():
        maps = model.forward_intermediates(IMAGE, intermediates_only=True)
    assert [tuple(m.shape) for m in maps] == [(2, 24, 4, 4)] * 3
    distinct = [len(torch.unique(m[0].flatten(1), dim=1)[0]) for m in maps]
    assert distinct == [16, 6, 6]
    with pytest.raises(ValueError, match="expected NCHW or NLC"):
        model.forward_intermediates(IMAGE, output_fmt="NHWC")


def full(model: VisionTransformer, x: torch.Tensor) -> torch.Tensor:
    """Logits with every token of the last block computed."""
    return model.forward_head(model.forward_features(x))


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"reg_tokens": 2},
        {"dist_token": True},
        {"qk_norm": True, "init_values": 0.1},
        {"global_pool": "avg", "class_token": False},
        {"mlp_ratio": 0.0},
    ],
)
def test_the_last_block_computes_what_is_read_and_nothing_else(arguments: dict) -> None:
    model = VisionTransformer(
        32, 8, embed_dim=24, depth=3, num_heads=3, num_classes=5, **arguments
    ).eval()
    torch.testing.assert_close(model(IMAGE), full(model, IMAGE), atol=1e-5, rtol=1e-5)
    gradients = []
    for forward in (model, lambda x: full(model, x)):
        model.zero_grad()
        forward(IMAGE).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


def macs(forward) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        forward(IMAGE)
    return counter.get_total_flops() // 2


def test_a_hook_on_the_last_block_sees_every_token() -> None:
    model = VisionTransformer(32, 8, embed_dim=24, depth=2, num_heads=3, num_classes=5).eval()
    assert macs(model) < macs(lambda x: full(model, x))
    shapes = []
    handle = model.blocks[-1].mlp.register_forward_hook(lambda *a: shapes.append(a[2].shape))
    model(IMAGE)
    handle.remove()
    assert shapes == [(2, 17, 24)]
    assert macs(model) < macs(lambda x: full(model, x))
