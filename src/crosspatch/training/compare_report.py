# SPDX-License-Identifier: Apache-2.0
"""A comparison as files: results.csv with a row per run, compare.md and compare.png."""

from __future__ import annotations

import csv
import io
import os
import shlex
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from crosspatch.errors import UsageError
from crosspatch.metrics.paired import Estimate
from crosspatch.training.compared import Compared, Row

TABLE, PAGE, FIGURE = "results.csv", "compare.md", "compare.png"
COLOURS = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a6d3b")
"""The palette of Okabe and Ito, which colour-blind readers tell apart, and a brown; the first is
the baseline's."""


def write_compared(
    found: Compared, out: Path, keep: Callable[[dict[str, Any]], None]
) -> list[Path]:
    """Write the files; keep: writes the results into compare.json. Returns their paths.

    Raises UsageError where they cannot be written.
    """
    keep(found.results())
    drawn = io.BytesIO()
    with warnings.catch_warnings():  # letters that the font lacks are drawn as boxes
        warnings.filterwarnings("ignore", "Glyph .* missing")
        figure(found).savefig(drawn, format="png", dpi=120)
    made = {TABLE: table(found).encode(), PAGE: page(found).encode(), FIGURE: drawn.getvalue()}
    for name, data in made.items():
        aside = out / f".writing-{os.getpid()}-{name}"
        try:
            aside.write_bytes(data)
            os.replace(aside, out / name)
        except OSError as error:
            aside.unlink(missing_ok=True)
            raise UsageError(
                f"{out / name} cannot be written: {error.strerror}",
                "a folder that can be written, and room on the disk",
                "make room, then type the command again",
            ) from error
    return [out / "compare.json", *(out / name for name in made)]


def table(found: Compared) -> str:
    """results.csv: one row per run, with its test figures and what it took."""
    names = ("candidate", "seed", "test_accuracy", "test_correct", "test_images", "test_nll",
             "test_ece", "val_accuracy", "steps", "seconds", "parameters", "macs",
             "folder")  # fmt: skip
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    for row in found.rows:
        for run in row.runs:
            test, val = run.report["test"], run.report["val"] or {}
            writer.writerow([
                row.name, run.seed, f"{run.correct.mean():.6f}", int(run.correct.sum()),
                len(run.correct), test.get("nll", ""), test.get("ece", ""),
                val.get("accuracy", val.get("map", "")), run.report["steps"],
                round(run.seconds, 3), run.report["parameters"], run.report["macs"],
                f"{row.candidate.folder}/seed-{run.seed}",
            ])  # fmt: skip
    return text.getvalue()


def page(found: Compared) -> str:
    """compare.md: the question, the table, the verdicts, how it was measured."""
    plan, base = found.plan, found.baseline.name
    budget = f"{plan.epochs} epochs" if plan.epochs else f"{plan.each or 0:.0f} s"
    figure = "pictures with all labels right" if found.several else "accuracy"
    rows = [_markdown_row(row, found) for row in found.rows]
    head = ["candidate", f"test {figure}, %", f"against {base}, points", "p (Holm)"]
    head += ["balanced, %", "tail, %"] if found.baseline.balanced else []
    head += ["calibration error, %", "s a run", "images/s", "parameters", "multiply-adds"]
    lines = [
        f"# {' · '.join(row.name for row in found.rows)}",
        "",
        f"Which is better on `{plan.data}`? Each was trained {len(found.seeds)} times with "
        f"{budget} a run.",
        "",
        *(f"- **{row.name}**: {row.verdict}." for row in found.rows[1:]),
        "",
        f"| {' | '.join(head)} |",
        f"|{'|'.join(['---'] + ['---:'] * (len(head) - 1))}|",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
        f"![intervals and learning curves]({FIGURE})",
        "",
        "## How it was measured",
        "",
        *(f"- {text}" for text in how_measured(found)),
        "",
        "```",
        typed(plan.command),
        "```",
    ]
    return "\n".join(lines) + "\n"


def typed(command: str) -> str:
    """The command as it is typed, whatever path its program was started by."""
    try:
        words = shlex.split(command)
    except ValueError:
        return command
    if words and words[0].endswith(("__main__.py", "crosspatch")):
        return shlex.join(["crosspatch", *words[1:]])
    return command


def how_measured(found: Compared) -> Iterable[str]:
    """Sentences on the split, the intervals, the candidates and the machine."""
    plan, split = found.plan, found.pictures
    seeds = ", ".join(map(str, found.seeds))
    yield (
        f"One split for all ({split['train']:,} pictures to train, {split['val']:,} to choose the "
        f"weights, {split['test']:,} to test); seeds {seeds}. The test pictures were touched once "
        "by each run, at its end."
    )
    yield (
        "Differences are paired: the same test pictures, the same seeds. The 95 % intervals hold "
        "for other pictures and for other seeds (crossed random effects, Satterthwaite's degrees "
        "of freedom); p is corrected for the number of candidates (Holm)."
    )
    yield from found.remarks
    yield from (f"Failed: {key}: {why}." for key, why in found.failed.items())
    for candidate in plan.candidates:
        settings = ", ".join(f"{key} = {value}" for key, value in candidate.settings.items())
        yield f"{candidate.name}: {settings or 'nothing of its own'}"
    common = {**plan.common, **plan.fixed}
    yield f"For all: {', '.join(f'{key} = {value}' for key, value in common.items())}"
    where = [str(found.machine[key]) for key in ("gpu", "device") if found.machine.get(key)]
    versions = ", ".join(f"{key} {value}" for key, value in found.versions.items())
    cores = found.machine.get("cores", "?")
    yield f"On {' '.join(where) or 'this machine'}, {cores} cores; {versions}."


def _markdown_row(row: Row, found: Compared) -> list[str]:
    cells = [row.name, _percent(row.accuracy), _points(row.difference)]
    cells.append("–" if row.p is None else f"{row.p:.3f}" if row.p >= 0.0005 else "<0.001")
    if found.baseline.balanced:
        cells += [_percent(row.balanced), _percent(row.tail)]
    cost = row.cost
    cells.append(f"{100 * cost['ece']:.1f}" if "ece" in cost else "–")
    cells += [f"{cost[key]:,.0f}" if key in cost else "–"
              for key in ("seconds", "images_per_second", "parameters", "macs")]  # fmt: skip
    return cells


def _percent(found: Estimate | None) -> str:
    if found is None:
        return "–"
    low, high = max(0.0, 100 * found.low), min(100.0, 100 * found.high)
    return f"{100 * found.mean:.1f} ({low:.1f} to {high:.1f})"


def _points(found: Estimate | None) -> str:
    if found is None:
        return "–"
    return f"{100 * found.mean:+.1f} ({100 * found.low:+.1f} to {100 * found.high:+.1f})"


def figure(found: Compared) -> Any:
    """Differences with their intervals on the left; on the right the accuracy on validation over
    steps and over seconds, a thin line for each seed and a thick one for their mean. Returns a
    `matplotlib.figure.Figure`."""
    from matplotlib.figure import Figure

    rows = [row for row in found.rows if row.runs]
    made = Figure(figsize=(11.5, max(3.6, 1.9 + 0.42 * len(rows))), layout="constrained")
    left, *right = made.subplots(1, 3, width_ratios=(1.25, 1, 1))
    colours = {row.name: COLOURS[place % len(COLOURS)] for place, row in enumerate(rows)}
    _intervals(left, rows, colours, found)
    for panel, place, what in ((right[0], 0, "steps"), (right[1], 1, "seconds")):
        for row in rows:
            _curves(panel, row, place, colours[row.name])
        panel.set_xlabel(what)
        panel.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    what = f"{'mAP' if found.several else 'accuracy'} on validation"
    right[0].set_title(what, loc="left", fontsize=10)
    right[1].set_title("the same over time", loc="left", fontsize=10)
    right[1].sharey(right[0])
    for panel in (left, *right):
        panel.grid(color="#e4e4e4", linewidth=0.6)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    split = found.pictures
    seeds = f"{len(found.seeds)} seed{'s' if len(found.seeds) > 1 else ''}"
    text = f"{split['train']:,} training and {split['test']:,} test pictures, {seeds}"
    text = f"{Path(found.plan.data).name}: {text}"
    made.supxlabel(text, fontsize=8, color="#555555", parse_math=False)
    return made


def _intervals(panel: Any, rows: Sequence[Row], colours: dict[str, str], found: Compared) -> None:
    """One line per candidate: its difference from the baseline, the seeds as dots."""
    base = found.baseline
    names, ends = [], [0.5]
    for place, row in enumerate(rows):
        accuracy = row.accuracy.mean if row.accuracy else float("nan")
        names.append(f"{_cut(row.name)}\n{100 * accuracy:.1f} %")
        if row.difference is None:
            panel.plot(0, place, "s", color=colours[row.name], markersize=6)
            continue
        low, mean, high = (100 * row.difference[i] for i in (1, 0, 2))
        ends += [abs(low), abs(high)]
        theirs = {run.seed: run.correct.mean() for run in base.runs}
        dots = [100 * (r.correct.mean() - theirs[r.seed]) for r in row.runs if r.seed in theirs]
        panel.plot([low, high], [place, place], color=colours[row.name], linewidth=2.2)
        panel.plot(mean, place, "o", color=colours[row.name], markersize=7)
        level = [place + 0.2] * len(dots)
        panel.plot(dots, level, "|", color=colours[row.name], markersize=6, alpha=0.8)
        panel.annotate(f"{mean:+.1f}", (mean, place), (0, 7), textcoords="offset points",
                       ha="center", fontsize=8.5, color=colours[row.name])  # fmt: skip
    panel.axvline(0, color="#000000", linewidth=0.9, linestyle=(0, (4, 3)))
    panel.set_yticks(range(len(rows)), names, fontsize=8.5, parse_math=False)
    for label, row in zip(panel.get_yticklabels(), rows, strict=True):
        label.set_color(colours[row.name])
    panel.set_ylim(len(rows) - 0.4, -0.6)
    edge = 1.12 * max(ends)
    panel.set_xlim(-edge, edge)
    text = f"points of test accuracy against {_cut(base.name)}"
    panel.set_xlabel(text, fontsize=9, parse_math=False)
    panel.set_title("difference, 95 % interval; ticks: seeds", loc="left", fontsize=10)


def _cut(name: str, most: int = 26) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"


def _curves(panel: Any, row: Row, place: int, colour: str) -> None:
    curves = [np.array([(point[place], point[2]) for point in run.curve]) for run in row.runs]
    curves = [curve for curve in curves if len(curve)]
    for curve in curves:
        panel.plot(*curve.T, color=colour, linewidth=0.7, alpha=0.35)
    if not curves:
        return
    most = min(map(len, curves))  # the k-th validation of every seed
    mean = np.mean([curve[:most] for curve in curves], axis=0)
    marker = "o" if most == 1 else None
    panel.plot(*mean.T, color=colour, linewidth=1.9, label=row.name, marker=marker)
