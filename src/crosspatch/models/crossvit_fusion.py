# SPDX-License-Identifier: Apache-2.0
"""CrossViT's multi-scale encoders: the blocks of every branch, and the four ways in which branches
meet.

"CrossViT", arXiv 2103.14899, section 3.3. `cross` is the paper's; `class_token`, `all` and `none`
are what it is compared with (table 7), so that the comparison can be made on one's own data.
Parameters of `cross` carry the authors' names.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import crosspatch._torchvision  # noqa: F401

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from crosspatch.layers.attention import Attention, check_heads
from crosspatch.layers.block import BlockOptions, BlockSpec, make_blocks, run_blocks
from crosspatch.layers.linear import Linear
from crosspatch.layers.tokens import TokenState, over_patches

States = list[TokenState]


class CrossAttention(nn.Module):
    """Attention by the first token of a sequence over the whole of it, itself included.

    Only that one query is projected. As there is but one, it takes `wk` with it to the tokens, and
    the attention is taken of the tokens before `wv`: q . (Wk x) = (Wk^T q) . x and sum a (Wv x) =
    Wv (sum a x), so no key and no value is ever made, and the cost falls from 2 N C^2 to 2 N C H.
    `folded = False` computes them all, as the authors do. Parameters carry the authors' names:
    `wq`, `wk`, `wv`, `proj`.
    """

    folded = True

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        check_heads(dim, heads)
        self.num_heads = heads
        self.attn_drop = attn_drop
        self.wq = Linear(dim, dim, bias=qkv_bias)
        self.wk = Linear(dim, dim, bias=qkv_bias)
        self.wv = Linear(dim, dim, bias=qkv_bias)
        self.proj = Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x: (B, N, C), bias: (B, N) on the keys or None. Returns (B, 1, C)."""
        gather = self._gather_folded if self.folded else self._gather
        return self.proj_drop(self.proj(gather(x, bias)))

    def _gather(self, x: Tensor, bias: Tensor | None) -> Tensor:
        q, k, v = self._heads(self.wq(x[:, :1])), self._heads(self.wk(x)), self._heads(self.wv(x))
        mask = bias[:, None, None, :].to(q.dtype) if bias is not None else None
        p = self.attn_drop if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout_p=p)
        return y.transpose(1, 2).flatten(2)

    def _gather_folded(self, x: Tensor, bias: Tensor | None) -> Tensor:
        shape = (self.num_heads, -1)
        attention = F.dropout(self._folded_row(x, bias), self.attn_drop, self.training)
        y = torch.einsum("bhc,hdc->bhd", attention @ x, self.wv.weight.unflatten(0, shape))
        if self.wv.bias is not None:
            y = y + attention.sum(dim=-1, keepdim=True) * self.wv.bias.unflatten(0, shape)
        return y.flatten(1)[:, None]

    def _folded_row(self, x: Tensor, bias: Tensor | None) -> Tensor:
        shape = (self.num_heads, -1)
        q = self.wq(x[:, 0]).unflatten(-1, shape)  # (B, H, d)
        q = q * q.shape[-1] ** -0.5
        query = torch.einsum("bhd,hdc->bhc", q, self.wk.weight.unflatten(0, shape))
        logits = query @ x.transpose(1, 2)  # (B, H, N)
        if self.wk.bias is not None:  # the same for every token: kept for its gradient
            logits = (
                logits + torch.einsum("bhd,hd->bh", q, self.wk.bias.unflatten(0, shape))[..., None]
            )
        if bias is not None:
            logits = logits + bias[:, None, :].to(logits.dtype)
        return logits.softmax(dim=-1)

    def class_row(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """(B, H, N): the attention of the query over the tokens of x (B, N, C), before dropout."""
        if self.folded:
            return self._folded_row(x, bias)
        q, k = self._heads(self.wq(x[:, :1])), self._heads(self.wk(x))
        logits = (q * (q.shape[-1] ** -0.5)) @ k.transpose(-2, -1)
        if bias is not None:
            logits = logits + bias[:, None, None, :].to(logits.dtype)
        return torch.softmax(logits, dim=-1)[:, :, 0]

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class ClassCrossAttention(nn.Module):
    """y = x[0] + DropPath(Attention(query LN(x)[0], keys and values LN(x))); (B, N, C) to (B, 1,
    C)."""

    def __init__(self, dim: int, heads: int, options: BlockOptions, drop_path: float) -> None:
        super().__init__()
        self.norm1 = options.norm(dim)
        self.attn = CrossAttention(
            dim,
            heads,
            qkv_bias=options.qkv_bias,
            attn_drop=options.attn_drop,
            proj_drop=options.proj_drop,
        )
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return x[:, :1] + self.drop_path(self.attn(self.norm1(x), bias))

    @torch.no_grad()
    def class_row(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """(B, N): what the class token attends to, the mean over the heads."""
        return self.attn.class_row(self.norm1(x), bias).float().mean(dim=1)


def projection(dim_in: int, dim_out: int, options: BlockOptions) -> nn.Sequential:
    """LN, GELU, Linear: from the width of one branch into another's."""
    return nn.Sequential(options.norm(dim_in), options.act(), Linear(dim_in, dim_out))


class MultiScaleEncoder(nn.Module):
    """The blocks of every branch, then `fuse`; here the branches meet only in the mean of the
    logits.

    depths: blocks of each branch, last the depth of the fusion. drop_paths: block t of any branch
    takes value t, the fusion the last.
    """

    def __init__(
        self,
        dims: Sequence[int],
        heads: Sequence[int],
        ratios: Sequence[float],
        depths: Sequence[int],
        options: BlockOptions,
        drop_paths: Sequence[float],
    ) -> None:
        super().__init__()
        self.blocks: Any = nn.ModuleList()
        for dim, head, ratio, depth in zip(dims, heads, ratios, depths[:-1], strict=True):
            specs = (BlockSpec.uniform(dim, head, ratio),) * depth
            self.blocks.append(nn.Sequential(*make_blocks(dim, specs, options, drop_paths[:depth])))

    def forward(
        self,
        states: States,
        first: Sequence[int],
        reducers: Sequence[Any],
        checkpointing: bool,
        attended: list[Tensor] | None = None,
    ) -> States:
        """first: the number of each branch's first block, counted over all encoders; attended: see
        `CrossEncoder.fuse`."""
        rows = zip(self.blocks, states, first, reducers, strict=True)
        states = [
            run_blocks(blocks, state, first=number, reducer=reducer, checkpointing=checkpointing)[0]
            for blocks, state, number, reducer in rows
        ]
        return self.fuse(states) if attended is None else self.fuse(states, attended)

    def fuse(self, states: States) -> States:
        """All branches at once, from the states after their blocks."""
        return states


class CrossEncoder(MultiScaleEncoder):
    """The paper's fusion: every class token asks the patches of the next branch."""

    def __init__(self, dims, heads, ratios, depths, options, drop_paths) -> None:
        super().__init__(dims, heads, ratios, depths, options, drop_paths)
        following = [(i + 1) % len(dims) for i in range(len(dims))]
        pairs = list(zip(dims, [dims[j] for j in following], strict=True))
        self.projs = nn.ModuleList(projection(own, other, options) for own, other in pairs)
        self.fusion = nn.ModuleList()
        for j in following:
            make = partial(ClassCrossAttention, dims[j], heads[j], options, drop_paths[-1])
            # a fusion depth of 0 is one layer too; the authors then leave out a level of names
            layers = [make() for _ in range(depths[-1])]
            self.fusion.append(nn.Sequential(*layers) if layers else make())
        self.revert_projs = nn.ModuleList(projection(other, own, options) for own, other in pairs)

    def fuse(self, states: States, attended: list[Tensor] | None = None) -> States:
        """attended: it is given, branch by branch, what the class token attends to over the full
        grid of the NEXT branch (B, P): the mean over the heads, before dropout, without a
        gradient."""
        fused = []
        for i, state in enumerate(states):
            other = states[(i + 1) % len(states)]
            query = self.projs[i](state.tokens[:, :1])
            y = torch.cat([query, other.patches], dim=1)
            bias = other.sizes.log() if other.sizes is not None else None
            stack = self.fusion[i]
            layers: Any = stack if isinstance(stack, nn.Sequential) else (stack,)
            if attended is not None:
                attended.append(over_patches(other, layers[0].class_row(y, bias)))
            for layer in layers:
                y, bias = layer(y, bias), None
            fused.append(_with_class(state, self.revert_projs[i](y)))
        return fused


class ClassTokenEncoder(MultiScaleEncoder):
    """Every class token becomes the back-projected sum of all projected class tokens."""

    def __init__(self, dims, heads, ratios, depths, options, drop_paths) -> None:
        super().__init__(dims, heads, ratios, depths, options, drop_paths)
        width = max(dims)
        self.projs = nn.ModuleList(projection(dim, width, options) for dim in dims)
        self.revert_projs = nn.ModuleList(projection(width, dim, options) for dim in dims)

    def fuse(self, states: States) -> States:
        classes = [f(s.tokens[:, :1]) for f, s in zip(self.projs, states, strict=True)]
        total = torch.stack(classes).sum(dim=0)
        return [_with_class(s, g(total)) for g, s in zip(self.revert_projs, states, strict=True)]


class AllTokensEncoder(MultiScaleEncoder):
    """One joint self-attention over all tokens of all branches, in the largest width."""

    def __init__(self, dims, heads, ratios, depths, options, drop_paths) -> None:
        super().__init__(dims, heads, ratios, depths, options, drop_paths)
        width = max(dims)
        self.projs = nn.ModuleList(projection(dim, width, options) for dim in dims)
        self.norm1 = options.norm(width)
        self.attn = Attention(width, heads[dims.index(width)], qkv_bias=options.qkv_bias)
        self.drop_path = DropPath(drop_paths[-1]) if drop_paths[-1] > 0 else nn.Identity()
        self.revert_projs = nn.ModuleList(projection(width, dim, options) for dim in dims)

    def fuse(self, states: States) -> States:
        projected = [f(s.tokens) for f, s in zip(self.projs, states, strict=True)]
        x = torch.cat(projected, dim=1)
        bias = None
        if any(s.sizes is not None for s in states):
            bias = torch.cat([s.full_sizes for s in states], dim=1).log()
        x = x + self.drop_path(self.attn(self.norm1(x), bias))
        parts = x.split([s.tokens.shape[1] for s in states], dim=1)
        rows = zip(self.revert_projs, states, parts, strict=True)
        return [s._replace(tokens=g(part)) for g, s, part in rows]


FUSIONS = {
    "cross": CrossEncoder,
    "class_token": ClassTokenEncoder,
    "all": AllTokensEncoder,
    "none": MultiScaleEncoder,
}


def _with_class(state: TokenState, token: Tensor) -> TokenState:
    return state._replace(tokens=torch.cat([token, state.patches], dim=1))
