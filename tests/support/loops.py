"""For tests of the loop: a reporter that stops it, and two runs compared bit for bit."""

from __future__ import annotations

import csv

import torch
from safetensors.torch import load_file

from crosspatch.errors import Interrupted
from crosspatch.training.reporter import Silent
from crosspatch.training.state import load_state

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
