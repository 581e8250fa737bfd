# SPDX-License-Identifier: Apache-2.0
"""TransMix: CutMix whose label goes half by the area and half by what the model attends to.

"TransMix: Attend to Mix for Vision Transformers", Chen et al., arXiv 2111.09833, CVPR 2022, the
method that MixPro improves on.

    x~_b = x_(B-1-b) inside the box, x_b outside, the box of DeiT's CutMix (`mixing/deit.py`)
    lam  = (l_0 + l_1) / 2,   l_0: area of the box, l_1: share of the attention in it
    label = (1 - lam) y_b + lam y_(B-1-b),   of smoothed labels

The attention is that of the class token in the last block, mean over the heads; the mask is read
once per patch, at its upper left pixel. No gradient goes through it. The authors mix two batches of
ten by MixUp instead (`--mix mixup-batch,transmix` has every second).
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from crosspatch.mixing import HALFWAY, Mixing
from crosspatch.mixing.deit import BatchCutmix


class TransMix(BatchCutmix):
    """`BatchCutmix` with a label that follows the attention. alpha: of the Beta distribution, > 0
    (ValueError)."""

    def __call__(self, images: Tensor, rng: np.random.Generator) -> tuple[Tensor, Mixing]:
        mixed, mixing = super().__call__(images, rng)
        return mixed, mixing._replace(rule=HALFWAY)


def halfway(area: Tensor, share: Tensor) -> Tensor:
    """lam (B,) of the image's own label, between its area and its share of attention, (B,) each."""
    return (area + share) / 2
