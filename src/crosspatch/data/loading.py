# SPDX-License-Identifier: Apache-2.0
"""Batches whose order depends on (n, seed, epoch) alone, and on the labels where it balances them.

`batch_size` counts the pictures of all processes together; process `rank` of `world` takes every
`world`-th position of each batch, so any number of processes sees the same batches. Starting in the
middle of an epoch costs nothing. Loader workers are only used where pictures have to be decoded.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from crosspatch.data.decode import UnreadableImage
from crosspatch.data.prepare import ImageSet
from crosspatch.errors import UsageError

_STREAM = 0x6F726465  # keeps these draws apart from all others of the same seed
_BALANCED = 0x62616C61


class Batch(NamedTuple):
    """One process's share of a batch.

    `images`: uint8 (B, H', W', 3); `labels`: int64 (B,) or float32 (B, K), as the set has them;
    `positions` (in the epoch's order), `index` (in the set), `items` (in the source): int64 (B,);
    `n_global`: pictures in the whole batch, over all processes.
    """

    images: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor
    index: torch.Tensor
    n_global: int
    items: torch.Tensor | None = None


def epoch_order(n: int, epoch: int, seed: int) -> torch.Tensor:
    """A permutation (n,) int64, a pure function of its arguments."""
    return torch.from_numpy(np.random.default_rng([_STREAM, seed, epoch]).permutation(n))


def repeated(order: torch.Tensor, repeats: int) -> torch.Tensor:
    """Repeated augmentation: an order (n,) in which each entry comes `repeats` times in a row, cut
    to n: an epoch sees about a `repeats`-th of the pictures, and as many as ever in all.

    Each copy has a position of its own, and so draws of its own; with that many processes or more
    the copies of a picture fall to different ones. Hoffer et al., arXiv 1901.09335, as DeiT does
    it, arXiv 2012.12877, section 6.
    """
    return order[: -(-len(order) // repeats)].repeat_interleave(repeats)[: len(order)]


def balanced_order(labels: torch.Tensor, epoch: int, seed: int) -> torch.Tensor:
    """N positions (N,) int64 in which each of the K classes that are there has N / K places.

    labels: (N,). Places that cannot be shared out evenly are lost by classes drawn anew in each
    epoch, one each. A class goes through its pictures in shuffled rounds that run on from epoch to
    epoch, so none comes twice before all others came once. A pure function of its arguments.
    """
    kinds, place = np.unique(labels.numpy(), return_inverse=True)
    rng = np.random.default_rng([_BALANCED, seed, epoch])
    each = -(-len(place) // max(1, len(kinds)))
    short = set(rng.permutation(len(kinds))[: each * len(kinds) - len(place)].tolist())
    chosen = [place[:0]]
    for number, kind in enumerate(kinds.tolist()):
        members = np.flatnonzero(place == number)
        chosen.append(members[_rounds(len(members), epoch * each, each, seed, kind)])
        if number in short:
            chosen[-1] = chosen[-1][:-1]
    return torch.from_numpy(rng.permutation(np.concatenate(chosen)))


def _rounds(n: int, start: int, count: int, seed: int, kind: int) -> np.ndarray:
    """Numbers `start` to `start + count` of an endless row of permutations of n."""
    first, last = start // n, (start + count - 1) // n
    rounds = [
        np.random.default_rng([_BALANCED, seed, kind, number, 1]).permutation(n)
        for number in range(first, last + 1)
    ]
    return np.concatenate(rounds)[start - first * n :][:count]


def steps_per_epoch(n: int, batch_size: int, world: int = 1) -> int:
    """Training batches in one epoch: whole ones only, but at least one. Raises UsageError."""
    if min(batch_size, n) < world:
        raise UsageError(
            f"got batch size {batch_size} for {world} processes and {n} pictures",
            "Each process needs at least one picture of every batch",
            f"Use --batch {world} or more" if n >= world else f"Use --devices {max(1, n)} or fewer",
        )
    return max(1, n // batch_size)


def train_batches(
    images: ImageSet,
    batch_size: int,
    *,
    epoch: int,
    seed: int,
    start_batch: int = 0,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    repeats: int = 1,
    balanced: bool = False,
) -> Iterator[Batch]:
    """The shuffled batches of one epoch from number `start_batch` on; `balanced`: in an order that
    has all classes equally often (`balanced_order`).

    `repeats`: how often in a row a picture comes (`repeated`). A tail that fills no batch is left
    out of the epoch (each epoch leaves out others); a set smaller than one batch is one batch.
    Raises UsageError as `steps_per_epoch` does.
    """
    steps = steps_per_epoch(len(images), batch_size, world)
    if balanced:
        order = balanced_order(images.labels, epoch, seed)
    else:
        order = epoch_order(len(images), epoch, seed)
    order = repeated(order, repeats)
    spans = [(at * batch_size, (at + 1) * batch_size) for at in range(start_batch, steps)]
    return _load(_Batches(images, order, spans, rank, world), workers)


def eval_batches(
    images: ImageSet, batch_size: int, *, rank: int = 0, world: int = 1, workers: int = 0
) -> Iterator[Batch]:
    """Every picture once, in order; a process that has no part in the last batch gets none."""
    spans = [(at, at + batch_size) for at in range(0, len(images), batch_size)]
    spans = [(start, end) for start, end in spans if start + rank < min(end, len(images))]
    return _load(_Batches(images, torch.arange(len(images)), spans, rank, world), workers)


class _Batches(Dataset):
    """Item number i is the i-th batch; the order is fixed, so any worker can make any batch."""

    def __init__(
        self,
        images: ImageSet,
        order: torch.Tensor,
        spans: list[tuple[int, int]],
        rank: int,
        world: int,
    ) -> None:
        self.images, self.order, self.spans = images, order, spans
        self.rank, self.world = rank, world

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, number: int) -> Batch:
        start, end = self.spans[number]
        end = min(end, len(self.order))
        positions = torch.arange(start + self.rank, end, self.world)
        index = self.order[positions]
        labels = self.images.labels[index]
        items = torch.from_numpy(self.images.items[index.numpy()])
        return Batch(self.images.images(index), labels, positions, index, end - start, items)


class _Carried(Dataset):
    """Carries an unreadable picture's error out of a worker whole: a loader would reduce it to
    text."""

    def __init__(self, batches: _Batches) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> Batch | UnreadableImage:
        try:
            return self.batches[number]
        except UnreadableImage as problem:
            return problem


def _load(batches: _Batches, workers: int) -> Iterator[Batch]:
    if workers == 0 or batches.images.cached:
        return (batches[number] for number in range(len(batches)))
    return _from_workers(batches, workers)


def _from_workers(batches: _Batches, workers: int) -> Iterator[Batch]:
    loader = DataLoader(
        _Carried(batches),
        batch_size=None,
        num_workers=workers,
        generator=torch.Generator(),  # else the loader would draw from the global one
    )
    for batch in loader:
        if isinstance(batch, UnreadableImage):
            raise batch
        yield batch
