# SPDX-License-Identifier: Apache-2.0
"""CutMix: "Regularization Strategy to Train Strong Classifiers with Localizable Features",
Yun et al., arXiv 1905.04899, section 3.1.

    x~_b = M_b x_b + (1 - M_b) x_p(b);   the hole of M_b has sides H sqrt(1 - lam), W sqrt(1 - lam)

lam ~ Beta(alpha, alpha), the centre is uniform, the box is clipped at the border and lam is
computed again from the clipped area (as in the authors' code). Departure: one box per image instead
of one per batch, and a random permutation as partners.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from crosspatch.mixing import Mixing, partners, positive


def boxes(
    height: int, width: int, lam: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Clipped boxes (top, bottom, left, right), each (B,) int64, bottom and right exclusive."""
    share = np.sqrt(1 - lam)
    tall, wide = (height * share).astype(np.int64), (width * share).astype(np.int64)
    row, column = rng.integers(0, height, len(lam)), rng.integers(0, width, len(lam))
    top, left = row - tall // 2, column - wide // 2
    return (
        np.clip(top, 0, height),
        np.clip(top + tall, 0, height),
        np.clip(left, 0, width),
        np.clip(left + wide, 0, width),
    )


class Cutmix:
    """Pastes a box of a random partner into each image. alpha: of the Beta distribution, > 0."""

    def __init__(self, alpha: float = 1.0) -> None:
        self.alpha = positive(alpha)

    def __call__(self, images: Tensor, rng: np.random.Generator) -> tuple[Tensor, Mixing]:
        """images (B, 3, H, W) -> the pasted images and their `Mixing` with mask (B, 1, H, W)."""
        (count, _, height, width), device = images.shape, images.device
        lam = rng.beta(self.alpha, self.alpha, count)
        sides = [torch.from_numpy(side).to(device) for side in boxes(height, width, lam, rng)]
        top, bottom, left, right = (side.view(-1, 1, 1, 1) for side in sides)
        rows = torch.arange(height, device=device).view(1, 1, -1, 1)
        columns = torch.arange(width, device=device).view(1, 1, 1, -1)
        hole = (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)
        partner = partners(count, rng, device)
        mask = (~hole).float()
        mixed = torch.where(hole, images[partner], images)
        return mixed, Mixing(partner, mask.mean(dim=(1, 2, 3)), mask)
