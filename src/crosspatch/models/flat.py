# SPDX-License-Identifier: Apache-2.0
"""timm's contract for networks of one width and one grid: what their backbones do alike.

    x -> embed: [class;] patches + positions -> blocks -> norm -> pool -> drop -> head

A backbone builds `blocks` and `norm`, offers `embed`, tells its grid, and has everything that timm
asks of a model: features, heads, intermediate maps, checkpointing, pruning. The trunk (`vit.py`) is
the one for plain blocks; this is for blocks that differ from it in more than their shapes.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import crosspatch._torchvision  # noqa: F401

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from crosspatch.layers.first_weights import init_linear
from crosspatch.layers.linear import Linear
from crosspatch.layers.patch_embed import pair
from crosspatch.layers.position import Table, resize_table
from crosspatch.layers.tokens import TokenState

FORMATS = ("NCHW", "NHWC", "NLC")


class FlatTokens(nn.Module):
    """A backbone of blocks over one grid of tokens, with or without a class token before them.

    A subclass sets `blocks`, each called as block(tokens, grid=…), and `norm`, may set `cls_token`
    and `pos_embed`, and calls `finish` at the end of its constructor. With a class token features
    are tokens (B, 1 + N, C), "NLC", as timm's ViTs have them; without one they are a map (B, h, w,
    C), "NHWC". table: the kind of its positions, which says how they are resized.
    """

    table: type[Table] = Table
    blocks: nn.ModuleList
    norm: nn.Module

    def __init__(self) -> None:
        super().__init__()
        self.cls_token: Any = None
        self.pos_embed: Any = None

    def finish(
        self,
        dim: int,
        grid: tuple[int, int],
        stride: int,
        *,
        img_size: int | tuple[int, int],
        in_chans: int,
        num_classes: int,
        global_pool: str,
        drop_rate: float = 0.0,
    ) -> None:
        """What is alike in all. grid: of the patches of a picture of `img_size`; stride: pixels
        from one to the next. Raises ValueError for an unknown pooling."""
        self.num_prefix_tokens = int(self.cls_token is not None)
        self.img_size, self.grid, self.in_chans = pair(img_size), grid, in_chans
        self.num_classes, self.drop_rate = num_classes, drop_rate
        self.embed_dim = self.num_features = self.head_hidden_size = dim
        self.output_fmt = "NLC" if self.num_prefix_tokens else "NHWC"
        self.grad_checkpointing = False
        self.feature_info = [
            {"module": f"blocks.{i}", "num_chs": dim, "reduction": stride}
            for i in range(len(self.blocks))
        ]
        self.head = self.make_head(num_classes)
        self.set_pool(global_pool)

    def make_head(self, num_classes: int) -> nn.Module:
        """Features (B, C) to logits; nothing for 0 classes."""
        if num_classes <= 0:
            return nn.Identity()
        head = Linear(self.head_hidden_size, num_classes)
        init_linear(head)
        return head

    @property
    def pools(self) -> tuple[str, ...]:
        """The poolings there are."""
        return ("token", "avg", "max", "") if self.num_prefix_tokens else ("avg", "max", "")

    def set_pool(self, global_pool: str) -> None:
        """Another pooling. Raises ValueError for one that is not in `pools`."""
        if global_pool not in self.pools:
            raise ValueError(f"global_pool {global_pool!r}; expected one of {self.pools}")
        self.global_pool = global_pool

    # ------------------------------------------------------------------ forward

    def embed(self, x: Tensor) -> TokenState:
        """Images (B, in_chans, H, W) to the state before the first block: `patches`, with the class
        token and the positions."""
        tokens, grid = self.patches(x)
        if self.cls_token is not None:
            tokens = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), tokens], dim=1)
        if self.pos_embed is not None:
            tokens = tokens + self.positions(grid)
        return TokenState(tokens, None, None, self.num_prefix_tokens, grid)

    def patches(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Images (B, in_chans, H, W) to patches (B, h * w, C) and their grid (h, w)."""
        raise ValueError(f"{type(self).__name__} does not say how pictures become patches")

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """The table (1, [1 +] h * w, C) for a grid, resized where it is of another one."""
        prefix, mode = self.num_prefix_tokens, self.table.mode
        return resize_table(self.pos_embed, self.grid, grid, prefix, mode=mode)

    def run(
        self, state: TokenState, collect: Collection[int] = (), depth: int | None = None
    ) -> tuple[TokenState, dict[int, TokenState]]:
        """The first `depth` blocks (None: all) over the state; the states after those in `collect`,
        by number."""
        collected, recompute = {}, self.grad_checkpointing and torch.is_grad_enabled()
        for number, block in enumerate(self.blocks[:depth]):
            if recompute and self.training:
                again = torch.utils.checkpoint.checkpoint
                tokens: Any = again(block, state.tokens, grid=state.grid, use_reentrant=False)
            else:
                tokens = block(state.tokens, grid=state.grid)
            state = state._replace(tokens=tokens)
            if number in collect:
                collected[number] = state
        return state, collected

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) to the normalised map or tokens, as `output_fmt` says."""
        return self._delivered(self.run(self.embed(x))[0])

    def forward_head(
        self, x: Tensor, pre_logits: bool = False, grid: tuple[int, int] | None = None
    ) -> Tensor:
        """What `forward_features` gives to logits (B, K), or to what the classifier reads (B, C);
        with the pooling '' both are maps (B, h, w, ·), of the patches alone.

        grid: where tokens lie that are of another size than `img_size`, for the pooling ''.
        """
        x = F.dropout(self.pool(x, grid or self.grid), self.drop_rate, self.training)
        return x if pre_logits else self.head(x)

    def pool(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """A map (B, h, w, C), or tokens (B, 1 + N, C), to features (B, C)."""
        tokens = x.flatten(1, 2) if x.ndim == 4 else x
        patches = tokens[:, self.num_prefix_tokens :]
        if self.global_pool == "":
            return x if x.ndim == 4 else patches.unflatten(1, grid)
        if self.global_pool == "token":
            return tokens[:, 0]
        return patches.amax(dim=1) if self.global_pool == "max" else patches.mean(dim=1)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, in_chans, H, W). Logits (B, num_classes)."""
        state, _ = self.run(self.embed(x))
        return self.forward_head(self._delivered(state), grid=state.grid)

    def _delivered(self, state: TokenState) -> Tensor:
        tokens = self.norm(state.tokens)
        return tokens if self.num_prefix_tokens else tokens.unflatten(1, state.grid)

    # ------------------------------------------------------------------ timm's contract

    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head for `num_classes` (0: none), and another pooling if given. Raises ValueError
        for an unknown one."""
        if global_pool is not None:
            self.set_pool(global_pool)
        self.num_classes = num_classes
        self.head = self.make_head(num_classes).to(next(self.parameters()))

    def no_weight_decay(self) -> set[str]:
        """Positions and the class token."""
        names = ("pos_embed", "cls_token")
        return {name for name in names if getattr(self, name) is not None}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that sort parameters by depth, for layer-wise rates."""
        return {
            "stem": r"^cls_token|pos_embed|patch_embed|tokenizer",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm|^attention_pool", (99999,))],
        }

    def position_tables(self) -> dict[str, Table]:
        """Grids of the positions, by the names of the tables."""
        if self.pos_embed is None:
            return {}
        return {"pos_embed": self.table(self.grid, self.num_prefix_tokens)}

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
        """The patches after the blocks `indices`, as maps ("NCHW", "NHWC") or "NLC", and what
        `forward_features` gives.

        As in timm: an int takes the last n blocks, None all; norm: all normalised;
        return_prefix_tokens: each with its prefix tokens (B, n, C) beside it. Raises ValueError for
        another format.
        """
        if output_fmt not in FORMATS:
            raise ValueError(f"output_fmt {output_fmt!r}; expected one of {FORMATS}")
        wanted, deepest = feature_take_indices(len(self.blocks), indices)
        depth = deepest + 1 if stop_early and intermediates_only else None
        state, collected = self.run(self.embed(x), set(wanted), depth)
        maps = []
        for number in wanted:
            tokens = collected[number].tokens
            tokens = self.norm(tokens) if norm else tokens
            prefix, patches = tokens.tensor_split((self.num_prefix_tokens,), dim=1)
            if output_fmt == "NHWC":
                patches = patches.unflatten(1, state.grid)
            elif output_fmt == "NCHW":
                patches = patches.transpose(1, 2).unflatten(2, state.grid).contiguous()
            maps.append((patches, prefix) if return_prefix_tokens else patches)
        return maps if intermediates_only else (self._delivered(state), maps)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the blocks that the intermediates `indices` do not need; returns the indices
        kept."""
        wanted, deepest = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: deepest + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return wanted
