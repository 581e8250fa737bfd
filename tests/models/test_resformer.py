"""ResFormer: goldens, the paper's figures, one set of weights at every size, what it cannot do."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import crosspatch as xp
from crosspatch.errors import UsageError
from crosspatch.layers.block import BlockSpec
from crosspatch.layers.linear import switched
from crosspatch.layers.reducer import Reducer
from crosspatch.layers.stage import StageSpec
from crosspatch.metrics.macs import count_macs
from crosspatch.models.resformer import ResFormer, sines
from crosspatch.tokens.spec import METHODS
from support import goldens


def tiny(**arguments) -> ResFormer:
    """16 patches at 32 pixels; no parameter at its start."""
    torch.manual_seed(0)
    shape = {"embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 5}
    model = ResFormer(32, 8, **{**shape, **arguments})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def images(*size: int, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("products", ["off", "on"])
@pytest.mark.parametrize("side", [96, 224])
def test_one_set_of_weights_computes_what_the_authors_code_computes(side, products) -> None:
    golden = goldens.read(f"resformer/resformer_tiny_{side}")
    model = xp.create_model(golden.meta["build"]["fn"]).eval()
    assert sum(p.numel() for p in model.parameters()) == golden.meta["params"]
    xp.load_released(model, {"model": golden.state_dict})
    with switched(products), torch.no_grad():
        assert goldens.relative_error(model(golden.images), golden.outputs["out"]) < 1e-4
        found = model.forward_features(golden.images)
        assert goldens.relative_error(found, golden.outputs["tokens"]) < 1e-4


@pytest.mark.parametrize("name", ["pos_embed.embed_layer.weight", "blocks.3.attn.get_v.weight"])
def test_a_golden_notices_either_embedding(name: str) -> None:
    golden = goldens.read("resformer/resformer_tiny_96")
    model = xp.create_model("resformer_tiny_patch16").eval()
    state = golden.state_dict
    state[name] = state[name].flip(-1)
    xp.load_released(model, state)
    with torch.no_grad():
        assert goldens.relative_error(model(golden.images), golden.outputs["out"]) > 1e-3


class Whole(nn.Module):
    """All tokens of the last block, as the authors count."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model.forward_head(self.model.forward_features(x))


@pytest.mark.parametrize(
    ("name", "millions", "macs"),
    [("tiny", 5.69, 1.26), ("small", 21.99, 4.61), ("base", 86.43, 17.6)],
)
def test_parameters_and_macs_of_the_table(name: str, millions: float, macs: float) -> None:
    with torch.device("meta"):
        model = xp.create_model(f"resformer_{name}_patch16")
        found = [count_macs(Whole(model), (3, side, side)) / 1e9 for side in (224, 160, 128)]
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.006)
    assert found[0] == pytest.approx(macs, rel=0.005)
    if name == "small":
        assert sum(found) == pytest.approx(8.32, rel=0.005)


@settings(max_examples=15, deadline=None)
@given(st.integers(8, 48), st.integers(8, 48))
def test_any_size_runs_with_the_same_tensors(height: int, width: int) -> None:
    model, other = tiny(), ResFormer((height, width), 8, embed_dim=24, depth=3, num_heads=3,
                                     num_classes=5).eval()  # fmt: skip
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        found = model(images(height, width))
        assert torch.equal(found, other(images(height, width)))
    assert found.shape == (2, 5)


def test_positions_are_the_formula() -> None:
    found, (rows, columns), half = sines((3, 5), 12), (3, 5), 6
    assert found.shape == (1, 12, rows, columns)
    for channel in range(12):
        i, count = channel % half, rows if channel < half else columns
        for y in range(rows):
            for x in range(columns):
                place = (y if channel < half else x) + 1
                angle = place / (count + 1e-6) * 2 * math.pi / 10_000 ** (2 * (i // 2) / half)
                wanted = math.sin(angle) if i % 2 == 0 else math.cos(angle)
                assert found[0, channel, y, x].item() == pytest.approx(wanted, abs=1e-5)


def test_neighbours_are_seen_by_patches_alone_and_by_all_heads_alike() -> None:
    attn = tiny().blocks[0].attn
    v = torch.randn(2, 3, 1 + 12, 8)
    found = attn.local(v, (3, 4))
    assert torch.equal(found[:, :, 0], torch.zeros(2, 3, 8))
    for head in range(3):
        image = v[:, head, 1:].transpose(1, 2).unflatten(2, (3, 4))
        torch.testing.assert_close(found[:, head, 1:], attn.get_v(image).flatten(2).mT)


def test_it_begins_as_a_vit_without_local_positions() -> None:
    model = xp.create_model("resformer_micro_32", num_classes=3)
    assert all(not b.attn.get_v.weight.any() and not b.attn.get_v.bias.any() for b in model.blocks)
    free = model.no_weight_decay()
    assert {"cls_token", "pos_embed.embed_layer.weight", "blocks.3.attn.get_v.bias"} <= free
    assert not any("qkv" in name or "norm" in name for name in free)
    assert "pos_embed" not in free


def test_the_last_block_of_the_class_token_alone_is_the_whole_ones() -> None:
    for more in ({}, {"reg_tokens": 2}, {"dist_token": True}):
        model = tiny(**more)
        with torch.no_grad():
            features = model.forward_features(images(32, 24))
            whole = model.forward_head(features)
            torch.testing.assert_close(model(images(32, 24)), whole, rtol=1e-4, atol=1e-5)


def test_patches_left_out_reducers_and_shared_maps_are_refused() -> None:
    model = tiny()
    keep = torch.tensor([[0, 3], [1, 2]])
    with pytest.raises(ValueError, match="neighbours of each patch"):
        model.run(model.embed(images(32, 32), keep))
    model.reducer = Reducer()
    with pytest.raises(ValueError, match="and no reducer"):
        model(images(32, 32))
    for method in METHODS:
        with pytest.raises(UsageError, match="neighbours"):
            xp.reduce(tiny(), method)
    spec = BlockSpec.uniform(24, 3, 2.0)
    shared = BlockSpec(3, 24, 24, 48, shares=0)
    with pytest.raises(ValueError, match="map of its own"):
        tiny(stages=(StageSpec(24, (spec, shared)),))
    with pytest.raises(UsageError, match="cannot be chosen"):
        xp.create_model("resformer_micro_32", pos_embed="learn")
    with pytest.raises(ValueError, match="half of the channels"):
        tiny(embed_dim=9)


def test_one_size_only_where_that_is_asked_for() -> None:
    model = tiny(dynamic_img_size=False)
    with pytest.raises(ValueError, match="this model takes 32x32"):
        model(images(40, 40))
