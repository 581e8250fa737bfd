# SPDX-License-Identifier: Apache-2.0
"""A look at DATA before a training: what is wrong with it, what is worth a second look, and the
command that mends it. Nothing is changed."""

from __future__ import annotations

import csv
import io
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from crosspatch.data.checks import (
    count_findings,
    file_findings,
    shape_findings,
    spectrum_findings,
)
from crosspatch.data.findings import Finding, Place, quoted
from crosspatch.data.labels import is_one_name, numbers
from crosspatch.data.leakage import (
    burst_findings,
    burst_sets,
    copy_findings,
    find_sets,
    source_findings,
    sources_of,
)
from crosspatch.data.lenient import Opened, open_leniently
from crosspatch.data.looking import Look, look_at
from crosspatch.data.skipped import quoting
from crosspatch.data.sources import Source
from crosspatch.data.traps import Counts, folder_counts, trap_findings
from crosspatch.errors import DataError

__all__ = ["Audit", "Finding", "audit"]

_ORDER = {"bad": 0, "warn": 1, "good": 2}
_LISTED = ("plain", "animated", "unreadable", "sideways", "tiny", "loose")
"""Kinds of single pictures whose command takes them out."""


@dataclass
class Audit:
    """What was found. opened: the data as they are; findings: the worst first; classes: a row for
    each class, {"name", "all", "unreadable", and a count for each split}; histograms: name ->
    {"edges", "counts", "unit"}; modes, formats: how often each occurs; files: name -> text of the
    lists and tables that the commands read, to be written beside the page; not_looked: what was not
    examined and why."""

    data: str
    opened: Opened
    findings: list[Finding]
    classes: list[dict[str, Any]]
    histograms: dict[str, dict[str, Any]]
    modes: dict[str, int]
    formats: dict[str, int]
    pictures: int
    unreadable: int
    seconds: float
    files: dict[Path, str] = field(default_factory=dict)
    not_looked: list[str] = field(default_factory=list)

    @property
    def source(self) -> Source:
        """The pictures, some of which may be unreadable."""
        return self.opened.source

    @property
    def needs_a_hand(self) -> bool:
        """Whether there is a finding of level "bad"."""
        return any(one.level == "bad" for one in self.findings)

    def add(self, findings: Iterable[Finding]) -> None:
        """Further findings, put in their place."""
        self.findings += findings
        self.findings.sort(key=lambda one: _ORDER[one.level])

    def relabel(self, labels: Mapping[int, tuple[str, float]]) -> str:
        """The command that trains with other labels, {number of a picture: (label, how sure)}: the
        table that it reads is among `files` then, those pictures first. Of an archive the command
        unpacks it; "" for data without files, and for names that a table would
        change (spaces around them, `a|b`)."""
        place = self.opened.place
        if place.kind not in ("folder", "table"):
            return place.unpack()
        if not all(is_one_name(name) for name in self.source.classes):
            return ""
        self.files[place.table_of("labels")] = _table(self.opened, set(), (), labels)
        return f"crosspatch train {quoted(place.table_of('labels'))}"

    def to_dict(self) -> dict[str, Any]:
        """All of it for JSON and for the page, without the source and the lists' texts."""
        return {
            "data": self.data,
            "pictures": self.pictures,
            "unreadable": self.unreadable,
            "seconds": round(self.seconds, 1),
            "needs_a_hand": self.needs_a_hand,
            "findings": [one._asdict() for one in self.findings],
            "classes": self.classes,
            "histograms": self.histograms,
            "modes": self.modes,
            "formats": self.formats,
            "files": sorted(str(path) for path in self.files),
            "not_looked": self.not_looked,
        }


def audit(
    spec: str,
    *,
    beside: Path = Path("audit"),
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    **reading: Any,
) -> Audit:
    """Look at every picture of DATA once. beside: what the names of lists begin with, which the
    commands read; nothing is written here. reading: options of `open_source`.

    Raises UsageError and DataError where there is nothing to look at (see `open_leniently`).
    """
    began = time.monotonic()
    opened = open_leniently(spec, beside, **reading)
    looks = look_at(opened.source, workers=workers, progress=progress)
    return judge(opened, looks, spec, began)


def judge(opened: Opened, looks: Sequence[Look], spec: str, began: float) -> Audit:
    """The audit of pictures that were looked at."""
    source, going = opened.source, dict[str, list[int]]()
    counts = _readable(opened, looks)
    findings = [*trap_findings(opened), *count_findings(opened, counts)]
    findings += [*file_findings(opened, looks), *shape_findings(opened, looks)]
    sets = find_sets(looks)
    bursts, named = burst_sets(source, looks), sources_of(source, looks)
    told = [set(one) for one in (*sets.twins, *sets.near)]
    same = lambda one: len({named.get(at) for at in one}) == 1 and one[0] in named
    rest = [one for one in bursts if not any(set(one) <= known for known in told) and not same(one)]
    for finding, taken_out in (
        *copy_findings(opened, looks, sets),
        *burst_findings(opened, rest),
        *source_findings(opened, named),
    ):
        findings.append(finding)
        going[finding.kind] = taken_out
    findings += spectrum_findings(opened, looks)
    if opened.refusal is not None and not any(one.level == "bad" for one in findings):
        findings.append(_refused(opened.refusal, opened.place))
    made = Audit(
        spec, opened, [], _class_rows(opened, looks), _histograms(looks),
        _often(look.header.mode for look in looks if look.header),
        _often(look.header.format for look in looks if look.header),
        len(source), sum(look.fault is not None for look in looks), 0.0,
    )  # fmt: skip
    made.add(findings)
    made.files = _files(opened, made.findings, going, rest)
    made.seconds = time.monotonic() - began
    return made


def _refused(problem: DataError, place: Place) -> Finding:
    return Finding(
        "bad", "refused", "A training would not start", f"{problem.got}. {problem.expected}. "
        f"{problem.do}.", place.again(), [],
    )  # fmt: skip


def _readable(opened: Opened, looks: Sequence[Look]) -> Counts:
    """Readable pictures of each class; empty folders are told by `traps`."""
    counts: Counts = {split: Counter() for split in folder_counts(opened)}
    for item, look in zip(opened.source.items, looks, strict=True):
        for number in numbers(item.label):
            counts[item.split or ""][opened.source.classes[number]] += look.fault is None
    return counts


def _class_rows(opened: Opened, looks: Sequence[Look]) -> list[dict[str, Any]]:
    source = opened.source
    splits = sorted({item.split or "" for item in source.items}) or [""]
    rows = [
        {"name": name, "all": 0, "unreadable": 0, **{split: 0 for split in splits if split}}
        for name in source.classes
    ]
    for item, look in zip(source.items, looks, strict=True):
        for number in numbers(item.label):
            rows[number]["all"] += 1
            rows[number]["unreadable"] += look.fault is not None
            if item.split:
                rows[number][item.split] += 1
    return rows


def _histograms(looks: Sequence[Look]) -> dict[str, dict[str, Any]]:
    shapes = np.array([one.shape for one in looks if one.fault is None and min(one.shape) > 0])
    if not len(shapes):
        return {}
    sides, aspect = shapes.min(axis=1), shapes[:, 1] / shapes[:, 0]
    sizes = np.array([one.size for one in looks if one.fault is None and one.size]) / 1000
    told = {"shorter side": (sides, "pixels"), "width over height": (aspect, "times")}
    if len(sizes):
        told["file"] = (sizes, "kB")
    return {name: _histogram(values, unit) for name, (values, unit) in told.items()}


def _histogram(values: np.ndarray, unit: str) -> dict[str, Any]:
    low, high = float(values.min()), float(values.max())
    even = high / max(low, 1e-9) < 4
    edges = np.linspace(low, high, 25) if even else np.geomspace(max(low, 1e-3), high, 25)
    if low == high:
        edges = np.array([0.9 * low, 1.1 * high + 1e-9])
    edges[0], edges[-1] = min(edges[0], low), max(edges[-1], high)
    counts = np.histogram(values, edges)[0]
    median = float(np.median(values))
    return {
        "edges": edges.round(4).tolist(), "counts": counts.tolist(), "unit": unit,
        "least": low, "median": median, "greatest": high, "log": not even,
    }  # fmt: skip


def _often(names: Iterable[str]) -> dict[str, int]:
    return dict(Counter(names).most_common())


# ---------------------------------------------------------------------- lists and tables


def _files(
    opened: Opened,
    findings: Sequence[Finding],
    going: dict[str, list[int]],
    bursts: Sequence[tuple[int, ...]],
) -> dict[Path, str]:
    """The texts of what the commands read. Of a name with a line break no line can be written: it
    is left out."""
    place, source = opened.place, opened.source
    lists = {
        one.kind: [opened.top + item["path"] for item in one.items]
        for one in findings if one.kind in _LISTED
    }  # fmt: skip
    for kind, items in going.items():
        lists[kind] = [opened.top + source.items[at].key for at in items]
    lists = {kind: sorted(set(paths)) for kind, paths in lists.items() if paths}
    made: dict[Path, str] = {}
    if place.kind == "folder":
        for kind, paths in lists.items():
            lines = [one for one in paths if "\n" not in one]
            made[place.list_of(kind)] = "".join(f"{one}\n" for one in lines)
    out = {path for paths in lists.values() for path in paths}
    if place.kind == "table" and out:
        made[place.table_of("kept")] = _table(opened, out, ())
    if place.kind in ("folder", "table") and any(one.kind == "bursts" for one in findings):
        made[place.table_of("groups")] = _table(opened, set(), bursts)
    return made


def _table(
    opened: Opened,
    without: set[str],
    bursts: Sequence[tuple[int, ...]],
    labels: Mapping[int, tuple[str, float]] | None = None,
) -> str:
    """A table that `crosspatch train` reads: path, label, split, group (the data's own, else the
    burst); with other `labels` for some pictures these stand first, with the label that each has
    now and how sure the other is."""
    source, spec = opened.source, Path(opened.place.spec)
    root = (spec if opened.place.kind == "folder" else spec.parent).absolute()
    group = {at: f"burst {number}" for number, one in enumerate(bursts, 1) for at in one}
    given = any(item.split for item in source.items)
    kept = bool(bursts) or any(item.group for item in source.items)
    head = ["path", "label", *(["split"] if given else []), *(["group"] if kept else [])]
    new = labels or {}
    head += ["was", "sure"] if new else []
    held = io.StringIO()
    rows = csv.writer(held, lineterminator="\n", quoting=quoting(item.key for item in source.items))
    rows.writerow(head)
    for at in [*new, *(at for at in range(len(source)) if at not in new)]:
        item = source.items[at]
        if opened.top + item.key in without:
            continue
        was = source.named(item.label)
        label, sure = new.get(at, (was, ""))
        row = [str(root / (opened.top + item.key)), label, *[item.split or "train"] * given]
        row += [item.group or group.get(at, f"alone {at}")] if kept else []
        rows.writerow([*row, *([was, sure] if new else [])])
    return held.getvalue()
