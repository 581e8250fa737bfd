# SPDX-License-Identifier: Apache-2.0
"""The pre-norm transformer block with free widths, and the run of a list of them over a token
state."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import crosspatch._torchvision  # noqa: F401

import torch
import torch.utils.checkpoint
from timm.layers import DropPath, LayerScale
from torch import Tensor, nn

from crosspatch.layers.attention import Attention
from crosspatch.layers.mlp import Mlp
from crosspatch.layers.reducer import AttentionStats, Reducer
from crosspatch.layers.tokens import TokenState, over_patches

CLASS_ROW = frozenset({"class_row"})


@dataclass(frozen=True)
class BlockSpec:
    """The shape of one block.

    heads, qk, value: of the attention, widths in total; heads = 0 leaves the attention out.
    hidden: of the MLP; 0 leaves it out. exists: False makes the block an identity that keeps its
    place. shares: index of an earlier block whose attention map this one reads, or None.
    """

    heads: int
    qk: int
    value: int
    hidden: int
    exists: bool = True
    shares: int | None = None

    @classmethod
    def uniform(cls, width: int, heads: int, mlp_ratio: float) -> BlockSpec:
        """The usual block: attention as wide as the tokens, MLP of `mlp_ratio` times that."""
        return cls(heads, width, width, int(width * mlp_ratio))


@dataclass(frozen=True)
class BlockOptions:
    """What all blocks of a network have in common besides their shapes.

    attention: the class of it. init_values: LayerScale's, or None. residual_scale: a constant
    factor of both branches instead of it (1/lambda in LV-ViT); ValueError where both are given.
    """

    qkv_bias: bool = True
    proj_bias: bool = True
    qk_norm: bool = False
    init_values: float | None = None
    residual_scale: float = 1.0
    norm: Callable[[int], nn.Module] = field(default=partial(nn.LayerNorm, eps=1e-6))
    act: Callable[[], nn.Module] = nn.GELU
    attention: type[Attention] = Attention
    attn_drop: float = 0.0
    proj_drop: float = 0.0

    def __post_init__(self) -> None:
        if self.init_values is not None and self.residual_scale != 1.0:
            raise ValueError(
                f"init_values={self.init_values} and residual_scale={self.residual_scale} both "
                "scale the branches; give one of them"
            )


class ResidualScale(nn.Module):
    """A branch times a constant; it stands where a LayerScale may, and has no parameter."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor

    def extra_repr(self) -> str:
        return f"{self.factor:g}"


class Block(nn.Module):
    """x += DropPath(LayerScale(Attention(LN x))); x += DropPath(LayerScale(MLP(LN x))).

    Parameters carry timm's names. `spec` may leave out either half.
    """

    def __init__(
        self, dim: int, spec: BlockSpec, options: BlockOptions, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        self.spec = spec
        self.attn: Any = None
        self.mlp: Any = None
        if spec.heads:
            self.norm1 = options.norm(dim)
            self.attn = options.attention(
                dim,
                spec.heads,
                spec.qk,
                spec.value,
                qkv_bias=options.qkv_bias,
                proj_bias=options.proj_bias,
                qk_norm=options.norm if options.qk_norm else None,
                attn_drop=options.attn_drop,
                proj_drop=options.proj_drop,
                shares=spec.shares is not None,
            )
            self.ls1, self.drop_path1 = _residual(dim, options, drop_path)
        if spec.hidden:
            self.norm2 = options.norm(dim)
            self.mlp = Mlp(
                dim,
                spec.hidden,
                act=options.act,
                bias=options.proj_bias,
                drop=options.proj_drop,
            )
            self.ls2, self.drop_path2 = _residual(dim, options, drop_path)

    def forward(
        self,
        x: Tensor,
        rows: int | None = None,
        bias: Tensor | None = None,
        grid: tuple[int, int] | None = None,
    ) -> Tensor:
        """x: (B, N, C) to (B, N, C), or to the first `rows` tokens of that, (B, rows, C).

        bias: (B, N) on the attention's keys, or None. grid: of the patches in x, where the block is
        `gridded`.
        """
        y = x if rows is None else x[:, :rows]
        if self.attn is not None:
            y = self.add_attention(y, self.attn(self.norm1(x), bias, rows, grid))
        return self.add_mlp(y)

    @property
    def gridded(self) -> bool:
        """Whether the attention looks at the neighbours of each patch: it needs the whole grid."""
        return self.attn is not None and self.attn.gridded

    @property
    def observed(self) -> bool:
        """Whether a forward hook looks at what this block or a part of it computes."""
        return any(module._forward_hooks for module in self.modules())

    def add_mlp(self, x: Tensor) -> Tensor:
        """The second half of the block."""
        if self.mlp is None:
            return x
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))

    def add_attention(self, x: Tensor, y: Tensor) -> Tensor:
        """x plus the attention's output y, scaled and dropped as the block does."""
        return x + self.drop_path1(self.ls1(y))


def _residual(dim: int, options: BlockOptions, rate: float) -> tuple[nn.Module, nn.Module]:
    scale = nn.Identity()
    if options.init_values is not None:
        scale = LayerScale(dim, init_values=options.init_values)
    elif options.residual_scale != 1.0:
        scale = ResidualScale(options.residual_scale)
    return scale, DropPath(rate) if rate > 0 else nn.Identity()


def make_blocks(
    dim: int, specs: Iterable[BlockSpec], options: BlockOptions, drop_paths: Sequence[float]
) -> list[nn.Module]:
    """One module per spec; a block that does not exist is an identity without parameters."""
    return [
        Block(dim, spec, options, rate) if spec.exists else nn.Identity()
        for spec, rate in zip(specs, drop_paths, strict=True)
    ]


def run_blocks(
    blocks: Sequence[nn.Module],
    state: TokenState,
    *,
    first: int = 0,
    reducer: Reducer | None = None,
    collect: Collection[int] = (),
    checkpointing: bool = False,
    maps: dict[int, Tensor] | None = None,
    last_rows: int | None = None,
    shared: Collection[int | None] | None = None,
    attended: dict[int, Tensor] | None = None,
) -> tuple[TokenState, dict[int, TokenState]]:
    """Run the blocks numbered `first`, `first + 1`, … over the state.

    collect: block numbers whose output state is returned too, by number. maps: attention maps of
    earlier blocks that later ones share; filled on the way. last_rows: the last block may compute
    so many tokens only, where nothing else looks at it. shared: the blocks whose map others read,
    where these are not all among `blocks` (`lenders`). attended: for the numbers that are its keys
    (blocks with an attention of their own, that no reducer replaces) it is given the class token's
    attention over the full grid (B, P): the mean over the heads, before dropout, without a
    gradient.
    """
    maps = {} if maps is None else maps
    shared = lenders(blocks) if shared is None else shared
    collected: dict[int, TokenState] = {}
    for number, block in enumerate(blocks, first):
        if isinstance(block, Block):
            hooked = reducer if reducer is not None and reducer.active(number) else None
            rows = last_rows if number == first + len(blocks) - 1 else None
            if rows is not None and _alone(block) and (not hooked or hooked.prefix_only(number)):
                state = _first_rows(block, state, number, hooked, rows, maps, attended)
            else:
                state = _run_block(
                    block, state, number, hooked, shared, maps, checkpointing, attended
                )
        if number in collect:
            collected[number] = state
    return state, collected


def lenders(blocks: Sequence[nn.Module]) -> set[int | None]:
    """Numbers of the blocks whose attention map one of `blocks` reads."""
    return {block.spec.shares for block in blocks if isinstance(block, Block)} - {None}


def _alone(block: nn.Module) -> bool:
    """Whether a block is a plain one that no hook observes."""
    if not isinstance(block, Block) or block.attn is None:
        return False
    return torch.compiler.is_compiling() or not block.observed


def _first_rows(
    block: Block,
    state: TokenState,
    number: int,
    reducer: Reducer | None,
    rows: int,
    maps: dict[int, Tensor],
    attended: dict[int, Tensor] | None,
) -> TokenState:
    """The last block, of which the first `rows` tokens are read."""
    if block.spec.shares is not None:
        return state._replace(tokens=_sharing(block, state.tokens, number, maps, rows))
    bias = reducer.bias(state, number) if reducer else None
    if number in (attended or ()):
        return _shown(block, state, number, attended, rows, bias)
    return state._replace(tokens=block(state.tokens, rows, bias, state.grid))


def _run_block(
    block: Block,
    state: TokenState,
    number: int,
    reducer: Reducer | None,
    shared: Collection[int | None],
    maps: dict[int, Tensor],
    checkpointing: bool,
    attended: dict[int, Tensor] | None,
) -> TokenState:
    if block.gridded and (reducer is not None or state.source is not None):
        raise ValueError(
            f"the attention of block {number} looks at the neighbours of each patch: it takes the "
            "whole grid, and no reducer"
        )
    again = checkpointing and torch.is_grad_enabled()
    recomputed = partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)
    if reducer is not None and block.attn is not None and block.spec.shares is None:
        run = partial(recomputed, _hooked) if again else _hooked
        state, shown = run(block, state, number, reducer, number in shared, attended)
        if shown is not None:
            maps[number] = shown
        return state
    if block.spec.shares is not None or number in shared:
        return state._replace(tokens=_sharing(block, state.tokens, number, maps))
    if number in (attended or ()):
        run = partial(recomputed, _shown) if again else _shown
        return run(block, state, number, attended)
    run = partial(recomputed, block) if again else block
    return state._replace(tokens=run(state.tokens, grid=state.grid))


def _shown(
    block: Block,
    state: TokenState,
    number: int,
    attended: Any,
    rows: int | None = None,
    bias: Tensor | None = None,
) -> TokenState:
    """A plain block, or the first `rows` tokens of its output, that shows its class row."""
    x = state.tokens
    y, row = block.attn.with_class_row(block.norm1(x), bias, rows, state.grid)
    attended[number] = over_patches(state, row)
    x = x if rows is None else x[:, :rows]
    return state._replace(tokens=block.add_mlp(block.add_attention(x, y)))


def _sharing(
    block: Block, x: Tensor, number: int, maps: dict[int, Tensor], rows: int | None = None
) -> Tensor:
    """A block that shows its attention map to later ones, or reads an earlier one's. Attention's
    dropout is applied where the map is made."""
    attn, normed = block.attn, block.norm1(x)
    if block.spec.shares is None:
        q, k, v = attn.project(normed)
        maps[number] = attn.drop(attn.map(q, k))
    else:
        v = attn.values(normed)
        maps[number] = maps[block.spec.shares]
    y = attn.merge_heads(maps[number][:, :, :rows] @ v)
    return block.add_mlp(block.add_attention(x[:, :rows], y))


def _hooked(
    block: Block,
    state: TokenState,
    number: int,
    reducer: Reducer,
    shows: bool,
    attended: dict[int, Tensor] | None,
) -> tuple[TokenState, Tensor | None]:
    """A block with an active reducer: each hook at its place. With the attention map (dropout
    applied) where it `shows` it to later blocks."""
    replaced = reducer.instead(block, state, number)
    if replaced is not None:
        return replaced, None
    state = reducer.before_attention(state, number)
    wanted = reducer.wants(number)
    attend = _mapped if shows or "full_map" in wanted else _fused
    needs = wanted | CLASS_ROW if number in (attended or ()) else wanted
    before = state
    state, y, stats, used = attend(block, state, number, reducer, needs)
    if attended is not None and number in attended and stats.class_row is not None:
        row = stats.class_row.detach().float().mean(dim=1)
        attended[number] = over_patches(before, row)
        if attend is _fused and "class_row" not in wanted:
            stats = stats._replace(class_row=None)
    state = state._replace(tokens=block.add_attention(state.tokens, y))
    state = reducer.after_attention(state, number, stats)
    state = state._replace(tokens=block.add_mlp(state.tokens))
    return reducer.after_block(state, number), (used if shows else None)


def _fused(
    block: Block, state: TokenState, number: int, reducer: Reducer, needs: frozenset[str]
) -> tuple[TokenState, Tensor, AttentionStats, None]:
    """Attention by the fused kernel, and what is wanted beside it."""
    normed, bias = block.norm1(state.tokens), reducer.bias(state, number)
    return state, *block.attn.inspected(normed, bias, needs), None


def _mapped(
    block: Block, state: TokenState, number: int, reducer: Reducer, needs: frozenset[str]
) -> tuple[TokenState, Tensor, AttentionStats, Tensor]:
    """Attention by its full map, which the reducer may change together with the tokens, and last
    the map that was used."""
    del needs  # everything is there
    normed = block.norm1(state.tokens)
    q, k = block.attn.qk(normed)
    attention = block.attn.map(q, k, reducer.bias(state, number))
    after, used = reducer.between(state, attention, number)
    if after.tokens is not state.tokens:
        normed = block.norm1(after.tokens)
    used = block.attn.drop(used)
    y = block.attn.merge_heads(used @ block.attn.values(normed))
    return after, y, AttentionStats(k, attention[:, :, 0], attention), used
