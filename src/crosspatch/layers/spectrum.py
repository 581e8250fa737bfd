# SPDX-License-Identifier: Apache-2.0
"""Maps multiplied in the frequency domain by a learned filter, as FFTs or without complex numbers.

A filter (C, H, W//2+1, 2) holds real and imaginary parts for maps (B, C, H, W); transforms are
orthonormal, and everything is in fp32.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

Size = tuple[int, int]


def resize_filter(weight: Tensor, size: Size) -> Tensor:
    """A filter (C, h, w, 2) interpolated to (C, *size, 2), in fp32: bilinear, corners aligned."""
    if tuple(weight.shape[1:3]) == tuple(size):
        return weight.float()
    images = weight.float().permute(3, 0, 1, 2)
    images = F.interpolate(images, size=size, mode="bilinear", align_corners=True)
    return images.permute(1, 2, 3, 0).contiguous()


def transforms(x: Tensor, weight: Tensor) -> Tensor:
    """irfft2(weight * rfft2(x)); x: (B, C, H, W), weight: (C, H, W//2+1, 2), both fp32."""
    found = torch.fft.rfft2(x, norm="ortho") * torch.view_as_complex(weight.contiguous())
    return torch.fft.irfft2(found, s=x.shape[2:], norm="ortho")


def products(x: Tensor, weight: Tensor) -> Tensor:
    """`transforms` without complex numbers: along W and H and back, each a matrix product."""
    (height, width), kept = x.shape[2:], weight.shape[2]
    cos, sin = (wave[:, :kept] for wave in waves(width, x))
    real, imaginary = x @ cos, -(x @ sin)
    cos_rows, sin_rows = waves(height, x)
    real, imaginary = (
        cos_rows @ real + sin_rows @ imaginary,
        cos_rows @ imaginary - sin_rows @ real,
    )
    a, b = weight.unbind(dim=-1)
    real, imaginary = a * real - b * imaginary, a * imaginary + b * real
    real, imaginary = (
        cos_rows @ real - sin_rows @ imaginary,
        cos_rows @ imaginary + sin_rows @ real,
    )
    # every frequency but the first, and that of half of an even width, stands for two
    single = [k == 0 or 2 * k == width for k in range(kept)]
    shares = torch.tensor([1.0 if alone else 2.0 for alone in single], device=x.device)
    return (real * shares) @ cos.t() - (imaginary * shares) @ sin.t()


def waves(count: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of 2 pi jk/n over the root of n, (n, n) in fp32: symmetric matrices."""
    step = torch.arange(count, device=like.device)
    angle = (step[:, None] * step % count) * (2 * math.pi / count)
    return angle.cos() / math.sqrt(count), angle.sin() / math.sqrt(count)
