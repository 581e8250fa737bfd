"""Do two processes train faster than one? The same step, alone and shared, in turn.

    python benchmarks/processes.py [--models crossvit_tiny_240 deit_tiny_patch16_224] [--batch 16]
                                   [--processes 2] [--rounds 8]
                                   [--out benchmarks/results/processes.csv]

Each process has one thread. The first one alone takes a training step of the whole batch while the
others wait, then all of them take one together, each with its share; by turns, on pictures made of
noise. What a step holds: augmentation, forward, backward, exchange of the gradients, clipping,
AdamW, weight average. A row for each model: medians, their ratio, the spread of the ratios.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

import crosspatch._torchvision  # noqa: F401

import torch

from crosspatch.data.augment import AugmentConfig
from crosspatch.data.loading import Batch
from crosspatch.training import team
from crosspatch.training.objective import make_objective
from crosspatch.training.recipe import Recipe
from crosspatch.training.stepper import Stepper
from hardware import RESULTS, append, facts

MODELS = ("crossvit_tiny_240", "deit_tiny_patch16_224")
CLASSES = tuple("abcdefghij")
WARM = 2


def recipe(model: str, batch: int, processes: int) -> Recipe:
    """A training without anything unusual, on one thread."""
    side = int(model.rpartition("_")[2])
    return Recipe(
        name="small", model=model, size=(side, side), store=(side, side), fit="crop",
        mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), batch=batch, steps=1000,
        steps_per_epoch=100, lr=1e-3, min_lr=1e-5, weight_decay=0.05, betas=(0.9, 0.99), warmup=10,
        ema=0.02, smoothing=0.1, drop_path=0.1, clip=1.0, threads=1, devices=processes,
        augment=AugmentConfig(flip=True, crop_scale=(0.8, 1.0), ops=2),
    )  # fmt: skip


def share(batch: int, side: int, rank: int, world: int) -> Batch:
    """Every `world`-th picture of a batch of noise."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (batch, side, side, 3), dtype=torch.uint8, generator=generator)
    place = torch.arange(rank, batch, world)
    return Batch(images[place].clone(), place % len(CLASSES), place, place, batch)


def seconds(stepper: Stepper | None, batch: Batch | None, number: int) -> float:
    """One step's; a process without one waits for the others."""
    team.either(False)
    began = time.perf_counter()
    if stepper is None or batch is None:
        team.mean(torch.zeros(()))
    else:
        stepper.step(batch, 0, number)
    team.either(False)
    return time.perf_counter() - began


def work(models: list[str], batch: int, rounds: int, out: Path) -> None:
    """What each process does."""
    world = int(os.environ["WORLD_SIZE"])
    plain = {name: make_objective(recipe(name, batch, 1), CLASSES) for name in models}
    alone = {name: Stepper(recipe(name, batch, 1), plain[name]) for name in models}
    with team.joined():
        for name in models:
            setting = recipe(name, batch, world)
            together = Stepper(setting, make_objective(setting, CLASSES))
            whole = share(batch, setting.size[0], 0, 1)
            part = share(batch, setting.size[0], team.rank(), world)
            mine = alone[name] if team.first() else None
            times = [
                (seconds(mine, whole, number), seconds(together, part, number))
                for number in range(WARM + rounds)
            ][WARM:]
            if team.first():
                tell(name, batch, world, times, out)


def tell(name: str, batch: int, world: int, times: list, out: Path) -> None:
    ratios = sorted(one / many for one, many in times)
    row = {
        "model": name,
        "batch": batch,
        "processes": world,
        "alone_ms": round(1e3 * statistics.median(one for one, _ in times), 1),
        "together_ms": round(1e3 * statistics.median(many for _, many in times), 1),
        "ratio": round(statistics.median(ratios), 3),
        "lowest": round(ratios[0], 3),
        "highest": round(ratios[-1], 3),
        "rounds": len(times),
        **facts("torch"),
    }
    append(out, [row])
    print(row)


def launch(processes: int) -> int:
    """This program once more in each process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    common |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    own = [
        subprocess.Popen(
            [sys.executable, *sys.argv],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(processes)
    ]
    return max(process.wait() for process in own)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--out", type=Path, default=RESULTS / "processes.csv")
    asked = parser.parse_args()
    if "WORLD_SIZE" not in os.environ:
        sys.exit(launch(asked.processes))
    work(asked.models, asked.batch, asked.rounds, asked.out)


if __name__ == "__main__":
    main()
