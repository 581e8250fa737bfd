# SPDX-License-Identifier: Apache-2.0
"""Where the files lie that a table names: beside it in a folder, or with it in an archive.

Nothing of an archive is unpacked: its pictures are found by name among what the archive's tree
lists, and that holds no link and no path that leads out.
"""

from __future__ import annotations

import os
import posixpath
import stat
from pathlib import Path

from crosspatch.data.decode import MAX_BYTES, UnreadableImage
from crosspatch.data.rows import Row, read_rows
from crosspatch.data.skipped import Skipped
from crosspatch.data.trees import MOST, Tree, is_litter, reading
from crosspatch.errors import DataError

TABLES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")


class Shelf:
    """Where the files that a table names are looked for: in its folder."""

    def __init__(self, table: Path) -> None:
        self._root = os.path.abspath(table.parent)

    def locate(self, told: str) -> tuple[str | None, str]:
        """(key, file) of a path in the table, or (None, what is wrong with it). The key is the path
        below the table's folder, or the absolute path where the file lies elsewhere."""
        if os.path.isabs(told):
            file = os.path.normpath(told)
            below = file.startswith(os.path.join(self._root, ""))
            return Path(os.path.relpath(file, self._root) if below else file).as_posix(), file
        if not os.path.exists(os.path.join(self._root, told)):
            told = told.replace("\\", "/")
        key = _below(told)
        if key is None:
            return None, "its path leaves the table's folder"
        return key, os.path.join(self._root, key)

    def size(self, file: str) -> int | str:
        """The file's bytes, or why there are none."""
        try:
            status = os.stat(file)
        except OSError as problem:
            return (problem.strerror or str(problem)).lower()
        return status.st_size if stat.S_ISREG(status.st_mode) else "not a regular file"

    def read(self, key: str, file: str, most: int) -> bytes:
        with reading(key), open(file, "rb") as stream:
            return stream.read(most)


class PackedShelf(Shelf):
    """The same of a table that lies in an archive, at `inner` of its `tree`."""

    def __init__(self, tree: Tree, inner: str) -> None:
        self._tree, self._above = tree, inner[: inner.rfind("/") + 1]
        self._refused = {one.path: one.reason for one in tree.skipped}

    def locate(self, told: str) -> tuple[str | None, str]:
        told = told.replace("\\", "/")
        if told.startswith("/"):
            return None, "an absolute path, which leaves the archive"
        key = _below(told)
        if key is None:
            return None, "its path leaves the table's folder"
        return key, self._above + key

    def size(self, file: str) -> int | str:
        if file in self._tree.files:
            return self._tree.files[file]
        if file in self._tree.folders:
            return "not a regular file"
        return self._refused.get(file, "hidden" if is_litter(file) else "not in the archive")

    def read(self, key: str, file: str, most: int) -> bytes:
        return self._tree.read(file, most)


class ListedTree:
    """Files that a table names: key -> the file. `files`, `folders`, `skipped` as of any tree."""

    def __init__(self, found: dict[str, str], sizes: dict[str, int], shelf: Shelf) -> None:
        self.files, self.folders, self.skipped = sizes, set[str](), list[Skipped]()
        self._found, self._shelf = found, shelf

    def read(self, path: str, most: int = MOST) -> bytes:
        """The first `most` bytes of one file. Raises UnreadableImage where they cannot be had."""
        return self._shelf.read(path, self._found[path], most)


def tables_in(tree: Tree) -> list[str]:
    """The tables at the top of a tree, or in its one top folder."""
    tops = {path.split("/", 1)[0] for path in (*tree.files, *tree.folders)}
    depth = 1 if len(tops) == 1 and tops <= tree.folders else 0
    return [
        path for path in tree.files
        if path.count("/") == depth and path.lower().endswith(TABLES)
    ]  # fmt: skip


def read_table(
    path: Path, packed: tuple[Tree, str] | None = None
) -> tuple[list[str], list[Row], list[str]]:
    """As `rows.read_rows`, of a table that may lie in an archive: `packed` is the archive's tree
    and the path in it. Raises as that does, and DataError for a table of more than 512 MB."""
    if packed is None:
        return read_rows(path)
    tree, inner = packed
    try:
        data = tree.read(inner)
    except UnreadableImage as problem:
        raise DataError(
            f"cannot read the table {path}: {problem.reason}",
            "A whole table in a whole archive",
            "Download or pack it again",
        ) from problem
    if len(data) > MAX_BYTES:
        raise DataError(
            f"the table {path} is larger than {MAX_BYTES >> 20} MB",
            "A table holds a row for each picture",
            "Unpack the archive yourself if you trust it, and give the table",
        )
    return read_rows(path, data)


def _below(told: str) -> str | None:
    """A relative path without detours, or None for one that leads out."""
    key = posixpath.normpath(told)
    return None if key == ".." or key.startswith(("../", "/")) else key
