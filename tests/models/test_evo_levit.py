"""Evo-LeViT: the authors' numbers and layouts, the sheet's figures, the laws of the two paths."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import crosspatch as xp
from crosspatch.layers.linear import switched
from crosspatch.metrics.macs import count_macs
from crosspatch.models import evo_levit
from crosspatch.models.evo_levit import EvoLeViT
from crosspatch.models.evo_levit_blocks import Downsample, every_second
from crosspatch.models.evo_levit_paths import FAST, representative, slow_fast
from support import goldens

GOLDEN = "evovit/evo_levit_128s_stage"
# the sheet's millions of parameters without the auxiliary heads; ours with them; GMACs with half of
# the patches slow, and with all of them
TABLE = {
    "evo_levit_128s": (7.84, 8.61, 0.256, 0.312),
    "evo_levit_128": (9.27, 10.04, 0.305, 0.414),
    "evo_levit_192": (11.03, 11.80, 0.510, 0.668),
    "evo_levit_256": (19.01, 20.03, 0.880, 1.146),
    "evo_levit_384": (39.30, 40.84, 1.849, 2.390),
    "evo_levit_256_384": (19.24, 20.27, 2.763, 3.674),
    "evo_levit_384_384": (39.64, 41.18, 5.622, 7.389),
}


def tiny(**arguments) -> EvoLeViT:
    """A model whose every weight says something: norms begin at 0 otherwise, and blocks at x."""
    torch.manual_seed(0)
    shape = {"img_size": 32, "patch_size": 4, "num_classes": 5, "key_dim": 4}
    sizes = {"embed_dim": (16, 24), "num_heads": (2, 3), "depth": (3, 2)}
    model = EvoLeViT(**{**shape, **sizes, **arguments}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def pictures(model: EvoLeViT, count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, *model.img_size, generator=torch.Generator().manual_seed(3))


# ---------------------------------------------------------------------- the authors


@pytest.fixture(scope="module")
def golden():
    return goldens.read(GOLDEN)


@pytest.mark.parametrize("products", ["off", "on"])
def test_the_authors_tokens_and_logits(golden, products: str) -> None:
    model = xp.create_model("evo_levit_128s").eval()
    assert sum(p.numel() for p in model.parameters()) == golden.meta["params"]
    xp.load_released(model, {"model": golden.state_dict})
    images = 6 * golden.images  # as the golden's note says
    with torch.no_grad(), switched(products):
        tokens, out = model.forward_features(images), model(images)
    assert goldens.relative_error(tokens, golden.outputs["tokens"]) < 1e-4
    assert goldens.relative_error(out, golden.outputs["out"]) < 1e-4


def layer_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The golden's names (blocks of a stage in one module) as the authors' `blocks` has them."""
    first = {6: 6, 7: 9, 8: 10, 9: 11}  # of the modules after the first stage and its neighbours
    renamed = {}
    for name, value in state.items():
        root, _, rest = name.partition(".")
        if root != "stage_blocks":
            continue
        number, _, rest = rest.partition(".")
        place = first.get(int(number), int(number))
        if int(number) in (6, 9):
            _, unit, rest = rest.split(".", 2)
            rest = f"m{1 + int(unit) % 2}.{rest}"
            place += int(unit) // 2
        renamed[f"blocks.{place}.{rest}"] = value
    return renamed


def test_both_of_the_authors_layouts_and_both_at_once(golden) -> None:
    with torch.device("meta"):
        model = xp.create_model("evo_levit_128s")
    staged = golden.state_dict
    layered = layer_names(staged)
    assert "blocks.7.m2.m.2.bn.weight" in layered
    assert "blocks.14.m1.m.qkv.c.weight" in layered
    rest = {name: value for name, value in staged.items() if not name.startswith("stage_blocks")}
    expected = evo_levit.checkpoint_filter_fn(staged, model)
    assert expected.keys() == model.state_dict().keys()
    for given_ in (rest | layered, staged | layered, {"model": layered | staged}):
        found = evo_levit.checkpoint_filter_fn(given_, model)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert evo_levit.checkpoint_filter_fn(expected, model).keys() == expected.keys()


def test_layouts_that_disagree_are_refused(golden) -> None:
    staged = golden.state_dict
    layered = layer_names(staged)
    layered["blocks.6.m1.m.learn_tradeoff"] = torch.full((1,), 7.0)
    model = xp.create_model("evo_levit_128s")
    with pytest.raises(ValueError, match=r"unexpected: blocks\.6\.m1\.m\.learn_tradeoff"):
        xp.load_released(model, staged | layered)
    del staged["stage_blocks.9.m.7.m.2.c.weight"]
    with pytest.raises(ValueError, match=r"missing: stages\.2\.blocks\.3\.mlp\.fc2\.c\.weight"):
        xp.load_released(model, staged)


def test_a_larger_model_and_one_without_auxiliary_heads_take_the_weights(golden) -> None:
    model = xp.create_model("evo_levit_128s", img_size=(256, 224), aux_heads=False)
    xp.load_released(model, golden.state_dict)
    assert model.pos_embed.shape == (1, 1 + 16 * 14, 128)
    assert model.stages[2].downsample.pos_embed.shape == (1, 1 + 8 * 7, 256)
    assert torch.equal(model.pos_embed[:, 0], golden.state_dict["poss"][:, 0])


@pytest.mark.parametrize("name", TABLE)
def test_parameters_and_macs_of_the_table(name: str) -> None:
    bare, whole, half, plain = TABLE[name]
    with torch.device("meta"):
        model = xp.create_model(name)
        small = xp.create_model(name, aux_heads=False)
        unreduced = xp.create_model(name, keep_ratio=1.0)
    millions = [sum(p.numel() for p in m.parameters()) / 1e6 for m in (small, model)]
    assert millions == pytest.approx([bare, whole], abs=0.006)
    shape = (3, *model.img_size)
    assert count_macs(model, shape) / 1e9 == pytest.approx(half, rel=0.005)
    assert count_macs(unreduced, shape) / 1e9 == pytest.approx(plain, rel=0.005)


def test_layer_by_layer_costs_the_same_and_copying_less() -> None:
    with torch.device("meta"):
        model = xp.create_model("evo_levit_128s")
    stagewise = count_macs(model, (3, 224, 224))
    model.set_stagewise(False)
    assert count_macs(model, (3, 224, 224)) == stagewise
    model.fast = "copy"
    assert count_macs(model, (3, 224, 224)) < stagewise


def test_every_name_is_timms_too() -> None:
    model = timm.create_model("evo_levit_micro_32", num_classes=3)
    assert isinstance(model, EvoLeViT)
    assert {"evo_levit_128s_384", "evo_levit_192"} <= set(xp.list_models("evo_levit*"))
    assert model.get_classifier() == tuple(head.l for head in model._heads())


# ---------------------------------------------------------------------- the two paths


def sequence(patches: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 1 + patches, 6, generator=generator)
    return x, torch.rand(2, patches, generator=generator) + 0.01


def bending(x: torch.Tensor, scores: torch.Tensor):
    """A block in which every token sees the others."""
    y = torch.tanh(x.flip(-1) + x.mean(dim=1, keepdim=True))
    return x + y, 0.5 * scores + 0.1, y[:, -1:]


SIZES = st.integers(2, 30).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n - 1)))


@settings(max_examples=30, deadline=None)
@given(size=SIZES, depth=st.integers(1, 3), seed=st.integers(0, 9))
def test_the_rest_receives_what_its_representative_does(size, depth, seed) -> None:
    (patches, keep), (x, scores) = size, sequence(size[0], seed)
    ends = []

    def watched(x, scores):
        ends.append(x[:, -1])
        assert x.shape[1] == 1 + keep + 1
        return bending(x, scores)

    def last(x, scores):
        ends.append(x[:, -1])
        return x, scores, torch.zeros_like(x[:, -1:])

    y, after, kept = slow_fast([watched] * depth + [last], x, scores, keep)
    assert torch.equal(kept.sort().values, scores.topk(keep).indices.sort().values)
    slow = torch.zeros(2, patches, dtype=torch.bool).scatter(1, kept, True)
    moved = (y - x)[:, 1:][~slow].view(2, patches - keep, -1)
    step = (ends[-1] - ends[0])[:, None]
    torch.testing.assert_close(moved, step.expand_as(moved), rtol=1e-5, atol=1e-5)
    weights = scores.masked_fill(slow, 0)[..., None]
    mean = (weights * x[:, 1:]).sum(dim=1) / weights.sum(dim=1)
    torch.testing.assert_close(ends[0], mean, rtol=1e-4, atol=1e-5)
    assert torch.equal(after[~slow], scores[~slow])  # the rest keeps its old scores
    assert not torch.equal(after[slow], scores[slow])


@settings(max_examples=30, deadline=None)
@given(size=SIZES, seed=st.integers(0, 9))
def test_every_patch_is_back_at_its_place(size, seed) -> None:
    (patches, keep), (x, scores) = size, sequence(size[0], seed)

    def mark(x, scores):
        step = torch.zeros_like(x)
        step[:, 1 : 1 + keep] = 100.0
        return x + step, scores, step[:, -1:]

    y, after, kept = slow_fast([mark], x, scores, keep, "copy")
    slow = torch.zeros(2, patches, dtype=torch.bool).scatter(1, kept, True)
    assert torch.equal(y[:, 1:][~slow], x[:, 1:][~slow])  # bit for bit
    assert torch.equal(y[:, 1:][slow], x[:, 1:][slow] + 100)
    assert torch.equal(y[:, 0], x[:, 0])
    assert torch.equal(after, scores)


@pytest.mark.parametrize("fast", FAST)
@settings(max_examples=20, deadline=None)
@given(size=SIZES, seed=st.integers(0, 9))
def test_shuffled_patches_are_shuffled_results(fast, size, seed) -> None:
    (patches, keep), (x, scores) = size, sequence(size[0], seed)
    turn = torch.randperm(patches, generator=torch.Generator().manual_seed(seed))
    shuffled = torch.cat([x[:, :1], x[:, 1:][:, turn]], dim=1)
    y, after, _ = slow_fast([bending] * 2, x, scores, keep, fast)
    z, then, _ = slow_fast([bending] * 2, shuffled, scores[:, turn], keep, fast)
    torch.testing.assert_close(z[:, 1:], y[:, 1:][:, turn], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(z[:, 0], y[:, 0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(then, after[:, turn])


def test_among_equals_the_first_is_slow() -> None:
    x, _ = sequence(6)
    _, _, kept = slow_fast([bending], x, torch.ones(2, 6), 2)
    assert kept.tolist() == [[0, 1], [0, 1]]


def test_scores_that_underflow_give_no_nan() -> None:
    assert torch.equal(representative(torch.ones(1, 3, 2), torch.zeros(1, 3)), torch.zeros(1, 1, 2))


@pytest.mark.parametrize("stagewise", [True, False])
def test_all_patches_kept_is_the_plain_network_by_the_untouched_path(
    monkeypatch, stagewise: bool
) -> None:
    model = tiny(keep_ratio=1.0, stagewise=stagewise)
    monkeypatch.setattr(evo_levit, "slow_fast", None)
    with torch.no_grad():
        x = model.embed(pictures(model)).tokens
        for stage in model.stages:
            if stage.downsample is not None:
                x, _ = stage.downsample(x, torch.ones(2, x.shape[1] - 1), True)
            for block in stage.blocks:
                x = x + block.attn(x)[0]
                x = x + block.mlp(x)
        assert torch.equal(model.forward_features(pictures(model)), x)


def test_a_block_tells_what_its_branches_gave_and_nobody_dropped() -> None:
    """Stochastic depth takes a branch from the tokens, not from what the rest receives."""

    class Never(nn.Module):
        def forward(self, x):
            return 0 * x

    block = tiny().stages[0].blocks[1]
    x = torch.randn(2, 9, 16)
    with torch.no_grad():
        _, before, _ = block(x, torch.ones(2, 7), True)
        expected = block.attn(x)[0][:, -1:] + block.mlp(x)[:, -1:]
        block.drop_path = Never()
        y, scores, moved = block(x, torch.ones(2, 7), True)
    assert torch.equal(y, x)
    torch.testing.assert_close(moved, expected)
    assert torch.equal(scores, before)
    assert scores.shape == (2, 7)  # the representative's column is left out


# ---------------------------------------------------------------------- scores and schedules


def test_scores_are_the_blended_class_rows() -> None:
    model = tiny(keep_ratio=1.0, depth=(2, 1))
    first, second = model.stages[0].blocks
    with torch.no_grad():
        state = model.embed(pictures(model))
        _, collected, chosen = model.run(state, collect={0})
        one = first.attn(state.tokens)[1]
        two = second.attn(first(state.tokens, None, True)[0])[1]
        t = second.attn.learn_tradeoff.sigmoid()
        expected = (1 - t) * one + t * two
        torch.testing.assert_close(collected[0].scores, expected)
        model.learn_tradeoff = False
        fixed = model.run(state, collect={0})[1][0].scores
    torch.testing.assert_close(fixed, (one + two) / 2)
    assert not torch.allclose(fixed, expected)
    assert not chosen
    assert float(one.sum(dim=1).max()) < 1  # the class token's share of itself is not in it


@settings(max_examples=10, deadline=None)
@given(rows=st.integers(1, 7), columns=st.integers(1, 7))
def test_halving_the_grid_keeps_the_sum_of_the_scores(rows, columns) -> None:
    torch.manual_seed(0)
    layer = Downsample(8, 12, (rows, columns), 4, 2, 4.0, 2.0, 0.0).eval()
    x, scores = torch.randn(2, 1 + rows * columns, 8), torch.rand(2, rows * columns) + 0.1
    with torch.no_grad():
        y, after = layer(x, scores, True)
    half = ((rows + 1) // 2) * ((columns + 1) // 2)
    assert (y.shape, after.shape) == ((2, 1 + half, 12), (2, half))
    torch.testing.assert_close(after.sum(dim=1), scores.sum(dim=1))


def test_halving_takes_even_rows_and_columns() -> None:
    places = torch.arange(15)[None]
    assert every_second(places, (3, 5)).tolist() == [[0, 2, 4, 10, 12, 14]]


def chosen(model: EvoLeViT) -> list[tuple[int, int, int]]:
    with torch.no_grad():
        found = model.run(model.embed(pictures(model)))[2]
    for selection in found:
        rows, columns = selection.grid
        assert len(set(selection.kept[0].tolist())) == selection.kept.shape[1]
        assert int(selection.kept.max()) < rows * columns
    return [(s.stage, s.block, s.kept.shape[1]) for s in found]


def test_one_selection_for_a_stage_or_for_a_block() -> None:
    model = tiny()
    assert chosen(model) == [(0, 2, 32), (1, 0, 8)]
    whole = model(pictures(model))
    model.set_stagewise(False)
    assert chosen(model) == [(0, 2, 32), (1, 0, 8), (1, 1, 8)]
    assert not model.learn_tradeoff
    assert not torch.allclose(model(pictures(model)), whole, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "stage", "layer"),
    [
        ({"img_size": 28}, [(0, 2, 24), (1, 0, 8)], [(0, 2, 24), (1, 0, 8), (1, 1, 8)]),
        ({"keep_ratio": 0.3}, [(0, 2, 19), (1, 0, 4)], [(0, 2, 19), (1, 0, 4), (1, 1, 4)]),
        (
            {"keep_ratio": (1.0, 0.9, 0.5, 0.7, 1.0), "stage_keep_ratio": (0.25, 0.75)},
            [(0, 1, 16), (1, 0, 12)],
            [(0, 1, 57), (0, 2, 32), (1, 0, 11)],
        ),
        ({"keep_ratio": 0.4, "stage_keep_ratio": 1.0}, [], [(0, 2, 25), (1, 0, 6), (1, 1, 6)]),
        ({"img_size": 8}, [(0, 2, 2)], [(0, 2, 2)]),
    ],
)
def test_what_is_kept_is_what_the_ratios_say(arguments, stage, layer) -> None:
    model = tiny(**arguments)
    assert chosen(model) == stage
    model.stagewise = False
    assert chosen(model) == layer


def test_the_authors_schedules() -> None:
    with torch.device("meta"):
        runs = xp.create_model("evo_levit_256").segments[True]
    assert [tuple(run) for stage in runs for run in stage] == [
        (0, 2, None), (2, 4, 98), (0, 4, 24), (0, 4, 8),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keep_ratio": (1.0, 0.5)}, "keep_ratio has 2 entries for 5 blocks"),
        ({"keep_ratio": (0.5,) * 5}, "of block 0; it has no scores yet"),
        ({"keep_ratio": 0.0}, r"a keep ratio of 0\.0; expected one above 0 and at most 1"),
        ({"keep_ratio": 1.5}, r"a keep ratio of 1\.5"),
        ({"stage_keep_ratio": (0.5,)}, "entries for 2 stages"),
        ({"fast": "slow"}, "fast 'slow'; expected one of representative, copy"),
        ({"patch_size": 12}, "patch_size 12; the stem halves"),
        ({"num_heads": (2,)}, "num_heads has 1 entries for 2 stages"),
        ({"embed_dim": (1, 8)}, "expected at least 2 for patches of 4"),
        ({"down_heads": (2, 2)}, "entries for 1 stages"),
        ({"depth": (0, 2)}, "every stage has at least one block"),
        ({"global_pool": "token"}, "heads read the mean patch"),
        ({"img_size": 0}, "an image of 0x0"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**arguments)


def test_a_picture_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"this model takes 32x32; build it with img_size="):
        tiny()(torch.randn(1, 3, 40, 32))


@pytest.mark.parametrize("size", [(33, 50), (32, 31), (5, 64), (1, 1)])
def test_any_size_and_its_maps_in_raster_order(size) -> None:
    model = tiny(img_size=size, fast="copy")
    maps = model.forward_intermediates(pictures(model), intermediates_only=True)
    rows, columns = -(-size[0] // 4), -(-size[1] // 4)
    assert maps[0].shape == (2, 16, rows, columns)
    assert maps[1].shape == (2, 24, (rows + 1) // 2, (columns + 1) // 2)
    tokens = model.forward_features(pictures(model))
    assert torch.equal(maps[1].flatten(2).transpose(1, 2), tokens[:, 1:])
    assert [info["reduction"] for info in model.feature_info] == [4, 8]


def test_pruned_to_its_first_stage() -> None:
    model = tiny()
    expected = model.forward_intermediates(pictures(model), [0], intermediates_only=True)[0]
    assert model.prune_intermediate_layers([0]) == [0]
    found = model.forward_intermediates(pictures(model), [0], intermediates_only=True)[0]
    assert torch.equal(found, expected)
    assert model(pictures(model)).shape == (2, model.num_features)


# ---------------------------------------------------------------------- heads and training


def test_two_heads_in_evaluation_and_four_in_training() -> None:
    model = tiny()
    with torch.no_grad():
        tokens = model.forward_features(pictures(model))
        mean = tokens[:, 1:].mean(dim=1)
        pair = [model.head(mean), model.head_dist(mean)]
        torch.testing.assert_close(model(pictures(model)), (pair[0] + pair[1]) / 2)
        model.set_distilled_training()
        assert isinstance(model(pictures(model)), torch.Tensor)
        model.train()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.eval()
        four = model(pictures(model))
        expected = [*pair, model.head_cls(tokens[:, 0]), model.head_cls_dist(tokens[:, 0])]
    for found, wanted in zip(four, expected, strict=True):
        torch.testing.assert_close(found, wanted)
    assert len(tiny(aux_heads=False)._heads()) == 2
    assert len(tiny(distillation=False)._heads()) == 2


@pytest.mark.parametrize("stagewise", [True, False])
@pytest.mark.parametrize("every", [True, False])
def test_every_parameter_has_a_gradient(stagewise: bool, every: bool) -> None:
    model = tiny(drop_path_rate=0.1).train()
    model.stagewise = stagewise
    model.set_distilled_training(every)
    out = model(pictures(model, 4))
    sum(o.square().sum() for o in (out if every else [out])).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    aux = [p.grad.abs().max() > 0 for p in model.head_cls.parameters()]
    assert all(aux) if every else not any(aux)
    first, second = (block.attn.learn_tradeoff.grad for block in model.stages[0].blocks[:2])
    assert float(first) == 0  # there is nothing to blend with yet
    assert float(second) != 0  # through the representative's weights


def test_the_copy_moves_no_gradient_to_the_scores() -> None:
    model = tiny(fast="copy").train()
    model(pictures(model)).square().sum().backward()
    assert all(float(b.attn.learn_tradeoff.grad) == 0 for s in model.stages for b in s.blocks)


def test_checkpointing_counts_a_batch_once() -> None:
    states = []
    for enable in (False, True):
        model = tiny(stagewise=False).train()
        model.set_grad_checkpointing(enable)
        model(pictures(model)).square().mean().backward()
        states.append(copy.deepcopy(model.state_dict()))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_logits_are_linear_in_the_features() -> None:
    model = tiny()
    with torch.no_grad():
        for head in model.get_classifier():
            head.weight.copy_(model.head.l.weight)
            head.bias.copy_(model.head.l.bias)
        features = model.forward_head(model.forward_features(pictures(model)), pre_logits=True)
        torch.testing.assert_close(model(pictures(model)), model.head.l(features))
    model.reset_classifier(0)
    torch.testing.assert_close(model(pictures(model)), features)


def test_norms_stay_when_the_classes_change() -> None:
    model = tiny()
    before = model.head.bn.weight.clone()
    model.reset_classifier(9, "avg")
    assert torch.equal(model.head.bn.weight, before)
    assert [head.out_features for head in model.get_classifier()] == [9] * 4
    with pytest.raises(ValueError, match="expected 'avg'"):
        model.reset_classifier(9, "token")


@pytest.mark.long
def test_compiles_into_one_graph_layer_by_layer() -> None:
    model = tiny(stagewise=False, img_size=27, depth=(2, 2), keep_ratio=(1, 0.5, 1, 0.5))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(pictures(model)), model(pictures(model)))
    torch.compiler.reset()


def test_a_forward_leaves_nothing_behind() -> None:
    model = tiny()
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    x = pictures(model)
    with torch.no_grad():
        before = model(x)
        model(x.flip(3))
        assert torch.equal(model(x), before)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
