# SPDX-License-Identifier: Apache-2.0
"""SpectFormer: the first layers mix tokens by a learned filter of their spectrum, the later ones by
attention.

"SpectFormer: Frequency and Attention is what you need in a Vision Transformer", Patro, Namboodiri,
Agneeswaran, arXiv 2304.06446, WACV 2025.

    gate(x) = irfft2(w * rfft2(x))         orthonormal, w complex, (h, w/2+1, C)

    vanilla       x = patches + positions
                  x = x + MLP(LN(gate(LN x)))                                 the first alpha blocks
                  x = x + Attention(LN x);   x = x + MLP(LN x)                             the rest
                  logits = head(mean(LN x))
    hierarchical  x -> stem -> stage -> conv3/2, LN -> stage -> … four times, LN after all but the
                  last;   stem = LN conv3/2 [ReLU BN conv3] [ReLU BN conv3] [ReLU BN conv7/2]
                  x = x + Mix(LN x);   x = x + FFN(LN x)
                  Mix = gate in the first two stages, attention in the others
                  FFN = Linear(GELU(dwconv3x3(Linear x)))
                  c = mean(x);   c = c + Attention(LN [c; x])[0];   c = c + MLP(LN c)
                  y = LN [c; x];   logits = head(y[0]) + 1/2 max over places p of aux_head(y[p])

Norms have an eps of 1e-6, those after convolutions one of 1e-5. The maximum is taken class by
class; token labelling trains its two terms apart: `forward_dense` gives them, with MixToken's box.

Departures: a filter is learnt for the maps of `img_size` and interpolated for others (the authors'
hierarchical ones are tied to 224); pictures that patches do not divide are padded at the bottom and
at the right. `forward` gives the logits above while training too, and nothing is mixed unless a
box is given. `forward_features` gives the map before the last norm, which the head reads. Heads of
vanilla T and B are ours, as the authors' six divide neither width. Built from a description of the
authors' code, which has no licence; there are no released weights.

Expected at 224 (M parameters, GMACs without the Fourier transforms): vanilla t 9.16, 1.84; xs
20.03, 3.99; s 32.45, 6.63; b 57.16, 11.6; hierarchical with the auxiliary head h_s 22.23, 4.07; h_b
33.05, 6.61; h_l 54.68, 13.2. Drop path of the paper: 0.15 for vanilla s, 0.25 for b; 0.1, 0.1, 0.3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import crosspatch._torchvision  # noqa: F401

import torch
import torch.nn.functional as F
from timm.models import generate_default_cfgs
from torch import Tensor, nn

from crosspatch.layers.box import Box
from crosspatch.layers.first_weights import drawn, init_fan_out, init_linear
from crosspatch.layers.maps import Downsample
from crosspatch.layers.patch_embed import PatchEmbed
from crosspatch.layers.position import resize_tables
from crosspatch.layers.spectrum import resize_filter
from crosspatch.layers.stage import drop_rates, one_a_stage
from crosspatch.layers.windows import Size, counts
from crosspatch.models.flat import FlatTokens
from crosspatch.models.lvvit import AUX_WEIGHT, DenseLogits, swap
from crosspatch.models.pyramid import POOLS, NormedStage, Pyramid
from crosspatch.models.registry import register, settings, unwrapped
from crosspatch.models.spectformer_blocks import (
    AttentionBlock,
    Block,
    ClassBlock,
    ConvMlp,
    MapAttention,
    Norm,
    SpectralBlock,
    SpectralGate,
    Stem,
)
from crosspatch.models.spectformer_names import joined, ours, renamed


class SpectFormer(FlatTokens):
    """The vanilla family; argument names are timm's.

    alpha: the number of spectral blocks, before those with attention. img_size: the side or (H, W)
    that positions and filters are learnt for; pictures of any size run. Raises ValueError for
    shapes that do not agree.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 384,
        depth: int = 12,
        alpha: int = 4,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if not 0 <= alpha <= depth:
            raise ValueError(f"alpha {alpha}; expected 0 to {depth}, the depth, spectral blocks")
        self.patch_size = patch_size
        grid, hidden = counts(img_size, patch_size), int(embed_dim * mlp_ratio)
        self.patch_embed = PatchEmbed(in_chans, embed_dim, patch_size)
        self.pos_embed = drawn(1, grid[0] * grid[1], embed_dim)
        self.pos_drop = nn.Dropout(pos_drop_rate)
        attention = partial(
            AttentionBlock, embed_dim, num_heads, hidden, qkv_bias=qkv_bias,
            attn_drop=attn_drop_rate, proj_drop=proj_drop_rate,
        )  # fmt: skip
        rates = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
        spectral = partial(SpectralBlock, embed_dim, grid, hidden, proj_drop_rate)
        self.blocks = nn.ModuleList(spectral(rate) for rate in rates[:alpha])
        self.blocks.extend(attention(drop_path=rate) for rate in rates[alpha:])
        self.norm = Norm(embed_dim)
        self.apply(init_linear)
        shape = {"img_size": img_size, "in_chans": in_chans, "num_classes": num_classes}
        how = {"global_pool": global_pool, "drop_rate": drop_rate}
        self.finish(embed_dim, grid, patch_size, **shape, **how)

    def patches(self, x: Tensor) -> tuple[Tensor, Size]:
        """Images (B, in_chans, H, W) to patches (B, h * w, C) and their grid (h, w)."""
        size = (x.shape[2], x.shape[3])
        down, right = (-side % self.patch_size for side in size)
        x = F.pad(x, (0, right, 0, down)) if down or right else x
        return self.patch_embed(x), counts(size, self.patch_size)

    def embed(self, x: Tensor) -> Any:
        """Images (B, in_chans, H, W) to the state before the first block."""
        state = super().embed(x)
        return state._replace(tokens=self.pos_drop(state.tokens))

    @classmethod
    def from_authors(cls, **build: Any) -> SpectFormer | HierarchicalSpectFormer:
        """The network of the authors' vanilla class for these arguments; of their hierarchical
        functions for `fn`, or where there are widths of several stages."""
        if "fn" in build or "embed_dims" in build:
            return HierarchicalSpectFormer.from_authors(**build)
        return cls(**ours(build))


class HierarchicalSpectFormer(Pyramid):
    """The hierarchical family; what has several values has one for each stage.

    spectral_stages: how many of the first stages have gates; their num_heads are not read.
    patch_size: stride of the stem, 2 or 4; stem_width: its filters. aux_head: the classifier of
    places, which token labelling trains and the logits add. global_pool: "token", by class
    attention, or "avg", "max", "" over the map; built so, the network has neither class attention
    nor an auxiliary head. img_size: what filters are learnt for; pictures of any size run. Raises
    ValueError for shapes that do not agree.
    """

    channels_last = True
    aux_head: nn.Module | None

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dims: Sequence[int] = (64, 128, 320, 448),
        depths: Sequence[int] = (3, 4, 6, 3),
        num_heads: Sequence[int] = (2, 4, 10, 14),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        spectral_stages: int = 2,
        patch_size: int = 4,
        stem_width: int = 32,
        qkv_bias: bool = True,
        aux_head: bool = True,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        _check(embed_dims, depths, num_heads, mlp_ratios, spectral_stages, patch_size)
        attention = {
            "qkv_bias": qkv_bias, "attn_drop": attn_drop_rate, "proj_drop": proj_drop_rate,
        }  # fmt: skip
        self.stem = Stem(in_chans, embed_dims[0], stem_width, patch_size // 2)
        rates = drop_rates(drop_path_rate, depths)
        size = counts(img_size, patch_size)
        self.stages = nn.ModuleList()
        for i, (dim, mine) in enumerate(zip(embed_dims, rates, strict=True)):
            mixer = partial(MapAttention, dim, num_heads[i], **attention)
            if i < spectral_stages:
                mixer = partial(SpectralGate, dim, size)
            mlp = partial(ConvMlp, dim, int(dim * mlp_ratios[i]), proj_drop_rate)
            blocks = [Block(dim, mixer(), mlp(), rate) for rate in mine]
            norm = nn.Identity() if i == len(depths) - 1 else Norm(dim)
            down = Downsample(embed_dims[i - 1], dim) if i else None
            self.stages.append(NormedStage(down, blocks, norm))
            size = counts(size, 2)
        width, hidden = embed_dims[-1], int(embed_dims[-1] * mlp_ratios[-1])
        asks = global_pool == "token"
        last = [ClassBlock(width, num_heads[-1], hidden, **attention)] if asks else []
        self.post_network = nn.ModuleList(last)
        self.norm_head = Norm(width)
        self.apply(init_fan_out)
        self.finish(
            embed_dims, [patch_size * 2**i for i in range(len(depths))], img_size=img_size,
            in_chans=in_chans, num_classes=num_classes, drop_rate=drop_rate,
        )  # fmt: skip
        self._pooling(global_pool)
        self.aux_head = self.make_head(num_classes) if aux_head and asks else None

    @classmethod
    def from_authors(cls, **build: Any) -> HierarchicalSpectFormer:
        """The network of the authors' hierarchical class for these arguments, or of their function
        `fn`. Raises ValueError for another function."""
        build = dict(build)
        name = str(build.pop("fn", "spectformer_s")).replace("spectformer_", "spectformer_h_")
        if name not in HIERARCHICAL:
            raise ValueError(f"fn {name!r}; expected spectformer_s, spectformer_b or spectformer_l")
        return cls(**{**HIERARCHICAL[name], **ours(build)})

    # ------------------------------------------------------------------ forward

    def read(self, x: Tensor) -> Tensor:
        """The map of the last stage (B, h, w, C) to normalised tokens (B, 1 + h * w, C), the class
        vector first."""
        tokens = x.flatten(1, 2)
        tokens = torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1)
        for block in self.post_network:
            tokens = block(tokens)
        return self.norm_head(tokens)

    def pool(self, x: Tensor) -> Tensor:
        """A map to features (B, C), by class attention where that is the pooling."""
        return self.read(x)[:, 0] if self.global_pool == "token" else super().pool(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The map of `forward_features` to logits (B, K), or to what the classifier reads."""
        aux = self.aux_head
        if pre_logits or aux is None or self.global_pool != "token" or self.num_classes <= 0:
            return super().forward_head(x, pre_logits)
        tokens = F.dropout(self.read(x), self.drop_rate, self.training)
        return self.head(tokens[:, 0]) + AUX_WEIGHT * aux(tokens[:, 1:]).amax(dim=1)

    def forward_dense(self, x: Tensor, box: Box | None = None) -> DenseLogits:
        """x: (B, in_chans, H, W). The logits that token labelling trains, for every place of the
        last map.

        box: MixToken's, over that map: its places are exchanged with the batch in reverse before
        the first stage, and their logits exchanged back. Raises ValueError without an auxiliary
        head.
        """
        if self.aux_head is None:
            raise ValueError("no auxiliary head to give dense logits; build with aux_head=True")
        x = self.stem(x)
        if box is not None:
            times = 2 ** (len(self.stages) - 1)
            grid = (x.shape[1], x.shape[2])
            x = swap(x.flatten(1, 2), grid, _times(box, times)).unflatten(1, grid)
        for stage in self.stages:
            x = stage(x)
        tokens = F.dropout(self.read(x), self.drop_rate, self.training)
        patches = self.aux_head(tokens[:, 1:])
        if box is not None:
            patches = swap(patches, (x.shape[1], x.shape[2]), box)
        return DenseLogits(self.head(tokens[:, 0]), patches, box)

    # ------------------------------------------------------------------ timm's contract

    def get_classifier(self) -> nn.Module | tuple[nn.Module, nn.Module]:
        """The head of the class vector and that of the places; without the latter the head."""
        return self.head if self.aux_head is None else (self.head, self.aux_head)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """New heads for `num_classes` (0: none), and another pooling if given. Raises ValueError
        for an unknown one."""
        if global_pool is not None:
            self._pooling(global_pool)
        super().reset_classifier(num_classes)
        if self.aux_head is not None:
            self.aux_head = self.make_head(num_classes).to(next(self.parameters()))

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the maps `indices` do not need; returns the indices kept."""
        wanted = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        if prune_head:
            self.post_network, self.aux_head = nn.ModuleList(), None
        return wanted

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that sort parameters by depth, for layer-wise rates."""
        groups = super().group_matcher(coarse)
        if not coarse:
            groups["blocks"].append((r"^post_network", (99999,)))
        return groups

    def _pooling(self, global_pool: str) -> None:
        if global_pool not in ("token", *POOLS):
            raise ValueError(f"global_pool {global_pool!r}; expected token, avg, max or ''")
        if global_pool == "token" and not len(self.post_network):
            raise ValueError("global_pool 'token' needs class attention; build the network with it")
        self.global_pool = global_pool


def _times(box: Box, times: int) -> Box:
    """The same box on a map with `times` as many rows and columns."""
    edges = (box.top, box.bottom, box.left, box.right)
    top, bottom, left, right = (times * edge for edge in edges)
    return Box(top, bottom, left, right, box.lam)


def _check(embed_dims, depths, num_heads, mlp_ratios, spectral_stages, patch_size) -> None:
    one_a_stage(len(depths), embed_dims=embed_dims, num_heads=num_heads, mlp_ratios=mlp_ratios)
    if not 0 <= spectral_stages <= len(depths):
        raise ValueError(f"spectral_stages {spectral_stages}; there are {len(depths)} stages")
    if patch_size not in (2, 4):
        raise ValueError(f"patch_size {patch_size}; the stem takes 2 or 4")


# ---------------------------------------------------------------------- the authors' layouts


def checkpoint_filter_fn(
    state_dict: Mapping[str, Any], model: SpectFormer | HierarchicalSpectFormer
) -> dict[str, Tensor]:
    """A state dict in the authors' layout under the model's names, filters and positions resized;
    class attention and the auxiliary head are left away where the model has none."""
    state = unwrapped(state_dict)
    if isinstance(model, SpectFormer):
        state = resize_tables(state, model.position_tables())
    else:
        depth = len(model.stages)
        state = {renamed(name, depth): value for name, value in joined(state).items()}
        without = [] if len(model.post_network) else ["post_network."]
        without += ["aux_head."] if model.aux_head is None else []
        state = {n: v for n, v in state.items() if not n.startswith(tuple(without))}
    for name, module in model.named_modules():
        key = f"{name}.complex_weight"
        if isinstance(module, SpectralGate) and key in state and state[key].ndim == 4:
            rows, columns = module.complex_weight.shape[:2]
            given = state[key].permute(2, 0, 1, 3)
            resized = resize_filter(given, (rows, columns)).permute(1, 2, 0, 3)
            state[key] = resized.to(given.dtype)
    return state


VANILLA: dict[str, dict[str, Any]] = {
    "spectformer_vanilla_t": {"embed_dim": 256, "num_heads": 4},
    "spectformer_vanilla_xs": {},
    "spectformer_vanilla_s": {"depth": 19},
    "spectformer_vanilla_b": {"embed_dim": 512, "depth": 19, "num_heads": 8},
}
HIERARCHICAL: dict[str, dict[str, Any]] = {
    "spectformer_h_s": {},
    "spectformer_h_b": {
        "embed_dims": (64, 128, 320, 512), "depths": (3, 4, 12, 3), "num_heads": (2, 4, 10, 16),
        "stem_width": 64,
    },
    "spectformer_h_l": {
        "embed_dims": (96, 192, 384, 512), "depths": (3, 6, 18, 3), "num_heads": (3, 6, 12, 16),
        "stem_width": 64,
    },
}  # fmt: skip
# Ours, for small pictures: a grid of 8x8; maps of 16x16, 8x8 and 4x4.
SMALL_VANILLA: dict[str, dict[str, Any]] = {
    "spectformer_micro_32": {
        "img_size": 32, "patch_size": 4, "embed_dim": 64, "depth": 4, "alpha": 2, "num_heads": 2,
    }
}  # fmt: skip
SMALL_HIERARCHICAL: dict[str, dict[str, Any]] = {
    "spectformer_h_micro_32": {
        "img_size": 32, "patch_size": 2, "embed_dims": (24, 48, 88), "depths": (1, 2, 3),
        "num_heads": (1, 2, 4), "mlp_ratios": (4, 4, 4), "stem_width": 8,
    }
}  # fmt: skip


def _settings(arguments: Mapping[str, Any], *, flat: bool) -> Any:
    side = arguments.get("img_size", 224)
    stride = arguments.get("patch_size", 16)
    if not flat:
        stages = len(arguments.get("depths", (0,) * 4))
        stride = arguments.get("patch_size", 4) * 2 ** (stages - 1)
    pool = {"pool_size": (side // stride, side // stride)}
    if flat:
        return settings(side, "patch_embed.proj", "head", **pool)
    return settings(side, "stem.conv.0", ("head", "aux_head"), **pool)


default_cfgs = generate_default_cfgs(
    {n: _settings(a, flat=True) for n, a in (VANILLA | SMALL_VANILLA).items()}
    | {n: _settings(a, flat=False) for n, a in (HIERARCHICAL | SMALL_HIERARCHICAL).items()}
)
register(__name__, SpectFormer, VANILLA | SMALL_VANILLA, checkpoint_filter_fn, out_indices=3)
enter = partial(register, __name__, HierarchicalSpectFormer, filter_fn=checkpoint_filter_fn)
enter(HIERARCHICAL, out_indices=(0, 1, 2, 3))
enter(SMALL_HIERARCHICAL, out_indices=(0, 1, 2))
