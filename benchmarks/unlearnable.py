"""A small CNN that learns from unlearnable copies, tested on clean pictures (arXiv 2303.04278).

    python benchmarks/unlearnable.py --data cifar10.tar.xz --out FOLDER [--catalog FOLDER]

The same network twice for each seed: on the pictures, and on what `crosspatch data unlearnable`
writes of them. All of test judges both; 15 % of what is trained on, filtered or not as that is,
choose the weights. A run that has ended is not trained again. What came out goes into the catalog.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from datetime import date
from pathlib import Path

import numpy as np

from crosspatch import catalog
from crosspatch.catalog import Measured
from crosspatch.cli.main import main as command_line
from crosspatch.cli.words import plural
from crosspatch.metrics.paired import crossed
from crosspatch.processor import processor
from crosspatch.training.compared import read_run
from crosspatch.training.run import RunFolder
from crosspatch.training.session import train_run

from claims import unpacked  # isort: skip

CLAIMS = (
    ("names fewer clean ones than", 1.0, "clean training"),
    ("names less than half as many clean ones as", 0.5, "half of that"),
)
"""What is claimed of a network, of which share of the other's accuracy, and in words."""
NETWORK = {"model": "resnet_micro_32", "recipe": "cnn", "size": 32, "threads": 1}


def filtered(clean: Path, out: Path, key: int) -> Path:
    """The set with copies in the place of its training pictures; made once."""
    target = out / f"filtered-{key}"
    target.mkdir(exist_ok=True)
    if not (target / "train").is_dir():
        words = ["data", "unlearnable", str(clean), "--key", str(key)]
        if command_line([*words, "--out", str(target / "train")]):
            sys.exit(1)
    if not (target / "test").exists():
        (target / "test").symlink_to((clean / "test").resolve())
    return target


def trained(data: Path, out: Path, epochs: int, seed: int) -> tuple[np.ndarray, float]:
    """Which test pictures a run names rightly (N,), and its validation accuracy."""
    run = RunFolder(out)
    if not run.ended:
        settings = {**NETWORK, "epochs": epochs, "seed": seed}
        train_run(data, out, settings, resume=run.unfinished)
    found = read_run(out, seed)
    order = np.argsort(found.keys)
    return found.correct[order], found.report["val"]["accuracy"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="cifar10.tar.xz")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pictures", type=int, default=3000)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--key", type=int, default=0)
    parser.add_argument("--catalog", type=Path, default=catalog.HERE)
    asked = parser.parse_args()
    clean = unpacked(asked.data, asked.out, asked.pictures)
    sets = {"clean": clean, "filtered": filtered(clean, asked.out, asked.key)}
    right: dict[str, list[np.ndarray]] = {name: [] for name in sets}
    chosen: dict[str, list[float]] = {name: [] for name in sets}
    for seed in range(asked.seeds):
        for name, folder in sets.items():
            run = asked.out / f"{name}-{asked.epochs}-{seed}"
            table, accuracy = trained(folder, run, asked.epochs, seed)
            right[name].append(table)
            chosen[name].append(accuracy)
            print(f"{run.name}: {100 * table.mean():.1f} % of clean test pictures, "
                  f"{100 * accuracy:.1f} % of its own validation", flush=True)  # fmt: skip
    tables = {name: np.array(rows, float) for name, rows in right.items()}
    made = outcomes(tables, chosen, asked)
    catalog.record("cuda-unlearnable", made, asked.catalog)
    for one in made:
        print(f"{one.claim} {one.figure} {one.interval}: {one.verdict}")


def outcomes(
    right: dict[str, np.ndarray], chosen: dict[str, list[float]], asked: argparse.Namespace
) -> list[Measured]:
    """What came out, good or bad."""
    clean, copies = (100 * right[name].mean() for name in ("clean", "filtered"))
    own = 100 * float(np.mean(chosen["filtered"]))
    blind = "" if asked.seeds > 1 else ", so that the interval does not know what a seed changes"
    told = (
        f"{plural(asked.seeds, 'seed')}{blind}: {copies:.1f} % of clean test pictures against "
        f"{clean:.1f} %, and {own:.1f} % of filtered ones"
    )
    words = ["--data", asked.data.name, "--out", "unlearnable"]
    for name in ("pictures", "epochs", "seeds", "key"):
        words += [f"--{name}", str(getattr(asked, name))]
    made = []
    for claim, share, than in CLAIMS:
        gap = crossed(right["filtered"] - share * right["clean"])
        verdict = "not shown at this size, neither way"
        if gap.high < 0:
            verdict = "reproduced at this size"
        elif gap.low > 0:
            verdict = "not reproduced: the contrary was measured"
        made.append(Measured(
            claim=f"After {asked.epochs} epochs a small CNN that learnt from filtered CIFAR-10 "
            f"pictures {claim} one that learnt from the pictures as they are.",
            figure=f"{100 * gap.mean:+.1f} points of clean test accuracy against {than}",
            interval=(round(100 * gap.low, 2), round(100 * gap.high, 2)),
            hardware=processor().describe(),
            command=shlex.join(["python", "benchmarks/unlearnable.py", *words]),
            date=date.today().isoformat(),
            verdict=f"{verdict} ({told})",
        ))  # fmt: skip
    return made


if __name__ == "__main__":
    main()
