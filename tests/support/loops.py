"""For tests of the loop: a reporter that stops it, and two runs compared bit for bit."""

from __future__ import annotations

import csv
import math

import torch
from safetensors.torch import load_file

from crosspatch.errors import Interrupted
from crosspatch.objectives.supervised import Supervised
from crosspatch.training.guard import factor
from crosspatch.training.reporter import Silent
from crosspatch.training.state import load_state
from crosspatch.training.stepper import Stepper

TIMES = ("elapsed", "images_per_second", "remaining")


class Stop(Silent):
    """Raises `error` after step `at`; counts what it is told."""

    def __init__(self, at: int | None = None, error: BaseException | None = None, hook=None):
        self.at, self.error, self.hook = at, error, hook
        self.steps, self.rows, self.messages = [], [], []

    def message(self, text):
        self.messages.append(text)

    def step(self, done, total, loss, images_per_second):
        self.steps.append(done)
        if done == self.at:
            if self.hook is not None:
                self.hook()
            if self.error is not None:
                raise self.error

    def epoch(self, row):
        self.rows.append(row)


class Spoil:
    """Makes the loss, or the gradient, of step `at` NaN while the rate is more than `most` of the
    planned one: like a real divergence, it is a function of the state."""

    def __init__(self, monkeypatch, at=11, most=0.0, what="loss"):
        self.now, self.seen = False, 0
        step, forward = Stepper.step, Supervised.forward

        def watched(stepper, batch, epoch, number):
            self.now = number == at and factor(stepper.cuts, number) > most
            self.seen += self.now
            step(stepper, batch, epoch, number)

        def spoilt_forward(objective, inputs, progress):
            out = forward(objective, inputs, progress)
            if not self.now:
                return out
            if what == "loss":
                return {**out, "loss": out["loss"] * math.nan}
            infinite = (next(objective.parameters()) * 0).sum().sqrt()  # 0, of slope 0 * inf
            return {**out, "loss": out["loss"] + infinite}

        monkeypatch.setattr(Stepper, "step", watched)
        monkeypatch.setattr(Supervised, "forward", spoilt_forward)


def halt():
    return Interrupted("stop", "x", "y")


def table(run):
    with (run.path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def same(one, two):
    """Both runs ended with the same weights, averages, moments and rows, bit for bit."""
    assert table(one) == table(two)
    first, second = (load_state(run.last)[0] for run in (one, two))
    assert first.keys() == second.keys()
    different = [k for k in first if not torch.equal(first[k], second[k])]
    assert different == []
    best = [load_file(run.model / "model.safetensors") for run in (one, two)]
    assert all(torch.equal(best[0][k], best[1][k]) for k in best[0])
