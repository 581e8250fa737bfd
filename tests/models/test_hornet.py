"""HorNet: the authors' numbers, the order of a gated convolution, filters of any size."""

from __future__ import annotations

import copy

import onnxruntime
import pytest
import torch
import torch.nn.functional as F

import crosspatch as xp
from crosspatch.deploy.graph import to_onnx
from crosspatch.errors import UsageError
from crosspatch.layers.spectrum import products, resize_filter, transforms
from crosspatch.metrics.macs import count_macs
from crosspatch.models import hornet_gnconv
from crosspatch.models.hornet import VARIANTS, HorNet, checkpoint_filter_fn
from crosspatch.models.hornet_gnconv import GlobalLocalFilter, GnConv
from support import goldens

PRETRAINED = 10_450  # classes with which the authors count the large models


def tiny(**arguments) -> HorNet:
    torch.manual_seed(0)
    model = HorNet(
        **{
            "img_size": 32,
            "patch_size": 2,
            "num_classes": 5,
            "base_dim": 8,
            "depths": (1, 1, 1),
            "orders": (1, 2, 3),
            "layer_scale_init_value": 0.5,
            **arguments,
        }
    ).eval()
    for value in model.parameters():
        value.data.add_(0.1 * torch.randn_like(value))
    return model


def filter_of(dim: int = 6, size=(8, 8)) -> GlobalLocalFilter:
    torch.manual_seed(0)
    made = GlobalLocalFilter(dim, size).eval()
    made.complex_weight.data.normal_()
    return made


# ---------------------------------------------------------------------- the authors' numbers


@pytest.mark.parametrize("name", ["hornet_tiny_7x7", "hornet_tiny_gf"])
def test_a_released_model_computes_what_the_authors_code_computes(name) -> None:
    golden = goldens.read(f"hornet/{name}")
    model = HorNet.from_authors(name, **golden.meta["build"]).eval()
    xp.load_released(model, {"model": golden.state_dict})
    with torch.no_grad():
        assert goldens.relative_error(model(golden.images), golden.outputs["out"]) < 1e-4
    assert sum(p.numel() for p in model.parameters()) == golden.meta["params"]
    if name.endswith("gf"):
        weight = "stages.2.0.gnconv.dwconv.complex_weight"
        state = golden.state_dict | {weight: -golden.state_dict[weight]}
        xp.load_released(model, state)
        with torch.no_grad():
            assert goldens.relative_error(model(golden.images), golden.outputs["out"]) > 1e-3


@pytest.mark.parametrize(
    ("name", "parameters", "macs"),
    [
        ("hornet_tiny_7x7", 22.409512, 4.0),
        ("hornet_tiny_gf", 22.991848, 3.9),
        ("hornet_small_7x7", 49.5, 8.8),
        ("hornet_small_gf", 50.4, 8.7),
        ("hornet_base_7x7", 87.3, 15.6),
        ("hornet_base_gf", 88.4, 15.5),
        ("hornet_large_7x7", 209, 34.8),
        ("hornet_large_gf", 211, 34.7),
        ("hornet_large_gf_img384", 216, 101.8),
    ],
)
def test_sizes(name, parameters, macs) -> None:
    with torch.device("meta"):
        model = xp.create_model(name, num_classes=PRETRAINED if "large" in name else 1000)
    found = sum(p.numel() for p in model.parameters()) / 1e6
    assert found == pytest.approx(parameters, rel=1e-3 if parameters < 200 else 2e-3)
    shape = (3, *model.img_size)
    assert count_macs(model, shape) / 1e9 == pytest.approx(macs, rel=0.01)


def test_every_variant_has_the_filters_of_its_size() -> None:
    for name, arguments in VARIANTS.items():
        with torch.device("meta"):
            model = xp.create_model(name)
        assert model.img_size == ((384, 384) if "384" in name else (224, 224))
        found = {
            tuple(m.complex_weight.shape[1:3])
            for m in model.modules()
            if isinstance(m, GlobalLocalFilter)
        }
        expected = {(24, 13), (12, 7)} if "384" in name else {(14, 8), (7, 4)}
        assert found == (expected if arguments.get("gf_stages") else set())


def test_weights_of_another_size_answer_as_if_interpolated_on_the_fly() -> None:
    model = tiny(gf_stages=(1, 2))
    state = {f"stages.{n}.{k}": v for n, k, v in _blocks(model)} | _rest(model)
    other = tiny(gf_stages=(1, 2), img_size=(48, 40))
    xp.load_released(other, {"model": state})
    x = torch.randn(2, 3, 48, 40)
    with torch.no_grad():
        torch.testing.assert_close(other(x), model(x), rtol=1e-4, atol=1e-5)
    own = checkpoint_filter_fn(other.state_dict(), other)  # its own names pass through
    assert all(torch.equal(own[name], value) for name, value in other.state_dict().items())


def _blocks(model: HorNet):
    for name, value in model.state_dict().items():
        if ".blocks." in name:
            stage, _, rest = name.removeprefix("stages.").partition(".blocks.")
            yield stage, rest, value


def _rest(model: HorNet) -> dict[str, torch.Tensor]:
    """What is no block, under the authors' names."""
    state = {}
    for name, value in model.state_dict().items():
        if ".downsample." in name:
            stage, _, rest = name.removeprefix("stages.").partition(".downsample.")
            state[f"downsample_layers.{stage}.{rest}"] = value
        elif name.startswith("stem."):
            state[name.replace("stem.", "downsample_layers.0.")] = value
        elif not name.startswith("stages."):
            state[name.replace("norm_head.", "norm.")] = value
    return state


# ---------------------------------------------------------------------- the gated convolution


@pytest.mark.parametrize("order", [1, 2, 3, 4, 5])
def test_a_gated_convolution_is_homogeneous_of_its_order_and_one(order) -> None:
    torch.manual_seed(0)
    made = GnConv(32, order).double()
    for name, value in made.named_parameters():
        if name.endswith("bias"):
            value.data.zero_()
    x = torch.randn(1, 32, 9, 8, dtype=torch.float64)
    torch.testing.assert_close(made(2 * x), 2 ** (order + 1) * made(x), rtol=1e-12, atol=0)


def test_higher_orders_cost_little() -> None:
    expected = [0.1591, 0.1872, 0.1949, 0.1971, 0.1978, 0.1980]
    with torch.device("meta"):
        found = [count_macs(GnConv(512, n), (512, 14, 14)) / 1e9 for n in range(1, 7)]
    assert found == pytest.approx(expected, abs=6e-5)
    bound = 14 * 14 * 512 * (2 * 7**2 + 11 / 3 * 512 + 2) / 1e9
    assert max(found) < bound == pytest.approx(0.1984, abs=6e-5)


def test_a_gated_convolution_step_by_step() -> None:
    torch.manual_seed(0)
    made = GnConv(8, 3, kernel_size=3, scale=0.5)
    x = torch.randn(2, 8, 5, 6)
    inside = made.proj_in(x)
    parts = 0.5 * made.dwconv(inside[:, 2:])
    h = inside[:, :2] * parts[:, :2]
    h = made.pws[0](h) * parts[:, 2:6]
    h = made.pws[1](h) * parts[:, 6:]
    torch.testing.assert_close(made(x), made.proj_out(h))
    assert made.widths == [2, 4, 8]


def test_a_gated_convolution_moves_with_the_picture() -> None:
    made = GnConv(8, 3).eval()
    x = torch.randn(1, 8, 20, 20)
    moved = made(torch.roll(x, (1, 2), dims=(2, 3)))
    expected = torch.roll(made(x), (1, 2), dims=(2, 3))
    torch.testing.assert_close(moved[..., 5:-5, 5:-5], expected[..., 5:-5, 5:-5])
    far = filter_of()
    near = torch.randn(1, 3, 8, 8)
    moved = transforms(torch.roll(near, 3, dims=2), far.resized((8, 5)))
    expected = torch.roll(transforms(near, far.resized((8, 5))), 3, dims=2)
    torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-5)  # borders are circular


def test_fp16_autocast_leaves_the_mixer_in_fp32() -> None:
    torch.manual_seed(0)
    made = GnConv(8, 3)
    x = 100 * torch.randn(1, 8, 6, 6)
    with torch.autocast("cpu", dtype=torch.float16):
        found = made(x)
    assert found.dtype == torch.float32
    assert torch.equal(found, made(x))
    made = GnConv(8, 3, filter_size=6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert made(x).dtype == torch.bfloat16


# ---------------------------------------------------------------------- the global filter


@pytest.mark.parametrize("size", [(8, 8), (7, 7), (1, 1), (5, 12), (2, 3)])
def test_products_with_waves_are_the_fourier_transforms(size) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, *size)
    weight = torch.randn(3, size[0], size[1] // 2 + 1, 2)
    torch.testing.assert_close(products(x, weight), transforms(x, weight), rtol=1e-4, atol=1e-5)


def test_a_filter_is_interpolated_with_corners_aligned() -> None:
    weight = torch.randn(3, 4, 3, 2)
    found = resize_filter(weight, (7, 5))
    torch.testing.assert_close(found[:, ::2, ::2], weight)
    torch.testing.assert_close(found[:, 1, 0], (weight[:, 0, 0] + weight[:, 1, 0]) / 2)


def test_half_of_the_channels_are_local_and_take_turns() -> None:
    made = filter_of(4, (6, 6))
    made.post_norm = torch.nn.Identity()
    x = torch.randn(1, 4, 6, 6)
    near, far = made.pre_norm(x).chunk(2, dim=1)
    with torch.no_grad():
        found = made(x)
        torch.testing.assert_close(found[:, ::2], made.dw(near))
        weight = torch.view_as_complex(made.complex_weight.detach())
        mixed = torch.fft.irfft2(torch.fft.rfft2(far) * weight, s=(6, 6))
    torch.testing.assert_close(found[:, 1::2], mixed)


def test_a_filter_is_interpolated_once_per_size_and_anew_where_it_changed(monkeypatch) -> None:
    calls = []

    def counted(weight, size):
        calls.append(size)
        return resize_filter(weight, size)

    monkeypatch.setattr(hornet_gnconv, "resize_filter", counted)
    made, x = filter_of(), torch.randn(1, 6, 12, 10)
    with torch.no_grad():
        first = made(x)
        assert torch.equal(made(x), first)
        made(x[..., :6])
        made(x)
        assert calls == [(12, 6), (12, 4)]
        made(torch.randn(1, 6, 8, 8))  # its own size
        assert len(calls) == 2
        made.complex_weight.mul_(-1)
        assert not torch.allclose(made(x), first)
        made.complex_weight.mul_(-1)
        assert torch.equal(made(x), first)
        made.load_state_dict({k: 0 * v for k, v in made.state_dict().items()}, assign=True)
        assert not made(x).any()
    with torch.inference_mode():
        assert not made(x).any()
    made = filter_of()
    made(x).sum().backward()
    assert made.complex_weight.grad.abs().sum() > 0
    twin = copy.deepcopy(made)
    assert "_kept" not in twin.state_dict()
    with torch.no_grad():
        assert torch.equal(twin(x), made(x))


def test_filters_of_another_size_compile_and_export() -> None:
    model, x = filter_of(), torch.randn(2, 6, 11, 7)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)
        with torch.autocast("cpu", dtype=torch.float16):
            assert compiled(x).isfinite().all()
    torch.compiler.reset()
    batch = torch.export.Dim("batch", min=1, max=8)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x[:1]), expected[:1], rtol=1e-4, atol=1e-5)
    graph = to_onnx(program).SerializeToString()
    session = onnxruntime.InferenceSession(graph)
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------- the network


def test_the_head_norms_what_is_pooled() -> None:
    model = tiny()
    with torch.no_grad():
        features = model.forward_features(torch.randn(2, 3, 32, 40))
        assert features.shape == (2, 32, 4, 5)
        expected = F.layer_norm(
            features.mean(dim=(2, 3)), (32,), model.norm_head.weight, model.norm_head.bias, 1e-6
        )
        torch.testing.assert_close(model.forward_head(features, pre_logits=True), expected)
        model.reset_classifier(0, "")
        assert model(torch.randn(2, 3, 32, 40)).shape == (2, 32, 4, 5)


def test_options_of_the_constructor() -> None:
    model = tiny(layer_scale_init_value=None, uniform_init=True, head_init_scale=0.0, scale=1.0)
    assert model.stages[0].blocks[0].gamma1 is None
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 5)
    torch.manual_seed(0)
    assert not HorNet(**SMALLEST, head_init_scale=0.0).head.weight.any()
    rates = [b.drop_path.drop_prob for s in HorNet(**SMALLEST, drop_path_rate=0.2).stages
             for b in s.blocks]  # fmt: skip
    assert rates == pytest.approx([0.0, 0.1, 0.2])


SMALLEST = {"img_size": 32, "base_dim": 8, "depths": (1, 1, 1), "orders": (1, 1, 1)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"base_dim": 6, "orders": (3, 1, 1)}, "2\\^\\(order-1\\)"),
        ({"orders": (0, 1, 1)}, "order of 1 or more"),
        ({"orders": (1, 1)}, "orders has 2 entries for 3 stages"),
        ({"gf_stages": (3,)}, "stages 0 to 2"),
        ({"base_dim": 5, "orders": (1, 1, 1), "gf_stages": (0,)}, "even number"),
        ({"kernel_size": 4}, "odd"),
        ({"img_size": 7}, "sides of 8"),
        ({"global_pool": "mean"}, "global_pool"),
    ],
)
def test_impossible_shapes_are_refused(arguments, message) -> None:
    with pytest.raises(UsageError, match=message):
        xp.create_model("hornet_micro_32", **arguments)
