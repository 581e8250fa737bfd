# SPDX-License-Identifier: Apache-2.0
"""Logits, and from the same pass what the class token attends to last.

In a ViT, DeiT or LV-ViT that is the class token's row of the last attention; in a CrossViT each
class token asks the patches of the next branch last, in the fusion. The row is taken beside the
fused kernel (`Attention.with_class_row`): one query, a mean over the heads, before the attention's
dropout, without a gradient. Class, distillation and register tokens are left out of it and it is
not normalised again. Where tokens were reduced, a token's part is shared evenly by the patches that
it stands for, and a dropped patch has 0.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from crosspatch.layers.block import Block
from crosspatch.layers.reducer import Reducer
from crosspatch.models.crossvit import CrossViT
from crosspatch.models.crossvit_fusion import CrossEncoder
from crosspatch.models.vit import VisionTransformer


class ClassRow(NamedTuple):
    """What a class token attends to: over the patches of a grid (rows, columns), (B, P) float32.
    extent: height and width in pixels of the part of the picture, from its upper left corner, that
    the grid divides."""

    attention: Tensor
    grid: tuple[int, int]
    extent: tuple[int, int]


def why_no_class_row(model: nn.Module) -> str | None:
    """Why `logits_and_class_rows` cannot be had of a model, or None where it can."""
    name = type(model).__name__
    if not isinstance(model, VisionTransformer | CrossViT):
        return f"a {name} has no class token that attends to all patches"
    if model.global_pool != "token":
        return "the model classifies the mean of its patches, not the class token"
    if isinstance(model, CrossViT):
        encoders: Any = model.blocks
        fused = isinstance(encoders[-1], CrossEncoder)
        return None if fused else "its branches do not meet by cross-attention"
    if any(stage.stride > 1 for stage in model.stages):
        return f"the stages of a {name} have grids of their own"
    last = _last(model)
    block: Any = model.blocks[last] if last >= 0 else None
    if block is None or block.spec.shares is not None:
        return "its last attention is that of an earlier block"
    own = model.reducer
    if own is not None and own.active(last) and type(own).instead is not Reducer.instead:
        return f"{type(own).__name__} replaces the last block"
    return None


def logits_and_class_rows(model: Any, images: Tensor) -> tuple[Tensor, tuple[ClassRow, ...]]:
    """images (B, C, H, W) -> (the model's logits (B, K), a row for each of its class tokens).

    Raises ValueError where `why_no_class_row` has a reason.
    """
    if reason := why_no_class_row(model):
        raise ValueError(f"no attention of a class token: {reason}")
    if isinstance(model, CrossViT):
        found: list[Tensor] = []
        states, _ = model.run(model.embed(images), attended=found)
        logits = model.classify(model.pool(states), states)
        # the class token of branch i asks the patches of branch i + 1
        grids = (*model.grids[1:], model.grids[0])
        size = (images.shape[2], images.shape[3])
        pairs = zip(found, grids, strict=True)
        return logits, tuple(ClassRow(row, grid, size) for row, grid in pairs)
    last = _last(model)
    attended: dict[int, Any] = {last: None}
    state, _ = model.run(model.embed(images), pooled=True, attended=attended)
    logits = model.classify(model.pool(state))
    if model.reducer is not None:
        logits = model.reducer.decide(state, logits)
    (rows, columns), (tall, wide) = state.grid, model.patch_size
    return logits, (ClassRow(attended[last], state.grid, (rows * tall, columns * wide)),)


def _last(model: VisionTransformer) -> int:
    """The number of the last block that attends; -1 where none does."""
    attends = [isinstance(b, Block) and b.attn is not None for b in model.blocks]
    return max((i for i, does in enumerate(attends) if does), default=-1)
