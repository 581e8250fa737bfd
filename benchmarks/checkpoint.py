"""What a checkpoint costs, and how long a resume takes, for a model of about 28 million parameters.

    python benchmarks/checkpoint.py [--model crossvit_15_dagger_240] [--size 32] [--batch 64]
                                    [--saves 6] [--every 200] [--pictures 50000] [--threads 1]
                                    [--device cpu|cuda] [--out benchmarks/results/checkpoint.csv]

A training on drawn pictures of CIFAR-10's size and number is saved at every eighth step, killed
with its state on the disk and resumed in the same process. A row has:

mparams, state_mb    of the model; of the state with the average and two moments
step_ms, step_cpu_ms    a step beside no write, median; CPU time of its thread
held_ms              what a save holds the training (checks, copy, start of the thread), median;
                     held_first_ms: the first, which asks the system for the memory of the copy
beside_ms            by how much more CPU time of their thread the steps beside a write took (those
                     that began while it ran), all together, median; beside_wall_ms: by the clock,
                     which other jobs on the cores change as well
cpu_ms, write_ms     CPU time of the writing thread; time until the state lies on the disk; medians
share                (held + beside) of `every` steps, in percent, and share_wall with the time by
                     the clock; one_percent_ms: the step time from which on `share` is below 1 %
resume_s             from the call with `resume` to the first step, without what stands under
                     `build_s` and `pictures_s`; of it read_s (file and checksum), restore_s (into
                     model, average and optimiser), count_s (multiply-adds, for the first screen)
build_s, pictures_s  left out of it: making model and optimiser; reading the pictures
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from crosspatch.data.sources import Item, Source
from crosspatch.training import loop, resuming, session
from crosspatch.training.reporter import Silent
from crosspatch.training.stepper import Stepper
from crosspatch.training.writer import StateWriter
from hardware import RESULTS, append, facts

WARM, GAP = 4, 8


class Drawn(Source):
    """Noise in ten classes."""

    def __init__(self, count: int, side: int = 32) -> None:
        self.name, self.skipped = "drawn", []
        self.classes = tuple(f"class{number}" for number in range(10))
        self.items = tuple(Item(f"{i:06d}.png", i % 10, None) for i in range(count))
        self._pictures = np.random.default_rng(0).integers(0, 256, (count, side, side, 3), np.uint8)

    def read(self, index: int) -> np.ndarray:
        return self._pictures[index]

    def _sizes(self) -> list[int]:
        return [self._pictures[0].nbytes] * len(self.items)

    def alike(self) -> np.ndarray:
        return np.zeros(len(self.items), bool)


class Timed:
    """Wall and CPU seconds (of the calling thread) of every call of `room.name`."""

    def __init__(self, room: Any, name: str) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []
        real: Callable = getattr(room, name)

        def call(*given: Any, **how: Any) -> Any:
            began, cpu = time.perf_counter(), time.thread_time()
            try:
                return real(*given, **how)
            finally:
                self.wall.append(time.perf_counter() - began)
                self.cpu.append(time.thread_time() - cpu)

        setattr(room, name, call)


class Enough(Exception):
    """Ends a run from its reporter."""


class Saving(Silent):
    """Saves at every `GAP`-th step; ends after `saves` of them, when the last lies on the disk."""

    def __init__(self, fits: list[Any], saves: int) -> None:
        self.fits, self.saves = fits, saves
        self.alone: list[tuple[float, float]] = []
        self.beside: list[list[tuple[float, float]]] = [[]]
        self.seen, self.busy, self.began = 0, False, now()

    def step(self, done: int, total: int, loss: float, images_per_second: float) -> None:
        fit, took = self.fits[-1], tuple(b - a for a, b in zip(self.began, now(), strict=True))
        self.seen += 1
        if self.seen > WARM:
            (self.beside[-1] if self.busy else self.alone).append(took)
        if self.seen % GAP == 0:
            fit.writer.wait()
            if len(self.beside) > self.saves:
                raise Enough
            self.beside.append([])
            fit._save()
        self.busy = fit.writer._thread is not None and fit.writer._thread.is_alive()
        self.began = now()

    def longer(self, clock: int) -> list[float]:
        """By how many seconds (0: of CPU, 1: by the clock) the steps beside each write were
        longer than the median of the others."""
        usual = statistics.median(took[clock] for took in self.alone)
        return [sum(took[clock] - usual for took in some) for some in self.beside[1:]]


def now() -> tuple[float, float]:
    """CPU seconds of this thread, and seconds of the clock."""
    return time.thread_time(), time.perf_counter()


def run(
    source: Source, folder: Path, settings: dict[str, Any], reporter: Silent, **how: Any
) -> None:
    """A training, until its reporter has seen enough."""
    try:
        session.train_run("drawn", folder, settings, reporter, **how)
    except Enough:
        return
    raise SystemExit("the run came to its end: more --pictures")


def milliseconds(seconds: list[float]) -> float:
    return round(1e3 * statistics.median(seconds), 1)


def saving(source: Source, folder: Path, settings: dict[str, Any], asked: Any) -> dict[str, Any]:
    """The columns on the cost of a save."""
    fits: list[Any] = []
    real = loop._Fit.__init__

    def noted(fit: Any, *given: Any) -> None:
        real(fit, *given)
        fits.append(fit)

    loop._Fit.__init__ = noted
    held, written = Timed(loop._Fit, "_save"), Timed(StateWriter, "_write")
    reporter = Saving(fits, asked.saves)
    run(source, folder, settings, reporter)
    cpu, clock = ([took[place] for took in reporter.alone] for place in (0, 1))
    stop, usual = statistics.median(held.wall[2:]), statistics.median(clock)
    cost, by_clock = (stop + statistics.median(reporter.longer(place)) for place in (0, 1))
    return {
        "mparams": round(sum(p.numel() for p in fits[0].stepper.objective.parameters()) / 1e6, 2),
        "state_mb": round((folder / "last" / "last.safetensors").stat().st_size / 1e6, 1),
        "step_ms": milliseconds(clock),
        "step_cpu_ms": milliseconds(cpu),
        "held_ms": milliseconds(held.wall[2:]),
        "held_first_ms": milliseconds(held.wall[:2][-1:]),
        "beside_ms": milliseconds(reporter.longer(0)),
        "beside_wall_ms": milliseconds(reporter.longer(1)),
        "cpu_ms": milliseconds(written.cpu[1:]),
        "write_ms": milliseconds(written.wall[1:]),
        "share": round(100 * cost / (asked.every * usual), 3),
        "share_wall": round(100 * by_clock / (asked.every * usual), 3),
        "one_percent_ms": round(1e5 * cost / asked.every, 1),
    }


def resuming_time(source: Source, folder: Path) -> dict[str, Any]:
    """The columns on the time of a resume."""
    pictures = Timed(resuming, "read_pictures")
    build = [Timed(session, "make_objective"), Timed(Stepper, "__init__")]
    read, restore = Timed(loop, "load_state"), Timed(Stepper, "restore")
    count = Timed(session, "weight")

    def first(*given: Any) -> None:
        raise Enough

    Stepper.step = first
    began = time.perf_counter()
    run(source, folder, {}, Silent(), resume=True)
    left_out = sum(sum(one.wall) for one in (*build, pictures))
    step = time.perf_counter() - began - left_out
    return {
        "resume_s": round(step, 2),
        "read_s": round(sum(read.wall), 2),
        "restore_s": round(sum(restore.wall), 2),
        "count_s": round(sum(count.wall), 2),
        "build_s": round(sum(sum(one.wall) for one in build), 2),
        "pictures_s": round(sum(pictures.wall), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="crossvit_15_dagger_240")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--saves", type=int, default=6)
    parser.add_argument("--every", type=int, default=200)
    parser.add_argument("--pictures", type=int, default=50_000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS / "checkpoint.csv")
    asked = parser.parse_args()
    source = Drawn(asked.pictures)
    session.open_source = lambda spec: source
    session.fit = lambda *given, **how: loop.fit(*given, **how, report_seconds=0.0)
    settings = {"model": asked.model, "size": asked.size, "batch": asked.batch, "epochs": 1}
    settings |= {"threads": asked.threads, "ema": 0.05, "eval_every": 1}
    with tempfile.TemporaryDirectory() as place:
        cost = saving(source, Path(place) / "run", settings, asked)
        back = resuming_time(source, Path(place) / "run")
    named = {key: getattr(asked, key) for key in ("model", "size", "batch", "threads", "every")}
    row = {**named, **cost, **back, "device": "cuda" if torch.cuda.is_available() else "cpu"}
    append(asked.out, [{**row, **facts("torch", "safetensors")}])
    print(row)


if __name__ == "__main__":
    main()
