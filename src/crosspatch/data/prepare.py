# SPDX-License-Identifier: Apache-2.0
"""Decode every picture once before training: the unreadable and the copies are found, the rest is
held in memory.

The pictures of a set that fits lie in one shared uint8 buffer, filled by forked workers; from then
on a batch is one gather. The buffer is anonymous shared memory, so the small /dev/shm of containers
is no limit. A set that does not fit is decoded again in every epoch.
"""

from __future__ import annotations

import hashlib
import math
import mmap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from crosspatch.data.copies import copy_remarks, leaks, near_remarks, same_bytes
from crosspatch.data.decode import UnreadableImage
from crosspatch.data.near import fingerprint, near_groups
from crosspatch.data.preprocess import Preprocess
from crosspatch.data.skipped import Skipped, write_skipped
from crosspatch.data.sources import Source
from crosspatch.data.workers import pool
from crosspatch.errors import DataError
from crosspatch.processor import cores

__all__ = ["ImageSet", "Prepared", "Skipped", "Survey", "prepare", "survey", "write_skipped"]

_CHUNK = 64
_FEW = 128  # below this many pictures, starting processes costs more than it saves

Progress = Callable[[int, int], None]
Prints = dict[int, bytes]
Result = tuple[range, list[tuple[int, str]], Prints, Prints]
"""Of a chunk: its items, those that cannot be read and why, digests of those that may be copies,
fingerprints (see `near`)."""


class ImageSet:
    """Labelled pictures of one size. `cached` says whether they come from the shared buffer.

    `classes`: names; `labels`: int64 (N,), or float32 (N, K), 0 or 1, where a picture
    may have several; `keys`: N names; `buffer`: uint8 (M, H', W', 3), M >= N,
    shared by every subset, or None when pictures are decoded on demand.
    """

    def __init__(
        self,
        source: Source,
        preprocess: Preprocess,
        items: np.ndarray,
        buffer: torch.Tensor | None = None,
        rows: torch.Tensor | None = None,
    ) -> None:
        self.source, self.preprocess, self.items = source, preprocess, np.asarray(items, np.int64)
        self.classes = source.classes
        self.labels = torch.from_numpy(source.labels[self.items])
        self.buffer = buffer
        self._rows = torch.from_numpy(self.items) if rows is None else rows

    def __len__(self) -> int:
        return len(self.items)

    @property
    def keys(self) -> list[str]:
        return [self.source.items[item].key for item in self.items]

    @property
    def cached(self) -> bool:
        return self.buffer is not None

    def images(self, index: torch.Tensor) -> torch.Tensor:
        """Pictures number `index` (B,) int64 -> uint8 (B, H', W', 3).

        Raises UnreadableImage when a picture that is not cached has become unreadable.
        """
        if self.buffer is not None:
            return self.buffer[self._rows[index]]
        pictures = [
            load_picture(self.source, int(item), self.preprocess)
            for item in self.items[index.numpy()]
        ]
        shape = (0, *self.preprocess.store, 3)
        return torch.from_numpy(np.stack(pictures) if pictures else np.empty(shape, np.uint8))

    def subset(self, indices: Sequence[int] | np.ndarray | torch.Tensor) -> ImageSet:
        """The pictures at these positions of this set, in this order; the buffer is shared."""
        index = torch.as_tensor(np.asarray(indices, np.int64))
        return ImageSet(
            self.source,
            self.preprocess,
            self.items[index.numpy()],
            self.buffer,
            self._rows[index],
        )


@dataclass(frozen=True)
class Survey:
    """Sizes of a sample of pictures, in pixels, from their headers.

    `median_side`, `least_side`, `greatest_side`: of the shorter sides; `aspect`: median of width
    over height; `looked_at`, `unreadable`: numbers of pictures; `total`: pictures in the source.
    """

    median_side: int
    least_side: int
    greatest_side: int
    aspect: float
    looked_at: int
    unreadable: int
    total: int


@dataclass(frozen=True)
class Prepared:
    """`images`: the readable items, in order; `kept`: their item indices (int64); `skipped`: all
    that was left out; `message`: one line on the memory used; `twins`: sets of kept items whose
    files hold the same bytes; `near`: of those that show the same picture, one item of each of
    `twins` at most; `remarks`: sentences about both."""

    images: ImageSet
    kept: np.ndarray
    skipped: list[Skipped]
    message: str
    twins: tuple[tuple[int, ...], ...] = ()
    near: tuple[tuple[int, ...], ...] = ()
    remarks: tuple[str, ...] = ()

    @property
    def alike(self) -> tuple[tuple[int, ...], ...]:
        """Sets of items that a split must not tear apart: copies, exact and near."""
        return (*self.twins, *self.near)


def survey(source: Source, limit: int = 512, seed: int = 0) -> Survey:
    """A quick look at up to `limit` pictures. Raises DataError when none of them can be read."""
    chosen = np.random.default_rng(seed).permutation(len(source))[:limit]
    sizes = [size for index in chosen if (size := _size(source, int(index))) is not None]
    if not sizes:
        raise _nothing_readable(source)
    height, width = np.array(sizes).T
    sides = np.minimum(height, width)
    return Survey(
        median_side=int(np.median(sides)),
        least_side=int(sides.min()),
        greatest_side=int(sides.max()),
        aspect=float(np.median(width / height)),
        looked_at=len(chosen),
        unreadable=len(chosen) - len(sizes),
        total=len(source),
    )


def prepare(
    source: Source,
    preprocess: Preprocess,
    *,
    workers: int | None = None,
    memory_fraction: float = 0.4,
    progress: Progress | None = None,
) -> Prepared:
    """Decode every item once, in `workers` processes (None: one per core).

    The pictures are kept when they need at most `memory_fraction` of the free memory. `progress` is
    called with (done, total). Where the data say the splits, a copy of a test picture is left out
    of val and train, and one of a val picture out of train; a near-duplicate stays where it was
    put, which is said. Raises DataError when no picture at all can be read.
    """
    height, width = preprocess.store
    fits, _ = plan_memory(len(source), preprocess, memory_fraction)
    buffer = _shared_buffer(len(source), height, width) if fits else None
    digests: Prints = {}
    prints: Prints = {}
    faults = dict(_fill(source, preprocess, buffer, workers, progress, digests, prints))
    twins = same_bytes(digests)
    faults.update(leaks(source, twins))
    twins = tuple(t for one in twins if len(t := tuple(i for i in one if i not in faults)) > 1)
    kept = np.array([i for i in range(len(source)) if i not in faults], dtype=np.int64)
    if not len(kept):
        raise _nothing_readable(source)
    for item in {*faults, *(item for one in twins for item in one[1:])}:
        prints.pop(item, None)
    near = near_groups(prints)
    skipped = [Skipped(source.items[index].key, faults[index]) for index in sorted(faults)]
    return Prepared(
        ImageSet(source, preprocess, kept, buffer),
        kept,
        sorted([*source.skipped, *skipped], key=lambda one: one.path),
        _message(len(kept), preprocess, fits),
        twins,
        near,
        (*copy_remarks(source, twins), *near_remarks(source, near)),
    )


def load_picture(source: Source, index: int, preprocess: Preprocess) -> np.ndarray:
    """Item number `index` decoded and fitted: uint8 (H', W', 3). Raises UnreadableImage."""
    return preprocess.fit_image(source.image(index, side=max(preprocess.store)))


def free_memory() -> int:
    """Bytes that can be taken now: the machine's free memory, or less where a container caps it."""
    import psutil

    free = psutil.virtual_memory().available
    limit, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    if limit.is_file() and used.is_file() and (cap := limit.read_text().strip()).isdigit():
        free = min(free, max(0, int(cap) - int(used.read_text())))
    return free


def _size(source: Source, index: int) -> tuple[int, int] | None:
    try:
        return source.image_size(index)
    except UnreadableImage:
        return None  # counted by the caller


def _shared_buffer(count: int, height: int, width: int) -> torch.Tensor:
    memory = mmap.mmap(-1, max(1, count * height * width * 3))
    flat = torch.frombuffer(memory, dtype=torch.uint8, count=count * height * width * 3)
    return flat.view(count, height, width, 3)


def _fill(
    source: Source,
    preprocess: Preprocess,
    buffer: torch.Tensor | None,
    workers: int | None,
    progress: Progress | None,
    digests: Prints,
    prints: Prints,
) -> Iterator[tuple[int, str]]:
    """Decode all items into the buffer's rows (if any); yields (item, reason) of the unreadable.
    `digests` takes in those of the readable items that may be copies, `prints` the fingerprints."""
    total, done = len(source), 0
    rows = None if buffer is None else buffer.numpy()
    chunks = [range(at, min(at + _CHUNK, total)) for at in range(0, total, _CHUNK)]
    count = 1 if total < _FEW and workers is None else workers or cores()
    with pool(count, _Job(source, preprocess, rows, source.alike())) as decode_chunk:
        for chunk, faults, found, printed in decode_chunk(chunks):
            yield from faults
            digests.update(found)
            prints.update(printed)
            done += len(chunk)
            if progress is not None:
                progress(done, total)


@dataclass
class _Job:
    """What a worker inherits by forking; `rows` is the buffer, written in place; `alike` (N,) says
    which items may be copies of others."""

    source: Source
    preprocess: Preprocess
    rows: np.ndarray | None
    alike: np.ndarray

    def __call__(self, chunk: range) -> Result:
        faults, digests, prints = [], {}, {}
        for index in chunk:
            try:
                data = self.source.read(index)
                image = self.source.image(index, side=max(self.preprocess.store), data=data)
            except UnreadableImage as problem:
                faults.append((index, problem.reason))
                continue
            if self.rows is not None:
                self.rows[index] = self.preprocess.fit_image(image)
            if self.alike[index]:
                whole = data if isinstance(data, bytes) else data.tobytes()
                digests[index] = hashlib.sha256(whole).digest()
            if (printed := fingerprint(image)) is not None:
                prints[index] = printed
        return chunk, faults, digests, prints


def _nothing_readable(source: Source) -> DataError:
    return DataError(
        f"none of the {len(source):,} pictures of {source.name} can be read",
        "A picture is a whole JPEG, PNG, WebP, BMP, GIF or TIFF file",
        "Open one of them in an image viewer to see what is wrong",
    )


def plan_memory(
    count: int, preprocess: Preprocess, memory_fraction: float = 0.4
) -> tuple[bool, str]:
    """Whether `count` decoded pictures fit into that part of the free memory, and a line on it."""
    fits = _bytes(count, preprocess) <= memory_fraction * free_memory()
    return fits, _message(count, preprocess, fits)


def _bytes(count: int, preprocess: Preprocess) -> int:
    return 3 * count * math.prod(preprocess.store)


def _message(count: int, preprocess: Preprocess, fits: bool) -> str:
    size = _megabytes(_bytes(count, preprocess))
    if fits:
        return f"{size} for {count:,} pictures held in memory"
    free = _megabytes(free_memory())
    return f"{size} for {count:,} pictures does not fit ({free} free): decoded again in each epoch"


def _megabytes(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"
