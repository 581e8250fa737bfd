# SPDX-License-Identifier: Apache-2.0
"""MAFormer: windows see what is near, a learned summary of all tokens what is far, and they meet.

"MAFormer: A Transformer Network with Multi-scale Attention Fusion for Visual Recognition", Wang,
Sun et al., arXiv 2209.01620, 2022; Neurocomputing 595, 2024.

    stem: conv7x7/4;   between stages: conv3x3/2;   logits = head(mean over the map(LN x))
    stages 0 1, MAF blocks; stages 2 3, x = x + pos once, then pre-norm blocks of plain attention
    local:   L = x + LWA(LN x);   L = L + MLP(LN L)                 attention in windows of w x w
    GLD:     G = FC(LN x) + Pos       FC: R^M -> R^PM along the tokens, the same for all channels
    fusion:  y = L + Proj(softmax(q k^T / sqrt d) v),   q of LN L;  k v of G

A RECONSTRUCTION. No code and no weights were released, and the whole paper was not at hand: known
are the pyramid with blocks of two streams early and plain ones later, the equations of the local
branch, GLD as one layer along the tokens with P = 0.5 plus positions, and the fusion of fine
queries with coarse keys. OURS are the windows of 7 with a bias table, LN before GLD, the bias of
FC, Pos as a learned table, LN before the queries, the heads, the projection and residual of the
fusion, the stem, the convolutions between stages, the positions of plain stages, and all widths and
depths. So no accuracy of the paper may be expected of these presets.

The coarse tokens form the grid (round(P h), w), and a token layer fixes the size of its map. Maps
of another size are shrunk or stretched to it by the transpose of bilinear interpolation, weighted
so that means stay, and what comes out is interpolated bilinearly: the same as resizing FC's weight
(PM, M) on both grids, times M / M', without ever making it. `gld="pool"` takes means of rows in
place of FC, for large pictures.

Expected at 224 (M parameters, GMACs): s 29.35, 5.56; b 55.80, 11.41; l 109.32, 20.56.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import crosspatch._torchvision  # noqa: F401

from timm.models import generate_default_cfgs
from torch import Tensor, nn

from crosspatch.layers.first_weights import init_weights
from crosspatch.layers.patch_embed import pair
from crosspatch.layers.position import BilinearTable, resize_table, resize_tables
from crosspatch.layers.stage import drop_rates, one_a_stage
from crosspatch.layers.windows import Size, WindowAttention, fit_bias_table
from crosspatch.models.maformer_blocks import (
    Gld,
    MafBlock,
    PlainBlock,
    Positions,
    Spec,
    ToMap,
    coarse,
    resize_fc,
    shrunk,
)
from crosspatch.models.pyramid import Pyramid, Stage
from crosspatch.models.registry import register, settings, unwrapped


class MAFormer(Pyramid):
    """The network; all arguments are ours.

    img_size: the side or (H, W) that token layers and tables are made for; pictures of any size
    run. patch_size: the stride of the stem. embed_dims, depths, num_heads: per stage. maf_stages:
    how many of them, from the first on, have MAF blocks. window_size: w. gld_ratio: P, of 0 to 1,
    rounded to whole rows. gld: "fc", or "pool" for means without a layer. branches: "both",
    or what is left of MAF blocks for an ablation: "local", without GLD and fusion; "global",
    without windows. Raises ValueError for shapes that do not agree.
    """

    channels_last = True

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        patch_size: int = 4,
        embed_dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 2, 12, 2),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        maf_stages: int = 2,
        window_size: int = 7,
        gld_ratio: float = 0.5,
        gld: str = "fc",
        branches: str = "both",
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        _check(embed_dims, depths, num_heads, gld_ratio)
        spec = Spec(
            window_size, gld_ratio, gld, branches, mlp_ratio, qkv_bias, attn_drop_rate,
            proj_drop_rate,
        )  # fmt: skip
        self.stem = ToMap(in_chans, embed_dims[0], patch_size, stem=True)
        size = shrunk(pair(img_size), patch_size)
        rates = drop_rates(drop_path_rate, depths)
        self.stages = nn.ModuleList()
        for i, (dim, heads) in enumerate(zip(embed_dims, num_heads, strict=True)):
            before = nn.Sequential()
            if i:
                before.append(ToMap(embed_dims[i - 1], dim, 2))
                size = shrunk(size, 2)
            maf = partial(MafBlock, dim, heads, spec, size)
            block = maf if i < maf_stages else partial(PlainBlock, dim, heads, spec)
            if i >= maf_stages:
                before.append(Positions(size, dim))
            blocks = [block(rate=rate) for rate in rates[i]]
            self.stages.append(Stage(before, blocks))
        self.norm = nn.LayerNorm(embed_dims[-1])
        self.apply(init_weights)
        self.finish(
            embed_dims, [patch_size * 2**i for i in range(len(embed_dims))],
            img_size=img_size, in_chans=in_chans, num_classes=num_classes,
            global_pool=global_pool, drop_rate=drop_rate,
        )  # fmt: skip

    def no_weight_decay(self) -> set[str]:
        """Positions and bias tables."""
        kinds = (".pos", "relative_position_bias_table")
        return {name for name, _ in self.named_parameters() if name.endswith(kinds)}


def _check(dims, depths, heads, ratio: float) -> None:
    one_a_stage(len(dims), depths=depths, num_heads=heads)
    if min(depths) < 1:
        raise ValueError(f"depths {tuple(depths)}; expected a block or more in every stage")
    if not 0 < ratio <= 1:
        raise ValueError(f"gld_ratio {ratio}; expected more than 0, and 1 at most")


# ---------------------------------------------------------------------- weights and names


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: MAFormer) -> dict[str, Tensor]:
    """A state dict of this reading, bare or in {"model": …} or {"state_dict": …}: what belongs to
    square maps of another size is resized to the model's."""
    state = unwrapped(state_dict)
    tables = {}
    for name, module in model.named_modules():
        if isinstance(module, Positions):
            tables[f"{name}.pos"] = BilinearTable(module.grid, 0)
        elif isinstance(module, Gld):
            _fit(state, name, module)
        elif isinstance(module, WindowAttention):
            key = f"{name}.relative_position_bias_table"
            if key in state:
                state[key] = fit_bias_table(state[key], module.window)
    return resize_tables(state, tables)


def _fit(state: dict[str, Tensor], name: str, gld: Gld) -> None:
    """The entries of global down-sampling, for the map of `gld`."""
    pos = state.get(f"{name}.pos")
    if pos is None or pos.shape == gld.pos.shape:
        return
    old = _square(pos.shape[1], gld.ratio)
    grid = coarse(old, gld.ratio)
    state[f"{name}.pos"] = resize_table(pos, grid, gld.coarse, 0, mode="bilinear")
    weight, bias = state.get(f"{name}.fc.weight"), state.get(f"{name}.fc.bias")
    if weight is not None and bias is not None:
        state[f"{name}.fc.weight"] = resize_fc(weight, (old, grid), (gld.size, gld.coarse))
        rows = resize_table(bias[None, :, None], grid, gld.coarse, 0, mode="bilinear")
        state[f"{name}.fc.bias"] = rows[0, :, 0]


def _square(rows: int, ratio: float) -> Size:
    """The square map that has so many coarse tokens. Raises ValueError where there is none."""
    for side in range(1, rows + 1):
        height, width = coarse((side, side), ratio)
        if height * width == rows:
            return side, side
    raise ValueError(f"{rows} coarse tokens belong to no square map at gld_ratio {ratio}")


def _preset(width: int, heads: int, depths: Sequence[int]) -> dict[str, Any]:
    return {
        "embed_dims": tuple(width * 2**i for i in range(4)),
        "num_heads": tuple(heads * 2**i for i in range(4)),
        "depths": tuple(depths),
    }


VARIANTS: dict[str, dict[str, Any]] = {
    "maformer_s": _preset(64, 2, (2, 2, 12, 2)),
    "maformer_b": _preset(96, 3, (2, 2, 14, 2)),
    "maformer_l": _preset(128, 4, (2, 2, 16, 3)),
}
# For small pictures: maps of 16 and 8 a side with MAF blocks, of 4 with a plain one.
SMALL: dict[str, dict[str, Any]] = {
    "maformer_micro_32": {
        "img_size": 32, "patch_size": 2, "embed_dims": (24, 48, 96), "depths": (1, 1, 2),
        "num_heads": (2, 4, 8), "window_size": 4,
    }
}  # fmt: skip
default_cfgs = generate_default_cfgs(
    {name: settings(224, "stem.conv", "head", pool_size=(7, 7)) for name in VARIANTS}
    | {name: settings(32, "stem.conv", "head", pool_size=(4, 4)) for name in SMALL}
)
register(__name__, MAFormer, VARIANTS, checkpoint_filter_fn, out_indices=(0, 1, 2, 3))
register(__name__, MAFormer, SMALL, checkpoint_filter_fn, out_indices=(0, 1, 2))
