"""STViT-R: the authors' numbers, a unit against a loop over its windows, switches, sizes, maps."""

from __future__ import annotations

import copy
from itertools import product

import numpy as np
import onnxruntime
import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import DropPath

import crosspatch as xp
from crosspatch.deploy.graph import to_onnx
from crosspatch.layers.linear import switched
from crosspatch.layers.windows import counts, relative_bias, relative_index
from crosspatch.metrics.macs import count_macs
from crosspatch.models.stvit_r import SMALL, VARIANTS, STViTR, checkpoint_filter_fn
from crosspatch.models.stvit_r_units import UNIT, Generate, SemanticSpec, pool_windows
from support import goldens

GOLDEN = "stvit/stvit_r_swin_tiny_d6"
ALL_ON = {"use_global": True, "use_conv_pos": True, "relative_pos": True, "shortcut": True}


def tiny(**arguments) -> STViTR:
    """Two stages, windows of 4 and 2x2 semantic tokens in each; scales that can be seen."""
    torch.manual_seed(0)
    model = STViTR(
        **{
            "img_size": 32,
            "patch_size": 2,
            "num_classes": 5,
            "embed_dim": 8,
            "depths": (2, 6),
            "num_heads": (2, 2),
            "window_size": 4,
            "mlp_ratio": 2.0,
            "semantic_stage": 1,
            "semantic_tokens": 2,
            "neighbourhoods": (6, 8, 6) if arguments.get("detection") else (6, None, None),
            "layer_scale": 0.5,
            **arguments,
        }
    ).eval()
    for name, value in model.named_parameters():
        if "bias" in name:
            value.data.normal_(std=0.3)
    return model


# ---------------------------------------------------------------------- the authors' numbers


@pytest.fixture(scope="module")
def golden():
    return goldens.read(GOLDEN)


@pytest.fixture(scope="module")
def weights(golden):
    return golden.state_dict


def third_stage(model: STViTR, images: torch.Tensor) -> torch.Tensor:
    """Tokens (B, 49, 2C) after the third stage and its merging."""
    (found,) = model.forward_intermediates(
        images, [2], stop_early=True, output_fmt="NHWC", intermediates_only=True
    )
    return model.layers[2].downsample(found).flatten(1, 2)


def test_the_authors_tokens_after_the_third_stage_and_their_logits(golden, weights) -> None:
    model = xp.create_model("stvit_r_swin_tiny").eval()
    assert sum(p.numel() for p in model.parameters()) == golden.meta["params"]
    xp.load_released(model, {"model": weights})
    for products in ("off", "on"):
        with torch.no_grad(), switched(products):
            stage3, out = third_stage(model, golden.images), model(golden.images)
        assert goldens.relative_error(stage3, golden.outputs["stage3"]) < 1e-4
        assert goldens.relative_error(out, golden.outputs["out"]) < 1e-4


@pytest.mark.parametrize("changed", ["borders", "layers.2.blocks.1.attn.q.weight"])
def test_the_golden_notices_what_is_changed_in_the_third_stage(golden, weights, changed) -> None:
    arguments = {"borders": "padded"} if changed == "borders" else {}
    model = xp.create_model("stvit_r_swin_tiny", **golden.meta["build"], **arguments).eval()
    xp.load_released(model, weights if arguments else weights | {changed: -weights[changed]})
    with torch.no_grad():
        found = third_stage(model, golden.images)
    assert goldens.relative_error(found, golden.outputs["stage3"]) > 1e-4


@pytest.mark.parametrize(
    ("name", "parameters", "macs", "of_swin"),
    [
        ("tiny", 28_320_214, 3.60, 4.49),
        ("small", 49_625_518, 5.83, 8.74),
        ("base", 87_812_336, 10.23, 15.43),
    ],
)
def test_parameters_and_macs(name: str, parameters: int, macs: float, of_swin: float) -> None:
    """The sheet counts 5.83 G for S, 0.5 % more than what is counted here; Swin's agree."""
    with torch.device("meta"):
        model = xp.create_model(f"stvit_r_swin_{name}")
        swin = timm.create_model(f"swin_{name}_patch4_window7_224")
        assert sum(p.numel() for p in model.parameters()) == parameters
        assert count_macs(model, (3, 224, 224)) / 1e9 == pytest.approx(macs, rel=0.01)
        assert count_macs(swin, (3, 224, 224)) / 1e9 == pytest.approx(of_swin, abs=0.01)


# ---------------------------------------------------------------------- a unit


def attention(block, q: torch.Tensor, kv: torch.Tensor, bias=None) -> torch.Tensor:
    """ls1 * MHA(LN q, LN kv) of one window: q (T, C), kv (K, C)."""
    attn, q, kv = block.attn, block.norm1(q), block.norm1(kv)
    k, v = attn.kv(kv).chunk(2, dim=-1)
    q, found = attn.q(q), []
    for h in range(attn.num_heads):
        part = slice(h * q.shape[1] // attn.num_heads, (h + 1) * q.shape[1] // attn.num_heads)
        logits = q[:, part] @ k[:, part].T * (part.stop - part.start) ** -0.5
        logits = logits if bias is None else logits + bias[h]
        found.append(logits.softmax(-1) @ v[:, part])
    y = attn.proj(torch.cat(found, dim=-1))
    return y if block.layer_scale_1 is None else block.layer_scale_1 * y


def mlp(block, x: torch.Tensor) -> torch.Tensor:
    y = block.mlp(block.norm2(x))
    return x + (y if block.layer_scale_2 is None else block.layer_scale_2 * y)


def near(x: torch.Tensor, top: int, left: int, height: int, width: int) -> torch.Tensor:
    """The tokens of a map (H, W, C) in a rectangle, without what lies outside of the map."""
    part = x[max(0, top) : top + height, max(0, left) : left + width]
    return part.flatten(0, 1)


def naive_unit(model: STViTR, x: torch.Tensor) -> torch.Tensor:
    """One dumbbell unit on one map (H, W, C), window by window, padding left out."""
    stage = model.layers[1]
    swin, generate, refine, local, over_all, recover = stage.blocks
    x = swin(x[None])[0]
    spec, (height, width, _) = stage.spec, x.shape
    (h, w), t = spec.window, spec.tokens
    rows, columns = counts((height, width), (h, w))
    cells = list(product(range(rows), range(columns)))
    padded = F.pad(x, (0, 0, 0, columns * w - width, 0, rows * h - height))
    inwards = spec.kernel is not None and (height, width) == (2 * h, 2 * w)

    s = torch.zeros(rows * t, columns * t, x.shape[-1])
    for row, column in cells:
        window = padded[row * h : row * h + h, column * w : column * w + w].permute(2, 0, 1)
        pooled = F.adaptive_max_pool2d(window, (t, t))
        if spec.use_conv_pos:
            pooled = pooled + generate.conv_pos.proj(pooled[None])[0]
        pooled = pooled.flatten(1).T
        if inwards:
            k = spec.kernel
            keys = near(x, row * (height - k), column * (width - k), k, k)
        else:
            a, b = spec.generate
            keys = near(x, row * h - a, column * w - b, h + 2 * a, w + 2 * b)
        keys = torch.cat([pooled, keys]) if spec.append else keys
        found = attention(generate, pooled, keys) + (pooled if spec.shortcut else 0)
        s[row * t : row * t + t, column * t : column * t + t] = found.unflatten(0, (t, t))
    s = mlp(generate, s)

    centres = stage._centres((height, width))
    q = s if centres is None else s + centres[0]
    new = torch.zeros_like(s)
    if spec.refine is None:
        keys = x.flatten(0, 1)
        keys = torch.cat([s.flatten(0, 1), keys]) if spec.append else keys
        new = attention(refine, q.flatten(0, 1), keys).view_as(s)
    else:
        a, b = spec.refine
        for row, column in cells:
            mine = q[row * t : row * t + t, column * t : column * t + t].flatten(0, 1)
            keys = near(x, row * h - a, column * w - b, h + 2 * a, w + 2 * b)
            part = attention(refine, mine, keys).unflatten(0, (t, t))
            new[row * t : row * t + t, column * t : column * t + t] = part
    s = mlp(refine, q + new)

    def bias(block, window):
        table = block.attn.relative_position_bias_table
        return None if table is None else relative_bias(table, relative_index(window))

    new = torch.zeros_like(s)
    for row, column in cells:
        mine = s[row * t : row * t + t, column * t : column * t + t].flatten(0, 1)
        part = attention(local, mine, mine, bias(local, (t, t))).unflatten(0, (t, t))
        new[row * t : row * t + t, column * t : column * t + t] = part
    s = mlp(local, s + new)
    mine = s.flatten(0, 1)
    s = mlp(over_all, s + attention(over_all, mine, mine, bias(over_all, s.shape[:2])).view_as(s))

    new = torch.zeros_like(x)
    for row, column in cells:
        mine = x[row * h : row * h + h, column * w : column * w + w]
        keys = s.flatten(0, 1)
        if spec.recover is not None:
            a, b = spec.recover
            keys = near(s, row * t - a, column * t - b, t + 2 * a, t + 2 * b)
        part = attention(recover, mine.flatten(0, 1), keys).view_as(mine)
        new[row * h : row * h + h, column * w : column * w + w] = part
    return mlp(recover, x + new)


SWITCHES = [
    {},
    ALL_ON,
    {"released": False, "layer_scale": None},
    {"neighbourhoods": (7, 6, 4), "shortcut": True},
    {"detection": True},
    {"detection": True, **ALL_ON},
]


@pytest.mark.parametrize("arguments", SWITCHES, ids=str)
@pytest.mark.parametrize("size", [(8, 8), (9, 6), (4, 11), (12, 16)])  # of the unit's map
def test_a_unit_is_a_loop_over_its_windows(size, arguments) -> None:
    model = tiny(img_size=(4 * size[0], 4 * size[1]), **arguments)
    x = torch.randn(2, *size, 16)
    with torch.no_grad():
        expected = torch.stack([naive_unit(model, one) for one in x])
        assert torch.allclose(model.layers[1](x), expected, atol=2e-5)


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 13), st.integers(1, 13), st.sampled_from(SWITCHES))
def test_without_the_recovery_a_unit_is_its_first_block(height, width, arguments) -> None:
    """Sheet, structural check: both LayerScales of block 5 at zero."""
    model = tiny(**{**arguments, "layer_scale": 0.5, "depths": (2, 12)})
    stage, x = model.layers[1], torch.randn(1, height, width, 16)
    with torch.no_grad():
        for last in stage.blocks[UNIT - 1 :: UNIT]:
            last.layer_scale_1.zero_()
            last.layer_scale_2.zero_()
        assert torch.equal(stage(x), stage.blocks[UNIT](stage.blocks[0](x)))


def test_at_14x14_borders_move_inwards_and_nowhere_else() -> None:
    """A window's semantic tokens know of rows and columns 0..9 or 4..13, as unfolding 10 / 4."""
    spec = {"window": (7, 7), "layer_scale": 1.0}
    shifted = Generate(8, 2, SemanticSpec((14, 14), **spec, kernel=10))
    padded = Generate(8, 2, SemanticSpec((14, 14), **spec, kernel=None))
    padded.load_state_dict(shifted.state_dict())
    for block, reach in ((shifted, (range(10), range(4, 14))), (padded, (range(8), range(6, 14)))):
        x = torch.randn(1, 14, 14, 8, requires_grad=True)
        s = block(x)
        assert s.shape == (1, 6, 6, 8)
        for row, column in product(range(2), range(2)):
            one = s[0, 3 * row + 1, 3 * column + 1].square().sum()
            (grad,) = torch.autograd.grad(one, x, retain_graph=True)
            seen = grad[0].abs().sum(-1) > 0
            expected = torch.zeros(14, 14, dtype=torch.bool)
            expected[
                reach[row].start : reach[row].stop, reach[column].start : reach[column].stop
            ] = 1
            assert torch.equal(seen, expected)
    with torch.no_grad():
        for size in ((7, 7), (14, 21), (13, 14)):
            x = torch.randn(1, *size, 8)
            assert torch.equal(shifted(x), padded(x))


@pytest.mark.parametrize(("window", "tokens"), [((7, 7), 3), ((4, 4), 2), ((4, 6), 3), ((2, 2), 3)])
def test_pooling_is_torchs(window, tokens) -> None:
    x = torch.randn(2, 5, window[0] * window[1], 3)
    images = x.flatten(0, 1).transpose(1, 2).unflatten(2, window)
    expected = F.adaptive_max_pool2d(images, (tokens, tokens)).flatten(2).transpose(1, 2)
    got = pool_windows(x, SemanticSpec(window, window, tokens))
    assert torch.equal(got.flatten(0, 1), expected)


# ---------------------------------------------------------------------- switches


def test_what_every_switch_adds() -> None:
    def count(**arguments) -> int:
        with torch.device("meta"):
            model = xp.create_model("stvit_r_swin_small", **arguments)
        return sum(p.numel() for p in model.parameters())

    off, c, heads, units = count(), 384, 12, 3
    assert count(use_global=True) - off == 36 * c
    assert count(use_conv_pos=True) - off == units * 10 * c
    assert count(relative_pos=True) - off == units * (25 + 121) * heads
    assert count(shortcut=True) == off
    assert off - count(layer_scale=None) == units * 10 * c
    assert count(released=False) == count(use_global=True)


def test_the_defaults_of_the_released_weights_and_of_new_training() -> None:
    faithful, new = tiny(), tiny(released=False)
    assert (faithful.layers[1].semantic_token2, faithful.layers[1].spec.kernel) == (None, 6)
    assert new.layers[1].semantic_token2.shape == (1, 16, 16)
    assert new.layers[1].spec.kernel is None
    assert tiny(released=False, borders="shifted", use_global=False).layers[1].spec.kernel == 6
    names = set(tiny(**ALL_ON).state_dict()) - set(faithful.state_dict())
    assert names == {
        "layers.1.semantic_token2",
        "layers.1.blocks.1.conv_pos.proj.0.weight",
        "layers.1.blocks.1.conv_pos.proj.0.bias",
        "layers.1.blocks.3.attn.relative_position_bias_table",
        "layers.1.blocks.4.attn.relative_position_bias_table",
    }
    assert tiny(**ALL_ON).no_weight_decay() == {
        "layers.0.blocks.0.attn.relative_position_bias_table",
        "layers.0.blocks.1.attn.relative_position_bias_table",
        "layers.1.blocks.0.attn.relative_position_bias_table",
        "layers.1.blocks.3.attn.relative_position_bias_table",
        "layers.1.blocks.4.attn.relative_position_bias_table",
        "layers.1.semantic_token2",
    }


@pytest.mark.parametrize("arguments", [{}, ALL_ON, {"released": False, "shortcut": True}], ids=str)
def test_every_parameter_learns(arguments) -> None:
    model = tiny(**arguments, drop_path_rate=0.1, depths=(2, 12)).train()
    model(torch.randn(8, 3, 32, 32)).square().mean().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_stochastic_depth_is_linear_over_all_blocks() -> None:
    with torch.device("meta"):
        model = xp.create_model("stvit_r_swin_small", drop_path_rate=0.3)
    rates = [getattr(b.drop_path, "drop_prob", 0.0) for s in model.layers for b in s.blocks]
    assert rates == pytest.approx([0.3 * i / 23 for i in range(24)], abs=1e-6)


def test_the_first_drop_path_of_block_1_belongs_to_its_shortcut() -> None:
    x = torch.randn(2, 8, 8, 16)
    for shortcut in (False, True):
        block = tiny(shortcut=shortcut).layers[1].blocks[1]
        whole = copy.deepcopy(block).eval()
        block.drop_path = DropPath(1.0)  # drops every branch
        with torch.no_grad():
            whole.layer_scale_2.zero_()
            if shortcut:
                whole.layer_scale_1.zero_()
            assert torch.allclose(block.train()(x), whole(x), atol=1e-6)


# ---------------------------------------------------------------------- sizes and maps


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 70), st.integers(1, 70), st.booleans(), st.sampled_from([1, 3, 4]))
def test_any_size_and_any_number_of_channels_run(height, width, detection, channels) -> None:
    model = tiny(img_size=(height, width), in_chans=channels, detection=detection)
    images = torch.randn(1, channels, height, width)
    with torch.no_grad():
        logits, maps = model(images), model.forward_intermediates(images, intermediates_only=True)
        model(torch.randn(1, channels, 40, 28))  # not the size that windows were laid out for
    assert logits.shape == (1, 5)
    assert [m.shape[2:] for m in maps] == [
        (-(-height // stride), -(-width // stride)) for stride in (2, 4)
    ]
    assert all(torch.isfinite(m).all() for m in maps)


def test_windows_are_cut_to_small_maps_except_in_detection() -> None:
    with torch.device("meta"):
        small, dense = (xp.create_model("stvit_r_swin_tiny", img_size=(224, 96), detection=d)
                        for d in (False, True))  # fmt: skip
    assert [s.blocks[0].attn.window for s in small.layers] == [(7, 7), (7, 7), (6, 6), (3, 3)]
    assert [s.blocks[1].attn.shift for s in (small.layers[0], small.layers[3])] == [(3, 3), (0, 0)]
    assert {s.blocks[0].attn.window for s in dense.layers} == {(7, 7)}
    assert dense.layers[3].blocks[1].attn.shift == (3, 3)
    spec = dense.layers[2].spec
    assert (spec.generate, spec.refine, spec.recover) == ((3, 3), (7, 7), (12, 12))
    assert (spec.append, spec.shortcut, spec.kernel) == (False, True, None)


def test_detection_delivers_every_stages_map_normalised() -> None:
    name, arguments = "stvit_r_micro_32", {"detection": True, "img_size": (40, 56)}
    net = timm.create_model(name, features_only=True, **arguments).eval()
    assert net.feature_info.channels() == [32, 64, 128]
    assert net.feature_info.reduction() == [2, 4, 8]
    with torch.no_grad():
        maps = net(torch.randn(2, 3, 40, 56))
    assert [tuple(m.shape) for m in maps] == [(2, 32, 20, 28), (2, 64, 10, 14), (2, 128, 5, 7)]
    for found in maps:
        assert found.mean(1).abs().max() < 1e-5
        assert found.var(1, unbiased=False).mean() == pytest.approx(1, abs=0.01)
    first = timm.create_model(name, features_only=True, out_indices=(0, 1), **arguments)
    names = {n.partition(".")[0] for n, _ in first.model.named_parameters()}
    assert names == {"patch_embed", "layers", "norm0", "norm1"}


def test_intermediates_agree_with_the_final_map() -> None:
    for detection in (False, True):
        model, images = tiny(detection=detection), torch.randn(2, 3, 32, 32)
        with torch.no_grad():
            final, maps = model.forward_intermediates(images, norm=True)
            assert torch.equal(maps[1].permute(0, 2, 3, 1), final)
            assert torch.equal(final, model.forward_features(images))
            pruned = copy.deepcopy(model)
            assert pruned.prune_intermediate_layers([0]) == [0]
            (first,) = pruned.forward_intermediates(images, [0], intermediates_only=True)
            raw = model.forward_intermediates(images, [0], intermediates_only=True)
            assert torch.equal(first, raw[0])
    with pytest.raises(ValueError, match="expected NCHW or NHWC"):
        model.forward_intermediates(images, output_fmt="NLC")


def test_weights_of_another_size_and_of_a_detector() -> None:
    small = tiny(**ALL_ON)
    large = tiny(**ALL_ON, img_size=48)
    xp.load_released(large, small.state_dict())
    assert large.layers[1].semantic_token2.shape == (1, 36, 16)
    table = "blocks.4.attn.relative_position_bias_table"
    assert large.state_dict()[f"layers.1.{table}"].shape == (11 * 11, 2)
    state = {f"backbone.{n}": v for n, v in small.state_dict().items()} | {"neck.x": torch.ones(2)}
    state["backbone.layers.0.blocks.1.attn_mask"] = torch.zeros(4, 16, 16)
    state["backbone.layers.0.blocks.1.attn.relative_position_index"] = torch.zeros(16, 16)
    given = checkpoint_filter_fn({"state_dict": state}, small)
    assert list(given) == list(small.state_dict())
    odd = dict(small.state_dict()) | {"layers.1.blocks.4.attn.relative_position_bias_table":
                                      torch.zeros(50, 2)}  # fmt: skip
    with pytest.raises(ValueError, match=r"is \(50, 2\), the model's is \(49, 2\)"):
        xp.load_released(small, odd)


# ---------------------------------------------------------------------- graphs


@pytest.mark.long
def test_compiles_into_one_graph() -> None:
    model = tiny(img_size=(36, 28), detection=True, **ALL_ON)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    images = torch.randn(2, 3, 36, 28)
    with torch.no_grad():
        assert torch.allclose(compiled(images), model(images), atol=1e-5)
    torch.compiler.reset()


class Short(torch.nn.Module):
    """The blocks that cut maps in ways of their own: shifted windows, blocks 1 and 5 of a unit."""

    def __init__(self, model: STViTR) -> None:
        super().__init__()
        self.swin, blocks = model.layers[0].blocks[1], model.layers[1].blocks
        self.generate, self.recover = blocks[1], blocks[5]
        self.merge = model.layers[0].downsample

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.merge(self.swin(x))
        return self.recover(x, self.generate(x))


@pytest.mark.long
def test_onnx_runtime_gives_torchs_numbers_for_any_batch() -> None:
    """Whole networks are among the families of `tests/deploy/test_export.py`."""
    model = Short(tiny(neighbourhoods=(6, None, 6), shortcut=True)).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    example = torch.randn(3, 17, 14, 8)
    program = torch.export.export(model, (example,), dynamic_shapes=({0: batch},))
    written = to_onnx(program).SerializeToString()
    session = onnxruntime.InferenceSession(written, providers=["CPUExecutionProvider"])
    for count in (1, 2, 5):
        x = torch.randn(count, 17, 14, 8)
        (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        with torch.no_grad():
            expected = model(x).numpy()
        assert np.abs(got - expected).max() < 1e-5


# ---------------------------------------------------------------------- names and refusals


def test_names_and_what_they_are() -> None:
    assert set(xp.list_models("stvit_r*")) == {*VARIANTS, *SMALL}
    with torch.device("meta"):
        assert xp.create_model("stvit_r_micro_32", num_classes=3).img_size == (32, 32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depths": (2, 4)}, "multiple of 6"),
        ({"semantic_stage": 2}, "multiple of 6"),
        ({"borders": "mirrored"}, "expected one of shifted, padded"),
        ({"patch_size": 3}, "the stem takes 2 or 4"),
        ({"num_heads": (2,)}, "num_heads has 1 entries for 2 stages"),
        ({"num_heads": (2, 3)}, "16 must divide by 3 heads"),
        ({"neighbourhoods": (None, 6, 6)}, "the first is a number"),
        ({"global_pool": "token"}, "expected '', 'avg' or 'max'"),
    ],
)
def test_shapes_that_do_not_agree_are_named(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**arguments)
