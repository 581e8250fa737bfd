"""CvT: the authors' numbers, attention against a loop, class tokens, poolings, any size."""

from __future__ import annotations

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from timm.layers import DropPath

import crosspatch as xp
from crosspatch.layers.linear import switched
from crosspatch.metrics.macs import count_macs
from crosspatch.models.cvt import CvT, checkpoint_filter_fn
from crosspatch.models.cvt_blocks import ConvAttention, Tokens
from support import goldens

GOLDENS = ["cvt_13_224", "cvt_13_200x168"]
SPEC = {
    "NUM_STAGES": 2, "PATCH_SIZE": [3, 3], "PATCH_STRIDE": [2, 2], "PATCH_PADDING": [1, 1],
    "DIM_EMBED": [8, 16], "NUM_HEADS": [1, 2], "DEPTH": [1, 2], "MLP_RATIO": [2.0, 2.0],
    "QKV_PROJ_METHOD": ["dw_bn", "dw_bn"], "CLS_TOKEN": [False, True],
}  # fmt: skip


def tiny(**spec) -> CvT:
    """Two stages, batch norms and biases that can be seen."""
    torch.manual_seed(0)
    model = CvT.from_authors(img_size=24, num_classes=5, **(SPEC | spec)).eval()
    for name, value in model.state_dict().items():
        if name.endswith(("bias", "running_mean", "cls_token")):
            value.normal_(std=0.3)
        if name.endswith("running_var"):
            value.uniform_(0.5, 2)
    return model


# ---------------------------------------------------------------------- the authors' numbers


@pytest.fixture(scope="module")
def weights():
    return goldens.read("cvt/cvt_13_224").state_dict


@pytest.mark.parametrize("name", GOLDENS)
def test_the_authors_logits(name, weights) -> None:
    golden = goldens.read(f"cvt/{name}")
    model = CvT.from_authors(**golden.meta["build"]).eval()
    xp.load_released(model, {"state_dict": {f"module.{k}": v for k, v in weights.items()}})
    for products in ("off", "on") if name == GOLDENS[1] else ("off",):
        with torch.no_grad(), switched(products):
            found = model(golden.images)
        assert goldens.relative_error(found, golden.outputs["out"]) < 1e-4
    assert sum(p.numel() for p in model.parameters()) == golden.meta["params"]


@pytest.mark.parametrize("changed", ["scale", "stage1.blocks.1.attn.conv_proj_k.conv.weight"])
def test_a_golden_notices_what_is_changed(changed, weights) -> None:
    golden = goldens.read("cvt/cvt_13_200x168")
    model = xp.create_model("cvt_13").eval()
    if changed == "scale":
        for module in model.modules():
            if isinstance(module, ConvAttention):
                module.scale = 64**-0.5
    else:
        weights = weights | {changed: -weights[changed]}
    xp.load_released(model, weights)
    with torch.no_grad():
        found = model(golden.images)
    assert goldens.relative_error(found, golden.outputs["out"]) > 1e-3


def in_the_hub(name: str) -> str:
    """The name that Transformers gives to one of the authors."""
    name = re.sub(r"^norm\.", "layernorm.", re.sub(r"^head\.", "classifier.", name))
    name = re.sub(r"^stage(\d)\.", r"cvt.encoder.stages.\1.", name)
    inside = ".attention.attention."
    words = {"q": "query", "k": "key", "v": "value"}
    for letter, word in words.items():
        conv = f"{inside}convolution_projection_{word}.convolution_projection."
        name = name.replace(f".attn.conv_proj_{letter}.conv.", f"{conv}convolution.")
        name = name.replace(f".attn.conv_proj_{letter}.bn.", f"{conv}normalization.")
        name = name.replace(f".attn.proj_{letter}.", f"{inside}projection_{word}.")
    for mine, theirs in {
        ".attn.proj.": ".attention.output.dense.",
        ".mlp.fc1.": ".intermediate.dense.",
        ".mlp.fc2.": ".output.dense.",
        ".norm1.": ".layernorm_before.",
        ".norm2.": ".layernorm_after.",
        ".patch_embed.proj.": ".embedding.convolution_embeddings.projection.",
        ".patch_embed.norm.": ".embedding.convolution_embeddings.normalization.",
        ".blocks.": ".layers.",
    }.items():
        name = name.replace(mine, theirs)
    return name


def test_weights_of_the_hub_load(weights) -> None:
    with torch.device("meta"):
        model = xp.create_model("cvt_13")
    theirs = {in_the_hub(name): value for name, value in weights.items()}
    assert "cvt.encoder.stages.2.cls_token" in theirs
    assert not any("blocks" in name or "stage0" in name for name in theirs)
    found, expected = checkpoint_filter_fn(theirs, model), checkpoint_filter_fn(weights, model)
    assert set(found) == set(model.state_dict())
    assert all(found[name] is value for name, value in expected.items())


@pytest.mark.parametrize(
    ("name", "parameters", "macs"),
    [
        ("cvt_13", 19_997_480, 4.57),
        ("cvt_21", 31_622_696, 7.18),
        ("cvt_13_384", 19_997_480, 16.27),
        ("cvt_21_384", 31_622_696, 24.85),
        ("cvt_w24", 277_196_392, 194.22),
    ],
)
def test_parameters_and_macs(name, parameters, macs) -> None:
    """W24: the authors' table says 193.2 G."""
    with torch.device("meta"):
        model = xp.create_model(name)
        assert sum(p.numel() for p in model.parameters()) == parameters
        assert count_macs(model, (3, *model.img_size)) / 1e9 == pytest.approx(macs, abs=0.006)
    assert model.default_cfg["pool_size"] == (model.img_size[0] // 16,) * 2


# ---------------------------------------------------------------------- attention


@pytest.mark.parametrize(("stride", "macs"), [(1, 1315.6), (2, 349.5)])
def test_strided_keys_cost_a_quarter(stride, macs) -> None:
    with torch.device("meta"):
        model = CvT(depths=(1,), embed_dim=(64,), num_heads=1, patch_size=7, patch_stride=4,
                    patch_padding=2, stride_kv=stride, cls_token=False)  # fmt: skip
        attention, x = model.stages[0].blocks[0].attn, torch.zeros(1, 56 * 56, 64)

        class Layer(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = attention

            def forward(self, picture):
                return self.layer(x, (56, 56), 0)

        assert count_macs(Layer(), (1,)) / 1e6 == pytest.approx(macs, abs=0.06)


def naive(attention: ConvAttention, x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Attention of one sample (1 + H * W, C), with a class token, head by head."""
    dim, found = x.shape[1], {}
    for name in "qkv":
        conv, bn = getattr(attention, f"conv_proj_{name}")
        grid = x[1:].T.reshape(1, dim, *size)
        grid = F.conv2d(grid, conv.weight, None, conv.stride, conv.padding, groups=dim)
        grid = (grid[0].flatten(1).T - bn.running_mean) / (bn.running_var + bn.eps).sqrt()
        tokens = torch.cat([x[:1], grid * bn.weight + bn.bias])
        found[name] = getattr(attention, f"proj_{name}")(tokens)
    heads = []
    for part in torch.arange(dim).chunk(attention.num_heads):
        q, k, v = (found[name][:, part] for name in "qkv")
        heads.append((q @ k.T / dim**0.5).softmax(-1) @ v)
    return attention.proj(torch.cat(heads, dim=1))


def test_attention_is_what_the_sheet_says() -> None:
    attention, size = tiny().stages[1].blocks[0].attn, (5, 3)
    x = torch.randn(2, 16, 16)
    with torch.no_grad():
        found = attention(x, size, 1)
        expected = torch.stack([naive(attention, row, size) for row in x])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("method", ["avg", "linear"])
def test_other_projections(method) -> None:
    model = tiny(QKV_PROJ_METHOD=[method] * 2)
    assert not any("conv_proj" in name for name in model.state_dict())
    attention = model.stages[0].blocks[0].attn
    x = torch.randn(2, 8, 6, 6)
    with torch.no_grad():
        assert model(torch.randn(2, 3, 24, 24)).shape == (2, 5)
        assert torch.equal(attention.conv_proj_q(x), x)
        expected = F.avg_pool2d(x, 3, 2, 1, ceil_mode=True) if method == "avg" else x
        assert torch.equal(attention.conv_proj_v(x), expected)


# ---------------------------------------------------------------------- tokens and poolings


def test_the_head_reads_the_class_token() -> None:
    model, x = tiny(), torch.randn(2, 3, 24, 20)
    with torch.no_grad():
        state = model.stages[1](model.stages[0](model.stem(x)))
        assert isinstance(state, Tokens)
        first, rest = model.norm(state.x).tensor_split([1], dim=1)
        torch.testing.assert_close(model(x), model.head(first[:, 0]))
        found, grid = model.forward_features(x), rest.unflatten(1, (6, 5))
        torch.testing.assert_close(found - found.mean((1, 2), True), grid - grid.mean((1, 2), True))
        for pooling, expected in {"avg": grid.mean((1, 2)), "max": grid.amax((1, 2))}.items():
            model.reset_classifier(0, pooling)
            torch.testing.assert_close(model(x), expected)
        model.reset_classifier(0, "")
        torch.testing.assert_close(model(x), grid)
        model.reset_classifier(3, "token")
        assert model(x).shape == (2, 3)
        assert model(x[:1]).shape == (1, 3)


def test_without_a_class_token_patches_are_averaged() -> None:
    model, x = tiny(CLS_TOKEN=[False, False]), torch.randn(2, 3, 24, 24)
    assert model.global_pool == "avg"
    with torch.no_grad():
        (found,) = model.forward_intermediates(x, [1], output_fmt="NHWC", intermediates_only=True)
        torch.testing.assert_close(model(x), model.head(model.norm(found).mean((1, 2))))
    with pytest.raises(ValueError, match="needs a class token"):
        model.reset_classifier(5, "token")


def test_a_class_token_of_an_earlier_stage_ends_there() -> None:
    model = tiny(CLS_TOKEN=[True, True])
    assert model.no_weight_decay() == {"stages.0.cls_token", "stages.1.cls_token"}
    _, maps = model.forward_intermediates(torch.randn(1, 3, 24, 24))
    assert [m.shape for m in maps] == [(1, 8, 12, 12), (1, 16, 6, 6)]


@pytest.mark.parametrize("size", [(32, 32), (96, 160), (200, 168), (224, 224), (384, 384)])
def test_one_set_of_weights_takes_any_size(size) -> None:
    with torch.device("meta"):
        model = xp.create_model("cvt_13").eval()
        found = model.forward_features(torch.zeros(1, 3, *size))
        assert found.shape == (1, -(-size[0] // 16), -(-size[1] // 16), 384)
        assert model(torch.zeros(1, 3, *size)).shape == (1, 1000)
        other = xp.create_model("cvt_13", img_size=size)
    assert {k: v.shape for k, v in model.state_dict().items()} == {
        k: v.shape for k, v in other.state_dict().items()
    }


def test_positions_can_be_added_and_are_resized() -> None:
    build = {"img_size": (32, 24), "num_classes": 4, "pos_embed": (True, False, True)}
    model = xp.create_model("cvt_micro_32", **build).eval()
    assert model.stages[0].pos_embed.shape == (1, 16 * 12, 32)
    tables = {n for n, _ in model.named_parameters() if n.endswith("pos_embed")}
    assert tables == {"stages.0.pos_embed", "stages.2.pos_embed"} < model.no_weight_decay()
    with torch.no_grad():
        plain = xp.create_model("cvt_micro_32", num_classes=4).eval()
        state = model.state_dict()
        plain.load_state_dict({k: v for k, v in state.items() if k not in tables})
        x = torch.randn(1, 3, 40, 24)
        assert not torch.allclose(model(x), plain(x))
    square = xp.create_model("cvt_micro_32", **(build | {"img_size": 32}))
    wide = xp.create_model("cvt_micro_32", **(build | {"img_size": 64}))
    xp.load_released(wide, square.state_dict())
    assert wide.stages[2].pos_embed.shape == (1, 64, 96)
    assert "POS_EMBED" in goldens.read("cvt/cvt_13_224").meta["build"]


# ---------------------------------------------------------------------- options


def test_drop_path_grows_within_the_last_stage() -> None:
    model = xp.create_model("cvt_micro_32", depths=(2, 2, 3), drop_path_rate=0.2)
    rates = [[m.drop_path.drop_prob if isinstance(m.drop_path, DropPath) else 0 for m in s.blocks]
             for s in model.stages]  # fmt: skip
    assert rates == [[0, 0], [0, 0], [0, pytest.approx(0.1), pytest.approx(0.2)]]
    given = tiny(DROP_PATH_RATE=[0.3, 0.1], DROP_RATE=[0.0, 0.25], ATTN_DROP_RATE=[0.0, 0.5])
    assert given.stages[1].blocks[1].drop_path.drop_prob == pytest.approx(0.1)
    assert given.stages[1].blocks[1].attn.attn_drop == 0.5
    assert [stage.drop.p for stage in given.stages] == [0, 0.25]


def test_linear_layers_begin_as_asked() -> None:
    torch.manual_seed(0)
    plain, xavier = (xp.create_model("cvt_micro_32", init=i) for i in ("trunc_norm", "xavier"))
    name = "stages.2.blocks.0.mlp.fc1.weight"
    assert plain.state_dict()[name].std() == pytest.approx(0.02, rel=0.1)
    assert xavier.state_dict()[name].std() == pytest.approx((2 / (96 + 192)) ** 0.5, rel=0.1)
    assert not xavier.stages[0].blocks[0].attn.proj.bias.any()


def test_norms_are_computed_in_full_precision() -> None:
    model = tiny()
    x = (torch.randn(2, 4, 8) * 3 + 100).bfloat16()
    norm = copy.deepcopy(model.stages[0].blocks[0].norm1)
    expected = F.layer_norm(x.float(), (8,), norm.weight, norm.bias, 1e-5).bfloat16()
    assert torch.equal(norm(x), expected)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_heads": (1, 2, 5)}, "must divide by 5 heads"),
        ({"num_heads": (1, 2)}, "heads has 2 entries for 3 stages"),
        ({"embed_dim": (32, 64)}, "dim has 2 entries for 3 stages"),
        ({"qkv_proj_method": "conv"}, "expected one of dw_bn, avg, linear"),
        ({"stride_q": 2}, "stride 1 and a padding that keeps the size"),
        ({"init": "zeros"}, "expected one of trunc_norm, xavier"),
        ({"global_pool": "mean"}, "expected token, avg, max"),
        ({"cls_token": (True, False, False), "global_pool": "token"}, "needs a class token"),
    ],
)
def test_impossible_shapes_are_refused(changed, message) -> None:
    with pytest.raises(ValueError, match=message):
        xp.create_model("cvt_micro_32", **changed)


def test_unknown_words_and_pictures_too_small_are_refused() -> None:
    with pytest.raises(ValueError, match="KERNEL: expected some of"):
        tiny(KERNEL=[3, 3])
    with pytest.raises(ValueError, match="3 pixels a side or more"):
        xp.create_model("cvt_13")(torch.zeros(1, 3, 2, 9))
