# SPDX-License-Identifier: Apache-2.0
"""FcaFormer: attention blocks that also look at summary tokens of the blocks before them.

"Fcaformer: Forward Cross Attention in Hybrid Vision Transformer", Zhang, Hu, Wang, arXiv
2211.07198 (first called CabViT), ICCV 2023.

    stem       conv3x3/2-BN, GELU, conv3x3/2-BN                                   H/4 x W/4
    stages 0 1 ConvNeXt blocks: x + gamma * W2 GELU(W1 LN(DWConv7x7 x))
    stages 2 3 forward cross attention, block i of a stage with memory s (`fcaformer_blocks.py`):
               s = LN(f * [summaries of the blocks before, at most the last cab_max_d])       LSF
               x = x + gamma1 * Proj(softmax([q k_x^T / sqrt d + b_rel, q k_s^T / sqrt d + b_s])
                                     [v_x; v_s]),   q k v of LN x and of s by one Linear
               summary = DWConv7x7/4(x);   x = BN(DWConv3x3 x), no residual                   TME
               x = x + gamma2 * MLP(LN(LN x))
    between    1x1 conv-BN, GELU, depthwise 3x3/2 conv-BN, GELU, 1x1 conv-BN
    logits     head(LN(mean over the map))

`window_size` gives the version for dense tasks: stages run in windows, the memory is kept per
window, and padding lies alternately at the top left and at the bottom right.

Departures: maps need not be square, tables are made for img_size and resized for pictures of
another; padding of windows is hidden from attention unless mask_padding is False; the first value
of LayerScale and the scale of the head obey their arguments (the authors ignore both). Of the dense
version the sheet says no more than the above: the whole block, local convolution included, runs in
its window. L0, the plain version, is not in the authors' code: ours is DeiT-Ti's shape (16x16
patches, learned positions, 12 blocks of 192) of the same blocks, without a class token.

Expected at 224 (M parameters, GMACs): L0 5.87, 1.45 (the paper has 5.9 M); L1 6.19, 1.37; L2
16.28, 3.60; L3 27.89, 6.65; L4 65.64, 14.49. Drop path of the paper: 0, .1, .2, .4 from L1 on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import crosspatch._torchvision  # noqa: F401

import torch.nn.functional as F
from timm.models import generate_default_cfgs
from torch import Tensor, nn

from crosspatch.layers.conv_norm import ConvNorm
from crosspatch.layers.first_weights import drawn, init_weights
from crosspatch.layers.patch_embed import pair
from crosspatch.layers.position import resize_table, square_grid
from crosspatch.layers.stage import drop_rates, one_a_stage
from crosspatch.layers.windows import Size, counts
from crosspatch.models.fcaformer_blocks import (
    ConvBlock,
    Downsample,
    FcaBlock,
    FcaSpec,
    FcaStage,
    resize_memory,
    resize_offsets,
    summary_size,
)
from crosspatch.models.pyramid import Pyramid, Stage
from crosspatch.models.registry import register, settings, unwrapped

STRIDES = {1: (1, 1), 2: (2, 1), 4: (2, 2)}  # of the stem's convolutions
IGNORED = ("layer_scale_init_value", "head_init_scale")  # by the authors' constructor


class FcaFormer(Pyramid):
    """The network; argument names are the authors' where they have one.

    img_size: the side or (H, W) that tables are made for; pictures of any size run. embed_dims,
    depths, num_heads: per stage; 0 heads make a convolutional stage. cab_max_d: blocks whose
    summaries are remembered, None for all of the stage, 0 for no memory. window_size: side of the
    windows of each stage (0 or None: the whole map), or one for all. mask_padding: whether padding
    of windows is hidden. stem: "conv" down to `patch_size` 1, 2 or 4, or "patch", plain patches
    with learned positions. layer_scale_init_value, head_init_scale: first values.
    Raises ValueError for lists that do not agree and widths that heads do not divide.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dims: Sequence[int] = (64, 128, 192, 320),
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (0, 0, 6, 10),
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        cab_max_d: int | None = 12,
        window_size: int | Sequence[int | None] | None = None,
        mask_padding: bool = True,
        stem: str = "conv",
        patch_size: int = 4,
        layer_scale_init_value: float = 1e-6,
        head_init_scale: float = 1.0,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        windows = _windows(window_size, len(embed_dims))
        _check(embed_dims, depths, num_heads, windows, cab_max_d)
        size = pair(img_size)
        self.stem = _stem(stem, in_chans, embed_dims[0], patch_size, size)
        strides = [patch_size * 2**i for i in range(len(embed_dims))]
        rates = drop_rates(drop_path_rate, depths)
        stages, previous = [], None
        for i, (dim, mine, heads) in enumerate(zip(embed_dims, rates, num_heads, strict=True)):
            down = Downsample(previous, dim) if previous else None
            previous = dim
            gamma, drop = layer_scale_init_value, proj_drop_rate
            if not heads:
                conv = [ConvBlock(dim, mlp_ratio, gamma, drop, rate) for rate in mine]
                stages.append(Stage(down, conv))
                continue
            shape = (dim, heads, counts(size, strides[i]), windows[i], cab_max_d)
            options = (mlp_ratio, qkv_bias, mask_padding, gamma, attn_drop_rate, drop)
            spec = FcaSpec(*shape, *options)
            fca = [FcaBlock(spec, number, len(mine), rate) for number, rate in enumerate(mine)]
            stages.append(FcaStage(down, fca))
        self.stages = nn.ModuleList(stages)
        self.norm_head = nn.LayerNorm(embed_dims[-1])
        self.apply(init_weights)
        self.finish(
            embed_dims,
            strides,
            img_size=size,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
            head_init_scale=head_init_scale,
        )

    @classmethod
    def from_authors(cls, **build: Any) -> FcaFormer:
        """Built from the arguments of the authors' constructor, those that it ignores left away."""
        return cls(**{name: value for name, value in build.items() if name not in IGNORED})

    def no_weight_decay(self) -> set[str]:
        """The positions of the plain version; the tables of the blocks do decay."""
        return {"stem.pos_embed"} if isinstance(self.stem, PlainStem) else set()


class PlainStem(nn.Module):
    """Patches and learned positions, for a plain network; (B, in_chans, H, W) to (B, C, h, w).

    Pictures that patches do not divide are padded at the bottom and at the right.
    """

    def __init__(self, in_chans: int, dim: int, patch_size: int, grid: Size) -> None:
        super().__init__()
        self.patch_size, self.grid = patch_size, grid
        self.proj = nn.Conv2d(in_chans, dim, patch_size, patch_size)
        self.pos_embed = drawn(1, grid[0] * grid[1], dim)

    def forward(self, x: Tensor) -> Tensor:
        down, right = (-side % self.patch_size for side in x.shape[2:])
        x = self.proj(F.pad(x, (0, right, 0, down)) if down or right else x)
        grid = x.shape[2], x.shape[3]
        table = resize_table(self.pos_embed, self.grid, grid, 0)
        return x + table.transpose(1, 2).unflatten(2, grid)


class ConvStem(nn.Module):
    """Two 3x3 convolutions with batch norm, GELU between; (B, in_chans, H, W) to (B, C, h, w)."""

    def __init__(self, in_chans: int, dim: int, strides: tuple[int, int]) -> None:
        super().__init__()
        first = ConvNorm(in_chans, dim // 2, 3, strides[0])
        self.seq = nn.Sequential(first, nn.GELU(), ConvNorm(dim // 2, dim, 3, strides[1]))

    def forward(self, x: Tensor) -> Tensor:
        return self.seq(x)


def _stem(kind: str, in_chans: int, dim: int, patch_size: int, size: Size) -> nn.Module:
    if kind == "patch":
        return PlainStem(in_chans, dim, patch_size, counts(size, patch_size))
    if kind != "conv" or patch_size not in STRIDES:
        raise ValueError(
            f"stem {kind!r} with patch_size {patch_size}; expected 'conv' with 1, 2 or 4, or "
            "'patch' with any"
        )
    return ConvStem(in_chans, dim, STRIDES[patch_size])


def _windows(given: int | Sequence[int | None] | None, stages: int) -> list[int | None]:
    listed = [given] * stages if given is None or isinstance(given, int) else list(given)
    return [side or None for side in listed]


def _check(embed_dims, depths, num_heads, windows, cab_max_d) -> None:
    one_a_stage(len(embed_dims), depths=depths, num_heads=num_heads, window_size=windows)
    if cab_max_d is not None and cab_max_d < 0:
        raise ValueError(f"cab_max_d {cab_max_d}; expected 0 for no memory, more, or None for all")


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: FcaFormer) -> dict[str, Tensor]:
    """A released state dict under the model's names: bare or in {"model": …} or {"state_dict": …},
    the authors' index left away, tables resized to the model's maps."""
    state = {
        _renamed(name): value
        for name, value in unwrapped(state_dict).items()
        if not name.endswith("attention_bias_idxs")
    }
    for name, block in model.named_modules():
        if isinstance(block, FcaBlock):
            _resize(state, name, block)
    table = state.get("stem.pos_embed")
    if table is not None and isinstance(model.stem, PlainStem):
        grid = model.stem.grid
        if table.shape[1] != grid[0] * grid[1]:
            state["stem.pos_embed"] = resize_table(table, square_grid(table.shape[1]), grid, 0)
    return state


def _renamed(name: str) -> str:
    parts = name.split(".")
    if parts[0] == "patch_embed":
        return ".".join(["stem", *parts[1:]])
    if not parts[0].startswith("layer_"):
        return name
    number = int(parts[0].removeprefix("layer_"))
    after = parts[1] == "downsample"  # the authors' stands after a stage, ours before the next
    return ".".join(["stages", str(number + after), *parts[1:]])


def _resize(state: dict[str, Tensor], name: str, block: FcaBlock) -> None:
    """The tables of a block that were learnt on another, square map."""
    table, new = state.get(f"{name}.attention_biases"), block.spec.tabled
    if table is None or table.shape[1] == new[0] * new[1]:
        return
    old = square_grid(table.shape[1])
    state[f"{name}.attention_biases"] = resize_offsets(table, old, new)
    sizes = summary_size(old), summary_size(new)
    for leaf, axis in (("s_scale_factors", 1), ("s_token_bias", 3)):
        found = state.get(f"{name}.{leaf}")
        if found is not None:
            rows = found.transpose(axis, -1).flatten(0, -2)
            shape = (*found.shape[:axis], -1, *found.shape[axis + 1 :])
            state[f"{name}.{leaf}"] = resize_memory(rows, *sizes).reshape(shape)


VARIANTS: dict[str, dict[str, Any]] = {
    "fcaformer_l0": {
        "embed_dims": (192,), "depths": (12,), "num_heads": (3,), "stem": "patch",
        "patch_size": 16,
    },
    "fcaformer_l1": {},
    "fcaformer_l2": {
        "embed_dims": (96, 192, 320, 480), "depths": (2, 2, 7, 2), "num_heads": (0, 0, 10, 15)
    },
    "fcaformer_l3": {
        "embed_dims": (96, 192, 320, 512), "depths": (3, 6, 12, 3), "num_heads": (0, 0, 10, 16)
    },
    "fcaformer_l4": {
        "embed_dims": (128, 256, 512, 768), "depths": (3, 6, 12, 3), "num_heads": (0, 0, 16, 24)
    },
}  # fmt: skip
# ours, for small pictures: maps of 16x16 (convolutions), 8x8 and 4x4 (attention with memory)
SMALL = {
    "fcaformer_micro_32": {
        "img_size": 32, "patch_size": 2, "embed_dims": (24, 48, 80), "depths": (1, 4, 3),
        "num_heads": (0, 3, 5), "mlp_ratio": 2.0, "layer_scale_init_value": 0.1,
    }
}  # fmt: skip


def _settings(arguments: Mapping[str, Any]) -> Any:
    side = arguments.get("img_size", 224)
    first = "stem.proj" if arguments.get("stem") == "patch" else "stem.seq.0.c"
    stages = len(arguments.get("embed_dims", (0,) * 4))
    last = side // (arguments.get("patch_size", 4) * 2 ** (stages - 1))
    return settings(side, first, "head", pool_size=(last, last))


default_cfgs = generate_default_cfgs(
    {name: _settings(arguments) for name, arguments in (VARIANTS | SMALL).items()}
)
PLAIN = {"fcaformer_l0": VARIANTS["fcaformer_l0"]}
HYBRID = {name: arguments for name, arguments in VARIANTS.items() if name not in PLAIN}
register(__name__, FcaFormer, PLAIN, checkpoint_filter_fn, out_indices=(0,))
register(__name__, FcaFormer, HYBRID, checkpoint_filter_fn, out_indices=(0, 1, 2, 3))
register(__name__, FcaFormer, SMALL, checkpoint_filter_fn, out_indices=(0, 1, 2))
