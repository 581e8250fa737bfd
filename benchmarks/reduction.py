"""Accuracy against speed of every reduction of tokens, off the shelf and after fine-tuning.

    python benchmarks/reduction.py RUN DATA [--share 1/3] [--epochs 2] [--lr 2e-4] [--methods …]
    python benchmarks/reduction.py RUN --speeds [--batch 64] [--threads 1]
    python benchmarks/reduction.py --figure docs/figures/reduction.png

RUN: a trained plain ViT; DATA: folders train, val and test, no test picture of which RUN was
trained on. Every method is put on RUN at three budgets (15, 25 and 40 % of the multiply-adds gone,
as near as its ladder comes; of a small network the stem alone has a fifth), tested as it is, then
trained on for `--epochs` with its own objective and tested again; `none` is RUN itself, trained on
alike. --share a/b does every b-th of them, so that several processes can work side by side. A row
per budget goes into results/reduction.csv; --speeds adds how many times as fast the network became,
in turns with RUN's, to results/reduction_speed.csv, and --figure draws both.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import crosspatch._torchvision

import torch

import crosspatch as xp
from crosspatch.deploy.referee import make_judge
from crosspatch.metrics.interval import paired, wilson
from crosspatch.metrics.latency import alternate, ratio
from crosspatch.metrics.macs import count_macs
from crosspatch.tokens.ladder import ladders
from crosspatch.tokens.spec import spell
from crosspatch.training.package import load_model
from crosspatch.training.session import train_run
from hardware import RESULTS, append, facts

BUDGETS = {"mild": 0.15, "middle": 0.25, "strong": 0.40}
TABLE, SPEEDS = RESULTS / "reduction.csv", RESULTS / "reduction_speed.csv"
LADDERS = {  # name in the table: method, shape of its schedule
    "tome": ("tome", "geometric"),
    "mctf, every block": ("mctf", "every block"),
    "mctf, three blocks": ("mctf", "three blocks"),
    "evovit": ("evovit", "stages"),
}
FIXED: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "stvit": ("stvit", [{"tokens": 36}, {"tokens": 16}, {"tokens": 4}]),
    "psvit, pooling": ("psvit", [{"share": [], "pool": [4]}, {"share": [], "pool": [3]},
                                 {"share": [], "pool": [2]}]),
    "psvit, sharing": ("psvit", [{"share": [5]}, {"share": [3, 5]}, {"share": [1, 3, 5]}]),
    "patch-drop": ("patch-drop", [{"rate": 0.25}, {"rate": 0.4}, {"rate": 0.55}]),
}  # fmt: skip


def candidates(model: torch.nn.Module, wanted: list[str]) -> list[tuple[str, str, str, dict]]:
    """(name, budget, method, options) of everything that is tried."""
    found: list[tuple[str, str, str, dict]] = []
    for name, (method, shape) in LADDERS.items():
        rungs = ladders(model, method)[shape]
        saved = [xp.reduce(model, method, **options)[1].saved for options in rungs]
        for budget, share in BUDGETS.items():
            at = min(range(len(rungs)), key=lambda i: abs(saved[i] - share))
            found.append((name, budget, method, rungs[at]))
    for name, (method, options) in FIXED.items():
        found += [(name, b, method, o) for b, o in zip(BUDGETS, options, strict=True)]
    found.append(("none", "none", "none", {}))
    return [one for one in found if not wanted or one[0] in wanted]


def reduced(model: Any, method: str, options: dict) -> Any:
    return model if method == "none" else xp.reduce(model, method, **options)[0]


def tried(asked: argparse.Namespace, base: Any, judge: Any, one: tuple) -> dict:
    """One candidate, as a row."""
    name, budget, method, options = one
    module = reduced(base, method, options)
    before, shelf = judge(base), judge(module)
    spec = "" if method == "none" else spell(method, options)
    overrides = {"weights": str(asked.run), "epochs": asked.epochs, "lr": asked.lr, "threads": 1,
                 "seed": 1, "eval_every": asked.epochs, "recipe": "small"}  # fmt: skip
    if spec:
        overrides["reduce"] = spec
    with tempfile.TemporaryDirectory() as folder:
        train_run(str(asked.data), Path(folder) / "run", overrides)
        tuned = judge(load_model(Path(folder) / "run").module)
    row: dict[str, Any] = {
        "name": name,
        "budget": budget,
        "spec": spec,
        "mmacs": round(count_macs(module, (3, *module.img_size)) / 1e6, 2),
        "base_mmacs": round(count_macs(base, (3, *base.img_size)) / 1e6, 2),
        "pictures": len(before),
        "base": round(float(before.mean()), 4),
    }
    for what, right in (("shelf", shelf), ("tuned", tuned)):
        low, high = wilson(int(right.sum()), len(right))
        change = paired(int((right & ~before).sum()), int((before & ~right).sum()), len(right))
        row |= {what: round(float(right.mean()), 4), f"{what}_low": round(low, 4),
                f"{what}_high": round(high, 4), f"{what}_change_low": round(change[0], 4),
                f"{what}_change_high": round(change[1], 4)}  # fmt: skip
    return {**row, "epochs": asked.epochs, "lr": asked.lr, **facts("torch")}


@torch.inference_mode()
def speed(base: Any, batch: int, seconds: float, one: tuple) -> dict:
    name, budget, method, options = one
    module, x = reduced(base, method, options).eval(), torch.randn(batch, 3, *base.img_size)
    calls = {"base": partial(base, x), "module": partial(module, x)}
    times = alternate(calls, seconds=seconds, least=7, settle=0)
    faster = ratio(times["base"], times["module"])
    return {
        "name": name,
        "budget": budget,
        "spec": "" if method == "none" else spell(method, options),
        "batch": batch,
        "threads": torch.get_num_threads(),
        "ms": round(1e3 * times["module"].median, 3),
        "times_base": round(faster.median, 3),
        "low": round(faster.low, 3),
        "high": round(faster.high, 3),
        "turns": faster.count,
        **facts("torch"),
    }


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def draw(target: Path) -> None:
    """Two panels: off the shelf and fine-tuned, accuracy over how many times as fast."""
    from matplotlib.figure import Figure

    speeds = {(r["name"], r["budget"]): float(r["times_base"]) for r in rows_of(SPEEDS)}
    rows = rows_of(TABLE)
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    names = list(dict.fromkeys(row["name"] for row in rows if row["name"] != "none"))
    for panel, what, title in zip(
        panels, ("shelf", "tuned"), ("off the shelf", "after two epochs more"), strict=True
    ):
        for place, name in enumerate(names):
            mine = [r for r in rows if r["name"] == name]
            points = sorted((speeds[name, r["budget"]], 100 * float(r[what])) for r in mine)
            panel.plot(*zip(*points, strict=True), marker="osD^vPX*"[place % 8], label=name)
        (whole,) = (r for r in rows if r["name"] == "none")
        panel.axhline(100 * float(whole[what]), color="black", lw=0.8, ls="--")
        panel.axvline(1, color="black", lw=0.8, ls=":")
        panel.set(title=title, xlabel="times as fast as the whole network")
        panel.grid(alpha=0.25)
    panels[0].set_ylabel("test accuracy, %")
    panels[1].legend(fontsize=8, loc="lower left")
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, nargs="?")
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("--share", default="1/1")
    parser.add_argument("--methods", nargs="+", default=[])
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--speeds", action="store_true")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=6)
    parser.add_argument("--figure", type=Path)
    asked = parser.parse_args()
    if asked.figure:
        return draw(asked.figure)
    torch.set_num_threads(asked.threads)
    trained = load_model(asked.run)
    base = trained.module
    every = candidates(base, asked.methods)
    if asked.speeds:
        for one in every:
            append(SPEEDS, [row := speed(base, asked.batch, asked.seconds, one)])
            print(*list(row.values())[:10], flush=True)
        return None
    first, of = map(int, asked.share.split("/"))
    judge = make_judge(asked.run, trained, asked.data / "test", limit=None)
    for one in every[first - 1 :: of]:
        append(TABLE, [row := tried(asked, base, judge, one)])
        print(*list(row.values())[:18], flush=True)
    return None


if __name__ == "__main__":
    main()
