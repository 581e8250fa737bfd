# SPDX-License-Identifier: Apache-2.0
"""MixUp and CutMix as DeiT mixes: one draw for the whole batch, the batch reversed as partner.

"Training data-efficient image transformers & distillation through attention", Touvron et al., arXiv
2012.12877, section 6, as the authors' code does it:

    x~_b = lam x_b + (1 - lam) x_(B-1-b)                       MixUp, lam ~ Beta(.8, .8)
    x~_b = x_(B-1-b) inside the box, x_b outside               CutMix, lam ~ Beta(1, 1)

The box has sides int(H sqrt(1 - lam)) and int(W sqrt(1 - lam)), less one where that is odd; its
centre is uniform, the row drawn before the column; it is clipped at the border and lam is computed
again from what is left. Departures: an odd batch is mixed too, its middle image with itself; the
draws come from (seed, step, rank). `mixing/mixup.py` and `mixing/cutmix.py` draw for every image.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from crosspatch.layers.box import Box, box
from crosspatch.mixing import Mixing, positive


def blend(images: Tensor, lam: float) -> tuple[Tensor, Mixing]:
    """images (B, 3, H, W), each blended with its partner of the reversed batch, and the `Mixing`
    (mask is None)."""
    return torch.lerp(images.flip(0), images, lam), _mixing(images, lam, None)


def paste(images: Tensor, hole: Box) -> tuple[Tensor, Mixing]:
    """images (B, 3, H, W), each with the box of its partner of the reversed batch, and the `Mixing`
    with mask (B, 1, H, W)."""
    count, _, height, width = images.shape
    mask = images.new_ones(count, 1, height, width, dtype=torch.float32)
    mask[:, :, hole.top : hole.bottom, hole.left : hole.right] = 0
    mixed = torch.where(mask.bool(), images, images.flip(0))
    return mixed, _mixing(images, hole.lam, mask)


def _mixing(images: Tensor, lam: float, mask: Tensor | None) -> Mixing:
    partner = torch.arange(len(images) - 1, -1, -1, device=images.device)
    return Mixing(partner, images.new_full((len(images),), lam, dtype=torch.float32), mask)


class BatchMixup:
    """Blends the batch with its reverse. alpha: of the Beta distribution, > 0 (ValueError)."""

    def __init__(self, alpha: float = 0.8) -> None:
        self.alpha = positive(alpha)

    def __call__(self, images: Tensor, rng: np.random.Generator) -> tuple[Tensor, Mixing]:
        """images (B, 3, H, W) -> the blended images and their `Mixing` (mask is None)."""
        return blend(images, float(rng.beta(self.alpha, self.alpha)))


class BatchCutmix:
    """Pastes one box of the reversed batch. alpha: of the Beta distribution, > 0 (ValueError)."""

    def __init__(self, alpha: float = 1.0) -> None:
        self.alpha = positive(alpha)

    def __call__(self, images: Tensor, rng: np.random.Generator) -> tuple[Tensor, Mixing]:
        """images (B, 3, H, W) -> the pasted images and their `Mixing` with mask (B, 1, H, W)."""
        height, width = images.shape[2:]
        lam = float(rng.beta(self.alpha, self.alpha))
        row, column = int(rng.integers(0, height)), int(rng.integers(0, width))
        return paste(images, box(height, width, lam, row, column))
