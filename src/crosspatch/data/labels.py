# SPDX-License-Identifier: Apache-2.0
"""Several labels to a picture: the cells of a table that hold some, and files that lie in several
class folders."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable

from crosspatch.data.decode import UnreadableImage
from crosspatch.data.layout import Layout, Placed
from crosspatch.data.trees import Tree
from crosspatch.errors import DataError

SEPARATOR = "|"
"""Between the names in a cell of a CSV table, and in the tables that we write."""
_LIST = re.compile(r"^\s*\[.*\]\s*$", re.DOTALL)

Label = int | tuple[int, ...]
"""Of one picture: the number of its class, or of all its classes, ascending."""


def numbers(label: Label) -> tuple[int, ...]:
    """A label as the numbers of its classes."""
    return label if isinstance(label, tuple) else (label,)


def holds_several(cell: object) -> bool:
    """Whether a cell of the label's column can only mean several labels (or an empty list)."""
    if isinstance(cell, list | tuple):
        return True
    return isinstance(cell, str) and (SEPARATOR in cell or _LIST.match(cell) is not None)


def is_one_name(name: str) -> bool:
    """Whether a cell that holds this name is read back as it, not as another or several, and may
    be a class."""
    return name.isprintable() and not holds_several(name) and word(name) == name


def names_in(cell: object, place: str) -> tuple[str, ...]:
    """The names in a cell, each once and sorted; () for an empty one. place: of the cell, for
    errors. Raises DataError for what is no list of names, and for a name that holds a `|`."""
    given: object = cell
    if isinstance(cell, str) and _LIST.match(cell):
        try:
            given = json.loads(cell)
        except (ValueError, RecursionError) as problem:
            raise _no_names(cell, place) from problem
    if not isinstance(given, list | tuple | dict):
        parts = (word(given) or "").split(SEPARATOR)
        return tuple(sorted({part.strip() for part in parts} - {""}))
    names = [word(one) for one in given]
    if isinstance(given, dict) or any(one is None or SEPARATOR in one for one in names):
        raise _no_names(cell, place)
    return tuple(sorted({str(one) for one in names}))


def word(value: object) -> str | None:
    """A value as text without space around it; None for nothing (an empty cell, null, NaN) and for
    what is no single value."""
    if value is None or isinstance(value, list | tuple | dict):
        return None
    if isinstance(value, float) and value != value:
        return None
    return str(value).strip() or None


def _no_names(cell: object, place: str) -> DataError:
    return DataError(
        f"{place} holds {str(cell)[:60]!r}, which is no list of names",
        f'Several labels are written a{SEPARATOR}b, or as a JSON list ["a", "b"]; names hold no '
        f"{SEPARATOR}, [] is none of the classes",
        "Correct it, or name another column: --label-column NAME",
    )


def label_remarks(labels: Iterable[tuple], why: str) -> list[str]:
    """Sentences on a set whose pictures have several labels each; why: what says so."""
    counts = Counter(map(len, labels))
    several = sum(count for size, count in counts.items() if size > 1)
    said = [f"multi-label: {why}; {several:,} of {counts.total():,} pictures have several labels."]
    if counts[0]:
        plural = "picture has" if counts[0] == 1 else "pictures have"
        said.append(f"{counts[0]:,} {plural} none of the classes: examples of their absence.")
    return said


def merge_repeated(tree: Tree, layout: Layout) -> Layout:
    """The layout with several labels to a picture: files of the same bytes in several class folders
    (of one split) become one picture with the label of each, which keeps the first of the paths.

    Copies inside one class folder stay as they are; so does what cannot be read. Raises DataError
    for a class whose name holds a `|`.
    """
    strange = next((name for name in layout.classes if SEPARATOR in name), None)
    if strange is not None:
        raise DataError(
            f"a class is called {strange!r}",
            f"{SEPARATOR} stands between the labels of a picture",
            "Rename the folder",
        )
    kept: list[Placed] = []
    merged = 0
    for alike in _same_bytes(tree, layout.files):
        labels = tuple(sorted({number for one in alike for number in numbers(one.label)}))
        if len(labels) == 1:
            kept += [one._replace(label=labels) for one in alike]
        else:
            first = min(alike, key=lambda one: (numbers(one.label), one.key))
            kept.append(first._replace(label=labels))
            merged += len(alike) - 1
    kept.sort(key=lambda one: one.key)
    names = [one.label for one in kept if isinstance(one.label, tuple)]
    why = "as asked"
    if merged:
        plural = "file is" if merged == 1 else "files are"
        why += f"; {merged:,} {plural} another's copy in one more class folder"
    remarks = [*label_remarks(names, why), *layout.remarks]
    return Layout(layout.classes, kept, layout.skipped, remarks, multi=True)


def _same_bytes(tree: Tree, files: list[Placed]) -> list[list[Placed]]:
    """The files of one split with the same bytes, together; files of a size of their own alone."""
    sizes = Counter(tree.files[one.path] for one in files)
    found: dict[tuple[str | None, str | bytes], list[Placed]] = {}
    for one in files:
        mark: str | bytes = one.key
        if sizes[tree.files[one.path]] > 1:
            try:
                mark = hashlib.sha256(tree.read(one.path)).digest()
            except UnreadableImage:
                mark = one.key  # told when the pictures are read
        found.setdefault((one.split, mark), []).append(one)
    return list(found.values())
