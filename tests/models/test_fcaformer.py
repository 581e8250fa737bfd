"""FcaFormer: the authors' numbers, its counts, what memory, merging and windows do."""

from __future__ import annotations

import pytest
import torch

import crosspatch as xp
from crosspatch.errors import UsageError
from crosspatch.metrics.macs import count_macs, counted
from crosspatch.models.fcaformer import FcaFormer, checkpoint_filter_fn
from crosspatch.models.fcaformer_blocks import (
    FcaBlock,
    FcaSpec,
    offset_index,
    resize_memory,
    resize_offsets,
)
from support import goldens

GOLDENS = ["fcaformer_l1", "fcaformer_micro_96_d2"]
MACHINERY = ("dw_conv.", "s_norm.", "s_token_bias", "s_scale_factors")


def spec(**changes) -> FcaSpec:
    given = {
        "dim": 32, "heads": 2, "size": (8, 8), "window": None, "keeps": 12, "mlp_ratio": 4.0,
        "qkv_bias": True, "mask_padding": True, "gamma": 1.0, "attn_drop": 0.0, "proj_drop": 0.0,
    }  # fmt: skip
    return FcaSpec(**{**given, **changes})


def block(number: int, depth: int = 9, **changes) -> FcaBlock:
    """With no weight at a value that would hide a mistake."""
    torch.manual_seed(number)
    made = FcaBlock(spec(**changes), number, depth, 0.0).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return made


def remembered(count: int, windows: int = 1, tokens: int = 4, dim: int = 32):
    torch.manual_seed(7)
    return tuple(torch.randn(2, windows, tokens, dim) for _ in range(count))


# ---------------------------------------------------------------------- the authors' numbers


@pytest.mark.parametrize("name", GOLDENS)
@pytest.mark.parametrize("wrapped", [False, True])
def test_it_computes_what_the_authors_code_computes(name, wrapped) -> None:
    golden = goldens.read(f"fcaformer/{name}")
    model = FcaFormer.from_authors(**golden.meta["build"]).eval()
    assert sum(p.numel() for p in model.parameters()) == golden.meta["params"]
    state = golden.state_dict
    state["layer_2.blocks.0.attention_bias_idxs"] = torch.zeros(4, 4, dtype=torch.long)
    xp.load_released(model, {"model": state} if wrapped else state)
    with torch.no_grad():
        assert goldens.relative_error(model(golden.images), golden.outputs["out"]) < 1e-4


@pytest.mark.parametrize(
    "changed",
    [
        "layer_2.blocks.3.s_scale_factors",
        "layer_3.blocks.1.s_token_bias",
        "layer_2.blocks.1.gamma_1",
    ],
)
def test_a_golden_notices_a_changed_weight(changed) -> None:
    golden = goldens.read("fcaformer/fcaformer_micro_96_d2")
    model = FcaFormer.from_authors(**golden.meta["build"]).eval()
    state = golden.state_dict
    state[changed] = -state[changed] - 1
    xp.load_released(model, state)
    with torch.no_grad():
        assert goldens.relative_error(model(golden.images), golden.outputs["out"]) > 1e-3


def test_what_the_authors_constructor_ignores_is_ignored() -> None:
    build = {"embed_dims": [16, 24], "depths": [1, 2], "num_heads": [0, 2], "img_size": 32}
    model = FcaFormer.from_authors(**build, layer_scale_init_value=0.5, head_init_scale=9.0)
    assert model.stages[1].blocks[0].gamma_1[0].item() == pytest.approx(1e-6)
    assert model.head.weight.abs().max() < 0.2
    ours = FcaFormer(**build, layer_scale_init_value=0.5, head_init_scale=0.0)
    assert ours.stages[0].blocks[0].gamma[0] == 0.5
    assert not ours.head.weight.any()


# ---------------------------------------------------------------------- counts


@pytest.mark.parametrize(
    ("size", "parameters", "gmacs"),
    [
        ("l0", 5_870_584, 1.45),
        ("l1", 6_187_560, 1.37),
        ("l2", 16_275_870, 3.60),
        ("l3", 27_894_484, 6.65),
        ("l4", 65_638_204, 14.49),
    ],
)
def test_sizes(size, parameters, gmacs) -> None:
    with torch.device("meta"):
        model = xp.create_model(f"fcaformer_{size}")
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert count_macs(model, (3, 224, 224)) / 1e9 == pytest.approx(gmacs, abs=5e-3)
    if size == "l2":
        mine = [p.numel() for n, p in model.named_parameters() if any(m in n for m in MACHINERY)]
        assert sum(mine) == 126_160


@pytest.mark.parametrize(("memory", "mmacs"), [(0, 101.95), (1, 101.95 + 2.97), (6, 119.79)])
def test_what_a_block_costs(memory, mmacs) -> None:
    with torch.device("meta"):
        made = FcaBlock(spec(dim=192, heads=6, size=(14, 14)), memory, 9, 0.0)
        x = torch.zeros(1, 14, 14, 192)
        summaries = tuple(torch.zeros(1, 1, 16, 192) for _ in range(memory))
        assert counted(made, (x, summaries))[0] / 1e6 == pytest.approx(mmacs, abs=0.02)


# ---------------------------------------------------------------------- structure


def test_memory_that_is_out_of_reach_leaves_plain_attention() -> None:
    made, x = block(3), torch.randn(2, 8, 8, 32)
    tokens = x.flatten(1, 2)[:, None]
    with torch.no_grad():
        near = made.attention(tokens, remembered(3), (8, 8))
        plain = made.attention(tokens, (), (8, 8))
        made.s_token_bias.fill_(-1e9)
        far = made.attention(tokens, remembered(3), (8, 8))
    assert torch.equal(far, plain) or torch.allclose(far, plain, atol=1e-6)
    assert (near - plain).abs().max() > 1e-2
    assert near.shape == plain.shape == (2, 1, 64, 32)


def test_a_block_by_hand() -> None:
    made, (s,) = block(1), remembered(1)
    x = torch.randn(2, 8, 8, 32)
    with torch.no_grad():
        flat, s = x.flatten(1, 2), s[:, 0]
        memory = made.s_norm(s * made.s_scale_factors)
        qkv = made.qkv(torch.cat([made.norm1(flat), memory], dim=1))
        q, k, v = qkv.unflatten(2, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        logits = q[:, :, :64] @ k.transpose(2, 3) / 4
        place = [(i // 8, i % 8) for i in range(64)]
        for i, (y0, x0) in enumerate(place):
            for j, (y1, x1) in enumerate(place):
                logits[:, :, i, j] += made.attention_biases[:, abs(y0 - y1) * 8 + abs(x0 - x1)]
        logits[:, :, :, 64:] += made.s_token_bias
        out = (logits.softmax(3) @ v).transpose(1, 2).flatten(2)
        flat = flat + made.gamma_1 * made.proj(out)
        image = flat.transpose(1, 2).unflatten(2, (8, 8))
        flat = made.local_conv(image).flatten(2).transpose(1, 2)
        hidden = made.mlp.fc1(made.mlp.norm(made.norm2(flat)))
        flat = flat + made.gamma_2 * made.mlp.fc2(torch.nn.functional.gelu(hidden))
        found, summaries = made((x, remembered(1)))
        summary = made.dw_conv(image).flatten(2).transpose(1, 2)
    torch.testing.assert_close(found.flatten(1, 2), flat, rtol=1e-4, atol=1e-4)
    assert len(summaries) == 2
    torch.testing.assert_close(summaries[1][:, 0], summary, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("keeps", "rows"), [(12, [0, 4, 8, 12, 16]), (2, [0, 4, 8, 8, 8]),
                                             (None, [0, 4, 8, 12, 16]), (0, [0] * 5)])  # fmt: skip
def test_the_memory_is_of_the_last_blocks(keeps, rows) -> None:
    model = FcaFormer(
        32, embed_dims=(32,), depths=(5,), num_heads=(2,), cab_max_d=keeps, num_classes=2
    )
    blocks = model.stages[0].blocks
    found = [b.s_scale_factors.shape[1] if hasattr(b, "s_norm") else 0 for b in blocks]
    assert found == rows
    assert [b.dw_conv is not None for b in blocks] == [keeps != 0] * 4 + [False]
    state = torch.randn(1, 8, 8, 32), ()
    seen = []
    for b in blocks:
        seen.append(sum(s.shape[2] for s in state[1]))
        state = b(state)
    assert seen == rows


def test_the_oldest_summary_comes_first_and_is_the_first_to_go() -> None:
    made, memory = block(2, keeps=2), remembered(2)
    _, after = made((torch.randn(2, 8, 8, 32), memory))
    assert after[0] is memory[1]
    assert len(after) == 2


# ---------------------------------------------------------------------- windows


def test_a_window_that_is_the_map_changes_nothing() -> None:
    whole, cut = block(2), block(2, window=8)
    x = torch.randn(2, 8, 8, 32)
    with torch.no_grad():
        torch.testing.assert_close(whole((x, remembered(2)))[0], cut((x, remembered(2)))[0])


def test_windows_do_not_see_each_other_and_keep_their_own_memory() -> None:
    made, x = block(1, window=4), torch.randn(2, 8, 8, 32)
    memory = remembered(1, windows=4, tokens=1)
    other, told = x.clone(), (memory[0].clone(),)
    other[:, :4, :4] += 1
    told[0][:, 0] += 1
    with torch.no_grad():
        a, (_, written) = made((x, memory))
        for b, (_, also) in (made((other, memory)), made((x, told))):
            changed = (a - b).abs().amax(dim=(0, 3)) > 0
            assert changed[:4, :4].all()
            assert not changed[4:].any()
            assert not changed[:, 4:].any()
            assert torch.equal(written[:, 1:], also[:, 1:])


def test_padding_changes_sides_and_is_hidden() -> None:
    x = torch.randn(1, 6, 7, 32)
    for number, side in ((0, "top left"), (1, "bottom right")):
        made = block(number, window=4)
        windows, mask = made._cut(x, (4, 4))
        assert windows.shape == (1, 4, 16, 32)
        assert mask.shape == (4, 1, 16)
        first = windows[0, 0].abs().sum(dim=1) == 0
        assert first.any() == (side == "top left")
        assert torch.equal(mask[0, 0] < 0, first)
        torch.testing.assert_close(made._join(windows, (4, 4), (6, 7)), x)
    seen = block(1, window=4, mask_padding=False)
    assert seen._cut(x, (4, 4))[1] is None


# ---------------------------------------------------------------------- sizes and tables


def test_tables_of_another_size_keep_their_middle_and_come_back() -> None:
    table = torch.randn(3, 36)
    assert resize_offsets(table, (6, 6), (6, 6)) is table
    larger = resize_offsets(table, (6, 6), (9, 7))
    assert larger.shape == (3, 63)
    flat = resize_offsets(torch.full((3, 36), 0.7), (6, 6), (3, 11))
    assert torch.allclose(flat, torch.full((3, 33), 0.7))
    assert resize_memory(torch.ones(2, 3 * 4), (2, 2), (3, 4)).shape == (2, 36)
    index = offset_index((2, 3))
    assert index[0].tolist() == [0, 1, 2, 3, 4, 5]
    assert torch.equal(index, index.T)


def test_released_tables_fit_another_size_as_they_do_on_the_way() -> None:
    golden = goldens.read("fcaformer/fcaformer_micro_96_d2")
    small = FcaFormer.from_authors(**golden.meta["build"]).eval()
    wide = FcaFormer.from_authors(**{**golden.meta["build"], "img_size": (128, 160)}).eval()
    for model in (small, wide):
        xp.load_released(model, golden.state_dict)
    x = torch.randn(1, 3, 128, 160)
    with torch.no_grad():
        torch.testing.assert_close(small(x), wide(x), rtol=1e-4, atol=1e-4)
    own = checkpoint_filter_fn(wide.state_dict(), wide)
    assert all(torch.equal(own[name], value) for name, value in wide.state_dict().items())


def test_a_plain_network_takes_any_size_and_its_positions_are_resized() -> None:
    arguments = {"embed_dims": (24,), "depths": (2,), "num_classes": 3}
    model = xp.create_model("fcaformer_l0", img_size=64, **arguments).eval()
    wide = xp.create_model("fcaformer_l0", img_size=(48, 80), **arguments).eval()
    xp.load_released(wide, model.state_dict())
    x = torch.randn(1, 3, 48, 80)
    with torch.no_grad():
        torch.testing.assert_close(model(x), wide(x))
        assert model(torch.randn(1, 3, 50, 70)).isfinite().all()
    assert model.no_weight_decay() == {"stem.pos_embed"}


def test_unpooled_features_are_a_normalised_map() -> None:
    model = xp.create_model("fcaformer_micro_32", num_classes=4).eval()
    model.reset_classifier(0, "")
    with torch.no_grad():
        found = model(torch.randn(2, 3, 32, 32))
    assert found.shape == (2, 80, 4, 4)
    assert found.mean(dim=1).abs().max() < 1e-4
    model.prune_intermediate_layers([0, 1])
    assert len(model.stages) == 2
    assert isinstance(model.norm_head, torch.nn.Identity)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_heads": (0, 5, 5)}, "divide by 5 heads"),
        ({"depths": (1, 1)}, "one a stage"),
        ({"window_size": (7, 7)}, "one a stage"),
        ({"cab_max_d": -1}, "cab_max_d -1"),
        ({"patch_size": 3}, "patch_size 3"),
        ({"stem": "deep"}, "'deep'"),
        ({"global_pool": "token"}, "global_pool"),
    ],
)
def test_impossible_shapes_are_refused(arguments, words) -> None:
    with pytest.raises(UsageError, match=words):
        xp.create_model("fcaformer_micro_32", **arguments)
