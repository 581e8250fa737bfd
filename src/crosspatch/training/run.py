# SPDX-License-Identifier: Apache-2.0
"""The run folder: everything that a training leaves behind, and what every other verb reads."""

from __future__ import annotations

import csv
import errno
import json
import os
import shutil
import tomllib
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from crosspatch.errors import DataError, UsageError
from crosspatch.training.state import TEMPORARY, flush_file, flush_folder, sweep

METRIC_COLUMNS: tuple[str, ...] = (
    "epoch", "epochs", "step", "train_loss", "val_loss", "val_accuracy", "val_low", "val_high",
    "val_map", "lr", "best", "images_per_second", "elapsed",
)  # fmt: skip
OURS = (
    "config.toml", "classes.txt", "split.csv", "skipped.csv", "metrics.csv", "predictions.csv",
    "report.json", "report.html", "label_errors.csv", "nan.csv",
    "model", "last", ".lock", "client.py",
    "teacher", "waiting.toml", "shrink", "shrunk.json", "shrunk.html", "bundle-small.onnx",
    *(f"bundle{kind}{end}"
      for kind in ("", "-int8", "-int8-static") for end in (".onnx", ".xml", ".bin", ".pt2")),
)  # fmt: skip
"""What a run's folder may hold, bundles made of it included; `overwrite` removes it."""
_FULL = (errno.ENOSPC, errno.EDQUOT)


class RunFolder:
    """A run's folder, locked for this process while it trains.

    Use `create` or `open`; leave it with `close` or as a context manager, which turns a full disk
    into a UsageError.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock: int | None = None

    @classmethod
    def create(
        cls, path: str | Path, *, overwrite: bool = False, resume: bool = False
    ) -> RunFolder:
        """Make (or, with `resume`, enter) a run folder and lock it.

        Raises UsageError: the folder holds a run and neither `resume` nor `overwrite` is given; it
        holds something else; it cannot be written; another process trains in it; nothing to resume.
        """
        run = cls(path)
        if overwrite and resume:
            raise UsageError(
                "both --resume and --overwrite", "one of them", "leave one of the two away"
            )
        exists = run.config_path.is_file() or run.waiting
        run._refuse(exists, overwrite, resume)
        run._make()
        run._take_lock()
        if overwrite and exists:
            run._clear()
        sweep(run.last)
        sweep(run.model)
        return run

    def _refuse(self, exists: bool, overwrite: bool, resume: bool) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(
                f"{self.path} is a file", "a folder for the run", "choose another --out"
            )
        if resume and not exists:
            raise UsageError(
                f"{self.path} holds no run", "a run that was begun", "leave --resume away"
            )
        if exists and not overwrite and not resume:
            raise UsageError(
                f"{self.path} already holds a run",
                "a new folder, or one to continue",
                "add --resume to continue it, --overwrite to start anew, or choose another --out",
            )
        strange = [] if exists or not self.path.is_dir() else self._strangers()
        if strange:
            raise UsageError(
                f"{self.path} holds other files, such as {strange[0]}",
                "an empty or a new folder",
                "choose another --out",
            )

    def _strangers(self) -> list[str]:
        names = sorted(entry.name for entry in self.path.iterdir())
        return [name for name in names if name not in OURS and not name.startswith(TEMPORARY)]

    def _make(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / f"{TEMPORARY}probe"
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise UsageError(
                f"{self.path} cannot be written: {error.strerror}",
                "a folder that can be written",
                "choose another --out",
            ) from error

    def _take_lock(self) -> None:
        """One process per run: an exclusive lock that the system frees when its owner dies."""
        path = self.path / ".lock"
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        if not lock_file(handle):
            owner = path.read_text(encoding="utf-8").strip() or "unknown"
            os.close(handle)
            raise UsageError(
                f"process {owner} is training in {self.path}",
                "one training per folder",
                "wait for it, stop it, or choose another --out",
            )
        os.ftruncate(handle, 0)
        os.write(handle, f"{os.getpid()}\n".encode())
        self._lock = handle
        _locked.add(self)

    def _clear(self) -> None:
        for name in OURS:
            path = self.path / name
            if name == ".lock":
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def close(self) -> None:
        """Give the folder free; one in which nothing was written is removed."""
        if self._lock is None:
            return
        if [entry.name for entry in self.path.iterdir()] == [".lock"]:
            (self.path / ".lock").unlink()
            self.path.rmdir()
        self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
        self._lock = None

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.close()
        if isinstance(error, OSError) and error.errno in _FULL:
            raise UsageError(
                f"{self.path} cannot be written: {error.strerror}",
                "room on the disk; what was saved before is whole",
                "make room, then continue with --resume",
            ) from error

    @property
    def config_path(self) -> Path:
        return self.path / "config.toml"

    @property
    def report_path(self) -> Path:
        return self.path / "report.json"

    @property
    def ended(self) -> bool:
        """Whether the folder holds a run that was trained and judged to its end."""
        return self.config_path.is_file() and self.report_path.is_file()

    @property
    def unfinished(self) -> bool:
        """Whether the folder holds a run that was begun and has not ended."""
        return self.waiting or (self.config_path.is_file() and not self.report_path.is_file())

    @property
    def waiting_path(self) -> Path:
        return self.path / "waiting.toml"

    @property
    def waiting(self) -> bool:
        """Whether the folder holds a run that waits for its teacher to be trained."""
        return self.waiting_path.is_file() and not self.config_path.is_file()

    @property
    def teacher(self) -> Path:
        return self.path / "teacher"

    def write_waiting(self, asked: dict[str, Any]) -> None:
        """waiting.toml: what was asked of a run whose teacher is trained first."""
        import tomli_w

        self._replace("waiting.toml", tomli_w.dumps(asked))

    def read_waiting(self) -> dict[str, Any]:
        """What `write_waiting` wrote. Raises DataError naming the file when it is damaged."""
        return _read_toml(self.waiting_path)

    @property
    def last(self) -> Path:
        return self.path / "last"

    @property
    def model(self) -> Path:
        return self.path / "model"

    def write_config(self, config: dict[str, Any]) -> None:
        """config.toml: every resolved setting, versions, command, data."""
        import tomli_w

        self._replace("config.toml", tomli_w.dumps(config))

    def read_config(self) -> dict[str, Any]:
        """What `write_config` wrote. Raises DataError naming the file when it is damaged."""
        return _read_toml(self.config_path)

    def write_classes(self, classes: Sequence[str]) -> None:
        """classes.txt: one name per line, in label order."""
        self._replace("classes.txt", "".join(f"{name}\n" for name in classes))

    def write_metrics(self, rows: Sequence[dict[str, Any]]) -> None:
        """metrics.csv: all rows anew, so that a resumed run has none twice."""
        self._table("metrics.csv", METRIC_COLUMNS, rows)

    def append_metrics(self, row: dict[str, Any]) -> None:
        """metrics.csv: one more row."""
        with (self.path / "metrics.csv").open("a", encoding="utf-8", newline="") as file:
            csv.DictWriter(file, METRIC_COLUMNS, extrasaction="ignore").writerow(row)

    def note_nan(self, columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
        """nan.csv: the pictures of one more batch whose loss was not finite.

        Rows of the same try and of later ones are replaced: a resumed run has none twice.
        """
        path, kept = self.path / "nan.csv", []
        if path.is_file():
            with path.open(encoding="utf-8", newline="") as file:
                kept = [row for row in csv.DictReader(file) if int(row["try"]) < rows[0]["try"]]
        self._table("nan.csv", columns, [*kept, *rows])

    def write_predictions(self, columns: Sequence[str], rows: Iterable[dict[str, Any]]) -> None:
        """predictions.csv: one row per picture of the validation and test splits."""
        self._table("predictions.csv", columns, rows)

    def write_report(self, report: dict[str, Any]) -> None:
        """report.json: what was trained and what came out."""
        text = json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False)
        self._replace("report.json", text + "\n")

    def _table(self, name: str, columns: Sequence[str], rows: Iterable[dict[str, Any]]) -> None:
        draft = self.path / f"{TEMPORARY}{name}"
        with draft.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
        os.replace(draft, self.path / name)

    def _replace(self, name: str, text: str) -> None:
        draft = self.path / f"{TEMPORARY}{name}"
        draft.write_text(text, encoding="utf-8")
        flush_file(draft)
        os.replace(draft, self.path / name)
        flush_folder(self.path)


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path} cannot be read ({error})",
            "the settings of a run",
            "train anew with --overwrite",
        ) from error


_locked: weakref.WeakSet[RunFolder] = weakref.WeakSet()


def _unlock_in_child() -> None:
    """A forked worker would hold its parent's lock for as long as it outlives it."""
    for run in list(_locked):
        run._unlock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_unlock_in_child)


def lock_file(handle: int) -> bool:
    """Lock an open file for this process alone, without waiting; False if another holds it."""
    if os.name == "nt":
        import msvcrt

        take = lambda: msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
    else:
        import fcntl

        take = lambda: fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    try:
        take()
    except OSError:
        return False
    return True
