# SPDX-License-Identifier: Apache-2.0
"""Astroformer: inverted bottlenecks, and attention in the last stage alone, for little data.

"Astroformer: More Data Might not be all you need for Classification", Dagli, arXiv 2304.05350,
ICLR 2023 workshop. A network of CoAtNet's kind.

    stem: x = conv3x3(GELU(BN(conv3x3/2(x))))
    blocks C, stages 1 2 3:
        x = S(x) + DropPath(conv1x1(SE(GELU(BN(dw3x3(GELU(BN(conv1x1(BN x)))))))))
    blocks T, stage 4:
        x = S(x) + DropPath(attention(mean2x2(LN x)));   x = x + DropPath(MLP(LN x))
        attention: softmax(q k^T / sqrt d + bias[offset]) v over the whole map, q k v of one 1x1
        convolution with the channels of a head side by side: q, k, v of head 0, then of head 1, ..
    S, and the mean, at the first block of a stage: mean of cells of 2x2, then conv1x1 if it widens;
        dw3x3 has stride 2 there;  elsewhere S(x) = x and there is no mean
    logits = head(dropout(tanh(Linear(LN(mean over the map)))))

Blocks and stem are timm's (`MaxxVit` of the types C, C, C, T, which the authors copied); attention
and the head are ours. What the paper calls its new relative attention has no counterpart in the
authors' code beyond the above.

Departures: bias tables are made for `img_size` and resized (bicubic) for pictures of another size;
odd sides are rounded up, where timm's blocks fail: a cell of 2x2 at the border is the mean of what
lies in it. `strides` 1 keep the map of small pictures, of which 32x32 would leave one token. Sizes
are the released configurations'; the numbers that the paper prints for 3, 4 and 5 are other ones.

Expected for 10 classes at 256 (M parameters, GMACs): 0 22.8, 5.2; 1 37.4, 8.9; 2 66.4, 17.4;
3 148.9, 39.0; 4 241.1, 63.4; 5 593.6, 141.3. Dropout of the recipe: 0.1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from operator import mul
from typing import Any

import crosspatch._torchvision  # noqa: F401

import torch
import torch.nn.functional as F
from timm.models import generate_default_cfgs
from timm.models import maxxvit as timms
from torch import Tensor, nn

from crosspatch.layers.linear import Linear
from crosspatch.layers.stage import drop_rates
from crosspatch.layers.windows import (
    Size,
    bias_table,
    counts,
    fit_bias_table,
    map_bias,
    relative_index,
)
from crosspatch.models.pyramid import Pyramid, Stage
from crosspatch.models.registry import register, settings, unwrapped

TABLE = "relative_position_bias_table"
KINDS = ("C", "T")
SCHEMES = ("", "normal", "trunc_normal", "xavier_normal", "vit_eff")
HEAD_EPS = 1e-6


class Astroformer(Pyramid):
    """The network; argument names are timm's where it has them.

    img_size: the side or (H, W) that bias tables are made for; any size is taken. embed_dim,
    depths: per stage. block_type: C or T per stage, None for T in the last alone. strides: of each
    stage, 2 or 1, None for 2. stem_width: of the stem's convolutions, one number or two.
    head_hidden_size: of the layer before the classifier, None for the last width. dim_head: width
    of a head. expand_ratio, mlp_ratio: hidden widths of C, by the width it gives, and of T.
    se_ratio: squeeze of C, by the width it gives. weight_init: one of timm's schemes, "" for
    torch's. Raises ValueError for shapes that do not agree.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 256,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (2, 3, 5, 2),
        block_type: Sequence[str] | None = None,
        strides: Sequence[int] | None = None,
        stem_width: int | Sequence[int] = 64,
        head_hidden_size: int | None = None,
        dim_head: int = 32,
        expand_ratio: float = 4.0,
        mlp_ratio: float = 4.0,
        se_ratio: float = 0.25,
        kernel_size: int = 3,
        weight_init: str = "vit_eff",
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        stem, kinds, steps = _plan(stem_width, block_type, strides, len(embed_dim))
        _check(stem, embed_dim, depths, kinds, steps, dim_head, weight_init)
        conv = timms.MaxxVitConvCfg(
            expand_ratio=expand_ratio, kernel_size=kernel_size, attn_ratio=se_ratio
        )
        drops: Any = {"attn_drop": attn_drop_rate, "proj_drop": proj_drop_rate}
        attention = timms.MaxxVitTransformerCfg(
            dim_head=dim_head, expand_ratio=mlp_ratio, rel_pos_type="", **drops
        )
        self.stem = timms.Stem(in_chans, stem, act_layer=conv.act_layer)
        rates = drop_rates(drop_path_rate, depths)
        self.stages, width, size = nn.ModuleList(), stem[-1], counts(img_size, 2)
        for kind, dim, step, mine in zip(kinds, embed_dim, steps, rates, strict=True):
            size = counts(size, step)
            cfg = attention if kind == "T" else conv
            self.stages.append(_stage(width, dim, step, cfg, size, mine))
            width = dim
        self._first_weights(weight_init)
        hidden = head_hidden_size or width
        self.norm_head = PreLogits(width, hidden)
        self.finish(
            embed_dim,
            [2 * stride for stride in accumulate(steps, mul)],
            img_size=img_size, in_chans=in_chans, num_classes=num_classes,
            global_pool=global_pool, drop_rate=drop_rate,
        )  # fmt: skip
        self.head_hidden_size = hidden
        self.head = self.make_head(num_classes)

    @classmethod
    def from_authors(cls, cfg: str | None = None, **build: Any) -> Astroformer:
        """Built with the name of one of the authors' configurations, or with what stands in one.
        Raises ValueError for another name."""
        if cfg is not None and cfg not in VARIANTS:
            raise ValueError(f"cfg {cfg!r}; expected one of {', '.join(VARIANTS)}")
        return cls(**({} if cfg is None else VARIANTS[cfg]) | build)

    def _first_weights(self, scheme: str) -> None:
        if next(self.parameters()).is_meta or not scheme:
            return
        for module in self.modules():
            if isinstance(module, timms.Stem | timms.MbConvBlock | timms.TransformerBlock2d):
                module.init_weights(scheme)

    def make_head(self, num_classes: int) -> nn.Module:
        """Features (B, C) to logits, with torch's first weights; nothing for 0 classes."""
        return Linear(self.head_hidden_size, num_classes) if num_classes > 0 else nn.Identity()

    def no_weight_decay(self) -> set[str]:
        """Bias tables."""
        return {name for name, _ in self.named_parameters() if name.endswith(TABLE)}


class PreLogits(nn.Module):
    """tanh(Linear(LN x)) of what was pooled, (..., C) to (..., hidden)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=HEAD_EPS)
        self.fc = Linear(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(x)).tanh()


def _plan(
    stem_width: int | Sequence[int],
    block_type: Sequence[str] | None,
    strides: Sequence[int] | None,
    count: int,
) -> tuple[Any, list[str], list[int]]:
    """Widths of the stem, and kinds and strides of `count` stages, where nothing was said too."""
    return (
        [stem_width] * 2 if isinstance(stem_width, int) else list(stem_width),
        ["C"] * (count - 1) + ["T"] if block_type is None else list(block_type),
        [2] * count if strides is None else list(strides),
    )


def _stage(
    width: int,
    dim: int,
    stride: int,
    cfg: timms.MaxxVitConvCfg | timms.MaxxVitTransformerCfg,
    size: Size,
    rates: Sequence[float],
) -> Stage:
    """Blocks from `width` to `dim` channels, the first with `stride`; size: (H, W) of the map."""
    blocks: list[nn.Module] = []
    for number, rate in enumerate(rates):
        before, step = (dim, 1) if number else (width, stride)
        if isinstance(cfg, timms.MaxxVitConvCfg):
            block: Any = timms.MbConvBlock(before, dim, step, cfg=cfg, drop_path=rate)
        else:
            block = timms.TransformerBlock2d(before, dim, step, cfg=cfg, drop_path=rate)
            block.attn = GlobalAttention(before, dim, cfg, size)
        for module in block.modules():
            if isinstance(module, timms.Downsample2d):
                module.pool = nn.AvgPool2d(2, ceil_mode=True)
        blocks.append(block)
    return Stage(None, blocks)


class GlobalAttention(timms.Attention2d):
    """Attention over a whole map (B, dim, H, W), of any size, to (B, out, H, W); parameters are
    timm's. size: (H, W) that the bias table is made for."""

    def __init__(self, dim: int, out: int, cfg: timms.MaxxVitTransformerCfg, size: Size) -> None:
        super().__init__(
            dim, out, dim_head=cfg.dim_head, attn_drop=cfg.attn_drop, proj_drop=cfg.proj_drop
        )
        self.rel_pos = RelativeBias(size, self.num_heads)

    def forward(self, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        size, bias = (x.shape[2], x.shape[3]), shared_rel_pos
        if bias is None:
            bias = self.rel_pos(size)[None]
        tokens = self.qkv(x).flatten(2).transpose(1, 2)
        heads = tokens.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        q, k, v = heads.chunk(3, dim=-1)
        drop = self.attn_drop.p if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, bias.to(q.dtype), dropout_p=drop)
        # kernels differ in how their output lies: an exported graph must not depend on it
        y = y.transpose(2, 3).clone(memory_format=torch.contiguous_format)
        return self.proj_drop(self.proj(y.flatten(1, 2).unflatten(2, size)))


class RelativeBias(nn.Module):
    """A learned number per head and offset, of a map of `size`; resized for other maps."""

    index: Tensor

    def __init__(self, size: Size, heads: int) -> None:
        super().__init__()
        self.size = size
        self.relative_position_bias_table = bias_table(size, heads)
        self.register_buffer("index", relative_index(size), persistent=False)

    def forward(self, size: Size) -> Tensor:
        """The bias (heads, tokens, tokens) of a map of `size`."""
        return map_bias(self.relative_position_bias_table, self.size, size, self.index)


def _check(
    stem: Sequence[int],
    embed_dim: Sequence[int],
    depths: Sequence[int],
    kinds: Sequence[str],
    strides: Sequence[int],
    dim_head: int,
    scheme: str,
) -> None:
    lengths = {len(embed_dim), len(depths), len(kinds), len(strides)}
    if len(lengths) != 1 or min(depths) < 1 or len(stem) != 2:
        raise ValueError(
            f"embed_dim {tuple(embed_dim)}, depths {tuple(depths)}, block_type {tuple(kinds)}, "
            f"strides {tuple(strides)}, stem_width {tuple(stem)}; expected one a stage in each, "
            "blocks in every stage, and one or two widths of the stem"
        )
    if scheme not in SCHEMES:
        raise ValueError(f"weight_init {scheme!r}; expected one of {SCHEMES}")
    width = stem[-1]
    for kind, dim, step in zip(kinds, embed_dim, strides, strict=True):
        if kind not in KINDS or step not in (1, 2):
            raise ValueError(f"block_type {kind!r}, strides {step}; expected C or T, and 1 or 2")
        if kind == "T" and dim % dim_head:
            raise ValueError(f"a width of {dim} must divide by heads of {dim_head}")
        if step == 1 and dim != width:
            raise ValueError(
                f"a stage of stride 1 keeps its width; expected {width}, the width before it, not "
                f"{dim}"
            )
        width = dim


_NAMES = {"head.norm.": "norm_head.norm.", "head.pre_logits.": "norm_head.", "head.fc.": "head."}


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: Astroformer) -> dict[str, Tensor]:
    """A state dict in the authors' layout, which is timm's, under the names of `model`: out of
    {"model": …}, without their index, tables resized where they belong to another square map."""
    state = {}
    for name, value in unwrapped(state_dict).items():
        if name.endswith("relative_position_index"):
            continue
        for theirs, ours in _NAMES.items():
            if name.startswith(theirs):
                name = ours + name.removeprefix(theirs)
        state[name] = value
    for name, module in model.named_modules():
        key = f"{name}.{TABLE}"
        if isinstance(module, RelativeBias) and key in state:
            state[key] = fit_bias_table(state[key], module.size)
    return state


def _variant(widths: Sequence[int], depths: Sequence[int], stem: int) -> dict[str, Any]:
    return {"embed_dim": tuple(widths), "depths": tuple(depths), "stem_width": stem}


VARIANTS: dict[str, dict[str, Any]] = {
    "astroformer_0": _variant((96, 192, 384, 768), (2, 3, 5, 2), 64),
    "astroformer_1": _variant((96, 192, 384, 768), (2, 6, 14, 2), 64),
    "astroformer_2": _variant((128, 256, 512, 1024), (2, 6, 14, 2), 128),
    "astroformer_3": _variant((192, 384, 768, 1536), (2, 6, 14, 2), 192),
    "astroformer_4": _variant((192, 384, 768, 1536), (2, 12, 28, 2), 192),
    "astroformer_5": _variant((256, 512, 1280, 2048), (2, 12, 28, 2), 192),
}
# Ours, for small pictures: maps of 16x16, 8x8 and, for attention, 4x4.
SMALL: dict[str, dict[str, Any]] = {
    "astroformer_micro_32": {
        "img_size": 32,
        "embed_dim": (24, 48, 96),
        "depths": (1, 3, 3),
        "strides": (1, 2, 2),
        "stem_width": (16, 24),
    }
}
default_cfgs = generate_default_cfgs(
    {name: settings(256, "stem.conv1", "head", pool_size=(8, 8)) for name in VARIANTS}
    | {name: settings(32, "stem.conv1", "head", pool_size=(4, 4)) for name in SMALL}
)
register(__name__, Astroformer, VARIANTS, checkpoint_filter_fn, out_indices=(0, 1, 2, 3))
register(__name__, Astroformer, SMALL, checkpoint_filter_fn, out_indices=(0, 1, 2))
