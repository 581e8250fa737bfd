# SPDX-License-Identifier: Apache-2.0
"""Near-duplicates: one picture saved again, resized, brightened, cropped a little or mirrored.

Each picture leaves a fingerprint while it is prepared: 16x16 grey values and 4x4 colours. Its hash
is the signs of 64 low frequencies of the cosine transform (as pHash: Zauner, "Implementation and
Benchmarking of Perceptual Image Hash Functions", 2010), without those that do not change along a
row or a column: a horizon, or light that falls off, tells no two pictures apart. A sign knows
nothing of brightness and contrast, and mirroring flips every second column.

Candidates come from sorting: the bits are put into another order `_TABLES` times, the hashes
sorted, each compared with the `_AHEAD` that follow (Charikar 2002, section 3; Manku et al. 2007);
of each picture the `_BEST` are looked at. That costs N log N however alike all the pictures are.
A crop moves what the hash sees, so each picture is looked up as cropped in the middle and at its
corners too. What decides is the fingerprint: one picture is fitted to the other by brightness,
contrast, and a small shift and stretch along both axes (Lucas and Kanade 1981: up to `_STEPS` steps
that are linear in the gradient). A small thing on a plain ground has little to be told by, so it
must fit better.
How much of the detail may remain unexplained, the data say: where all pictures look alike, as
written digits do, two are near only if they are nearer than chance brings any two of them. The
colours agree, or one picture is grey.

Pictures below 16 pixels, and those without detail, have no near-duplicates.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping

import numpy as np
from PIL import Image

SIDE = 16
"""Side of a fingerprint in pixels; smaller pictures have none."""

_TINTS = 4
_LENGTH = SIDE * SIDE + 2 * _TINTS * _TINTS
_TABLES, _AHEAD, _BEST = 24, 8, 16
_CROPPED = 8  # tables for each crop that is looked up
_CROPS = ((0.09, 0.5, 0.5), *((0.065, down, right) for down in (0, 1) for right in (0, 1)))
"""What is cut off of both sides, and which share of it above and on the left."""
_STEPS, _REACH = 4, 1.5  # of fitting; the largest shift and stretch, in pixels of a fingerprint
_FAR = 18  # bits that may differ between the hashes of candidates
_LIKE = 0.75  # cosine of their low frequencies, before they are fitted
_MOST = 0.1  # share of the detail that may remain unexplained, where chance allows it
_LEAST = 0.005  # the same in sets too small to tell: what JPEG and resizing leave
_SAMPLE, _ENOUGH = 4096, 100  # pairs that tell what chance does
_WIDE = 45  # pixels over which detail spreads: a small thing on a plain ground must fit better
_DETAIL = 2.0  # grey levels, root mean square: less is a plain picture
_TINT = 20.0  # mean difference of chroma, in levels
_PALE = 3.0  # chroma of a grey picture, which may be a copy of a coloured one
_CHUNK = 4096
_FEW, _SHARE = 32, 0.05  # a set may hold so many pictures, and this share of all

_MIDDLES = np.arange(SIDE, dtype=np.float32) + 0.5
_LOW = np.arange(1, 9)
_COSINES = (
    np.sqrt(2 / SIDE) * np.cos(np.pi * (np.arange(SIDE) + 0.5) * _LOW[:, None] / SIDE)
).astype(np.float32)  # (8, SIDE): rows of the orthonormal DCT-II
_TURNED = np.tile(np.where(_LOW % 2 == 1, -1, 1), 8).astype(np.float32)  # (64,): mirrored


def fingerprint(image: Image.Image) -> bytes | None:
    """The fingerprint of an RGB picture: 16x16 of luma, then 4x4 of each chroma (YCbCr), row by
    row. None for a picture that is smaller than SIDE pixels.

    The filter is a triangle, so smooth that a shift by less than a pixel is nearly a multiple of
    the gradient.
    """
    if min(image.size) < SIDE:
        return None
    small = image.resize((SIDE, SIDE), Image.Resampling.BILINEAR, reducing_gap=3.0)
    small = small.convert("YCbCr")
    tint = small.resize((_TINTS, _TINTS), Image.Resampling.BOX).tobytes()
    return small.tobytes()[::3] + tint[1::3] + tint[2::3]


def near_groups(prints: Mapping[int, bytes]) -> tuple[tuple[int, ...], ...]:
    """Sets of two and more items that show the same picture, each ascending; no item is in two.

    prints: item -> fingerprint. Pictures that are near the same third one are in one set. A chain
    that leads through more than `_FEW` pictures and `_SHARE` of all, as in a film, is cut into sets
    of that size: else it might leave nothing to test on.
    """
    items = np.array(sorted(prints), np.int64)
    whole = np.frombuffer(b"".join(prints[item] for item in items.tolist()), np.uint8)
    pairs = items[near_pairs(whole.reshape(-1, _LENGTH))]
    most = max(_FEW, int(_SHARE * len(items)))
    return tuple(sorted(tuple(sorted(one)) for one in _linked(pairs, most) if len(one) > 1))


def near_pairs(prints: np.ndarray) -> np.ndarray:
    """int64 (P, 2): the pairs of fingerprints, uint8 (N, 288), that show the same picture: the
    first number below the second, ascending."""
    low = frequencies(prints)
    detailed = np.flatnonzero(np.linalg.norm(low, axis=1) >= _DETAIL * SIDE)
    prints, low = prints[detailed], low[detailed]
    limit, asked = _limit(prints), _candidates(low, prints)
    one, other, _ = _parts(asked[_same(prints, asked, limit)], len(prints))
    return np.unique(np.stack([detailed[one], detailed[other]], 1), axis=0)


def _linked(pairs: np.ndarray, most: int) -> Iterator[list[int]]:
    """Sets of up to `most` items that the pairs (P, 2) link, each of neighbours of the others."""
    beside: dict[int, list[int]] = {}
    for one, other in pairs.tolist():
        beside.setdefault(one, []).append(other)
        beside.setdefault(other, []).append(one)
    placed: set[int] = set()
    for start in beside:
        waiting = deque([] if start in placed else [start])
        placed.update(waiting)
        reached = []
        while waiting:
            reached.append(waiting.popleft())
            free = [at for at in beside[reached[-1]] if at not in placed]
            placed.update(free)
            waiting.extend(free)
        yield from (reached[at : at + most] for at in range(0, len(reached), most))


def _keys(one: np.ndarray, other: np.ndarray, mirrored: np.ndarray, count: int) -> np.ndarray:
    """int64 (C,): each pair of two of `count` pictures, and whether one is mirrored, as a number;
    those of a picture with itself are left out."""
    first, second = np.minimum(one, other), np.maximum(one, other)
    return (2 * (first * count + second) + mirrored)[first != second]


def _parts(keys: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The inverse of `_keys`: one < other, int64 (C,), and mirrored, bool (C,)."""
    return keys // 2 // max(1, count), keys // 2 % max(1, count), keys % 2 == 1


def frequencies(prints: np.ndarray, crop: tuple[float, float, float] = (0, 0, 0)) -> np.ndarray:
    """float32 (N, 64): the low frequencies of each picture's detail, the vertical ones first, as
    they are after such a crop."""
    share, *above = crop
    down, right = (
        _COSINES @ _sampled(part * share * SIDE + (1 - share) * _MIDDLES - 0.5) for part in above
    )
    low = np.empty((len(prints), 64), np.float32)
    for at in range(0, len(prints), _CHUNK):
        grey = _grey(prints[at : at + _CHUNK])
        low[at : at + _CHUNK] = (down @ grey @ right.T).reshape(-1, 64)
    return low


def _candidates(low: np.ndarray, prints: np.ndarray) -> np.ndarray:
    """int64 (C,), ascending: the pairs (`_keys`) of prints (N, 288) that may be near by their
    frequencies (N, 64), as they are or with one of them cropped."""
    count, draw = len(low), np.random.default_rng(0)
    whole = np.concatenate([low, low * _TURNED])
    one, other = _collisions(whole > 0, _TABLES, draw)
    apart = one % count != other % count
    one, other = one[apart], other[apart]
    keys = _keys(one % count, other % count, (one >= count) ^ (other >= count), count)
    found = [(keys, _cosine(whole, one, whole, other))]
    for crop in _CROPS:
        asked = frequencies(prints, crop)
        one, other = _collisions(np.concatenate([whole, asked]) > 0, _CROPPED, draw)
        mixed = (one < 2 * count) & (other >= 2 * count) & ((one - other) % max(1, count) != 0)
        one, other = one[mixed], other[mixed] - 2 * count
        keys = _keys(one % count, other, one >= count, count)
        found.append((keys, _cosine(whole, one, asked, other)))
    return _best(*(np.concatenate(part) for part in zip(*found, strict=True)), count)


def _collisions(bits: np.ndarray, tables: int, draw: np.random.Generator) -> np.ndarray:
    """int64 (2, C): the rows of bits (M, 64) that come close to each other where sorted, each pair
    once, and differ in few bits."""
    whole, found = _packed(bits), np.empty(0, np.int64)
    rough = np.hypot(*np.meshgrid(_LOW, _LOW)).ravel()  # low ones change least: they go first
    for _ in range(tables):
        order = np.argsort(_reordered(whole, np.argsort(draw.exponential(size=64) * rough)))
        ranked, parts = whole[order], [found]
        for ahead in range(1, _AHEAD + 1):
            close = np.bitwise_count(ranked[:-ahead] ^ ranked[ahead:]) <= _FAR
            one, other = order[:-ahead][close], order[ahead:][close]
            parts.append(np.minimum(one, other) * len(bits) + np.maximum(one, other))
        found = np.sort(np.concatenate(parts))
        found = found[np.diff(found, prepend=-1) > 0]
    return np.stack(np.divmod(found, max(1, len(bits))))


def _reordered(hashes: np.ndarray, order: np.ndarray) -> np.ndarray:
    """uint64 (M,): hashes with their bits in another order (64,), by a table for each byte."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1)
    found = np.zeros(len(hashes), np.uint64)
    for place in range(8):
        here = np.zeros((256, 64), bool)
        mine = order // 8 == place
        here[:, mine] = bits[:, order[mine] % 8]
        found |= _packed(here)[(hashes >> np.uint64(56 - 8 * place)).astype(np.uint8)]
    return found


def _cosine(low: np.ndarray, one: np.ndarray, other_low: np.ndarray, other: np.ndarray):
    """float32 (C,): the cosines of rows `one` of a table (., 64) and rows `other` of another."""
    unit, others = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (low, other_low))
    alike = np.empty(len(one), np.float32)
    for at in range(0, len(one), _CHUNK):
        part = slice(at, at + _CHUNK)
        alike[part] = (unit[one[part]] * others[other[part]]).sum(1)
    return alike


def _best(keys: np.ndarray, alike: np.ndarray, count: int) -> np.ndarray:
    """Of pairs (C,) those that are alike, each once, and of each picture the `_BEST` of them."""
    order = np.lexsort((-alike, keys))
    order = order[(np.diff(keys[order], prepend=-1) > 0) & (alike[order] >= _LIKE)]
    keys, alike = keys[order], alike[order]
    kept = np.zeros(len(keys), bool)
    for own in _parts(keys, count)[:2]:
        order = np.lexsort((-alike, own))
        starts = np.flatnonzero(np.diff(own[order], prepend=-1))
        rank = np.arange(len(own)) - np.repeat(starts, np.diff(starts, append=len(own)))
        kept[order[rank < _BEST]] = True
    return keys[kept]


def _limit(prints: np.ndarray) -> float:
    """The share of the detail that may remain unexplained between prints (N, 288) of one picture.

    Of random pairs, the share that is nearer than t falls as t**k for small t (the correlation
    integral: Grassberger and Procaccia 1983). k is read from the nearest fifth and twentieth of a
    sample, and t chosen such that chance makes one pair in the whole set.
    """
    count = len(prints)
    if count * (count - 1) // 2 < _ENOUGH:
        return _LEAST
    one, step = np.random.default_rng(1).integers((0, 1), (count, count), (_SAMPLE, 2)).T
    first, second = (_grey(prints[at]) for at in (one, (one + step) % count))
    left = np.minimum(_left(first, second), _left(second, first))
    left = left[left > _MOST]  # copies are not chance
    if len(left) < _ENOUGH:
        return _LEAST
    near, far = np.quantile(left, [0.05, 0.2])
    power = np.log(0.2 / 0.05) / np.log(far / near)
    return float(min(_MOST, near * (1 / (0.05 * count**2)) ** (1 / power)))


def _same(prints: np.ndarray, keys: np.ndarray, limit: float) -> np.ndarray:
    """bool (C,): whether the pairs (`_keys`) of fingerprints show the same picture."""
    same = np.zeros(len(keys), bool)
    for at in range(0, len(keys), _CHUNK):
        one, other, mirrored = _parts(keys[at : at + _CHUNK], len(prints))
        first, second = _grey(prints[one]), _grey(prints[other])
        first[mirrored] = first[mirrored, :, ::-1]
        spread = np.minimum(_spread(first), _spread(second))
        bound = limit * np.minimum(1, spread / _WIDE)
        left = _left(first, second)
        maybe = np.flatnonzero((left > bound) & (left < 10 * bound))
        for steps in (1, _STEPS):
            for here, there in ((second, first), (first, second)):
                again = _left(here[maybe], there[maybe], steps)
                left[maybe] = np.minimum(left[maybe], again)
                maybe = maybe[left[maybe] > bound[maybe]]
        same[at : at + _CHUNK] = (left <= bound) & _same_tint(prints[one], prints[other], mirrored)
    return same


def _left(one: np.ndarray, other: np.ndarray, steps: int = 1) -> np.ndarray:
    """float (C,): the share of the detail of `other` (C, S, S) that `one` does not explain, after
    so many steps of fitting it."""
    along = np.linspace(-1, 1, SIDE, dtype=np.float32)
    target = _detail(other).reshape(len(other), SIDE * SIDE, 1)
    ridge = 1e-4 * SIDE * SIDE * np.eye(5, dtype=np.float32)  # for a shape that is all zero
    moved, whole = np.zeros((len(one), 4), np.float32), one
    least = np.full(len(one), np.inf, np.float32)
    for step in range(steps):
        down, right = np.gradient(one, axis=(1, 2))
        shapes = np.stack([one, down, right, down * along[:, None], right * along], 1)
        basis = _detail(shapes).reshape(len(one), 5, SIDE * SIDE)
        weights = np.linalg.solve(basis @ basis.transpose(0, 2, 1) + ridge, basis @ target)
        rest = target - basis.transpose(0, 2, 1) @ weights
        least = np.minimum(least, (rest**2).sum((1, 2)) / (target**2).sum((1, 2)))
        if step + 1 < steps:
            contrast = np.maximum(weights[:, :1, 0], 0.25)
            moved = np.clip(moved + weights[:, 1:, 0] / contrast, -_REACH, _REACH)
            at = np.arange(SIDE) + moved[:, :2, None] + moved[:, 2:, None] * along
            one = _sampled(at[:, 0]) @ whole @ _sampled(at[:, 1]).transpose(0, 2, 1)
    return least


def _sampled(at: np.ndarray) -> np.ndarray:
    """float32 (..., S, S): what takes S values to those at places (..., S) between them, by cubic
    convolution (Keys 1981, equation 4, a = -1/2); outside, the last one counts."""
    inside = np.clip(at, 0, SIDE - 1).astype(np.float32)
    away = np.abs(inside[..., None] - np.arange(SIDE, dtype=np.float32))
    near = (1.5 * away - 2.5) * away * away + 1
    far = ((-0.5 * away + 2.5) * away - 4) * away + 2
    weights = np.where(away < 1, near, np.where(away < 2, far, np.float32(0)))
    return weights / weights.sum(-1, keepdims=True)


def _spread(grey: np.ndarray) -> np.ndarray:
    """float (C,): over how many pixels of (C, S, S) the detail spreads (participation ratio)."""
    energy = _detail(grey) ** 2
    return energy.sum((1, 2)) ** 2 / np.maximum((energy**2).sum((1, 2)), 1e-9)


def _same_tint(one: np.ndarray, other: np.ndarray, mirrored: np.ndarray) -> np.ndarray:
    """bool (C,): whether the colours of fingerprints (C, 288) agree, or one picture is grey."""
    first, second = (
        part[:, SIDE * SIDE :].reshape(-1, 2, _TINTS, _TINTS).astype(np.float32) - 128
        for part in (one, other)
    )
    first[mirrored] = first[mirrored, ..., ::-1]
    paler = np.minimum(*(np.abs(part).mean((1, 2, 3)) for part in (first, second)))
    return (paler <= _PALE) | (np.abs(first - second).mean((1, 2, 3)) <= _TINT)


def _grey(prints: np.ndarray) -> np.ndarray:
    """float32 (N, S, S): the luma of fingerprints (N, 288)."""
    return prints[:, : SIDE * SIDE].reshape(-1, SIDE, SIDE).astype(np.float32)


def _detail(grey: np.ndarray) -> np.ndarray:
    """(..., S, S) less the mean of each row and of each column."""
    middle = np.full(SIDE, 1 / SIDE, np.float32)
    grey = grey - (grey @ middle)[..., None]
    grey -= (middle @ grey)[..., None, :]
    return grey


def _packed(bits: np.ndarray) -> np.ndarray:
    """bool (N, 64) as uint64 (N,), the first bit the highest."""
    packed = np.ascontiguousarray(np.packbits(bits, axis=1))
    return packed.view(">u8").ravel().astype(np.uint64)
