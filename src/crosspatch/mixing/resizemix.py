# SPDX-License-Identifier: Apache-2.0
"""ResizeMix: a whole image, made small, is pasted into another one; no object is cut off.

"ResizeMix: Mixing Data with Preserved Object Information and True Labels", Qin et al., arXiv
2012.11101. One draw for the whole batch:

    x~_b = resize(x_p(b), box) inside the box, x_b outside;   lam = 1 - area of the box
    box: sides int(tau H), int(tau W), less one where odd; a uniform centre; clipped at the border

tau ~ U(0.1, 0.8) is a ratio of SIDES. All of the partner goes into the clipped box, so it may be
distorted. Over these draws the box has 17.5 % of the image on average. `scale` says how tau is
drawn: "uniform"; "beta", tau ~ Beta(alpha, alpha), drawn uniformly where that lies outside of
[low, high] (an option of the public port); "kept", tau = sqrt(1 - l) with l = low + (high - low)
Beta(alpha, alpha), the area that is kept, as MMPretrain does it, with bilinear resizing.

Departures: no code of the authors is public, so the numbers are those of a port, whose axes we do
not swap where height and width differ; a box has at least one pixel, where the port fails for tiny
images. Draws: partners, tau, column, row.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from crosspatch.layers.box import Box, scaled_box
from crosspatch.mixing import Mixing, partners, positive

SCALES = ("uniform", "beta", "kept")
MODES = ("nearest", "bilinear")


def hole(height: int, width: int, tau: float, row: int, column: int) -> Box:
    """The box of a side ratio tau in [0, 1] with its centre at the drawn (row, column)."""
    return scaled_box(height, width, tau, row, column, least=1)


def paste(
    images: Tensor, partner: Tensor, where: Box, mode: str = "nearest"
) -> tuple[Tensor, Mixing]:
    """images (B, 3, H, W), each with the whole of image partner[b] (B,) resized into the box, and
    the `Mixing` with mask (B, 1, H, W). mode: one of `MODES`."""
    rows, columns = slice(where.top, where.bottom), slice(where.left, where.right)
    size = (where.bottom - where.top, where.right - where.left)
    mixed, mask = images.clone(), images.new_ones(images.shape[0], 1, *images.shape[2:]).float()
    mixed[:, :, rows, columns] = F.interpolate(images, size, mode=mode)[partner]
    mask[:, :, rows, columns] = 0
    lam = torch.full((len(images),), where.lam, dtype=torch.float32, device=images.device)
    return mixed, Mixing(partner, lam, mask)


class ResizeMix:
    """Pastes the resized partner, one box for the batch.

    alpha: of the Beta distribution, where `scale` draws from one; scale: one of `SCALES`; low,
    high: 0 < low < high < 1; mode: one of `MODES`. Raises ValueError for others.
    """

    def __init__(
        self,
        alpha: float = 1.0,
        *,
        scale: str = "uniform",
        low: float = 0.1,
        high: float = 0.8,
        mode: str = "nearest",
    ) -> None:
        if scale not in SCALES or mode not in MODES:
            raise ValueError(f"scale {scale!r}, mode {mode!r}; expected one of {SCALES}, {MODES}")
        if not 0 < low < high < 1:
            raise ValueError(f"tau from {low} to {high}; expected 0 < low < high < 1")
        self.alpha, self.scale, self.mode = positive(alpha), scale, mode
        self.low, self.high = low, high

    def tau(self, rng: np.random.Generator) -> float:
        """The ratio of the box's sides to the image's, before clipping."""
        if self.scale == "kept":
            kept = self.low + (self.high - self.low) * float(rng.beta(self.alpha, self.alpha))
            return math.sqrt(1 - kept)
        if self.scale == "beta":
            drawn = float(rng.beta(self.alpha, self.alpha))
            if self.low <= drawn <= self.high:
                return drawn
        return float(rng.uniform(self.low, self.high))

    def __call__(self, images: Tensor, rng: np.random.Generator) -> tuple[Tensor, Mixing]:
        """images (B, 3, H, W) -> the pasted images and their `Mixing` with mask (B, 1, H, W)."""
        height, width = images.shape[2:]
        partner = partners(len(images), rng, images.device)
        tau = self.tau(rng)
        column, row = int(rng.integers(0, width)), int(rng.integers(0, height))
        return paste(images, partner, hole(height, width, tau, row, column), self.mode)
