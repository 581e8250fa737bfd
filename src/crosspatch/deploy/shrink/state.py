# SPDX-License-Identifier: Apache-2.0
"""What a search has measured, kept on disk: killed at any moment, `--resume` goes on from there.

`RUN/shrink/state.json` is written aside, flushed and renamed after every network. It names what the
figures depend on: the run's weights, the pictures, the machine. One search works in a folder at a
time.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crosspatch.deploy.shrink.result import Measured, row_from_json, row_to_json
from crosspatch.errors import UsageError
from crosspatch.training.run import lock_file
from crosspatch.training.state import TEMPORARY, flush_file, flush_folder

SCHEMA = 1
FOLDER, FILE, LOCK = "shrink", "state.json", ".lock"
DIFFERS = {
    "weights": "the weights of the run",
    "pictures": "the validation pictures",
    "threads": "the number of threads that may be used",
    "machine": "this machine or the versions of its engines",
}
"""Entries of a search's identity, in words."""


@dataclass
class State:
    """identity: what the figures depend on; rows: what was measured, with unscaled seconds; base:
    by threads the base's median of every group, in seconds; count: pictures that judge; finished:
    whether nothing was left to try; remarks: of what could not be tried; tested: figures on test by
    the key of the candidate."""

    identity: dict[str, Any]
    rows: list[Measured] = field(default_factory=list)
    base: dict[int, list[float]] = field(default_factory=dict)
    count: int = 0
    finished: bool = False
    remarks: list[str] = field(default_factory=list)
    tested: dict[str, Any] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Write it into `folder`; whole or not at all."""
        plain = {**vars(self), "schema": SCHEMA, "rows": [row_to_json(one) for one in self.rows]}
        plain["base"] = {str(threads): found for threads, found in self.base.items()}
        aside = folder / f"{TEMPORARY}{os.getpid()}-{FILE}"
        try:
            aside.write_text(json.dumps(plain, allow_nan=False) + "\n", encoding="utf-8")
            flush_file(aside)
            os.replace(aside, folder / FILE)
            flush_folder(folder)
        except OSError as error:
            aside.unlink(missing_ok=True)
            raise UsageError(
                f"{folder} cannot be written: {error.strerror or error}",
                "room for what the search measures",
                "make room, then go on with --resume",
            ) from error


def read(folder: Path) -> State | None:
    """The state in `folder`, None where there is none that can be read."""
    try:
        plain = json.loads((folder / FILE).read_text(encoding="utf-8"))
        if plain.pop("schema") != SCHEMA:
            return None
        plain["rows"] = [row_from_json(one) for one in plain["rows"]]
        plain["base"] = {int(threads): list(map(float, v)) for threads, v in plain["base"].items()}
        return State(**plain)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def entered(folder: Path, identity: dict[str, Any], resume: bool) -> State:
    """The state to go on from with `resume`, else a new one.

    Raises UsageError where there is nothing to resume, or it was measured with something else.
    """
    if not resume:
        return State(identity)
    found = read(folder)
    if found is None:
        raise UsageError(
            f"{folder} holds no search to go on with",
            "one that was begun, and stopped after its first candidates",
            "leave --resume away",
        )
    changed = [name for name in DIFFERS if found.identity.get(name) != identity.get(name)]
    if changed:
        was, now = found.identity.get(changed[0]), identity.get(changed[0])
        shown = f" ({was}, now {now})" if changed[0] == "threads" else ""
        raise UsageError(
            f"since that search began {DIFFERS[changed[0]]} changed{shown}",
            "the same run, pictures and machine, so that figures can be compared",
            "leave --resume away to measure everything anew",
        )
    return found


@contextmanager
def workplace(run: Path) -> Iterator[Path]:
    """RUN/shrink, for one search at a time. Raises UsageError where it cannot be written or another
    process searches there."""
    folder = run / FOLDER
    try:
        folder.mkdir(exist_ok=True)
        handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UsageError(
            f"{folder} cannot be written: {error.strerror or error}",
            "a run folder that you may write in",
            "copy the run to a place of your own first",
        ) from error
    try:
        if not lock_file(handle):
            raise UsageError(
                f"another process searches in {folder}",
                "one search per run at a time",
                "wait for it, or stop it",
            )
        yield folder
    finally:
        os.close(handle)
