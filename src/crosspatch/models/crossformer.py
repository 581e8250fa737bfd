# SPDX-License-Identifier: Apache-2.0
"""CrossFormer and CrossFormer++: tokens of several patch sizes, attention near and far in turn.

"CrossFormer: A Versatile Vision Transformer Hinging on Cross-scale Attention", Wang et al., arXiv
2108.00154, ICLR 2022; "CrossFormer++", arXiv 2303.06908, TPAMI 2023.

    x -> CEL -> blocks -> CEL -> blocks -> CEL -> blocks -> CEL -> blocks -> LN -> mean -> head
    CEL, of the picture:      LN([conv4(x), conv8(x), conv16(x), conv32(x)]), each of stride 4, with
                              D/2, D/4, D/8 and D/8 channels            cross-scale embedding layer
    CEL, between two stages:  [conv2(LN x), conv4(LN x)], each of stride 2, with D and D channels
    block:      x = x + DropPath(Attention(LN x));  x = x + DropPath(MLP(LN x))
    Attention = softmax(q k^T / sqrt d + DPB[offset of the two tokens]) v, within groups of GxG
      even blocks  SDA: a group is a window of GxG tokens
      odd blocks   LDA: a group is every I-th token, in row and column, of GI x GI tokens
    DPB (dy, dx) = Linear(2 -> P), then three times Linear(ReLU(LN .)); P = D / 16
    ++:         groups grow, [4, 4, 14, 7], and after every third block of a stage (not its last)
                x = LN(depthwise 3x3 (x)), the amplitude cooling layer (ACL)

A map that groups do not divide is padded with zeros, which no token sees; one no larger than a
group, on an axis, is cut into groups of its smaller side.

Departures: padding, masks and groups follow each picture, not one size fixed at construction; odd
sides are padded before a CEL between stages, where the authors refuse them; the S of CrossFormer++,
published with 4.9 G, counts 4.4. The bias is kept between passes without gradients while its
weights stay as they are.

Expected (M parameters, GMACs at 224): tiny 27.78, 2.86; small 30.66, 4.91; base 51.97, 9.16; large
91.97, 16.11; ++ small 23.33, 4.43; base 51.99, 9.59; large 92.00, 16.72; huge 95.96, 22.00.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from operator import mul
from typing import Any

import crosspatch._torchvision  # noqa: F401

import torch
from timm.models import generate_default_cfgs
from torch import Tensor, nn

from crosspatch.layers.first_weights import init_linear
from crosspatch.layers.patch_embed import pair
from crosspatch.layers.stage import drop_rates, each, one_a_stage
from crosspatch.layers.windows import counts, pad_to
from crosspatch.models.crossformer_blocks import PADDINGS, CrossFormerBlock, Grouping
from crosspatch.models.pyramid import Pyramid, Stage
from crosspatch.models.registry import register, settings, unwrapped

ACL_EVERY = 3  # blocks


class CrossScaleEmbed(nn.Module):
    """Convolutions of several kernels and one stride, side by side: the picture (B, in_chans, H, W)
    to a map (B, H / stride, W / stride, dim), rounded down."""

    def __init__(self, in_chans: int, dim: int, kernels: Sequence[int]) -> None:
        super().__init__()
        self.projs = _convolutions(in_chans, dim, kernels)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(torch.cat([conv(x) for conv in self.projs], dim=1).permute(0, 2, 3, 1))


class CrossScaleMerge(nn.Module):
    """The same between two stages: (B, H, W, C) to (B, H / 2, W / 2, dim), odd sides padded."""

    def __init__(self, in_chans: int, dim: int, kernels: Sequence[int]) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(in_chans)
        self.reductions = _convolutions(in_chans, dim, kernels)
        self.stride = min(kernels)

    def forward(self, x: Tensor) -> Tensor:
        x = pad_to(self.norm(x), (self.stride, self.stride)).permute(0, 3, 1, 2)
        return torch.cat([conv(x) for conv in self.reductions], dim=1).permute(0, 2, 3, 1)


def _convolutions(in_chans: int, dim: int, kernels: Sequence[int]) -> nn.ModuleList:
    """Widths halve from one kernel to the next, the last repeats the one before; the stride is the
    smallest kernel."""
    stride, count = min(kernels), len(kernels)
    if dim % 2 ** (count - 1) or any((kernel - stride) % 2 for kernel in kernels):
        raise ValueError(
            f"kernels {tuple(kernels)} for a width of {dim}; expected kernels an even number apart "
            f"and a width that divides by {2 ** (count - 1)}"
        )
    widths = [dim // 2 ** min(i + 1, count - 1) for i in range(count)]
    return nn.ModuleList(
        nn.Conv2d(in_chans, width, kernel, stride, (kernel - stride) // 2)
        for kernel, width in zip(sorted(kernels), widths, strict=True)
    )


class CrossFormer(Pyramid):
    """The network; argument names are timm's or the authors'.

    patch_size, merge_size: kernels of the embedding layers, whose smallest is the stride.
    group_size: G, and crs_interval: I of LDA, per stage. adaptive_interval: I = ceil(H / G) of each
    map. pad_type: 0 pads maps at the bottom and right, 1 evenly (an odd rest goes there).
    use_acl: cooling layers. pos_ratio: the stage's width over P (16 in the authors' code, 4 in the
    paper's text). img_size: what it is described for, any size is taken. Raises ValueError for
    shapes that do not agree.
    """

    channels_last = True

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: Sequence[int] = (4, 8, 16, 32),
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 64,
        depths: Sequence[int] = (1, 1, 8, 6),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        group_size: int | Sequence[int] = 7,
        crs_interval: Sequence[int] = (8, 4, 2, 1),
        merge_size: Sequence[Sequence[int]] = ((2, 4), (2, 4), (2, 4)),
        mlp_ratio: float | Sequence[float] = 4.0,
        qkv_bias: bool = True,
        pos_ratio: int = 16,
        adaptive_interval: bool = False,
        pad_type: int = 0,
        use_acl: bool = False,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        count = len(depths)
        group_size, mlp_ratio = each(count, group_size=group_size, mlp_ratio=mlp_ratio)
        _check(count, num_heads, group_size, crs_interval, merge_size, pad_type)
        distant = [None] * count if adaptive_interval else crs_interval
        rates = drop_rates(drop_path_rate, depths)
        steps = [min(patch_size), *(min(kernels) for kernels in merge_size[: count - 1])]
        (height, width), size = pair(img_size), (0, 0)
        self.stem, stages = CrossScaleEmbed(in_chans, embed_dim, patch_size), []
        for i, mine in enumerate(rates):
            dim, downsample = embed_dim * 2**i, None
            if i:
                downsample = CrossScaleMerge(dim // 2, dim, merge_size[i - 1])
                size = counts(size, steps[i])
            else:
                size = height // steps[0], width // steps[0]
            blocks = _blocks(
                dim,
                num_heads[i],
                [Grouping(group_size[i], interval, pad_type) for interval in (1, distant[i])],
                mine,
                use_acl,
                mlp_ratio=mlp_ratio[i],
                size=size,
                pos_dim=max(1, dim // pos_ratio),
                qkv_bias=qkv_bias,
                attn_drop=attn_drop_rate,
                proj_drop=proj_drop_rate,
            )
            stages.append(Stage(downsample, blocks))
        self.stages = nn.ModuleList(stages)
        self.norm = nn.LayerNorm(embed_dim * 2 ** (count - 1))
        self.finish(
            [embed_dim * 2**i for i in range(count)],
            list(accumulate(steps, mul)),
            img_size=img_size,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
        )
        self.apply(init_linear)

    @classmethod
    def from_authors(cls, **build: Any) -> CrossFormer:
        """The network that the authors' constructor gives for these arguments; `drop_rate` is
        theirs, of projections. Raises ValueError for options that are not built here."""
        renamed = {"drop_rate": "proj_drop_rate", "adapt_interval": "adaptive_interval"}
        idle = ("ape", "use_cpe", "use_checkpoint", "qk_scale", "patch_norm", "norm_layer")
        build = {renamed.get(name, name): value for name, value in build.items()}
        wanted = [n for n in idle[:2] if build.get(n)]
        if wanted or build.get("qk_scale") is not None:
            raise ValueError(f"{', '.join(wanted) or 'qk_scale'}: not part of the paper's networks")
        return cls(**{name: value for name, value in build.items() if name not in idle})


def _blocks(
    dim: int,
    heads: int,
    groupings: Sequence[Grouping],
    rates: Sequence[float],
    use_acl: bool,
    **arguments: Any,
) -> list[CrossFormerBlock]:
    """The blocks of a stage, one per drop path rate, whose `groupings` take turns."""
    acl = [use_acl and (b + 1) % ACL_EVERY == 0 and b + 1 < len(rates) for b in range(len(rates))]
    return [
        CrossFormerBlock(dim, heads, groupings[b % 2], drop_path=rate, acl=acl[b], **arguments)
        for b, rate in enumerate(rates)
    ]


def _check(count, num_heads, group_size, crs_interval, merge_size, pad_type) -> None:
    one_a_stage(count, num_heads=num_heads, crs_interval=crs_interval)
    if len(merge_size) < count - 1:
        raise ValueError(f"merge_size has {len(merge_size)} entries for {count - 1} merges")
    if min(*group_size, *crs_interval) < 1:
        raise ValueError(
            f"group_size {group_size}, crs_interval {crs_interval}; expected 1 or more"
        )
    if pad_type not in PADDINGS:
        raise ValueError(f"pad_type {pad_type}; expected 0 (bottom and right) or 1 (all sides)")


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: CrossFormer) -> dict[str, Tensor]:
    """A released state dict under the model's names, without the authors' buffers; of both of their
    branches. An embedding layer belongs to the stage that it feeds."""
    del model
    made = {}
    for name, value in unwrapped(state_dict).items():
        head, *rest = name.split(".")
        if rest[-2:] in (["attn", "biases"], ["attn", "relative_position_index"]):
            continue
        if head == "patch_embed":
            head = "stem"
        elif head == "layers":
            number = int(rest[0]) + (rest[1] == "downsample")
            head, rest = "stages", [str(number), *rest[1:]]
        made[".".join((head, *rest))] = value
    return made


def _variant(width: int, heads: int, depths: tuple[int, ...], **more: Any) -> dict[str, Any]:
    num_heads = tuple(heads * 2**i for i in range(4))
    return {"embed_dim": width, "depths": depths, "num_heads": num_heads, **more}


PLUS = {"group_size": (4, 4, 14, 7), "crs_interval": (4, 2, 1, 1), "use_acl": True}
VARIANTS = {
    "crossformer_tiny": _variant(64, 2, (1, 1, 8, 6)),
    "crossformer_small": _variant(96, 3, (2, 2, 6, 2)),
    "crossformer_base": _variant(96, 3, (2, 2, 18, 2)),
    "crossformer_large": _variant(128, 4, (2, 2, 18, 2)),
    "crossformer_pp_small": _variant(64, 2, (2, 2, 18, 2), **PLUS),
    "crossformer_pp_base": _variant(96, 3, (2, 2, 18, 2), **PLUS),
    "crossformer_pp_large": _variant(128, 4, (2, 2, 18, 2), **PLUS),
    "crossformer_pp_huge": _variant(128, 4, (6, 6, 18, 2), **PLUS),
}
# Ours, for small pictures: maps of 16, 8 and 4, whose groups of distant tokens span all of them.
SMALL = {
    "crossformer_micro_32": {
        "img_size": 32,
        "patch_size": (2, 4, 8),
        "embed_dim": 24,
        "depths": (2, 2, 1),
        "num_heads": (1, 2, 4),
        "group_size": 4,
        "crs_interval": (4, 2, 1),
        "pos_ratio": 4,
    }
}


def _settings(side: int, convolutions: int, last: int) -> Any:
    first = tuple(f"stem.projs.{i}" for i in range(convolutions))
    return settings(side, first, "head", pool_size=(last, last))


default_cfgs = generate_default_cfgs(
    {name: _settings(224, 4, 7) for name in VARIANTS}
    | {name: _settings(32, 3, 4) for name in SMALL}
)
register(__name__, CrossFormer, VARIANTS, checkpoint_filter_fn, out_indices=(0, 1, 2, 3))
register(__name__, CrossFormer, SMALL, checkpoint_filter_fn, out_indices=(0, 1, 2))
