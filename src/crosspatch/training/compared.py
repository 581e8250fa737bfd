# SPDX-License-Identifier: Apache-2.0
"""What the runs of a comparison say: figures, differences, and a sentence for each candidate."""

from __future__ import annotations

import csv
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from crosspatch.errors import DataError
from crosspatch.metrics.paired import Estimate, by_class, crossed, holm, needed
from crosspatch.metrics.tails import by_frequency, group_sizes
from crosspatch.training.candidates import Candidate
from crosspatch.training.comparison import Plan
from crosspatch.training.run import RunFolder

UNEVEN = 2.0  # times as many training pictures in a class as in another: classes are then balanced
SHOWN = 0.05  # p below which a difference is shown
POINT = 0.01


@dataclass(frozen=True)
class Run:
    """One ended run. keys, labels, correct (N,): of the test pictures; report: report.json;
    taught: seconds in which it trained a teacher of its own."""

    seed: int
    folder: Path
    keys: tuple[str, ...]
    labels: tuple[str, ...]
    correct: np.ndarray
    report: dict[str, Any]
    taught: float = 0.0

    @property
    def seconds(self) -> float:
        """Of the training, its teacher's included."""
        return self.taught + self.report["seconds"]

    @property
    def curve(self) -> list[tuple[int, float, float]]:
        """(step, seconds, figure on validation) of every validation."""
        return [
            (row["step"], self.taught + row["elapsed"], figure)
            for row in self.report["history"]
            if (figure := row.get("val_accuracy", row.get("val_map"))) is not None
        ]


@dataclass(frozen=True)
class Row:
    """One candidate. Figures are means over seeds; `difference` and its kin are against the first
    candidate, None for that one; p: after Holm's correction; tail: of the rarest three tenths
    of the classes; verdict: a sentence."""

    candidate: Candidate
    runs: tuple[Run, ...]
    accuracy: Estimate | None = None
    difference: Estimate | None = None
    balanced: Estimate | None = None
    balanced_difference: Estimate | None = None
    tail: Estimate | None = None
    tail_difference: Estimate | None = None
    p: float | None = None
    verdict: str = ""
    cost: dict[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.candidate.name


@dataclass(frozen=True)
class Compared:
    """A comparison, or as much of it as has ended. seeds: those that were read; pictures: of the
    split, by its part; uneven: the training pictures of the largest class over those of the
    smallest; machine, versions: of the first run; remarks: what is to be known of all."""

    plan: Plan
    out: Path
    rows: tuple[Row, ...]
    seeds: tuple[int, ...]
    pictures: dict[str, int]
    several: bool
    uneven: float
    machine: dict[str, Any]
    versions: dict[str, Any]
    remarks: tuple[str, ...]
    failed: dict[str, str]

    @property
    def baseline(self) -> Row:
        return self.rows[0]

    def results(self) -> dict[str, Any]:
        """For JSON: every figure."""
        return {
            "seeds": list(self.seeds),
            "split": self.pictures,
            "machine": self.machine,
            "versions": self.versions,
            "remarks": list(self.remarks),
            "candidates": [_record(row) for row in self.rows],
        }


def read_compared(plan: Plan, out: Path, failed: Mapping[str, str]) -> Compared:
    """Read the ended runs of a comparison. Raises DataError where one is damaged, or was judged on
    other pictures than the rest."""
    found = {
        one.name: tuple(
            read_run(folder, seed)
            for candidate, seed, folder in plan.runs(out)
            if candidate is one and f"{one.folder}/seed-{seed}" not in failed
        )
        for one in plan.candidates
    }
    every = [run for runs in found.values() for run in runs]
    if not every:
        raise DataError(
            f"no run of {out} came to its end: {next(iter(failed.values()), '')}",
            "one at least",
            "take a smaller rate: --lr 0.0005",
        )
    first = every[0]
    for run in every:
        if run.keys != first.keys or run.labels != first.labels:
            raise DataError(
                f"{run.folder} was tested on other pictures than {first.folder}",
                "the same test pictures for all runs",
                "choose another --out",
            )
    counts = first.report["config"]["recipe"].get("class_counts", [])
    several = first.report.get("task") == "multilabel"
    uneven = max(counts) / max(1, min(counts)) if counts and not several else 1.0
    weights = _weights(first, counts) if uneven >= UNEVEN else {}
    rows = [_row(one, found[one.name], found[plan.candidates[0].name], weights)
            for one in plan.candidates]  # fmt: skip
    rows = _judged(rows, {one.folder: one.name for one in plan.candidates}, failed)
    config = first.report["config"]
    return Compared(
        plan, out, tuple(rows), plan.seeds, dict(first.report["split"]), several, uneven,
        config.get("machine", {}), config.get("versions", {}), _remarks(plan, rows), dict(failed),
    )  # fmt: skip


def read_run(folder: Path, seed: int) -> Run:
    """An ended run. Raises DataError where its tables are missing or damaged."""
    try:
        report, lesson = (_report(one) for one in (folder, RunFolder(folder).teacher))
        with (folder / "predictions.csv").open(encoding="utf-8", newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["split"] == "test"]
        correct = np.array([row["correct"] == "1" for row in rows])
        labels = tuple(row.get("label") or row.get("labels") or "" for row in rows)
        keys = tuple(row["path"] for row in rows)
        taught = float(lesson["seconds"]) if lesson else 0.0
        if not report or not len(keys) or len(keys) != report["split"]["test"]:
            raise ValueError(f"{len(keys)} test pictures")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{folder} cannot be read ({error})",
            "a run that has ended: report.json and predictions.csv",
            f"delete {folder} and type the command again",
        ) from error
    return Run(seed, folder, keys, labels, correct, report, taught)


def _report(folder: Path) -> dict[str, Any]:
    """report.json of a run, empty where there is none."""
    path = RunFolder(folder).report_path
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _weights(run: Run, counts: Sequence[int]) -> dict[str, np.ndarray]:
    """How much each test picture counts in balanced accuracy, and in that of the tail."""
    place = {row["name"]: number for number, row in enumerate(run.report["test"]["classes"])}
    labels = np.array([place[label] for label in run.labels])
    rare = by_frequency(counts)[-max(1, group_sizes(len(counts))[2]) :]
    found = {"balanced": by_class(labels)}
    if np.isin(labels, rare).any():
        found["tail"] = by_class(labels, rare.tolist())
    return found


def _row(
    candidate: Candidate,
    runs: tuple[Run, ...],
    baseline: tuple[Run, ...],
    weights: Mapping[str, np.ndarray],
) -> Row:
    """Everything about a candidate but its verdict."""
    if not runs:
        return Row(candidate, runs)
    table = np.array([run.correct for run in runs], np.float64)
    figures: dict[str, Any] = {"accuracy": crossed(table)}
    figures |= {key: crossed(table, weight) for key, weight in weights.items()}
    theirs = {run.seed: run for run in baseline}
    both = [run for run in runs if run.seed in theirs]
    if runs is not baseline and both:
        gaps = [run.correct.astype(np.float64) - theirs[run.seed].correct for run in both]
        figures["difference"] = crossed(np.array(gaps))
        for key, weight in weights.items():
            figures[f"{key}_difference"] = crossed(np.array(gaps), weight)
    return Row(candidate, runs, **figures, cost=_cost(runs))


def _cost(runs: Sequence[Run]) -> dict[str, float]:
    """Means over seeds: seconds (also of a teacher that the run trained), steps, epochs, pictures a
    second in training; of the model parameters and MACs; of the test nll (nats) and ece."""
    reports = [run.report for run in runs]

    def mean(read: Callable[[dict[str, Any]], float | None]) -> float:
        found = [value for one in reports if (value := read(one)) is not None]
        return statistics.fmean(found) if found else math.nan

    def rate(one: dict[str, Any]) -> float | None:
        found = [row["images_per_second"] for row in one["history"]
                 if row.get("images_per_second")]  # fmt: skip
        return statistics.median(found) if found else None

    figures = {
        "seconds": statistics.fmean(run.seconds for run in runs),
        "steps": mean(lambda one: one["steps"]),
        "epochs": mean(lambda one: one["steps"] / one["config"]["recipe"]["steps_per_epoch"]),
        "images_per_second": mean(rate),
        "parameters": reports[0]["parameters"],
        "macs": reports[0]["macs"],
        "nll": mean(lambda one: one["test"].get("nll")),
        "ece": mean(lambda one: one["test"].get("ece")),
    }
    return {key: value for key, value in figures.items() if math.isfinite(value)}


def _judged(rows: Sequence[Row], names: Mapping[str, str], failed: Mapping[str, str]) -> list[Row]:
    """The rows with corrected p values and verdicts."""
    tested = [row for row in rows if row.difference is not None]
    fixed = dict(zip([row.name for row in tested],
                     holm([row.difference.p for row in tested if row.difference]),
                     strict=True))  # fmt: skip
    told = []
    for place, row in enumerate(rows):
        lost = [key for key in failed if names.get(key.split("/")[0]) == row.name]
        text = "what the others are compared with" if place == 0 else ""
        p = fixed.get(row.name)
        if row.difference is not None and p is not None:
            text = verdict(row.difference, p, len(tested))
        if lost:
            note = f"{len(lost)} of its runs failed ({failed[lost[0]]})"
            text = f"{text}; {note}" if text else note
        told.append(replace(row, p=p, verdict=text or "could not be compared"))
    return told


def verdict(found: Estimate, p: float, tested: int) -> str:
    """A sentence about a difference. p: after correction for `tested` candidates."""
    low, high = 100 * found.low, 100 * found.high
    if p < SHOWN:
        better = found.mean > 0
        ends = (low, high) if better else (-high, -low)
        word = "better" if better else "worse"
        return f"{word} by {abs(100 * found.mean):.1f} points ({ends[0]:.1f} to {ends[1]:.1f})"
    span = f"{low:+.1f} to {high:+.1f}"
    if found.p < SHOWN:
        return (
            f"no difference shown among {tested} candidates: {span} by itself, and p = {p:.2f} "
            "where so many are tried"
        )
    text = f"no difference shown at this size ({span})"
    pictures, seeds = needed(found, POINT)
    wanted = []
    if pictures is not None and pictures > found.pictures:
        wanted.append(f"{_rounded(pictures):,} test pictures")
    if seeds is not None and seeds > found.seeds:
        wanted.append(f"{seeds} seeds")
    if not wanted:
        return text
    return f"{text}; about {' or '.join(wanted)} would be needed to show 1 point"


def _rounded(count: int) -> int:
    """Two digits that say something."""
    step = 10 ** max(0, len(str(count)) - 2)
    return math.ceil(count / step) * step


def _remarks(plan: Plan, rows: Sequence[Row]) -> tuple[str, ...]:
    said = list(plan.remarks)
    if len(plan.seeds) == 1:
        said.append(
            "One seed: what another seed alone would change is not in these intervals. --seeds 3 "
            "shows it."
        )
    elif len(plan.seeds) == 2:
        said.append("Two seeds say little of what a seed changes: --seeds 3 or more is better.")
    if len({row.cost.get("parameters") for row in rows if row.runs}) > 1:
        said.append("The candidates' models differ in size: see parameters and multiply-adds.")
    return tuple(said)


def _record(row: Row) -> dict[str, Any]:
    """A candidate for JSON."""
    estimates = ("accuracy", "difference", "balanced", "balanced_difference", "tail",
                 "tail_difference")  # fmt: skip
    found = {key: getattr(row, key) for key in estimates}
    return {
        "name": row.name,
        "text": row.candidate.text,
        "settings": row.candidate.settings,
        "folder": row.candidate.folder,
        **{key: value._asdict() for key, value in found.items() if value is not None},
        "p_holm": row.p,
        "verdict": row.verdict,
        **row.cost,
        "runs": [
            {
                "seed": run.seed,
                "folder": f"{row.candidate.folder}/seed-{run.seed}",
                "accuracy": float(run.correct.mean()),
                "seconds": run.seconds,
                "curve": run.curve,
            }
            for run in row.runs
        ],
    }
