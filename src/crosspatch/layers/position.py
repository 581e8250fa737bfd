# SPDX-License-Identifier: Apache-2.0
"""Learned position tables and their resizing to another grid."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def resize_table(
    table: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int], n_prefix: int
) -> Tensor:
    """A table (1, n_prefix + h*w, C) for `old_grid` (h, w), resized to `new_grid`.

    Bicubic without antialiasing and align_corners False, prefix rows kept, as DeiT does for another
    resolution. Raises ValueError where the table does not belong to `old_grid`.
    """
    expected = n_prefix + old_grid[0] * old_grid[1]
    if table.shape[1] != expected:
        raise ValueError(
            f"a position table of {table.shape[1]} rows, expected {expected} for "
            f"{n_prefix} prefix tokens and a grid of {old_grid[0]}x{old_grid[1]}"
        )
    if tuple(old_grid) == tuple(new_grid):
        return table
    prefix, patches = table[:, :n_prefix], table[:, n_prefix:]
    image = patches.unflatten(1, tuple(old_grid)).permute(0, 3, 1, 2).float()
    image = F.interpolate(image, size=tuple(new_grid), mode="bicubic", align_corners=False)
    patches = image.permute(0, 2, 3, 1).flatten(1, 2).to(table.dtype)
    return torch.cat([prefix, patches], dim=1)


def square_grid(count: int) -> tuple[int, int]:
    """The square grid of `count` patches. Raises ValueError where there is none."""
    side = round(count**0.5)
    if side * side != count:
        raise ValueError(f"{count} position rows are no square grid; say which grid they belong to")
    return side, side
