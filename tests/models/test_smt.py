"""SMT: the authors' numbers, modulation and attention against loops, layer scales, sizes."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F

import crosspatch as xp
from crosspatch.errors import DataError, UsageError
from crosspatch.metrics.macs import count_macs
from crosspatch.models.smt import SMT, depths_of
from crosspatch.models.smt_blocks import Attention, ConvMlp, ScaleAwareModulation
from support import goldens

GOLDENS = ["smt_t", "smt_custom_layerscale_64"]


def tiny(**arguments) -> SMT:
    torch.manual_seed(0)
    return xp.create_model("smt_micro_32", **{"num_classes": 5, **arguments}).eval()


def kinds(model: SMT) -> list[str]:
    letters = {ScaleAwareModulation: "s", Attention: "a"}
    return ["".join(letters[type(b.attn)] for b in stage.blocks) for stage in model.stages]


# ---------------------------------------------------------------------- the authors' numbers


@pytest.fixture(scope="module", params=GOLDENS)
def golden(request):
    return goldens.read(f"smt/{request.param}")


def built(golden, **arguments) -> SMT:
    return SMT.from_authors(**golden.meta["build"], **arguments).eval()


def test_the_authors_logits_and_what_a_changed_part_does_to_them(golden) -> None:
    model, state = built(golden), golden.state_dict
    assert sum(p.numel() for p in model.parameters()) == golden.meta["params"]
    xp.load_released(model, {"model": state})
    with torch.no_grad():
        assert goldens.relative_error(model(golden.images), golden.outputs["out"]) < 1e-4
    model.stages[2].norm.eps = 1e-5
    model.stages[2].blocks[0].norm1.eps = 1e-3
    name = "block3.0.attn.local_conv_4.weight"
    xp.load_released(model, state | {name: -state[name]})
    with torch.no_grad():
        assert goldens.relative_error(model(golden.images), golden.outputs["out"]) > 1e-3


def test_layer_scales_go_into_the_layers_before_them() -> None:
    golden = goldens.read(f"smt/{GOLDENS[1]}")
    state = golden.state_dict
    build = {**golden.meta["build"], "use_layerscale": False}
    model = xp.load_released(SMT.from_authors(**build), state).eval()
    assert model.stages[0].blocks[0].gamma_1 is None
    with torch.no_grad():
        assert goldens.relative_error(model(golden.images), golden.outputs["out"]) < 1e-4


@pytest.mark.parametrize(
    ("name", "parameters", "macs", "arguments"),
    [
        ("t", 11.51, 2.46, {}),
        ("s", 22.55, 4.84, {}),
        ("s", 20.43, 4.73, {"depths": (3, 4, 18, 1)}),
        ("b", 32.04, 7.97, {}),
        ("l", 80.59, 17.91, {}),
    ],
)
def test_parameters_and_macs(name, parameters, macs, arguments) -> None:
    with torch.device("meta"):
        model = xp.create_model(f"smt_{name}", **arguments)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(parameters, abs=6e-3)
    assert count_macs(model, (3, 224, 224)) / 1e9 == pytest.approx(macs, abs=6e-3)


def test_the_sheets_counts_of_t() -> None:
    with torch.device("meta"):
        model = xp.create_model("smt_t")
    assert sum(p.numel() for p in model.parameters()) == 11_506_536
    assert kinds(model) == ["ss", "ss", "sasasasa", "a"]
    assert sum(p.numel() for p in model.stages[0].blocks[0].attn.parameters()) == 24_320
    small, large = (count_macs(model, (3, side, side)) for side in (224, 448))
    assert large / small == pytest.approx(4.395, abs=1e-3)


def test_the_macs_of_modulation_grow_with_the_pixels() -> None:
    sam = ScaleAwareModulation(16, 4, 2, qkv_bias=True, proj_drop=0.0)
    counts = []
    for side in (8, 16):
        x = torch.zeros(1, side, side, 16)
        with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
            sam(x)
        counts.append(counter.get_total_flops())
    assert counts[1] == 4 * counts[0]


# ---------------------------------------------------------------------- the parts


def test_modulation_is_that_of_a_loop_over_channels() -> None:
    torch.manual_seed(0)
    heads, dim, expand, part = 3, 12, 2, 4
    sam = ScaleAwareModulation(dim, heads, expand, qkv_bias=True, proj_drop=0.0).eval()
    sam.bn.running_mean.normal_()
    sam.bn.running_var.uniform_(0.5, 2)
    x = torch.randn(1, 5, 7, dim)
    with torch.no_grad():
        s, v = sam.s(x)[0], sam.v(x)[0]
        mixed = torch.zeros(dim, 5, 7)
        for i in range(heads):
            conv = sam.get_submodule(f"local_conv_{i + 1}")
            assert conv.kernel_size == (3 + 2 * i, 3 + 2 * i)
            for j in range(part):
                one = s[None, None, ..., i * part + j]
                out = F.conv2d(one, conv.weight[j : j + 1], conv.bias[j : j + 1], 1, 1 + i)
                mixed[j * heads + i] = out[0, 0]
        wide = torch.zeros(expand * dim, 5, 7)
        for out in range(expand * dim):
            group = out // (expand * heads)
            inputs = mixed[group * heads : (group + 1) * heads]
            weight = sam.proj0.weight[out, :, 0, 0]
            wide[out] = (weight[:, None, None] * inputs).sum(dim=0) + sam.proj0.bias[out]
        m = torch.einsum("oc,chw->hwo", sam.proj1.weight[..., 0, 0], F.gelu(sam.bn(wide[None])[0]))
        expected = sam.proj((m + sam.proj1.bias) * v)
        torch.testing.assert_close(sam(x)[0], expected, rtol=1e-4, atol=1e-5)


def test_attention_adds_a_convolution_of_the_values() -> None:
    torch.manual_seed(0)
    attention = Attention(8, 2, qkv_bias=True, attn_drop=0.0, proj_drop=0.0).eval()
    x = torch.randn(1, 4, 3, 8)
    with torch.no_grad():
        tokens = x.reshape(12, 8)
        q, (k, v) = attention.q(tokens), attention.kv(tokens).chunk(2, dim=-1)
        found = torch.zeros(12, 8)
        for part in (slice(0, 4), slice(4, 8)):
            found[:, part] = (q[:, part] @ k[:, part].T / 2).softmax(-1) @ v[:, part]
        values = v.T.reshape(1, 8, 4, 3)
        weight, bias = attention.local_conv.weight, attention.local_conv.bias
        near = F.conv2d(values, weight, bias, 1, 1, 1, 8)[0].flatten(1).T
        expected = attention.proj(found + near).reshape(1, 4, 3, 8)
        torch.testing.assert_close(attention(x), expected, rtol=1e-4, atol=1e-5)


def test_the_convolution_of_a_perceptron_is_added_before_the_activation() -> None:
    mlp = ConvMlp(2, 6)
    torch.nn.init.zeros_(mlp.dwconv.weight)
    torch.nn.init.ones_(mlp.dwconv.bias)
    x = torch.randn(1, 3, 4, 2)
    assert torch.allclose(mlp(x), mlp.fc2(F.gelu(mlp.fc1(x) + 1)), atol=1e-6)


def test_the_two_epsilons_and_the_first_values() -> None:
    model = xp.create_model("smt_micro_32", layer_scale=1e-4)
    eps = {name: m.eps for name, m in model.named_modules() if isinstance(m, torch.nn.LayerNorm)}
    outer = {"stem.norm", "stages.1.downsample.norm", "stages.2.downsample.norm"}
    assert {name for name, value in eps.items() if value == 1e-5} == outer
    assert {value for name, value in eps.items() if name not in outer} == {1e-6}
    assert torch.equal(model.stages[1].blocks[1].gamma_2, torch.full((48,), 1e-4))
    conv = model.stages[0].blocks[0].attn.local_conv_4
    assert float(conv.weight.detach().std()) == pytest.approx((2 / 81) ** 0.5, rel=0.2)


# ---------------------------------------------------------------------- the whole


def test_which_mixers_the_authors_arguments_mean() -> None:
    small = {"embed_dims": [8] * 4, "sa_num_heads": [2] * 4, "ca_num_heads": [2] * 4}
    model = SMT.from_authors(**small, depths=[1, 2, 3, 2], ca_attentions=[1, 0, 1, 0])
    assert kinds(model) == ["s", "aa", "sas", "aa"]
    mlp, attn = model.stages[0].blocks[0].mlp, model.stages[3].blocks[0].attn
    assert mlp.fc1.out_features == 64
    assert attn.q.bias is None
    assert kinds(SMT(**small, depths=(1, 2, 1, 3), mixers=("alternate",) * 4)) == [
        "s", "sa", "s", "sas",
    ]  # fmt: skip


def test_the_pyramid_is_of_normed_maps() -> None:
    features = timm.create_model("smt_micro_32", features_only=True, out_indices=(0, 1, 2))
    maps = features(torch.randn(1, 3, 32, 32))
    assert [m.shape[1:] for m in maps] == [(24, 16, 16), (48, 8, 8), (96, 4, 4)]
    for found in maps:
        assert found.mean(dim=1).abs().max() < 1e-5
    model = tiny()
    model.reset_classifier(0, "")
    assert model(torch.zeros(1, 3, 37, 45)).shape == (1, 5, 6, 96)


def test_a_file_of_other_depths_says_which() -> None:
    golden = goldens.read(f"smt/{GOLDENS[1]}")
    state = golden.state_dict
    assert depths_of(state) == (1, 1, 4, 1)
    with pytest.raises(DataError, match=r"build the model with depths=\(1, 1, 4, 1\)"):
        xp.load_released(tiny(), {"model": state})
    del state["block1.0.attn.local_conv_2.bias"]
    with pytest.raises(DataError, match=r"missing: stages\.0\.blocks\.0\.attn\.local_conv_2\.bias"):
        xp.load_released(built(golden), state)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ca_num_heads": (5, 4, -1)}, "stage 0: a width of 24 must divide by 5 heads"),
        ({"sa_num_heads": (-1, -1, 8)}, "stage 1: a width of 48 must divide by -1 heads"),
        ({"depths": (1, 1)}, "embed_dims has 3 entries for 2 stages"),
        ({"mixers": ("sam", "both", "attention")}, "expected one of sam"),
        ({"patch_size": 8}, "the stem takes 2 or 4"),
        ({"global_pool": "token"}, "global_pool"),
    ],
)
def test_shapes_that_do_not_agree_are_refused(arguments, message) -> None:
    with pytest.raises(UsageError, match=message):
        tiny(**arguments)
