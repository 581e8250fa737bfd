# SPDX-License-Identifier: Apache-2.0
"""DATA: a folder of class folders, one with train/ val/ test/, an archive of either, a table, or
`digits`.

The folder's name is the class. Class folders are read to any depth. A file counts as a picture by
the end of its name (or when it has none); whether it is one, `prepare` finds out. Hidden files and
what file managers leave behind are invisible. Of an archive with one top folder, that folder is the
root. A table at the root of an archive without class folders says the classes of its pictures;
`archive.zip/table.csv` names it where there are class folders too, or several tables. `@lt:100`
after any of them thins its training pictures to a long tail (`longtail`).
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from crosspatch.data.archives import ARCHIVES, is_archive, open_archive
from crosspatch.data.groups import FOLDER, assign_groups
from crosspatch.data.labels import label_remarks, merge_repeated, numbers
from crosspatch.data.layout import MEANING, Layout, NoClasses, lay_out
from crosspatch.data.longtail import Tail, parse_spec
from crosspatch.data.shelf import TABLES, read_table, tables_in
from crosspatch.data.sources import DIGITS, DigitsSource, Source, TreeSource
from crosspatch.data.tables import NONE, open_table
from crosspatch.data.trees import FolderTree, Tree
from crosspatch.errors import DataError, UsageError, near


class _How(NamedTuple):
    """How DATA is to be read: what `open_source` is told."""

    least_classes: int
    told: dict[str, str | None]
    group: str | None
    multi_label: bool


def open_source(
    spec: str | Path,
    *,
    least_classes: int = 2,
    path_column: str | None = None,
    label_column: str | None = None,
    split_column: str | None = None,
    group: str | None = None,
    multi_label: bool = False,
    tail: Tail | None = None,
) -> Source:
    """Open DATA: a folder, an archive, a table, or the word "digits" (a folder of that name:
    "./digits").

    least_classes: training needs two; a trained model may be judged on pictures of one.
    path_column, label_column, split_column: of a table, where their names do not tell ("none": no
    splits). group: "folder", a column of the table, or a regular expression (see `groups`).
    multi_label: a picture may have several labels: copies of a file in several class folders, and
    rows of a table that name one file, are one picture (a table may say so by itself). tail: as
    `@lt:` says it.

    Raises UsageError for a path that does not exist or is no kind of DATA and for columns or groups
    that it does not have, DataError for data that cannot be trained on: no picture, a single class,
    an empty class, broken archives and tables, wrong splits.
    """
    told = {"path": path_column, "label": label_column, "split": split_column}
    spec, asked = parse_spec(spec)
    tail = asked or tail
    source = _open(spec, _How(least_classes, told, group, multi_label))
    return source if tail is None else _tailed(source, tail)


def _tailed(source: Source, tail: Tail) -> Source:
    """The source with a long tail of training pictures. Raises UsageError for pictures with several
    labels, of which no class can be thinned alone."""
    if source.multi:
        raise UsageError(
            f"{tail} of pictures with several labels",
            "one label to a picture: else a class is not thinned without others",
            f"leave {tail} away",
        )
    source.tail = tail
    source.remarks = (
        *source.remarks,
        f"{tail}: training pictures are thinned, {tail.ratio:g} to 1 from the first class to the "
        "last; those that validate and test are not.",
    )
    return source


def _open(spec: str | Path, how: _How) -> Source:
    if spec == DIGITS:
        _require_no_columns(spec, how.told)
        return _grouped(_labelled(DigitsSource(), how.multi_label), how.group)
    path = Path(spec)
    try:
        archive = path if path.is_file() else next((p for p in path.parents if p.is_file()), None)
        if archive is not None:
            return _open_file(path, archive, how)
        if not path.exists():
            raise _missing(path)
        _require_no_columns(spec, how.told)
        return _grouped(_open_folder(path, how), how.group)
    except OSError as problem:
        raise UsageError(
            f"cannot read {path} ({problem.strerror or problem})",
            "DATA is a folder, an archive or a table that you may read",
            "Check its permissions, or give another path",
        ) from problem


def _labelled(source: Source, multi_label: bool) -> Source:
    """The source with one label to a picture as one of several, where that was asked for."""
    if multi_label:
        source.multi = True
        source.items = tuple(replace(one, label=numbers(one.label)) for one in source.items)
        labels = [numbers(one.label) for one in source.items]
        source.remarks = (*label_remarks(labels, "as asked"), *source.remarks)
    return source


def _open_file(path: Path, file: Path, how: _How) -> Source:
    """`path` is the file itself, or leads into it as into a folder."""
    if path == file and path.name.lower().endswith(TABLES):
        return _open_table(path, how)
    _require_archive(file)
    tree = open_archive(file)
    table = _table_in(tree, path, file, how.told)
    if table is not None:
        return _open_table(file / table, how, (tree, table))
    _require_no_columns(path, how.told)
    layout = lay_out(tree, str(path), how.least_classes, look_through=True)
    layout = merge_repeated(tree, layout) if how.multi_label else layout
    layout.remarks += _tables_beside(tables_in(tree), layout, path)
    return _grouped(TreeSource(_name(path), tree, layout), how.group)


def _open_folder(path: Path, how: _How) -> Source:
    tree = FolderTree(path)
    tables = [table for table in tables_in(tree) if "/" not in table]
    try:
        layout = lay_out(tree, str(path), how.least_classes)
    except NoClasses as problem:
        if not tables:
            raise
        raise DataError(problem.got, problem.expected, _give(path, tables)) from problem
    layout = merge_repeated(tree, layout) if how.multi_label else layout
    layout.remarks += _tables_beside(tables, layout, path)
    return TreeSource(_name(path), tree, layout)


def _table_in(tree: Tree, path: Path, archive: Path, told: dict[str, str | None]) -> str | None:
    """The table of the archive that says the classes, or None where its folders do."""
    tables = tables_in(tree)
    if path != archive:
        inner = path.relative_to(archive).as_posix()
        if inner in tree.files and inner.lower().endswith(TABLES):
            return inner
        raise UsageError(
            f"{archive} holds no table {inner}",
            f"Its tables are {', '.join(tables[:5]) or 'none'}",
            _give(archive, tables) if tables else f"crosspatch train {archive}",
        )
    if not tables:
        return None
    if all(name is None for name in told.values()):
        try:
            lay_out(tree, str(archive), look_through=True)
        except NoClasses:
            pass
        except DataError:
            return None  # class folders with a fault, which is told when they are read
        else:
            return None
    if len(tables) > 1:
        raise DataError(
            f"{archive} holds {len(tables)} tables: {', '.join(tables[:5])}",
            "One table that names the pictures and their classes",
            _give(archive, tables),
        )
    return tables[0]


def _tables_beside(tables: Sequence[str], layout: Layout, path: Path) -> list[str]:
    """A sentence on tables that lie beside class folders. Raises DataError where these folders are
    called like splits, for then the table is more likely to say the classes."""
    if not tables:
        return []
    if all(name.lower() in MEANING for name in layout.classes):
        raise DataError(
            f"{path} holds {' and '.join(layout.classes)} with pictures in them, and {tables[0]}",
            "Class folders inside train, val and test, or a table that says the classes",
            _give(path, tables),
        )
    return [f"The folders say the classes. {tables[0]} beside them was not read: "
            f"{path / tables[0]} as DATA would be."]  # fmt: skip


def _give(path: Path, tables: Sequence[str]) -> str:
    return "crosspatch train " + " or ".join(shlex.quote(str(path / one)) for one in tables[:3])


def _require_archive(path: Path) -> None:
    if not is_archive(path):
        raise UsageError(
            f"{path} is a single file, and neither an archive nor a table",
            f"DATA is a folder of class folders, one packed as {' '.join(ARCHIVES)}, or a table "
            f"({' '.join(TABLES)})",
            "Give the folder that holds the class folders",
        )


def _open_table(path: Path, how: _How, packed: tuple[Tree, str] | None = None) -> Source:
    """A column of the table wins over "folder"; a plain word is a column, not an expression."""
    group = how.group
    word = group is None or (group.replace("_", "").isalnum() and group != FOLDER)
    by_column = word or group in read_table(path, packed)[0]
    told = {**how.told, "group": group if by_column else NONE}
    tree, layout = open_table(path, how.least_classes, told, packed, how.multi_label)
    source = TreeSource(_name(path), tree, layout)
    return source if by_column else _grouped(source, group)


def _grouped(source: Source, group: str | None) -> Source:
    """The source with `--group` carried out."""
    if group is not None and group != NONE:
        keys = [item.key for item in source.items]
        names = [source.named(numbers(item.label)[:1]) for item in source.items]
        groups, remarks = assign_groups(keys, names, group)
        source.items = tuple(
            replace(item, group=name) for item, name in zip(source.items, groups, strict=True)
        )
        source.remarks = (*source.remarks, *remarks)
    return source


def _require_no_columns(spec: str | Path, told: dict[str, str | None]) -> None:
    for kind, name in told.items():
        if name is not None:
            raise UsageError(
                f"--{kind}-column {name}, but {spec} is no table",
                f"A table is a file that ends with {' '.join(TABLES)}",
                f"Leave --{kind}-column out, or give a table",
            )


def _name(path: Path) -> str:
    name = path.resolve().name
    known = () if path.is_dir() else (*ARCHIVES, *TABLES)
    ending = next((end for end in known if name.lower().endswith(end)), "")
    return name[: len(name) - len(ending)] or "data"


def _missing(path: Path) -> UsageError:
    parent = path.parent
    beside = near(path.name, os.listdir(parent)) if parent.is_dir() else ""
    return UsageError(
        f"{path} does not exist",
        "DATA is a folder of class folders, an archive of one, a table, or the word digits",
        f"Did you mean {beside}" if beside else "Check the path, or try: crosspatch train digits",
    )
