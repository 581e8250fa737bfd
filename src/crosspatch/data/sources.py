# SPDX-License-Identifier: Apache-2.0
"""What a data set is: classes, items, and the way to each picture's bytes."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from crosspatch.data.decode import UnreadableImage, decode, picture_size
from crosspatch.data.labels import SEPARATOR, Label, numbers
from crosspatch.data.layout import Layout
from crosspatch.data.longtail import Tail
from crosspatch.data.skipped import Skipped
from crosspatch.data.trees import Tree
from crosspatch.errors import DataError, near

_HEAD = 1 << 17  # nearly every picture tells its size in here

DIGITS = "digits"


@dataclass(frozen=True)
class Item:
    """One picture. `key`: posix path below the root, unique; `label`: index into the classes, or of
    a source with several labels to a picture a tuple of them, ascending and maybe empty; `split`:
    "train", "val" or "test" where the data say so, else None; `group`: pictures of one group stay
    in one split (None: in a group of its own)."""

    key: str
    label: Label
    split: str | None
    group: str | None = None


class Source(ABC):
    """Classes and items of a data set, and the way to each picture's bytes.

    `name`: short, for run folders. `classes`: sorted names. `items`: ordered by key. `skipped`:
    files that are left out by their name or place (unreadable pictures are found by `prepare`).
    `remarks`: sentences on how the data were understood. `multi`: whether a picture may have
    several labels, or none. `tail`: which of its training pictures are used (`longtail`), None for
    all. A source holds no open file: it may be
    pickled and used from forked workers.
    """

    name: str
    classes: tuple[str, ...]
    items: tuple[Item, ...]
    skipped: list[Skipped]
    remarks: tuple[str, ...] = ()
    multi: bool = False
    tail: Tail | None = None

    def __len__(self) -> int:
        return len(self.items)

    @property
    def labels(self) -> np.ndarray:
        """int64 (N,): the label of every item, or `presence` where it may have several."""
        if self.multi:
            return self.presence
        return np.fromiter((item.label for item in self.items), np.int64, len(self.items))

    @property
    def presence(self) -> np.ndarray:
        """float32 (N, K): 1 where an item has a class, else 0."""
        pairs = [(row, at) for row, item in enumerate(self.items) for at in numbers(item.label)]
        table = np.zeros((len(self.items), len(self.classes)), np.float32)
        table[tuple(np.array(pairs, np.int64).reshape(-1, 2).T)] = 1
        return table

    def counts(self, chosen: np.ndarray) -> np.ndarray:
        """int64 (K,): how many of the chosen items (indices) have each class."""
        if self.multi:
            return self.presence[chosen].sum(axis=0).astype(np.int64)
        return np.bincount(self.labels[chosen], minlength=len(self.classes))

    def named(self, label: Label) -> str:
        """The name of a label; several are joined by `|`."""
        return SEPARATOR.join(self.classes[number] for number in numbers(label))

    @abstractmethod
    def read(self, index: int) -> bytes | np.ndarray:
        """The file's bytes, or a uint8 array (H, W, 3). Raises UnreadableImage."""

    def image(
        self, index: int, *, side: int | None = None, data: bytes | np.ndarray | None = None
    ) -> Image.Image:
        """The picture, upright and RGB; `side` as in `decode`; `data`: what `read` gave, if it was
        called before. Raises UnreadableImage."""
        data = self.read(index) if data is None else data
        if isinstance(data, bytes):
            return decode(data, side=side, name=self.items[index].key)
        return Image.fromarray(data)

    def image_size(self, index: int) -> tuple[int, int]:
        """(height, width) in pixels of the upright picture. Raises UnreadableImage."""
        picture = self.image(index)
        return picture.height, picture.width

    def fingerprint(self) -> str:
        """A digest (hex) of the classes and of every item's key, size and label."""
        digest = hashlib.sha256("\n".join(self.classes).encode())
        for item, size in zip(self.items, self._sizes(), strict=True):
            digest.update(f"\0{item.key}\0{size}\0{item.label}".encode())
        if self.tail is not None:
            digest.update(f"\0{self.tail}".encode())
        return digest.hexdigest()

    def sizes(self) -> list[int]:
        """Of every item a number that changes with its file, nearly always: its bytes, mostly."""
        return self._sizes()

    def alike(self) -> np.ndarray:
        """bool (N,): the items whose bytes may equal another's, as their sizes do."""
        sizes = np.array(self._sizes())
        _, place, count = np.unique(sizes, return_inverse=True, return_counts=True)
        return count[place] > 1

    @abstractmethod
    def _sizes(self) -> list[int]:
        """A number per item that changes when its file does."""


class TreeSource(Source):
    """A source whose pictures are the files of a tree (folder, zip, tar, those of a table)."""

    def __init__(self, name: str, tree: Tree, layout: Layout) -> None:
        self.name, self.classes, self.multi = name, layout.classes, layout.multi
        self.items = tuple(Item(one.key, one.label, one.split, one.group) for one in layout.files)
        self.remarks = tuple(layout.remarks)
        self.skipped = sorted([*tree.skipped, *layout.skipped], key=lambda one: one.path)
        self._tree, self._paths = tree, [file.path for file in layout.files]

    def read(self, index: int) -> bytes:
        return self._tree.read(self._paths[index])

    def image_size(self, index: int) -> tuple[int, int]:
        head, name = self._tree.read(self._paths[index], _HEAD), self.items[index].key
        try:
            return picture_size(head, name=name)
        except UnreadableImage:
            if len(head) < _HEAD:
                raise
        return picture_size(self.read(index), name=name)

    def _sizes(self) -> list[int]:
        return [self._tree.files[path] for path in self._paths]


class DigitsSource(Source):
    """The 1,797 scanned digits that scikit-learn ships: 8x8 grey, ten classes."""

    def __init__(self) -> None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        self.name, self.skipped = DIGITS, []
        self.classes = tuple(str(name) for name in digits.target_names)
        order = np.argsort(digits.target, kind="stable")
        grey = np.rint(digits.images[order] * (255 / 16)).astype(np.uint8)
        self._pictures = np.repeat(grey[..., None], 3, axis=3)
        self.items = tuple(
            Item(f"{self.classes[label]}/{row:04d}", int(label), None)
            for row, label in zip(order, digits.target[order], strict=True)
        )

    def read(self, index: int) -> np.ndarray:
        return self._pictures[index]

    def _sizes(self) -> list[int]:
        return [int(picture.sum()) for picture in self._pictures]


def match_classes(source: Source, known: Sequence[str]) -> np.ndarray:
    """int64 (N,): for every item the model's index of its class, matched by name; of a source with
    several labels to a picture float32 (N, K), 1 where an item has the model's class.

    Raises DataError naming the classes that the model does not know, and what is near them.
    """
    place = {name: index for index, name in enumerate(known)}
    unknown = [name for name in source.classes if name not in place]
    if unknown:
        hints = [f"{name} (near: {near(name, known) or 'nothing'})" for name in unknown[:5]]
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        shown = ", ".join(known[:12]) + (" …" if len(known) > 12 else "")
        raise DataError(
            f"classes that the model does not know: {', '.join(hints)}{more}",
            f"it was trained on {len(known)} classes: {shown}",
            "rename these classes to the model's names, or take them out",
        )
    places = np.array([place[name] for name in source.classes], np.int64)
    if not source.multi:
        return places[source.labels]
    table = np.zeros((len(source), len(known)), np.float32)
    table[:, places] = source.presence
    return table
