# SPDX-License-Identifier: Apache-2.0
"""Resizing to a fixed size as two constant matrix products.

Bicubic resizing between two fixed sizes is linear and separable, so R(x) = Rh x Rw^T. It equals
`torch.nn.functional.interpolate(mode="bicubic", align_corners=False)` and costs a fraction of it in
an exported graph, where a Resize node took half of the time of a CrossViT.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crosspatch.layers.precision import full_precision


def resize_matrix(n_in: int, n_out: int, mode: str = "bicubic") -> Tensor:
    """(n_out, n_in) float32: each row holds the four cubic weights of an output pixel, with the
    mode "bilinear" the two linear ones.

    It is what torch's own resize makes of the identity, so its rounding of coordinates is kept as
    well (weights worked out in float64 differ by up to 4e-5 on pixels).
    """
    identity = torch.eye(n_in)[None, None]
    return F.interpolate(identity, (n_out, n_in), mode=mode, align_corners=False)[0, 0]


class FixedResize(nn.Module):
    """Images (B, C, H, W) of any size to (B, C, *size), bicubic; nothing at all where sizes match.

    The matrices for inputs of `expected` size are constants of the module (not in the state dict);
    for others they are computed on the way.
    """

    rows: Tensor
    columns: Tensor

    def __init__(self, size: tuple[int, int], expected: tuple[int, int]) -> None:
        super().__init__()
        self.size = size
        self.expected = expected
        for name, n_in, n_out in zip(("rows", "columns"), expected, size, strict=True):
            self.register_buffer(name, resize_matrix(n_in, n_out), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if tuple(x.shape[-2:]) == self.size:
            return x
        with full_precision(x):
            return self._matrix(x, 0) @ x @ self._matrix(x, 1).transpose(0, 1)

    def _matrix(self, x: Tensor, axis: int) -> Tensor:
        if x.shape[axis + 2] == self.expected[axis]:
            return (self.rows, self.columns)[axis].to(x.dtype)
        return resize_matrix(x.shape[axis + 2], self.size[axis]).to(x)

    def extra_repr(self) -> str:
        return f"size={self.size}, expected={self.expected}"
