# SPDX-License-Identifier: Apache-2.0
"""Exact copies: files of the same bytes, which `prepare` finds by size and SHA-256.

They stay in one split. Where the data say the splits and copies lie in several, the one that is
judged more strictly keeps its picture.
"""

from __future__ import annotations

from collections.abc import Sequence

from crosspatch.data.sources import Source


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
        first = source.items[torn[0][0]]
        other = next(source.items[i] for i in torn[0] if source.items[i].label != first.label)
        said.append(f"Copies stand in different classes, such as {first.key} and {other.key}.")
    return said
