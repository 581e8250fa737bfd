# SPDX-License-Identifier: Apache-2.0
"""The recursive gated convolution: products of features with their neighbourhoods, n times.

"HorNet: Efficient High-Order Spatial Interactions with Recursive Gated Convolutions", Rao et al.,
arXiv 2207.14284, section 3. It stands alone: wherever a map of C channels becomes another (window
attention, the 3x3 convolutions of a feature pyramid) it can stand instead.

    [p, a] = conv1x1(x)                                 C -> d_0 + (d_0 + ... + d_{n-1}) = 2 C
    [a_0, ..., a_{n-1}] = s f(a)                        d_k = C / 2^(n-1-k)
    h_0 = p * a_0;   h_{k+1} = conv1x1_k(h_k) * a_{k+1}        d_k -> d_{k+1}
    y = conv1x1(h_{n-1})

f is a depth-wise convolution, or the global-local filter: half of the channels see their 3x3
neighbours, the others are multiplied in the frequency domain, so that every pixel sees every other.
"""

from __future__ import annotations

from itertools import pairwise

import crosspatch._torchvision  # noqa: F401

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from crosspatch.layers.first_weights import drawn
from crosspatch.layers.patch_embed import pair
from crosspatch.layers.precision import full_precision
from crosspatch.layers.spectrum import Size, products, resize_filter, transforms

EPS = 1e-6  # of the channel norms
SCALE = 1 / 3  # of what the filter gives, in all released models
KEPT = 8  # interpolated filters that one layer remembers


class GnConv(nn.Module):
    """The recursive gated convolution of `order` n; (B, dim, H, W) to the same shape.

    kernel_size: of the depth-wise convolution, odd. filter_size: the map (h, w) for which a
    global-local filter is learnt instead; other maps interpolate it. scale: s. Under fp16 autocast
    it runs in fp32, as the products of many features leave the range of fp16. Raises ValueError
    where `dim` does not divide by 2^(n-1), or a global-local filter had an odd number of channels.
    """

    def __init__(
        self,
        dim: int,
        order: int = 5,
        *,
        kernel_size: int = 7,
        filter_size: int | Size | None = None,
        scale: float = SCALE,
    ) -> None:
        super().__init__()
        if order < 1 or dim % 2 ** (order - 1):
            raise ValueError(
                f"{dim} channels and order {order}; expected an order of 1 or more, and channels "
                f"that divide by 2^(order-1)"
            )
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size {kernel_size}; expected an odd one")
        self.order, self.scale = order, scale
        self.widths = [dim // 2 ** (order - 1 - k) for k in range(order)]
        total = sum(self.widths)
        self.proj_in = nn.Conv2d(dim, 2 * dim, 1)
        if filter_size is None:
            self.dwconv = nn.Conv2d(
                total, total, kernel_size, padding=kernel_size // 2, groups=total
            )
        else:
            self.dwconv = GlobalLocalFilter(total, filter_size)
        self.pws = nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in pairwise(self.widths))
        self.proj_out = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        if not _halved(x.device.type):
            return self._recursed(x)
        with full_precision(x):
            return self._recursed(x.float())

    def _recursed(self, x: Tensor) -> Tensor:
        gate, rest = self.proj_in(x).split([self.widths[0], sum(self.widths)], dim=1)
        first, *others = (self.dwconv(rest) * self.scale).split(self.widths, dim=1)
        x = gate * first
        for widen, part in zip(self.pws, others, strict=True):
            x = widen(x) * part
        return self.proj_out(x)


class GlobalLocalFilter(nn.Module):
    """Half of the channels through a 3x3 depth-wise convolution, the others through a filter in the
    frequency domain, norms around; (B, dim, H, W) to the same shape.

    x1, x2 = halves of LN(x);  y = LN(interleaved(dwconv x1, irfft2(w rfft2 x2)))

    size: the map (h, w) for which `complex_weight` (dim/2, h, w//2+1, 2) is learnt; for another one
    it is interpolated (bilinear, corners aligned, real and imaginary parts apart), which is done
    once per size as long as nothing is learnt. The filter wraps around borders and is computed in
    fp32. Where a graph is exported the transforms are products with matrices of sines and cosines,
    as ONNX holds no complex numbers. Raises ValueError for an odd dim.
    """

    def __init__(self, dim: int, size: int | Size) -> None:
        super().__init__()
        if dim % 2:
            raise ValueError(f"{dim} channels; a global-local filter halves an even number")
        height, width = pair(size)
        self.dw = nn.Conv2d(dim // 2, dim // 2, 3, padding=1, groups=dim // 2, bias=False)
        self.complex_weight = drawn(dim // 2, height, width // 2 + 1, 2)
        self.pre_norm = LayerNorm2d(dim, eps=EPS)
        self.post_norm = LayerNorm2d(dim, eps=EPS)
        self._kept: dict[tuple, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        near, far = self.pre_norm(x).chunk(2, dim=1)
        near = self.dw(near)
        height, width = far.shape[2:]
        with full_precision(x):
            weight = self.resized((height, width // 2 + 1))
            multiply = products if torch.compiler.is_exporting() else transforms
            far = multiply(far.float(), weight).to(near.dtype)
        return self.post_norm(torch.stack([near, far], dim=2).flatten(1, 2))

    def resized(self, size: Size) -> Tensor:
        """The filter (dim/2, *size, 2) in fp32. It is kept for the next call of that size where no
        gradient is asked for and nothing is traced."""
        weight = self.complex_weight
        if tuple(weight.shape[1:3]) == size:
            return weight.float()
        if not _settled(weight):
            return resize_filter(weight, size)
        key = (size, weight._version, weight.data_ptr(), weight.dtype, weight.device)
        found = self._kept.get(key)
        if found is None:
            with torch.inference_mode(False):
                found = resize_filter(weight.detach(), size)
            if len(self._kept) >= KEPT:
                self._kept = {}
            self._kept[key] = found
        return found

    def train(self, mode: bool = True) -> GlobalLocalFilter:
        """As in torch; what was kept of the filter is dropped."""
        self._kept = {}
        return super().train(mode)

    def _apply(self, fn, recurse: bool = True) -> GlobalLocalFilter:
        self._kept = {}
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *arguments, **named) -> None:
        self._kept = {}
        super()._load_from_state_dict(*arguments, **named)


def _settled(weight: Tensor) -> bool:
    """Whether what is made of `weight` may be kept: no gradient flows, nobody looks on."""
    return not (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or weight.is_inference()
        or type(weight) not in (Tensor, nn.Parameter)
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def _halved(device: str) -> bool:
    """Whether products there are taken in fp16."""
    return (
        torch.amp.is_autocast_available(device)
        and torch.is_autocast_enabled(device)
        and torch.get_autocast_dtype(device) is torch.float16
    )
