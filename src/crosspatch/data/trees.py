# SPDX-License-Identifier: Apache-2.0
"""Where the files of a source lie: in a folder, a zip or a tar, listed and read alike.

Nothing is ever extracted, so no entry of an archive can write outside its place. A zip and a plain
tar are read where they lie. A compressed tar cannot be read at random, so it is decompressed once
into the user's cache folder, as one plain tar (see `archives.py`). A tree holds paths and numbers
only: it can be pickled, and any number of forked workers may read from it.
"""

from __future__ import annotations

import json
import lzma
import os
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from crosspatch.data.decode import MAX_BYTES, UnreadableImage
from crosspatch.data.skipped import Skipped
from crosspatch.errors import DataError

MOST = MAX_BYTES + 1
"""Enough of a file for `decode` to see that it is too large."""

_LITTER = frozenset(
    (
        "__macosx",
        "__pycache__",
        "@eadir",
        "$recycle.bin",
        "desktop.ini",
        "icon\r",
        "lost+found",
        "system volume information",
        "thumbs.db",
    )
)


class Tree(Protocol):
    """Files below a root. `files`: posix path -> size in bytes; `folders`: every folder's path."""

    files: dict[str, int]
    folders: set[str]
    skipped: list[Skipped]

    def read(self, path: str, most: int = MOST) -> bytes:
        """The first `most` bytes of one file. Raises UnreadableImage where they cannot be had."""
        ...


def is_litter(path: str) -> bool:
    """Whether any part of a path is hidden or was left by a file manager."""
    return any(part.startswith(".") or part.lower() in _LITTER for part in path.split("/"))


class FolderTree:
    """The files below a folder. Links are followed, but no folder is entered twice from one top
    folder, nor one that holds the root, so a loop of links ends. Raises OSError for the root
    only."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(os.path.abspath(root))
        self.files: dict[str, int] = {}
        self.folders: set[str] = set()
        self.skipped: list[Skipped] = []
        above = {_identity(os.stat(folder)) for folder in (self.root, *self.root.parents)}
        for name in os.listdir(self.root):
            self._visit_below(name, set(above))
        self.files = dict(sorted(self.files.items()))
        self.skipped.sort(key=lambda one: one.path)

    def read(self, path: str, most: int = MOST) -> bytes:
        with reading(path), open(self.root / path, "rb") as file:
            return file.read(most)

    def _visit_below(self, top: str, seen: set[tuple[int, int]]) -> None:
        waiting = [top]
        while waiting:
            path = waiting.pop()
            if is_litter(path):
                continue
            try:
                waiting += [f"{path}/{name}" for name in self._visit(path, seen)]
            except OSError as problem:
                self._skip(path, _told(problem))

    def _visit(self, path: str, seen: set[tuple[int, int]]) -> list[str]:
        """Take in one path; returns the names inside when it is a folder to be entered."""
        status = os.stat(self.root / path)
        if not is_utf8(path):
            self._skip(path, "its name is not valid UTF-8")
        elif stat.S_ISREG(status.st_mode):
            self.files[path] = status.st_size
        elif not stat.S_ISDIR(status.st_mode):
            self._skip(path, "not a regular file")
        elif _identity(status) in seen:
            self._skip(path, "a link to a folder that is already read")
        else:
            seen.add(_identity(status))
            self.folders.add(path)
            return sorted(os.listdir(self.root / path), reverse=True)
        return []

    def _skip(self, path: str, reason: str) -> None:
        self.skipped.append(Skipped(shown(path), reason))


class _Entry(NamedTuple):
    """What an archive's index says about one member."""

    name: str
    size: int
    where: int | str
    is_folder: bool
    refused: str | None


class _Archive:
    """The listing shared by zip and tar: unsafe and repeated names are skipped, never used."""

    def __init__(self) -> None:
        self.files: dict[str, int] = {}
        self.folders: set[str] = set()
        self.skipped: list[Skipped] = []
        self.where: dict[str, Any] = {}

    def _list(self, entries: Iterator[_Entry]) -> None:
        for entry in entries:
            path = safe_path(entry.name)
            if path is None:
                self._skip(shown(entry.name), "its path leaves the archive")
            elif not path or is_litter(path):
                continue
            elif entry.is_folder:
                self.folders.update(_parents(path + "/"))
            elif entry.refused or not is_utf8(path):
                self._skip(shown(path), entry.refused or "its name is not valid UTF-8")
            elif path in self.files:
                self._skip(path, "the archive holds this name more than once")
            else:
                self.files[path], self.where[path] = entry.size, entry.where
                self.folders.update(_parents(path))
        self.files = dict(sorted(self.files.items()))

    def _skip(self, path: str, reason: str) -> None:
        self.skipped.append(Skipped(path, reason))


class ZipTree(_Archive):
    """The files of a zip, read in place. Raises DataError when it is none or is broken."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = Path(os.path.abspath(path))
        try:
            self._state = self.path.stat().st_mtime_ns
            with zipfile.ZipFile(self.path) as archive:
                self._list(map(_zip_entry, archive.infolist()))
        except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError) as problem:
            raise broken_archive(path, problem) from problem

    def read(self, path: str, most: int = MOST) -> bytes:
        with reading(path):
            archive = _open_zip(self.path, self._state, os.getpid())
            with archive.open(self.where[path]) as file:
                return file.read(most)


class TarTree(_Archive):
    """The files of a plain tar, read in place. Raises DataError when it is none or is broken.

    With `index`, the listing is kept in that JSON file: reading 60,000 headers costs seconds.
    """

    def __init__(self, path: Path, index: Path | None = None) -> None:
        super().__init__()
        self.path = Path(os.path.abspath(path))
        entries = _kept_index(index) if index and index.exists() else _scan_tar(self.path)
        if index and not index.exists():
            _keep_index(index, entries)
        self._list(iter(entries))

    def read(self, path: str, most: int = MOST) -> bytes:
        length = min(self.files[path], most)
        with reading(path), open(self.path, "rb") as file:
            file.seek(self.where[path])
            data = file.read(length)
        if len(data) < length:
            raise UnreadableImage(path, "the archive is cut short")
        return data


def safe_path(name: str) -> str | None:
    """An archive's entry name as a posix path below the root, or None when it points elsewhere."""
    parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".")]
    if name.startswith(("/", "\\")) or ".." in parts or "\0" in name:
        return None
    if parts and len(parts[0]) == 2 and parts[0][1] == ":":
        return None
    return "/".join(parts)


def broken_archive(path: Path, problem: BaseException) -> DataError:
    """The error for an archive that cannot be opened."""
    reason = " ".join(str(problem).split()) or type(problem).__name__
    return DataError(
        f"cannot read the archive {path} ({reason})",
        "An archive is a whole .zip, .tar, .tar.gz, .tar.bz2 or .tar.xz",
        "Download or pack it again",
    )


def _zip_entry(info: zipfile.ZipInfo) -> _Entry:
    kind = stat.S_IFMT(info.external_attr >> 16)
    refused = None
    if info.flag_bits & 0x1:
        refused = "encrypted"
    elif kind and not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):
        refused = "a link or device inside the archive"
    return _Entry(info.filename, info.file_size, info.filename, info.is_dir(), refused)


def _scan_tar(path: Path) -> list[_Entry]:
    entries = []
    try:
        with tarfile.open(path, "r:") as archive:
            while member := archive.next():
                entries.append(_tar_entry(member))
                archive.members.clear()  # else every header read so far stays in memory
    except (tarfile.TarError, OSError, ValueError, EOFError) as problem:
        raise broken_archive(path, problem) from problem
    return entries


def _tar_entry(member: tarfile.TarInfo) -> _Entry:
    plain = member.isreg() and not member.issparse()
    refused = None if plain else "a link or device inside the archive"
    return _Entry(member.name, member.size, member.offset_data, member.isdir(), refused)


def _keep_index(index: Path, entries: list[_Entry]) -> None:
    aside = index.with_name(f"{index.name}.{os.getpid()}.part")
    aside.write_text(json.dumps(entries), encoding="ascii")
    os.replace(aside, index)


def _kept_index(index: Path) -> list[_Entry]:
    return [_Entry(*entry) for entry in json.loads(index.read_text(encoding="ascii"))]


@lru_cache(maxsize=4)
def _open_zip(path: Path, state: int, pid: int) -> zipfile.ZipFile:
    """One handle per process, for a forked worker must not share its parent's position in the file;
    another for a zip that was packed again under the same name."""
    return zipfile.ZipFile(path)


def _parents(path: str) -> Iterator[str]:
    at = path.find("/")
    while at > 0:
        yield path[:at]
        at = path.find("/", at + 1)


@contextmanager
def reading(path: str) -> Iterator[None]:
    """Whatever goes wrong while one file is read is told as that file's fault."""
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError) as problem:
        raise UnreadableImage(path, "broken inside the archive") from problem
    except OSError as problem:
        raise UnreadableImage(path, _told(problem)) from problem
    except RuntimeError as problem:  # zipfile: a password or a compression method it lacks
        raise UnreadableImage(path, str(problem).lower()) from problem


def _told(problem: OSError) -> str:
    return (problem.strerror or str(problem)).lower()


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def is_utf8(path: str) -> bool:
    """Whether a file name can be written into a text file at all."""
    return path.encode("utf-8", "replace") == path.encode("utf-8", "surrogatepass")


def shown(path: str) -> str:
    """A file name with whatever is not UTF-8 written as escapes."""
    return path.encode("utf-8", "backslashreplace").decode("utf-8")
