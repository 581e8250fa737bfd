# SPDX-License-Identifier: Apache-2.0
"""Stages of blocks with a width of their own, the reduction between two of them, and what
lists with an entry a stage have alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from crosspatch.layers.block import BlockOptions, BlockSpec, make_blocks
from crosspatch.layers.linear import Linear
from crosspatch.layers.tokens import TokenState


class StageReduction(nn.Module):
    """Between stages: patches by a strided convolution over their grid, prefix tokens by a Linear.

    Needs the full grid: raises ValueError for a state with a subset of the patches.
    """

    def __init__(self, dim_in: int, dim_out: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.patches = nn.Conv2d(dim_in, dim_out, 2 * stride - 1, stride, stride - 1)
        self.prefix = Linear(dim_in, dim_out)

    def forward(self, state: TokenState) -> TokenState:
        if state.source is not None:
            raise ValueError("a reduction between stages needs every patch of the grid")
        image = state.patches.transpose(1, 2).unflatten(2, state.grid)
        image = self.patches(image)
        prefix = self.prefix(state.tokens[:, : state.n_prefix])
        tokens = torch.cat([prefix, image.flatten(2).transpose(1, 2)], dim=1)
        return state._replace(tokens=tokens, grid=(image.shape[2], image.shape[3]))


@dataclass(frozen=True)
class StageSpec:
    """A run of blocks of one width. `stride` is that of the reduction BEFORE the stage.

    A stage whose width differs from the one before, or whose stride is above 1, begins with a
    `reduction`: (width before, width, stride) to a module that takes a state to a state.
    """

    width: int
    blocks: tuple[BlockSpec, ...]
    stride: int = 1
    reduction: Callable[[int, int, int], nn.Module] = StageReduction


def build_stages(
    stages: Sequence[StageSpec], options: BlockOptions, rate: float
) -> tuple[nn.Sequential, nn.ModuleDict]:
    """The blocks of all stages in one list, and by stage number the reductions before them.

    `rate` is the stochastic depth of the last block, linear from 0 at the first.
    """
    rates = drop_rates(rate, [len(stage.blocks) for stage in stages])
    blocks, reductions, width = [], nn.ModuleDict(), stages[0].width
    for number, stage in enumerate(stages):
        if stage.width != width or stage.stride > 1:
            reductions[str(number)] = stage.reduction(width, stage.width, stage.stride)
        width = stage.width
        blocks += make_blocks(width, stage.blocks, options, rates[number])
    _check_sharing(stages)
    return nn.Sequential(*blocks), reductions


def drop_rates(rate: float, depths: Sequence[int]) -> list[list[float]]:
    """The rates of drop path of stages of so many blocks, linear from 0 to `rate` at the last."""
    rates = torch.linspace(0, rate, sum(depths), device="cpu")
    return [part.tolist() for part in rates.split(list(depths))]


def one_a_stage(count: int, **lists: Sequence) -> None:
    """Raises ValueError where a list, told by its name, has not an entry for each of the stages."""
    for name, values in lists.items():
        if len(values) != count:
            raise ValueError(
                f"{name} has {len(values)} entries for {count} stages; expected one a stage"
            )


def each(count: int, **given: Any) -> list[list[Any]]:
    """Of every argument one value a stage: the list that was given, or its one value for all.
    Raises ValueError as `one_a_stage` does."""
    filled = {}
    for name, values in given.items():
        one = isinstance(values, str) or not isinstance(values, Sequence)
        filled[name] = [values] * count if one else list(values)
    one_a_stage(count, **filled)
    return list(filled.values())


def _check_sharing(stages: Sequence[StageSpec]) -> None:
    specs = [spec for stage in stages for spec in stage.blocks]
    starts: list[int] = []
    for stage in stages:
        starts += [len(starts)] * len(stage.blocks)
    for number, spec in enumerate(specs):
        if spec.shares is None:
            continue
        donor = specs[spec.shares] if starts[number] <= spec.shares < number else None
        if donor is None or not donor.exists or donor.heads != spec.heads:
            raise ValueError(
                f"block {number} shares the attention of block {spec.shares}; expected an earlier, "
                f"existing block with {spec.heads} heads in its own stage"
            )


def truncated(stages: Sequence[StageSpec], depth: int) -> tuple[StageSpec, ...]:
    """The stages cut to their first `depth` blocks."""
    kept = []
    for stage in stages:
        blocks = stage.blocks[: max(0, depth)]
        depth -= len(stage.blocks)
        if blocks:
            kept.append(replace(stage, blocks=blocks))
    return tuple(kept)
