# SPDX-License-Identifier: Apache-2.0
"""S2AFormer: attention by one number per head and token, between convolutions; our own reading.

"S2AFormer: Strip Self-Attention for Efficient Vision Transformer", arXiv 2505.22195, IEEE
Transactions on Image Processing 2025. No code has been released and only the abstract, two
summaries and a table of results could be read. The stem, the four lines of a block and what strip
attention makes smaller are the paper's; everything marked (o) is ours.

    stem:  three conv3x3, the first of stride 2; BN, GELU behind each, half of the first width (o)
    stage: x = BN(conv3x3/2 x) (o), then blocks
    block: x = x + DWConv3x3(x)
           x = x + SSA(LN x)
           x = x + LIM(LN x)
           x = x + MLP(LN x)
    SSA:   z = LN(depthwise r x r of stride r (x)), x itself for r = 1; q = Wq x and k = Wk z have
           one channel per head (the strip), v = Wv z has all C;
           y = Wo [softmax over z of (q k)] v, without a scale                                   (o)
    LIM:   W GELU(BN(DWConv3x3 x)) (o);   MLP: W2 GELU(W1 x)
    logits = head(LN(mean x)) (o);   no positions: convolutions know them

r is 8, 4, 2, 1 by stage. The attention map of a head is exp of a matrix of rank one, so late stages
have several heads.

Departures: everything marked (o). The widths, depths, heads and MLP ratios of the variants were
fitted to the paper's numbers of parameters and multiply-adds, so their agreement is no evidence.
Maps that r does not divide are padded with zeros at the bottom and at the right, as keys too.

Expected at 224 (M parameters, GMACs; then the paper's numbers): mini 5.01, 0.43 (5.02, 0.43); T
5.87, 0.66 (5.80, 0.655); XS 6.40, 0.80 (6.54, 0.786); S 10.49, 1.39 (10.69, 1.38); M 25.18, 4.13
(24.87, 4.12).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import crosspatch._torchvision  # noqa: F401

import torch.nn.functional as F
from timm.layers import DropPath
from timm.models import generate_default_cfgs
from torch import Tensor, nn

from crosspatch.layers.attention import check_heads, join_heads
from crosspatch.layers.conv_norm import ConvNorm
from crosspatch.layers.first_weights import init_fan_out
from crosspatch.layers.linear import Linear
from crosspatch.layers.maps import on_channels
from crosspatch.layers.mlp import Mlp
from crosspatch.layers.stage import drop_rates, one_a_stage
from crosspatch.layers.windows import pad_to
from crosspatch.models.pyramid import Pyramid, Stage
from crosspatch.models.registry import register, settings, unwrapped

REDUCTIONS = ("conv", "mean")


class StripAttention(nn.Module):
    """SSA of a map (B, H, W, C): queries and keys of one channel per head, values of C.

    sr_ratio: r, side of the cells that become one key; reduction: "conv" or "mean", how they do.
    Raises ValueError where heads do not divide the width, and for another reduction.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        sr_ratio: int,
        reduction: str = "conv",
        *,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        check_heads(dim, heads)
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction {reduction!r}; expected one of {', '.join(REDUCTIONS)}")
        self.num_heads, self.sr_ratio, self.attn_drop = heads, sr_ratio, attn_drop
        self.q = Linear(dim, heads, bias=qkv_bias)
        if sr_ratio == 1:
            self.sr = nn.Identity()
        elif reduction == "mean":
            self.sr = nn.AvgPool2d(sr_ratio)
        else:
            self.sr = nn.Conv2d(dim, dim, sr_ratio, sr_ratio, groups=dim)
        self.sr_norm = nn.LayerNorm(dim)
        self.k = Linear(dim, heads, bias=qkv_bias)
        self.v = Linear(dim, dim, bias=qkv_bias)
        self.proj = Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def keys(self, x: Tensor) -> Tensor:
        """What keys and values are made of, z: (B, H, W, C) to (B, H / r, W / r, C)."""
        if self.sr_ratio > 1:
            x = on_channels(self.sr, pad_to(x, (self.sr_ratio, self.sr_ratio)))
        return self.sr_norm(x)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        z = self.keys(x)
        q, k, v = (
            t.flatten(1, 2).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for t in (self.q(x), self.k(z), self.v(z))
        )
        drop = self.attn_drop if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=drop, scale=1.0)
        return self.proj_drop(self.proj(join_heads(y).unflatten(1, (height, width))))


class LocalInteraction(nn.Module):
    """LIM of a map (B, H, W, C): what is beside what."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dw = ConvNorm(dim, dim, 3, groups=dim)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.gelu(on_channels(self.dw, x)))


class HybridBlock(nn.Module):
    """HPB, x: (B, H, W, C). lim: whether it has the local interaction; attention: further arguments
    of `StripAttention`."""

    lim: nn.Module | None

    def __init__(
        self,
        dim: int,
        heads: int,
        sr_ratio: int,
        mlp_ratio: float,
        lim: bool,
        drop_path: float,
        drop: float,
        **attention: Any,
    ) -> None:
        super().__init__()
        self.dw = nn.Conv2d(dim, dim, 3, 1, 1, groups=dim)
        self.norm1 = nn.LayerNorm(dim)
        self.ssa = StripAttention(dim, heads, sr_ratio, proj_drop=drop, **attention)
        self.norm2 = nn.LayerNorm(dim) if lim else nn.Identity()
        self.lim = LocalInteraction(dim) if lim else None
        self.norm3 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=drop)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + on_channels(self.dw, x)
        x = x + self.drop_path(self.ssa(self.norm1(x)))
        if self.lim is not None:
            x = x + self.drop_path(self.lim(self.norm2(x)))
        return x + self.drop_path(self.mlp(self.norm3(x)))


class Embed(ConvNorm):
    """3x3 convolution of stride 2 and batch norm: (B, H, W, dim) to (B, H / 2, W / 2, out), rounded
    up."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__(dim, out, 3, 2)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Stem(nn.Sequential):
    """Three 3x3 convolutions: (B, in_chans, H, W) to (B, H / stride, W / stride, dim)."""

    def __init__(self, in_chans: int, dim: int, stride: int) -> None:
        shapes = ((in_chans, dim, 3, stride), (dim, dim, 3), (dim, dim, 3))
        super().__init__(*(layer for shape in shapes for layer in (ConvNorm(*shape), nn.GELU())))

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).permute(0, 2, 3, 1)


class S2AFormer(Pyramid):
    """The network; all arguments but the sizes are ours.

    img_size: what it is described for, any size is taken. dims, depths, num_heads, sr_ratios,
    mlp_ratios: by stage. stem_stride: 2, or 1 for small pictures. reduction: how cells become keys,
    "conv" or "mean". lim: whether blocks have the local interaction. Raises ValueError for lists
    that do not agree and widths that heads do not divide.
    """

    channels_last = True

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        dims: Sequence[int] = (40, 80, 200, 400),
        depths: Sequence[int] = (1, 1, 2, 2),
        num_heads: Sequence[int] = (1, 2, 5, 10),
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        mlp_ratios: Sequence[float] = (4, 4, 4, 4),
        stem_stride: int = 2,
        reduction: str = "conv",
        lim: bool = True,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        _check(dims, depths, num_heads, sr_ratios, mlp_ratios)
        width = max(dims[0] // 2, 1)
        self.stem = Stem(in_chans, width, stem_stride)
        rates = drop_rates(drop_path_rate, depths)
        more = {"reduction": reduction, "qkv_bias": qkv_bias, "attn_drop": attn_drop_rate}
        stages = []
        shapes = zip(dims, rates, num_heads, sr_ratios, mlp_ratios, strict=True)
        for dim, mine, *shape in shapes:
            blocks = [HybridBlock(dim, *shape, lim, rate, proj_drop_rate, **more) for rate in mine]
            stages.append(Stage(Embed(width, dim), blocks))
            width = dim
        self.stages = nn.ModuleList(stages)
        self.norm_head = nn.LayerNorm(width)
        self.apply(init_fan_out)
        self.finish(
            dims,
            [stem_stride * 2 ** (i + 1) for i in range(len(dims))],
            img_size=img_size,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
        )


def _check(dims, depths, num_heads, sr_ratios, mlp_ratios) -> None:
    lists = {"num_heads": num_heads, "sr_ratios": sr_ratios, "mlp_ratios": mlp_ratios}
    one_a_stage(len(dims), depths=depths, **lists)
    if min(depths) < 1 or min(sr_ratios) < 1 or min(num_heads) < 1:
        raise ValueError("depths, num_heads and sr_ratios must be 1 or more")


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: S2AFormer) -> dict[str, Tensor]:
    """A state dict, bare or in {"model": …} or {"state_dict": …}. Nobody has released one: names
    are ours, or with `embed` and `head_norm` as our description of the paper has them."""
    return {
        re.sub(r"^(stages\.\d+)\.embed\.", r"\1.downsample.", name).replace(
            "head_norm.", "norm_head."
        ): value
        for name, value in unwrapped(state_dict).items()
    }


VARIANTS: dict[str, dict[str, Any]] = {
    "s2aformer_mini": {
        "dims": (32, 72, 112, 416), "depths": (1, 1, 1, 2), "num_heads": (1, 2, 4, 8)
    },
    "s2aformer_t": {},
    "s2aformer_xs": {"depths": (1, 2, 3, 2)},
    "s2aformer_s": {
        "dims": (40, 96, 248, 496), "depths": (1, 2, 4, 2), "num_heads": (1, 2, 4, 8),
        "mlp_ratios": (8, 8, 4, 4),
    },
    "s2aformer_m": {
        "dims": (64, 144, 360, 720), "depths": (2, 3, 6, 2), "mlp_ratios": (8, 8, 4, 4)
    },
}  # fmt: skip
# for small pictures: maps of 16x16, 8x8, 4x4 and 2x2
SMALL = {
    "s2aformer_micro_32": {
        "img_size": 32, "stem_stride": 1, "dims": (24, 48, 72, 96), "depths": (1, 2, 2, 1),
        "num_heads": (2, 4, 6, 8), "sr_ratios": (4, 2, 1, 1),
    }
}  # fmt: skip


def _settings(arguments: Mapping[str, Any]) -> Any:
    side = arguments.get("img_size", 224)
    last = side // (16 * arguments.get("stem_stride", 2))
    return settings(side, "stem.0.c", "head", pool_size=(last, last))


default_cfgs = generate_default_cfgs(
    {name: _settings(arguments) for name, arguments in (VARIANTS | SMALL).items()}
)
register(__name__, S2AFormer, VARIANTS | SMALL, checkpoint_filter_fn, out_indices=(0, 1, 2, 3))
