# SPDX-License-Identifier: Apache-2.0
"""The transformer block of Next-ViT, with both ways of making keys; see `nextvit.py`.

"Next-ViT", Li et al., arXiv 2207.05501, section 3.3; parameter names are timm's.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import crosspatch._torchvision  # noqa: F401

import torch
import torch.nn.functional as F
from timm.layers import ConvMlp, DropPath
from timm.models import nextvit as timms
from torch import Tensor, nn

from crosspatch.layers.attention import join_heads

KEY_POOLS = ("1d", "2d")
RELU: Any = partial(nn.ReLU, inplace=True)


class PooledKeys(timms.EfficientAttention):
    """E-MHSA on tokens (B, N, C) of a map of `size`; `pool`: how keys are made, "1d" or "2d"."""

    def __init__(self, dim: int, pool: str, **more: Any) -> None:
        super().__init__(dim, **more)
        self.pool = pool

    def keys(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Tokens (B, N, C) to those that are attended to, (B, N / r^2, C)."""
        if self.sr_ratio == 1:
            return x
        x = x.transpose(1, 2)
        if self.pool == "2d":
            r = self.sr_ratio
            cells = F.avg_pool2d(
                x.unflatten(2, size), r, r, ceil_mode=True, count_include_pad=False
            )
            x = cells.flatten(2)
        else:
            x = F.avg_pool1d(x, min(self.sr_ratio**2, size[0] * size[1]))
        norm: Any = self.norm
        return norm(x).transpose(1, 2)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        keys = self.keys(x, size)
        q, k, v = (
            one.unflatten(2, (self.num_heads, self.head_dim)).transpose(1, 2)
            for one in (self.q(x), self.k(keys), self.v(keys))
        )
        drop = self.attn_drop.p if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=drop, scale=self.scale)
        return self.proj_drop(self.proj(join_heads(y)))


class TransformerBlock(nn.Module):
    """NTB: attention on a of the channels, convolution on the other b; (B, C_in, H, W)."""

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        drop_path: float,
        stride: int = 1,
        sr_ratio: int = 1,
        key_pool: str = "1d",
        mlp_ratio: float = 2.0,
        head_dim: int = 32,
        mix_block_ratio: float = 0.75,
        attn_drop: float = 0.0,
        drop: float = 0.0,
    ) -> None:
        super().__init__()
        a = attention_width(out_chs, mix_block_ratio, head_dim)
        b = out_chs - a
        self.patch_embed = timms.PatchEmbed(in_chs, a, stride)
        self.norm1 = nn.BatchNorm2d(a)
        rates = {"attn_drop": attn_drop, "proj_drop": drop}
        self.e_mhsa = PooledKeys(a, key_pool, head_dim=head_dim, sr_ratio=sr_ratio, **rates)
        self.mhsa_drop_path = DropPath(drop_path * mix_block_ratio)
        self.projection = timms.PatchEmbed(a, b)
        self.mhca = timms.ConvAttention(b, head_dim, act_layer=RELU)
        self.mhca_drop_path = DropPath(drop_path * (1 - mix_block_ratio))
        self.norm2 = nn.BatchNorm2d(out_chs)
        self.mlp = ConvMlp(out_chs, int(out_chs * mlp_ratio), act_layer=RELU, drop=drop)
        self.mlp_drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        size = (x.shape[2], x.shape[3])
        tokens = self.norm1(x).flatten(2).transpose(1, 2)
        tokens = self.mhsa_drop_path(self.e_mhsa(tokens, size))
        x = x + tokens.transpose(1, 2).unflatten(2, size)
        y = self.projection(x)
        y = y + self.mhca_drop_path(self.mhca(y))
        x = torch.cat([x, y], dim=1)
        return x + self.mlp_drop_path(self.mlp(self.norm2(x)))


def attention_width(width: int, ratio: float, head_dim: int) -> int:
    """`ratio` of `width`, rounded to heads, but not below 0.9 of it. Raises ValueError where
    convolution is left nothing, or no whole groups."""
    wanted = int(width * ratio)
    found = max(head_dim, (wanted + head_dim // 2) // head_dim * head_dim)
    found += head_dim if found < 0.9 * wanted else 0
    if found >= width or (width - found) % head_dim:
        raise ValueError(
            f"a block of {width} channels gives attention {found} in heads of {head_dim}; expected "
            f"the rest to be a positive multiple of {head_dim}"
        )
    return found
