# SPDX-License-Identifier: Apache-2.0
"""Learned position tables and their resizing to another grid."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Table(NamedTuple):
    """What a position table belongs to: a grid (h, w) and the prefix tokens that come first.

    margin, mode: how the table is resized, see `resize_table`.
    """

    grid: tuple[int, int]
    n_prefix: int
    margin: float = 0.0
    mode = "bicubic"


class BilinearTable(Table):
    """A table that is resized bilinearly."""

    mode = "bilinear"


def resize_tables(
    state: Mapping[str, Tensor],
    new: Mapping[str, Table],
    old: Mapping[str, Table] | None = None,
) -> dict[str, Tensor]:
    """`state` with the tables that `new` names resized to their grids.

    old: the grids that the state's tables were learnt on; without it a table of another number of
    rows belongs to a square grid, and ValueError is raised where there is none.
    """
    resized = dict(state)
    for name, kind in new.items():
        table, (grid, n_prefix, margin) = resized.get(name), kind
        if table is None:
            continue
        if old is not None and name in old:
            given = old[name].grid
        elif table.shape[1] == n_prefix + grid[0] * grid[1]:
            continue
        else:
            given = square_grid(table.shape[1] - n_prefix)
        resized[name] = resize_table(table, given, grid, n_prefix, margin, kind.mode)
    return resized


def resize_table(
    table: Tensor,
    old_grid: tuple[int, int],
    new_grid: tuple[int, int],
    n_prefix: int,
    margin: float = 0.0,
    mode: str = "bicubic",
) -> Tensor:
    """A table (1, n_prefix + h*w, C) for `old_grid` (h, w), resized to `new_grid`.

    Bicubic, or `mode` "bilinear", without antialiasing and align_corners False, prefix rows kept,
    as DeiT does for another resolution. With a `margin` the positions are sampled as if the new
    grid were (h + margin, w + margin): 0.1 is how DINO, and DeiT-LT after it, keep a rounded scale
    from losing a row. Raises ValueError where the table does not belong to `old_grid`.
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
    how: dict[str, Any] = {"size": tuple(new_grid)}
    if margin:
        scale = [(new + margin) / old for new, old in zip(new_grid, old_grid, strict=True)]
        how = {"scale_factor": scale, "recompute_scale_factor": False}
    image = F.interpolate(image, mode=mode, align_corners=False, **how)
    patches = image.permute(0, 2, 3, 1).flatten(1, 2).to(table.dtype)
    return torch.cat([prefix, patches], dim=1)


def square_grid(count: int) -> tuple[int, int]:
    """The square grid of `count` patches. Raises ValueError where there is none."""
    side = round(count**0.5)
    if side * side != count:
        raise ValueError(f"{count} position rows are no square grid; say which grid they belong to")
    return side, side
