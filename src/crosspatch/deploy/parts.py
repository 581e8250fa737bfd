# SPDX-License-Identifier: Apache-2.0
"""The answers of a long job, kept in parts beside the table that they become.

`out.csv.parts/` holds `state.json` (what is being done), `lock`, and a file for every stretch of
pictures that is answered. Each appears whole, by a rename, with a checksum of its content, so a job
that was killed at any moment goes on after the parts that it has. The table appears whole as well,
when all parts are there; then they are removed. This module does not import torch.
"""

from __future__ import annotations

import errno
import json
import os
import re
import zlib
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from crosspatch.errors import DataError, UsageError

STATE, LOCK, JOINED = "state.json", "lock", "joined.tmp"
_OURS = re.compile(r"state\.json|lock|joined\.tmp|\d{6,}\.part|(\d{6,}\.part|state\.json)\.tmp")
SHOWN = 20
"""Of how many unreadable pictures of a part the names are kept at hand."""


class Part(NamedTuple):
    """A stretch of pictures. rows, unreadable: how many; first: (name, reason) of the first SHOWN
    unreadable ones; good, bad: their lines of the table."""

    rows: int
    unreadable: int
    first: list[tuple[str, str]]
    good: bytes
    bad: bytes


class Parts:
    """The folder of parts of one table; use as a context manager, which holds its lock.

    done: number -> what that part says of itself, its lines left out. At the end the folder is
    removed unless it holds parts. Raises UsageError where another process is at it, where the
    folder is somebody else's or cannot be written.
    """

    def __init__(self, table: Path) -> None:
        self.table = Path(os.path.realpath(table))
        self.folder = self.table.with_name(f"{self.table.name}.parts")
        self.done: dict[int, Part] = {}
        self._lock, self._mine = -1, False

    def __enter__(self) -> Parts:
        try:
            while not self._take():  # who held it before has removed the folder
                self._release()
            strange = [name for name in os.listdir(self.folder) if not _OURS.fullmatch(name)]
        except OSError as error:
            raise self._unwritable(error) from error
        if strange:
            self._release()
            raise UsageError(
                f"{self.folder} holds {sorted(strange)[0]}, which is none of our files",
                "a name for the table beside which this folder is free",
                "choose another name for --csv",
            )
        return self

    def __exit__(self, *failure: object) -> None:
        if not self.done and (self._mine or not (self.folder / STATE).exists()):
            with suppress(OSError):
                self._clear()
        self._release()

    def _release(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
        self._lock = -1

    def _take(self) -> bool:
        """Open and lock the folder's lock; False where it was removed meanwhile."""
        self.folder.mkdir(exist_ok=True)
        path = self.folder / LOCK
        self._lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        if not _locked(self._lock):
            self._release()
            raise UsageError(
                f"another process is writing {self.table}",
                "one process to a table",
                "wait for it, or choose another name for --csv",
            )
        try:
            return os.path.samestat(os.fstat(self._lock), os.stat(path))
        except FileNotFoundError:
            return False

    def kept(self) -> dict[str, Any] | None:
        """The state that `begin` wrote, None where there is none that can be read."""
        try:
            state = json.loads((self.folder / STATE).read_bytes())
        except (OSError, ValueError):
            return None
        return state if isinstance(state, dict) else None

    def begin(self, state: dict[str, Any]) -> None:
        """Remove what there is and note down what is to be done."""
        self._mine = True
        self._clear(keep=LOCK)
        self._write(STATE, json.dumps(state).encode())

    def resume(self) -> None:
        """Fill `done` with the parts that are whole; damaged ones are removed, to be made anew."""
        self._mine = True
        for name in sorted(os.listdir(self.folder)):
            number, _, ending = name.partition(".")
            if ending == "part":
                part = self._read(int(number))
                if part is None:
                    (self.folder / name).unlink()
                else:
                    self.done[int(number)] = _brief(part)
            elif ending.endswith("tmp"):
                (self.folder / name).unlink()

    def add(self, number: int, part: Part) -> None:
        """Keep a part. Raises UsageError where the disk does not take it; the others stay."""
        head = {**part._asdict(), "good": len(part.good), "bad": len(part.bad)}
        lines = part.good + part.bad
        text = json.dumps({**head, "crc": zlib.crc32(lines)}).encode() + b"\n"
        self._write(f"{number:06d}.part", text + lines)
        self.done[number] = _brief(part)

    def join(self, head: bytes, between: Iterable[bytes] = ()) -> None:
        """The table: `head`, the good lines of all parts in order, `between`, and the bad lines.

        Raises UsageError where the disk does not take it, DataError for a part that was damaged
        meanwhile.
        """
        aside = self.folder / JOINED
        try:
            with aside.open("wb") as file:
                file.write(head)
                for number in sorted(self.done):
                    file.write(self._whole(number).good)
                file.writelines(between)
                for number in sorted(self.done):
                    if self.done[number].unreadable:
                        file.write(self._whole(number).bad)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, self.table)
            _flush_folder(self.table.parent)
        except OSError as error:
            aside.unlink(missing_ok=True)
            raise self._unwritable(error) from error
        self.done.clear()

    def _clear(self, keep: str = "") -> None:
        """Remove our files, the state first, and the folder."""
        names = [name for name in os.listdir(self.folder) if _OURS.fullmatch(name)]
        for name in sorted(names, key=lambda name: (name != STATE, name)):
            if name != keep:
                (self.folder / name).unlink()
        if not keep:
            with suppress(OSError):
                self.folder.rmdir()

    def _whole(self, number: int) -> Part:
        part = self._read(number)
        if part is None:
            raise DataError(
                f"{self.folder}/{number:06d}.part was damaged or removed meanwhile",
                "the files there as they were written",
                "type the same command again: what is missing is made anew",
            )
        return part

    def _read(self, number: int) -> Part | None:
        """A part, None where it is not whole."""
        try:
            head, _, lines = (self.folder / f"{number:06d}.part").read_bytes().partition(b"\n")
            told = json.loads(head)
            if zlib.crc32(lines) != told.pop("crc") or len(lines) != told["good"] + told["bad"]:
                return None
            good, bad = lines[: told["good"]], lines[told["good"] :]
            first = [(str(name), str(reason)) for name, reason in told["first"]]
            return Part(int(told["rows"]), int(told["unreadable"]), first, good, bad)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def _write(self, name: str, content: bytes) -> None:
        """A file that is there whole or not at all."""
        aside = self.folder / f"{name}.tmp"
        try:
            with aside.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, self.folder / name)
        except OSError as error:
            aside.unlink(missing_ok=True)
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> UsageError:
        return UsageError(
            f"{self.folder} or {self.table.name} cannot be written: {error.strerror or error}",
            "room for the answers twice over; those that are there already are kept",
            "make room, then type the same command again",
        )


def _brief(part: Part) -> Part:
    return part._replace(good=b"", bad=b"")


def _flush_folder(folder: Path) -> None:
    """Make a rename survive a power cut, where the system can."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _locked(handle: int) -> bool:
    """Lock an open file for this process, not for those it forks; False if another holds it. A file
    system that has no locks is written without."""
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        else:
            import fcntl

            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EAGAIN)
    return True
