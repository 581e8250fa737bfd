# SPDX-License-Identifier: Apache-2.0
"""MedViTV2: Next-ViT's plan with neighbourhood attention and a KAN, for medical pictures.

"Medical Image Classification with KAN-Integrated Transformers and Dilated Neighborhood Attention",
arXiv 2502.13693, Applied Soft Computing 2025.

    stem: four conv3x3-BN-ReLU, strides 2, 1, 1, 2;   logits = head(mean(BN x))
    stages: LFP .. LFP | LFP .. GFP | (LFP LFP GFP) .. | GFP .. GFP
    LFP: x = embed x;   x = x + DropPath(NA(BN x));   v = BN x;   x = x + v + G v
         G v = BN conv1x1 SE hswish BN DWConv hswish BN conv1x1 v, three times as wide inside
    GFP: x = embed x, to a channels;  t = tokens of BN x;  x = x + DropPath(E-MHSA t)
         y = embed' x, to b channels; y = y + DropPath(conv1x1(ReLU(BN(grouped conv3x3 y))))
         z = [x, y];                  z = z + DropPath(KAN(BN z))
    KAN: twice W phi(LN x),  phi_g(t) = 1 - tanh^2((t - g) / 0.33) for 8 knots g on [-2, 2]

NA is attention over 7x7 neighbourhoods (`medvitv2_attention.py`); DWConv is 7x7 in the first
stage, 3x3 later; embed is a 2x2 mean where a stage begins, then conv1x1-BN; E-MHSA has keys of the
mean of r^2 tokens in a row, r = 8, 4, 2, 1 by stage; a is 0.75 of the width, rounded to heads of
32. The parts that are Next-ViT's are those of `nextvit_blocks.py`.

The authors give NA and KAN the (B, C, H, W) buffer *reshaped* to (B, H, W, C), not permuted: tokens
are then C cells of memory in a row, mostly of one channel. Released weights need that, and it is
`layout="authors"`, square pictures only; `layout="map"`, the default, reads pixels.

Departures: the second feed-forward of GFP, which the authors build and never use, is not there (1
to 11 M parameters); checkpoints may have it. Windows larger than a map, or r^2 larger than its
number of tokens, are cut to it, so sides below 112 and oblong pictures run; the authors' do not. An
option makes neighbourhoods dilated, as the title has it: the authors' code says 1. Bias tables are
not decayed. With formula-made weights the full depth is only comparable in float64.

Expected at 224 (M parameters, GMACs): tiny 10.74, 2.66; small 27.34, 3.93; base 60.85, 7.97; large
107.42, 13.04. Drop path of the paper: 0.1, 0.1, 0.2, 0.2.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate
from operator import mul
from typing import Any

import crosspatch._torchvision  # noqa: F401

from timm.models import generate_default_cfgs
from timm.models import nextvit as timms
from torch import Tensor, nn

from crosspatch.layers.first_weights import init_weights
from crosspatch.layers.patch_embed import pair
from crosspatch.layers.stage import drop_rates
from crosspatch.layers.windows import Size, counts
from crosspatch.models.medvitv2_attention import TILE
from crosspatch.models.medvitv2_blocks import KNOTS, LAYOUTS, GlobalBlock, LocalBlock
from crosspatch.models.nextvit_blocks import KEY_POOLS, RELU
from crosspatch.models.pyramid import Pyramid, Stage
from crosspatch.models.registry import register, settings, unwrapped

GROUP = 3  # blocks of the third stage that are repeated: two local and one global
THEIRS = {"path_dropout": "drop_path_rate", "attn_drop": "attn_drop_rate", "drop": "proj_drop_rate"}


class MedViTV2(Pyramid):
    """The network; argument names are the authors' or timm's.

    img_size: the side or (H, W) that tiles of attention are laid out for; pictures of any size run.
    layout: "map", or "authors" for their weights: attention and KAN then read memory cells instead
    of pixels, and pictures must be square. stem_chs, stem_strides: of the stem's convolutions (the
    last two have the same width). depths: blocks by stage, of the third in threes. dims: widths.
    sr_ratios: r. key_pool: "1d", r^2 tokens in a row, or "2d", cells of r x r. kernel_size,
    dilation: of the neighbourhoods, dilation one number or one a stage. tile: of the attention; it
    does not change what is computed: 4 is faster, for 2 % more multiply-adds. conv_kernels: of the
    depth-wise convolutions, by stage. mix_block_ratio: the share of a global block that attends.
    kan_knots: of the KAN. Raises ValueError for shapes that do not agree.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        layout: str = "map",
        stem_chs: Sequence[int] = (64, 32, 64),
        stem_strides: Sequence[int] = (2, 1, 1, 2),
        depths: Sequence[int] = (2, 2, 6, 1),
        dims: Sequence[int] = (64, 128, 192, 384),
        strides: Sequence[int] = (1, 2, 2, 2),
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        key_pool: str = "1d",
        kernel_size: int = 7,
        dilation: int | Sequence[int] = 1,
        tile: int = TILE,
        conv_kernels: Sequence[int] = (7, 3, 3, 3),
        head_dim: int = 32,
        mix_block_ratio: float = 0.75,
        kan_knots: int = KNOTS,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        dilations = [dilation] * 4 if isinstance(dilation, int) else list(dilation)
        _check(layout, key_pool, pair(img_size), depths)
        _check_stages(
            dims=dims, strides=strides, sr_ratios=sr_ratios, dilation=dilations,
            conv_kernels=conv_kernels, stem_strides=stem_strides,
        )  # fmt: skip
        common: dict[str, Any] = {"head_dim": head_dim, "layout": layout}
        common["attn_drop"] = attn_drop_rate
        local = partial(
            LocalBlock, kernel_size=kernel_size, tile=tile, proj_drop=proj_drop_rate, **common
        )
        wide = partial(
            GlobalBlock, knots=kan_knots, key_pool=key_pool, mix_block_ratio=mix_block_ratio,
            drop=proj_drop_rate, **common,
        )  # fmt: skip
        self.stem = _stem(in_chans, stem_chs, stem_strides)
        reductions = list(accumulate((*stem_strides, *strides), mul))[len(stem_strides) :]
        rates = drop_rates(drop_path_rate, depths)
        self.stages, width = nn.ModuleList(), stem_chs[-1]
        for i, kinds in enumerate(_plan(depths)):
            size = counts(img_size, reductions[i])
            near = partial(local, size=size, dilation=dilations[i], conv_kernel=conv_kernels[i])
            made = [partial(wide, sr_ratio=sr_ratios[i]) if far else near for far in kinds]
            self.stages.append(_stage(made, width, dims[i], strides[i], rates[i]))
            width = dims[i]
        self.norm = nn.BatchNorm2d(width)
        self.apply(init_weights)
        self.finish(
            dims, reductions, img_size=img_size, in_chans=in_chans, num_classes=num_classes,
            global_pool=global_pool, drop_rate=drop_rate,
        )  # fmt: skip

    @classmethod
    def from_authors(cls, /, **build: Any) -> MedViTV2:
        """The network of the authors' constructor or, with `fn`, of their entry point of that name,
        in their layout; `use_checkpoint` changes no number, and is obeyed."""
        arguments = dict(build)
        arguments.pop("cls", None)
        entry = arguments.pop("fn", None)
        checkpointing = arguments.pop("use_checkpoint", False)
        named = VARIANTS[f"medvitv2_{entry.rpartition('_')[2]}"] if entry else {}
        renamed = {THEIRS.get(name, name): value for name, value in arguments.items()}
        model = cls(**{"layout": "authors", **named, **renamed})
        model.set_grad_checkpointing(checkpointing)
        return model

    def no_weight_decay(self) -> set[str]:
        """The bias tables."""
        return {name for name, _ in self.named_parameters() if name.endswith(".rpb")}


def _stem(in_chans: int, widths: Sequence[int], strides: Sequence[int]) -> nn.Sequential:
    first, second, third = widths
    outs = (first, second, third, third)
    return nn.Sequential(
        *(
            timms.ConvNormAct(width, out, stride=stride, act_layer=RELU)
            for width, out, stride in zip(
                (in_chans, first, second, third), outs, strides, strict=True
            )
        )
    )


def _plan(depths: Sequence[int]) -> Iterator[list[bool]]:
    """By stage, of every block: is it a global one?"""
    first, second, third, fourth = depths
    yield [False] * first
    yield [False] * (second - 1) + [True]
    yield [False, False, True] * (third // GROUP)
    yield [True] * fourth


def _stage(
    makers: Sequence[Callable[..., nn.Module]],
    width: int,
    out: int,
    stride: int,
    rates: Sequence[float],
) -> Stage:
    """A block of every maker, the first with `stride`."""
    blocks = []
    for place, (make, rate) in enumerate(zip(makers, rates, strict=True)):
        step = 1 if place else stride
        blocks.append(make(width, out, stride=step, drop_path=rate))
        width = out
    return Stage(None, blocks)


def _check(layout: str, key_pool: str, size: Size, depths: Sequence[int]) -> None:
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r}; expected one of {', '.join(LAYOUTS)}")
    if key_pool not in KEY_POOLS:
        raise ValueError(f"key_pool {key_pool!r}; expected one of {', '.join(KEY_POOLS)}")
    if layout == "authors" and size[0] != size[1]:
        raise ValueError(f"img_size {size}; layout 'authors' takes square pictures")
    if len(depths) != 4 or min(depths) < 1 or depths[2] % GROUP:
        raise ValueError(f"depths {tuple(depths)}; expected four, the third a multiple of {GROUP}")


def _check_stages(**lists: Sequence[int]) -> None:
    for name, values in lists.items():
        if len(values) != 4:
            raise ValueError(f"{name} has {len(values)} entries; expected four")


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: MedViTV2) -> dict[str, Tensor]:
    """A released state dict under the model's names: bare or in {"model": …} or {"state_dict": …},
    without the fixed knots and the feed-forward of global blocks that the authors never use."""
    stages: Any = model.stages
    places = [(i, j) for i, stage in enumerate(stages) for j in range(len(stage.blocks))]
    state = {}
    for name, value in unwrapped(state_dict).items():
        found = re.match(r"^features\.(\d+)\.(.+)", name)
        if found and int(found[1]) < len(places):
            stage, block = places[int(found[1])]
            dead = isinstance(stages[stage].blocks[block], GlobalBlock)
            if found[2].endswith(".rbf.grid") or (dead and found[2].startswith("conv.")):
                continue
            name = f"stages.{stage}.blocks.{block}.{re.sub(r'^kan.', 'mlp.', found[2])}"
        state[re.sub(r"^proj_head\.0\.", "head.", name)] = value
    return state


WIDTHS = {
    "tiny": ((2, 2, 6, 1), (64, 128, 192, 384)),
    "small": ((2, 2, 6, 2), (64, 128, 256, 512)),
    "base": ((2, 2, 6, 2), (96, 192, 384, 768)),
    "large": ((2, 2, 6, 2), (96, 256, 512, 1024)),
}
VARIANTS: dict[str, dict[str, Any]] = {
    f"medvitv2_{name}": {"depths": depths, "dims": dims} for name, (depths, dims) in WIDTHS.items()
}
# Ours, for small pictures: maps of 16, 8, 4 and 2 a side, heads of 8.
SMALL: dict[str, dict[str, Any]] = {
    "medvitv2_micro_32": {
        "img_size": 32, "stem_chs": (16, 16, 24), "stem_strides": (2, 1, 1, 1),
        "depths": (1, 2, 3, 1), "dims": (24, 32, 48, 64), "sr_ratios": (4, 2, 1, 1), "head_dim": 8,
    }
}  # fmt: skip
HALF = (0.5, 0.5, 0.5)
default_cfgs = generate_default_cfgs(
    {name: settings(224, "stem.0.conv", "head", pool_size=(7, 7), mean=HALF, std=HALF)
     for name in VARIANTS}
    | {name: settings(32, "stem.0.conv", "head", pool_size=(2, 2)) for name in SMALL}
)  # fmt: skip
register(__name__, MedViTV2, VARIANTS, checkpoint_filter_fn, out_indices=(0, 1, 2, 3))
register(__name__, MedViTV2, SMALL, checkpoint_filter_fn, out_indices=(0, 1, 2, 3))
