# SPDX-License-Identifier: Apache-2.0
"""TiC: a transformer whose attention is a convolution's window, for pictures of any size.

"TiC: Exploring Vision Transformer in Convolution", arXiv 2310.04134, 2023.

The layer MSA-Conv (`tic_layer.py`) is the authors' and computes what their code computes. THE
NETWORK IS OURS: the authors released no more than the layer, and the paper's body was not at hand.

    stem   LN(conv 4x4 / 4);   four stages of blocks, conv 2x2 / 2 between them
    block  x = x + DropPath(P A(LN x));   x = x + DropPath(MLP(LN x))
    A      q k v of LN x by a Linear, over k x k taps, heads of 32 channels (MSA-Conv, steps 1 - 4)
    odd blocks of a stage, counted from 0:
      inter-pooling   k and v are of cells of 2x2 (means), a pixel has the window around its own
                      cell: k x k taps span 2k x 2k pixels
      cyclic shift    four groups of channels of k and v are rolled up, down, left and right by half
                      of the map; queries stay where they are
    logits = head(LN(mean over the map))

Even blocks see what is near, odd ones what is far, and no parameter knows a size. Sides that the
strides do not divide are continued with zeros; cells at an odd border repeat the last row or
column. What lies outside stays in the softmax with the logit 0.

Expected at 224 (M parameters; GMACs of products, and of taps, which counters of products do not
see: `attention_macs`): small 12.75, 1.82 + 0.09; base 28.26, 4.09 + 0.14.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import crosspatch._torchvision  # noqa: F401

import torch
from timm.layers import DropPath
from timm.models import generate_default_cfgs
from torch import Tensor, nn

from crosspatch.layers.first_weights import init_weights
from crosspatch.layers.linear import Linear, linear
from crosspatch.layers.maps import on_channels
from crosspatch.layers.mlp import Mlp
from crosspatch.layers.patch_embed import pair
from crosspatch.layers.stage import drop_rates, one_a_stage
from crosspatch.layers.windows import Size, counts, from_windows, pad_to, to_windows
from crosspatch.models.pyramid import Pyramid, Stage
from crosspatch.models.registry import register, settings, unwrapped
from crosspatch.models.tic_layer import MSAConv, check_window, neighbourhood_attention

__all__ = ["MSAConv", "TiC", "attention_macs", "checkpoint_filter_fn"]
CELL = (2, 2)  # of inter-pooling


class Shrink(nn.Module):
    """A convolution with kernel and stride k, on a map (B, H, W, C); sides are rounded up."""

    def __init__(self, dim: int, out: int, stride: int, norm: bool = False) -> None:
        super().__init__()
        self.stride = pair(stride)
        self.conv = nn.Conv2d(dim, out, stride, stride)
        self.norm = nn.LayerNorm(out) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(on_channels(self.conv, pad_to(x, self.stride)))


class Stem(Shrink):
    """Pictures (B, C, H, W) to their first map (B, h, w, out), normalised."""

    def __init__(self, in_chans: int, dim: int, patch_size: int) -> None:
        super().__init__(in_chans, dim, patch_size, norm=True)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1))


class TapAttention(nn.Module):
    """A: every pixel of a map (B, H, W, C), of any size, over its k x k taps.

    pools, shifts: inter-pooling and the cyclic shift, see the head of this file. Raises ValueError
    for even kernels, and widths that heads do not divide, or four groups if it shifts.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        kernel_size: int | Size,
        dilation: int | Size = 1,
        *,
        pools: bool = False,
        shifts: bool = False,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        check_window(dim, heads, pair(kernel_size))
        if shifts and dim % 4:
            raise ValueError(f"a width of {dim}; the cyclic shift needs four groups of channels")
        self.kernel, self.dilation = pair(kernel_size), pair(dilation)
        self.num_heads, self.pools, self.shifts = heads, pools, shifts
        self.attn_drop = attn_drop
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self._projected(x)
        k, v = (cyclic(k), cyclic(v)) if self.shifts else (k, v)
        drop = self.attn_drop if self.training else 0.0
        y = neighbourhood_attention(q, k, v, self.kernel, self.dilation, self.num_heads, drop)
        if self.pools:
            y = from_windows(y.flatten(1, 2), CELL, (x.shape[1], x.shape[2]))
        else:
            y = y[:, :, :, 0]
        return self.proj_drop(self.proj(y))

    def _projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, h, w, n, C), keys and values (B, h, w, C); n: four where cells are pooled."""
        if not self.pools:
            q, k, v = self.qkv(x).chunk(3, dim=-1)
            return q[:, :, :, None], k, v
        dim, weight, bias = x.shape[3], self.qkv.weight, self.qkv.bias
        size = (x.shape[1], x.shape[2])
        b = (None, None) if bias is None else (bias[:dim], bias[dim:])
        q = to_windows(pad_to(linear(x, weight[:dim], b[0]), CELL), CELL)
        k, v = linear(cells(x), weight[dim:], b[1]).chunk(2, dim=-1)
        return q.unflatten(1, counts(size, CELL)), k, v


def cells(x: Tensor) -> Tensor:
    """The means of the cells of 2x2 of a map (B, H, W, C), of those pixels that there are."""
    x = torch.cat([x, x[:, -1:]], dim=1) if x.shape[1] % 2 else x
    x = torch.cat([x, x[:, :, -1:]], dim=2) if x.shape[2] % 2 else x
    return x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).mean(dim=(2, 4))


def cyclic(x: Tensor) -> Tensor:
    """A map (B, H, W, C) whose four groups of channels come from half of the map below, above, to
    the right and to the left, around the border."""
    rows, columns = x.shape[1] // 2, x.shape[2] // 2
    up, down, left, right = x.chunk(4, dim=-1)
    parts = [up.roll(-rows, 1), down.roll(rows, 1), left.roll(-columns, 2), right.roll(columns, 2)]
    return torch.cat(parts, dim=-1)


class Block(nn.Module):
    """Attention over taps and MLP, each added to a map (B, H, W, C) behind a norm of its own."""

    def __init__(
        self, dim: int, attention: TapAttention, mlp_ratio: float, drop: float, drop_path: float
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = attention
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=drop)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class TiC(Pyramid):
    """The network; argument names are timm's.

    img_size: what it is described for; pictures of any size run, with the same weights. kernel_size
    and dilation: of the taps. head_dim: channels of a head. cyclic_shift, inter_pool: the two
    mechanisms of odd blocks. Raises ValueError for lists that do not agree, even kernels, and
    widths that heads do not divide.
    """

    channels_last = True

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 2, 6, 2),
        kernel_size: int | Size = 7,
        dilation: int | Size = 1,
        head_dim: int = 32,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        cyclic_shift: bool = True,
        inter_pool: bool = True,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        _check(embed_dims, depths, head_dim)
        self.stem = Stem(in_chans, embed_dims[0], patch_size)
        rates = drop_rates(drop_path_rate, depths)
        options = {"qkv_bias": qkv_bias, "attn_drop": attn_drop_rate, "proj_drop": proj_drop_rate}
        stages, previous = [], None
        for dim, mine in zip(embed_dims, rates, strict=True):
            down = Shrink(previous, dim, 2) if previous else None
            blocks = []
            for number, rate in enumerate(mine):
                far = {"pools": inter_pool, "shifts": cyclic_shift} if number % 2 else {}
                taps = TapAttention(dim, dim // head_dim, kernel_size, dilation, **far, **options)
                blocks.append(Block(dim, taps, mlp_ratio, proj_drop_rate, rate))
            stages.append(Stage(down, blocks))
            previous = dim
        self.stages = nn.ModuleList(stages)
        self.norm_head = nn.LayerNorm(embed_dims[-1])
        self.apply(init_weights)
        self.finish(
            embed_dims,
            [patch_size * 2**i for i in range(len(depths))],
            img_size=img_size,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
        )


def attention_macs(model: TiC, size: Size) -> int:
    """Multiply-adds of all taps for one picture of `size` (H, W): 2 H W k^2 C of every block, H W
    of its map. `metrics.macs.count_macs` counts the rest."""
    total = 0
    for stage, info in zip(model.stages, model.feature_info, strict=True):
        stride = info["reduction"]
        rows, columns = counts(size, stride)
        for module in stage.modules():
            if isinstance(module, TapAttention):
                taps = module.kernel[0] * module.kernel[1]
                total += 2 * rows * columns * taps * info["num_chs"]
    return total


def _check(embed_dims: Sequence[int], depths: Sequence[int], head_dim: int) -> None:
    one_a_stage(len(depths), embed_dims=embed_dims)
    if any(dim % head_dim for dim in embed_dims):
        raise ValueError(f"embed_dims {tuple(embed_dims)} must divide by heads of {head_dim}")


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: TiC | MSAConv) -> dict[str, Tensor]:
    """A state dict, bare or in {"model": …} or {"state_dict": …}; it fits every size."""
    return unwrapped(state_dict)


VARIANTS: dict[str, dict[str, Any]] = {
    "tic_small": {},
    "tic_base": {"embed_dims": (96, 192, 384, 768)},
}
# for small pictures: maps of 16x16, 8x8 and 4x4, windows of 3x3
SMALL = {
    "tic_micro_32": {
        "img_size": 32, "patch_size": 2, "embed_dims": (32, 64, 96), "depths": (2, 2, 2),
        "kernel_size": 3, "head_dim": 16, "mlp_ratio": 2.0,
    }
}  # fmt: skip


def _settings(arguments: Mapping[str, Any]) -> Any:
    side, stages = arguments.get("img_size", 224), len(arguments.get("depths", (0,) * 4))
    last = side // (arguments.get("patch_size", 4) * 2 ** (stages - 1))
    return settings(side, "stem.conv", "head", pool_size=(last, last))


default_cfgs = generate_default_cfgs(
    {name: _settings(arguments) for name, arguments in (VARIANTS | SMALL).items()}
)
register(__name__, TiC, VARIANTS, checkpoint_filter_fn, out_indices=(0, 1, 2, 3))
register(__name__, TiC, SMALL, checkpoint_filter_fn, out_indices=(0, 1, 2))
