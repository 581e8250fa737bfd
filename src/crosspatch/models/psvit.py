# SPDX-License-Identifier: Apache-2.0
"""PSViT: a ViT that pools its tokens at a few depths and lets blocks reuse an attention map.

"PSViT: Better Vision Transformer via Token Pooling and Attention Sharing", Boyu Chen et al., arXiv
2108.03428, 2021. Nothing but the abstract could be read and nothing was released: a reconstruction,
with no numbers of the authors' to be faithful to.

    pooling, 2-D   x = LN(maxpool3x3/2(conv3x3(grid of x)))        without a class token (default)
    pooling, 1-D   x = maxpool3/2(conv3(sequence of x));  class token = Linear(class token)
    ordinary block A = softmax(q k^T / sqrt d);  x = x + proj(A V(LN x));  x = x + MLP(LN x)
    sharing block  the same with the A of the closest earlier block that made one: no q, no k

A sharing block saves 2C^2 weights (and 2C biases) and 2NC^2 + N^2C multiply-adds. Which blocks have
a pooling before them and which share is a pattern of the paper's "compact set", here: at most three
poolings, at least two blocks between two of them, none before block 0; no sharing in block 0, right
after a pooling, or in more than two blocks in a row. `tokens/psvit.py` samples such patterns and
puts both ideas on a network that is already trained.

The trunk with another reduction between its stages. Widths grow by `width_factor` at every pooling,
to whole heads. The 1-D form mixes the ends of neighbouring rows, halves the tokens where the 2-D
one quarters them, and its later maps are sequences, 1 x n. Prefix tokens of the 2-D form, if one
asks for some, go through a Linear as in the 1-D form.

Expected at 224 (M parameters, GMACs; in brackets without sharing): tiny 32.57, 1.26 (35.13, 1.37);
small 104.25, 3.99 (112.56, 4.30). At a width factor of 1.5 tiny 14.87, 0.81; small 46.50, 2.47.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import Any

import crosspatch._torchvision  # noqa: F401

import torch
import torch.nn.functional as F
from timm.models import generate_default_cfgs
from torch import Tensor, nn

from crosspatch.layers.block import BlockSpec
from crosspatch.layers.linear import Linear
from crosspatch.layers.stage import StageSpec
from crosspatch.layers.tokens import TokenState
from crosspatch.models.registry import register, settings
from crosspatch.models.vit import VisionTransformer, checkpoint_filter_fn

MOST_POOLINGS = 3
LEAST_BETWEEN = 2
MOST_IN_A_ROW = 2


class PSViT(VisionTransformer):
    """`depth` blocks with a pooling before each of `pool` and attention shared in each of `share`.

    embed_dim: width of the first stage; every stage has heads of `head_dim`. form: "2d" or "1d".
    residual: to each pooling's result an average pooling is added, zeros in the new channels, as
    in ViT-Res. trunk: of `VisionTransformer`. Raises ValueError, naming block and rule, for a
    pattern outside the compact set.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str | None = None,
        embed_dim: int = 160,
        depth: int = 17,
        head_dim: int = 32,
        mlp_ratio: float = 4.0,
        width_factor: float = 2.0,
        pool: Sequence[int] = (4, 13),
        share: Sequence[int] = (1, 3, 5, 7, 9, 11, 14, 16),
        form: str = "2d",
        residual: bool = False,
        class_token: bool | None = None,
        norm_eps: float = 1e-6,
        **trunk: Any,
    ) -> None:
        if form not in POOLINGS:
            raise ValueError(f"form {form!r}; expected '2d' or '1d'")
        if "num_heads" in trunk:
            raise ValueError("num_heads is not free; every stage has width / head_dim of them")
        check_pattern(pool, share, depth)
        widths = _widths(embed_dim, head_dim, width_factor, len(pool) + 1)
        class_token = form == "1d" if class_token is None else class_token
        has_prefix = class_token or bool(trunk.get("reg_tokens", 0))
        reduction = partial(
            POOLINGS[form], has_prefix=has_prefix, residual=residual, norm_eps=norm_eps
        )
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool or ("token" if class_token else "avg"),
            class_token=class_token,
            norm_eps=norm_eps,
            stages=_stages(widths, head_dim, mlp_ratio, depth, pool, share, reduction),
            **trunk,
        )


class Pooling(nn.Module, ABC):
    """Between stages, of widths dim_in and dim_out: a convolution widens the patches, max pooling
    takes every second; prefix tokens pass a Linear. Needs the full grid, else raises ValueError."""

    def __init__(
        self,
        dim_in: int,
        dim_out: int,
        stride: int,
        *,
        has_prefix: bool,
        residual: bool,
        norm_eps: float,
    ) -> None:
        super().__init__()
        self.stride, self.residual, self.widening = stride, residual, dim_out - dim_in
        self.token = Linear(dim_in, dim_out) if has_prefix else None

    def forward(self, state: TokenState) -> TokenState:
        if state.source is not None:
            raise ValueError("a pooling between stages needs every patch of the grid")
        patches, grid = self.pooled(state.patches.transpose(1, 2), state.grid)
        patches = patches.transpose(1, 2)
        if self.token is not None:
            prefix = self.token(state.tokens[:, : state.n_prefix])
            patches = torch.cat([prefix, patches], dim=1)
        return state._replace(tokens=patches, grid=grid)

    @abstractmethod
    def pooled(self, x: Tensor, grid: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
        """Patches (B, dim_in, N) to (B, dim_out, N') and their grid."""


class Pooling2d(Pooling):
    """On the grid of the patches, then a LayerNorm; odd sides are rounded up."""

    def __init__(self, dim_in: int, dim_out: int, stride: int, **more: Any) -> None:
        super().__init__(dim_in, dim_out, stride, **more)
        self.conv = nn.Conv2d(dim_in, dim_out, 3, padding=1)
        self.norm = nn.LayerNorm(dim_out, eps=more["norm_eps"])

    def pooled(self, x: Tensor, grid: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
        image = x.unflatten(2, grid)
        y = F.max_pool2d(self.conv(image), 3, self.stride, 1)
        y = self.norm(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        if self.residual:
            mean = F.avg_pool2d(image, 3, self.stride, 1, count_include_pad=False)
            y = y + F.pad(mean, (0, 0, 0, 0, 0, self.widening))
        return y.flatten(2), (y.shape[2], y.shape[3])


class Pooling1d(Pooling):
    """On the sequence of the patches, row after row."""

    def __init__(self, dim_in: int, dim_out: int, stride: int, **more: Any) -> None:
        super().__init__(dim_in, dim_out, stride, **more)
        self.conv = nn.Conv1d(dim_in, dim_out, 3, padding=1)

    def pooled(self, x: Tensor, grid: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
        y = F.max_pool1d(self.conv(x), 3, self.stride, 1)
        if self.residual:
            mean = F.avg_pool1d(x, 3, self.stride, 1, count_include_pad=False)
            y = y + F.pad(mean, (0, 0, 0, self.widening))
        return y, (1, y.shape[2])


POOLINGS = {"2d": Pooling2d, "1d": Pooling1d}


# ------------------------------------------------------------------ patterns


def check_pattern(pool: Sequence[int], share: Sequence[int], depth: int) -> None:
    """Raises ValueError, naming block and rule, where blocks with a pooling before them and blocks
    that share their attention are outside the compact set of `depth` blocks."""
    for name, blocks in (("pool", pool), ("share", share)):
        for block in blocks:
            if not isinstance(block, int) or not 0 <= block < depth:
                raise ValueError(f"{name} names block {block!r}; there are blocks 0 to {depth - 1}")
        if len(set(blocks)) < len(blocks):
            raise ValueError(f"{name} names a block twice: {sorted(blocks)}")
    _check_pools(sorted(pool))
    row = 0
    for block in range(depth):
        row = row + 1 if block in share else 0
        if row and block == 0:
            raise ValueError("block 0 shares its attention; no block before it has made any")
        if row and block in pool:
            raise ValueError(
                f"block {block} shares its attention right after a pooling; the block before it "
                "saw other tokens"
            )
        if row > MOST_IN_A_ROW:
            raise ValueError(
                f"block {block} is the third in a row to share its attention; at most "
                f"{MOST_IN_A_ROW} do"
            )


def _check_pools(pool: Sequence[int]) -> None:
    for number, block in enumerate(pool):
        if block == 0:
            raise ValueError("block 0 has a pooling before it; poolings stand between two blocks")
        if number >= MOST_POOLINGS:
            raise ValueError(
                f"block {block} has the pooling number {number + 1} before it; at most "
                f"{MOST_POOLINGS} are allowed"
            )
        if number and block - pool[number - 1] < LEAST_BETWEEN:
            raise ValueError(
                f"block {block} has a pooling before it, and so has block {pool[number - 1]}; at "
                f"least {LEAST_BETWEEN} blocks stand between two poolings"
            )


def donor_of(block: int, share: Sequence[int]) -> int:
    """The closest earlier block whose attention is its own."""
    return next(b for b in range(block - 1, -1, -1) if b not in share)


def _widths(first: int, head_dim: int, factor: float, count: int) -> list[int]:
    """Of every stage, in whole heads. Raises ValueError where the first is not or a later one is
    narrower."""
    if first % head_dim or factor < 1:
        raise ValueError(
            f"width {first} and width_factor {factor}; expected a multiple of the head's "
            f"{head_dim} and a factor of at least 1"
        )
    return [round(first * factor**i / head_dim) * head_dim for i in range(count)]


def _stages(widths, head_dim, mlp_ratio, depth, pool, share, reduction) -> tuple[StageSpec, ...]:
    starts = [0, *sorted(pool)]
    stages = []
    for number, width in enumerate(widths):
        end = starts[number + 1] if number + 1 < len(starts) else depth
        heads, hidden = width // head_dim, int(width * mlp_ratio)
        blocks = [
            BlockSpec(heads, 0, width, hidden, shares=donor_of(block, share))
            if block in share
            else BlockSpec(heads, width, width, hidden)
            for block in range(starts[number], end)
        ]
        stages.append(StageSpec(width, tuple(blocks), 2 if number else 1, reduction))
    return tuple(stages)


VARIANTS = {
    "psvit_tiny": {"embed_dim": 160},
    "psvit_small": {"embed_dim": 288},
}
# Ours: small enough for tests, and for pictures of 32 pixels.
MICRO = {
    "psvit_micro_32": {
        "img_size": 32,
        "patch_size": 4,
        "stem": "conv",
        "embed_dim": 64,
        "depth": 6,
        "mlp_ratio": 2.0,
        "width_factor": 1.5,
        "pool": (2, 4),
        "share": (1, 3, 5),
    }
}
default_cfgs = generate_default_cfgs(
    {name: settings(224, "patch_embed.proj", "head") for name in VARIANTS}
    | {"psvit_micro_32": settings(32, "patch_embed.proj.0", "head")}
)
register(__name__, PSViT, VARIANTS | MICRO, checkpoint_filter_fn, out_indices=3)
