# SPDX-License-Identifier: Apache-2.0
"""MixPro: MaskMix, which mixes whole patches, and progressive attention labelling.

"MixPro: Data Augmentation with MaskMix and Progressive Attention Labeling for Vision Transformer",
Zhao et al., arXiv 2304.12043, ICLR 2023.

    x~_b = m_b x_b + (1 - m_b) x_p(b);   m_b: k = ceil(n r) of the n square cells of M pixels are
                                         1, drawn for each image; r ~ Beta(alpha, alpha) for all
    s     = sum m a / sum a              a: what the class token attends to in the last block
    alpha = cos(area label, softmax(z))  the area label: smoothed, mixed by r'
    lam   = alpha s + (1 - alpha) r';    loss = lam CE(z, y_b) + (1 - lam) CE(z, y_p(b))

M is a multiple of the patch, so a patch comes from one image. The labels of the loss are hard; its
gradient goes through alpha, as in the authors' loop, and not through a. Class weights count with
each label's own weight in the loss, and not in the area label of alpha.

Departures: pictures may be no squares (n = ceil(H/M) ceil(W/M)); r' is the area that an image keeps
of the cropped mask, where the authors have k/n, which differs only where M does not divide the
picture. Their released configurations leave the attention out: that is `MaskMix` alone. Beside
other mixings the paper has this one for every second batch (`training/mix.py`).
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from crosspatch.mixing import AREA, PROGRESSIVE, Mixing, partners, positive

CELLS = 4  # a side, about: the paper has 224 / 56


def draw_cells(
    count: int, grid: tuple[int, int], alpha: float, rng: np.random.Generator
) -> np.ndarray:
    """(count, rows, columns) bool: ceil(n r) of the n cells of a grid (rows, columns), for each of
    `count` images others; r ~ Beta(alpha, alpha) is drawn first, once."""
    n = grid[0] * grid[1]
    kept = math.ceil(n * float(rng.beta(alpha, alpha)))
    cells = np.zeros((count, n), dtype=bool)
    for mine in cells:
        mine[rng.permutation(n)[:kept]] = True
    return cells.reshape(count, *grid)


def mask_of(cells: Tensor, cell: int, size: tuple[int, int]) -> Tensor:
    """cells (B, rows, columns) of `cell` pixels a side -> mask (B, 1, *size) float32, cropped."""
    mask = cells.repeat_interleave(cell, dim=1).repeat_interleave(cell, dim=2)
    return mask[:, None, : size[0], : size[1]].float()


def blend(images: Tensor, partner: Tensor, mask: Tensor, rule: str = AREA) -> tuple[Tensor, Mixing]:
    """images (B, 3, H, W) where the mask (B, 1, H, W) is 1, their partners (B,) where it is 0."""
    mixed = torch.where(mask.bool(), images, images[partner])
    return mixed, Mixing(partner, mask.mean(dim=(1, 2, 3)), mask, rule)


class MaskMix:
    """Mixes cells of `cell` pixels a side, which should be a multiple of the model's patch.

    alpha: of the Beta distribution, > 0; progressive: the label follows the attention too. Raises
    ValueError for a cell of less than one pixel.
    """

    def __init__(self, alpha: float = 1.0, *, cell: int = 8, progressive: bool = False) -> None:
        if cell < 1:
            raise ValueError(f"cell = {cell}; expected at least one pixel")
        self.alpha, self.cell = positive(alpha), cell
        self.rule = PROGRESSIVE if progressive else AREA

    def __call__(self, images: Tensor, rng: np.random.Generator) -> tuple[Tensor, Mixing]:
        """images (B, 3, H, W) -> the mixed images and their `Mixing` with mask (B, 1, H, W)."""
        height, width = images.shape[2:]
        grid = (math.ceil(height / self.cell), math.ceil(width / self.cell))
        cells = draw_cells(len(images), grid, self.alpha, rng)
        partner = partners(len(images), rng, images.device)
        mask = mask_of(torch.from_numpy(cells).to(images.device), self.cell, (height, width))
        return blend(images, partner, mask, self.rule)


def cell_for(patch: int, size: tuple[int, int]) -> int:
    """The cell, in pixels, for a model of `patch` pixels a side on pictures of `size`: the multiple
    of the patch that divides them evenly, where there is one, with most nearly `CELLS` a side."""
    shorter = min(size)
    wanted = shorter / CELLS
    multiples = range(patch, max(patch, shorter // 2) + 1, patch)
    even = [m for m in multiples if not size[0] % m and not size[1] % m]
    return min(even or multiples, key=lambda m: abs(math.log(m / wanted)))


# ------------------------------------------------------------------ labels


def attention_share(attention: Tensor, kept: Tensor) -> Tensor:
    """(B,): the share of the attention (B, P) on the part of each patch that is kept, (B, P) in
    [0, 1]; the share of the area where nothing is attended to."""
    total = attention.sum(dim=1)
    share = (attention * kept).sum(dim=1) / total.clamp(min=torch.finfo(total.dtype).tiny)
    return torch.where(total > 0, share, kept.mean(dim=1))


def trust(soft: Tensor, logits: Tensor) -> Tensor:
    """alpha (B,) in [0, 1]: the cosine of the area label and the prediction, both (B, K)."""
    return F.cosine_similarity(soft.float(), logits.float().softmax(dim=-1), dim=-1)


def progressive(area: Tensor, share: Tensor, soft: Tensor, logits: Tensor) -> Tensor:
    """lam (B,) of the areas and the shares of attention, (B,) each; soft, logits: of `trust`."""
    return torch.lerp(area, share, trust(soft, logits))
