# SPDX-License-Identifier: Apache-2.0
"""One pass over all pictures for the audit: each is read once, by forked workers, and what its
header, its bytes and its pixels say is kept; the pixels are not."""

from __future__ import annotations

import hashlib
import os.path
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from crosspatch.data import spectrum
from crosspatch.data.decode import Header, UnreadableImage, read_header
from crosspatch.data.exif import NOTHING, Taken, taken
from crosspatch.data.near import fingerprint
from crosspatch.data.sources import Source
from crosspatch.data.workers import pool
from crosspatch.processor import cores

_CHUNK, _FEW = 32, 96
_SIDE = 256  # large JPEGs are halved while they are decoded, down to twice this
SAMPLE = 3000  # pictures whose spectrum is looked at, in full size
_PLAIN = 2  # grey levels between the darkest and the brightest, at most: nothing to see

ENDINGS = {
    "JPEG": "jpg jpeg jpe jfif mpo", "PNG": "png apng", "WebP": "webp", "BMP": "bmp dib",
    "GIF": "gif", "TIFF": "tif tiff",
}  # fmt: skip


@dataclass
class Look:
    """What one picture told. fault: why it cannot be read, or None; header: None where it has none;
    size: bytes of the file; plain: whether it has a single colour; digest: of bytes that may equal
    another's; printed: as of `near`; spectrum: as of `spectrum.look`, of a sample."""

    fault: str | None = None
    header: Header | None = None
    size: int = 0
    taken: Taken = NOTHING
    plain: bool = False
    digest: bytes | None = None
    printed: bytes | None = None
    spectrum: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width) upright, in pixels; (0, 0) where it is not known."""
        if self.header is None:
            return 0, 0
        sideways = self.header.orientation >= 5
        width, height = self.header.width, self.header.height
        return (width, height) if sideways else (height, width)


def look_at(
    source: Source,
    *,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Look]:
    """A look at every item, in order, with `workers` processes (None: one per core)."""
    total, done = len(source), 0
    chunks = [range(at, min(at + _CHUNK, total)) for at in range(0, total, _CHUNK)]
    count = 1 if total < _FEW and workers is None else workers or cores()
    looks: list[Look] = [Look()] * total
    with pool(count, _Job(source, source.alike(), *_sampled(source))) as look:
        for chunk, found in look(chunks):
            for index, one in zip(chunk, found, strict=True):
                looks[index] = one
            done += len(chunk)
            if progress is not None:
                progress(done, total)
    return looks


def lies(key: str, header: Header) -> bool:
    """Whether the end of a file's name says another format than its first bytes."""
    ending = os.path.splitext(key)[1].lower().removeprefix(".")
    return bool(ending) and ending not in ENDINGS[header.format].split()


def _sampled(source: Source) -> tuple[set[int], int | None]:
    """(the items whose spectrum is looked at, its tile)."""
    if source.multi or not len(source):
        return set(), None
    rng = np.random.default_rng(0)
    sides = []
    for index in rng.permutation(len(source))[:200].tolist():
        try:
            sides.append(min(source.image_size(index)))
        except UnreadableImage:
            continue
    tile = spectrum.tile_of(sides) if sides else None
    if tile is None:
        return set(), None
    most = min(spectrum.MOST, max(spectrum.FEW, SAMPLE // max(1, len(source.classes))))
    return set(spectrum.choose(source.labels, np.ones(len(source), bool), 0, most).tolist()), tile


@dataclass
class _Job:
    """What a worker inherits by forking."""

    source: Source
    alike: np.ndarray
    sampled: set[int]
    tile: int | None

    def __call__(self, chunk: range) -> tuple[range, Sequence[Look]]:
        return chunk, [self._look(index) for index in chunk]

    def _look(self, index: int) -> Look:
        look, key = Look(), self.source.items[index].key
        try:
            data = self.source.read(index)
            if isinstance(data, bytes):
                look.size = len(data)
                header = read_header(data, name=key)
                look.taken = taken(header.exif)
                look.header = header._replace(exif=None)
            else:
                look.header = Header("PNG", "RGB", *data.shape[1::-1], 1, False, False, None)
            whole = self.tile is not None and index in self.sampled
            image = self.source.image(index, side=None if whole else _SIDE, data=data)
        except UnreadableImage as problem:
            look.fault = problem.reason
            return look
        look.plain = all(high - low <= _PLAIN for low, high in _extremes(image))
        look.printed = fingerprint(image)
        if self.alike[index]:
            raw = data if isinstance(data, bytes) else data.tobytes()
            look.digest = hashlib.sha256(raw).digest()
        if whole and self.tile is not None and min(image.size) >= self.tile:
            seen = spectrum.look(np.asarray(image), self.tile)
            look.spectrum = (seen[0].astype(np.float32), seen[1].astype(np.float32))
        return look


def _extremes(image) -> Sequence[tuple[int, int]]:
    return image.getextrema()
