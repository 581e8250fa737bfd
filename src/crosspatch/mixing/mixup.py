# SPDX-License-Identifier: Apache-2.0
"""MixUp: "mixup: Beyond Empirical Risk Minimization", Zhang et al., arXiv 1710.09412, section 2.

    x~_b = lam_b x_b + (1 - lam_b) x_p(b),    lam_b ~ Beta(alpha, alpha)

Departure: lam is drawn per image (the paper's code and DeiT draw one per batch), and is folded to
lam >= 1/2 so that an image stays mostly itself; p is a random permutation, so that any batch size,
odd ones too, can be mixed. The distribution of the pairs is the same, as (lam, a, b) and
(1 - lam, b, a) are one picture.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from crosspatch.mixing import Mixing, partners, positive


class Mixup:
    """Blends each image with a random partner. alpha: of the Beta distribution, > 0."""

    def __init__(self, alpha: float = 0.8) -> None:
        self.alpha = positive(alpha)

    def __call__(self, images: Tensor, rng: np.random.Generator) -> tuple[Tensor, Mixing]:
        """images (B, 3, H, W) -> the blended images and their `Mixing` (mask is None)."""
        count = len(images)
        lam = rng.beta(self.alpha, self.alpha, count)
        lam = torch.from_numpy(np.maximum(lam, 1 - lam).astype(np.float32)).to(images.device)
        partner = partners(count, rng, images.device)
        mixed = torch.lerp(images[partner], images, lam.to(images.dtype).view(-1, 1, 1, 1))
        return mixed, Mixing(partner, lam, None)
