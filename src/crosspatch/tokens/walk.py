# SPDX-License-Identifier: Apache-2.0
"""Through a network branch by branch and block by block, for who wants to look at its tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from crosspatch.layers.block import run_blocks
from crosspatch.layers.tokens import TokenState
from crosspatch.models.crossvit import CrossViT
from crosspatch.tokens.host import branch_names

Visit = Callable[[str, Any, TokenState, int, Any], TokenState]
"""(branch, its blocks, the state before them, the number of the first, reducer) -> the state after
them."""


class Step(NamedTuple):
    """One block: of which branch ("" where there is one), its number there, and the states before
    and after it."""

    branch: str
    block: int
    before: TokenState
    after: TokenState


def walk(model: Any, pictures: Tensor, visit: Visit) -> None:
    """Run `pictures` (B, C, H, W) through a ViT or a CrossViT, every list of blocks by `visit`."""
    state = model.embed(pictures)
    if not isinstance(model, CrossViT):
        first = 0
        for number, stage in enumerate(model.stages):
            if str(number) in model.reductions:
                state = model.reductions[str(number)](state)
            last = first + len(stage.blocks)
            state = visit("", model.blocks[first:last], state, first, model.reducer)
            first = last
        return
    states, first, names = state, [0] * len(state), branch_names(model)
    encoders: Any = model.blocks
    for encoder in encoders:
        for i, blocks in enumerate(encoder.blocks):
            states[i] = visit(names[i], blocks, states[i], first[i], model.reducers[i])
            first[i] += len(blocks)
        states = encoder.fuse(states)


@torch.no_grad()
def steps(model: Any, pictures: Tensor) -> list[Step]:
    """Every block of `model` (in the mode it is in) on `pictures`, branch after branch."""
    found: list[Step] = []

    def visit(branch: str, blocks: Any, state: TokenState, first: int, reducer: Any) -> TokenState:
        numbers = range(first, first + len(blocks))
        last, after = run_blocks(blocks, state, first=first, reducer=reducer, collect=numbers)
        for number in numbers:
            found.append(Step(branch, number, state, after[number]))
            state = after[number]
        return last

    walk(model, pictures, visit)
    order = branch_names(model) or ("",)
    return sorted(found, key=lambda step: (order.index(step.branch), step.block))
