# SPDX-License-Identifier: Apache-2.0
"""CvT: tokens from overlapping convolutions, queries, keys and values from depthwise ones.

"CvT: Introducing Convolutions to Vision Transformers", Wu et al., arXiv 2103.15808, ICCV 2021.

    stage: X = LN(conv k x k, stride s (x));  in the last one [class; X];  blocks
    block: x = x + DropPath(Proj(softmax(q k^T / sqrt C) v));   x = x + DropPath(MLP(LN x))
           q = Linear(class | BN(dwconv3x3(patches)));  k, v: the same with stride 2;  of LN x
    logits = head(LN class), without a class token head(mean(LN patches))

C is the whole width, not that of a head; the MLP has QuickGELU, x sigmoid(1.702 x). There are no
positions: one set of weights takes any size of picture. Keys and values of an H x W map lie on a
grid of ceil(H/2) x ceil(W/2).

Departures: `forward_features` gives a map, as of every pyramid: with the pooling "token" it is
the normalised map of patches, moved as a whole so that its mean is the normalised class token, and
the head reads that mean; other poolings get the map unmoved. Names of timm: `drop_path_rate` is
that of the last stage, as only there the authors have one. `pos_embed` is the table that the paper
compares with; the authors' configuration has the word, their code no table. A batch of one keeps
its axis. Weights in the layout of Transformers (`microsoft/cvt-13` and others) load too.

Expected (M parameters, GMACs): 13 20.00, 4.57 at 224 and 16.27 at 384; 21 31.62, 7.18 and 24.85;
W24 277.2, 193.2 at 384.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import crosspatch._torchvision  # noqa: F401

import torch
from timm.layers import LayerNormFp32, trunc_normal_
from timm.models import generate_default_cfgs
from torch import Tensor, nn

from crosspatch.layers.patch_embed import pair
from crosspatch.layers.position import Table, resize_tables
from crosspatch.layers.stage import each
from crosspatch.models.cvt_blocks import Block, ConvEmbed, ConvStage, Size, Tokens, patches
from crosspatch.models.pyramid import POOLS, Pyramid
from crosspatch.models.registry import register, settings, unwrapped

Each = int | Sequence[int]  # one value for all stages, or one for each
INITS = ("trunc_norm", "xavier")


class CvT(Pyramid):
    """The network; what the authors configure per stage is one value for all or one for each.

    img_size: what it is described for (and the size of a table of positions); any size runs.
    global_pool: "token" (the default where the last stage has a class token), "avg" (else), "max"
    or ''. embed_dim, depths, num_heads, patch_size, patch_stride, patch_padding: of the stages.
    qkv_proj_method, kernel_qkv, padding_q, padding_kv, stride_q, stride_kv: see `ConvAttention`.
    cls_token: in the last stage, or said per stage; the token of another stage ends with it.
    pos_embed: a learned table for the patches, resized for other sizes. init: of Linear layers,
    "trunc_norm" or "xavier". drop_path_rate: that of the last stage, or one for each, growing from
    0 within a stage. proj_drop_rate: the authors' drop rate; drop_rate: before the head.
    Raises ValueError for shapes that do not agree.
    """

    channels_last = True

    def __init__(
        self,
        img_size: int | Size = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str | None = None,
        embed_dim: Sequence[int] = (64, 192, 384),
        depths: Sequence[int] = (1, 2, 10),
        num_heads: Each = (1, 3, 6),
        patch_size: Each = (7, 3, 3),
        patch_stride: Each = (4, 2, 2),
        patch_padding: Each = (2, 1, 1),
        mlp_ratio: float | Sequence[float] = 4.0,
        qkv_bias: bool | Sequence[bool] = True,
        qkv_proj_method: str | Sequence[str] = "dw_bn",
        kernel_qkv: Each = 3,
        padding_q: Each = 1,
        padding_kv: Each = 1,
        stride_q: Each = 1,
        stride_kv: Each = 2,
        cls_token: bool | Sequence[bool] = True,
        pos_embed: bool | Sequence[bool] = False,
        init: str = "trunc_norm",
        drop_rate: float = 0.0,
        proj_drop_rate: float | Sequence[float] = 0.0,
        attn_drop_rate: float | Sequence[float] = 0.0,
        drop_path_rate: float | Sequence[float] = 0.0,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if init not in INITS:
            raise ValueError(f"init {init!r}; expected one of {', '.join(INITS)}")
        stages = len(depths)
        embeds = {
            "dim": embed_dim, "kernel": patch_size, "stride": patch_stride,
            "padding": patch_padding,
        }  # fmt: skip
        tokens = {"cls_token": _in_the_last(cls_token, stages, False), "pos_embed": pos_embed}
        blocks = {
            "depth": depths, "heads": num_heads, "mlp_ratio": mlp_ratio, "qkv_bias": qkv_bias,
            "method": qkv_proj_method, "kernel": kernel_qkv, "padding_q": padding_q,
            "padding_kv": padding_kv, "stride_q": stride_q, "stride_kv": stride_kv,
            "proj_drop": proj_drop_rate, "attn_drop": attn_drop_rate, "eps": norm_eps,
            "drop_path": _in_the_last(drop_path_rate, stages, 0.0),
        }  # fmt: skip
        rows = (_rows(columns, stages) for columns in (embeds, tokens, blocks))
        strides = self._build(pair(img_size), in_chans, norm_eps, zip(*rows, strict=True))
        self.norm = LayerNormFp32(embed_dim[-1], eps=norm_eps)
        self.apply(partial(_init, xavier=init == "xavier"))
        self.finish(
            embed_dim, strides, img_size=img_size, in_chans=in_chans, num_classes=num_classes,
            drop_rate=drop_rate,
        )  # fmt: skip
        self._pooling(global_pool if global_pool is not None else self._natural_pool())

    def _build(self, size: Size, width: int, eps: float, rows: Iterable[Any]) -> list[int]:
        """The stem and the stages, of their embeddings, tokens and blocks. Returns the strides."""
        self.stages, strides = nn.ModuleList(), [1]
        for i, (embedding, tokens, blocks) in enumerate(rows):
            embed, width = ConvEmbed(width, eps=eps, **embedding), embedding["dim"]
            size = _mapped(size, embed.proj)
            strides.append(strides[-1] * embedding["stride"])
            if not i:
                self.stem = embed
            stage = ConvStage(
                embed if i else None,
                width,
                _blocks(width, **blocks),
                cls_token=tokens["cls_token"],
                size=size if tokens["pos_embed"] else None,
                drop=blocks["proj_drop"],
            )
            self.stages.append(stage)
        return strides[1:]

    @classmethod
    def from_authors(
        cls, img_size: int | Size = 224, in_chans: int = 3, num_classes: int = 1000, **spec: Any
    ) -> CvT:
        """The network of the authors' configuration: `spec` holds its words in capitals.

        POS_EMBED is ignored, as in their code. Raises ValueError for a word that it does not have.
        """
        known = AUTHORS | {"NUM_STAGES": "", "POS_EMBED": "", "NUM_CLASSES": "", "INIT": "init"}
        if unknown := sorted(set(spec) - set(known)):
            raise ValueError(f"{', '.join(unknown)}: expected some of {', '.join(known)}")
        stages = spec.get("NUM_STAGES", len(spec.get("DEPTH", (0, 0, 0))))
        given: dict[str, Any] = {
            mine: tuple(spec[name])[:stages] for name, mine in AUTHORS.items() if name in spec
        }
        if "INIT" in spec:
            given["init"] = spec["INIT"]
        return cls(img_size, in_chans, spec.get("NUM_CLASSES", num_classes), **given)

    # ------------------------------------------------------------------ forward

    def to_map(self, x: Tokens) -> Tensor:
        """The patches of a stage."""
        return patches(x)

    def finished(self, x: Tokens) -> Tensor:
        """The normalised map; with the pooling "token", moved so that its mean is that token."""
        normed = x._replace(x=self.norm(x.x))
        found = patches(normed)
        if self.global_pool != "token" or not x.prefix:
            return found
        return found + (normed.x[:, :1, None] - found.mean(dim=(1, 2), keepdim=True))

    def pool(self, x: Tensor) -> Tensor:
        """A map to features (B, C)."""
        return x.mean(dim=(1, 2)) if self.global_pool == "token" else super().pool(x)

    # ------------------------------------------------------------------ timm's contract

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head for `num_classes` (0: none), and another pooling if given. Raises ValueError
        for one that cannot be."""
        if global_pool is not None:
            self._pooling(global_pool)
        super().reset_classifier(num_classes)

    def no_weight_decay(self) -> set[str]:
        """Class tokens and tables of positions."""
        kinds = ("cls_token", "pos_embed")
        return {name for name, _ in self.named_parameters() if name.endswith(kinds)}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that sort parameters by depth, for layer-wise rates."""
        groups = super().group_matcher(coarse)
        if not coarse:
            tokens = (r"^stages\.(\d+)\.(?:cls_token|pos_embed)", (0,))
            groups["blocks"] = [tokens, *groups["blocks"]]
        return groups

    def _natural_pool(self) -> str:
        return "avg" if self._last().cls_token is None else "token"

    def _last(self) -> ConvStage:
        last = self.stages[-1]
        if not isinstance(last, ConvStage):
            raise TypeError(f"{type(last).__name__} for the last stage; expected a ConvStage")
        return last

    def _pooling(self, global_pool: str) -> None:
        if global_pool not in ("token", *POOLS):
            raise ValueError(f"global_pool {global_pool!r}; expected token, avg, max or ''")
        if global_pool == "token" and self._last().cls_token is None:
            raise ValueError("global_pool 'token' needs a class token in the last stage")
        self.global_pool = global_pool


def _blocks(dim: int, depth: int, drop_path: float, **options: Any) -> list[Block]:
    rates = torch.linspace(0, drop_path, depth, device="cpu").tolist()
    return [Block(dim, drop_path=rate, **options) for rate in rates]


def _rows(columns: Mapping[str, Any], stages: int) -> list[dict[str, Any]]:
    """One mapping per stage, of columns that hold a value for all stages or one for each."""
    rows = zip(*each(stages, **columns), strict=True)
    return [dict(zip(columns, row, strict=True)) for row in rows]


def _in_the_last(value: Any, stages: int, otherwise: Any) -> Any:
    return value if isinstance(value, Sequence) else [otherwise] * (stages - 1) + [value]


def _mapped(size: Size, conv: nn.Conv2d) -> Size:
    """The size of the map that a convolution gives."""
    kernel, stride, padding = conv.kernel_size[0], conv.stride[0], int(conv.padding[0])
    rows, columns = ((side + 2 * padding - kernel) // stride + 1 for side in size)
    return rows, columns


def _init(module: nn.Module, xavier: bool) -> None:
    if not isinstance(module, nn.Linear) or module.weight.is_meta:
        return
    nn.init.xavier_uniform_(module.weight) if xavier else trunc_normal_(module.weight, std=0.02)
    if module.bias is not None:
        nn.init.zeros_(module.bias)


# ---------------------------------------------------------------------- the authors' layouts

AUTHORS = {
    "PATCH_SIZE": "patch_size", "PATCH_STRIDE": "patch_stride", "PATCH_PADDING": "patch_padding",
    "DIM_EMBED": "embed_dim", "NUM_HEADS": "num_heads", "DEPTH": "depths",
    "MLP_RATIO": "mlp_ratio", "ATTN_DROP_RATE": "attn_drop_rate", "DROP_RATE": "proj_drop_rate",
    "DROP_PATH_RATE": "drop_path_rate", "QKV_BIAS": "qkv_bias", "CLS_TOKEN": "cls_token",
    "QKV_PROJ_METHOD": "qkv_proj_method", "KERNEL_QKV": "kernel_qkv", "PADDING_Q": "padding_q",
    "PADDING_KV": "padding_kv", "STRIDE_Q": "stride_q", "STRIDE_KV": "stride_kv",
}  # fmt: skip
HUB = (  # Transformers' names -> the authors'; the first that fits wins in each group of a name
    (r"^cvt\.encoder\.stages\.(\d+)\.", r"stage\1."),
    (r"\.layers\.(\d+)\.", r".blocks.\1."),
    (r"\.embedding\.convolution_embeddings\.projection\.", ".patch_embed.proj."),
    (r"\.embedding\.convolution_embeddings\.normalization\.", ".patch_embed.norm."),
    (r"\.attention\.attention\.convolution_projection_([qkv])\w*\.convolution_projection"
     r"\.convolution\.", r".attn.conv_proj_\1.conv."),
    (r"\.attention\.attention\.convolution_projection_([qkv])\w*\.convolution_projection"
     r"\.normalization\.", r".attn.conv_proj_\1.bn."),
    (r"\.attention\.attention\.projection_([qkv])\w*\.", r".attn.proj_\1."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"^layernorm\.", "norm."),
    (r"^classifier\.", "head."),
)  # fmt: skip


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: CvT) -> dict[str, Tensor]:
    """A released state dict, the authors' or Transformers', under the model's names; tables of
    positions resized."""
    state = unwrapped(state_dict)
    if any(name.startswith("cvt.encoder.") for name in state):
        for pattern, name in HUB:
            state = {re.sub(pattern, name, old): value for old, value in state.items()}
    state = {_renamed(name): value for name, value in state.items()}
    tables = {
        f"stages.{i}.pos_embed": Table(stage.size, 0)
        for i, stage in enumerate(model.stages)
        if isinstance(stage, ConvStage) and stage.size is not None
    }
    return resize_tables(state, tables)


def _renamed(name: str) -> str:
    name = re.sub(r"^stage0\.patch_embed\.", "stem.", name)
    name = re.sub(r"^stage(\d+)\.patch_embed\.", r"stages.\1.downsample.", name)
    return re.sub(r"^stage(\d+)\.", r"stages.\1.", name)


_21 = {"depths": (1, 4, 16)}
_W24 = {"embed_dim": (192, 768, 1024), "depths": (2, 2, 20), "num_heads": (3, 12, 16)}
VARIANTS: dict[str, dict[str, Any]] = {
    "cvt_13": {},
    "cvt_21": _21,
    "cvt_13_384": {"img_size": 384},
    "cvt_21_384": _21 | {"img_size": 384},
    "cvt_w24": _W24 | {"img_size": 384},
    # ours, for small pictures
    "cvt_micro_32": {
        "img_size": 32, "embed_dim": (32, 64, 96), "depths": (1, 2, 3), "num_heads": (1, 2, 3),
        "patch_size": 3, "patch_stride": 2, "patch_padding": 1, "mlp_ratio": 2.0,
    },
}  # fmt: skip


def _settings(arguments: Mapping[str, Any]) -> Any:
    side = arguments.get("img_size", 224)
    grid = side // (8 if side == 32 else 16)
    crop = {} if side != 224 else {"crop_pct": 0.875}
    return settings(side, "stem.proj", "head", pool_size=(grid, grid), **crop)


default_cfgs = generate_default_cfgs({name: _settings(a) for name, a in VARIANTS.items()})
register(__name__, CvT, VARIANTS, checkpoint_filter_fn, out_indices=(0, 1, 2))
