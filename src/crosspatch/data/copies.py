# SPDX-License-Identifier: Apache-2.0
"""Copies: files of the same bytes, which `prepare` finds by size and SHA-256, and near-duplicates,
found by `near`.

Both stay in one split. Where the data say the splits and exact copies lie in several, the one that
is judged more strictly keeps its picture. Near-duplicates stay where they were put, for only their
owner knows whether they are one picture: that they lie in several splits is said.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from crosspatch.data.sources import Item, Source


def same_bytes(digests: dict[int, bytes]) -> tuple[tuple[int, ...], ...]:
    """Sets of two and more items with the same digest, each ascending."""
    found: dict[bytes, list[int]] = {}
    for item in sorted(digests):
        found.setdefault(digests[item], []).append(item)
    return tuple(tuple(items) for items in found.values() if len(items) > 1)


def leaks(source: Source, twins: Sequence[Sequence[int]]) -> dict[int, str]:
    """item -> why it is left out: a copy of a picture in a split that is judged more strictly.

    Test is the strictest, then val; without given splits nothing leaks.
    """
    order, found = {"test": 0, "val": 1, "train": 2, None: 2}, {}
    for alike in twins:
        first = min(alike, key=lambda item: order[source.items[item].split])
        strictest = source.items[first]
        for item in alike:
            if order[source.items[item].split] > order[strictest.split]:
                found[item] = f"the same file as {strictest.key}, which is in {strictest.split}"
    return found


def copy_remarks(source: Source, twins: Sequence[Sequence[int]]) -> list[str]:
    """Sentences on exact copies: how many, and which stand in two classes."""
    if not twins:
        return []
    copies = sum(len(alike) - 1 for alike in twins)
    plural = "picture is an exact copy of another" if copies == 1 else "pictures are exact copies"
    said = [f"{copies:,} {plural}: copies stay in one split."]
    torn = [alike for alike in twins if len({source.items[item].label for item in alike}) > 1]
    if torn:
        example = _pair(source, torn[0], lambda item: item.label)
        said.append(f"Copies stand in different classes, such as {example}.")
    return said


def near_remarks(source: Source, near: Sequence[Sequence[int]]) -> list[str]:
    """Sentences on near-duplicates: how many, which lie across given splits, which in two
    classes."""
    if not near:
        return []
    count = sum(len(one) - 1 for one in near)
    plural = "picture is a near-duplicate" if count == 1 else "pictures are near-duplicates"
    such = f"of another (resized, mirrored or the like), such as {_pair(source, near[0])}"
    torn = [one for one in near if len({source.items[item].split for item in one}) > 1]
    said = [f"{count:,} {plural} {such}{'' if torn else ': they stay in one split'}."]
    if torn:
        example = _pair(source, torn[0], lambda item: item.split)
        said.append(
            f"{_sets(torn)} across the given splits, such as {example}. They stay there, so the "
            "figures on val and test are a little too good: remove one of each."
        )
    mixed = [one for one in near if len({source.items[item].label for item in one}) > 1]
    if mixed:
        example = _pair(source, mixed[0], lambda item: item.label)
        said.append(f"{_sets(mixed)} in different classes, such as {example}.")
    return said


def _sets(found: Sequence[Sequence[int]]) -> str:
    few = "set of near-duplicates lies" if len(found) == 1 else "sets of near-duplicates lie"
    return f"{len(found):,} {few}"


def _pair(
    source: Source, alike: Sequence[int], by: Callable[[Item], object] = lambda item: item.key
) -> str:
    """The first of some items and the next that differs from it."""
    first, *others = (source.items[item] for item in alike)
    return f"{first.key} and {next(one.key for one in others if by(one) != by(first))}"
