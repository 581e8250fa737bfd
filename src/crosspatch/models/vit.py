# SPDX-License-Identifier: Apache-2.0
"""The trunk: one heterogeneous vision transformer.

"An Image is Worth 16x16 Words", Dosovitskiy et al., arXiv 2010.11929, and "Training data-efficient
image transformers & distillation through attention" (DeiT), Touvron et al., arXiv 2012.12877, ICML
2021.

    z0 = [class; distillation; registers; E patches] + positions
    z  = z + DropPath(LayerScale(MSA(LN z)));  z = z + DropPath(LayerScale(MLP(LN z)))      per
    block y  = head(LN(z)[0]); with a distillation token the mean of two heads' logits

The network is a list of stages, each with a width and a list of block specs, with an optional
reduction between stages. It computes what timm's `VisionTransformer` computes for LayerScale,
QK-norm, registers, a distillation token and class-free pooling, under timm's parameter names, and
takes apart into `embed`, `run`, `pool` and `head`, so that masked pre-training, distillation, token
reduction, pruned shapes and dense features are uses of it.

Departures: logits, not softmax outputs, of the two heads are averaged, as the authors' code does
(the paper's text adds softmax outputs). Expected at 224: Ti 5.72 M and 1.25 GMACs, S 22.05 M and
4.60, B 86.57 M and 17.56; distilled 2D + (D + 1)K parameters more.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import crosspatch._torchvision  # noqa: F401

import torch
from timm.layers import QuickGELU, trunc_normal_
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from crosspatch.layers.attention import Attention
from crosspatch.layers.block import BlockOptions, BlockSpec, run_blocks
from crosspatch.layers.first_weights import init_linear
from crosspatch.layers.patch_embed import ConvStem, PatchEmbed, pair
from crosspatch.layers.position import Table, resize_table, resize_tables
from crosspatch.layers.reducer import Reducer
from crosspatch.layers.stage import StageSpec, build_stages, truncated
from crosspatch.layers.tokens import TokenState, as_map, mean_patch, select_patches

ACTIVATIONS = {
    "gelu": nn.GELU,
    "gelu_tanh": partial(nn.GELU, approximate="tanh"),
    "quick_gelu": QuickGELU,
}
UNREAD = ("mask_token", "head1")  # in a released file
# (in_chans, dim, patch_size) to a module from images (B, C, H, W) to patch tokens (B, h*w, dim)
Stem = Callable[[int, int, tuple[int, int]], nn.Module]


class VisionTransformer(nn.Module):
    """The trunk ViT; argument names are timm's.

    stages: overrides `embed_dim`, `depth`, `num_heads` and `mlp_ratio` with explicit shapes.
    dist_token: DeiT's distillation token with a head of its own. stem: "patch", "conv" (small
    pictures) or a `Stem`. residual_scale: a constant factor of both branches of every block.
    pos_margin: how positions are resized to another grid (`layers.position.resize_table`).
    attention: the class of every block's.
    img_size: the side or (H, W) that positions are laid out for; other inputs raise ValueError
    unless `dynamic_img_size`, which resizes the positions on the way.
    """

    blocks: nn.Sequential

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        proj_bias: bool = True,
        init_values: float | None = None,
        class_token: bool = True,
        dist_token: bool = False,
        reg_tokens: int = 0,
        pos_embed: str = "learn",
        no_embed_class: bool = False,
        pre_norm: bool = False,
        final_norm: bool = True,
        fc_norm: bool | None = None,
        dynamic_img_size: bool = False,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_eps: float = 1e-6,
        act_layer: str = "gelu",
        stem: str | Stem = "patch",
        residual_scale: float = 1.0,
        pos_margin: float = 0.0,
        attention: type[Attention] = Attention,
        stages: Sequence[StageSpec] | None = None,
    ) -> None:
        super().__init__()
        _check_pooling(global_pool, class_token)
        if dist_token and not class_token:
            raise ValueError("a distillation token stands beside a class token; set class_token")
        norm = partial(nn.LayerNorm, eps=norm_eps)
        if stages is None:
            spec = BlockSpec.uniform(embed_dim, num_heads, mlp_ratio)
            stages = (StageSpec(embed_dim, (spec,) * depth),)
        self.stages = tuple(stages)
        first, last = self.stages[0].width, self.stages[-1].width

        self.img_size, self.patch_size = pair(img_size), pair(patch_size)
        self.grid = _grid(self.img_size, self.patch_size)
        self.in_chans, self.num_classes, self.global_pool = in_chans, num_classes, global_pool
        self.embed_dim = self.num_features = self.head_hidden_size = last
        self.num_reg_tokens, self.has_class_token = reg_tokens, class_token
        self.num_prefix_tokens = int(class_token) + int(dist_token) + reg_tokens
        self.no_embed_class, self.dynamic_img_size = no_embed_class, dynamic_img_size
        self.pos_margin = pos_margin
        self.grad_checkpointing = self.distilled_training = False
        self.reducer: Reducer | None = None

        self.patch_embed = _stem(stem, in_chans, first, self.patch_size, bias=not pre_norm)
        self.cls_token = _token(class_token, first)
        self.dist_token = _token(dist_token, first)
        self.reg_token = _token(reg_tokens, first)
        rows = self.grid[0] * self.grid[1] + (0 if no_embed_class else self.num_prefix_tokens)
        self.pos_embed = nn.Parameter(torch.zeros(1, rows, first)) if pos_embed == "learn" else None
        self.pos_drop = nn.Dropout(pos_drop_rate)
        self.norm_pre = norm(first) if pre_norm else nn.Identity()

        options = BlockOptions(
            qkv_bias=qkv_bias,
            proj_bias=proj_bias,
            qk_norm=qk_norm,
            init_values=init_values,
            residual_scale=residual_scale,
            norm=norm,
            act=ACTIVATIONS[act_layer],
            attention=attention,
            attn_drop=attn_drop_rate,
            proj_drop=proj_drop_rate,
        )
        self.blocks, self.reductions = build_stages(self.stages, options, drop_path_rate)
        self.feature_info = self._feature_info()

        after_pool = global_pool in ("avg", "max") if fc_norm is None else fc_norm
        self.norm = norm(last) if final_norm and not after_pool else nn.Identity()
        self.fc_norm = norm(last) if final_norm and after_pool else nn.Identity()
        self.head_drop = nn.Dropout(drop_rate)
        self.head = _classifier(last, num_classes)
        self.head_dist = _classifier(last, num_classes) if dist_token else None
        self.init_weights()

    def init_weights(self) -> None:
        """Truncated normal of 0.02 for Linear layers, tokens and positions; convolutions as in
        torch."""
        for name in ("cls_token", "dist_token", "reg_token", "pos_embed"):
            parameter = getattr(self, name)
            if parameter is not None and not parameter.is_meta:
                trunc_normal_(parameter, std=0.02)
        self.apply(init_linear)

    # ------------------------------------------------------------------ the four parts

    def embed(self, x: Tensor, keep: Tensor | None = None) -> TokenState:
        """Images (B, C, H, W) to the state before the first block.

        keep: (B, M) int64, the patches to go on with (row-major indices into the grid); None for
        all. Raises ValueError for an image size that the positions are not laid out for.
        """
        grid = self._check_size(x)
        tokens = self.patch_embed(x)
        prefix = [t for t in (self.cls_token, self.dist_token, self.reg_token) if t is not None]
        prefix = [t.expand(x.shape[0], -1, -1) for t in prefix]
        positions = self._positions(grid)
        if positions is None:
            tokens = torch.cat([*prefix, tokens], dim=1)
        elif self.no_embed_class:
            tokens = torch.cat([*prefix, tokens + positions], dim=1)
        else:
            tokens = torch.cat([*prefix, tokens], dim=1) + positions
        tokens = self.pos_drop(tokens)
        state = TokenState(tokens, None, None, self.num_prefix_tokens, grid)
        if keep is not None:
            state = select_patches(state, keep)
        return state._replace(tokens=self.norm_pre(state.tokens))

    def run(
        self,
        state: TokenState,
        collect: Collection[int] = (),
        *,
        pooled: bool = False,
        reducer: Reducer | str | None = "own",
        attended: dict[int, Tensor] | None = None,
    ) -> tuple[TokenState, dict[int, TokenState]]:
        """All blocks over the state; the states after the blocks in `collect`, by number.

        pooled: only what `pool` reads is needed; where that is the prefix tokens, the last block
        computes no patch (1/12 of a DeiT, the same numbers) and the state has none. reducer: takes
        the place of the model's own. attended: see `run_blocks`.
        """
        collected, first, maps = {}, 0, {}
        hooks: Any = self.reducer if isinstance(reducer, str) else reducer
        short = pooled and self.reads_prefix and not collect
        for stage, spec in enumerate(self.stages):
            if str(stage) in self.reductions:
                state = self.reductions[str(stage)](state)
            mine: Any = self.blocks[first : first + len(spec.blocks)]
            state, found = run_blocks(
                mine,
                state,
                first=first,
                reducer=hooks,
                collect=collect,
                checkpointing=self.grad_checkpointing,
                maps=maps,
                last_rows=self.num_prefix_tokens if short and spec is self.stages[-1] else None,
                attended=attended,
            )
            collected.update(found)
            first += len(spec.blocks)
        if hooks is not None and state.tokens.shape[1] > self.num_prefix_tokens:
            state = hooks.pool(state)
        return state, collected

    @property
    def reads_prefix(self) -> bool:
        """Whether `pool` reads the prefix tokens and nothing else."""
        return self.global_pool == "token"

    def pool(self, state: TokenState) -> Tensor | tuple[Tensor, Tensor]:
        """The final state to features (B, C): class token, (class, distillation), or a pool of
        patches.

        A mean over reduced tokens weighs each by its size.
        """
        state = state._replace(tokens=self.norm(state.tokens))
        return self._pool(state.tokens, state.sizes)

    def classify(self, pooled: Any) -> Any:
        """Features of `pool` to logits (B, K), or the pair of them in distillation."""
        if self.head_dist is None:
            return self.head(self.head_drop(self.fc_norm(pooled)))
        first, second = self.head(pooled[0]), self.head_dist(pooled[1])
        if self.training and self.distilled_training:
            return first, second
        return (first + second) / 2

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """x: (B, in_chans, H, W). Logits (B, num_classes), or the pair of them in distillation."""
        state, _ = self.run(self.embed(x), pooled=True)
        logits = self.classify(self.pool(state))
        return logits if self.reducer is None else self.reducer.decide(state, logits)

    # ------------------------------------------------------------------ timm's contract

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to normalised tokens (B, N, C)."""
        state, _ = self.run(self.embed(x))
        return self.norm(state.tokens)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Any:
        """Tokens of `forward_features` to logits, or to the features before the classifier."""
        pooled = self._pool(x, None)
        if not pre_logits:
            return self.classify(pooled)
        if isinstance(pooled, tuple):
            return (pooled[0] + pooled[1]) / 2
        return self.head_drop(self.fc_norm(pooled))

    def get_classifier(self) -> nn.Module | tuple[nn.Module, nn.Module]:
        """The head; with a distillation token both."""
        return self.head if self.head_dist is None else (self.head, self.head_dist)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """New heads for `num_classes` (0: none), and another pooling if given."""
        if global_pool is not None:
            _check_pooling(global_pool, self.has_class_token)
            self.global_pool = global_pool
        self.num_classes = num_classes
        like = next(self.parameters())
        self.head = _classifier(self.embed_dim, num_classes).to(like)
        if self.head_dist is not None:
            self.head_dist = _classifier(self.embed_dim, num_classes).to(like)

    def set_distilled_training(self, enable: bool = True) -> None:
        """While training, return the pair of logits (class, distillation) instead of their mean."""
        self.distilled_training = enable

    def no_weight_decay(self) -> set[str]:
        """Positions and tokens. (DeiT's own list lacks `dist_token`, as the `deit` recipe
        knows.)"""
        names = ("pos_embed", "cls_token", "dist_token", "reg_token")
        return {name for name in names if getattr(self, name) is not None}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that sort parameters by depth, for layer-wise rates."""
        return {
            "stem": r"^cls_token|dist_token|reg_token|pos_embed|patch_embed|norm_pre",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm|^reductions", (99999,))],
        }

    def position_tables(self) -> dict[str, Table]:
        """Grids of the learned positions, by the names of the tables."""
        if self.pos_embed is None:
            return {}
        n_prefix = 0 if self.no_embed_class else self.num_prefix_tokens
        return {"pos_embed": Table(self.grid, n_prefix, self.pos_margin)}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass instead of keeping their activations."""
        self.grad_checkpointing = enable

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
        """Outputs of the blocks `indices` as maps (B, C, h, w) (or "NLC"), and the final tokens.

        As in timm: an int takes the last n blocks, None all. `stop_early` is accepted and changes
        nothing but time.
        """
        wanted, _ = feature_take_indices(len(self.blocks), indices)
        state, collected = self.run(self.embed(x), collect=set(wanted))
        maps = []
        for number in wanted:
            found = collected[number]
            if norm:
                found = found._replace(tokens=self.norm(found.tokens))
            maps.append(as_map(found, output_fmt, return_prefix_tokens))
        return maps if intermediates_only else (self.norm(state.tokens), maps)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the intermediates `indices` do not need; returns the indices kept."""
        wanted, deepest = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: deepest + 1]
        self.stages = truncated(self.stages, deepest + 1)
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.fc_norm = nn.Identity()
            self.reset_classifier(0, "")
        return wanted

    # ------------------------------------------------------------------ details

    def _check_size(self, x: Tensor) -> tuple[int, int]:
        size = (x.shape[2], x.shape[3])
        if size == self.img_size:
            return self.grid
        if not self.dynamic_img_size:
            raise ValueError(
                f"an image of {size[0]}x{size[1]}; this model takes "
                f"{self.img_size[0]}x{self.img_size[1]}; build it with img_size={size}"
            )
        return _grid(size, self.patch_size)

    def _positions(self, grid: tuple[int, int]) -> Tensor | None:
        if self.pos_embed is None or grid == self.grid:
            return self.pos_embed
        n_prefix = 0 if self.no_embed_class else self.num_prefix_tokens
        return resize_table(self.pos_embed, self.grid, grid, n_prefix, self.pos_margin)

    def _pool(self, x: Tensor, sizes: Tensor | None) -> Any:
        n = self.num_prefix_tokens
        if self.dist_token is not None:
            return x[:, 0], x[:, 1]
        if self.global_pool == "token":
            return x[:, 0]
        if self.global_pool == "max":
            return x[:, n:].amax(dim=1)
        return mean_patch(x, n, sizes) if self.global_pool == "avg" else x

    def _feature_info(self) -> list[dict[str, Any]]:
        info, stride, number = [], max(self.patch_size), 0
        for stage in self.stages:
            stride *= stage.stride
            for _ in stage.blocks:
                info.append(
                    {"module": f"blocks.{number}", "num_chs": stage.width, "reduction": stride}
                )
                number += 1
        return info


def _stem(
    kind: str | Stem, in_chans: int, dim: int, patch_size: tuple[int, int], *, bias: bool
) -> nn.Module:
    if callable(kind):
        return kind(in_chans, dim, patch_size)
    if kind == "patch":
        return PatchEmbed(in_chans, dim, patch_size, bias=bias)
    if kind == "conv":
        return ConvStem(in_chans, dim, patch_size[0])
    raise ValueError(f"stem {kind!r}; expected 'patch' or 'conv'")


def _grid(size: tuple[int, int], patch: tuple[int, int]) -> tuple[int, int]:
    rows, columns = size[0] // patch[0], size[1] // patch[1]
    if rows < 1 or columns < 1:
        raise ValueError(f"an image of {size[0]}x{size[1]} holds no patch of {patch[0]}x{patch[1]}")
    return rows, columns


def _token(count: int | bool, dim: int) -> nn.Parameter | None:
    return nn.Parameter(torch.zeros(1, int(count), dim)) if count else None


def _classifier(dim: int, num_classes: int) -> nn.Module:
    if num_classes <= 0:
        return nn.Identity()
    head = nn.Linear(dim, num_classes)
    init_linear(head)
    return head


def _check_pooling(global_pool: str, class_token: bool) -> None:
    if global_pool not in ("", "token", "avg", "max"):
        raise ValueError(f"global_pool {global_pool!r}; expected '', 'token', 'avg' or 'max'")
    if global_pool == "token" and not class_token:
        raise ValueError("global_pool='token' needs class_token=True; or pool with 'avg'")


def checkpoint_filter_fn(
    state_dict: Mapping[str, Any], model: VisionTransformer
) -> dict[str, Tensor]:
    """A released state dict, made to fit `model`: unwrapped, positions resized to the model's grid.

    Takes DeiT's files ({"model": …}), timm's, and MixPro's, whose mask token and second head its
    network never reads. Raises ValueError where a table is no square grid.
    """
    found = state_dict.get("model", state_dict)
    read = {k: v for k, v in found.items() if k.partition(".")[0] not in UNREAD}
    return resize_tables(read, model.position_tables())
