# SPDX-License-Identifier: Apache-2.0
"""FMViT's blocks: multigroup units, light attention, the convolutional block and the fusion block.

An independent reading of "FMViT: A multiple-frequency mixing Vision Transformer", arXiv 2311.05707;
the equations and what in them is ours stand in `fmvit.py`. Maps are (B, C, H, W).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import crosspatch._torchvision  # noqa: F401

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from crosspatch.layers.folding import affine, fold_after, fold_before


class Spec(NamedTuple):
    """What all blocks of a network have in common; see the constructor of `FMViT`."""

    head_dim: int = 32
    qk_ratio: float = 0.5
    mix_ratio: float = 0.75
    shuffle: int = 4
    mlp_ratios: tuple[float, float] = (3.0, 2.0)
    groups: tuple[int, ...] = (1, 2, 4)
    identity: bool = True
    folded: bool = False
    attn_drop: float = 0.0
    proj_drop: float = 0.0

    def unit(self, dim: int, out: int) -> MultigroupUnit:
        """A unit of this network."""
        return MultigroupUnit(dim, out, self.groups, self.identity, self.folded)


# ---------------------------------------------------------------------- re-parameterisation


class Branch(nn.Module):
    """A 1x1 convolution in `groups` without bias, and its batch norm; 0 groups: the norm alone."""

    def __init__(self, dim: int, out: int, groups: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, out, 1, groups=groups, bias=False) if groups else nn.Identity()
        self.bn = nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))

    def dense(self) -> tuple[Tensor, Tensor]:
        """Weight (out, dim) and bias (out,) of the dense layer that computes the same."""
        scale, shift = affine(self.bn)
        if isinstance(self.conv, nn.Conv2d):
            parts = self.conv.weight.flatten(1).chunk(self.conv.groups)
            return scale[:, None] * torch.block_diag(*parts), shift
        return torch.diag(scale), shift


class MultigroupUnit(nn.Module):
    """The paper's gMLP unit, (B, dim, H, W) to (B, out, H, W): a 1x1 convolution that is trained as
    the sum of several.

    groups: of each convolution among the branches; identity: also a branch without a convolution,
    where `dim` is `out`. `fold` makes it one dense 1x1 convolution, which `folded` builds at once:
    `weight` (out, dim, 1, 1) and `bias` (out,) in place of `branches`. Raises ValueError where
    groups do not divide the widths.
    """

    branches: nn.ModuleList | None
    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self, dim: int, out: int, groups: Sequence[int], identity: bool, folded: bool = False
    ) -> None:
        super().__init__()
        if not groups or any(g < 1 or dim % g or out % g for g in groups):
            raise ValueError(f"widths {dim} and {out} must divide by each of the groups {groups}")
        self.weight = self.bias = self.branches = None
        if folded:
            conv = nn.Conv2d(dim, out, 1)
            self.weight, self.bias = conv.weight, conv.bias
            return
        counts = (*groups, *([0] if identity and dim == out else []))
        self.branches = nn.ModuleList(Branch(dim, out, count) for count in counts)

    def forward(self, x: Tensor) -> Tensor:
        if self.branches is None:
            return F.conv2d(x, self.weight, self.bias)  # pyright: ignore[reportArgumentType]
        first, *others = self.branches
        y = first(x)
        for branch in others:
            y = y + branch(x)
        return y

    def extra_repr(self) -> str:
        return "" if self.weight is None else f"{self.weight.shape[1]}, {self.weight.shape[0]}"

    @torch.no_grad()
    def fold(self) -> None:
        """Become the dense layer that computes the same in evaluation mode; nothing where it is
        one. Raises ValueError in training mode: there every batch has norms of its own."""
        if self.branches is None:
            return
        if self.training:
            raise ValueError("a multigroup unit is folded in evaluation mode: call eval() first")
        parts = [branch.dense() for branch in self.branches]
        weight, bias = (torch.stack(part).sum(dim=0) for part in zip(*parts, strict=True))
        self.weight, self.bias = nn.Parameter(weight[:, :, None, None]), nn.Parameter(bias)
        self.branches = None


# ---------------------------------------------------------------------- parts of blocks


class Embed(nn.Module):
    """To `out` channels, and by a mean of 2x2 to half the size where stride is 2 (rounded up)."""

    def __init__(self, dim: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.stride = stride
        kept = dim == out and stride == 1
        self.conv = nn.Identity() if kept else nn.Conv2d(dim, out, 1, bias=False)
        self.norm = nn.Identity() if kept else nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(mean_of_cells(x, self.stride)))


def mean_of_cells(x: Tensor, side: int) -> Tensor:
    """The mean of every cell of side x side places, smaller ones at the bottom and right edge."""
    if side == 1:
        return x
    return F.avg_pool2d(x, side, side, ceil_mode=True, count_include_pad=False)


class Mixer(nn.Module):
    """3x3 convolution in groups of `head_dim` channels, batch norm, ReLU, unit: high frequency."""

    def __init__(self, dim: int, spec: Spec) -> None:
        super().__init__()
        groups = dim // spec.head_dim
        self.group_conv3x3 = nn.Conv2d(dim, dim, 3, 1, 1, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(dim)
        self.projection = spec.unit(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.projection(F.relu(self.norm(self.group_conv3x3(x))))


class Mlp(nn.Module):
    """Unit, ReLU, unit, with `hidden` channels between."""

    def __init__(self, dim: int, hidden: int, spec: Spec) -> None:
        super().__init__()
        self.fc1 = spec.unit(dim, hidden)
        self.fc2 = spec.unit(hidden, dim)
        self.drop = nn.Dropout(spec.proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(F.relu(self.fc1(x)))))


class LightAttention(nn.Module):
    """RLMHSA: heads whose queries and keys are narrower than values, all of them from units.

    Keys and values are those of the mean of every r x r cell; r is `sr_ratio`.
    """

    def __init__(self, dim: int, sr_ratio: int, spec: Spec) -> None:
        super().__init__()
        self.num_heads, self.sr_ratio = dim // spec.head_dim, sr_ratio
        self.attn_drop = spec.attn_drop
        narrow = self.num_heads * round(spec.head_dim * spec.qk_ratio)
        self.q = spec.unit(dim, narrow)
        self.k = spec.unit(dim, narrow)
        self.v = spec.unit(dim, dim)
        self.proj = spec.unit(dim, dim)
        self.proj_drop = nn.Dropout(spec.proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        size, cells = (x.shape[2], x.shape[3]), mean_of_cells(x, self.sr_ratio)
        q, k, v = (self._heads(one) for one in (self.q(x), self.k(cells), self.v(cells)))
        drop = self.attn_drop if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=drop)
        # kernels differ in how their output lies: an exported graph must not depend on which ran
        y = y.transpose(2, 3).clone(memory_format=torch.contiguous_format)
        return self.proj_drop(self.proj(y.flatten(1, 2).unflatten(2, size)))

    def _heads(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, heads, H * W, C / heads)."""
        return x.flatten(2).unflatten(1, (self.num_heads, -1)).transpose(2, 3)


def shuffled(x: Tensor, groups: int) -> Tensor:
    """Channel i of group g at place i * groups + g: neighbours come from different groups."""
    return x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2) if groups > 1 else x


# ---------------------------------------------------------------------- blocks


class ConvFusionBlock(nn.Module):
    """CFB, the local block: (B, dim, H, W) to (B, out, H / stride, W / stride)."""

    def __init__(self, dim: int, out: int, stride: int, drop_path: float, spec: Spec) -> None:
        super().__init__()
        if out % spec.head_dim:
            raise ValueError(f"a width of {out} must divide by groups of {spec.head_dim}")
        self.patch_embed = Embed(dim, out, stride)
        self.mixer = Mixer(out, spec)
        self.norm = nn.BatchNorm2d(out)
        self.mlp = Mlp(out, int(out * spec.mlp_ratios[0]), spec)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        x = x + self.drop_path(self.mixer(x))
        return x + self.drop_path(self.mlp(self.norm(x)))

    def merge_norms(self) -> None:
        """No norm any more; units are folded before."""
        fold_after(self.patch_embed, "conv", "norm")
        fold_after(self.mixer, "group_conv3x3", "norm")
        _into(self, "norm", self.mlp.fc1)


class FrequencyMixingBlock(nn.Module):
    """FMB: attention on the low part of the channels, convolution on the high part, both mixed.

    sr_ratio: side of the cells that keys are means of. Raises ValueError where heads do not divide
    the parts, or the channel shuffle the width.
    """

    def __init__(
        self, dim: int, out: int, stride: int, drop_path: float, spec: Spec, sr_ratio: int = 1
    ) -> None:
        super().__init__()
        low = low_width(out, spec.mix_ratio, spec.head_dim)
        if out % spec.shuffle:
            raise ValueError(f"a width of {out} must divide by the {spec.shuffle} shuffled groups")
        self.shuffle = spec.shuffle
        self.patch_embed = Embed(dim, low, stride)
        self.norm1 = nn.BatchNorm2d(low)
        self.attn = LightAttention(low, sr_ratio, spec)
        self.projection = Embed(low, out - low)
        self.mixer = Mixer(out - low, spec)
        self.norm2 = nn.BatchNorm2d(out)
        self.mlp = Mlp(out, int(out * spec.mlp_ratios[1]), spec)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        low = self.patch_embed(x)
        low = low + self.drop_path(self.attn(self.norm1(low)))
        high = self.projection(low)
        high = high + self.drop_path(self.mixer(high))
        x = shuffled(torch.cat([low, high], dim=1), self.shuffle)
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def merge_norms(self) -> None:
        """No norm any more; units are folded before."""
        for embed in (self.patch_embed, self.projection):
            fold_after(embed, "conv", "norm")
        fold_after(self.mixer, "group_conv3x3", "norm")
        _into(self, "norm1", self.attn.q, self.attn.k, self.attn.v)
        _into(self, "norm2", self.mlp.fc1)


def _into(block: Any, name: str, *units: MultigroupUnit) -> None:
    """Take the norm of that name into the folded units that read it; nothing where it is gone."""
    norm = getattr(block, name)
    if isinstance(norm, nn.Identity):
        return
    for unit in units:
        fold_before(unit, norm)
    setattr(block, name, nn.Identity())


def low_width(width: int, ratio: float, head_dim: int) -> int:
    """`ratio` of `width`, rounded to heads, a head or more on either side. Raises ValueError where
    heads do not divide the width, or it is of one head alone."""
    heads = width // head_dim
    if width % head_dim or heads < 2:
        raise ValueError(f"a width of {width}; expected two or more times the head's {head_dim}")
    return min(max(int(heads * ratio + 0.5), 1), heads - 1) * head_dim


def make_block(
    dim: int, out: int, stride: int, drop_path: float, spec: Spec, sr_ratio: int | None
) -> nn.Module:
    """An FMB with that `sr_ratio`, or a CFB for None."""
    if sr_ratio is None:
        return ConvFusionBlock(dim, out, stride, drop_path, spec)
    mix = partial(FrequencyMixingBlock, sr_ratio=sr_ratio)
    return mix(dim, out, stride, drop_path, spec)
