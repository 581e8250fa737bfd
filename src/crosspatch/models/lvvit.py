# SPDX-License-Identifier: Apache-2.0
"""LV-ViT: a ViT with a convolutional stem whose every patch token has logits of its own.

"All Tokens Matter: Token Labeling for Training Better Vision Transformers", Jiang et al., arXiv
2104.10858, NeurIPS 2021.

    t  = Conv(ReLU BN Conv3x3(ReLU BN Conv3x3(ReLU BN Conv7x7/2 x)));   z = [class; t] + positions
    z += DropPath(MSA(LN z)) / lambda;  z += DropPath(MLP(LN z)) / lambda               per block
    y  = head(LN(z)[0]) + 1/2 max over the patches p of aux_head(LN(z)[p]), class by class

LN has an eps of 1e-5, queries, keys and values have no bias, the MLP's ratio is 3. Token labelling
trains the two terms apart, `aux_head` on one soft label per patch: `forward_dense` gives them, over
the full grid also where a reducer has left fewer tokens (the maximum runs over those). There
MixToken (`swap`, drawn in `mixing/mixtoken.py`) exchanges a box of tokens within the batch.

Departures: `forward` returns y while training too, and nothing is mixed unless a box is given. A
picture whose side is no multiple of the patch loses its remainder, as before a plain stem.

Expected (M parameters, GMACs): T 8.53, 2.87; S 26.15, 6.55; at 384 26.30, 21.90; M 55.83, 12.68;
at 384 56.03, 41.64; at 448 56.13, 59.99; L 150.02 at 224; at 448 150.47, 155.12; at 512 150.66,
211.62. The authors train with a stochastic depth of 0.1 (S), 0.2 (M) and 0.3 (L).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import crosspatch._torchvision  # noqa: F401

import torch
from timm.models import clean_state_dict, generate_default_cfgs
from torch import Tensor, nn

from crosspatch.layers.box import Box
from crosspatch.layers.first_weights import init_linear
from crosspatch.layers.linear import Linear
from crosspatch.layers.patch_embed import flatten_grid
from crosspatch.layers.position import resize_tables
from crosspatch.layers.tokens import TokenState, recover
from crosspatch.models.registry import register, settings
from crosspatch.models.vit import VisionTransformer

AUX_WEIGHT = 0.5  # of the patches' maximum in the logits
WRAPPERS = ("state_dict_ema", "state_dict", "model")  # where a released file may keep its tensors


class DenseLogits(NamedTuple):
    """What token labelling trains: logits (B, K) of the class token, (B, P, K) of all patches, and
    the box in which the former are mixed, or None."""

    cls: Tensor
    patches: Tensor
    box: Box | None


class LVViT(VisionTransformer):
    """The trunk with LV-ViT's stem, residual scale and auxiliary head.

    skip_lam: lambda > 0, what each branch is divided by. aux_head: False leaves the logits to the
    class token. stem: "lvvit" (four convolutions, the first three of `stem_width` filters) or a
    stem of the trunk. Everything else is the trunk's, with the authors' defaults; pooling is by
    "token", or "" for all tokens (ValueError). reset_classifier(0) leaves the class token's
    features.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 384,
        depth: int = 16,
        num_heads: int = 6,
        mlp_ratio: float = 3.0,
        qkv_bias: bool = False,
        norm_eps: float = 1e-5,
        skip_lam: float = 2.0,
        stem: str = "lvvit",
        stem_width: int = 64,
        aux_head: bool = True,
        **trunk: Any,
    ) -> None:
        _check_pooling(global_pool)
        if skip_lam <= 0:
            raise ValueError(f"skip_lam={skip_lam}; branches are divided by a number above 0")
        super().__init__(
            img_size,
            patch_size,
            in_chans,
            num_classes,
            global_pool,
            embed_dim,
            depth,
            num_heads,
            mlp_ratio,
            qkv_bias,
            class_token=True,
            dist_token=False,
            norm_eps=norm_eps,
            stem=partial(Stem, width=stem_width) if stem == "lvvit" else stem,
            residual_scale=1 / skip_lam,
            **trunk,
        )
        self.aux_head = _aux(self.embed_dim, num_classes) if aux_head else None

    @property
    def reads_prefix(self) -> bool:
        """Only without the auxiliary head, which reads every patch."""
        return self.aux_head is None and super().reads_prefix

    # ------------------------------------------------------------------ dense logits

    def forward_dense(self, x: Tensor, box: Box | None = None) -> DenseLogits:
        """x: (B, in_chans, H, W). The logits that token labelling trains, for every patch.

        box: MixToken's, over the grid: those tokens are exchanged with the batch in reverse behind
        the stem, and their logits exchanged back. Raises ValueError without an auxiliary head.
        """
        state = self.embed(x)
        state, _ = self.run(state if box is None else mix_tokens(state, box))
        state = state._replace(tokens=self.norm(state.tokens))
        patches = self._dense(state)
        if box is not None:
            patches = swap(patches, state.grid, box)
        return DenseLogits(super().classify(state.tokens[:, 0]), patches, box)

    def dense_logits(self, state: TokenState) -> Tensor:
        """The state that `run` gives to the auxiliary logits (B, P, K) of the full grid.

        A patch reads the token that stands for it; one that was dropped has zeros. Raises
        ValueError without an auxiliary head.
        """
        return self._dense(state._replace(tokens=self.norm(state.tokens)))

    def _dense(self, state: TokenState) -> Tensor:
        if self.aux_head is None:
            raise ValueError("no auxiliary head to give dense logits; build with aux_head=True")
        return recover(state._replace(tokens=self.aux_head(self.head_drop(state.tokens))))

    # ------------------------------------------------------------------ the trunk's last part

    def _pool(self, x: Tensor, sizes: Tensor | None) -> Any:
        """(class token, patches) where both are read."""
        if self.global_pool != "token" or self.aux_head is None:
            return super()._pool(x, sizes)
        return x[:, 0], x[:, self.num_prefix_tokens :]

    def classify(self, pooled: Any) -> Any:
        if not isinstance(pooled, tuple):
            return super().classify(pooled)
        first, patches = pooled
        logits = super().classify(first)
        if self.aux_head is None or self.num_classes == 0:
            return logits
        return logits + AUX_WEIGHT * self.aux_head(self.head_drop(patches)).amax(dim=1)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Any:
        """Tokens of `forward_features` to logits, or to the class token's features (B, C)."""
        pooled = self._pool(x, None)
        if not pre_logits:
            return self.classify(pooled)
        first = pooled[0] if isinstance(pooled, tuple) else pooled
        return self.head_drop(self.fc_norm(first))

    def get_classifier(self) -> nn.Module | tuple[nn.Module, nn.Module]:
        """The class token's head and the patches'; without the latter the head alone."""
        return self.head if self.aux_head is None else (self.head, self.aux_head)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """New heads for `num_classes` (0: none), and another pooling ("token" or "") if given."""
        _check_pooling(global_pool or "")
        super().reset_classifier(num_classes, global_pool)
        if self.aux_head is not None:
            self.aux_head = _aux(self.embed_dim, num_classes).to(next(self.parameters()))


class Stem(nn.Module):
    """Four convolutions down to the patch grid, with batch norm and ReLU after the first three.

    The first, 7x7, halves the picture, the last takes half a patch at a time. (B, C, H, W) to (B,
    h*w, dim). Raises ValueError for an odd patch.
    """

    def __init__(
        self, in_chans: int, dim: int, patch_size: tuple[int, int], width: int = 64
    ) -> None:
        super().__init__()
        if patch_size[0] % 2 or patch_size[1] % 2:
            raise ValueError(f"the lvvit stem takes even patches, not {patch_size}")
        self.patch_size = patch_size
        self.conv1 = nn.Conv2d(in_chans, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        half = (patch_size[0] // 2, patch_size[1] // 2)
        self.proj = nn.Conv2d(width, dim, half, half)

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = (s // p * p for s, p in zip(x.shape[2:], self.patch_size, strict=True))
        x = x[:, :, :rows, :columns]
        x = self.bn1(self.conv1(x)).relu()
        x = self.bn2(self.conv2(x)).relu()
        x = self.bn3(self.conv3(x)).relu()
        return flatten_grid(self.proj(x))


def swap(patches: Tensor, grid: tuple[int, int], box: Box) -> Tensor:
    """patches (B, P, C) of a grid (rows, columns), those in the box from the batch in reverse.

    MixToken's mixing of tokens and, as it is its own inverse, the way back of their logits. Raises
    ValueError where P is not the size of the grid.
    """
    if patches.shape[1] != grid[0] * grid[1]:
        raise ValueError(f"{patches.shape[1]} patches for a grid of {grid[0]}x{grid[1]}")
    rows = torch.arange(grid[0], device=patches.device)
    columns = torch.arange(grid[1], device=patches.device)
    tall = (rows >= box.top) & (rows < box.bottom)
    wide = (columns >= box.left) & (columns < box.right)
    inside = (tall[:, None] & wide).flatten()
    return torch.where(inside[:, None], patches.flip(0), patches)


def mix_tokens(state: TokenState, box: Box) -> TokenState:
    """The state before the first block with the patches in the box from the batch in reverse."""
    mixed = swap(state.patches, state.grid, box)
    return state._replace(tokens=torch.cat([state.tokens[:, : state.n_prefix], mixed], dim=1))


def _aux(dim: int, num_classes: int) -> nn.Module:
    if num_classes <= 0:
        return nn.Identity()
    head = Linear(dim, num_classes)
    init_linear(head)
    return head


def _check_pooling(global_pool: str) -> None:
    if global_pool not in ("", "token"):
        raise ValueError(f"global_pool {global_pool!r}; expected '' or 'token' for LV-ViT")


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: LVViT) -> dict[str, Tensor]:
    """A released state dict, made to fit `model`: unwrapped, positions resized to the model's grid.

    Takes bare tensors and files that keep them as `state_dict_ema` (before all others),
    `state_dict` or `model`, their names with or without "module.". Raises ValueError where a table
    is no square grid.
    """
    found = next((state_dict[key] for key in WRAPPERS if key in state_dict), state_dict)
    return resize_tables(clean_state_dict(dict(found)), model.position_tables())


def _variant(width: int, heads: int, depth: int, skip_lam: float, **more: Any) -> dict[str, Any]:
    return {
        "embed_dim": width,
        "num_heads": heads,
        "depth": depth,
        "skip_lam": skip_lam,
        **more,
    }


# the authors' entry points, at 224 unless another size is asked for
SHAPES = {
    "lvvit_t": _variant(240, 4, 12, 1.0),
    "lvvit_s": _variant(384, 6, 16, 2.0),
    "lvvit_m": _variant(512, 8, 20, 2.0),
    "lvvit_l": _variant(768, 12, 24, 3.0, stem_width=128),
}
SIDES = {
    "lvvit_t": (224,),
    "lvvit_s": (224, 384),
    "lvvit_m": (224, 384, 448),
    "lvvit_l": (448, 512),
}
VARIANTS = SHAPES | {
    f"{name}_{side}": {**SHAPES[name], "img_size": side}
    for name, sides in SIDES.items()
    for side in sides
}
# ours, for small pictures, in the shape of vit_micro_32
SMALL = {"lvvit_micro_32": _variant(64, 2, 4, 2.0, img_size=32, patch_size=4, stem_width=32)}


def _settings(name: str, arguments: Mapping[str, Any]) -> Any:
    """How pictures are prepared for a variant: T and S see their middle nine tenths."""
    crop = 0.9 if name.startswith(("lvvit_t", "lvvit_s")) else 1.0
    side = arguments.get("img_size", 224)
    return settings(side, "patch_embed.conv1", ("head", "aux_head"), crop_pct=crop)


default_cfgs = generate_default_cfgs(
    {name: _settings(name, arguments) for name, arguments in (VARIANTS | SMALL).items()}
)
register(__name__, LVViT, VARIANTS | SMALL, checkpoint_filter_fn, out_indices=3)
