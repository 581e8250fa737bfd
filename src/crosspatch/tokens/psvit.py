# SPDX-License-Identifier: Apache-2.0
"""PSViT's two ideas on a network that is trained already, and the patterns that its search draws.

"PSViT: Better Vision Transformer via Token Pooling and Attention Sharing", Boyu Chen et al., arXiv
2108.03428, 2021; the network itself is `models/psvit.py`, where it is said how little of the paper
can be known.

    sharing block   x = x + proj(A V(LN x)), A of the closest earlier block that makes its own
    pooling         max over 3x3 patches at every second row and column, before a block

A sharing block loses its query and key weights: 2C^2 (and 2C biases) fewer, and 2NC^2 + N^2C fewer
multiply-adds. It needs a short fine-tuning: maps of neighbouring blocks are alike, not equal.
Departure: the paper's pooling widens the tokens by a convolution; widths of a trained network are
given, so that here only the max pooling is left, without parameters, and prefix tokens pass. After
it `source` names for every patch the token at its half row and half column. Sizes are not used.

A genome is a pattern as bits. The search over a weight-sharing supernet draws genomes uniformly and
mutates them; here are those two, as pure functions of a `random.Random`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from random import Random
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from crosspatch.layers.reducer import Reducer
from crosspatch.layers.tokens import TokenState
from crosspatch.models.psvit import LEAST_BETWEEN, MOST_IN_A_ROW, MOST_POOLINGS, check_pattern
from crosspatch.tokens.host import Host, check_blocks

Blocks = int | Sequence[int]


class PoolAndShare(Reducer):
    """Attention shared in the blocks `share` (None: in every second one, where it can be) and a
    pooling before each of the blocks `pool`.

    Raises ValueError, naming block and rule, for a pattern outside the compact set
    (`models.psvit.check_pattern`), for a map of another encoder, stage or number of heads, and for
    the pooling of a single patch.
    """

    def __init__(self, host: Host, *, share: Blocks | None = None, pool: Blocks = ()) -> None:
        super().__init__()
        self.pooling = check_blocks(_listed(pool), host, "pool")
        chosen = _every_second(host, self.pooling) if share is None else _listed(share)
        sharing = check_blocks(chosen, host, "share")
        already = [i for i, s in enumerate(host.specs) if s is not None and s.shares is not None]
        check_pattern(self.pooling, (*sharing, *already), host.depth)
        self.donors = {block: _donor(block, host, sharing) for block in sharing}
        self.grids = _grids(host, self.pooling)
        pooled = [sum(at < block for at in self.pooling) for block in range(host.depth + 1)]
        self.counts = tuple(host.n_prefix + _area(self.grids[done]) for done in pooled)

    def rebuild(self, blocks: list[Any]) -> None:
        for block, donor in self.donors.items():
            blocks[block].attn.keep_values()
            blocks[block].spec = replace(blocks[block].spec, qk=0, shares=donor)

    def active(self, block: int) -> bool:
        return block in self.pooling

    def before_attention(self, state: TokenState, block: int) -> TokenState:
        done, n = self.pooling.index(block), state.n_prefix
        if state.source is not None and not done:
            raise ValueError("a pooling needs every patch of the grid")
        grid = state.grid
        for _ in range(done):
            grid = _halved(grid)
        image = state.patches.transpose(1, 2).unflatten(2, grid)
        patches = F.max_pool2d(image, 3, 2, 1).flatten(2).transpose(1, 2)
        rows, columns = (torch.arange(side, device=patches.device) for side in state.grid)
        step, width = 2 ** (done + 1), _halved(grid)[1]
        source = (n + rows[:, None] // step * width + columns // step).flatten()
        return state._replace(
            tokens=torch.cat([state.tokens[:, :n], patches], dim=1),
            source=source.expand(patches.shape[0], -1),
        )


def _listed(blocks: Blocks) -> tuple[int, ...]:
    return (blocks,) if isinstance(blocks, int) else tuple(blocks)


def _halved(grid: tuple[int, int]) -> tuple[int, int]:
    return (grid[0] + 1) // 2, (grid[1] + 1) // 2


def _area(grid: tuple[int, int]) -> int:
    return grid[0] * grid[1]


def _grids(host: Host, pooling: Sequence[int]) -> list[tuple[int, int]]:
    grids = [host.grid]
    for block in pooling:
        if _area(grids[-1]) == 1:
            raise ValueError(f"block {block} has a pooling before it, and there is but one patch")
        grids.append(_halved(grids[-1]))
    return grids


def _every_second(host: Host, pooling: Sequence[int]) -> tuple[int, ...]:
    chosen: list[int] = []
    for block in range(host.depth):
        before = block - 1
        begins = block in host.starts or block in pooling
        if begins or before in chosen or not (host.attends(block) and host.attends(before)):
            continue
        if host.blocks[block].spec.heads == host.blocks[before].spec.heads:
            chosen.append(block)
    return tuple(chosen)


def _donor(block: int, host: Host, sharing: Sequence[int]) -> int:
    """The block whose map `block` gets."""
    for earlier in range(block - 1, -1, -1):
        if earlier + 1 in host.starts:
            break
        if earlier in sharing or not host.attends(earlier):
            continue
        heads = [host.blocks[b].spec.heads for b in (block, earlier)]
        if heads[0] != heads[1]:
            raise ValueError(
                f"block {block} would share the map of block {earlier}: it has {heads[0]} heads, "
                f"that one {heads[1]}; heads must be equal"
            )
        return earlier
    raise ValueError(
        f"block {block} shares its attention, and no block before it in its encoder or stage makes "
        "one; maps stay inside"
    )


# ------------------------------------------------------------------ genomes


class Genome(NamedTuple):
    """For every block, whether a pooling stands before it and whether it shares its attention."""

    pool: tuple[bool, ...]
    share: tuple[bool, ...]

    @property
    def options(self) -> dict[str, list[int]]:
        """The same as lists of blocks: arguments of `PSViT` and options of `xp.reduce`."""
        return {
            name: [block for block, bit in enumerate(bits) if bit]
            for name, bits in self._asdict().items()
        }


def valid(genome: Genome, pools: int | None = None) -> bool:
    """Whether a genome is in the compact set, with exactly `pools` poolings if given."""
    if pools is not None and sum(genome.pool) != pools:
        return False
    try:
        check_pattern(**genome.options, depth=len(genome.pool))
    except ValueError:
        return False
    return True


def sample(depth: int, random: Random, pools: int | None = None) -> Genome:
    """A genome of `depth` blocks, each of the compact set (with exactly `pools` poolings, if given)
    with the same probability. Raises ValueError where there is none."""
    place, genes = _Place(depth, 0, LEAST_BETWEEN - 1, MOST_IN_A_ROW), []
    if not _ways(place, pools):
        raise ValueError(f"no pattern of {depth} blocks has {pools} poolings")
    for _ in range(depth):
        choices = list(_choices(place))
        weights = [_ways(after, pools) for _, after in choices]
        (gene, place) = random.choices(choices, weights)[0]
        genes.append(gene)
    pool, share = zip(*genes, strict=True)
    return Genome(pool, share)


def mutate(genome: Genome, random: Random, rate: float = 0.1, pools: int | None = None) -> Genome:
    """A genome of the compact set with every gene flipped with probability `rate`, drawn anew until
    it is in the set (and has exactly `pools` poolings, if given); the given one after 1,000 draws
    that were not."""
    for _ in range(1000):
        found = Genome(*(tuple(b ^ (random.random() < rate) for b in bits) for bits in genome))
        if valid(found, pools):
            return found
    return genome


class _Place(NamedTuple):
    """What the rules need of the blocks so far: how many are left, poolings, blocks since the last
    one, and blocks that shared in a row. It begins so that block 0 can have neither."""

    left: int
    pools: int
    since: int
    row: int


def _choices(place: _Place) -> Iterator[tuple[tuple[bool, bool], _Place]]:
    """(pooling before it, sharing) that the next block may have, with the place after it."""
    since = min(place.since + 1, LEAST_BETWEEN)
    yield (False, False), _Place(place.left - 1, place.pools, since, 0)
    if place.row < MOST_IN_A_ROW:
        yield (False, True), _Place(place.left - 1, place.pools, since, place.row + 1)
    if place.pools < MOST_POOLINGS and place.since >= LEAST_BETWEEN:
        yield (True, False), _Place(place.left - 1, place.pools + 1, 1, 0)


@cache
def _ways(place: _Place, pools: int | None) -> int:
    """Number of genomes that go on from `place`."""
    if not place.left:
        return int(pools is None or place.pools == pools)
    return sum(_ways(after, pools) for _, after in _choices(place))
