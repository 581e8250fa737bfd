"""Rate, decay groups and the moving average."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from crosspatch.training.optim import (
    AGAIN,
    Ema,
    ema_decay,
    epoch_rate,
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
