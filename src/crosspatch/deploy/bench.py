# SPDX-License-Identifier: Apache-2.0
"""Engine x precision x batch x threads on this machine, beside the rate of its matrix products.

For one number of threads and one batch everything that is compared takes turns with the others and
with the fastest plain product of matrices, so a busy machine slows all of them alike.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import crosspatch
from crosspatch.deploy.bundle import Bundle, check_pictures
from crosspatch.deploy.engines import Engine, Setting, open_engine
from crosspatch.deploy.peak import Peak, peaks
from crosspatch.deploy.subject import MODEL, ORDER, Subject, prepare
from crosspatch.deploy.torch_engine import TorchEngine, torch_threads
from crosspatch.errors import CrosspatchError, UsageError, near
from crosspatch.metrics.latency import Timing, alternate, ratio
from crosspatch.processor import processor, usable_cores
from crosspatch.training.package import Trained
from crosspatch.versions import installed

BATCHES = (1, 8)
SECONDS = 90.0
MOST = 40  # turns of everything at one batch and number of threads
SHARE = 0.3  # of the peak: what networks reach about, for the estimate of the time alone
REFERENCE = ("torch", "fp32")
PEAK = "peak"
CALL, OPENING = 2e-3, 1.5  # seconds beside the products, and to open the engines: for the estimate


class Report(Protocol):
    """Who is told how far it is: `cli.screen.Screen` is one."""

    def message(self, text: str) -> None: ...

    def progress(self, what: str, done: int, total: int) -> None: ...


class Row(NamedTuple):
    """One measurement. took: seconds of a call with `batch` pictures; share: of the fp32 peak, the
    rate that the fastest product had in the best 5 % of the same turns; faster: how many times as
    fast as torch fp32, None where that was not measured."""

    model: str
    setting: Setting
    batch: int
    took: Timing
    share: float
    faster: float | None

    @property
    def per_picture(self) -> float:
        """Seconds."""
        return self.took.median / self.batch


class Benched(NamedTuple):
    """What was measured. peaks: threads -> precision -> the fastest plain product; remarks: what
    could not be measured and why; hardware: processor, cores, features and versions."""

    subjects: list[Subject]
    rows: list[Row]
    peaks: dict[int, dict[str, Peak]]
    remarks: list[str]
    hardware: dict[str, Any]
    seconds: float


def bench(
    names: Sequence[str],
    folder: Path,
    report: Report,
    *,
    batches: Sequence[int] = BATCHES,
    threads: Sequence[int] = (),
    engines: Sequence[str] = (),
    size: int | tuple[int, int] | None = None,
    seconds: float = SECONDS,
) -> Benched:
    """Measure models, runs and bundles. folder: an empty one, for exports.

    threads: () for one and all usable cores; engines: () for all of them; size: pixels, for models
    by name. What has not begun when `seconds` are over is left out, with a remark. Raises
    UsageError for names and settings that cannot be had here, DataError for damaged runs.
    """
    began = time.monotonic()
    remarks: list[str] = []
    threads = _threads(threads)
    chosen = _engines(engines)
    subjects = []
    for place, name in enumerate(dict.fromkeys(names or [MODEL])):
        report.message(f"preparing {name}")
        file, strict = folder / f"{place}.onnx", bool(engines)
        subjects.append(prepare(name, file, chosen, remarks, size=size, strict=strict))
    top = {}
    for count in threads:
        with torch_threads(count):
            top[count] = peaks(count, bf16="bf16" in processor().features)
    groups = [(t, s, b) for t in threads for s in subjects for b in batches]
    rows = _measure(groups, top, chosen, began + seconds, remarks, report)
    if not rows:
        raise UsageError(
            f"nothing runs with {', '.join(chosen)} here ({'; '.join(remarks) or 'no engine'})",
            "an engine that is installed and can run what was named",
            "pip install 'crosspatch[onnx,openvino]'",
        )
    remarks = list(dict.fromkeys(remarks))
    return Benched(subjects, rows, top, remarks, hardware(), time.monotonic() - began)


def hardware() -> dict[str, Any]:
    """Processor, usable cores, features, and the versions of what computes."""
    return {
        "processor": processor().name,
        "cores": usable_cores(),
        "features": " ".join(processor().features),
        "crosspatch": crosspatch.__version__,
        "python": platform.python_version(),
        **installed(("torch", "onnxruntime", "openvino")),
    }


def _threads(asked: Sequence[int]) -> list[int]:
    cores = usable_cores()
    if asked and max(asked) > cores:
        raise UsageError(
            f"--threads {max(asked)}", f"this process may use {cores}", f"--threads {cores}"
        )
    return sorted(set(asked or (1, cores)))


def _engines(asked: Sequence[str]) -> list[str]:
    for name in asked:
        if name not in ORDER:
            raise UsageError(
                f"--engine {name}",
                f"one or more of {', '.join(ORDER)}, with commas between",
                f"--engine {near(name, ORDER, 1) or ORDER[0]}",
            )
    return [name for name in ORDER if not asked or name in asked]


def _measure(
    groups: Sequence[tuple[int, Subject, int]],
    top: dict[int, dict[str, Peak]],
    engines: Sequence[str],
    deadline: float,
    remarks: list[str],
    report: Report,
) -> list[Row]:
    """All groups of (threads, subject, batch); each takes its part of the time that is left."""
    costs = [_cost(group, top, engines) for group in groups]
    new = [not place or groups[place - 1][:2] != group[:2] for place, group in enumerate(groups)]
    whole = sum(costs) * 2 * MOST + sum(new) * OPENING
    report.message(f"measuring takes about {max(1, min(whole, deadline - time.monotonic())):.0f} s")
    rows: list[Row] = []
    opened: dict[tuple[str, str], Engine] = {}
    for place, (threads, subject, batch) in enumerate(groups):
        if rows and time.monotonic() >= deadline:
            remarks.append(f"not measured, as the time was over: {_named(subject, threads, batch)}")
            continue
        with torch_threads(threads):
            if new[place]:
                opened = _open(subject, engines, threads, remarks)
            left = deadline - time.monotonic() - sum(new[place + 1 :]) * OPENING
            budget = max(0, left) * costs[place] / max(sum(costs[place:]), 1e-9)
            rows += _group(subject, opened, batch, top[threads]["fp32"], budget)
        report.progress("measuring", place + 1, len(groups))
    return rows


def _named(subject: Subject, threads: int, batch: int) -> str:
    return f"{subject.name}, {threads} thread{'s' if threads > 1 else ''}, batch {batch}"


def _cost(
    group: tuple[int, Subject, int], top: dict[int, dict[str, Peak]], engines: Sequence[str]
) -> float:
    """About how many seconds one turn of all engines takes."""
    threads, subject, batch = group
    runs = len(subject.settings(engines))
    work = 2 * subject.macs * batch / (SHARE * top[threads]["fp32"].rate)
    return runs * (work + CALL)


def _open(
    subject: Subject, engines: Sequence[str], threads: int, remarks: list[str]
) -> dict[tuple[str, str], Engine]:
    """Engines by (engine, precision); one that cannot be opened becomes a remark."""
    opened: dict[tuple[str, str], Engine] = {}
    for engine, precision, bundle in subject.settings(engines):
        try:
            opened[engine, precision] = _engine(subject, engine, precision, bundle, threads)
        except CrosspatchError as error:
            remarks.append(f"{subject.name} in {engine} {precision}: {error.got}; {error.do}")
    return opened


def _engine(
    subject: Subject, engine: str, precision: str, bundle: Bundle | None, threads: int
) -> Engine:
    if bundle is not None:
        return open_engine(bundle, engine, precision, threads)
    trained = cast(Trained, subject.trained)  # torch alone needs no bundle
    return TorchEngine(trained, threads=threads, precision=precision, device="cpu")


def _group(
    subject: Subject,
    opened: dict[tuple[str, str], Engine],
    batch: int,
    peak: Peak,
    seconds: float,
) -> list[Row]:
    """Rows of everything that is opened, at one batch, in turns with the product of matrices."""
    pictures = check_pictures(subject.size, batch)
    keys = {" ".join(key): key for key in opened}
    calls: dict[str, Callable[[], object]] = {
        name: partial(opened[key].run, pictures) for name, key in keys.items()
    }
    if not calls:
        return []
    times = alternate(calls | {PEAK: peak.product.call}, seconds=seconds, most=MOST)
    rate = peak.product.operations / times[PEAK].low
    work = 2 * subject.macs * batch
    rows = []
    for name, key in keys.items():
        torch_took = times.get(" ".join(REFERENCE))
        faster = None if torch_took is None else ratio(torch_took, times[name]).median
        share = work / (times[name].median * rate)
        rows.append(Row(subject.name, opened[key].setting, batch, times[name], share, faster))
    return rows
