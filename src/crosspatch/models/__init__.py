# SPDX-License-Identifier: Apache-2.0
"""One backbone paper, one file. Importing this package registers every model."""

from crosspatch.models import (
    crossvit,
    deit,
    evo_levit,
    lvvit,
    psvit,
    resformer,
    resnet_cifar,
    stvit_r,
)

__all__ = [
    "crossvit",
    "deit",
    "evo_levit",
    "lvvit",
    "psvit",
    "resformer",
    "resnet_cifar",
    "stvit_r",
]
