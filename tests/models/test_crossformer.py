"""CrossFormer: the authors' numbers, groups against a loop over tokens, position bias, sizes."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import crosspatch as xp
from crosspatch.errors import DataError, UsageError
from crosspatch.metrics.macs import count_macs
from crosspatch.models.crossformer import CrossFormer
from crosspatch.models.crossformer_blocks import (
    _KEPT,
    CrossFormerBlock,
    DynamicPosBias,
    GroupAttention,
    Grouping,
    from_groups,
    group_mask,
    offsets,
    to_groups,
)
from support import goldens

GOLDENS = ["crossformer_tiny", "crossformer_tiny_256"]


def tiny(**arguments) -> CrossFormer:
    torch.manual_seed(0)
    asked = {"num_classes": 5, "depths": (2, 4, 1), "embed_dim": 16, **arguments}
    return xp.create_model("crossformer_micro_32", **asked).eval()


def seen(model: torch.nn.Module) -> torch.nn.Module:
    """The model with weights large enough that everything shows."""
    torch.manual_seed(1)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.3 * torch.randn_like(value))
    return model


# ---------------------------------------------------------------------- the authors' numbers


@pytest.fixture(scope="module", params=GOLDENS)
def golden(request):
    return goldens.read(f"crossformer/{request.param}")


def test_the_authors_logits_and_what_a_changed_part_does_to_them(golden) -> None:
    model = CrossFormer.from_authors(**golden.meta["build"]).eval()
    assert sum(p.numel() for p in model.parameters()) == golden.meta["params"]
    state = golden.state_dict
    buffers = {"layers.2.blocks.1.attn.biases": torch.zeros(169, 2)}
    buffers |= {"layers.0.blocks.0.attn.relative_position_index": torch.zeros(49, 49)}
    xp.load_released(model, {"model": state | buffers})
    with torch.no_grad():
        assert goldens.relative_error(model(golden.images), golden.outputs["out"]) < 1e-4
    name = "layers.2.blocks.1.attn.pos.pos3.2.weight"  # the bias of a block of distant tokens
    xp.load_released(model, state | {name: -state[name]})
    with torch.no_grad():
        assert goldens.relative_error(model(golden.images), golden.outputs["out"]) > 1e-3
    xp.load_released(model, state)
    for attention in (m for m in model.modules() if isinstance(m, GroupAttention)):
        attention.cut = attention.cut._replace(size=(0, 0))  # masks made on the way
        attention.grouping = attention.grouping._replace(pad_type=1)
    with torch.no_grad():
        error = goldens.relative_error(model(golden.images), golden.outputs["out"])
    assert (error > 1e-3) == ("256" in golden.meta["note"])


@pytest.mark.parametrize(
    ("name", "parameters", "macs"),
    [
        ("tiny", 27.78, 2.86),
        ("small", 30.66, 4.91),
        ("base", 51.97, 9.16),
        ("large", 91.97, 16.11),
        ("pp_small", 23.33, 4.43),
        ("pp_base", 51.99, 9.59),
        ("pp_large", 92.00, 16.72),
        ("pp_huge", 95.96, 22.00),
    ],
)
def test_parameters_and_macs(name: str, parameters: float, macs: float) -> None:
    with torch.device("meta"):
        model = xp.create_model(f"crossformer_{name}")
        assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(
            parameters, abs=6e-3
        )
        assert count_macs(model, (3, 224, 224)) / 1e9 == pytest.approx(macs, abs=6e-3)
        cooled = [m.acl for m in model.modules() if isinstance(m, CrossFormerBlock)]
    assert sum(cooled) == (0 if "pp" not in name else 5 if name != "pp_huge" else 7)


def test_the_authors_options_of_another_network_are_refused() -> None:
    with pytest.raises(ValueError, match="use_cpe"):
        CrossFormer.from_authors(use_cpe=True)
    build = {"embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2], "group_size": [2, 2]}
    build |= {"crs_interval": [2, 1], "mlp_ratio": [4, 4], "ape": False, "drop_rate": 0.1}
    assert CrossFormer.from_authors(**build).drop_rate == 0


# ---------------------------------------------------------------------- groups


SIDES = st.integers(1, 13)


@settings(max_examples=40, deadline=None)
@given(SIDES, SIDES, st.integers(1, 4), st.integers(1, 3), st.sampled_from([0, 1]))
def test_groups_hold_every_token_once_and_go_back(height, width, group, interval, pad_type) -> None:
    cut = Grouping(group, interval, pad_type).of((height, width))
    x = torch.arange(1.0, height * width + 1).reshape(1, height, width, 1)
    groups = to_groups(x, cut)
    assert sorted(groups[groups > 0].tolist()) == x.flatten().tolist()
    assert torch.equal(from_groups(groups, cut), x)
    mask = group_mask(cut)
    if mask is None:
        assert (groups > 0).all()
    else:
        assert torch.equal(mask[:, 0] < 0, groups[0, :, :, 0] == 0)


@pytest.mark.parametrize("pad_type", [0, 1])
def test_distant_groups_have_one_remainder_in_every_region(pad_type) -> None:
    cut = Grouping(2, 3, pad_type).of((9, 12))
    assert cut.before == ((1, 0) if pad_type else (0, 0))
    rows = torch.arange(9)[:, None].expand(9, 12)
    places = torch.stack([rows, torch.arange(12).expand(9, 12)], dim=-1)[None].float()
    for found in to_groups(places, cut, -1.0)[0]:
        real = found[(found >= 0).all(dim=-1)].long() + torch.tensor(cut.before)
        assert len({tuple(place) for place in (real % 3).tolist()}) == 1
        assert len({tuple(place) for place in (real // 6).tolist()}) == 1


def test_the_cut_follows_the_map() -> None:
    assert Grouping(7, 4).of((28, 28))[1:3] == (7, 4)
    assert Grouping(7, 4).of((7, 20))[1:3] == (7, 1)
    assert Grouping(7, 4).of((5, 9))[1:3] == (5, 1)
    assert Grouping(7, None).of((30, 20))[1:3] == (7, 5)
    assert Grouping(7, 8).of((64, 64)).after == (48, 48)
    assert Grouping(7, None).of((64, 64)).after == (6, 6)


@pytest.mark.parametrize(
    ("size", "interval"), [((8, 8), 2), ((7, 10), 2), ((9, 5), 1), ((3, 6), 2)]
)
@pytest.mark.parametrize("pad_type", [0, 1])
def test_attention_is_that_of_a_loop_over_tokens(size, interval, pad_type) -> None:
    torch.manual_seed(0)
    grouping = Grouping(4, interval, pad_type)
    attention = GroupAttention(8, 2, grouping, size=(8, 8), pos_dim=3).eval()
    seen(attention)
    x, (height, width) = torch.randn(1, *size, 8), size
    cut = grouping.of(size)
    with torch.no_grad():
        q, k, v = attention.qkv(x[0]).chunk(3, dim=-1)
        table = attention.pos(offsets(cut.group))
        expected = torch.zeros(height, width, 8)
        step, side = cut.interval, cut.group * cut.interval
        for r in range(height):
            for c in range(width):
                top, left = r + cut.before[0], c + cut.before[1]
                mates = [
                    (a, b)
                    for a in range(height)
                    for b in range(width)
                    if (a + cut.before[0]) // side == top // side
                    and (b + cut.before[1]) // side == left // side
                    and (a - r) % step == 0
                    and (b - c) % step == 0
                ]
                rows = [
                    ((r - a) // step + cut.group - 1) * (2 * cut.group - 1)
                    + (c - b) // step + cut.group - 1
                    for a, b in mates
                ]  # fmt: skip
                keys, values = (torch.stack([t[m] for m in mates]) for t in (k, v))
                for h, part in enumerate((slice(0, 4), slice(4, 8))):
                    logits = keys[:, part] @ q[r, c, part] / 2 + table[rows, h]
                    expected[r, c, part] = logits.softmax(0) @ values[:, part]
        torch.testing.assert_close(attention(x)[0], attention.proj(expected), rtol=1e-4, atol=1e-5)


def test_a_distant_group_reads_the_49_tokens_of_even_row_and_column() -> None:
    attention = GroupAttention(8, 2, Grouping(7, 2), size=(14, 14), pos_dim=2)
    x = torch.randn(1, 14, 14, 8, requires_grad=True)
    attention(x)[0, 0, 0].sum().backward()
    reached = x.grad[0].abs().sum(dim=-1) > 0
    assert reached.sum() == 49
    assert reached[::2, ::2].all()


def test_groups_have_64_times_fewer_pairs_than_the_whole_map() -> None:
    groups = to_groups(torch.zeros(1, 56, 56, 1), Grouping(7, 8).of((56, 56)))
    assert 64 * groups.shape[1] * groups.shape[2] ** 2 == 3136**2


# ---------------------------------------------------------------------- the position bias


def test_the_bias_of_an_offset_does_not_depend_on_the_group() -> None:
    torch.manual_seed(0)
    network = seen(DynamicPosBias(4, 2))
    assert sum(p.numel() for p in network.parameters()) == 86
    with torch.no_grad():
        small, large = (network(offsets(g)).reshape(2 * g - 1, 2 * g - 1, 2) for g in (7, 14))
    torch.testing.assert_close(large[7:20, 7:20], small, rtol=1e-6, atol=1e-7)
    assert offsets(7)[0].tolist() == [-6, -6]
    assert offsets(7)[1].tolist() == [-6, -5]


def test_half_precision_leaves_the_bias_as_it_is() -> None:
    network = seen(DynamicPosBias(4, 2))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = network(offsets(14))
        assert found.dtype == torch.float32
    assert torch.equal(found, network(offsets(14)))


def test_a_bias_is_kept_until_a_weight_changes_and_is_not_copied() -> None:
    model, x = seen(tiny()), torch.randn(2, 3, 32, 32)
    first: GroupAttention = model.stages[0].blocks[0].attn
    with torch.inference_mode():
        before = model(x)
        kept = _KEPT[first]
        assert torch.equal(model(x), before)
        assert _KEPT[first] is kept
        assert count_macs(model, (3, 32, 32)) == count_macs(tiny(), (3, 32, 32))
    other = copy.deepcopy(model)
    assert other.stages[0].blocks[0].attn not in _KEPT
    with torch.no_grad():
        first.pos.pos3[2].weight.add_(1.0)
        fresh = first.fresh_bias(4)
        assert torch.equal(first.bias(4), fresh)
        assert not torch.equal(model(x), before)
        model.load_state_dict(other.state_dict())
        torch.testing.assert_close(model(x), before)
        assert torch.equal(first.bias(3), first.fresh_bias(3))
    model.double()
    assert first not in _KEPT
    model.float()(x).sum().backward()
    assert first.pos.pos_proj.weight.grad.any()
    assert first not in _KEPT


# ---------------------------------------------------------------------- the whole


@pytest.mark.parametrize("options", [{}, {"pad_type": 1}, {"adaptive_interval": True}])
@pytest.mark.parametrize("size", [(33, 47), (30, 30), (70, 20), (9, 8)])
def test_one_set_of_weights_for_every_size(options, size) -> None:
    model = seen(tiny(**options))
    other = tiny(**options, img_size=size)
    other.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        torch.testing.assert_close(model(x), other(x), rtol=1e-5, atol=1e-5)
        assert model(x).isfinite().all()


def test_cooling_layers_stand_after_every_third_block_but_the_last() -> None:
    model = tiny(depths=(3, 7, 1), use_acl=True)
    cooled = [[block.acl for block in stage.blocks] for stage in model.stages]
    assert cooled == [[False] * 3, [False, False, True, False, False, True, False], [False]]
    block = model.stages[1].blocks[2]
    with torch.no_grad():
        block.ex_conv.weight.zero_()  # nothing is added to it: the map is then one vector
        block.ex_conv.bias.normal_()
        found = block(torch.randn(1, 8, 8, 32))
    assert torch.allclose(found, found[:, :1, :1], atol=1e-6)


def test_padding_has_no_say_and_no_bad_gradient() -> None:
    """In half precision too: groups of padding alone are finite."""
    model = seen(tiny()).train()
    with torch.autocast("cpu", dtype=torch.float16):
        loss = model(torch.randn(2, 3, 21, 37)).float().square().mean()
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_timm_makes_maps_of_it() -> None:
    features = timm.create_model("crossformer_tiny", features_only=True, img_size=64)
    maps = features(torch.zeros(1, 3, 64, 64))
    assert [m.shape[1:] for m in maps] == [(64, 16, 16), (128, 8, 8), (256, 4, 4), (512, 2, 2)]
    model = tiny()
    model.reset_classifier(0, "")
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 4, 4, 64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_heads": (3, 3, 3)}, "must divide by 3 heads"),
        ({"num_heads": (1, 2)}, "num_heads has 2 entries for 3 stages"),
        ({"group_size": (4, 4)}, "group_size has 2 entries"),
        ({"merge_size": ((2, 4),)}, "merge_size has 1 entries for 2 merges"),
        ({"group_size": 0}, "expected 1 or more"),
        ({"pad_type": 2}, "pad_type 2"),
        ({"patch_size": (4, 7)}, "an even number apart"),
        ({"embed_dim": 22}, "divides by 4"),
        ({"global_pool": "token"}, "global_pool"),
    ],
)
def test_shapes_that_do_not_agree_are_refused(arguments, message) -> None:
    with pytest.raises(UsageError, match=message):
        tiny(**arguments)


def test_a_file_that_lacks_something_is_refused() -> None:
    golden = goldens.read(f"crossformer/{GOLDENS[0]}")
    state = golden.state_dict
    del state["layers.1.downsample.reductions.1.bias"]
    with torch.device("meta"):
        model = CrossFormer.from_authors(**golden.meta["build"])
    with pytest.raises(DataError, match=r"missing: stages\.2\.downsample\.reductions\.1\.bias"):
        xp.load_released(model, state)
