"""AsCAN-style networks: patterns, what a block sees, tables of other sizes, counts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import crosspatch as xp
from crosspatch.errors import UsageError
from crosspatch.layers.windows import resize_bias_table
from crosspatch.metrics.macs import count_macs, counted
from crosspatch.models.ascan import (
    SMALL,
    VARIANTS,
    AsCAN,
    ConvBlock,
    GlobalAttention,
    Shortcut,
    TransformerBlock,
    checkpoint_filter_fn,
    read_pattern,
)

ASYMMETRIC = ("ascan_t", "ascan_tiny", "ascan_micro_32")
CONTROLS = {"ascan_t_coatnet", "ascan_t_alternating", "ascan_32_alternating", "ascan_32_reversed"}


def block(size=(4, 5), dim: int = 16, heads: int = 2) -> TransformerBlock:
    torch.manual_seed(0)
    return TransformerBlock(dim, heads, size, 2.0, 0.0, 0.0, qkv_bias=True, attn_drop=0.0).eval()


def letters(model) -> list[str]:
    names = {ConvBlock: "C", TransformerBlock: "T"}
    return ["".join(names[type(one)] for one in stage.blocks) for stage in model.stages]


# ---------------------------------------------------------------------- patterns


@pytest.mark.parametrize("name", ASYMMETRIC)
def test_attention_grows_with_depth(name) -> None:
    with torch.device("meta"):
        stages = letters(xp.create_model(name))
    assert "/".join(stages) == (VARIANTS | SMALL)[name].get("pattern", "CC/CCC/CCCTTTTT/CTTT")
    shares = [stage.count("T") / len(stage) for stage in stages]
    assert shares == sorted(shares)
    assert shares[0] == 0 < shares[-1]
    for stage in stages:
        assert stage[0] == "C"
        assert "TC" not in stage  # within a stage, too


def test_every_other_variant_is_a_control() -> None:
    assert set(VARIANTS) | set(SMALL) == set(ASYMMETRIC) | CONTROLS


@settings(max_examples=12, deadline=None)
@given(st.lists(st.text("CT", min_size=1, max_size=3), min_size=1, max_size=4))
def test_any_pattern_is_built_as_it_is_written(stages) -> None:
    dims = (8, 16, 8, 24)[: len(stages)]
    model = AsCAN(32, pattern=" / ".join(stages).lower(), dims=dims, head_dim=8, num_classes=3)
    assert letters(model) == stages
    maps = model.eval().forward_intermediates(torch.randn(1, 3, 35, 64), intermediates_only=True)
    for i, one in enumerate(maps):
        side = 2 ** (i + 2)
        assert one.shape == (1, dims[i], -(-35 // side), -(-64 // side))


@pytest.mark.parametrize("pattern", ["", "C//T", "CA/T", "C/T/"])
def test_patterns_that_cannot_be_read(pattern) -> None:
    with pytest.raises(ValueError, match="stages parted by /"):
        read_pattern(pattern)


# ---------------------------------------------------------------------- blocks


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.data())
def test_one_changed_token_changes_every_token_of_a_transformer_block(h, w, data) -> None:
    made = block((3, 4)).double()
    row, column = data.draw(st.integers(0, h - 1)), data.draw(st.integers(0, w - 1))
    x = torch.randn(1, 16, h, w, dtype=torch.float64)
    other = x.clone()
    other[:, :, row, column] += torch.randn(16, dtype=torch.float64)
    with torch.no_grad():
        changed = (made(x) - made(other)).abs().amax(dim=(0, 1))
    assert (changed > 1e-9).all()


def test_a_convolutional_block_sees_only_neighbours_but_for_its_gate() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 8, 8, 8)
    other = x.clone()
    other[..., 0, 0] += 1
    for ratio in (0.0, 0.25):
        made = ConvBlock(8, 8, 1, 4.0, ratio, 0.0).eval()
        with torch.no_grad():
            changed = (made(x) - made(other)).abs().amax(dim=(0, 1)) > 1e-9
        assert changed[:2, :2].all()
        assert changed[2:, 2:].any() == bool(ratio)


def test_a_convolutional_block_by_hand() -> None:
    torch.manual_seed(0)
    made, x = ConvBlock(8, 12, 2, 4.0, 0.25, 0.0).eval(), torch.randn(2, 8, 6, 4)
    conv = made.conv
    assert conv.se.fc1.weight.shape == (2, 32)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        y = F.gelu(conv.bn1(F.conv2d(x, conv.expand.weight, stride=2, padding=1)))
        gate = conv.se.fc2(F.gelu(conv.se.fc1(y.mean(dim=(2, 3))))).sigmoid()
        y = conv.bn2(F.conv2d(y * gate[:, :, None, None], conv.project.weight))
        mean = x.unflatten(2, (3, 2)).unflatten(4, (2, 2)).mean(dim=(3, 5))
        expected = y + conv.shortcut.conv(mean)
        torch.testing.assert_close(made(x), expected, rtol=1e-4, atol=1e-5)
    assert isinstance(ConvBlock(8, 8, 1, 4.0, 0.25, 0.0).conv.shortcut, torch.nn.Identity)
    assert isinstance(ConvBlock(8, 8, 2, 4.0, 0.25, 0.0).conv.shortcut, Shortcut)


def test_attention_by_hand() -> None:
    torch.manual_seed(0)
    made, x = GlobalAttention(8, 2, (2, 3), True, 0.0, 0.0).eval(), torch.randn(1, 2, 3, 8)
    with torch.no_grad():
        made.rel_bias.normal_()
        q, k, v = made.qkv(x.flatten(1, 2)).unflatten(2, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        logits = q @ k.transpose(2, 3) / 2
        place = [(i // 3, i % 3) for i in range(6)]
        for i, (y0, x0) in enumerate(place):
            for j, (y1, x1) in enumerate(place):
                logits[:, :, i, j] += made.rel_bias[(y0 - y1 + 1) * 5 + x0 - x1 + 2]
        y = made.proj((logits.softmax(3) @ v).transpose(1, 2).flatten(2))
        torch.testing.assert_close(made(x).flatten(1, 2), y)


def test_biases_of_another_size_are_resized() -> None:
    made = block((4, 4)).attn
    assert made.bias((4, 4)).shape == (2, 16, 16)
    bias = made.bias((6, 5))
    assert bias.shape == (2, 30, 30)
    table = resize_bias_table(made.rel_bias, (4, 4), (6, 5))
    torch.testing.assert_close(bias[:, 0, 0], table[5 * 9 + 4])
    with torch.no_grad():
        made.rel_bias.fill_(0.3)
    assert torch.allclose(made.bias((2, 9)), torch.tensor(0.3))


def test_weights_of_another_size_answer_as_if_resized_on_the_way() -> None:
    torch.manual_seed(0)
    model = xp.create_model("ascan_micro_32", num_classes=3).eval()
    wide = xp.create_model("ascan_micro_32", num_classes=3, img_size=(48, 40)).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("rel_bias"):
                value.normal_()
    xp.load_released(wide, {"model": model.state_dict()})
    x = torch.randn(1, 3, 48, 40)
    with torch.no_grad():
        torch.testing.assert_close(wide(x), model(x), rtol=1e-4, atol=1e-5)
    own = checkpoint_filter_fn(model.state_dict(), model)
    assert all(torch.equal(own[name], value) for name, value in model.state_dict().items())


# ---------------------------------------------------------------------- counts


@pytest.mark.parametrize(
    ("dim", "side", "percent"), [(256, 14, 11.3), (512, 7, 1.6), (64, 7, 11.3)]
)
def test_what_attention_products_are_of_a_transformer_block(dim, side, percent) -> None:
    with torch.device("meta"):
        made = TransformerBlock(
            dim, dim // 32, (side, side), 4.0, 0.0, 0.0, qkv_bias=True, attn_drop=0.0
        )
        total = counted(made, torch.zeros(1, dim, side, side))[0]
    tokens = side * side
    products = total - 12 * tokens * dim**2
    assert products == 2 * tokens**2 * dim
    assert products / total == tokens / (tokens + 6 * dim)
    assert 100 * products / total == pytest.approx(percent, abs=0.05)


@pytest.mark.parametrize(
    ("name", "parameters", "gmacs"),
    [
        ("ascan_t", 25.375, 5.363),
        ("ascan_t_coatnet", 35.314, 7.079),
        ("ascan_tiny", 3.498, 0.05364),
    ],
)
def test_sizes(name, parameters, gmacs) -> None:
    """Ours: the paper's are not known."""
    with torch.device("meta"):
        model = xp.create_model(name)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(parameters, rel=1e-3)
    shape = (3, *model.img_size)
    assert count_macs(model, shape) / 1e9 == pytest.approx(gmacs, rel=2e-3)
    if name == "ascan_t":
        seen = {one.index.shape[0] for one in model.modules() if isinstance(one, GlobalAttention)}
        assert seen == {196, 49}
        assert [info["reduction"] for info in model.feature_info] == [4, 8, 16, 32]


def test_the_small_one_and_its_controls_cost_the_same() -> None:
    with torch.device("meta"):
        macs = {name: count_macs(xp.create_model(name), (3, 32, 32)) for name in SMALL}
    assert 10.8e6 < macs["ascan_micro_32"] < 13.1e6
    assert max(macs.values()) < 1.03 * min(macs.values())


# ---------------------------------------------------------------------- the network


def test_the_head_norms_what_is_pooled_and_tables_do_not_decay() -> None:
    model = xp.create_model("ascan_micro_32", num_classes=4).eval()
    with torch.no_grad():
        features = model.forward_features(torch.randn(2, 3, 32, 48))
        assert features.shape == (2, 64, 4, 6)
        expected = F.layer_norm(features.mean(dim=(2, 3)), (64,))
        torch.testing.assert_close(model.forward_head(features, pre_logits=True), expected)
    assert len(model.no_weight_decay()) == 3
    rates = [
        getattr(one, "conv", one).drop_path.drop_prob
        for stage in xp.create_model("ascan_micro_32", drop_path_rate=0.5).stages
        for one in stage.blocks
    ]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"pattern": "C/CX/CT"}, "expected C and T"),
        ({"pattern": "C/CT"}, "2 stages and 3 widths"),
        ({"dims": (16, 36, 64)}, "heads of 8"),
        ({"global_pool": "token"}, "global_pool"),
    ],
)
def test_impossible_shapes_are_refused(arguments, words) -> None:
    with pytest.raises(UsageError, match=words):
        xp.create_model("ascan_micro_32", **arguments)
