# SPDX-License-Identifier: Apache-2.0
"""MixToken: CutMix on the token grid behind the stem, so that no patch is cut in two.

"All Tokens Matter: Token Labeling for Training Better Vision Transformers", Jiang et al., arXiv
2104.10858, NeurIPS 2021:

    t~_b = M t_b + (1 - M) t_(B-1-b);   y_cls = l y_cls,b + (1 - l) y_cls,(B-1-b),   l = mean of M

M is 0 in one box for the whole batch, with sides sqrt(1 - lambda) of the grid's, lambda ~ Beta(1,
1), a uniform centre, and clipped. The logits of the patches in the box belong to the partner and
are swapped back, so that the labels of patches stay as they are. Here only the box is drawn: the
tokens are inside of the model, which takes it (`LVViT.forward_dense`, `swap`).
"""

from __future__ import annotations

import numpy as np

from crosspatch.layers.box import Box, box
from crosspatch.mixing import positive


def draw(grid: tuple[int, int], rng: np.random.Generator, alpha: float = 1.0) -> Box:
    """The box of one batch over a grid (rows, columns) of patches; its `lam` is l.

    lambda is drawn first, then the row, then the column. alpha: of the Beta distribution, > 0
    (ValueError).
    """
    lam = float(rng.beta(positive(alpha), alpha))
    row, column = int(rng.integers(0, grid[0])), int(rng.integers(0, grid[1]))
    return box(*grid, lam, row, column)
