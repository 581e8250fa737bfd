# SPDX-License-Identifier: Apache-2.0
"""Very many pictures to one table: in parts, on all cores, with memory that does not grow.

A bundle is answered by a process to a core, each with an engine of one thread of its own: on four
busy cores that took 0.4 to 0.7 of the time of one engine fed by threads (benchmarks/batch.py). They
are forked before any engine is opened (half a second of processor time in all); where one was
opened already they begin anew. A run is answered here, by torch. A part is PART pictures of the
list, and is cut into the engine's batches alike whoever does it: int8 with dynamic scales answers a
picture with an eye on its batch, and a table must not depend on who was killed when.

The rows are those of `deploy.table`, in its order: what was read, then what was not. This module
does not import torch.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import crosspatch
from crosspatch.data import workers as processes
from crosspatch.deploy.bundle import read_bundle
from crosspatch.deploy.choice import choose
from crosspatch.deploy.engines import Setting, opened
from crosspatch.deploy.loading import MANY, load, weights_hash
from crosspatch.deploy.parts import SHOWN, Part, Parts
from crosspatch.deploy.predictor import Predictor
from crosspatch.deploy.table import bad_row, columns, good_row, lines, rows_of
from crosspatch.errors import Interrupted, UsageError
from crosspatch.processor import usable_cores
from crosspatch.versions import installed

PART = 256
"""Pictures to a part, a multiple of every engine's batch: what a kill costs each process."""
SETTING = "setting"
Progress = Callable[[int, int, int], None]
"""Told (pictures done, all of them, those that an earlier process had done)."""


class Told(NamedTuple):
    """What was done. answered, unreadable: pictures; first: (name, reason) of the first SHOWN that
    could not be read; kept: pictures that an earlier process had done; workers: processes."""

    setting: Setting
    classes: tuple[str, ...]
    thresholds: tuple[float, ...]
    reduction: str
    answered: int
    unreadable: int
    first: list[tuple[str, str]]
    kept: int
    workers: int


class _Stopped(Exception):
    """The parent was interrupted: a worker gives up its part."""


class _Job:
    """Answers a stretch of the list; called in another process, or here. `run` is opened by each
    process for itself, unless a predictor is given.

    chunks: the stretches. Their names are kept as texts: a forked process that touches a hundred
    thousand strings makes copies of their memory, for they count who refers to them.
    """

    def __init__(self, run: Path, engine: str, paths: Sequence[str], part: int, k: int) -> None:
        self.run, self.engine, self.k = run, engine, k
        starts = range(0, len(paths), part)
        self.chunks = [range(at, min(at + part, len(paths))) for at in starts]
        self._names = {one: json.dumps(paths[one.start : one.stop]) for one in self.chunks}
        self.given: Predictor | None = None
        self.stop = multiprocessing.get_context("fork" if _forks() else "spawn").Event()
        self._own: Predictor | None = None

    def __call__(self, chunk: range) -> tuple[int, Part]:
        paths = json.loads(self._names[chunk])
        predictor, readers = self._predictor()
        answers = predictor.predict(paths, readers=readers, progress=self._check)
        rows = rows_of(paths, answers, self.k)
        bad = [(paths[one.index], one.reason) for one in answers.failures]
        width = len(columns(min(self.k, len(answers.classes)), bool(answers.thresholds)))
        good_lines = lines(map(good_row, rows))
        bad_lines = lines(bad_row(path, reason, width) for path, reason in bad)
        return chunk.start, Part(len(rows), len(bad), bad[:SHOWN], good_lines, bad_lines)

    def _predictor(self) -> tuple[Predictor, int | None]:
        if self.given is not None:
            return self.given, None
        if self._own is None:
            self._own = load(self.run, engine=self.engine, threads=1)
        return self._own, 1

    def _check(self, done: int, total: int) -> None:
        if self.stop.is_set():
            raise _Stopped


def predict_many(
    run: Path,
    paths: Sequence[str],
    missing: Sequence[tuple[str, str]],
    table: Path,
    *,
    topk: int = 3,
    engine: str = "auto",
    workers: int | None = None,
    overwrite: bool = False,
    part: int = PART,
    again: str = "run it again",
    progress: Progress = lambda done, total, kept: None,
) -> Told:
    """Write the table of the answers to `paths`, going on where a killed process left off.

    run: a run folder or a bundle; missing: (name, reason) of what is not there, rows of the table
    too; workers: processes, None for one to a core; overwrite: begin anew where the parts beside
    the table are of another job; part: pictures to a part; again: the command that goes on. Raises
    UsageError where they are and where nothing can be written, Interrupted for Ctrl-C, DataError
    for a damaged model or a process that was killed: the parts that are done stay.
    """
    with Parts(table) as parts:
        job = _Job(run, engine, paths, part, topk)
        model = _model(run, job)
        about = _about(model, paths, missing, topk, engine, part)
        state = None if overwrite else _same(parts, about)
        if state is None:
            setting = model.setting or _chosen(run, engine)
            parts.begin(about | {SETTING: list(setting)})
        else:
            setting = Setting(*state[SETTING])
        if job.given is None:
            job.engine = setting.engine + ("-bf16" if setting.precision == "bf16" else "")
        parts.resume()
        count = (workers or usable_cores()) if job.given is None else 1
        count = max(1, min(count, len(job.chunks)))
        kept = _done(parts)
        with _told_of(parts, len(paths), again):
            _work(parts, job, count, part, lambda done: progress(done, len(paths), kept))
            found = _counts(parts, missing)
            names = columns(min(topk, len(model.classes)), bool(model.thresholds))
            away = lines(bad_row(path, reason, len(names)) for path, reason in missing)
            parts.join(lines([names]), [away])
    return Told(setting, model.classes, model.thresholds, model.reduction, *found, kept, count)


def _work(
    parts: Parts, job: _Job, workers: int, part: int, progress: Callable[[int], None]
) -> None:
    """Make the parts that are not there yet."""
    left = [chunk for chunk in job.chunks if chunk.start // part not in parts.done]
    done = _done(parts)
    progress(done)
    if not left:
        return
    with processes.pool(workers, job, fork=_forks()) as work:
        try:
            for start, made in work(left):
                parts.add(start // part, made)
                done += made.rows + made.unreadable
                progress(done)
        except BaseException:
            job.stop.set()
            raise


@contextmanager
def _told_of(parts: Parts, total: int, again: str) -> Iterator[None]:
    """Ctrl-C is told with what is there already."""
    try:
        yield
    except KeyboardInterrupt:
        done = f"{_done(parts):,} of {total:,} pictures" if parts.done else "no picture"
        raise Interrupted(
            f"stopped by Ctrl-C with {done} done",
            f"what is done is kept in {parts.folder}",
            again,
        ) from None


def _done(parts: Parts) -> int:
    return sum(one.rows + one.unreadable for one in parts.done.values())


def _counts(
    parts: Parts, missing: Sequence[tuple[str, str]]
) -> tuple[int, int, list[tuple[str, str]]]:
    """(answered, unreadable, the first of the unreadable), as the table has them."""
    first, made = list(missing[:SHOWN]), [parts.done[number] for number in sorted(parts.done)]
    for one in made:
        first += one.first[: SHOWN - len(first)]
    bad = len(missing) + sum(one.unreadable for one in made)
    return sum(one.rows for one in made), bad, first


class _Model(NamedTuple):
    """What a model says of itself. setting: of a run's, which is open; hash: of its files."""

    setting: Setting | None
    classes: tuple[str, ...]
    thresholds: tuple[float, ...]
    reduction: str
    hash: str


def _model(run: Path, job: _Job) -> _Model:
    """A run's model is opened and given to the job; a bundle is read."""
    if not run.is_dir():
        bundle = read_bundle(run)
        info = bundle.info
        return _Model(None, info.classes, info.thresholds, info.reduction, bundle.hash)
    job.given = one = load(run, engine=job.engine, batch=MANY)
    config = run / "model" / "config.json"
    told = config.read_bytes() if config.is_file() else b""
    digest = f"{weights_hash(run)} {hashlib.sha256(told).hexdigest()}"
    return _Model(one.engine.setting, one.classes, one.thresholds, one.reduction, digest)


def _chosen(run: Path, engine: str) -> Setting:
    """The engine for a bundle. It is measured in a process of its own: what engines leave behind,
    threads and locks, would be forked into the workers. One that is named is opened there first,
    so that it is refused here."""
    with processes.pool(2, partial(_setting, run, engine), fork=_forks()) as work:
        (setting,) = work([range(1)])
    return setting


def _setting(run: Path, engine: str, chunk: range) -> Setting:
    if engine == "auto":
        return choose(read_bundle(run), MANY, threads=1)
    return load(run, engine=engine, threads=1).engine.setting


def _forks() -> bool:
    """Whether processes can be forked: an engine that was opened here would not survive that."""
    return not opened()


def _about(
    model: _Model,
    paths: Sequence[str],
    missing: Sequence[tuple[str, str]],
    topk: int,
    engine: str,
    part: int,
) -> dict[str, Any]:
    """Everything that the table depends on, under the names by which a difference is told."""
    versions = installed(("onnxruntime", "openvino", "torch", "pillow", "numpy"))
    about = {
        "the model": model.hash,
        "the number of pictures": len(paths),
        "names, sizes or times of pictures": _stamp(paths),
        "what cannot be found": [*missing[:SHOWN], len(missing)],
        "--topk": topk,
        "--engine": model.setting.describe() if model.setting else engine,
        "the size of a part": part,
        "versions": {**versions, "crosspatch": crosspatch.__version__},
    }
    return json.loads(json.dumps(about))  # as it will be read


def _stamp(paths: Sequence[str]) -> str:
    """A digest of names, sizes and times of change."""
    digest = hashlib.sha256()
    for path in paths:
        try:
            status = os.stat(path)
            stamp = f"\0{status.st_size} {status.st_mtime_ns}\0"
        except (OSError, ValueError):
            stamp = "\0-\0"
        digest.update((path + stamp).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _same(parts: Parts, about: dict[str, Any]) -> dict[str, Any] | None:
    """The state to go on with, None where there is none. Raises UsageError for another job's."""
    state = parts.kept()
    if state is None:
        return None
    other = [name for name, value in about.items() if state.get(name) != value]
    if not other and len(state.get(SETTING) or ()) == 3:
        return state
    told = "; ".join(_difference(name, state.get(name), about[name]) for name in other)
    raise UsageError(
        f"{parts.folder} holds answers of another command: {told or 'its state is damaged'}",
        "the same model, pictures and options as when they were begun",
        "begin anew with --overwrite, or choose another name for --csv",
    )


def _difference(name: str, before: object, now: object) -> str:
    plain = isinstance(now, int) or name == "--engine"
    return f"{name} ({before} → {now})" if plain else name
