# SPDX-License-Identifier: Apache-2.0
"""What `train` shows: the plan before the first step, one line per epoch, the result at the end.

`Screen` is the reporter of a training run. In a terminal a progress bar stands below the epoch
lines; in a pipe there are plain lines only, one per epoch. Everything fits 80 columns.
"""

from __future__ import annotations

import json
import os
import textwrap
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

import crosspatch
from crosspatch.cli import several, words
from crosspatch.errors import visible
from crosspatch.training import launch

WIDTH = 80
READY = "getting ready"
TRAINING = "training"
EPOCH_HEAD = "   epoch     time    loss  val acc    95 % range       rate  images/s     left"


def print_json(answer: object) -> None:
    """One JSON object on stdout."""
    print(json.dumps(answer, allow_nan=False, default=_plain))


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):  # numpy's scalars and arrays
        return value.tolist()
    raise TypeError(f"{type(value).__name__} has no place in JSON")


class _Console(Console):
    """A console whose reader may leave (`crosspatch train … | head`): the work goes on unseen."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


class Screen:
    """Shows a run on a terminal or in a pipe; use as a context manager.

    stderr: write there instead of to stdout, so that stdout is free for JSON.
    """

    def __init__(self, stderr: bool = False, console: Console | None = None) -> None:
        mute = launch.rank() > 0  # of several processes the first one talks
        plain = {"markup": False, "highlight": False, "force_terminal": False if mute else None}
        self.console = console or _Console(stderr=stderr, quiet=mute, **plain)
        self._live: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._headed = self._several = False
        self._bar_name = TRAINING
        self._first: tuple[int, float] | None = None  # the first step seen, and when

    def __enter__(self) -> Screen:
        if self.console.is_terminal:
            width = max(10, min(self.console.width, WIDTH) - 52)
            self._live = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=width),
                TextColumn("{task.fields[note]}", markup=False),
                console=self.console,
                transient=True,
            )
            self._tasks[READY] = self._live.add_task(READY, total=None, note="")
            self._live.start()
        return self

    def __exit__(self, *failure: object) -> None:
        if self._live is not None:
            self._live.stop()

    def line(self, text: str = "", style: str = "") -> None:
        """One line that only the terminal wraps, so that paths and commands stay whole."""
        self.console.print(Text(visible(text), style), soft_wrap=True)

    def lines(self, rows: Iterable[several.Line]) -> None:
        """Lines with their styles."""
        for row in rows:
            self.line(*row)

    def message(self, text: str) -> None:
        """A sentence of the run."""
        self.line(text)

    def progress(self, what: str, done: int, total: int, note: str = "") -> None:
        """Something long beside the steps: reading pictures, testing. note: how fast it goes."""
        self._bar(what, done, total, f"{done:,} of {total:,}" + (f", {note}" if note else ""))

    def step(self, done: int, total: int, loss: float, images_per_second: float) -> None:
        """An optimiser step was made: `done` of `total` of the whole run."""
        del images_per_second  # it stands in the epoch lines
        now = time.monotonic()
        self._first = self._first or (done, now)
        made, took = done - self._first[0], now - self._first[1]
        left = f"{words.duration(took / made * (total - done))} left" if made > 0 else ""
        self._bar(self._bar_name, done, total, f"step {done:,}/{total:,}  loss {loss:.3f}  {left}")

    def _bar(self, what: str, done: int, total: int, note: str) -> None:
        """Move a bar; while none moves and the plan is not made, one says that work goes on."""
        if self._live is None:
            return
        if what not in self._tasks:
            self._tasks[what] = self._live.add_task(what, total=total, note=note)
        moving = done < total
        self._live.update(self._tasks[what], completed=done, total=total, note=note, visible=moving)
        if READY in self._tasks:
            self._live.update(self._tasks[READY], visible=not moving)

    def _hide_bars(self) -> None:
        if self._live is not None:
            for task in self._tasks.values():
                self._live.remove_task(task)
            self._live.refresh()
        self._tasks.clear()

    def plan(self, info: dict[str, Any]) -> None:
        """The first screen: data, choices and why, time, place."""
        self._hide_bars()
        self._several = info.get("task") == "multilabel"
        role, self._headed, self._first = info.get("role"), False, None
        self._bar_name = f"{TRAINING} the {role}" if role else TRAINING
        what = f"the {role} of a run" if role else f"crosspatch {crosspatch.__version__}"
        self.line(f"{what} on {info.get('data', 'pictures')}", "bold")
        for name, text in _plan_rows(info):
            parts = textwrap.wrap(visible(text), WIDTH - 14, break_on_hyphens=False) or [""]
            for place, part in enumerate(parts):
                label = Text(f"  {'' if place else name:<12}", "cyan")
                self.console.print(label, part, sep="", soft_wrap=True)
        self.line()

    def unreadable(self, rows: Sequence[tuple[str, str]], most: int = 20) -> None:
        """The first files that could not be read, each with its reason."""
        for path, reason in rows[:most]:
            self.line(f"  {path}: {reason}", "yellow")
        if len(rows) > most:
            self.line(f"  and {len(rows) - most:,} more", "yellow")

    def epoch(self, row: dict[str, Any]) -> None:
        """One line per epoch; `*` marks the best so far."""
        if not self._headed:
            self.line(several.EPOCH_HEAD if self._several else EPOCH_HEAD, "cyan")
            self._headed = True
        self.line(epoch_line(row, self._several))

    def done(self, summary: dict[str, Any]) -> None:
        """The last screen: the score, where it fails, the files, what to type next."""
        self._hide_bars()
        out, name = summary["out"], "test" if summary["test"] else "val"
        self.line()
        if summary[name] is None:
            self.line("there are too few pictures to test the model", "bold")
        else:
            self.score({"val": "validation"}.get(name, name), summary[name])
            self.over_baseline(summary[name], name, summary.get("baseline"))
            self.groups(summary[name])
            self.worst_classes(summary[name])
            if "confusion" in summary[name]:
                self.confused(summary[name])
            self.heads(summary[name])
        self.line()
        self.line(f"trained in {words.duration(summary['seconds'])}, kept in {out}")
        self._files(summary.get("files") or {})
        self.line()
        self.line("next, type", "green")
        self.line(f"  {words.command('crosspatch', 'predict', out)} PICTURES…")
        self.line(f"  {words.command('crosspatch', 'eval', out, summary['data'])}")
        self.line(f"  {words.command('crosspatch', 'export', out)}")

    def _files(self, files: dict[str, int]) -> None:
        width = max(map(len, files), default=0)
        for name, bytes_ in sorted(files.items()):
            self.line(f"  {name:{width}}  {words.size(bytes_):>8}")

    def score(self, split: str, metrics: dict[str, Any]) -> None:
        """Accuracy, or mAP, with its interval and the other figures of one split."""
        if "map" in metrics:
            self.lines(several.score(split, metrics))
            return
        pictures = words.plural(metrics["images"], "picture")
        if metrics.get("accuracy") is None:
            self.line(f"{split}: {pictures}, so there is no score", "bold")
            return
        span = words.interval(metrics["low"], metrics["high"])
        text = f"{split} accuracy {words.percent(metrics['accuracy'])}"
        self.line(f"{text} ({span} with 95 % confidence, {pictures})", "bold")
        best, few = metrics["topk"], len(metrics["classes"]) <= metrics["topk"]["k"]
        top = "" if few else f"top-{best['k']} {words.percent(best['accuracy'])}, "
        self.line(f"  {top}macro F1 {words.percent(metrics['macro_f1'])}")
        self.line(
            f"  log-likelihood {words.number(-metrics['nll'])} per picture, "
            f"calibration error {words.percent(metrics['ece'])}"
        )

    def over_baseline(
        self, metrics: dict[str, Any], split: str, baseline: dict[str, Any] | None
    ) -> None:
        """By how much the network is better than what needs none (`training.baseline`)."""
        known = ((baseline or {}).get("linear_probe") or {}).get(split) or {}
        key = "map" if "map" in metrics else "accuracy"
        if baseline is None or known.get(key) is None or metrics[key] is None:
            return
        points = 100 * (metrics[key] - known[key])
        self.line(
            f"  {points:+.1f} points over the baseline, {words.percent(known[key])} by a linear "
            f"layer on {baseline['features']}"
        )

    def heads(self, metrics: dict[str, Any]) -> None:
        """What each head of a distilled network says by itself."""
        found = metrics.get("heads") or ()
        if found:
            self.line("the heads, each by itself", "cyan")
        for one in found:
            groups = [f"{g['name']} {words.percent(g['accuracy'])}" for g in one.get("groups", ())]
            told = f" ({', '.join(groups)})" if groups else ""
            self.line(f"  {one['name']:12}  {words.percent(one['accuracy'])}{told}")

    def groups(self, metrics: dict[str, Any]) -> None:
        """Accuracy of frequent, middling and rare classes, where training had them uneven."""
        found = metrics.get("groups") or ()
        if found:
            self.line("classes by their training pictures", "cyan")
        for one in found:
            known = one["accuracy"] is not None
            span = f" ({words.interval(one['low'], one['high'])})" if known else ""
            kinds = words.plural(len(one["classes"]), "class", "classes")
            trained = words.plural(one["training"], "training picture")
            self.line(
                f"  {one['name']:6}  {words.percent(one['accuracy'])}{span}, {kinds} of {trained}"
            )

    def worst_classes(self, metrics: dict[str, Any], most: int = 3) -> None:
        """The classes found least often, or with the least average precision."""
        if "map" in metrics:
            self.lines(several.worst_classes(metrics, most))
            return
        worst = [row for row in metrics["classes"] if row["recall"] is not None]
        worst = sorted(worst, key=lambda row: (row["recall"], row["name"]))[:most]
        if worst:
            self.line("worst classes", "cyan")
        for row in worst:
            span = words.interval(row["recall_low"], row["recall_high"])
            found = f"{round(row['recall'] * row['support'])} of {row['support']} found"
            self.line(f"  {row['name']}: {found}, {words.percent(row['recall'])} ({span})")

    def confused(self, metrics: dict[str, Any], most: int = 3) -> None:
        """The pairs confused most often."""
        pairs = confused_pairs(metrics)[:most]
        if not pairs:
            self.line("no two classes were confused", "cyan")
            return
        self.line("most confused", "cyan")
        for pair in pairs:
            times = words.plural(pair["count"], "time")
            self.line(f"  {pair['true']} taken for {pair['predicted']}: {times}")

    def class_table(self, metrics: dict[str, Any]) -> None:
        """Precision, recall and F1 of every class that occurs."""
        if "map" in metrics:
            self.lines(several.class_table(metrics))
            return
        rows = [row for row in metrics["classes"] if row["support"] or row["precision"] is not None]
        width = min(max([5, *(cell_len(visible(row["name"])) for row in rows)]), 24)
        head = f"  {'class':{width}}  pictures  precision   recall    95 % range       F1"
        self.line(head, "cyan")
        for row in rows:
            name = set_cell_size(visible(row["name"]), width)
            span = words.interval(row["recall_low"], row["recall_high"]) if row["support"] else "–"
            self.line(
                f"  {name}  {row['support']:>8,}  {words.percent(row['precision']):>9}"
                f"  {words.percent(row['recall']):>7}  {span:>12}  {words.percent(row['f1']):>7}"
            )


def confused_pairs(metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """{"true", "predicted", "count"} of every wrong cell of the confusion table, most first."""
    names = [row["name"] for row in metrics["classes"]]
    cells = [
        {"true": names[i], "predicted": names[j], "count": int(count)}
        for i, row in enumerate(metrics["confusion"])
        for j, count in enumerate(row)
        if i != j and count
    ]
    return sorted(cells, key=lambda cell: (-cell["count"], cell["true"], cell["predicted"]))


def epoch_line(row: dict[str, Any], of_several: bool = False) -> str:
    """The figures of one epoch under `EPOCH_HEAD`, 79 characters with its mark; of_several: labels
    to a picture."""
    place = f"{row['epoch']}/{row['epochs']}"
    figure, span = row.get("val_accuracy"), "–"
    if of_several:
        figure, span = row.get("val_map"), words.percent(figure)
    elif figure is not None:
        span = words.interval(row["val_low"], row["val_high"])
    return (
        f"{place:>8}  {words.duration(row['elapsed']):>7}  {row['train_loss']:6.3f}"
        f"  {words.percent(figure):>7}{'*' if row.get('best') else ' '}"
        f"  {span:>11}  {row['lr']:9.1e}  {row['images_per_second']:8,.0f}"
        f"  {words.duration(row['remaining']):>7}"
    )


def _plan_rows(info: dict[str, Any]) -> Iterable[tuple[str, str]]:
    """(name, text) lines of the first screen; what the run does not know is left out."""
    classes = info.get("classes") or []
    if "images" in info:
        kinds = words.plural(len(classes), "class", "classes")
        skipped = f", {info['skipped']:,} left out" if info.get("skipped") else ""
        yield "pictures", f"{words.plural(info['images'], 'picture')} in {kinds}{skipped}"
    yield from _skipped_rows(info)
    if classes:
        yield "classes", words.listing(classes, 10)
    if info.get("labels"):
        yield "labels", _labels_text(info["labels"])
    if "split" in info:
        yield "split", " · ".join(f"{n:,} {name}" for name, n in info["split"].items())
    if info.get("smallest"):
        rare = info["smallest"]
        yield "smallest", f"{rare['class']}, {words.plural(rare['images'], 'picture')} to train on"
    if info.get("cache"):
        yield "memory", info["cache"]
    if "model" in info:
        yield "model", _model_text(info)
    if "epochs" in info:
        yield "training", _training_text(info)
    if info.get("baseline"):
        yield "baseline", baseline_text(info["baseline"])
    for place, reason in enumerate(info.get("reasons") or []):
        yield "why" if not place else "", reason
    estimate = info.get("estimate")
    if estimate:
        low, high = words.duration(estimate["low"]), words.duration(estimate["high"])
        yield "time", f"about {low}" if low == high else f"{low} to {high}"
    if info.get("resumed_step"):
        yield "resumed", f"from step {info['resumed_step']:,}"
    if "out" in info:
        yield "run folder", str(info["out"])


def baseline_text(baseline: dict[str, Any]) -> str:
    """What needs no network reaches, in a sentence (see `training.baseline`)."""
    probe, near = (baseline.get(kind) or {} for kind in ("linear_probe", "nearest_class_mean"))
    split = "val" if "val" in probe else "test"
    found, means = probe.get(split) or {}, near.get(split) or {}
    key, name = ("map", "mAP ") if "map" in found else ("accuracy", "")
    if found.get(key) is None:
        return "none: there are too few pictures"
    of = {"val": "validation"}.get(split, split)
    also = f", nearest class mean {words.percent(means[key])}" if key in means else ""
    return (
        f"{name}{words.percent(found[key])} of {of} by a linear layer on "
        f"{baseline['features']}{also}; took {words.duration(baseline['seconds'])}"
    )


def _labels_text(labels: dict[str, Any]) -> str:
    none = f", none to {words.plural(labels['none'], 'picture')}" if labels["none"] else ""
    return f"{labels['mean']:.2g} to a picture, {labels['most']} at most{none}"


def _skipped_rows(info: dict[str, Any], most: int = 5) -> Iterable[tuple[str, str]]:
    files = info.get("skipped_files") or []
    for place, one in enumerate(files[:most]):
        yield "" if place else "left out", f"{one['path']}: {one['reason']}"
    more = info.get("skipped", 0) - most
    if files and more > 0:
        yield "", f"and {more:,} more, listed in skipped.csv"


def _model_text(info: dict[str, Any]) -> str:
    parts = [str(info["model"])]
    if info.get("reduce"):
        parts.append(f"reduced by {info['reduce']}")
    if info.get("size"):
        parts.append("x".join(str(side) for side in info["size"]) + " pixels")
    if info.get("fit"):
        parts.append(f"fit by {info['fit']}")
    if info.get("parameters"):
        parts.append(f"{words.count(info['parameters'])} parameters")
    if info.get("macs"):
        parts.append(f"{words.count(info['macs'])} multiply-adds")
    return ", ".join(parts)


def _training_text(info: dict[str, Any]) -> str:
    probe = info.get("penalties", 0)
    parts = [f"linear probe, {probe} penalties" if probe else words.plural(info["epochs"], "epoch")]
    if info.get("steps") and not probe:
        parts.append(f"{info['steps']:,} steps of {info.get('batch', '?')} pictures")
    if info.get("lr") and not probe:
        parts.append(f"rate {info['lr']:.2g}")
    if info.get("objective") not in (None, "supervised"):
        parts.append(f"objective of {info['objective']}")
    if info.get("precision"):
        parts.append(f"{info['precision']} on {info.get('device', 'cpu')}")
    return ", ".join(parts)
