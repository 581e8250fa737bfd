# SPDX-License-Identifier: Apache-2.0
"""CAT: attention inside the patches of a map takes turns with attention between the patches.

"CAT: Cross Attention in Vision Transformer", Lin et al., arXiv 2106.05786, ICME 2022.

    X = LN(conv 4x4, stride 4 (x)) + ape                                  (`ape` may be left out)
    stage: triples of blocks IPSA -> CPSA -> IPSA; before all but the first, merging of 2x2 tokens
    block: x = x + DropPath(A(LN x));   x = x + DropPath(MLP(LN x))
    IPSA:  tokens are the P^2 positions of a patch, P x P of the map; heads; relative bias (Swin's
           windows, never shifted)
    CPSA:  of each channel, tokens are the patches, each with the P^2 values of that channel: one
           head of width P^2, shared by all channels, without positions
    logits = head(mean(LN X))

P is 7, or the smaller side of a smaller map: it is fixed by `img_size`, and CPSA's weights have
widths of P^2. Three blocks see the whole map.

Departures: sizes that patches do not divide are padded with zeros at the bottom and at the right
(of the picture, of the normalised map, of the cells to merge), the added keys are hidden in IPSA;
the authors take multiples of 224 alone. `ape` is resized for other sizes. CAT-T-v2, which the
authors list without a configuration, is not here. Gradient checkpointing is off unless asked for.

Expected at 224 (M parameters, GMACs): tiny 16.87, 2.77; small 37.29, 6.06; base 51.53, 8.93.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import crosspatch._torchvision  # noqa: F401

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from timm.models import generate_default_cfgs
from torch import Tensor, nn

from crosspatch.layers.first_weights import drawn, init_linear
from crosspatch.layers.linear import Linear
from crosspatch.layers.mlp import Mlp
from crosspatch.layers.patch_embed import pair
from crosspatch.layers.position import Table, resize_table, resize_tables
from crosspatch.layers.stage import drop_rates, one_a_stage
from crosspatch.layers.windows import (
    PatchMerging,
    Size,
    WindowAttention,
    counts,
    fitted,
    from_windows,
    pad_to,
    to_windows,
)
from crosspatch.models.pyramid import Pyramid, Stage
from crosspatch.models.registry import register, settings, unwrapped

STEMS = ("conv", "slice")
Norm = Callable[[int], nn.Module]


class Embed(nn.Module):
    """Patches of pictures (B, C_in, H, W), normalised: (B, h, w, dim), with `ape` if there is one.

    stem: "conv", or "slice": pixels of 2x2 cells become channels, (0,0), (1,0), (0,1), (1,1) by row
    and column, until cells are patches; then a 1x1 convolution. grid: (h, w) of `ape`, None for no
    positions.
    """

    ape: nn.Parameter | None

    def __init__(
        self,
        in_chans: int,
        dim: int,
        patch_size: int,
        stem: str,
        grid: Size | None,
        norm: Norm,
        drop: float,
    ) -> None:
        super().__init__()
        self.patch_size, self.grid, self.stem = (patch_size, patch_size), grid, stem
        self.rounds = int(math.log2(patch_size))
        if stem == "slice":
            self.proj = nn.Conv2d(in_chans * patch_size**2, dim, 1)
        else:
            self.proj = nn.Conv2d(in_chans, dim, patch_size, patch_size)
        self.norm = norm(dim)
        self.ape = drawn(1, grid[0] * grid[1], dim) if grid is not None else None
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        down, right = (-s % p for s, p in zip(x.shape[2:], self.patch_size, strict=True))
        x = F.pad(x, (0, right, 0, down)) if down or right else x
        if self.stem == "slice":
            for _ in range(self.rounds):
                x = torch.cat([x[..., r::2, c::2] for c in (0, 1) for r in (0, 1)], dim=1)
        x = self.norm(self.proj(x).permute(0, 2, 3, 1))
        if self.ape is not None and self.grid is not None:
            size = (x.shape[1], x.shape[2])
            x = x + resize_table(self.ape, self.grid, size, 0).unflatten(1, size)
        return self.drop(x)


class CrossPatchAttention(nn.Module):
    """CPSA of a map (B, H, W, C), of any size: attention over its patches, channel by channel.

    Parameters do not depend on C nor on the size of the map.
    """

    def __init__(
        self,
        patch: Size,
        *,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.patch, self.attn_drop = patch, attn_drop
        width = patch[0] * patch[1]
        self.qkv = Linear(width, 3 * width, bias=qkv_bias)
        self.proj = Linear(width, width)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        size = (x.shape[1], x.shape[2])
        x = to_windows(pad_to(x, self.patch), self.patch).permute(0, 3, 1, 2)  # (B, C, n, P^2)
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        drop = self.attn_drop if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=drop)
        # kernels differ in how their output lies: an exported graph must not depend on it
        y = self.proj_drop(self.proj(y.clone(memory_format=torch.contiguous_format)))
        return from_windows(y.permute(0, 2, 3, 1), self.patch, size)


class Block(nn.Module):
    """An attention and an MLP, each added to a map (B, H, W, C) behind a norm of its own."""

    def __init__(
        self,
        attention: nn.Module,
        dim: int,
        mlp_ratio: float,
        drop: float,
        drop_path: float,
        norm: Norm,
    ) -> None:
        super().__init__()
        self.norm1 = norm(dim)
        self.attn = attention
        self.norm2 = norm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=drop)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Triple(nn.Module):
    """IPSA, CPSA, IPSA: three blocks with one rate of drop path.

    size: (H, W) of the maps to come; ipsa_drop, cpsa_drop: dropout of their attention.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        patch: Size,
        size: Size,
        drop_path: float,
        *,
        mlp_ratio: float,
        qkv_bias: bool,
        drop: float,
        ipsa_drop: float,
        cpsa_drop: float,
        norm: Norm,
    ) -> None:
        super().__init__()
        common: dict[str, Any] = {"qkv_bias": qkv_bias, "proj_drop": drop}
        inner = partial(
            WindowAttention, dim, heads, patch, size=size, attn_drop=ipsa_drop, **common
        )
        block = partial(
            Block, dim=dim, mlp_ratio=mlp_ratio, drop=drop, drop_path=drop_path, norm=norm
        )
        self.pre_ipsa = block(inner())
        self.cpsa = block(CrossPatchAttention(patch, attn_drop=cpsa_drop, **common))
        self.post_ipsa = block(inner())

    def forward(self, x: Tensor) -> Tensor:
        return self.post_ipsa(self.cpsa(self.pre_ipsa(x)))


class CAT(Pyramid):
    """The network; argument names are Swin's, which the authors keep.

    img_size: the side or (H, W) that patches and positions are laid out for; pictures of any size
    run. patch_size: the pixels of a token, a power of two for the stem "slice". depths: triples per
    stage. window_size: P, cut to the smaller side of a smaller map where `fit_windows` is on (the
    authors' rule); off, every stage keeps it, and weights fit whatever the size is. ape: absolute
    positions, off by default as in the authors' class, on in the variants. drop_rate: before the
    head; proj_drop_rate: the authors' drop rate. attn_drop_rate: of IPSA and, where
    `cpsa_attn_drop_rate` says nothing, of CPSA. Raises ValueError for shapes that do not agree.
    """

    channels_last = True

    def __init__(
        self,
        img_size: int | Size = 224,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 96,
        depths: Sequence[int] = (1, 1, 3, 1),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 7,
        fit_windows: bool = True,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        ape: bool = False,
        stem: str = "conv",
        patch_norm: bool = True,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        cpsa_attn_drop_rate: float | None = None,
        drop_path_rate: float = 0.0,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        _check(patch_size, depths, num_heads, stem)
        norm = partial(nn.LayerNorm, eps=norm_eps)
        triple = partial(
            Triple, mlp_ratio=mlp_ratio, qkv_bias=qkv_bias, drop=proj_drop_rate,
            ipsa_drop=attn_drop_rate, norm=norm,
            cpsa_drop=attn_drop_rate if cpsa_attn_drop_rate is None else cpsa_attn_drop_rate,
        )  # fmt: skip
        size = counts(img_size, patch_size)
        self.stem = Embed(
            in_chans, embed_dim, patch_size, stem, size if ape else None,
            norm if patch_norm else nn.Identity, proj_drop_rate,
        )  # fmt: skip
        rates = drop_rates(drop_path_rate, depths)
        self.stages, dim = nn.ModuleList(), embed_dim
        for i, (mine, heads) in enumerate(zip(rates, num_heads, strict=True)):
            merging = None
            if i:
                merging, dim, size = PatchMerging(dim, norm=norm), 2 * dim, counts(size, 2)
            patch = fitted(window_size, size) if fit_windows else pair(window_size)
            blocks = [triple(dim, heads, patch, size, rate) for rate in mine]
            self.stages.append(Stage(merging, blocks))
        self.norm = norm(dim)
        self.apply(init_linear)
        self.finish(
            [embed_dim * 2**i for i in range(len(depths))],
            [patch_size * 2**i for i in range(len(depths))],
            img_size=img_size, in_chans=in_chans, num_classes=num_classes,
            global_pool=global_pool, drop_rate=drop_rate,
        )  # fmt: skip

    @classmethod
    def from_authors(
        cls,
        *,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        qk_scale: float | None = None,
        use_checkpoint: bool = False,
        **build: Any,
    ) -> CAT:
        """The network of the authors' arguments, which are Swin's; their dropout is inside blocks.

        `use_checkpoint` changes no number, and here it is obeyed. Raises ValueError for a qk_scale
        of one's own.
        """
        if qk_scale is not None:
            raise ValueError(f"qk_scale {qk_scale}; expected None, the root of a head's width")
        model = cls(proj_drop_rate=drop_rate, attn_drop_rate=attn_drop_rate, **build)
        model.set_grad_checkpointing(use_checkpoint)
        return model

    def window(self, stage: int) -> Size:
        """P of a stage, as (height, width)."""
        block: Any = self.stages[stage].blocks
        return block[0].cpsa.attn.patch

    def no_weight_decay(self) -> set[str]:
        """Positions and bias tables."""
        kinds = ("ape", "relative_position_bias_table")
        return {name for name, _ in self.named_parameters() if name.endswith(kinds)}


def _check(patch_size: int, depths: Sequence[int], num_heads: Sequence[int], stem: str) -> None:
    if stem not in STEMS:
        raise ValueError(f"stem {stem!r}; expected one of {', '.join(STEMS)}")
    if stem == "slice" and patch_size & (patch_size - 1):
        raise ValueError(f"patch_size {patch_size}; the stem 'slice' takes a power of two")
    one_a_stage(len(depths), num_heads=num_heads)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: CAT) -> dict[str, Tensor]:
    """A released state dict under the model's names: out of {"model": …}, without the authors'
    index, positions resized where they belong to a square of another size."""
    state = {
        _renamed(name): value
        for name, value in unwrapped(state_dict).items()
        if not name.endswith("relative_position_index")
    }
    stem = model.stem
    if isinstance(stem, Embed) and stem.grid is not None:
        return resize_tables(state, {"stem.ape": Table(stem.grid, 0)})
    return state


def _renamed(name: str) -> str:
    """The authors' merging ends a stage, ours begins the next."""
    if found := re.fullmatch(r"layers\.(\d+)\.downsample\.(.+)", name):
        return f"stages.{int(found[1]) + 1}.downsample.{found[2]}"
    name = re.sub(r"^layers\.(\d+)\.(\w+_ipsa|cpsa)_blocks\.(\d+)", r"stages.\1.blocks.\3.\2", name)
    return re.sub(r"^(?:(ape$)|patch_embed\.)", r"stem.\1", name)


def _variant(width: int, heads: int, depth: int) -> dict[str, Any]:
    return {
        "embed_dim": width,
        "depths": (1, 1, depth, 1),
        "num_heads": tuple(heads * 2**i for i in range(4)),
        "ape": True,
    }


VARIANTS: dict[str, dict[str, Any]] = {
    "cat_tiny": _variant(64, 2, 3),
    "cat_small": _variant(96, 3, 3),
    "cat_base": _variant(96, 3, 6),
}
# Ours, for small pictures: patches of 4 tokens, and no positions.
SMALL: dict[str, dict[str, Any]] = {
    "cat_micro_32": {
        "img_size": 32, "patch_size": 2, "embed_dim": 24, "depths": (1, 1), "num_heads": (1, 2),
        "window_size": 4,
    }
}  # fmt: skip
default_cfgs = generate_default_cfgs(
    {
        name: settings(224, "stem.proj", "head", pool_size=(7, 7), crop_pct=0.875)
        for name in VARIANTS
    }
    | {name: settings(32, "stem.proj", "head", pool_size=(8, 8)) for name in SMALL}
)
register(__name__, CAT, VARIANTS, checkpoint_filter_fn, out_indices=(0, 1, 2, 3))
register(__name__, CAT, SMALL, checkpoint_filter_fn, out_indices=(0, 1))
