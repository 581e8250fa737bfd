# SPDX-License-Identifier: Apache-2.0
"""Compact transformers: ViT-Lite, CVT and CCT, which learn from small sets of small pictures.

"Escaping the Big Data Paradigm with Compact Transformers", Hassani et al., arXiv 2104.05704.

    tokens: ViT-Lite, CVT  convolution K x K, stride K
            CCT            C times [convolution K x K, stride max(1, K/2 - 1) -> ReLU -> max 3x3/2]
    z = [class;] tokens + positions                                       the class token: ViT-Lite
    y = z + DropPath(Attention(LN z));   n = LN y;   z = n + DropPath(MLP n)              L blocks
    x = LN z;   logits = W x_class   (ViT-Lite)   or   W sum_n softmax_n(w . x_n) x_n   (sequence
    pooling: CVT, CCT)

The second residual begins at the normalised n. Queries, keys and values have no bias. Positions are
learned (truncated normal of 0.2), sines by a formula, which never change, or none. `NAME-L/K` and
`CCT-L/KxC` are L blocks, patches or kernels of K, C convolutions.

Departures: the names with `_sine` have sines in all three families, where the authors' CVT and CCT
silently learn a table there; tables are resized on the way, bilinearly as theirs are between files,
so that CCT takes pictures of any size, ViT-Lite and CVT those that K divides. Nothing is dropped
unless asked for (the paper: 0.1 of attention, up to 0.1 of paths).

Expected (M parameters, GMACs; 10 classes at 32 pixels): vit_2_4, cvt_2_4 0.215, 0.015; _4_4 0.413,
0.030; _6_4 3.19, 0.22; _7_4 3.72, 0.25; cct_2_3x2 0.284, 0.035; cct_4_3x2 0.482, 0.050; cct_6_3x1
3.23, 1.01; cct_6_3x2 3.33, 0.25; cct_7_3x1 3.76, 1.18; cct_7_3x2 3.85, 0.29. cct_7_7x2_224 (102
classes) 4.57, 1.61; cct_14_7x2_224 (1000) 22.37, 5.52; cct_14_7x2_384 22.51, 18.6. The published
MACs of CCT-14 leave out the products of attention.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from itertools import pairwise
from typing import Any

import crosspatch._torchvision  # noqa: F401

import torch
from timm.layers import trunc_normal_
from timm.models import generate_default_cfgs
from torch import Tensor, nn

from crosspatch.layers.block import Block, BlockOptions, BlockSpec
from crosspatch.layers.first_weights import init_linear
from crosspatch.layers.linear import Linear
from crosspatch.layers.patch_embed import flatten_grid, pair
from crosspatch.layers.position import BilinearTable, resize_tables
from crosspatch.models.cct_names import CLASSES, NAMES, OURS, shape_of
from crosspatch.models.flat import FlatTokens
from crosspatch.models.registry import register, settings, unwrapped

POSITIONS = ("learnable", "sine", "none")
TEMPERATURE = 10_000
STD = 0.2  # of learned positions


class Tokenizer(nn.Module):
    """C convolutions, each with ReLU and max pooling, or for C = 0 one that cuts patches, with a
    bias; (B, C, H, W) to a map (B, dim, h, w). pooling: kernel, stride, padding."""

    def __init__(
        self,
        in_chans: int,
        dim: int,
        n_conv_layers: int,
        kernel_size: int,
        stride: int | None = None,
        padding: int | None = None,
        in_planes: int = 64,
        pooling: tuple[int, int, int] = (3, 2, 1),
    ) -> None:
        super().__init__()
        self.patch = 1 if n_conv_layers else kernel_size
        if n_conv_layers:
            usual = max(1, kernel_size // 2 - 1), max(1, kernel_size // 2)
        else:
            usual = kernel_size, 0
        stride = usual[0] if stride is None else stride
        padding = usual[1] if padding is None else padding
        widths = [in_chans, *([in_planes] * (n_conv_layers - 1)), dim]
        layers = []
        for before, after in pairwise(widths):
            conv = nn.Conv2d(before, after, kernel_size, stride, padding, bias=not n_conv_layers)
            if not conv.weight.is_meta:
                nn.init.kaiming_normal_(conv.weight)
            rest = [nn.ReLU(), nn.MaxPool2d(*pooling)] if n_conv_layers else []
            layers.append(nn.Sequential(conv, *rest))
        self.conv_layers = nn.Sequential(*layers)
        each = [(kernel_size, stride, padding), *([pooling] if n_conv_layers else [])]
        self.steps = each * len(layers)

    @property
    def stride(self) -> int:
        """Pixels from one token to the next."""
        found = 1
        for _, stride, _ in self.steps:
            found *= stride
        return found

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of tokens of a picture (H, W). Raises ValueError where patches do not
        divide it, or nothing is left."""
        if any(side % self.patch for side in size):
            raise ValueError(
                f"an image of {size[0]}x{size[1]}; its sides must be multiples of the patch "
                f"({self.patch}): resize it, or build the model with img_size=… of such"
            )
        rows, columns = size
        for kernel, stride, padding in self.steps:
            rows = (rows + 2 * padding - kernel) // stride + 1
            columns = (columns + 2 * padding - kernel) // stride + 1
            if min(rows, columns) < 1:
                raise ValueError(f"an image of {size[0]}x{size[1]} is too small for the tokenizer")
        return rows, columns

    def forward(self, x: Tensor) -> Tensor:
        # channels last is faster on a CPU, and the tokens then lie as the blocks want them
        return self.conv_layers(x.contiguous(memory_format=torch.channels_last))


class CompactBlock(Block):
    """A pre-norm block whose second residual begins at the normalised tokens."""

    def add_mlp(self, x: Tensor) -> Tensor:
        """LN x plus the MLP of LN x."""
        x = self.norm2(x)
        return x + self.drop_path2(self.mlp(x))


def sines(count: int, dim: int) -> Tensor:
    """(1, count, dim): place p, channel i has angle p / 10000^(2 floor(i/2) / dim), of which even
    channels have the sine and odd ones the cosine."""
    channel = torch.arange(dim)
    angle = torch.arange(count)[:, None] / TEMPERATURE ** (2 * (channel // 2) / dim)
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos())[None]


class CompactTransformer(FlatTokens):
    """All three families; argument names are timm's, and the authors' where timm has none.

    n_conv_layers: convolutions of CCT's tokenizer, 0 for patches of `kernel_size`. stride, padding,
    in_planes, pooling_*: of the tokenizer; None as kernel_size asks. seq_pool: sequence pooling
    instead of a class token. global_pool: "seq" or "token", whichever there is, unless given.
    positional_embedding: "learnable", "sine" or "none". img_size: what positions are laid out for.
    Raises ValueError for what cannot be built, and for pictures that patches do not divide.
    """

    table = BilinearTable

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str | None = None,
        embed_dim: int = 384,
        depth: int = 14,
        num_heads: int = 6,
        mlp_ratio: float = 3.0,
        n_conv_layers: int = 2,
        kernel_size: int = 7,
        stride: int | None = None,
        padding: int | None = None,
        in_planes: int = 64,
        pooling_kernel_size: int = 3,
        pooling_stride: int = 2,
        pooling_padding: int = 1,
        seq_pool: bool = True,
        positional_embedding: str = "learnable",
        qkv_bias: bool = False,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if positional_embedding not in POSITIONS:
            raise ValueError(
                f"positional_embedding {positional_embedding!r}; expected one of {POSITIONS}"
            )
        self.tokenizer = Tokenizer(
            in_chans,
            embed_dim,
            n_conv_layers,
            kernel_size,
            stride,
            padding,
            in_planes,
            (pooling_kernel_size, pooling_stride, pooling_padding),
        )
        self.seq_pool, self.positional_embedding = seq_pool, positional_embedding
        if not seq_pool:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        grid = self.tokenizer.grid(pair(img_size))
        self.pos_embed = self._table(grid[0] * grid[1] + int(not seq_pool), embed_dim)
        self.pos_drop = nn.Dropout(pos_drop_rate)
        options = BlockOptions(
            qkv_bias=qkv_bias,
            norm=partial(nn.LayerNorm, eps=1e-5),
            attn_drop=attn_drop_rate,
            proj_drop=proj_drop_rate,
        )
        spec = BlockSpec.uniform(embed_dim, num_heads, mlp_ratio)
        rates = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(CompactBlock(embed_dim, spec, options, r) for r in rates)
        self.blocks.apply(init_linear)
        self.norm = options.norm(embed_dim)
        own = "seq" if seq_pool else "token"
        shape = {"img_size": img_size, "in_chans": in_chans, "num_classes": num_classes}
        pool = own if global_pool is None else global_pool
        how = {"global_pool": pool, "drop_rate": drop_rate}
        self.finish(embed_dim, grid, self.tokenizer.stride, **shape, **how)

    def _table(self, rows: int, dim: int) -> nn.Parameter | None:
        if self.positional_embedding == "none":
            return None
        if self.positional_embedding == "sine":  # counted with the parameters, as the authors do
            return nn.Parameter(sines(rows, dim), requires_grad=False)
        table = nn.Parameter(torch.empty(1, rows, dim))
        return table if table.is_meta else trunc_normal_(table, std=STD)

    @property
    def pools(self) -> tuple[str, ...]:
        """The poolings there are."""
        return ("seq", *super().pools) if self.seq_pool else super().pools

    def set_pool(self, global_pool: str) -> None:
        """Another pooling; the scores of sequence pooling are there where they are read."""
        super().set_pool(global_pool)
        if global_pool != "seq":
            self.attention_pool = None
        elif getattr(self, "attention_pool", None) is None:
            self.attention_pool = Linear(self.embed_dim, 1).to(next(self.norm.parameters()))
            init_linear(self.attention_pool)

    def patches(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Images (B, in_chans, H, W) to tokens (B, h * w, C) and their grid (h, w)."""
        grid = self.tokenizer.grid((x.shape[2], x.shape[3]))
        return flatten_grid(self.tokenizer(x)), grid

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """The table (1, [1 +] h * w, C) for a grid; sines have no gradient."""
        table = super().positions(grid)
        return table.detach() if self.positional_embedding == "sine" else table

    def embed(self, x: Tensor) -> Any:
        """Images (B, in_chans, H, W) to the state before the first block."""
        state = super().embed(x)
        return state._replace(tokens=self.pos_drop(state.tokens))

    def pool(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """A map (B, h, w, C), or tokens (B, 1 + N, C), to features (B, C)."""
        if self.attention_pool is None:
            return super().pool(x, grid)
        tokens = x.flatten(1, 2)
        weights = self.attention_pool(tokens).softmax(dim=1)
        return (weights.transpose(1, 2) @ tokens)[:, 0]

    @classmethod
    def from_authors(cls, /, **build: Any) -> CompactTransformer:
        """The model that the authors' constructor builds from the arguments `build`: `fn`, a name
        such as "cct_7_3x1_32", or `cls`, one of "CCT", "CVT" and "ViTLite", and what it takes. As
        with them, the positions of CCT and CVT by name are those of the name. Raises ValueError for
        another name or argument."""
        build = {OURS.get(name, name): value for name, value in build.items()}
        name, family = build.pop("fn", None), build.pop("cls", None)
        if not name and family not in CLASSES:
            raise ValueError(f"cls={family!r}; expected one of {', '.join(CLASSES)}, or fn")
        arguments = shape_of(name) if name else dict(CLASSES[family])
        if name and arguments["seq_pool"]:
            build.pop("positional_embedding", None)
        if "dropout" in build:
            build |= dict.fromkeys(("pos_drop_rate", "proj_drop_rate"), build.pop("dropout"))
        for ignored in ("pretrained", "progress"):
            build.pop(ignored, None)
        try:
            return cls(**{**arguments, **build})
        except TypeError as error:
            raise ValueError(f"{error}; expected arguments of the authors' models") from error


_KEYS = (  # entries of a released file, and ours; in this order
    ("classifier.", ""),
    ("positional_emb", "pos_embed"),
    ("class_emb", "cls_token"),
    (".norm1.", ".norm2."),
    (".pre_norm.", ".norm1."),
    (".self_attn.", ".attn."),
    (".linear1.", ".mlp.fc1."),
    (".linear2.", ".mlp.fc2."),
)


def checkpoint_filter_fn(
    state_dict: Mapping[str, Any], model: CompactTransformer
) -> dict[str, Tensor]:
    """A released state dict (bare, or in {"model": …} or {"state_dict": …}) under the model's
    names, positions resized. A file without sines gets the model's; one with a table for a model
    without positions loses it."""
    state = unwrapped(state_dict)
    if any(name.startswith("classifier.") for name in state):
        state = {_renamed(name): value for name, value in state.items()}
    if model.positional_embedding == "none":
        state.pop("pos_embed", None)
    if model.positional_embedding == "sine":
        state.setdefault("pos_embed", model.pos_embed.detach())
    return resize_tables(state, model.position_tables())


def _renamed(name: str) -> str:
    for theirs, ours in _KEYS:
        name = name.replace(theirs, ours)
    return re.sub(r"^fc\.", "head.", name)


VARIANTS = {name: shape_of(name) for name in NAMES}
# Ours: CCT-2/3x2 half as wide, for comparisons on small pictures and tests.
VARIANTS["cct_micro_32"] = {
    "img_size": 32, "embed_dim": 56, "depth": 4, "num_heads": 2, "mlp_ratio": 2.0,
    "n_conv_layers": 2, "kernel_size": 3, "in_planes": 24,
}  # fmt: skip
CIFAR = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2470, 0.2435, 0.2616)}


def _settings(arguments: Mapping[str, Any]) -> Any:
    side, layers, kernel = (arguments[n] for n in ("img_size", "n_conv_layers", "kernel_size"))
    stride = kernel if not layers else (2 * max(1, kernel // 2 - 1)) ** layers
    more: dict[str, Any] = {"num_classes": arguments.get("num_classes", 1000)}
    more |= {"pool_size": (side // stride, side // stride)} | (CIFAR if side == 32 else {})
    return settings(side, "tokenizer.conv_layers.0.0", "head", **more)


default_cfgs = generate_default_cfgs({name: _settings(VARIANTS[name]) for name in VARIANTS})
for _name, _arguments in VARIANTS.items():
    register(
        __name__,
        CompactTransformer,
        {_name: _arguments},
        checkpoint_filter_fn,
        out_indices=min(3, _arguments["depth"]),
    )
