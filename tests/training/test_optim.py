"""Rate, decay groups and the moving average."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import crosspatch as xp
from crosspatch.errors import UsageError
from crosspatch.models.registry import classifiers
from crosspatch.training.optim import (
    AGAIN,
    Ema,
    HeadFirst,
    ema_decay,
    epoch_rate,
    layer_scales,
    make_optimiser,
    rate,
    set_rate,
    split_decay,
    staged_rate,
)
from support import goldens


def test_rate_by_hand():
    how = {"steps": 10, "warmup": 2, "peak": 1.0, "floor": 0.1}
    found = [rate(step, **how) for step in range(10)]
    assert found[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert found[6] == pytest.approx(0.1 + 0.9 * 0.5)
    assert found[9] == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi * 7 / 8)))


@given(st.integers(1, 2000), st.floats(0, 0.9))
def test_rate_rises_then_falls(steps, part):
    warmup = int(part * steps)
    found = [rate(s, steps=steps, warmup=warmup, peak=2.0, floor=0.1) for s in range(steps)]
    assert max(found) == 2.0
    assert found.index(2.0) == warmup
    assert all(value > 0 for value in found)
    assert found[: warmup + 1] == sorted(found[: warmup + 1])
    assert found[warmup:] == sorted(found[warmup:], reverse=True)


def test_rates_of_epochs_are_those_of_deit():
    wanted = goldens.arrays("deit/recipe")["lr"]
    how = {"epochs": 300, "warmup": 5, "peak": 1e-3, "floor": 1e-5, "start": 1e-6}
    found = [epoch_rate(epoch, **how) for epoch in range(300)]
    assert found == pytest.approx(wanted.tolist(), rel=1e-12)


def test_a_longer_run_keeps_the_rates_it_had_and_rises_once_more():
    how = {"warmup": 3, "peak": 1.0, "floor": 0.1}
    plain = [rate(step, steps=30, **how) for step in range(30)]
    longer = [staged_rate(step, stages=(30,), steps=50, **how) for step in range(50)]
    assert longer[:30] == plain
    assert longer[30:] == [
        rate(step, steps=20, warmup=2, peak=AGAIN, floor=0.1) for step in range(20)
    ]
    assert [staged_rate(step, stages=(), steps=30, **how) for step in range(30)] == plain
    low = [staged_rate(s, stages=(30,), steps=50, warmup=3, peak=0.1, floor=0.1) for s in (31, 49)]
    assert low == [0.1 * 2 / 3, 0.1]


def test_ema_decay_is_scaled_to_the_run():
    for steps in (1000, 50_000):
        decay = ema_decay(steps - 1, steps=steps, half_life=0.05)
        assert decay ** (0.05 * steps) == pytest.approx(0.5)
    assert ema_decay(0, steps=50_000, half_life=0.05) == pytest.approx(0.1)
    assert ema_decay(5, steps=100, half_life=0) == 0


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.position = nn.Parameter(torch.ones(1, 4, 3))
        self.frozen = nn.Parameter(torch.ones(2, 2), requires_grad=False)
        self.norm = nn.BatchNorm1d(3)


def test_vectors_biases_and_named_ones_are_not_decayed():
    decayed, undecayed = split_decay(Named(), {"position"})
    assert set(decayed) == {"linear.weight"}
    assert set(undecayed) == {"linear.bias", "position", "norm.weight", "norm.bias"}


@pytest.mark.parametrize("kind", ["adamw-fused", "adamw-foreach"])
def test_optimiser_is_adamw_with_groups(kind):
    torch.manual_seed(0)
    module, twin = nn.Linear(4, 2), nn.Linear(4, 2)
    twin.load_state_dict(module.state_dict())
    mine = make_optimiser(module, set(), lr=1.0, weight_decay=0.1, betas=(0.9, 0.99), kind=kind)
    set_rate(mine, 0.01)
    theirs = torch.optim.AdamW(
        [
            {"params": [twin.weight], "weight_decay": 0.1},
            {"params": [twin.bias], "weight_decay": 0.0},
        ],
        lr=0.01,
        betas=(0.9, 0.99),
    )
    for _ in range(3):
        for net, optimiser in ((module, mine), (twin, theirs)):
            optimiser.zero_grad()
            net(torch.ones(1, 4)).square().sum().backward()
            optimiser.step()
    assert torch.allclose(module.weight, twin.weight, atol=1e-6)
    assert torch.allclose(module.bias, twin.bias, atol=1e-6)


def test_ema_follows_weights_and_copies_counters():
    module = Named()
    ema = Ema(module, steps=100, half_life=0.5)
    start = module.linear.weight.detach().clone()
    with torch.no_grad():
        module.linear.weight += 1
    module.norm(torch.randn(8, 3))
    ema.update(0)
    assert torch.allclose(ema.module.linear.weight, start + 0.9, atol=1e-6)
    assert int(ema.module.norm.num_batches_tracked) == 1
    assert not any(p.requires_grad for p in ema.module.parameters())
    assert not ema.module.training


@pytest.mark.parametrize(
    ("name", "arguments", "stem"),
    [
        ("vit_micro_32", {}, "patch_embed"),
        ("vit_micro_32", {"dist_token": True}, "dist_token"),
        ("crossvit_micro_32", {}, "patch_embed"),
        ("evo_levit_micro_32", {}, "patch_embed"),
        ("resnet10t", {}, "conv1"),
    ],
)
@pytest.mark.parametrize("decay", [0.5, 0.75])
def test_rates_fall_layer_by_layer_from_the_head_to_the_embeddings(name, arguments, stem, decay):
    model = xp.create_model(name, num_classes=3, **arguments)
    scales = layer_scales(model, decay)
    assert scales.keys() == dict(model.named_parameters()).keys()
    heads = tuple(classifiers(model))
    assert heads
    assert {scale for n, scale in scales.items() if n.startswith(heads)} == {1.0}
    assert {scale for n, scale in scales.items() if n.startswith(stem)} == {min(scales.values())}
    blocks: dict[int, set[float]] = {}
    for n, scale in scales.items():
        if n.startswith("blocks."):
            blocks.setdefault(int(n.split(".")[1]), set()).add(scale)
    found = [blocks[number] for number in sorted(blocks)]
    assert all(len(one) == 1 for one in found)
    flat = [one.pop() for one in found]
    assert flat == sorted(flat)
    assert all(scale < 1 for scale in flat)
    assert sorted(set(scales.values())) == sorted(
        decay**n for n in range(len(set(scales.values())))
    )


def test_each_group_has_its_share_of_the_rate():
    model = xp.create_model("vit_micro_32", num_classes=3)
    scales = layer_scales(model, 0.5)
    optimiser = make_optimiser(
        model, {"pos_embed"}, lr=1.0, weight_decay=0.1, betas=(0.9, 0.99), scales=scales
    )
    set_rate(optimiser, 0.01)
    seen = {}
    for group in optimiser.param_groups:
        for name in group["names"]:
            seen[name] = group["lr"] / 0.01
            free = name == "pos_embed" or model.get_parameter(name).ndim <= 1
            assert (group["weight_decay"] == 0) == free
    assert seen == pytest.approx(scales)


def test_a_model_without_layers_or_heads_is_refused():
    with pytest.raises(UsageError, match="names no layers"):
        layer_scales(nn.Linear(2, 2), 0.5)
    with pytest.raises(UsageError, match="names no classifier"):
        HeadFirst(nn.Linear(2, 2), 3)
    HeadFirst(nn.Linear(2, 2), 0)
