"""MixToken's box: what is drawn, and what its share says."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crosspatch.mixing import draws
from crosspatch.mixing.mixtoken import draw

GRIDS = st.tuples(st.integers(1, 32), st.integers(1, 32))


@settings(max_examples=60, deadline=None)
@given(GRIDS, st.integers(0, 10_000))
def test_a_box_lies_on_the_grid_and_counts_the_patches_outside(grid, step):
    found = draw(grid, draws(0, step))
    assert 0 <= found.top <= found.bottom <= grid[0]
    assert 0 <= found.left <= found.right <= grid[1]
    area = (found.bottom - found.top) * (found.right - found.left)
    assert found.lam == pytest.approx(1 - area / (grid[0] * grid[1]))


@settings(max_examples=60, deadline=None)
@given(GRIDS, st.integers(0, 10_000))
def test_lambda_is_drawn_before_the_row_and_the_column(grid, step):
    rng = draws(0, step)
    share = math.sqrt(1 - rng.beta(1.0, 1.0))
    row, column = rng.integers(0, grid[0]), rng.integers(0, grid[1])
    found = draw(grid, draws(0, step))
    assert (found.top, found.bottom) == _side(grid[0], share, row)
    assert (found.left, found.right) == _side(grid[1], share, column)


def _side(length: int, share: float, centre: int) -> tuple[int, int]:
    half = math.floor(length * share) // 2
    return max(0, centre - half), min(length, centre + half)


def test_alpha_is_above_zero():
    with pytest.raises(ValueError, match="alpha must be > 0"):
        draw((14, 14), draws(0, 0), alpha=0.0)
