# SPDX-License-Identifier: Apache-2.0
"""An AsCAN-style network: convolution first, plain attention last, in a pattern one can write.

A reading of "AsCAN: Asymmetric Convolution-Attention Networks for Efficient Recognition and
Generation", Snap, arXiv 2411.04967, NeurIPS 2024. No code has been released and its table of
configurations could not be read. That there are two kinds of block, four stages, and more attention
the deeper one is, also within a stage, is the paper's; everything marked (o) is ours, every number
included.

    stem: conv3x3/2-BN-GELU, conv3x3-BN-GELU, as wide as the first stage                      (o)
    pattern, stage by stage: CC / CCC / CCCTTTTT / CTTT; the first C of a stage has stride 2  (o)
    C, fused inverted bottleneck: y = BN W SE(GELU(BN(conv3x3 x))), 4 C channels between      (o)
         y + x, or y + conv1x1(mean of 2x2 of x) where the shape changes                      (o)
    SE(y) = y * sigmoid(W2 GELU(W1 mean y)), C / 4 channels between                           (o)
    T, plain transformer over all places: x = x + MHSA(LN x);  x = x + MLP(LN x)
         MHSA = softmax(q k^T / sqrt 32 + bias[offset]) v, the bias resized for other sizes   (o)
    logits = head(LN(mean x))                                                                 (o)

There are no windows and no reduction of keys. Segmentation reads the maps of the four stages
(`features_only=True`); the networks that generate pictures are not here.

Departures: everything marked (o). The sizes B and L of the paper are not here, as nothing certain
is known of them. A pattern may begin a stage with T, for symmetric and reversed controls: then a
mean of 2x2 and conv1x1 stand before it. Odd maps are rounded up. Batch norms in C want batches that
are not small: freeze their statistics where they are.

Expected (M parameters, GMACs): t at 224 25.38, 5.36; its controls coatnet 35.31, 7.08 and
alternating 34.62, 6.76; tiny at 64 3.50, 0.054.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import crosspatch._torchvision  # noqa: F401

import torch.nn.functional as F
from timm.layers import DropPath
from timm.models import generate_default_cfgs
from torch import Tensor, nn

from crosspatch.layers.conv_norm import ConvNorm
from crosspatch.layers.first_weights import init_weights
from crosspatch.layers.linear import Linear
from crosspatch.layers.mlp import Mlp
from crosspatch.layers.stage import drop_rates
from crosspatch.layers.windows import (
    Size,
    attend,
    bias_table,
    counts,
    fit_bias_table,
    map_bias,
    relative_index,
)
from crosspatch.models.pyramid import Pyramid, Stage
from crosspatch.models.registry import register, settings, unwrapped

KINDS = "CT"


class Shortcut(nn.Module):
    """The mean of 2x2 where stride is 2, then a 1x1 convolution; maps (B, C, H, W)."""

    def __init__(self, dim: int, out: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(dim, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.stride > 1:
            x = F.avg_pool2d(x, self.stride, ceil_mode=True, count_include_pad=False)
        return self.conv(x)


class SqueezeExcite(nn.Module):
    """Every channel of a map times a gate that the means of all channels give."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.fc2 = Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.fc2(F.gelu(self.fc1(x.mean(dim=(2, 3))))).sigmoid()
        return x * gate[:, :, None, None]


class FusedConv(nn.Module):
    """The branch and the shortcut of C, added; (B, dim, H, W) to (B, out, H / stride, W / stride).

    expand_ratio: channels between over `dim`; se_ratio: of the gate over `dim`, 0 for none.
    """

    def __init__(
        self,
        dim: int,
        out: int,
        stride: int,
        expand_ratio: float,
        se_ratio: float,
        drop_path: float,
    ) -> None:
        super().__init__()
        hidden = int(dim * expand_ratio)
        self.expand = nn.Conv2d(dim, hidden, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        gate = max(int(dim * se_ratio), 1) if se_ratio else 0
        self.se = SqueezeExcite(hidden, gate) if gate else nn.Identity()
        self.project = nn.Conv2d(hidden, out, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        same = dim == out and stride == 1
        self.shortcut = nn.Identity() if same else Shortcut(dim, out, stride)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        y = self.se(F.gelu(self.bn1(self.expand(x))))
        return self.shortcut(x) + self.drop_path(self.bn2(self.project(y)))


class ConvBlock(nn.Module):
    """C, under the name `conv` that its parameters carry."""

    def __init__(self, *shape: Any, **more: Any) -> None:
        super().__init__()
        self.conv = FusedConv(*shape, **more)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class GlobalAttention(nn.Module):
    """Every place of a map (B, H, W, C) attends to every other, with a bias for their offset.

    size: (H, W) of the maps that the table `rel_bias` is made for; it is resized for others.
    """

    index: Tensor

    def __init__(
        self, dim: int, heads: int, size: Size, qkv_bias: bool, attn_drop: float, proj_drop: float
    ) -> None:
        super().__init__()
        self.num_heads, self.size, self.attn_drop = heads, size, attn_drop
        self.rel_bias = bias_table(size, heads)
        self.register_buffer("index", relative_index(size), persistent=False)
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def bias(self, size: Size) -> Tensor:
        """(heads, H * W, H * W) for maps of `size`."""
        return map_bias(self.rel_bias, self.size, size, self.index)

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[1], x.shape[2]
        q, k, v = self.qkv(x.flatten(1, 2)[:, None]).chunk(3, dim=-1)
        drop = self.attn_drop if self.training else 0.0
        y = attend(q, k, v, self.num_heads, self.bias(size), dropout=drop)
        return self.proj_drop(self.proj(y[:, 0].unflatten(1, size)))


class TransformerBlock(nn.Module):
    """T of a map (B, C, H, W); attention: further arguments of `GlobalAttention`."""

    def __init__(
        self,
        dim: int,
        heads: int,
        size: Size,
        mlp_ratio: float,
        drop_path: float,
        drop: float,
        **attention: Any,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = GlobalAttention(dim, heads, size, proj_drop=drop, **attention)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=drop)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x.permute(0, 3, 1, 2)


class AsCAN(Pyramid):
    """The network; all arguments are ours.

    pattern: C and T block by block, stages parted by "/"; spaces do not count. dims: width by
    stage. img_size: the side or (H, W) that bias tables are made for; pictures of any size run.
    stem_stride: 2, or 1 for small pictures. head_dim: width of a head of T. expand_ratio, se_ratio:
    of C; mlp_ratio, qkv_bias: of T. Raises ValueError for a pattern that cannot be read, lists that
    do not agree and widths that heads do not divide.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        pattern: str = "CC/CCC/CCCTTTTT/CTTT",
        dims: Sequence[int] = (64, 128, 256, 512),
        head_dim: int = 32,
        stem_stride: int = 2,
        expand_ratio: float = 4.0,
        se_ratio: float = 0.25,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        kinds = read_pattern(pattern)
        _check(kinds, dims, head_dim)
        self.stem = _stem(in_chans, dims[0], stem_stride)
        strides = [stem_stride * 2 ** (i + 1) for i in range(len(dims))]
        rates = drop_rates(drop_path_rate, [len(one) for one in kinds])
        conv = partial(ConvBlock, expand_ratio=expand_ratio, se_ratio=se_ratio)
        options = {"drop": proj_drop_rate, "attn_drop": attn_drop_rate, "qkv_bias": qkv_bias}
        attention = partial(TransformerBlock, mlp_ratio=mlp_ratio, **options)
        stages, width = [], dims[0]
        for letters, dim, stride, mine in zip(kinds, dims, strides, rates, strict=True):
            size = counts(img_size, stride)
            place = partial(attention, dim, dim // head_dim, size)
            stages.append(_stage(letters, width, dim, conv, place, mine))
            width = dim
        self.stages = nn.ModuleList(stages)
        self.norm_head = nn.LayerNorm(width)
        self.apply(init_weights)
        self.finish(
            dims,
            strides,
            img_size=img_size,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
        )

    def no_weight_decay(self) -> set[str]:
        """The tables of biases."""
        return {name for name, _ in self.named_parameters() if name.endswith("rel_bias")}


def _stem(in_chans: int, dim: int, stride: int) -> nn.Sequential:
    first, second = ConvNorm(in_chans, dim, 3, stride), ConvNorm(dim, dim, 3)
    return nn.Sequential(first, nn.GELU(), second, nn.GELU())


def _stage(
    letters: str,
    width: int,
    dim: int,
    conv: Callable[..., nn.Module],
    attention: Callable[..., nn.Module],
    rates: Sequence[float],
) -> Stage:
    """The blocks of `letters`, which halve a map of `width`; conv, attention: what makes them."""
    down = Shortcut(width, dim, 2) if letters[0] == "T" else None
    blocks = []
    for place, (kind, rate) in enumerate(zip(letters, rates, strict=True)):
        if kind == "T":
            blocks.append(attention(drop_path=rate))
        else:
            shape = (dim, dim, 1) if place else (width, dim, 2)
            blocks.append(conv(*shape, drop_path=rate))
    return Stage(down, blocks)


def read_pattern(pattern: str) -> list[str]:
    """The letters of every stage: "CC/CT" to ["CC", "CT"]. Raises ValueError for other letters and
    for a stage without a block."""
    stages = "".join(pattern.upper().split()).split("/")
    if any(not stage or set(stage) - set(KINDS) for stage in stages):
        raise ValueError(
            f"pattern {pattern!r}; expected C and T, one or more a stage, stages parted by /, such "
            "as CC/CCC/CCCTTTTT/CTTT"
        )
    return stages


def _check(kinds: Sequence[str], dims: Sequence[int], head_dim: int) -> None:
    if len(kinds) != len(dims):
        raise ValueError(f"a pattern of {len(kinds)} stages and {len(dims)} widths in dims")
    for letters, dim in zip(kinds, dims, strict=True):
        if "T" in letters and dim % head_dim:
            raise ValueError(f"a width of {dim} must divide by heads of {head_dim}")


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: AsCAN) -> dict[str, Tensor]:
    """A state dict, bare or in {"model": …} or {"state_dict": …}; nobody has released one, so names
    are ours. Tables of biases learnt on a square map are resized to the model's."""
    state = dict(unwrapped(state_dict))
    for name, module in model.named_modules():
        table = state.get(f"{name}.rel_bias")
        if isinstance(module, GlobalAttention) and table is not None:
            state[f"{name}.rel_bias"] = fit_bias_table(table, module.size)
    return state


VARIANTS: dict[str, dict[str, Any]] = {
    "ascan_t": {},
    # controls: attention only at the end, as in CoAtNet, and in turns everywhere
    "ascan_t_coatnet": {"pattern": "CC/CCC/CCCCCCCC/TTTT"},
    "ascan_t_alternating": {"pattern": "CT/CTC/CTCTCTCT/CTCT"},
    "ascan_tiny": {"img_size": 64, "pattern": "C/CC/CTT/CTT", "dims": (32, 64, 128, 256)},
}
# for 32x32: maps of 16x16, 8x8 and 4x4; its controls cost as much
SMALL = {
    "ascan_micro_32": {"pattern": "C/CT/CTT", "dims": (18, 40, 64)},
    "ascan_32_alternating": {"pattern": "CT/CT/CT", "dims": (16, 32, 80)},
    "ascan_32_reversed": {"pattern": "CTT/CT/C", "dims": (16, 16, 48)},
}
for arguments in SMALL.values():
    arguments |= {"img_size": 32, "stem_stride": 1, "head_dim": 8}


def _settings(arguments: Mapping[str, Any]) -> Any:
    side, stages = arguments.get("img_size", 224), len(arguments.get("dims", (0,) * 4))
    last = side // (arguments.get("stem_stride", 2) * 2**stages)
    return settings(side, "stem.0.c", "head", pool_size=(last, last))


default_cfgs = generate_default_cfgs(
    {name: _settings(arguments) for name, arguments in (VARIANTS | SMALL).items()}
)
register(__name__, AsCAN, VARIANTS, checkpoint_filter_fn, out_indices=(0, 1, 2, 3))
register(__name__, AsCAN, SMALL, checkpoint_filter_fn, out_indices=(0, 1, 2))
