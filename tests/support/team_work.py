"""What the processes of a team do in `test_team`: each function runs in all of them."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import nn

from crosspatch.data.prepare import prepare
from crosspatch.objectives.supervised import Supervised
from crosspatch.training import package, team
from crosspatch.training.batch_norm import share_norms
from crosspatch.training.evaluation import predict_probabilities
from crosspatch.training.guard import NotFinite, agreed, factor
from crosspatch.training.loop import fit
from crosspatch.training.objective import make_objective
from crosspatch.training.run import RunFolder
from crosspatch.training.stepper import Stepper
from support.tiny import Stripes, TinyNet, tiny_recipe

PLAIN = {"mix": (), "mix_prob": (), "mix_alpha": (), "steps": 20, "eval_every": 1}
"""Nothing is drawn per process: losses are those of one process."""


def words() -> dict:
    """Everything that a team says to each other."""
    own = team.rank()
    ends = [own == 0, own == 1, False]
    state = (
        {"a": torch.arange(6.0).view(2, 3), "n": torch.tensor([], dtype=torch.int64)},
        {"x": 1},
    )
    got = team.share_state(state if team.first() else ({}, {"x": 2}))
    assert got is not None
    module = nn.Linear(2, 2)
    team.share_weights(module)
    return {
        "rank": own,
        "either": team.either(*ends),
        "gather": team.gather({"from": own, "much": "x" * own}),
        "share": team.share([own, None, "é", math.inf]),
        "nothing": team.share_state(None),
        "state": [got[0]["a"].tolist(), got[0]["n"].tolist(), got[1]],
        "mean": float(team.mean(torch.tensor(float(own)))),
        "weights": module.weight.tolist(),
        "rows": [_interleaved(total) for total in range(team.size(), 10)],
    }


def _interleaved(total: int) -> list[float]:
    rows = torch.arange(float(total)).view(-1, 1)
    return team.interleaved(rows[team.rank() :: team.size()], total).flatten().tolist()


def findings() -> list:
    """What is agreed on when several processes find a step bad."""
    one = {
        0: NotFinite(5, "gradient", math.inf, torch.tensor([0, 2])),
        1: NotFinite(5, "loss", math.nan, torch.tensor([1, 3])),
    }.get(team.rank())
    found = agreed(one)
    return [found.step, found.what, str(found.value), found.index.tolist()]


def normalised(features: int, pictures: list, momentum: float | None) -> dict:
    """One training step of a batch normalisation: what it changed, for this process's pictures."""
    norm = nn.Sequential(nn.BatchNorm2d(features, momentum=momentum))
    norm = share_norms(norm) if team.size() > 1 else norm
    x = torch.tensor(pictures)[team.rank() :: team.size()].requires_grad_()
    (norm(x).square() * torch.arange(1.0, 4.0)).sum().backward()
    layer = norm[0]
    return {
        "names": sorted(norm.state_dict()),
        "slope": x.grad.tolist(),
        "weight": (team.mean(layer.weight.grad) * team.size()).tolist(),
        "running": [layer.running_mean.tolist(), layer.running_var.tolist()],
        "evaluated": norm.eval()(x).tolist(),
    }


def train(folder: str, spoil: int = 0, **changed) -> None:
    """Train the tiny model without dropout in `folder`; `spoil`: a step whose loss is NaN in the
    last process, until the rate was lowered."""
    package._create = lambda name, arguments: _still(TinyNet(**arguments))
    recipe = tiny_recipe(**{**PLAIN, **changed, "devices": team.size()})
    if spoil:
        _spoil(spoil)
    images = prepare(Stripes(), recipe.preprocess).images
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train_set, val = images.subset(order[:58].numpy()), images.subset(order[58:].numpy())
    run = RunFolder.create(folder) if team.first() else RunFolder(folder)
    with run:
        objective = make_objective(recipe, images.classes)
        fit(recipe, objective, train_set, val, run, report_seconds=0.0)


def _still(module: nn.Module) -> nn.Module:
    """The tiny model without dropout, which each process draws for itself, and without the bias
    before its normalisation: that one has no slope, so AdamW moves it by rounding errors alone."""
    module.drop.p, module.stem.bias = 0.0, None
    return module


def _spoil(at: int) -> None:
    step, forward, now = Stepper.step, Supervised.forward, [False]

    def watched(stepper, batch, epoch, number):
        last = team.rank() == team.size() - 1
        now[0] = last and number == at and factor(stepper.cuts, number) > 0.5
        step(stepper, batch, epoch, number)

    def spoilt(objective, inputs, progress):
        out = forward(objective, inputs, progress)
        return {**out, "loss": out["loss"] * math.nan} if now[0] else out

    Stepper.step, Supervised.forward = watched, spoilt


def evaluated(counts: list[int], batch: int) -> list:
    """Probabilities of the first so many pictures, for each of `counts`."""
    images = prepare(Stripes(), tiny_recipe().preprocess).images
    torch.manual_seed(0)
    model = TinyNet(3, (8, 8))
    sets = (images.subset(list(range(count))) for count in counts)
    return [predict_probabilities(model, part, batch, shared=True).tolist() for part in sets]


def trained_all(runs: str, cases: dict) -> None:
    """`train` once for each case, in folders of their names."""
    for name, changed in cases.items():
        keep = Stepper.step, Supervised.forward
        train(str(Path(runs) / name), **changed)
        Stepper.step, Supervised.forward = keep


def everything(batches: list[dict], counts: dict, runs: str, cases: dict) -> dict:
    """All of the above; what is not a training comes first."""
    told = {
        "words": words(),
        "findings": findings(),
        "normalised": [normalised(**batch) for batch in batches],
        "evaluated": evaluated(**counts),
    }
    trained_all(runs, cases)
    return told
