"""What do weights bring? Five classes of CIFAR-10 first, then 200 pictures of the other five.

    taskset -c 0,1 python benchmarks/finetune.py cifar10/ [--time 8m] [--seeds 0 1 2]
                          [--pretrained RUN] [--out benchmarks/results/finetune.csv]

cifar10/ is the unpacked archive (train/<class>/, test/<class>/). The recipe `small` learns the
first five classes for `--time`. Then 200 pictures of the others (40 a class) are learnt by `small`
from scratch, by `probe` on random features, and beginning with that run by `probe`, `small` and
`finetune`, each judged once on the 5,000 test pictures of these classes. A row per run: accuracy
with its 95 % interval (Wilson), the difference to `small` from scratch of the same seed (paired),
seconds of the whole command, hardware and versions. A seed draws the weights, the order and which
30 of the 200 pictures choose the weights; the 5,000 are always the same.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import crosspatch._torchvision  # noqa: F401

from crosspatch.metrics.interval import paired
from hardware import RESULTS, append, facts

EACH = 40  # pictures of each of the five classes
KINDS = {  # name -> (options, whether it begins with the run)
    "small": ([], False),
    "probe of random features": (["--recipe", "probe"], False),
    "probe": (["--recipe", "probe"], True),
    "small with weights": ([], True),
    "finetune": (["--recipe", "finetune"], True),
}


def link(source: Path, target: Path, classes: list[str], most: int | None) -> Path:
    """A data set of some classes, made of links: `most` training pictures each, all of test."""
    for name in classes:
        for part, count in (("train", most), ("test", None)):
            (target / part / name).mkdir(parents=True)
            for picture in sorted((source / part / name).iterdir())[:count]:
                os.symlink(picture, target / part / name / picture.name)
    return target


def trained(data: Path, out: Path, *options: object) -> tuple[dict, float]:
    """The summary of `crosspatch train` in a process of its own, and its seconds."""
    words = ["train", data, "--out", out, "--json", *options]
    began = time.perf_counter()
    command = [sys.executable, "-m", "crosspatch", *map(str, words)]
    answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(answer.stdout), time.perf_counter() - began


def right(run: Path) -> dict[str, bool]:
    """Which test pictures a run named right."""
    with (run / "predictions.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "test"]
    return {row["path"]: row["correct"] == "1" for row in rows}


def row(kind: str, seed: int, summary: dict, seconds: float, base: dict, own: dict) -> dict:
    gained = sum(own[path] and not base[path] for path in base)
    lost = sum(base[path] and not own[path] for path in base)
    low, high = paired(gained, lost, len(base))
    test = summary["test"]
    return {
        "kind": kind,
        "seed": seed,
        "model": summary["model"],
        "learnt_from": summary["split"]["train"] + summary["split"]["val"],
        "accuracy": round(test["accuracy"], 4),
        "low": round(test["low"], 4),
        "high": round(test["high"], 4),
        "pictures": test["images"],
        "change": round((gained - lost) / len(base), 4),
        "change_low": round(low, 4),
        "change_high": round(high, 4),
        "epochs": summary["epochs"],
        "whole_seconds": round(seconds, 1),
        "cores": len(os.sched_getaffinity(0)),
        **facts("torch"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--time", default="8m")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--pretrained", type=Path)
    parser.add_argument("--out", type=Path, default=RESULTS / "finetune.csv")
    asked = parser.parse_args()
    classes = sorted(one.name for one in (asked.data / "train").iterdir())
    with tempfile.TemporaryDirectory() as place:
        folder, run = Path(place), asked.pretrained
        if run is None:
            first = link(asked.data.resolve(), folder / "first", classes[:5], None)
            run = folder / "pretrained"
            summary, _ = trained(first, run, "--time", asked.time)
            print("first five classes:", summary["test"]["accuracy"], flush=True)
        few = link(asked.data.resolve(), folder / "few", classes[5:], EACH)
        for seed in asked.seeds:
            base: dict[str, bool] = {}
            for kind, (options, begun) in KINDS.items():
                out = folder / f"{kind}-{seed}"
                more = ["--weights", run.resolve()] if begun else []
                summary, seconds = trained(few, out, "--seed", seed, *options, *more)
                own = right(out)
                base = base or own
                one = row(kind, seed, summary, seconds, base, own)
                append(asked.out, [one])
                print(*one.values(), flush=True)


if __name__ == "__main__":
    main()
