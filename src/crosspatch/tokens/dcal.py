# SPDX-License-Identifier: Apache-2.0
"""DCAL: beside self-attention (SA) a block in which salient patches ask the whole picture (GLCA),
and in training a second pass in which another picture distracts (PWCA).

"Dual Cross-Attention Learning for Fine-Grained Visual Categorization and Object
Re-Identification", Zhu, Ke, Li, Liu, Tian, Shan, arXiv 2205.02151, CVPR 2022. S_l is the mean over
heads of block l's attention:

    rollout   A = prod_l S~_l,  S~_l = (S_l + I) / 2, the last block leftmost;  its class row ranks
    GLCA      y = q + MSA(queries LN q, keys and values LN x);  y = y + MLP(LN y)
              x = all tokens after the last block, q = the class token and the R % best patches
    PWCA      softmax(Q_1 [K_1; K_2]^T / sqrt d) [V_1; V_2]     in every block, with SA's weights
    answer    (softmax(SA) + softmax(GLCA)) / 2, each with a norm and a head of its own

PWCA's partner streams are each other's: one permuted batch, 1 and 2 both being distracted.

Queries of one block do not see each other, so with one GLCA block (the paper's best) the class
token's feature is the same whatever patches are selected: ranking and selected queries cannot reach
the answer, and none of it is computed. `feature="mean"` reads the mean over all queries instead;
only there do `ratio` and the rollout act.

A reconstruction (no code was published). Departures: the answers are averaged where the paper adds
them (the same argmax, and a distribution: `decide` returns its logarithm); the block starts from
the weights of the host's last one (`fresh`: from noise); of the rollout only the class row is
multiplied, over kept maps (12 N^2 instead of 12 N^3 multiply-adds; `running` keeps one product of
N^2 numbers instead); on a CrossViT it stands in every branch, whose rollout leaves the fusions out.

Expected for a DeiT-Tiny at 448 with 200 classes: the block adds 444,864 parameters, with norm and
head 483,848 (8.6 % of the backbone; the paper: 9 %). Its 79 queries cost 0.111 GMACs, 1.6 % of the
7.12 that all tokens of all blocks take (the paper: 2 %), the class query alone 0.059. A DeiT of
ours computes the class token alone in the last block, which GLCA cannot: of its 6.60 the whole
adds 8.9 %, with "mean" 29.5 % (11 maps beside the fused kernel), with `running` 102.7 %. PWCA adds
no parameter, and nothing at inference.
"""

from __future__ import annotations

import copy
import math
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crosspatch.layers.block import Block
from crosspatch.layers.first_weights import init_linear
from crosspatch.layers.linear import Linear
from crosspatch.layers.precision import full_precision
from crosspatch.layers.reducer import AttentionStats, Reducer
from crosspatch.layers.tokens import TokenState, order, take
from crosspatch.tokens.host import Host, require_class_token

BRANCHES = ("both", "sa", "glca")
FEATURES = ("class", "mean")


class Rollout(NamedTuple):
    """maps: factors of the rollout of the blocks so far, first block first, (B, N or 1, N) float32
    each; with `running` their product alone."""

    maps: tuple[Tensor, ...]


class Glca(nn.Module):
    """The block, its norm and its head."""

    def __init__(self, block: Block, width: int, num_classes: int, *, fresh: bool) -> None:
        super().__init__()
        self.block = copy.deepcopy(block)
        self.norm = copy.deepcopy(block.norm1)
        self.head = Linear(width, num_classes) if num_classes > 0 else nn.Identity()
        self.head.to(next(block.parameters()))
        for module in (self.norm, self.head, *((self.block,) if fresh else ())):
            module.apply(_reset)

    def forward(self, x: Tensor, queries: int) -> Tensor:
        """x: (B, N, C), whose first `queries` tokens ask all of them; (B, queries, C)."""
        return self.norm(self.block(x, queries))


class DCAL(Reducer):
    """SA and GLCA; in training PWCA is `paired` with `PairWise`, which is no part of this.

    ratio: share of the patches that are queries (the paper: 0.1, for re-identification 0.3).
    feature: "class" token of GLCA, or the "mean" of its queries. branch: whose answer is given,
    "both", "glca" or "sa", which costs nothing. multilabel: the answers are sigmoids. Of a host
    without classes the features of both stand side by side, for re-identification.
    Raises ValueError for a host without a class token, without an attention of its own in every
    block that attends, and for options out of these ranges.
    """

    def __init__(
        self,
        host: Host,
        *,
        ratio: float = 0.1,
        feature: str = "class",
        branch: str = "both",
        multilabel: bool = False,
        fresh: bool = False,
        running: bool = False,
    ) -> None:
        super().__init__()
        require_class_token(host, "dcal")
        if not 0 < ratio <= 1:
            raise ValueError(f"ratio = {ratio}; expected above 0 and at most 1")
        if feature not in FEATURES or branch not in BRANCHES:
            raise ValueError(
                f"feature {feature!r}, branch {branch!r}; expected one of {FEATURES}, {BRANCHES}"
            )
        attending = _attending(host)
        self.ratio, self.feature, self.branch = ratio, feature, branch
        self.multilabel, self.running = multilabel, running
        self.num_classes = host.num_classes
        self.counts = (host.tokens,) * (host.depth + 1)
        self.last = attending[-1]
        self.ranked = frozenset(attending if feature == "mean" else ())
        self.glca = Glca(
            host.blocks[self.last], host.width[self.last], host.num_classes, fresh=fresh
        )

    def active(self, block: int) -> bool:
        """At the last block in any case: GLCA reads all of its tokens."""
        used = self.training or self.branch != "sa"
        return used and (block in self.ranked or block == self.last)

    def wants(self, block: int) -> frozenset[str]:
        if block not in self.ranked:
            return frozenset()
        return frozenset({"class_row" if block == self.last else "map"})

    def after_attention(self, state: TokenState, block: int, stats: AttentionStats) -> TokenState:
        found = stats.class_row[:, :, None] if stats.class_row is not None else stats.full_map
        if found is None:
            return state
        maps = state.carry.maps if state.carry is not None else ()
        with torch.no_grad():
            step = residual(found)
            maps = (product(step, *maps),) if self.running and maps else (*maps, step)
        return state._replace(carry=Rollout(maps))

    def select(self, state: TokenState) -> tuple[Tensor, int]:
        """Indices (B, N) of the final tokens, the queries first, and how many those are."""
        ranking = order(class_row(state.carry.maps)[:, state.n_prefix :]) + state.n_prefix
        count = max(1, round(self.ratio * ranking.shape[1]))
        prefix = torch.arange(state.n_prefix, device=ranking.device).expand(ranking.shape[0], -1)
        rows = (prefix[:, :1], ranking[:, :count], prefix[:, 1:], ranking[:, count:])
        return torch.cat(rows, dim=1), 1 + count

    def features(self, state: TokenState) -> Tensor:
        """(B, C): what GLCA makes of the state after the last block, before the host's norm."""
        if self.feature == "class":
            return self.glca(state.tokens, 1)[:, 0]
        index, queries = self.select(state)
        return self.glca(take(state.tokens, index), queries).mean(dim=1)

    def logits(self, state: TokenState) -> Tensor:
        """(B, K): GLCA's own, or its features (B, C) where the host has no classes."""
        return self.glca.head(self.features(state))

    def decide(self, state: TokenState, logits: Tensor) -> Tensor:
        """The branch's logits; of both, logits whose softmax (or sigmoids) is the mean of theirs.

        A pair of logits, which a host gives in DeiT's distillation, is left alone.
        """
        if self.branch == "sa" or isinstance(logits, tuple):
            return logits
        mine = self.logits(state)
        if self.branch == "glca":
            return mine
        if self.num_classes <= 0:
            return torch.cat([logits, mine], dim=-1)
        return _mean_answer(logits.float(), mine.float(), self.multilabel)


# ------------------------------------------------------------------ rollout


def residual(attention: Tensor) -> Tensor:
    """(S + I) / 2 in float32, for S the mean over heads of the first rows of a map (B, H, M, N)."""
    mean = attention.float().mean(dim=1)
    rows, columns = mean.shape[1:]
    return (mean + torch.eye(rows, columns, device=mean.device)) / 2


def product(left: Tensor, *right: Tensor) -> Tensor:
    """left @ right @ …, in float32 under autocast too."""
    with full_precision(left):
        for one in right:
            left = left @ one
    return left


def class_row(maps: tuple[Tensor, ...]) -> Tensor:
    """(B, N): the first row of the product of the factors (B, N or 1, N), the last leftmost."""
    return product(maps[-1][:, :1], *reversed(maps[:-1]))[:, 0]


# ------------------------------------------------------------------ PWCA


class Pairs(NamedTuple):
    """partner: (B,) int64, the picture of the batch that distracts each."""

    partner: Tensor


class PairWise(Reducer):
    """PWCA on a `paired` state: every token also attends to the tokens of the partner, as they are
    in the partner's own such pass. It has no parameters and no place in a deployed model."""

    def instead(self, module: Any, state: TokenState, block: int) -> TokenState:
        attn, partner = module.attn, state.carry.partner
        q, k, v = attn.project(module.norm1(state.tokens))
        k, v = (torch.cat([x, x[partner]], dim=2) for x in (k, v))
        tokens = module.add_attention(state.tokens, attn.attend(q, k, v))
        return state._replace(tokens=module.add_mlp(tokens))


def paired(state: TokenState, partner: Tensor) -> TokenState:
    """The state before the first block, told who distracts whom (partner: (B,) int64)."""
    return state._replace(carry=Pairs(partner))


def pair(batch: int, rng: np.random.Generator, device: torch.device | None = None) -> Tensor:
    """(batch,) int64: a random permutation without fixed points, one cycle through all pictures.

    Every other picture is as likely; a batch of one is its own partner. Odd batches need nothing.
    """
    cycle = rng.permutation(batch)
    partner = np.empty_like(cycle)
    partner[cycle] = np.roll(cycle, -1)
    return torch.from_numpy(partner).to(device)


# ------------------------------------------------------------------ details


def _attending(host: Host) -> list[int]:
    """The blocks with an attention, all of which have their own."""
    attending = [i for i, spec in enumerate(host.specs) if spec is not None and spec.heads > 0]
    sharing = [i for i in attending if not host.attends(i)]
    if sharing:
        raise ValueError(f"block {sharing[0]} shares the attention of another; dcal needs its own")
    if not attending:
        raise ValueError(f"{host.name} has no block with an attention")
    return attending


def _reset(module: nn.Module) -> None:
    if hasattr(module, "reset_parameters") and not any(p.is_meta for p in module.parameters()):
        module.reset_parameters()
    init_linear(module)


def _mean_answer(a: Tensor, b: Tensor, multilabel: bool) -> Tensor:
    if not multilabel:
        both = torch.stack([a.log_softmax(dim=-1), b.log_softmax(dim=-1)])
        return both.logsumexp(dim=0) - math.log(2)
    both = torch.stack([a, b])
    return F.logsigmoid(both).logsumexp(dim=0) - F.logsigmoid(-both).logsumexp(dim=0)
