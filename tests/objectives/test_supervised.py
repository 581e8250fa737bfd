"""The supervised objective: loss, scale over several processes, mixing, names."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from crosspatch.mixing import OneOf
from crosspatch.mixing.cutmix import Cutmix
from crosspatch.objectives import Inputs
from crosspatch.objectives.supervised import Supervised
from crosspatch.tasks.classify import Classify


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 2, 3))
        self.head = nn.Linear(3 * 4 * 4, 3)

    def forward(self, x):
        return self.head(x.flatten(1)) + self.token.sum()

    def no_weight_decay(self):
        return {"token"}


def inputs(count: int = 6, scale: float | None = None, step: int = 0) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, 3, 4, 4, generator=generator)
    labels = torch.arange(count) % 3
    return Inputs(images, labels, (0, step, 0), 1 / count if scale is None else scale)


def test_loss_is_the_mean_over_the_batch():
    objective = Supervised(Linear(), Classify("abc"), smoothing=0.1)
    given = inputs()
    found = objective(given, 0.5)
    wanted = nn.functional.cross_entropy(
        objective.model(given.images), given.labels, label_smoothing=0.1
    )
    assert found["loss"].item() == pytest.approx(wanted.item(), rel=1e-5)
    assert found["parts"] == {}


def test_ranks_with_unequal_shares_average_to_one_process():
    objective = Supervised(Linear(), Classify("abc"))
    whole = inputs(7)
    parts = [slice(0, 4), slice(4, 7)]
    losses = [
        objective(Inputs(whole.images[p], whole.labels[p], (0, 0, 0), 2 / 7), 0)["loss"]
        for p in parts
    ]
    wanted = objective(whole, 0)["loss"]
    assert (sum(losses) / 2).item() == pytest.approx(wanted.item(), rel=1e-5)


def test_mixing_follows_the_draw_and_nothing_else():
    objective = Supervised(Linear(), Classify("abc"), mixer=OneOf([Cutmix()], [1.0]))
    first = objective(inputs(step=1), 0)["loss"]
    torch.rand(5)
    assert torch.equal(objective(inputs(step=1), 0)["loss"], first)
    assert not torch.equal(objective(inputs(step=2), 0)["loss"], first)
    assert not torch.equal(Supervised(objective.model, Classify("abc"))(inputs(), 0)["loss"], first)


def test_names_of_undecayed_parameters_are_the_objectives():
    objective = Supervised(Linear(), Classify("abc"))
    assert objective.no_decay() == {"model.token"}
    assert objective.no_decay() <= dict(objective.named_parameters()).keys()
    assert objective.exported is objective.model is objective.averaged
    assert Supervised(nn.Linear(2, 2), Classify("ab")).no_decay() == set()
