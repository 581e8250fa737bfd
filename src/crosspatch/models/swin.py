# SPDX-License-Identifier: Apache-2.0
"""Swin: attention within windows that every second block shifts by half a window.

"Swin Transformer: Hierarchical Vision Transformer using Shifted Windows", Liu, Lin, Cao, Hu, Wei,
Zhang, Lin, Guo, arXiv 2103.14030, ICCV 2021.

    stem: x = LN(conv4x4/4(x)) [+ position table]
    block: x = x + DropPath(WindowAttention(LN x));   x = x + DropPath(MLP(LN x))
    WindowAttention = softmax(q k^T / sqrt d + bias[offset of the two tokens] + mask) v
    before stages 2, 3, 4: x = Linear(LN(the four tokens of a 2x2 cell));  logits = head(mean(LN x))

The network is timm's, but for how windows are laid on a map (`WindowBlock`), as timm rolls a map
before it pads it, which lets tokens of far borders meet:

    original=True    a window is no larger than the map's smaller side, and where it is as large
                     nothing is shifted, on neither axis; padding is seen by attention
    original=False   the same for each axis by itself; padding is hidden

Both pad, then roll. They agree, with timm too, where windows divide a square map. `original` is the
authors' rule (that of their classifier for the window and the shift, that of their detection code
for padding), and the default of the names that have released weights.

Departures: `absolute_pos_embed` is resized for other grids; pictures that patches do not divide are
padded; the position dropout has a rate of its own.

Expected (M parameters, GMACs): tiny 28.29, 4.49; small 49.61, 8.74; base 87.77, 15.43, at 384 with
windows of 12 87.90, 47.08; large 196.53, 34.48, at 384 196.74, 103.92.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import crosspatch._torchvision  # noqa: F401

from timm.layers import LayerNorm2d, PatchEmbed, trunc_normal_
from timm.models import generate_default_cfgs
from timm.models import swin_transformer as timms
from torch import Tensor, nn

from crosspatch.layers.attention import check_heads
from crosspatch.layers.first_weights import drawn
from crosspatch.layers.patch_embed import pair
from crosspatch.layers.position import Table, resize_table, resize_tables
from crosspatch.layers.stage import one_a_stage
from crosspatch.layers.windows import (
    Size,
    fit_bias_table,
    fitted,
    from_windows,
    half,
    pad_to,
    relative_index,
    resize_bias_table,
    to_windows,
    window_mask,
)
from crosspatch.models.adopted import Adopted, last_norm
from crosspatch.models.registry import register, settings, unwrapped

TABLE = "relative_position_bias_table"
POSITIONS = "patch_embed.absolute_pos_embed"


class PositionedPatches(PatchEmbed):
    """timm's patches of pictures of any size, with a position table (1, N, C) on request."""

    grid_size: Any

    def __init__(
        self, *sizes: Any, ape: bool = False, patch_norm: bool = True, pos_drop: float = 0.0, **more
    ) -> None:
        if not patch_norm:
            more["norm_layer"] = None
        super().__init__(*sizes, **(more | {"dynamic_img_pad": True, "strict_img_size": False}))
        self.pos_drop = nn.Dropout(pos_drop)
        self.absolute_pos_embed = None
        if ape:
            self.absolute_pos_embed = drawn(1, math.prod(self.grid_size), more["embed_dim"])

    def set_input_size(self, img_size: Any = None, patch_size: Any = None) -> None:
        """Another size; the position table is resized with it."""
        before = self.grid_size
        super().set_input_size(img_size, patch_size)
        if self.absolute_pos_embed is not None and before != self.grid_size:
            table = resize_table(self.absolute_pos_embed.data, before, self.grid_size, 0)
            self.absolute_pos_embed = nn.Parameter(table)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) to (B, h, w, C)."""
        x, table = super().forward(x), self.absolute_pos_embed
        if table is not None:
            grid = (x.shape[1], x.shape[2])
            table = resize_table(table, self.grid_size, grid, 0)
            x = x + table.unflatten(1, grid)
        return self.pos_drop(x)


class WindowAttention(timms.WindowAttention):
    """timm's attention within windows, whose bias table is resized as the authors do it."""

    def set_window_size(self, window_size: Size) -> None:
        """Another window: each head's image of biases, bicubic."""
        if tuple(window_size) == tuple(self.window_size):
            return
        old, self.window_size = self.window_size, window_size
        self.window_area = window_size[0] * window_size[1]
        table = resize_bias_table(self.relative_position_bias_table.data, old, window_size)
        self.relative_position_bias_table = nn.Parameter(table)
        index = relative_index(window_size, table.device)
        self.register_buffer("relative_position_index", index, persistent=False)


class WindowBlock(timms.SwinTransformerBlock):
    """timm's block with windows laid as the head of this file says."""

    original = False
    attn_mask: Tensor | None
    input_resolution: Any

    @classmethod
    def lay(cls, block: Any, window: Size, original: bool) -> None:
        """Make `block`, one of timm's, one of these, for windows of `window`."""
        drawn = block.attn.window_size
        block.__class__, block.original = cls, original
        block.attn.__class__ = WindowAttention
        block.set_input_size(block.input_resolution, window)
        table = block.attn.relative_position_bias_table
        if block.attn.window_size != drawn and not table.is_meta:
            trunc_normal_(table, std=0.02)

    def _calc_window_shift(
        self, target_window_size: Any, target_shift_size: Any = None
    ) -> tuple[Size, Size]:
        if self.always_partition or not self.original:
            return super()._calc_window_shift(target_window_size, target_shift_size)
        window = fitted(pair(target_window_size), self.input_resolution)
        shifted = any(self.target_shift_size)
        return window, half(window, self.input_resolution) if shifted else (0, 0)

    def get_attn_mask(
        self, x: Tensor | None = None, device: Any = None, dtype: Any = None
    ) -> Tensor | None:
        """The mask (windows, tokens, tokens) of a map x (B, H, W, C), or of the size laid out."""
        size: Size = self.input_resolution
        if x is not None:
            size, device, dtype = (x.shape[1], x.shape[2]), x.device, x.dtype
        hides = not self.original
        mask = window_mask(size, self.window_size, self.shift_size, hides, device)
        return mask if mask is None else mask.to(dtype)

    def _attn(self, x: Tensor) -> Tensor:
        size, (down, right) = (x.shape[1], x.shape[2]), self.shift_size
        laid_out = size == tuple(self.input_resolution)
        mask = self.attn_mask if laid_out else self.get_attn_mask(x)
        x = pad_to(x, self.window_size)
        padded = (x.shape[1], x.shape[2])
        if any(self.shift_size):
            x = x.roll((-down, -right), (1, 2))
        windows = to_windows(x, self.window_size)
        shape = windows.shape[1:]
        y = self.attn(windows.flatten(0, 1), mask=mask).reshape(-1, *shape)
        y = from_windows(y, self.window_size, padded)
        if any(self.shift_size):
            y = y.roll((down, right), (1, 2))
        return y if padded == size else y[:, : size[0], : size[1]]


class Swin(Adopted, timms.SwinTransformer):
    """The network; argument names are timm's, and the authors' for `ape`, `patch_norm`, `qk_scale`.

    img_size: the side or (H, W) that windows are laid out for; pictures of any size run.
    window_size: a side, (h, w), or one of these per stage. original: see the head of this file.
    always_partition: windows are never cut to the map. stage_norms: a norm for the map of every
    stage; with `original` and `always_partition` this is the authors' detection code. ape: a
    position table. patch_norm: the norm of the stem. qk_scale: instead of head_dim^-0.5. Any number
    of stages: as long as `depths`.
    Raises ValueError where depths and num_heads differ in length or heads do not divide a width.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: Any = 7,
        always_partition: bool = False,
        original: bool = False,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        ape: bool = False,
        patch_norm: bool = True,
        stage_norms: bool = False,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer: Any = nn.LayerNorm,
    ) -> None:
        _check(embed_dim, depths, num_heads)
        windows: Any = timms.resolve_stage_window_sizes(window_size, len(depths))
        embed: Any = partial(
            PositionedPatches, ape=ape, patch_norm=patch_norm, pos_drop=pos_drop_rate
        )
        super().__init__(
            img_size=_covering(pair(img_size), patch_size),
            patch_size=patch_size,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            embed_dim=embed_dim,
            depths=tuple(depths),
            num_heads=tuple(num_heads),
            window_size=windows,
            always_partition=always_partition,
            mlp_ratio=mlp_ratio,
            qkv_bias=qkv_bias,
            drop_rate=drop_rate,
            proj_drop_rate=proj_drop_rate,
            attn_drop_rate=attn_drop_rate,
            drop_path_rate=drop_path_rate,
            embed_layer=embed,
            norm_layer=norm_layer,
        )
        self.original = original
        stages: Any = self.layers
        for stage, window in zip(stages, windows, strict=True):
            for block in stage.blocks:
                WindowBlock.lay(block, window, original)
                if qk_scale is not None:
                    block.attn.scale = qk_scale
        widths = [info["num_chs"] for info in self.feature_info] if stage_norms else []
        self.adopt(img_size, "NHWC", [LayerNorm2d(width, eps=1e-5) for width in widths])

    @classmethod
    def from_authors(cls, **build: Any) -> Swin:
        """Built with the arguments of the authors' constructor, as the authors compute."""
        arguments = {"original": True, **build}
        arguments.pop("fused_window_process", None)
        checkpointing = arguments.pop("use_checkpoint", False)
        rate = arguments.pop("drop_rate", 0.0)
        model = cls(pos_drop_rate=rate, proj_drop_rate=rate, **arguments)
        model.set_grad_checkpointing(checkpointing)
        return model

    def set_input_size(self, img_size: Any = None, patch_size: Any = None, **windows: Any) -> None:
        """timm's: another size, for which windows (in proportion) and tables are resized."""
        wanted = self.img_size if img_size is None else pair(img_size)
        embed: Any = self.patch_embed
        sides = patch_size or embed.patch_size
        super().set_input_size(_covering(wanted, sides), patch_size, **windows)
        self.img_size = wanted

    def no_weight_decay(self) -> set[str]:
        """Bias tables and the position table."""
        kinds = (TABLE, "absolute_pos_embed")
        return {name for name, _ in self.named_parameters() if name.endswith(kinds)}


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: Swin) -> dict[str, Tensor]:
    """A released state dict, or timm's, under the names of `model`.

    Without the authors' buffers; a detector's last norm stands for the missing one; position and
    bias tables are resized for another size or window.
    """
    state, found = unwrapped(state_dict), {}
    theirs = {"head.weight", "layers.0.downsample.reduction.weight", "norm0.weight"}
    released = bool(theirs & state.keys())
    for name, value in state.items():
        if name.endswith(("attn_mask", "relative_position_index")):
            continue
        if released:
            name = re.sub(r"^layers\.(\d+)\.downsample", _next_stage, name)
            name = re.sub(r"^norm(\d)\.", r"stage_norms.\1.", name)
            name = re.sub(r"^head\.(weight|bias)$", r"head.fc.\1", name)
        found["patch_embed." * (name == "absolute_pos_embed") + name] = value
    for name, module in model.named_modules():
        key = f"{name}.attn.{TABLE}"
        if isinstance(module, WindowBlock) and key in found:
            found[key] = fit_bias_table(found[key], module.window_size, released)
    last_norm(found, "norm")
    embed: Any = model.patch_embed
    return resize_tables(found, {POSITIONS: Table(embed.grid_size, 0)})


def fit_head(
    state_dict: Mapping[str, Any], num_classes: int, rows: Sequence[int] | None = None
) -> dict[str, Tensor]:
    """A released state dict with a head for other classes: zeros, or the rows `rows` of its own, as
    ImageNet's thousand classes are among its 21841. Raises ValueError for another number of them.
    """
    state = unwrapped(state_dict)
    prefix = "head.fc." if "head.fc.weight" in state else "head."
    for name in (prefix + "weight", prefix + "bias"):
        old = state[name]
        new = old.new_zeros(num_classes, *old.shape[1:]) if rows is None else old[list(rows)]
        if len(new) != num_classes:
            raise ValueError(f"{len(new)} rows for {num_classes} classes; expected one for each")
        state[name] = new
    return state


def _next_stage(match: re.Match[str]) -> str:
    return f"layers.{int(match[1]) + 1}.downsample"


def _covering(size: Size, patch: int | Size) -> Size:
    """`size`, rounded up to whole patches."""
    rows, columns = (-(-side // p) * p for side, p in zip(size, pair(patch), strict=True))
    return rows, columns


def _check(embed_dim: int, depths: Sequence[int], num_heads: Sequence[int]) -> None:
    one_a_stage(len(depths), num_heads=num_heads)
    for stage, heads in enumerate(num_heads):
        check_heads(embed_dim * 2**stage, heads)


def _variant(width: int, heads: int, depth: int, side: int = 224) -> dict[str, Any]:
    return {
        "img_size": side,
        "embed_dim": width,
        "depths": (2, 2, depth, 2),
        "num_heads": tuple(heads * 2**i for i in range(4)),
        "window_size": side // 32,
        "original": True,
    }


VARIANTS = {
    "swin_tiny_patch4_window7_224": _variant(96, 3, 6),
    "swin_small_patch4_window7_224": _variant(96, 3, 18),
    "swin_base_patch4_window7_224": _variant(128, 4, 18),
    "swin_base_patch4_window12_384": _variant(128, 4, 18, 384),
    "swin_large_patch4_window7_224": _variant(192, 6, 18),
    "swin_large_patch4_window12_384": _variant(192, 6, 18, 384),
}
SMALL = {
    "swin_micro_32": {
        "img_size": 32,
        "patch_size": 2,
        "embed_dim": 28,
        "depths": (2, 2, 2),
        "num_heads": (2, 4, 8),
        "window_size": 4,
        "mlp_ratio": 2.5,
    }
}
default_cfgs = generate_default_cfgs(
    {"swin_micro_32": settings(32, "patch_embed.proj", "head.fc", pool_size=(4, 4))}
)
register(__name__, Swin, VARIANTS, checkpoint_filter_fn, out_indices=(0, 1, 2, 3))
register(__name__, Swin, SMALL, checkpoint_filter_fn, out_indices=(0, 1, 2))
