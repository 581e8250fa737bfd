# SPDX-License-Identifier: Apache-2.0
"""A table as DATA: each row names a picture file and its class, and may name its split and group.

Read are .csv and .tsv (separated by comma, semicolon or tab), .jsonl, .json (a list of objects) and
.parquet. The columns are found by their names (`GUESSES`) unless they are told. Paths are relative
to the table's folder and may not leave it; absolute paths are taken as they stand. The table may
lie in an archive with the pictures: then absolute paths are refused too. A file that is not there
is skipped and listed; whatever could mean two things is an error that names the lines. Labels such
as `a|b` and lists make the table one of several labels to a picture.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import NamedTuple, cast

from crosspatch.data.labels import SEPARATOR, holds_several, label_remarks, names_in, word
from crosspatch.data.layout import MEANING, SPLITS, Layout, Placed, check_classes, class_remarks
from crosspatch.data.rows import Row
from crosspatch.data.shelf import ListedTree, PackedShelf, Shelf, read_table
from crosspatch.data.skipped import Skipped
from crosspatch.data.trees import Tree, is_utf8, shown
from crosspatch.errors import DataError, UsageError, near

GUESSES = {
    "path": "path file filename file_name filepath file_path image image_path img img_path picture",
    "label": "label labels class class_name classname category target",
    "split": "split subset partition",
    "group": "group group_id patient patient_id subject subject_id",
}
"""What each column may be called, in small letters."""

NONE = "none"
"""Told instead of a column's name: there is no such column."""

_FLAGS = {
    "path": "--path-column",
    "label": "--label-column",
    "split": "--split-column",
    "group": "--group",
}


@dataclass(frozen=True)
class Columns:
    """The names of the columns in use; None where there is none."""

    path: str
    label: str
    split: str | None
    group: str | None


class Fact(NamedTuple):
    """What one row says of its picture; names: of its classes, a single one unless several are
    allowed."""

    place: str
    names: tuple[str, ...]
    split: str | None
    group: str | None


def open_table(
    path: Path,
    least_classes: int = 2,
    told: dict[str, str | None] | None = None,
    packed: tuple[Tree, str] | None = None,
    multi_label: bool = False,
) -> tuple[ListedTree, Layout]:
    """Read a table and look for its files.

    told: column names by `GUESSES`' keys, where they were said; "none": no such column. packed:
    the archive that the table lies in and its path there; `path` then names it in errors.
    multi_label: rows of one picture may name several classes, and a row none. Raises UsageError
    for columns that are missing or could be several, DataError for a table that cannot be read,
    rows that contradict each other, unknown splits, and no file at all.
    """
    names, rows, remarks = read_table(path, packed)
    columns, said = find_columns(path, names, told or {})
    several = any(holds_several(row.values.get(columns.label)) for row in rows)
    shelf = PackedShelf(*packed) if packed else Shelf(path)
    joined = (multi_label or several, multi_label)
    facts, found, skipped, repeated = _gather(path, rows, columns, shelf, *joined)
    if not found:
        raise _nothing_found(path, columns, skipped)
    if repeated:
        rows_say = "row of the table says" if repeated == 1 else "rows of the table say"
        remarks.append(f"{repeated:,} {rows_say} again what another says.")
    sizes = {key: size for key, (_, size) in sorted(found.items())}
    layout = _layout(path, facts, sizes, least_classes, multi_label or several)
    if layout.multi:
        why = "as asked" if multi_label else f"labels such as a{SEPARATOR}b, or lists"
        remarks += label_remarks((facts[key].names for key in sizes), why)
    layout.skipped, layout.remarks = skipped, [said, *remarks, *layout.remarks]
    return ListedTree({key: file for key, (file, _) in found.items()}, sizes, shelf), layout


def find_columns(
    path: Path, names: Sequence[str], told: dict[str, str | None]
) -> tuple[Columns, str]:
    """(the columns in use, a sentence that says them). Raises UsageError (see `open_table`)."""
    chosen = {kind: _column(path, kind, names, told.get(kind)) for kind in GUESSES}
    taken = [name for name in chosen.values() if name is not None]
    twice = [name for name, count in Counter(taken).items() if count > 1]
    if twice:
        raise UsageError(
            f"the column {twice[0]!r} of {path} is asked for twice",
            "Path, label, split and group each have a column of their own",
            "Name another column",
        )
    said = ", ".join(f"{kind} from {name!r}" for kind, name in chosen.items() if name is not None)
    needed = [cast(str, chosen[kind]) for kind in ("path", "label")]  # `_column` saw to that
    columns = Columns(*needed, chosen["split"], chosen["group"])
    return columns, f"Columns of the table: {said}."


def _column(path: Path, kind: str, names: Sequence[str], told: str | None) -> str | None:
    needed, flag = kind in ("path", "label"), _FLAGS[kind]
    if told is not None and told in names:
        return told
    if told == NONE and not needed:
        return None
    if told is not None:
        raise UsageError(
            f"{path} has no column {told!r}",
            f"Its columns are {', '.join(names[:12])}",
            f"{flag} {near(told, names, 1) or 'NAME'}",
        )
    guesses = GUESSES[kind].split()
    hits = [name for name in names if name.strip().lower() in guesses]
    if len(hits) > 1:
        raise UsageError(
            f"{path}: the {kind} could stand in {' or '.join(hits)}",
            f"One column of the {kind}" if needed else f"One column of the {kind}, or none",
            f"{flag} {hits[0]}" if needed else f"{flag} {hits[0]}, or {flag} {NONE}",
        )
    if needed and not hits:
        raise UsageError(
            f"{path} has no column that is known to hold the {kind}",
            f"Such a column is called {', '.join(guesses[:5])} or the like; it has "
            f"{', '.join(names[:12])}",
            f"{flag} NAME",
        )
    return hits[0] if hits else None


def _gather(
    path: Path, rows: Sequence[Row], columns: Columns, shelf: Shelf, several: bool, joined: bool
) -> tuple[dict[str, Fact], dict[str, tuple[str, int]], list[Skipped], int]:
    """(what is said of each key, its file and bytes where it is there, the others, repetitions).

    several: whether a row may name several classes, or none; joined: whether rows of one picture
    name its classes together.
    """
    facts: dict[str, Fact] = {}
    found: dict[str, tuple[str, int]] = {}
    skipped, repeated = [], 0
    for row in rows:
        told = str(row.values.get(columns.path) or "").strip()
        key, file = _locate(shelf, told)
        fact = _fact(path, row, columns, several)
        if key is None or fact is None:
            reason = file if key is None else "names no class"
            skipped.append(Skipped(shown(told or row.place), f"{row.place}: {reason}"))
        elif key in facts:
            names = tuple(sorted({*facts[key].names, *fact.names}))
            other = fact._replace(names=facts[key].names) if joined else fact
            _require_agreement(path, key, facts[key], other, several)
            repeated += names == facts[key].names
            facts[key] = facts[key]._replace(names=names)
        else:
            facts[key], size = fact, shelf.size(file)
            if isinstance(size, int):
                found[key] = file, size
            else:
                skipped.append(Skipped(shown(key), f"{row.place}: {size}"))
    return facts, found, skipped, repeated


def _locate(shelf: Shelf, told: str) -> tuple[str | None, str]:
    """`Shelf.locate` of what may be no path at all."""
    if not told:
        return None, "names no file"
    if "\0" in told or not is_utf8(told):
        return None, "its name is not valid text"
    if PureWindowsPath(told).drive and not os.path.isabs(told):
        return None, "a path of another machine"
    return shelf.locate(told)


def _fact(path: Path, row: Row, columns: Columns, several: bool) -> Fact | None:
    """What a row says of its picture, or None for one without a class where it must have one."""
    label, split, group = (
        row.values.get(name) if name else None
        for name in (columns.label, columns.split, columns.group)
    )
    names = names_in(label, f"{path}: {row.place}")
    if not names and not several:
        return None
    split, group = word(split), word(group)
    if split is not None and split not in SPLITS:
        meant = MEANING.get(split.lower())
        raise DataError(
            f"{path}: {row.place} says split {split!r}",
            f"Splits are called {', '.join(SPLITS)}",
            f"Write {meant} for {split}" if meant else f"Correct it, or {_FLAGS['split']} {NONE}",
        )
    return Fact(row.place, names, split, group)


def _require_agreement(path: Path, key: str, first: Fact, second: Fact, several: bool) -> None:
    kinds = {"classes" if several else "class": 0, "split": 1, "group": 2}
    said = [(SEPARATOR.join(fact.names), fact.split, fact.group) for fact in (first, second)]
    for kind, at in kinds.items():
        one, other = said[0][at], said[1][at]
        if one != other:
            labels = "" if at else ", or take both for labels of the picture: --multi-label"
            raise DataError(
                f"{path}: {key} has the {kind} {one!r} in {first.place} and {other!r} in "
                f"{second.place}",
                f"The rows of a picture say the same {kind}",
                f"Correct or remove one of the two{labels}",
            )


def _layout(
    path: Path, facts: dict[str, Fact], sizes: dict[str, int], least: int, several: bool
) -> Layout:
    splits = {fact.split for fact in facts.values()}
    if None in splits and len(splits) > 1:
        where = next(fact.place for fact in facts.values() if fact.split is None)
        raise DataError(
            f"{path}: {where} names no split, other rows do",
            f"Each row is of {', '.join(SPLITS)}, or none is",
            f"Fill it in, or {_FLAGS['split']} {NONE} to have all pictures split",
        )
    if splits != {None} and "train" not in splits:
        raise DataError(
            f"{path} holds {' and '.join(sorted(map(str, splits)))} but no train",
            f"Of {', '.join(SPLITS)}, train must be there",
            f"Add rows of train, or {_FLAGS['split']} {NONE} to have all pictures split",
        )
    found: dict[str, Counter[str]] = {split or "": Counter() for split in splits}
    for key, fact in facts.items():
        for name in fact.names:
            found[fact.split or ""][name] += key in sizes
    if several and not all(facts[key].names for key in sizes):
        least = 1  # being there or not are two answers
    classes = check_classes(found, str(path), least, "class")
    label = {name: number for number, name in enumerate(classes)}
    files = []
    for key, fact in sorted(facts.items()):
        if key in sizes:
            numbers = tuple(label[name] for name in fact.names)
            placed = Placed(key, key, numbers if several else numbers[0], fact.split, fact.group)
            files.append(placed)
    return Layout(classes, files, remarks=class_remarks(found), multi=several)


def _nothing_found(path: Path, columns: Columns, skipped: list[Skipped]) -> DataError:
    if not skipped:
        return DataError(
            f"{path} holds no row", "A line of column names, then a row for each picture",
            "Give the table that names the pictures",
        )  # fmt: skip
    first = skipped[0]
    return DataError(
        f"none of the files that {path} names is there (the first: {first.path}, {first.reason})",
        f"The column {columns.path!r} holds paths relative to {path.parent}, or absolute ones",
        "Put the table beside its pictures, or name the column: --path-column NAME",
    )
