# SPDX-License-Identifier: Apache-2.0
"""The stem and the two kinds of stages of STViT-R: Swin blocks, and dumbbell units.

"Making Vision Transformers Efficient from A Token Sparsification View", arXiv 2303.08685; the stem
of two convolutions stands for Swin's patch projection and its norm. Maps are channels last.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import crosspatch._torchvision  # noqa: F401

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from crosspatch.layers.conv_norm import ConvNorm
from crosspatch.layers.first_weights import drawn
from crosspatch.layers.position import resize_table
from crosspatch.layers.windows import Size
from crosspatch.models.stvit_r_units import UNIT, Among, Generate, Recover, Refine, SemanticSpec


class ConvEmbed(nn.Module):
    """Two 3x3 convolutions with batch norm and Hardswish; (B, C, H, W) to (B, h, w, dim)."""

    def __init__(self, in_chans: int, dim: int, strides: Sequence[int]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        widths = pairwise((in_chans, dim // 2, dim))
        for (before, after), stride in zip(widths, strides, strict=True):
            layers += [ConvNorm(before, after, 3, stride), nn.Hardswish()]
        self.proj = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        # channels last: the map then lies as the blocks want it
        return self.proj(x.contiguous(memory_format=torch.channels_last)).permute(0, 2, 3, 1)


class SwinStage(nn.Module):
    """Blocks, every second one shifted; `downsample` is for whoever runs the next stage.

    swin: makes a block of (shift, drop_path=). merging: the `downsample`, None in the last stage.
    """

    def __init__(
        self,
        swin: Callable[..., nn.Module],
        shift: Size,
        rates: Sequence[float],
        merging: nn.Module | None,
    ) -> None:
        super().__init__()
        shifts = ((0, 0), shift)
        blocks = [swin(shifts[i % 2], drop_path=rate) for i, rate in enumerate(rates)]
        self.blocks = nn.ModuleList(blocks)
        self.downsample = merging

    def forward(self, x: Tensor, checkpointing: bool = False) -> Tensor:
        """x: (B, H, W, C). Returns the same shape."""
        run = _runner(checkpointing)
        for block in self.blocks:
            x = run(block, x)
        return x


class SemanticStage(nn.Module):
    """Dumbbell units; the global centres G are the same in all of them.

    swin: makes the first block of a unit, of (shift, drop_path=). rates: drop paths, one a block.
    """

    def __init__(
        self,
        swin: Callable[..., nn.Module],
        dim: int,
        heads: int,
        spec: SemanticSpec,
        rates: Sequence[float],
        merging: nn.Module | None,
        use_global: bool,
    ) -> None:
        super().__init__()
        self.spec = spec
        kinds = (
            partial(swin, (0, 0)),
            partial(Generate, dim, heads, spec),
            partial(Refine, dim, heads, spec),
            partial(Among, dim, heads, spec, local=True),
            partial(Among, dim, heads, spec, local=False),
            partial(Recover, dim, heads, spec),
        )
        self.blocks = nn.ModuleList(kinds[i % UNIT](drop_path=r) for i, r in enumerate(rates))
        self.downsample = merging
        self.semantic_token2 = drawn(1, math.prod(spec.grid), dim) if use_global else None

    def forward(self, x: Tensor, checkpointing: bool = False) -> Tensor:
        """x: (B, H, W, C). Returns the same shape."""
        run, centres = _runner(checkpointing), self._centres((x.shape[1], x.shape[2]))
        blocks: Any = self.blocks
        for first in range(0, len(blocks), UNIT):
            swin, generate, refine, local, over_all, recover = blocks[first : first + UNIT]
            x = run(swin, x)
            s = run(generate, x)
            s = run(refine, s if centres is None else s + centres, s, x)
            s = run(local, s)
            s = run(over_all, s)
            x = run(recover, x, s)
        return x

    def _centres(self, size: Size) -> Tensor | None:
        """The global centres (1, h, w, C) for a map of `size`, or None without any."""
        if self.semantic_token2 is None:
            return None
        grid = self.spec.grid_of(size)
        return resize_table(self.semantic_token2, self.spec.grid, grid, 0).unflatten(1, grid)


def _runner(checkpointing: bool) -> Callable[..., Any]:
    if not checkpointing:
        return lambda block, *x: block(*x)
    return partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)
