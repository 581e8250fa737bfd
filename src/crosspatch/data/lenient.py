# SPDX-License-Identifier: Apache-2.0
"""DATA opened for an audit: what a training would refuse is looked at too, and why it would refuse
it is kept."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from crosspatch.data.archives import open_archive
from crosspatch.data.findings import Place
from crosspatch.data.layout import MEANING, PICTURE_ENDINGS, SPLITS, Layout, Placed
from crosspatch.data.opening import open_source
from crosspatch.data.shelf import TABLES
from crosspatch.data.skipped import Skipped
from crosspatch.data.sources import DIGITS, Source, TreeSource
from crosspatch.data.trees import FolderTree, Tree
from crosspatch.errors import DataError


class Opened(NamedTuple):
    """source: the pictures; place: where they lie; tree: all files, None for tables and what is
    built in; refusal: why a training would not start, or None; top: a folder in which everything
    lies, with its slash, or ""; splits: folder as it is called -> split that it is."""

    source: Source
    place: Place
    tree: Tree | None
    refusal: DataError | None
    top: str
    splits: dict[str, str]


def open_leniently(spec: str, beside: Path, **reading: Any) -> Opened:
    """Open DATA as `open_source` does, with its options, or, where that is refused and DATA is a
    folder or an archive, as well as the names allow. beside: see `Place`.

    Raises UsageError as `open_source` does, DataError for what holds no picture at all and for
    tables that cannot be read.
    """
    kind, plain = _kind(spec)
    place = Place(plain, kind, beside)
    try:
        source = open_source(spec, **reading)
    except DataError as refusal:
        if kind not in ("folder", "archive"):
            raise
        return _as_names_allow(plain, kind, place, refusal)
    if kind not in ("folder", "archive") or not _by_folder(source):
        return Opened(source, place, None, None, "", {})
    tree = _tree(plain, kind)
    top, splits = _shape(tree)
    return Opened(source, place, tree, None, "" if kind == "folder" else top, splits)


def _as_names_allow(plain: str, kind: str, place: Place, refusal: DataError) -> Opened:
    """What a training refuses."""
    tree = _tree(plain, kind)
    top, splits = _shape(tree)
    layout = _lay_out(tree, top, splits, refusal)
    source = TreeSource(Path(plain).resolve().name or "data", tree, layout)
    return Opened(source, place, tree, refusal, top, splits)


def _kind(spec: str) -> tuple[str, str]:
    """(one of `findings.KINDS`, DATA without a long tail, of a packed table the archive)."""
    plain = spec.rsplit("@lt:", 1)[0]
    if plain == DIGITS:
        return "built in", plain
    path = Path(plain)
    if path.is_dir():
        return "folder", plain
    if plain.lower().endswith(TABLES) and path.is_file():
        return "table", plain
    packed = next((str(one) for one in path.parents if one.is_file()), plain)
    return "archive", packed


def _tree(plain: str, kind: str) -> Tree:
    return FolderTree(plain) if kind == "folder" else open_archive(Path(plain))


def _by_folder(source: Source) -> bool:
    """Whether folders say the classes, and no table."""
    return not source.multi and all(
        source.named(item.label) in item.key.split("/")[:-1] for item in source.items
    )


def _shape(tree: Tree) -> tuple[str, dict[str, str]]:
    """(the folder that holds everything, the folders that are splits below it)."""
    top = ""
    while True:
        inner = {path.removeprefix(top).split("/", 1)[0] for path in (*tree.files, *tree.folders)
                 if path.startswith(top)}  # fmt: skip
        inner.discard("")
        name = next(iter(inner), "")
        deeper = any(path.startswith(f"{top}{name}/") for path in tree.folders)
        if len(inner) != 1 or not deeper or name.lower() in MEANING:
            break
        top += f"{name}/"
    below = [path.removeprefix(top) for path in tree.folders if path.startswith(top)]
    own = {path.removeprefix(top).split("/")[0] for path in tree.files
           if path.startswith(top) and path.removeprefix(top).count("/") == 1
           and _is_picture(path)}  # fmt: skip
    holding = {path.split("/")[0] for path in below if "/" in path} - own
    meant = sorted(holding, key=lambda name: (name not in SPLITS, name))
    return top, {name: MEANING[name.lower()] for name in meant if name.lower() in MEANING}


def _lay_out(tree: Tree, top: str, splits: dict[str, str], refusal: DataError) -> Layout:
    """Every folder that could be a class is one, empty or not. Raises the refusal where there is no
    picture in any."""
    layout, depth = Layout(()), 1 if splits else 0
    found: Counter[str] = Counter()
    placed: list[tuple[str, str, str, str | None]] = []
    for path in tree.files:
        key = path.removeprefix(top)
        parts = key.split("/")
        if not path.startswith(top) or not _is_picture(path):
            layout.skipped.append(Skipped(key, "not a picture by its name"))
        elif len(parts) < depth + 2 or (splits and parts[0] not in splits):
            layout.skipped.append(Skipped(key, "not in a class folder"))
        else:
            found[parts[depth]] += 1
            placed.append((path, key, parts[depth], splits.get(parts[0]) if splits else None))
    for folder in tree.folders:
        parts = folder.removeprefix(top).split("/")
        inside = not splits or parts[0] in splits
        if inside and folder.startswith(top) and len(parts) == depth + 1 and parts[-1]:
            found[parts[depth]] += 0
    if not placed:
        raise refusal
    layout.classes = tuple(sorted(found))
    number = {name: at for at, name in enumerate(layout.classes)}
    layout.files = [Placed(path, key, number[name], split) for path, key, name, split in placed]
    layout.files.sort(key=lambda one: one.key)
    return layout


def _is_picture(path: str) -> bool:
    name = path.rsplit("/", 1)[-1]
    return "." not in name or f".{name.rsplit('.', 1)[-1].lower()}" in PICTURE_ENDINGS
