# SPDX-License-Identifier: Apache-2.0
"""What `bench` found, as a table, as sentences and as a figure."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from crosspatch.deploy.bench import Benched, Row
from crosspatch.deploy.engines import precision_of
from crosspatch.errors import UsageError
from crosspatch.metrics.latency import Timing, ratio
from crosspatch.processor import processor

TABLE, FIGURE = "bench.csv", "bench.png"
SAME = 0.03  # a ratio of times nearer to 1 than this is no difference
COLOURS = {
    ("torch", "fp32"): "#8a8a8a",
    ("torch", "bf16"): "#4d4d4d",
    ("onnxruntime", "fp32"): "#0072b2",
    ("onnxruntime", "int8"): "#56b4e9",
    ("openvino", "fp32"): "#d55e00",
    ("openvino", "bf16"): "#cc79a7",
    ("openvino", "int8"): "#e69f00",
}
"""One hue per engine out of the palette of Okabe and Ito, which colour-blind readers tell apart."""


def records(benched: Benched) -> list[dict[str, Any]]:
    """One flat row per measurement; times in milliseconds, of a call and of one picture."""
    subjects = {one.name: one for one in benched.subjects}
    rows = []
    for row in benched.rows:
        subject = subjects[row.model]
        rows.append({
            "model": row.model,
            "size": "x".join(str(side) for side in subject.size),
            "parameters": subject.parameters,
            "macs": subject.macs,
            **row.setting._asdict(),
            "batch": row.batch,
            "ms": round(1e3 * row.took.median, 4),
            "ms_low": round(1e3 * row.took.low, 4),
            "ms_high": round(1e3 * row.took.high, 4),
            "turns": row.took.count,
            "ms_per_picture": round(1e3 * row.per_picture, 4),
            "pictures_per_second": round(1 / row.per_picture, 2),
            "share_of_peak": round(row.share, 4),
            "times_torch": None if row.faster is None else round(row.faster, 3),
        })  # fmt: skip
    return rows


def table(benched: Benched) -> list[dict[str, Any]]:
    """`records` with the machine and the versions in every row."""
    return [{**row, **benched.hardware} for row in records(benched)]


def verdicts(benched: Benched) -> list[str]:
    """What the figures say, in sentences: best latency, best throughput, what int8 and bf16 do."""
    told = []
    for subject in benched.subjects:
        rows = [row for row in benched.rows if row.model == subject.name]
        sizes = {precision_of(one.info): one.size for one in subject.bundles}
        head = f"{subject.name}: " if len(benched.subjects) > 1 else ""
        told += [head + text for text in [*_best(rows), *_against_fp32(rows, sizes)]]
    return told


def _best(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return []
    quick = min(rows, key=lambda row: row.took.median)
    many = min(rows, key=lambda row: row.per_picture)
    pictures = "one picture" if quick.batch == 1 else f"{quick.batch} pictures"
    batches = "one at a time" if many.batch == 1 else f"in batches of {many.batch}"
    return [
        f"quickest answer: {quick.setting.describe()}, {_ms(quick.took.median)} for {pictures}"
        f"{_than_torch(quick)}",
        f"most pictures: {many.setting.describe()}, {batches}, {1 / many.per_picture:,.0f} "
        f"pictures/s{_than_torch(many)}",
    ]


def _against_fp32(rows: Sequence[Row], sizes: dict[str, int]) -> list[str]:
    """A sentence for each engine and smaller precision: its time beside the same engine's fp32."""
    told = []
    for engine in dict.fromkeys(row.setting.engine for row in rows):
        for precision in ("bf16", "int8"):
            found = [times.median for times in _pairs(rows, engine, precision)]
            if found:
                told.append(_compared(engine, precision, min(found), max(found), sizes))
    return told


def _compared(engine: str, precision: str, low: float, high: float, sizes: dict[str, int]) -> str:
    """low, high: the least and the greatest ratio to the time of fp32 in the same engine."""
    span = f"{low:.2f}" if high - low < 0.005 else f"{low:.2f} to {high:.2f}"
    if high < 1 - SAME:
        return f"{precision} is faster than fp32 in {engine}: {span} of its time"
    why = "" if processor().fast_int8 else "; this processor has no fast int8 products (VNNI)"
    if low > 1 + SAME:
        text = f"{precision} is slower than fp32 in {engine}: {span} times as long{why}"
    elif low >= 1 - SAME and high <= 1 + SAME:
        text = f"{precision} is as fast as fp32 in {engine}: {span} of its time{why}"
    else:
        text = f"{precision} in {engine} takes {span} of the time of fp32"
    if precision != "int8":
        return text.removesuffix(why)
    if not {"fp32", "int8"} <= set(sizes):
        return text
    return f"{text}; what it saves is size, {_mb(sizes['int8'])} instead of {_mb(sizes['fp32'])}"


def _pairs(rows: Sequence[Row], engine: str, precision: str) -> list[Timing]:
    """Ratios of the times of a precision and fp32 in one engine, one per threads and batch."""
    kept = {(*row.setting, row.batch): row.took for row in rows}
    return [
        ratio(took, kept[engine, "fp32", threads, batch])
        for (name, kind, threads, batch), took in kept.items()
        if (name, kind) == (engine, precision) and (engine, "fp32", threads, batch) in kept
    ]


def _than_torch(row: Row) -> str:
    if row.faster is None or row.setting[:2] == ("torch", "fp32"):
        return ""
    return f", {row.faster:.2f} times as fast as torch fp32"


def _mb(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.{2 if seconds < 0.01 else 1}f} ms"


def check_folder(folder: Path) -> None:
    """Makes the folder for the table and the figure. Raises UsageError where that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writing-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UsageError(
            f"--out {folder}: {(error.strerror or str(error)).lower()}",
            "a folder that you may write into",
            "--out bench",
        ) from error


def write(folder: Path, benched: Benched) -> list[Path]:
    """The table and the figure into a folder, each aside first; returns their paths."""
    rows = table(benched)

    def write_rows(path: Path) -> None:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)

    def write_figure(path: Path) -> None:
        figure(benched).savefig(path, format="png", dpi=110)

    makers: dict[str, Callable[[Path], None]] = {TABLE: write_rows, FIGURE: write_figure}
    for name, make in makers.items():
        aside = folder / f".writing-{os.getpid()}-{name}"
        try:
            make(aside)
            os.replace(aside, folder / name)
        finally:
            aside.unlink(missing_ok=True)
    return [folder / name for name in makers]


def figure(benched: Benched) -> Any:
    """Latency per picture, one panel per model: bars in groups of threads and batch, whiskers from
    5 to 95 % of the turns, and below them the time that the multiply-adds alone would take at the
    peak. Returns a `matplotlib.figure.Figure`."""
    from matplotlib.figure import Figure

    models = [
        one.name for one in benched.subjects if any(r.model == one.name for r in benched.rows)
    ]
    made = Figure(figsize=(8, 1.2 + 3.4 * len(models)), layout="constrained")
    panels = made.subplots(len(models), 1, squeeze=False)[:, 0]
    for panel, model in zip(panels, models, strict=True):
        _panel(panel, model, [row for row in benched.rows if row.model == model])
    names = {text: handle for panel in panels for handle, text in _legend(panel)}
    made.legend(
        names.values(), names.keys(), loc="outside upper center", ncols=4, frameon=False, fontsize=9
    )
    made.supxlabel(processor().describe(), fontsize=8, color="#555555")
    return made


def _legend(panel: Any) -> list[tuple[Any, str]]:
    return list(zip(*panel.get_legend_handles_labels(), strict=True))


def _panel(panel: Any, model: str, rows: Sequence[Row]) -> None:
    groups = list(dict.fromkeys((row.setting.threads, row.batch) for row in rows))
    kinds = list(dict.fromkeys(row.setting[:2] for row in rows))
    width = 0.84 / len(kinds)
    for place, kind in enumerate(kinds):
        here = [row for row in rows if row.setting[:2] == kind]
        middle = [
            groups.index((row.setting.threads, row.batch)) + width * (place - (len(kinds) - 1) / 2)
            for row in here
        ]
        heights = [1e3 * row.per_picture for row in here]
        panel.bar(middle, heights, 0.94 * width, color=COLOURS[kind], label=" ".join(kind))
        ends = [[1e3 * abs(row.took[end] - row.took.median) / row.batch for row in here]
                for end in (1, 2)]  # fmt: skip
        panel.errorbar(middle, heights, ends, fmt="none", ecolor="#333333", elinewidth=0.8)
    for place, group in enumerate(groups):
        one = next(row for row in rows if (row.setting.threads, row.batch) == group)
        floor = 1e3 * one.per_picture * one.share
        label = "multiply-adds at the fp32 peak" if place == 0 else None
        panel.plot([place - 0.45, place + 0.45], [floor] * 2, "k--", linewidth=1.2, label=label)
    panel.set_xticks(range(len(groups)), [_named(*group) for group in groups])
    panel.set_title(model, loc="left", fontsize=11)
    panel.set_ylabel("ms per picture")
    panel.grid(axis="y", color="#dddddd", linewidth=0.6)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)


def _named(threads: int, batch: int) -> str:
    return f"{threads} thread{'s' if threads > 1 else ''}\nbatch {batch}"
