# SPDX-License-Identifier: Apache-2.0
"""STViT: two blocks turn the patches into a few semantic tokens, and the rest runs on those alone.

"Making Vision Transformers Efficient from A Token Sparsification View", Chang, Wang, Lin, Wang,
Zhang, Jin, Shou, arXiv 2303.08685, CVPR 2023. The form for one grid of patches (DeiT); the windows
of Swin and the recovery of the image tokens are another network, STViT-R. With X the patches that
enter block `base` and G learned centres:

    P  = adaptive max pool of X to t x t                                       T = t t = `tokens`
    S1 = P + MHA(q = LN P, kv = LN [P; X]);      S1 = S1 + MLP(LN S1)      block `base`
    Q  = S1 + G
    S2 = Q + MHA(q = LN Q, kv = LN [S1; X]);     S2 = S2 + MLP(LN S2)      block `base` + 1
    all further blocks on S2

The two blocks keep the weights that the host has there, so that a trained network is the start; it
needs training all the same. Added parameters: G, T C of them, and what `layer_scale` adds.

No code was released for this form. Departures: the paper has no class token and reads the mean of
the semantic tokens. A host without one (`class_token=False, global_pool="avg"`) does exactly that;
one that reads its class token keeps its prefix tokens: they attend and are attended to beside the
semantic ones, and their residual is always there. After block `base` `source` says of every patch
in which cell of the pooling it lies (of two that overlap, in the one that begins later), though S
gathers from all of X; sizes are not used. On a CrossViT the fusion after block `base` reads
semantic tokens, and X stays what it was.

Expected with 16 tokens and base 4 of 12, class-token-free at 224 (GMACs): DeiT-T 0.524, S 1.912, B
7.283, that is 58.2, 58.4 and 58.5 % less than DeiT ("nearly 60 %"); 58.3, 58.5 and 58.6 % if one of
the two blocks read X alone, without P or S1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import crosspatch._torchvision  # noqa: F401

import torch
from timm.layers import LayerScale, trunc_normal_
from torch import Tensor, nn

from crosspatch.layers.reducer import Reducer
from crosspatch.layers.tokens import TokenState
from crosspatch.tokens.host import Host, check_blocks


class Patches(NamedTuple):
    """Carried from the first of the two blocks to the second: tokens (B, N, C), the patches."""

    tokens: Tensor


class STViT(Reducer):
    """`tokens` semantic tokens, a square number, made by blocks `base` and `base` + 1 (None: after
    a third of the blocks, 4 of 12).

    centres: G is added. layer_scale: the value that LayerScales of the two blocks begin with, None
    for none. shortcut: P is added to the first attention's output; without it, as in the released
    STViT-R, S1 begins as that output alone. Raises ValueError for a number of tokens that is no
    square or more than the grid has on a side, and for blocks that are not there, do not attend or
    differ in width.
    """

    def __init__(
        self,
        host: Host,
        *,
        tokens: int = 16,
        base: int | None = None,
        centres: bool = True,
        layer_scale: float | None = None,
        shortcut: bool = True,
    ) -> None:
        super().__init__()
        self.side = _side(tokens, host)
        self.base = min(round(host.depth / 3), host.depth - 2) if base is None else base
        _check_base(self.base, host)
        self.layer_scale, self.shortcut = _checked_scale(layer_scale, self.base, host), shortcut
        self.centres = None
        if centres:
            like = host.blocks[self.base].attn.proj.weight
            self.centres = nn.Parameter(like.new_zeros(1, tokens, host.width[self.base]))
            if not self.centres.is_meta:
                trunc_normal_(self.centres, std=0.02)
        late = host.depth - self.base
        self.counts = (host.tokens,) * (self.base + 1) + (host.n_prefix + tokens,) * late

    def rebuild(self, blocks: list[Any]) -> None:
        if self.layer_scale is None:
            return
        for block in blocks[self.base : self.base + 2]:
            weight = block.attn.proj.weight
            make = [LayerScale(weight.shape[0], self.layer_scale).to(weight) for _ in range(2)]
            block.ls1, block.ls2 = make

    def active(self, block: int) -> bool:
        return block in (self.base, self.base + 1)

    def instead(self, module: Any, state: TokenState, block: int) -> TokenState:
        return self._first(module, state) if block == self.base else self._second(module, state)

    def _first(self, module: Any, state: TokenState) -> TokenState:
        if state.source is not None:
            raise ValueError("semantic tokens are pooled from every patch of the grid")
        n, image = state.n_prefix, state.patches
        pooled = pool_to(image, state.grid, self.side)
        queries = torch.cat([state.tokens[:, :n], pooled], dim=1)
        context = torch.cat([queries, image], dim=1)
        y = module.attn(module.norm1(context), rows=n + self.side**2)
        if self.shortcut:
            x = module.add_attention(queries, y)
        else:  # nothing is left of a semantic token where its path is dropped
            x = torch.cat([queries[:, :n], torch.zeros_like(pooled)], dim=1) + module.ls1(y)
        cells = cells_of(state.grid, self.side, image.device) + n
        return state._replace(
            tokens=module.add_mlp(x),
            source=cells.expand(image.shape[0], -1),
            carry=Patches(image),
        )

    def _second(self, module: Any, state: TokenState) -> TokenState:
        n, queries = state.n_prefix, state.tokens
        if self.centres is not None:
            queries = torch.cat([queries[:, :n], queries[:, n:] + self.centres], dim=1)
        context = torch.cat([state.tokens, state.carry.tokens], dim=1)
        y = module.attn.over(module.norm1(queries), module.norm1(context))
        x = module.add_attention(queries, y)
        return state._replace(tokens=module.add_mlp(x), carry=None)


def pool_to(x: Tensor, grid: Sequence[int], side: int) -> Tensor:
    """Adaptive max pooling of tokens (B, N, C) on a grid to side x side of them (B, side^2, C).

    Each direction by itself, over windows of constant size, which overlap where the grid does not
    divide: ONNX has no adaptive pooling.
    """
    image = x.unflatten(1, tuple(grid))
    for dim in (1, 2):
        windows = _windows(grid[dim - 1], side)
        cells = [image.narrow(dim, start, end - start).amax(dim=dim) for start, end in windows]
        image = torch.stack(cells, dim=dim)
    return image.flatten(1, 2)


def cells_of(grid: Sequence[int], side: int, device: Any) -> Tensor:
    """(N,) int64: for each patch of the grid the number of a cell whose window holds it."""
    rows, columns = (
        torch.arange(length, device=device) * side // length for length in (grid[0], grid[1])
    )
    return (rows[:, None] * side + columns).flatten()


def _windows(length: int, cells: int) -> list[tuple[int, int]]:
    return [(i * length // cells, -(-(i + 1) * length // cells)) for i in range(cells)]


def _side(tokens: int, host: Host) -> int:
    most = min(host.grid)
    side = math.isqrt(tokens) if isinstance(tokens, int) and tokens > 0 else 0
    if side < 1 or side * side != tokens or side > most:
        raise ValueError(
            f"tokens = {tokens}; expected a square number t * t with t from 1 to {most}, as the "
            f"grid of {host.name} has {host.grid[0]}x{host.grid[1]} patches"
        )
    return side


def _check_base(base: int, host: Host) -> None:
    if not isinstance(base, int) or not 0 <= base <= host.depth - 2:
        raise ValueError(
            f"base = {base}; expected 0 to {host.depth - 2}: two of the {host.depth} blocks of "
            f"{host.name} make the semantic tokens"
        )
    check_blocks((base, base + 1), host, "base")
    if host.width[base] != host.width[base + 1]:
        raise ValueError(
            f"base = {base}: the tokens change width from {host.width[base]} to "
            f"{host.width[base + 1]} between the two blocks; expected one width"
        )


def _checked_scale(value: float | None, base: int, host: Host) -> float | None:
    if value is None:
        return None
    if any(isinstance(block.ls1, LayerScale) for block in host.blocks[base : base + 2]):
        raise ValueError(
            f"layer_scale = {value}: blocks {base} and {base + 1} have LayerScales of their own; "
            "expected None"
        )
    return float(value)
