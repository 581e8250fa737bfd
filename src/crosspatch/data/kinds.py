# SPDX-License-Identifier: Apache-2.0
"""What kinds of pictures there are: sizes, shapes, formats, grey or in colour, from a sample."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from crosspatch.data.decode import UnreadableImage
from crosspatch.data.sources import Source

SIZED, SEEN = 500, 100
"""Pictures whose size is read, and pictures that are decoded, at most."""
SIDE = 64
GREY = 6
"""Largest difference of a grey picture's channels; JPEG makes small ones."""


def kinds(source: Source, indices: Sequence[int]) -> dict[str, Any]:
    """{"images", "sized", "short_side", "long_side", "seen", "grey", "formats"} of the items
    `indices`.

    images: how many there are; short_side and long_side: least, median and greatest in pixels, of
    the `sized` ones whose size was read; grey: how many of the `seen` ones are; formats: {ending:
    pictures}. Unreadable pictures are passed over.
    """
    chosen = _spread(list(indices), SIZED)
    sizes = [size for size in (_size(source, index) for index in chosen) if size]
    sides = np.sort(np.array(sizes, np.int64).reshape(-1, 2), axis=1)
    grey = [one for one in (_grey(source, i) for i in _spread(chosen, SEEN)) if one is not None]
    ends = Counter(PurePosixPath(source.items[i].key).suffix.lower() for i in indices)
    return {
        "images": len(indices),
        "sized": len(sizes),
        "short_side": _range(sides[:, 0]),
        "long_side": _range(sides[:, 1]),
        "seen": len(grey),
        "grey": sum(grey),
        "formats": dict(ends.most_common(8)),
    }


def _spread(indices: Sequence[int], most: int) -> list[int]:
    """At most so many, at equal distances."""
    if len(indices) <= most:
        return list(indices)
    return [indices[place] for place in np.linspace(0, len(indices) - 1, most).astype(int)]


def _range(values: np.ndarray) -> list[int]:
    if not len(values):
        return []
    return [int(values.min()), int(np.median(values)), int(values.max())]


def _size(source: Source, index: int) -> tuple[int, int] | None:
    try:
        return source.image_size(index)
    except UnreadableImage:
        return None


def _grey(source: Source, index: int) -> bool | None:
    try:
        picture = np.asarray(source.image(index, side=SIDE)).astype(np.int16)
    except UnreadableImage:
        return None
    return bool((picture.max(axis=2) - picture.min(axis=2)).max() <= GREY)
