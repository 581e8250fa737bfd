# SPDX-License-Identifier: Apache-2.0
"""Evo-LeViT: only the patches that the class token attends to most go through a stage.

"Evo-ViT: Slow-Fast Token Evolution for Dynamic Vision Transformer", Xu et al., arXiv 2108.01390,
AAAI 2022, on LeViT (arXiv 2104.01136). The scores g of the N patches are

    g = s_1;  g = (1 - t_i) g + t_i s_i,     s_i the class token's attention, mean over the heads,

t_i = sigmoid(learned), first 0.5. Where a share k < 1 is kept, patches are ordered by g; the first
K = int(N k), at least one, take the slow path with the class token and a representative r of the
rest:

    r = sum_rest g_j x_j / sum_rest g_j;     [c; x_kept; r] = blocks([c; x_kept; r])
    x_rest = x_rest + sum over branches b of branch_b(r)

and r is forgotten. Nothing is lost: every patch goes back to its place. Stage-wise (from epoch 200
of 300 on, and in inference) this spans the reduced blocks of a stage, layer-wise each block alone.
Between stages an attention asks from every second row and column; scores keep their sum. Logits are
the mean of a class and a distillation head on the mean patch; in training two more may read the
class token.

Departures from the authors' code: scores and places are passed on, not kept in globals, and patches
return to raster order at once after a slow path (theirs travel sorted; the same but for ties);
parameters that a mode does not read get a gradient of zero, so that several processes can train;
`fast="copy"` is theirs for DeiT only.

Expected (M parameters without and with the auxiliary heads, GMACs at half the patches and at all of
them): 128S 7.84, 8.61, 0.256, 0.312; 128 9.27, 10.04, 0.305, 0.414; 192 11.03, 11.80, 0.510, 0.668;
256 19.01, 20.03, 0.880, 1.146; 384 39.30, 40.84, 1.849, 2.390; on pictures of 384 pixels 256 19.24,
20.27, 2.763, 3.674; 384 39.64, 41.18, 5.622, 7.389.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import crosspatch._torchvision  # noqa: F401

import torch
from timm.layers import trunc_normal_
from timm.models import generate_default_cfgs
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from crosspatch.layers.patch_embed import flatten_grid, pair
from crosspatch.layers.position import Table, resize_tables
from crosspatch.layers.stage import each, one_a_stage
from crosspatch.layers.tokens import TokenState, as_map
from crosspatch.layers.windows import counts
from crosspatch.models.evo_levit_blocks import (
    STRIDE,
    Blending,
    Block,
    Downsample,
    NormLinear,
    checkpointed,
    stem,
)
from crosspatch.models.evo_levit_paths import FAST, segments, slow_fast
from crosspatch.models.registry import register, settings


class EvoState(NamedTuple):
    """tokens: (B, 1 + N, C), class token first, patches in raster order; scores: (B, N), None
    before the first block; grid: (rows, columns), rows * columns = N."""

    tokens: Tensor
    scores: Tensor | None
    grid: tuple[int, int]


class Selection(NamedTuple):
    """Which patches (B, K), raster indices into `grid`, were slow from block `block` of stage
    `stage` on."""

    stage: int
    block: int
    grid: tuple[int, int]
    kept: Tensor


class Stage(nn.Module):
    """An attention that halves the grid (not in the first stage), then blocks."""

    blocks: nn.ModuleList

    def __init__(self, downsample: Downsample | None, blocks: Sequence[Block]) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)


class EvoLeViT(nn.Module):
    """The network.

    img_size: side or (H, W); the stem makes ceil(side / patch_size) patches of it, each later stage
    half of them, rounded up. patch_size: a power of two. embed_dim, depth, num_heads: per stage.
    key_dim, attn_ratio, mlp_ratio: a number, or one per stage. down_heads: of the attention between
    stages, None for width // key_dim.
    keep_ratio: the share of patches that are slow in each block (sum of `depth` entries), or one
    number for all but the first two blocks, which keep all. stage_keep_ratio: the share in each
    stage, from its first reduced block on; None: that block's.
    stagewise: one selection for a stage, or one for each block. fast: "representative" or "copy".
    learn_tradeoff: blend scores by the learned weights, or by 0.5. distillation: a second head.
    aux_heads: heads on the class token too, for training. Raises ValueError for what does not fit.
    """

    stages: nn.ModuleList

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: Sequence[int] = (128, 256, 384),
        depth: Sequence[int] = (2, 3, 4),
        num_heads: Sequence[int] = (4, 6, 8),
        key_dim: int | Sequence[int] = 16,
        attn_ratio: float | Sequence[float] = 2.0,
        mlp_ratio: float | Sequence[float] = 2.0,
        down_heads: Sequence[int] | None = None,
        down_attn_ratio: float = 4.0,
        down_mlp_ratio: float = 2.0,
        keep_ratio: float | Sequence[float] = 0.5,
        stage_keep_ratio: float | Sequence[float] | None = None,
        stagewise: bool = True,
        fast: str = "representative",
        learn_tradeoff: bool = True,
        distillation: bool = True,
        aux_heads: bool = True,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        _check(global_pool, fast, patch_size, embed_dim, depth, num_heads)
        count = len(embed_dim)
        ratios = {"attn_ratio": attn_ratio, "mlp_ratio": mlp_ratio}
        keys, attns, mlps = each(count, key_dim=key_dim, **ratios)
        self.img_size, self.patch_size, self.in_chans = pair(img_size), patch_size, in_chans
        self.grids = _grids(self.img_size, patch_size, count)
        self.segments = {
            mode: segments(depth, keep_ratio, stage_keep_ratio, self.grids, mode)
            for mode in (True, False)
        }
        self.num_classes, self.global_pool, self.fast = num_classes, global_pool, fast
        self.embed_dim, self.num_features = tuple(embed_dim), embed_dim[-1]
        self.head_hidden_size, self.num_prefix_tokens = embed_dim[-1], 1
        self.stagewise, self.learn_tradeoff = stagewise, learn_tradeoff
        self.grad_checkpointing = self.distilled_training = False

        self.patch_embed = stem(in_chans, embed_dim[0], patch_size.bit_length() - 1)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim[0]))
        rows, columns = self.grids[0]
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + rows * columns, embed_dim[0]))
        if down_heads is None:
            down_heads = [max(1, w // k) for w, k in zip(embed_dim[:-1], keys[:-1], strict=True)]
        one_a_stage(count - 1, down_heads=down_heads)
        stages, width = [], 0
        for i, dim in enumerate(embed_dim):
            down = None
            if i > 0:
                ratios = (down_attn_ratio, down_mlp_ratio)
                shape = (width, dim, self.grids[i - 1], keys[i - 1], down_heads[i - 1], *ratios)
                down = Downsample(*shape, drop_path_rate)
            shape = (dim, keys[i], num_heads[i], attns[i], mlps[i], drop_path_rate)
            stages.append(Stage(down, [Block(*shape) for _ in range(depth[i])]))
            width = dim
        self.stages = nn.ModuleList(stages)
        self.feature_info = self._feature_info()
        self.head_drop = nn.Dropout(drop_rate)
        self.head, self.head_dist, self.head_cls, self.head_cls_dist = (
            NormLinear(width, num_classes) if wanted else None
            for wanted in (True, distillation, aux_heads, aux_heads and distillation)
        )
        self.init_weights()

    def init_weights(self) -> None:
        """Truncated normal of 0.02 for the class token and positions; Linear layers as in torch."""
        for name, parameter in self.named_parameters():
            if name.endswith(("cls_token", "pos_embed")) and not parameter.is_meta:
                trunc_normal_(parameter, std=0.02)

    # ------------------------------------------------------------------ the parts

    def embed(self, x: Tensor) -> EvoState:
        """Images (B, in_chans, H, W) to the state before the first block. Raises ValueError for an
        image size that the model is not built for."""
        size = (x.shape[2], x.shape[3])
        if size != self.img_size:
            raise ValueError(
                f"an image of {size[0]}x{size[1]}; this model takes "
                f"{self.img_size[0]}x{self.img_size[1]}; build it with img_size={size}"
            )
        tokens = flatten_grid(self.patch_embed(x))
        token = self.cls_token.expand(x.shape[0], -1, -1)
        return EvoState(torch.cat([token, tokens], dim=1) + self.pos_embed, None, self.grids[0])

    def run(
        self, state: EvoState, collect: Collection[int] = ()
    ) -> tuple[EvoState, dict[int, EvoState], list[Selection]]:
        """All stages over the state; the states after the stages in `collect`, by number; and what
        was selected on the way."""
        collected: dict[int, EvoState] = {}
        selections: list[Selection] = []
        for number, stage in enumerate(self.stages):
            state, chosen = self._run_stage(number, stage, state)
            selections += chosen
            if number in collect:
                collected[number] = state
        return state, collected, selections

    def _run_stage(
        self, number: int, stage: Any, state: EvoState
    ) -> tuple[EvoState, list[Selection]]:
        x, grid, chosen = state.tokens, self.grids[number], []
        scores: Any = state.scores  # None before the first block only, where all patches are kept
        if stage.downsample is not None:
            x, scores = stage.downsample(x, scores, self.learn_tradeoff)
        remember = self.grad_checkpointing and torch.is_grad_enabled()
        blocks = [
            partial(checkpointed(block) if remember else block, learned=self.learn_tradeoff)
            for block in stage.blocks
        ]
        for start, stop, keep in self.segments[self.stagewise][number]:
            if keep is None:
                for block in blocks[start:stop]:
                    x, scores, _ = block(x, scores)
            else:
                x, scores, kept = slow_fast(blocks[start:stop], x, scores, keep, self.fast)
                chosen.append(Selection(number, start, grid, kept))
        return EvoState(x, scores, grid), chosen

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        """x: (B, in_chans, H, W). Logits (B, num_classes), the mean of the heads on the mean patch;
        or those of every head in distillation."""
        return self._classify(self.forward_features(x))

    # ------------------------------------------------------------------ timm's contract

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) to the last stage's tokens (B, 1 + N, C), in raster order."""
        return self.run(self.embed(x))[0].tokens

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Any:
        """Tokens of `forward_features` to logits, or to the features (B, C) that they are linear
        in, the mean of what the heads' norms make of the mean patch."""
        if not pre_logits:
            return self._classify(x)
        mean = self.head_drop(x[:, 1:].mean(dim=1))
        return torch.stack([head.bn(mean) for head in self._patch_heads()]).mean(dim=0)

    def get_classifier(self) -> tuple[nn.Module, ...]:
        """The Linear layers of all heads, those on the mean patch first."""
        return tuple(head.l for head in self._heads())

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """New Linear layers for `num_classes` (0: none) in every head; their norms stay."""
        if global_pool is not None:
            _check_pooling(global_pool)
            self.global_pool = global_pool
        self.num_classes = num_classes
        for head in self._heads():
            head.reset(num_classes)

    def set_distilled_training(self, enable: bool = True) -> None:
        """While training, return the logits of every head: class and distillation on the mean
        patch, then the auxiliary two on the class token."""
        self.distilled_training = enable

    def set_stagewise(self, enable: bool = True) -> None:
        """Select once per stage with learned blending, as the authors do from epoch 200 on; or once
        per block and blend by 0.5, as before it."""
        self.stagewise = self.learn_tradeoff = enable

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass instead of keeping their activations."""
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Positions, the class token, and the weights of blending."""
        kinds = ("pos_embed", "cls_token", "learn_tradeoff")
        return {name for name, _ in self.named_parameters() if name.endswith(kinds)}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that sort parameters by depth, a block (coarse: a stage) a group."""
        return {
            "stem": r"^(?:cls_token|pos_embed|patch_embed)",
            "blocks": r"^stages\.(\d+)"
            if coarse
            else [
                (r"^stages\.(\d+)\.downsample", (0,)),
                (r"^stages\.(\d+)\.blocks\.(\d+)", None),
                (r"^head", (99999,)),
            ],
        }

    def position_tables(self) -> dict[str, Table]:
        """Grids of the learned positions, by the names of the tables."""
        tables = {"pos_embed": Table(self.grids[0], 1)}
        for i in range(1, len(self.stages)):
            tables[f"stages.{i}.downsample.pos_embed"] = Table(self.grids[i - 1], 1)
        return tables

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Maps (B, C_i, h_i, w_i) (or "NLC") after the stages `indices`, and the final tokens.

        There is no norm: `norm` and `stop_early` are accepted and change nothing.
        """
        wanted, _ = feature_take_indices(len(self.feature_info), indices)
        state, collected, _ = self.run(self.embed(x), collect=set(wanted))
        found = [collected[i] for i in wanted]
        maps = [
            as_map(TokenState(s.tokens, None, None, 1, s.grid), output_fmt, return_prefix_tokens)
            for s in found
        ]
        return maps if intermediates_only else (state.tokens, maps)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages that the maps `indices` do not need; returns the indices kept."""
        wanted, deepest = feature_take_indices(len(self.feature_info), indices)
        self.stages = self.stages[: deepest + 1]
        self.feature_info = self._feature_info()
        if prune_head:
            self.num_classes = 0
            self.num_features = self.head_hidden_size = self.embed_dim[deepest]
            self.head = NormLinear(self.num_features, 0).to(self.pos_embed)
            self.head_dist = self.head_cls = self.head_cls_dist = None
        return wanted

    # ------------------------------------------------------------------ details

    def _heads(self) -> list[Any]:
        return [*self._patch_heads(), *self._class_heads()]

    def _patch_heads(self) -> list[Any]:
        return [head for head in (self.head, self.head_dist) if head is not None]

    def _class_heads(self) -> list[Any]:
        return [head for head in (self.head_cls, self.head_cls_dist) if head is not None]

    def _classify(self, x: Tensor) -> Any:
        mean, every = x[:, 1:].mean(dim=1), self.training and self.distilled_training
        logits = [head(self.head_drop(mean)) for head in self._patch_heads()]
        if every:
            logits += [head(self.head_drop(x[:, 0])) for head in self._class_heads()]
        if self.training and torch.is_grad_enabled():
            logits[0] = logits[0] + 0.0 * self._idle(every)
        return tuple(logits) if every else torch.stack(logits).mean(dim=0)

    def _idle(self, every: bool) -> Any:
        """A sum over the parameters that the mode may not read, for their gradient of zero."""
        idle = [m.learn_tradeoff for m in self.stages.modules() if isinstance(m, Blending)]
        if not every:
            idle += [p for head in self._class_heads() for p in head.parameters()]
        return sum(p.sum() for p in idle)

    def _feature_info(self) -> list[dict[str, Any]]:
        return [
            {
                "module": f"stages.{i}",
                "num_chs": self.embed_dim[i],
                "reduction": self.patch_size * STRIDE**i,
            }
            for i in range(len(self.stages))
        ]


def _check_pooling(global_pool: str) -> None:
    if global_pool not in ("avg", ""):
        raise ValueError(f"global_pool {global_pool!r}; expected 'avg': heads read the mean patch")


def _check(global_pool, fast, patch_size, embed_dim, depth, num_heads) -> None:
    _check_pooling(global_pool)
    if fast not in FAST:
        raise ValueError(f"fast {fast!r}; expected one of {', '.join(FAST)}")
    if patch_size < 2 or patch_size & (patch_size - 1):
        raise ValueError(f"patch_size {patch_size}; the stem halves: expected 2, 4, 8, 16 or 32")
    if embed_dim[0] < patch_size // 2:
        raise ValueError(
            f"embed_dim {embed_dim[0]}; the stem doubles it from the first convolution"
            f" on: expected at least {patch_size // 2} for patches of {patch_size}"
        )
    one_a_stage(len(embed_dim), depth=depth, num_heads=num_heads)
    if min(depth) < 1:
        raise ValueError(f"depth {tuple(depth)}; every stage has at least one block")


def _grids(size: tuple[int, int], patch_size: int, count: int) -> list[tuple[int, int]]:
    if min(size) < 1:
        raise ValueError(f"an image of {size[0]}x{size[1]}")
    strides = [patch_size * STRIDE**i for i in range(count)]
    return [counts(size, s) for s in strides]


# What an attention, an MLP and the attention between two stages hold, in the authors' names and
# ours. The units stand in the order of computation in their files too, whatever they nest in.
UNITS = {
    r"learn_tradeoff": "{}.learn_tradeoff",
    r"qkv\.(.*)": "{}.qkv.",
    r"kv\.(.*)": "{}.kv.",
    r"q\.1\.(.*)": "{}.q.",
    r"poss": "{}.pos_embed",
    r"proj\.(.*)": "{}.proj.",
    r"0\.((?:c|bn)\..*)": "{}.fc1.",
    r"2\.((?:c|bn)\..*)": "{}.fc2.",
}


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: EvoLeViT) -> dict[str, Tensor]:
    """A released state dict, made to fit `model`: unwrapped, under our names, positions resized.

    The authors hold every block twice, as `blocks` (layer-wise) and `stage_blocks`; one of them is
    enough, and where the two differ the second stays under its name, for the loading to refuse. The
    heads on the class token are left out where the model has none.
    """
    given: dict[str, Any] = dict(state_dict.get("model", state_dict))
    state: dict[str, Any] = {}
    for root in ("stage_blocks.", "blocks."):
        found = [name for name in given if name.startswith(root)]
        names = _renamed(found, model)
        for name in found:
            value, mine = given.pop(name), names.get(name, name)
            if mine not in state:
                state[mine] = value
            elif not torch.equal(state[mine], value):
                state[name] = value
    if "poss" in given:
        given["pos_embed"] = given.pop("poss")
    for name, value in given.items():
        if model.head_cls is not None or not name.startswith("head_cls"):
            state[name] = value
    return resize_tables(state, model.position_tables())


def _renamed(found: Iterable[str], model: EvoLeViT) -> dict[str, str]:
    """Our name for each of the authors' names of blocks that has one."""
    parts = {}
    for name in found:
        for pattern, ours in UNITS.items():
            match = re.fullmatch(rf"(.*?)\.{pattern}", name)
            if match:
                parts[name] = (match[1], ours + "".join(match.groups()[1:]))
                break
    prefixes = sorted({prefix for prefix, _ in parts.values()}, key=_place)
    units = dict(zip(prefixes, _units(model), strict=False))
    return {n: ours.format(units[p]) for n, (p, ours) in parts.items() if p in units}


def _place(path: str) -> list[tuple[int, int | str]]:
    """Sorts dotted paths with their numbers as numbers."""
    return [(0, int(p)) if p.isdigit() else (1, p) for p in path.split(".")]


def _units(model: EvoLeViT) -> list[str]:
    """Our names of the attentions and MLPs, in the order of computation."""
    names = []
    stages: Any = model.stages
    for i, stage in enumerate(stages):
        if stage.downsample is not None:
            names.append(f"stages.{i}.downsample")
            names += [f"stages.{i}.downsample.mlp"] * (stage.downsample.mlp is not None)
        for j, block in enumerate(stage.blocks):
            names.append(f"stages.{i}.blocks.{j}.attn")
            names += [f"stages.{i}.blocks.{j}.mlp"] * (block.mlp is not None)
    return names


def _variant(widths, heads, depth=(4, 4, 4), key_dim=16, side=224, **more: Any) -> dict[str, Any]:
    shape = {"embed_dim": widths, "num_heads": heads, "depth": depth, "key_dim": key_dim}
    return {**shape, "img_size": side, **more}


W128, W192, W256, W384 = (128, 256, 384), (192, 288, 384), (256, 384, 512), (384, 512, 768)
VARIANTS = {
    "evo_levit_128s": _variant(W128, (4, 6, 8), (2, 3, 4)),
    "evo_levit_128": _variant(W128, (4, 8, 12)),
    "evo_levit_192": _variant(W192, (3, 5, 6), key_dim=32),
    "evo_levit_256": _variant(W256, (4, 6, 8), key_dim=32),
    "evo_levit_384": _variant(W384, (6, 9, 12), key_dim=32, drop_path_rate=0.1),
}
LARGE = {f"{name}_384": {**arguments, "img_size": 384} for name, arguments in VARIANTS.items()}
# Ours, for small pictures.
SMALL = {
    "evo_levit_micro_32": _variant(
        (32, 48, 64), (2, 3, 4), (2, 2, 2), key_dim=8, side=32, patch_size=4
    )
}
HEADS = ("head.l", "head_dist.l", "head_cls.l", "head_cls_dist.l")
ALL = VARIANTS | LARGE | SMALL
default_cfgs = generate_default_cfgs(
    {name: settings(a["img_size"], "patch_embed.0.c", HEADS) for name, a in ALL.items()}
)
register(__name__, EvoLeViT, ALL, checkpoint_filter_fn, out_indices=(0, 1, 2))
