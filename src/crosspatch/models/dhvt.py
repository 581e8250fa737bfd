# SPDX-License-Identifier: Apache-2.0
"""DHVT: a ViT without positions whose MLP is convolutional and whose heads have tokens.

"Bridging the Gap Between Vision Transformers and Convolutional Neural Networks on Small Datasets",
Lu et al., arXiv 2210.05958, NeurIPS 2022.

    SOPE   x -> a0 x + b0 -> [conv 3x3/2 -> BN] with GELU between, log2(P) times -> a1 x + b1
    z0   = [class; patches]
    z    = z + DropPath(HI-MHSA(LN z));   z = z + DropPath(DAFF(LN z))                     a block

    HI-MHSA   m_g = mean of channel group g over all tokens, class included               g = 1 … h
              t_g = GELU(LN(W m_g)), its h groups each normalised;   t = t + E        h head tokens
              [class, patches, t] through ordinary attention;   class += mean of t;   t is dropped
    DAFF      s = GELU(BN(conv1x1 p));   s = s + GELU(BN(dwconv3x3 s));   p' = BN(conv1x1 s)
              class' = class * W2 GELU(W1 mean(p'))           without a sigmoid
    logits = W LN(class)

With P = 2 the one convolution of SOPE is followed by GELU. Each part can be left out, which gives
the paper's ablation down to DeiT: `sope`, `daff`, `head_tokens`, and `pos_embed="learn"`.

Departures: pictures of any size and shape run, where the authors' take the square root of the
number of patches; batch normalisation is per process unless the training shares it; the affines and
the head embeddings are not decayed; the authors' plain ViT and their distillation token, which
crash, are the ablation and DeiT's own (`deit`).

Expected (M parameters, GMACs): at 32, 100 classes: tiny patch4 6.01, 0.39; small patch4 23.43,
1.53; tiny patch2 5.85, 1.71; small patch2 22.77, 6.20. At 224: domain (345 classes) tiny 6.11,
1.36; small 23.79, 5.03; ImageNet tiny 6.27, 1.36; small 24.04, 5.03.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import crosspatch._torchvision  # noqa: F401

import torch
from timm.layers import DropPath
from timm.models import generate_default_cfgs
from torch import Tensor, nn

from crosspatch.layers.attention import Attention
from crosspatch.layers.first_weights import drawn, init_linear
from crosspatch.layers.linear import Linear
from crosspatch.layers.mlp import Mlp
from crosspatch.layers.patch_embed import PatchEmbed, flatten_grid, pair
from crosspatch.layers.position import resize_tables
from crosspatch.layers.windows import counts
from crosspatch.models.flat import FlatTokens
from crosspatch.models.registry import register, settings, unwrapped

Grid = tuple[int, int]
LayerNorm = partial(nn.LayerNorm, eps=1e-6)


class Affine(nn.Module):
    """alpha x + beta per channel; x: (B, C, H, W)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, dim, 1, 1))
        self.beta = nn.Parameter(torch.zeros(1, dim, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.alpha * x + self.beta


class OverlappingPatchEmbed(nn.Module):
    """SOPE: (B, C, H, W) to (B, h * w, dim), each side halved, rounded up, log2(patch) times.

    Raises ValueError where the patch is no power of two, or too large for `dim`.
    """

    def __init__(self, in_chans: int, dim: int, patch_size: int) -> None:
        super().__init__()
        steps = patch_size.bit_length() - 1
        if steps < 1 or 2**steps != patch_size or dim % 2 ** (steps - 1):
            raise ValueError(
                f"patch_size {patch_size} with embed_dim {dim}; expected a power of two, 2 or "
                "more, half of which divides embed_dim"
            )
        layers: list[nn.Module] = []
        before = in_chans
        for step in reversed(range(steps)):
            width = dim // 2**step
            conv = nn.Conv2d(before, width, 3, 2, 1, bias=False)
            layers.append(nn.Sequential(conv, nn.BatchNorm2d(width)))
            if step or steps == 1:
                layers.append(nn.GELU())
            before = width
        self.proj = nn.Sequential(*layers)
        self.pre_affine, self.post_affine = Affine(in_chans), Affine(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pre_affine(x).contiguous(memory_format=torch.channels_last)
        return flatten_grid(self.post_affine(self.proj(x)))


class HeadTokenAttention(Attention):
    """HI-MHSA: attention of the class token, the patches, and one token of each head."""

    def __init__(self, dim: int, heads: int, **options: Any) -> None:
        super().__init__(dim, heads, **options)
        size = dim // heads
        self.ht_proj = Linear(size, dim)
        self.ht_norm = nn.LayerNorm(size)
        self.ht_act = nn.GELU()
        self.pos_embed = drawn(1, heads, dim)  # of the heads

    def head_tokens(self, x: Tensor) -> Tensor:
        """Tokens (B, n, D) to those of the heads, (B, h, D)."""
        groups = (self.num_heads, -1)
        found = self.ht_proj(x.mean(dim=1).unflatten(-1, groups)).unflatten(-1, groups)
        return self.ht_act(self.ht_norm(found)).flatten(2) + self.pos_embed

    def forward(self, x: Tensor, *context: Any, **more: Any) -> Tensor:
        """x: (B, n, D), the class token first, to (B, n, D)."""
        count = x.shape[1]
        y = super().forward(torch.cat([x, self.head_tokens(x)], dim=1), *context, **more)
        read = y[:, :1] + y[:, count:].mean(dim=1, keepdim=True)
        return torch.cat([read, y[:, 1:count]], dim=1)


class Daff(nn.Module):
    """Dynamic aggregation: a convolutional MLP of the patches, whose mean scales the class
    token."""

    def __init__(self, dim: int, hidden: int, reduction: int = 4) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(dim, hidden, 1), nn.BatchNorm2d(hidden)
        self.conv2 = nn.Conv2d(hidden, hidden, 3, 1, 1, groups=hidden)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.conv3, self.bn3 = nn.Conv2d(hidden, dim, 1), nn.BatchNorm2d(dim)
        self.compress = Linear(dim, dim // reduction)
        self.excitation = Linear(dim // reduction, dim)
        self.act = nn.GELU()

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """x: (B, 1 + h * w, D), the class token first."""
        image = x[:, 1:].transpose(1, 2).unflatten(2, grid)
        hidden = self.act(self.bn1(self.conv1(image)))
        hidden = hidden + self.act(self.bn2(self.conv2(hidden)))
        image = self.bn3(self.conv3(hidden))
        scale = self.excitation(self.act(self.compress(image.mean(dim=(2, 3)))))
        return torch.cat([x[:, :1] * scale[:, None], flatten_grid(image)], dim=1)


class HybridBlock(nn.Module):
    """x += DropPath(attention(LN x)); x += DropPath(feed-forward(LN x))."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        hidden: int,
        *,
        daff: bool,
        head_tokens: bool,
        qkv_bias: bool,
        attn_drop: float,
        proj_drop: float,
        drop_path: float,
    ) -> None:
        super().__init__()
        attention = HeadTokenAttention if head_tokens else Attention
        self.norm1 = LayerNorm(dim)
        self.attn = attention(
            dim, num_heads, qkv_bias=qkv_bias, attn_drop=attn_drop, proj_drop=proj_drop
        )
        self.norm2 = LayerNorm(dim)
        self.mlp = Daff(dim, hidden) if daff else Mlp(dim, hidden, drop=proj_drop)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        normed = self.norm2(x)
        y = self.mlp(normed, grid) if isinstance(self.mlp, Daff) else self.mlp(normed)
        return x + self.drop_path(y)


class DHVT(FlatTokens):
    """The network; argument names are timm's.

    sope, daff, head_tokens: its three parts, each of which may be left out; pos_embed: "none", or
    "learn" for a table, which is resized for pictures of another size. img_size: what it is
    described for; any size runs (multiples of the patch without `sope`). Raises ValueError for
    shapes that do not agree.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 32,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 4,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        sope: bool = True,
        daff: bool = True,
        head_tokens: bool = True,
        pos_embed: str = "none",
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if pos_embed not in ("none", "learn"):
            raise ValueError(f"pos_embed {pos_embed!r}; expected none or learn")
        self.patch_size, self.sope = patch_size, sope
        grid = self.grid_of(pair(img_size))
        embed = OverlappingPatchEmbed if sope else PatchEmbed
        self.patch_embed = embed(in_chans, embed_dim, patch_size)
        self.cls_token = drawn(1, 1, embed_dim)
        self.pos_embed = drawn(1, 1 + math.prod(grid), embed_dim) if pos_embed == "learn" else None
        block = partial(
            HybridBlock,
            embed_dim,
            num_heads,
            int(embed_dim * mlp_ratio),
            daff=daff,
            head_tokens=head_tokens,
            qkv_bias=qkv_bias,
            attn_drop=attn_drop_rate,
            proj_drop=proj_drop_rate,
        )
        rates = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(block(drop_path=rate) for rate in rates)
        self.norm = LayerNorm(embed_dim)
        shape = {"img_size": img_size, "in_chans": in_chans, "num_classes": num_classes}
        how = {"global_pool": global_pool, "drop_rate": drop_rate}
        self.finish(embed_dim, grid, patch_size, **shape, **how)
        self.blocks.apply(init_linear)

    def grid_of(self, size: Grid) -> Grid:
        """Rows and columns of patches of a picture (H, W). Raises ValueError where plain patches do
        not divide it."""
        patch = self.patch_size
        if not self.sope and any(side % patch for side in size):
            raise ValueError(
                f"an image of {size[0]}x{size[1]}; without sope its sides must be multiples of the "
                f"patch ({patch}): resize it, or build the model with img_size=… of such"
            )
        return counts(size, patch)

    def patches(self, x: Tensor) -> tuple[Tensor, Grid]:
        """Images (B, in_chans, H, W) to patches (B, h * w, C) and their grid (h, w)."""
        return self.patch_embed(x), self.grid_of((x.shape[2], x.shape[3]))

    def no_weight_decay(self) -> set[str]:
        """Tables, tokens and affines."""
        free = ("pos_embed", "cls_token", ".alpha", ".beta")
        return {name for name, _ in self.named_parameters() if name.endswith(free)}

    @classmethod
    def from_authors(cls, /, **build: Any) -> DHVT:
        """The model that the authors' constructor builds from the arguments `build`: `fn`, one of
        their names, and what it takes. Raises ValueError for another name or argument."""
        build, name = dict(build), build.get("fn", "dhvt_tiny_cifar_patch4")
        for ignored in ("fn", "cls", "pretrained"):
            build.pop(ignored, None)
        if name not in VARIANTS:
            raise ValueError(f"{name!r}; expected one of {', '.join(VARIANTS)}")
        if not build.pop("apply_dhvt", True):
            build |= {"sope": False, "daff": False, "head_tokens": False, "pos_embed": "learn"}
        try:
            return cls(**{**VARIANTS[name], **build})
        except TypeError as error:
            raise ValueError(f"{error}; expected arguments of the authors' models") from error


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: DHVT) -> dict[str, Tensor]:
    """A released state dict: bare, or in {"model": …} or {"state_dict": …}; it fits every size. One
    without any affine is of a network whose affines are the identity."""
    state = unwrapped(state_dict)
    if not any("_affine." in name for name in state):
        own = {n: torch.zeros_like(v) for n, v in model.state_dict().items() if "_affine." in n}
        state |= {n: v + 1 if n.endswith("alpha") else v for n, v in own.items()}
    return resize_tables(state, model.position_tables())


def _variant(side: int, patch: int, dim: int, heads: int, classes: int) -> dict[str, Any]:
    return {
        "img_size": side,
        "patch_size": patch,
        "embed_dim": dim,
        "num_heads": heads,
        "num_classes": classes,
    }


VARIANTS = {
    "dhvt_tiny_cifar_patch4": _variant(32, 4, 192, 4, 100),
    "dhvt_small_cifar_patch4": _variant(32, 4, 384, 8, 100),
    "dhvt_tiny_cifar_patch2": _variant(32, 2, 192, 4, 100),
    "dhvt_small_cifar_patch2": _variant(32, 2, 384, 8, 100),
    "dhvt_tiny_domain_patch16": _variant(224, 16, 192, 4, 345),
    "dhvt_small_domain_patch16": _variant(224, 16, 384, 6, 345),
    "dhvt_tiny_imagenet_patch16": _variant(224, 16, 192, 3, 1000),
    "dhvt_small_imagenet_patch16": _variant(224, 16, 384, 6, 1000),
}
# Ours, for comparisons on small pictures and tests.
SMALL = {
    "dhvt_micro_32": _variant(32, 4, 64, 2, 1000) | {"depth": 4, "mlp_ratio": 2.0},
}


def _settings(shape: Mapping[str, Any]) -> Any:
    side = shape["img_size"] // shape["patch_size"]
    more = {"pool_size": (side, side), "num_classes": shape["num_classes"]}
    return settings(shape["img_size"], "patch_embed.proj.0.0", "head", **more)


default_cfgs = generate_default_cfgs(
    {name: _settings(shape) for name, shape in (VARIANTS | SMALL).items()}
)
register(__name__, DHVT, VARIANTS | SMALL, checkpoint_filter_fn, out_indices=3)
