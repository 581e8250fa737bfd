# SPDX-License-Identifier: Apache-2.0
"""Which pictures belong together: one patient, one plant, one video, one and the same file.

Pictures of a group never lie in two splits, else what a model has learnt by heart counts as what it
can do. A group is told by the folder below the class, by a regular expression on the path, or by a
column of a table; copies are a group of their own, found while the pictures are prepared.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from crosspatch.errors import UsageError

FOLDER = "folder"


def assign_groups(
    keys: Sequence[str], names: Sequence[str], how: str
) -> tuple[list[str | None], list[str]]:
    """(the group of every key or None, remarks); names: the class of every key.

    how: "folder": the folders between class and file, alike for all classes (of a path that names
    no class, all its folders); else a regular expression that is searched in each key: the group is
    its first pair of brackets, or all that it matched where it has none. Raises UsageError when it
    is no expression, when no picture gets a group, and when all get the same one.
    """
    if how == FOLDER:
        groups = [_folder(key, name) for key, name in zip(keys, names, strict=True)]
    else:
        pattern = _compiled(how)
        groups = [_matched(pattern, key) for key in keys]
    found = Counter(name for name in groups if name is not None)
    if not found:
        raise UsageError(
            f"--group {how} gives none of the {len(keys):,} pictures a group",
            f"The first path is {keys[0]}",
            "Use folders below the class folders, a regular expression such as 'patient(\\d+)', or "
            "a column of a table",
        )
    alone = len(keys) - found.total()
    if len(found) == 1 and not alone:
        raise UsageError(
            f"--group {how} puts all pictures into one group ({next(iter(found))!r})",
            "Groups are divided among train, val and test, so there are several",
            "Put the part that differs into brackets, as in 'patient(\\d+)'",
        )
    said = [f"{len(found):,} groups by {how!r}, none of which is torn apart by the split."]
    if alone:
        said.append(f"{alone:,} pictures have no group: each stands alone.")
    return groups, said


def units(groups: Sequence[str | None], twins: Iterable[Sequence[int]] = ()) -> np.ndarray:
    """int64 (N,): the number of the unit that each picture belongs to. Pictures of one group, and
    twins, are in one unit; whoever has neither is alone. A unit is called by its first picture."""
    parent = np.arange(len(groups))

    def root(at: int) -> int:
        while parent[at] != at:
            parent[at] = parent[parent[at]]
            at = int(parent[at])
        return at

    def join(one: int, other: int) -> None:
        first, second = sorted((root(one), root(other)))
        parent[second] = first

    seen: dict[str, int] = {}
    for at, name in enumerate(groups):
        if name is not None:
            join(seen.setdefault(name, at), at)
    for alike in twins:
        for other in alike[1:]:
            join(alike[0], other)
    return np.array([root(at) for at in range(len(groups))], dtype=np.int64)


def _compiled(how: str) -> re.Pattern[str]:
    try:
        return re.compile(how)
    except re.error as problem:
        raise UsageError(
            f"--group {how!r} is no regular expression ({problem})",
            f"{FOLDER}, a column of a table, or an expression such as 'patient(\\d+)'",
            "Correct it, and put it into single quotes",
        ) from problem


def _matched(pattern: re.Pattern[str], key: str) -> str | None:
    hit = pattern.search(key)
    if hit is None:
        return None
    return (hit.group(1) if pattern.groups else hit.group(0)) or None


def _folder(key: str, name: str) -> str | None:
    """The folders after the one that is called like the class, or all of them."""
    folders = key.split("/")[:-1]
    place = folders.index(name) if name in folders else -1
    return "/".join(folders[place + 1 :]) or None
