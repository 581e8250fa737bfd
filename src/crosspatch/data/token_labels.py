# SPDX-License-Identifier: Apache-2.0
"""Token labels in one file: for every picture of a source a map of a teacher's logits.

A .safetensors file of N rows, one for each item of the source: `values` float16 (N, H', W', k), the
k largest raw logits at each place, largest first; `indices` uint16 (N, H', W', k), their classes,
left out where k is all K classes, which then stand in order; `state` uint8 (N,), one of `State`.
Its metadata say which data, classes and teacher these are. The rows are read from the disk as they
are needed.

The file is written aside, its rows as they are found, and is renamed when it is whole; what was
written when a process was killed is found again by the next one that is to write the same.

The maps lie over the whole stored picture; `aligned` reads them where a token of the augmented one
is, by the same affine map. It stands for the RoIAlign of "All Tokens Matter", arXiv 2104.10858
(Jiang et al., NeurIPS 2021): points at the middles of equal parts of each token, at most one place
apart, read bilinearly and averaged. An upright crop of a map that is no finer than the grid of
tokens gives the same numbers; flips, rotations and shear are included.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from crosspatch.data import jsons
from crosspatch.data.augment import sample
from crosspatch.data.sources import Source
from crosspatch.data.tensors import read_header
from crosspatch.errors import DataError, UsageError

KEY, SCHEMA = "crosspatch-token-labels", 1
NAMES = ("values", "indices", "state")
KINDS = {"values": ("F16", "<f2"), "indices": ("U16", "<u2"), "state": ("U8", "|u1")}
MOST_CLASSES = 1 << 16  # that an index can name
EXPECTED, DO = "a file that crosspatch label wrote", "write them again with crosspatch label"


class State(IntEnum):
    """Of a row: not written yet; labelled; labelled by a teacher that was trained on the picture;
    without labels, as its picture cannot be read."""

    MISSING = 0
    LABELLED = 1
    TAUGHT = 2
    UNREADABLE = 3


@dataclass(frozen=True, kw_only=True)
class About:
    """What labels were made of.

    fingerprint, keys: of the source and of its names (hex); classes: names; teacher: its record;
    size: (H, W) in pixels that the teacher saw; fit: how pictures were brought to it; grid: (H',
    W') places; top: k logits at each.
    """

    fingerprint: str
    keys: str
    classes: tuple[str, ...]
    teacher: dict[str, str] = field(default_factory=dict)
    size: tuple[int, int]
    fit: str
    grid: tuple[int, int]
    top: int

    def shapes(self, count: int) -> dict[str, tuple[int, ...]]:
        """The shapes of the tensors of `count` rows, by name."""
        maps = (count, *self.grid, self.top)
        indices = {} if self.top == len(self.classes) else {"indices": maps}
        return {"values": maps, **indices, "state": (count,)}


def keys_hash(source: Source) -> str:
    """sha256 of the names of a source's items."""
    return hashlib.sha256("\0".join(item.key for item in source.items).encode()).hexdigest()


def strongest(logits: Tensor, top: int) -> tuple[Tensor, Tensor | None]:
    """logits (B, K, H', W') -> the `top` largest of each place (B, H', W', top) float16 and their
    classes, None where that is all of them. Raises DataError where 16 bits cannot hold a logit."""
    places = logits.permute(0, 2, 3, 1)
    if top == places.shape[-1]:
        values, indices = places, None
    else:
        values, indices = places.topk(top, dim=-1)
    values = values.half()
    if not values.isfinite().all():
        raise DataError(
            "the teacher answers with numbers that are not finite, or above 65,504",
            "a network whose training did not diverge",
            "name another --teacher",
        )
    return values, indices


def dense(values: Tensor, indices: Tensor | None, classes: int) -> Tensor:
    """The inverse of `strongest`, (B, K, H', W') float32: 0 where a logit was not kept.

    So a softmax gives each class that was left out a weight of exp(0), as the authors' code does:
    with many classes and an unsure teacher the labels get flat. With all classes it is exact.
    """
    values = values.float().permute(0, 3, 1, 2)
    if indices is None:
        return values.contiguous()
    count, _, rows, columns = values.shape
    empty = values.new_zeros(count, classes, rows, columns)
    return empty.scatter_(1, indices.long().permute(0, 3, 1, 2), values)


def aligned(
    maps: Tensor, warp: Tensor, grid: tuple[int, int], extent: tuple[float, float] = (1.0, 1.0)
) -> Tensor:
    """maps (B, K, H', W') over the stored pictures -> their means (B, K, rows, columns) in the
    cells of a `grid` over the augmented ones.

    warp: (B, 2, 3), see `data.augment.Steering`; extent: the part of height and width that the grid
    covers, from the top left. Outside of the picture the map is mirrored, as the picture is.
    """
    points = [cells * -(-places // cells)
              for cells, places in zip(grid, maps.shape[2:], strict=True)]  # fmt: skip
    read = sample(maps, _part(warp.to(maps), extent), (points[0], points[1]))
    return F.adaptive_avg_pool2d(read, grid) if tuple(points) != tuple(grid) else read


def _part(warp: Tensor, extent: tuple[float, float]) -> Tensor:
    """The map of the top left part of a picture, whose own frame is [-1, 1] again."""
    if extent == (1.0, 1.0):
        return warp
    down, across = extent
    part = warp.new_tensor([[across, 0, across - 1], [0, down, down - 1], [0, 0, 1]])
    return warp @ part


class TokenLabels:
    """A file of token labels, opened.

    sha256: what the file must be. Raises DataError where it is missing, torn, foreign or another.
    """

    def __init__(self, path: str | Path, sha256: str | None = None) -> None:
        self.path = Path(path)
        self.about, shapes = _read_header(self.path)
        self.sha256 = labels_hash(self.path)
        if sha256 not in (None, self.sha256):
            raise DataError(
                f"{path} holds no longer the labels the run was begun with",
                f"the file whose sha256 is {str(sha256)[:16]}…",
                "put it back, or train anew with --overwrite",
            )
        self._parts = _mapped(self.path, shapes, "r")
        self.state: np.ndarray = np.array(self._parts["state"])

    def __len__(self) -> int:
        return len(self.state)

    @property
    def bytes(self) -> int:
        """Size on the disk."""
        return self.path.stat().st_size

    def maps(self, items: Tensor) -> Tensor:
        """Logits (B, K, H', W') float32 of items (B,) of the source."""
        rows = items.cpu().numpy()
        values = torch.from_numpy(self._parts["values"][rows])
        indices = self._parts.get("indices")
        chosen = None if indices is None else torch.from_numpy(indices[rows].astype(np.int64))
        return dense(values, chosen, len(self.about.classes))

    def require(self, source: Source, fit: str, store: tuple[int, int]) -> None:
        """Raises DataError unless these are labels of the source, its pictures fitted alike; fit,
        store: how, and to what height and width, the student's are."""
        about = self.about
        if about.classes != source.classes:
            raise self._other(
                f"of {len(about.classes)} classes, {', '.join(about.classes[:5])}; the data have "
                f"{len(source.classes)}, {', '.join(source.classes[:5])}"
            )
        if about.keys != keys_hash(source) or len(self) != len(source):
            raise self._other(f"of {len(self):,} other pictures than these {len(source):,}")
        if about.fingerprint != source.fingerprint():
            raise self._other("of pictures of the same names with other contents or labels")
        ours, theirs = (side[0] / side[1] for side in (store, about.size))
        if about.fit != fit or (fit != "squash" and abs(ours / theirs - 1) > 0.05):
            raise UsageError(
                f"{self.path} has labels of pictures brought to {_pixels(about.size)} by "
                f"{about.fit}, and training brings them to {_pixels(store)} by {fit}",
                "pictures that are fitted alike, so that a label lies where its patch is",
                f"--fit {about.fit}, or crosspatch label … --fit {fit}",
            )

    def _other(self, what: str) -> DataError:
        return DataError(
            f"{self.path} has token labels {what}", "labels of the data that are trained on", DO
        )

    def require_rows(self, train: np.ndarray, judging: np.ndarray, keys: Sequence[str]) -> None:
        """Raises DataError where an item of `train` has no labels, UsageError where the teacher was
        trained on items that would judge its student; keys: names of all items."""
        missing = train[~np.isin(self.state[train], (State.LABELLED, State.TAUGHT))]
        if len(missing):
            raise DataError(
                f"{self.path} has no labels of {len(missing):,} training pictures, the first "
                f"{keys[int(missing[0])]}: they could not be read when it was written",
                "labels of every picture that is trained on",
                DO,
            )
        seen = int((self.state[judging] == State.TAUGHT).sum())
        if seen:
            raise UsageError(
                f"the teacher of {self.path} was trained on {seen:,} of the pictures that would "
                "judge its student here",
                "the split of the teacher's run",
                "give the --seed and --group that the teacher was trained with",
            )


class Draft:
    """A file of token labels that is being written, `count` rows; see the module's text.

    `todo`: the rows that have to be written. Raises UsageError where `path` exists or cannot be
    written.
    """

    def __init__(self, path: Path, about: About, count: int) -> None:
        if path.exists():
            raise _taken(path)
        self.path, self.about = path, about
        header, shapes = _header(about, count)
        digest = hashlib.sha256(header).hexdigest()[:12]
        self.aside = path.with_name(f".writing-{digest}-{path.name}")
        total = len(header) + sum(_size(name, shape) for name, shape in shapes.items())
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not self._begun(header, total):
                self._reserve(header, total)
            self._parts = _mapped(self.aside, _read_header(self.aside)[1], "r+")
        except OSError as error:
            raise UsageError(
                f"{path} cannot be written: {error}",
                f"a folder that can be written, with room for {total / 1e6:,.1f} MB",
                "make room or choose another --out",
            ) from error

    def _reserve(self, header: bytes, total: int) -> None:
        """A file of the whole size, with room for it on the disk: a page that found none when it
        is written through the map would kill the process without a word."""
        try:
            with self.aside.open("wb") as file:
                file.write(header)
                file.truncate(total)
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, total)
        except OSError:
            self.aside.unlink(missing_ok=True)
            raise

    def _begun(self, header: bytes, total: int) -> bool:
        if not self.aside.is_file() or self.aside.stat().st_size != total:
            return False
        with self.aside.open("rb") as file:
            return file.read(len(header)) == header

    @property
    def todo(self) -> np.ndarray:
        """int64: the rows that are missing."""
        return np.flatnonzero(self._parts["state"] == State.MISSING)

    def write(self, rows: np.ndarray, values: Tensor, indices: Tensor | None, state: Any) -> None:
        """Rows (B,) with what `strongest` gave for them, and their `State`s: these last, so that a
        row that has one is whole."""
        self._parts["values"][rows] = values.cpu().numpy()
        self._parts["values"].flush()
        if indices is not None:
            self._parts["indices"][rows] = indices.cpu().numpy().astype(np.uint16)
            self._parts["indices"].flush()
        self.mark(rows, state)

    def mark(self, rows: np.ndarray, state: Any) -> None:
        """Only the states of rows."""
        self._parts["state"][rows] = state
        self._parts["state"].flush()

    def finish(self) -> TokenLabels:
        """The whole file, under its own name, on the disk. Raises UsageError where there is one
        now."""
        self._parts.clear()
        if self.path.exists():  # by another process that wrote the same
            raise _taken(self.path)
        with self.aside.open("rb+") as file:
            os.fsync(file.fileno())
        if self.path.exists():
            raise _taken(self.path)
        os.replace(self.aside, self.path)
        return TokenLabels(self.path)


def _taken(path: Path) -> UsageError:
    return UsageError(
        f"{path} exists",
        "a new file: nothing is overwritten",
        "choose another --out, or delete it first",
    )


def labels_hash(path: Path) -> str:
    """sha256 of a file, remembered while it does not change."""
    path, stat = path.resolve(), path.stat()
    return _hash(path, stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=4)
def _hash(path: Path, size: int, changed: int) -> str:
    del size, changed
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _header(about: About, count: int) -> tuple[bytes, dict[str, tuple[int, ...]]]:
    """The first bytes of a safetensors file of so many rows, and its shapes."""
    note = json.dumps({"schema": SCHEMA, **asdict(about)}, ensure_ascii=False)
    shapes, at = about.shapes(count), 0
    entries: dict[str, Any] = {"__metadata__": {KEY: note}}
    for name, shape in shapes.items():
        end = at + _size(name, shape)
        kind = KINDS[name][0]
        entries[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, shapes


def _size(name: str, shape: Sequence[int]) -> int:
    return int(np.prod(shape)) * np.dtype(KINDS[name][1]).itemsize


def _read_header(path: Path) -> tuple[About, dict[str, tuple[int, ...]]]:
    """What labels these are, and their shapes; DataError where they are none or not whole."""
    header = read_header(path, EXPECTED, DO)
    note = header.metadata.get(KEY)
    found = {name: one.shape for name, one in header.tensors.items()}
    kinds = {name: one.dtype for name, one in header.tensors.items()}
    if note is None:
        raise _unusable(path, "holds no token labels")
    try:
        record = jsons.parse(note)
        if record.pop("schema") != SCHEMA:
            raise KeyError("schema")
        pairs = {key: tuple(record[key]) for key in ("classes", "size", "grid")}
        about = About(**{**record, **pairs})
        expected = about.shapes(found["state"][0])
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise _unusable(path, f"has metadata of another version ({error})") from error
    if found != expected or any(KINDS[name][0] != kind for name, kind in kinds.items()):
        raise _unusable(path, "holds other tensors than its metadata say")
    return about, found


def _unusable(path: Path, why: str) -> DataError:
    return DataError(f"{path} {why}", EXPECTED, DO)


def _mapped(path: Path, shapes: dict[str, tuple[int, ...]], mode: Any) -> dict[str, Any]:
    """The tensors of a file whose header was checked, as arrays on the disk."""
    places = read_header(path, EXPECTED, DO).tensors
    return {
        name: np.memmap(path, KINDS[name][1], mode, places[name].offset, shape)
        for name, shape in shapes.items()
    }


def _pixels(size: Sequence[int]) -> str:
    return f"{size[0]}x{size[1]}"
