"""Compact transformers: goldens, the sheet's figures, positions at every size, what is refused."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import crosspatch as xp
from crosspatch.errors import UsageError
from crosspatch.layers.linear import switched
from crosspatch.metrics.macs import count_macs
from crosspatch.models.cct import VARIANTS, CompactTransformer, sines
from support import goldens

GOLDENS = (
    "cct_2_3x2_32",
    "cct_7_3x1_32",
    "cct_7_3x1_32_true_sine",
    "vit_2_4_32_sine",
    "vit_7_4_32",
)
SIZES = {  # M parameters, GMACs
    "vit_2_4_32": (0.215, 0.015),
    "cvt_2_4_32": (0.215, 0.015),
    "vit_4_4_32": (0.413, 0.030),
    "cvt_4_4_32": (0.413, 0.030),
    "vit_6_4_32": (3.19, 0.22),
    "cvt_6_4_32": (3.19, 0.22),
    "vit_7_4_32": (3.72, 0.25),
    "cvt_7_4_32": (3.72, 0.25),
    "cct_2_3x2_32": (0.284, 0.035),
    "cct_4_3x2_32": (0.482, 0.050),
    "cct_6_3x1_32": (3.23, 1.01),
    "cct_6_3x2_32": (3.33, 0.25),
    "cct_7_3x1_32": (3.76, 1.18),
    "cct_7_3x1_32_c100": (3.78, 1.18),
    "cct_7_3x2_32": (3.85, 0.29),
    "cct_7_7x2_224": (4.57, 1.61),
    "cct_14_7x2_224": (22.37, 5.52),
    "cct_14_7x2_384": (22.51, 18.6),
}


def released(name: str) -> tuple[goldens.Golden, CompactTransformer, dict]:
    """A golden, its model, and its weights without what is computed."""
    golden = goldens.read(f"cct/{name}")
    model = CompactTransformer.from_authors(**golden.meta["build"]).eval()
    kept = tuple(golden.meta["keep_buffers"])
    state = {n: v for n, v in golden.state_dict.items() if not (kept and n.endswith(kept))}
    return golden, model, state


def tiny(**arguments) -> CompactTransformer:
    torch.manual_seed(0)
    shape = {"img_size": 16, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 5}
    small = {"n_conv_layers": 1, "kernel_size": 3, "mlp_ratio": 2.0}
    return CompactTransformer(**{**shape, **small, **arguments}).eval()


@pytest.mark.parametrize("products", ["off", "on"])
@pytest.mark.parametrize("name", GOLDENS)
def test_every_family_computes_what_the_authors_code_computes(name, products) -> None:
    golden, model, state = released(name)
    assert sum(p.numel() for p in model.parameters()) == golden.meta["params"]
    xp.load_released(model, {"state_dict": state})
    with switched(products), torch.no_grad():
        assert goldens.relative_error(model(golden.images), golden.outputs["out"]) < 1e-4


@pytest.mark.parametrize(
    "entry",
    [
        "tokenizer.conv_layers.1.0.weight",
        "classifier.positional_emb",
        "classifier.attention_pool.weight",
        "classifier.blocks.1.norm1.weight",
    ],
)
def test_a_golden_notices_a_changed_weight(entry: str) -> None:
    golden, model, state = released("cct_2_3x2_32")
    state[entry] = state[entry].flip(-1)
    xp.load_released(model, state)
    with torch.no_grad():
        assert goldens.relative_error(model(golden.images), golden.outputs["out"]) > 1e-3


@pytest.mark.parametrize("name", [n for n in VARIANTS if n.removesuffix("_sine") in SIZES])
def test_sizes(name: str) -> None:
    with torch.device("meta"):
        model = xp.create_model(name)
    parameters, macs = SIZES[name.removesuffix("_sine")]
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(parameters, rel=3e-3)
    found = count_macs(model, (3, *model.img_size)) / 1e9
    assert found == pytest.approx(macs, rel=1e-2, abs=0.006)
    side = model.default_cfg["pool_size"][0]
    assert model.grid == (side, side)
    assert model.default_cfg["num_classes"] == model.num_classes


@pytest.mark.parametrize(
    ("name", "tokens"),
    [("cct_7_3x1_32", 256), ("cct_2_3x2_32", 64), ("cct_7_7x2_224", 196), ("vit_2_4_32", 65)],
)
def test_tokens_are_as_many_as_the_paper_says(name: str, tokens: int) -> None:
    with torch.device("meta"):
        model = xp.create_model(name)
        state = model.embed(torch.zeros(1, 3, *model.img_size))
    assert state.tokens.shape[1] == model.pos_embed.shape[1] == tokens
    assert state.n_prefix == int(name.startswith("vit"))


def test_a_block_continues_from_its_normalised_tokens() -> None:
    block = tiny().blocks[0]
    x = torch.randn(2, 9, 16)
    with torch.no_grad():
        y = x + block.attn(block.norm1(x))
        normed = F.layer_norm(y, (16,), block.norm2.weight, block.norm2.bias, 1e-5)
        torch.testing.assert_close(block(x), normed + block.mlp(normed))


def test_sequence_pooling_weighs_tokens_by_their_scores() -> None:
    model = tiny()
    x = torch.randn(2, 3, 4, 16)
    with torch.no_grad():
        model.attention_pool.weight.copy_(torch.randn(1, 16))
        flat = x.reshape(2, 12, 16)
        weights = torch.softmax(flat @ model.attention_pool.weight[0], dim=1)
        expected = (weights[..., None] * flat).sum(1)
        torch.testing.assert_close(model.forward_head(x, pre_logits=True), expected)


def test_sines_follow_the_formula_and_never_change() -> None:
    table = sines(7, 6)[0]
    for place in range(7):
        for channel in range(6):
            angle = place / 10000 ** (2 * (channel // 2) / 6)
            value = math.cos(angle) if channel % 2 else math.sin(angle)
            assert table[place, channel] == pytest.approx(value, abs=1e-6)
    model = xp.create_model("cct_2_3x2_32_sine").train()
    assert torch.equal(model.pos_embed, sines(64, 128))
    model.requires_grad_(True)
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert model.pos_embed.grad is None
    assert "pos_embed" in model.no_weight_decay()


def test_a_released_table_of_sines_is_taken() -> None:
    _, model, state = released("vit_2_4_32_sine")
    state["classifier.positional_emb"] = torch.full((1, 65, 128), 0.5)
    xp.load_released(model, state)
    assert (model.pos_embed == 0.5).all()


def test_a_released_table_is_resized_bilinearly_and_keeps_its_class_row() -> None:
    golden = goldens.read("cct/vit_7_4_32")
    model = xp.create_model("vit_7_4_32", img_size=(48, 24))
    xp.load_released(model, golden.state_dict)
    given = golden.state_dict["classifier.positional_emb"]
    assert torch.equal(model.pos_embed[:, :1], given[:, :1])
    grid = given[:, 1:].reshape(1, 8, 8, 256).permute(0, 3, 1, 2)
    expected = F.interpolate(grid, size=(12, 6), mode="bilinear", align_corners=False)
    torch.testing.assert_close(model.pos_embed[:, 1:].detach(), expected.flatten(2).mT)


def test_a_table_resized_on_the_way_is_the_one_of_a_model_of_that_size() -> None:
    model, x = tiny(), torch.randn(2, 3, 21, 30)
    other = tiny(img_size=(21, 30))
    xp.load_released(other, model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(model(x), other(x))


@settings(max_examples=12, deadline=None)
@given(st.integers(5, 40), st.integers(5, 40), st.sampled_from([(1, 3), (2, 3), (2, 7)]))
def test_without_positions_one_set_of_weights_takes_every_size(height, width, shape) -> None:
    layers, kernel = shape
    model = tiny(n_conv_layers=layers, kernel_size=kernel, positional_embedding="none")
    assert not any("pos_embed" in name for name, _ in model.named_parameters())
    with torch.no_grad():
        x = torch.randn(1, 3, height, width)
        found = model.forward_features(x)
        assert found.shape == (1, *model.tokenizer.grid((height, width)), 16)
        assert model.forward_head(found).isfinite().all()
    xp.load_released(model, tiny(n_conv_layers=layers, kernel_size=kernel).state_dict())


@pytest.mark.parametrize("pool", ["avg", "max", ""])
@pytest.mark.parametrize("seq_pool", [True, False])
def test_other_poolings(pool: str, seq_pool: bool) -> None:
    model = tiny(seq_pool=seq_pool)
    x = torch.randn(2, 3, 12, 16)
    model.reset_classifier(3, pool)
    made = tiny(seq_pool=seq_pool, global_pool=pool).train()
    made(torch.randn(2, 3, 16, 16)).sum().backward()
    assert all(p.grad is not None for p in made.parameters())
    with torch.no_grad():
        assert model(x).shape == ((2, 3) if pool else (2, 6, 8, 3))
        model.reset_classifier(0, "seq" if seq_pool else "token")
        assert model(x).shape == (2, 16)


def test_the_authors_arguments_and_names() -> None:
    for name in set(VARIANTS) - {"cct_micro_32"}:
        with torch.device("meta"):
            built, made = CompactTransformer.from_authors(fn=name), xp.create_model(name)
        theirs, ours = built.state_dict(), made.state_dict()
        assert {n: v.shape for n, v in theirs.items()} == {n: v.shape for n, v in ours.items()}
    swallowed = CompactTransformer.from_authors(fn="cct_2_3x2_32", positional_embedding="none")
    assert swallowed.pos_embed.requires_grad
    shape = {"img_size": 32, "embedding_dim": 24, "num_layers": 2, "num_heads": 3}
    rates = {"dropout": 0.1, "attention_dropout": 0.2, "stochastic_depth": 0.3}
    model = CompactTransformer.from_authors(cls="CVT", kernel_size=8, **shape, **rates)
    assert (model.grid, model.pos_drop.p, model.blocks[1].attn.attn_drop) == ((4, 4), 0.1, 0.2)
    assert model.blocks[1].drop_path2.drop_prob == pytest.approx(0.3)
    lite = CompactTransformer.from_authors(
        cls="ViTLite", kernel_size=8, n_input_channels=1, **shape
    )
    assert lite(torch.randn(1, 1, 32, 32)).shape == (1, 1000)


def test_nothing_is_dropped_unless_asked_for() -> None:
    model = xp.create_model("cct_micro_32").train()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(x), model(x))
        model = xp.create_model("cct_micro_32", drop_path_rate=0.5, attn_drop_rate=0.5).train()
        assert not torch.equal(model(x), model(x))


def test_what_cannot_be_built_or_run_is_refused() -> None:
    with pytest.raises(UsageError, match="multiples of the patch"):
        xp.create_model("vit_2_4_32", img_size=30)
    with pytest.raises(ValueError, match="img_size"):
        xp.create_model("cvt_2_4_32")(torch.randn(1, 3, 32, 30))
    with pytest.raises(UsageError, match="learnable"):
        xp.create_model("cct_micro_32", positional_embedding="rotary")
    with pytest.raises(UsageError, match="global_pool 'token'"):
        xp.create_model("cct_micro_32", global_pool="token")
    with pytest.raises(UsageError, match="3 heads"):
        xp.create_model("cct_micro_32", num_heads=3)
    with pytest.raises(ValueError, match="too small"):
        tiny(kernel_size=7, padding=0)(torch.randn(1, 3, 5, 5))
    with pytest.raises(ValueError, match="such as cct_7_3x1_32"):
        CompactTransformer.from_authors(fn="cct_9_3x1_32")
    with pytest.raises(ValueError, match="expected one of CCT, CVT, ViTLite"):
        CompactTransformer.from_authors(cls="TextCCT")
    with pytest.raises(ValueError, match="arguments of the authors"):
        CompactTransformer.from_authors(cls="CCT", patch=3)
    with pytest.raises(ValueError, match="output_fmt"):
        tiny().forward_intermediates(torch.randn(1, 3, 16, 16), output_fmt="NCL")
    _, model, state = released("cct_2_3x2_32")
    del state["classifier.blocks.1.norm1.weight"]
    with pytest.raises(ValueError, match=r"missing: .*blocks\.1\.norm2\.weight"):
        xp.load_released(model, state)


@pytest.mark.parametrize("seq_pool", [True, False])
def test_intermediates_in_every_format(seq_pool: bool) -> None:
    model, x = tiny(seq_pool=seq_pool), torch.randn(2, 3, 12, 16)
    with torch.no_grad():
        how = {"norm": True, "intermediates_only": True}
        formats = ("NCHW", "NHWC", "NLC")
        nchw, nhwc, nlc = (
            model.forward_intermediates(x, 1, output_fmt=f, **how)[0] for f in formats
        )
        assert torch.equal(nchw.permute(0, 2, 3, 1), nhwc)
        assert torch.equal(nhwc.flatten(1, 2), nlc)
        final, [(patches, prefix)] = model.forward_intermediates(
            x, 1, return_prefix_tokens=True, norm=True, output_fmt="NLC"
        )
    assert prefix.shape == (2, int(not seq_pool), 16)
    whole = torch.cat([prefix, patches], dim=1)
    torch.testing.assert_close(whole, final if final.ndim == 3 else final.flatten(1, 2))
