# SPDX-License-Identifier: Apache-2.0
"""Evo-ViT: the most attended patches go through the blocks, the others keep their place.

"Evo-ViT: Slow-Fast Token Evolution for Dynamic Vision Transformer", Xu, Zhang, Zhang, Sheng, Li,
Dong, Zhang, Xu, Sun, arXiv 2108.01390, AAAI 2022. What the class token attends to ranks the N
patches:

    s_i = sum over heads of A_i[class, patches]           of block i
    g   = (1 - t_i) g + t_i s_i                           of the patches that were there; t_i = 1
                                                          before the first selection, 0.5 after
    stage: [class; the K = int(N k) patches of largest g] through its blocks,
           then back in among the other N - K
    fast path "copy": those are as they were; "representative": r = sum g_j x_j / sum g_j over them
           runs along, and what the stage added to r is added to each of them
    stage-wise: stages begin at blocks 4 and 8 of 12; layer-wise: every block is a stage
    y = head(LN(mean of all N patches)); in training y' = head_cls(norm_cls(class)) beside it

No patch is ever lost, so the full grid stands between two stages and after the last. The authors'
code for DeiT has no representative token (issue 3 there); their LeViT has.

Departures: patches go back to their places in the grid, where the authors leave them in the order
of their scores; equal scores keep the grid's order; under stochastic depth the dropped patches get
what r got, not its undropped branches; a stage ends with every encoder of a CrossViT, as the other
branch then reads its patches. Kept patches share the class token's attention with half as many, so
their scores about double and the next stage picks the same ones; `normalise` weighs a score by how
many took part.

Expected (M parameters without the second head, GMACs at 224 and k = 0.5): Ti 5.72, 0.82; S 22.05,
3.03 (4.60 with k = 1); B 86.57, 11.66. Layer-wise costs the same.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import crosspatch._torchvision  # noqa: F401

import torch
from timm.models import generate_default_cfgs
from torch import Tensor, nn

from crosspatch.layers.first_weights import init_linear
from crosspatch.layers.position import resize_tables
from crosspatch.layers.reducer import AttentionStats, Reducer
from crosspatch.layers.tokens import Merge, TokenState, apply_merge, order, put
from crosspatch.models.registry import register, settings
from crosspatch.models.vit import VisionTransformer
from crosspatch.tokens.host import Host, attach, check_blocks, hosts_of, require_class_token

FAST = ("copy", "representative")
LEAST = 1e-12  # beside a score: patches that nobody attends to weigh the same in their mean


class Evolution(NamedTuple):
    """What is carried on. Between stages `scores` alone.

    scores: (B, N) of all tokens (a prefix token's are never read). whole: (B, N, C) the tokens at
    the beginning of the stage, and source: theirs. index: (B, K) where in it the kept ones stand,
    prefix included. begun: (B, 1, C) the representative token as it was then.
    """

    scores: Tensor
    whole: Tensor | None = None
    source: Tensor | None = None
    index: Tensor | None = None
    begun: Tensor | None = None


class Stages(NamedTuple):
    """The blocks at which a stage begins, with its keep ratio, the blocks at which one ends, and
    those whose attention is scored."""

    begins: dict[int, float]
    ends: frozenset[int]
    scored: frozenset[int]


class EvoViT(Reducer):
    """Slow-fast evolution of the patches.

    keep: the ratio in (0, 1] from the first start on, or a list of one per block; 1 is the
    untouched path. starts: the blocks at which stages begin (default a third and two thirds of the
    depth, on a CrossViT the encoders that begin there); one begins as well wherever `keep` changes
    and wherever an encoder begins. stagewise: False makes every block a stage. fast: of `FAST`.
    tradeoff: t from the first start on, or a list of one per block, in [0, 1]. normalise: scores
    are weighed by how many patches shared the attention. second_head: a head on the class token,
    `second`, for training. Raises ValueError for values that the host cannot have.
    """

    def __init__(
        self,
        host: Host,
        *,
        keep: float | Sequence[float] = 0.5,
        starts: int | Sequence[int] | None = None,
        stagewise: bool = True,
        fast: str = "copy",
        tradeoff: float | Sequence[float] = 0.5,
        normalise: bool = False,
        second_head: bool = False,
    ) -> None:
        super().__init__()
        require_class_token(host, "evovit")
        if fast not in FAST:
            raise ValueError(f"fast {fast!r}; expected one of {', '.join(FAST)}")
        begins = _starts(starts, host)
        ratios = _per_block(keep, host, begins, "keep")
        weights = _per_block(tradeoff, host, begins, "tradeoff")
        _check_ratios(ratios, host)
        self.stagewise, self.fast, self.normalise = stagewise, fast, normalise
        self.tradeoff = weights
        self.layer_wise = _stages(ratios, weights, host, range(host.depth))
        self.stage_wise = _stages(ratios, weights, host, (*begins, *_encoders(host, begins)))
        self.stages = self.stage_wise if stagewise else self.layer_wise
        _check_sharing(self.stages, host)
        self.counts = _counts(self.stages, host, extra=int(fast == "representative"))
        self.norm_cls = self.head_cls = None
        if second_head:
            self.norm_cls = nn.LayerNorm(host.width[-1], eps=1e-6)
            self.reset_second_head(host.num_classes)
            self.to(next(host.blocks[-1].parameters(), torch.empty(0)).device)

    def layerwise(self) -> EvoViT:
        """The same, sharing its parameters, with every block a stage: for the first two thirds of
        a training."""
        other = copy.copy(self)
        other.stagewise, other.stages = False, self.layer_wise
        return other

    def reset_second_head(self, num_classes: int) -> None:
        """A new head on the class token, for `num_classes` (0: none)."""
        if self.norm_cls is None:
            return
        like = self.norm_cls.weight
        head = nn.Linear(like.shape[0], num_classes) if num_classes > 0 else nn.Identity()
        self.head_cls = head.apply(init_linear).to(like)

    def second(self, state: TokenState) -> Tensor | None:
        """The logits (B, K) of the class token in the final state, None without a second head."""
        if self.norm_cls is None or self.head_cls is None:
            return None
        return self.head_cls(self.norm_cls(state.tokens[:, 0]))

    # ------------------------------------------------------------------ hooks

    def active(self, block: int) -> bool:
        stages = self.stages
        return block in stages.begins or block in stages.ends or block in stages.scored

    def wants(self, block: int) -> frozenset[str]:
        return frozenset({"class_row"} if block in self.stages.scored else ())

    def prefix_only(self, block: int) -> bool:
        return block not in self.stages.begins

    def before_attention(self, state: TokenState, block: int) -> TokenState:
        """A stage begins: the most attended patches alone, and the representative of the others."""
        if block not in self.stages.begins:
            return state
        n, scores = state.n_prefix, state.carry.scores
        count = max(1, int((state.tokens.shape[1] - n) * self.stages.begins[block]))
        prefix = torch.arange(n, device=scores.device).expand(scores.shape[0], -1)
        index = torch.cat([prefix, order(scores[:, n:])[:, :count] + n], dim=1)
        none = index[:, :0]
        kept, begun = apply_merge(state, Merge(index, none, none)), None
        if self.fast == "representative":
            begun = _representative(state.tokens, scores, index)
            kept = kept._replace(tokens=torch.cat([kept.tokens, begun], dim=1))
        return kept._replace(carry=Evolution(scores, state.tokens, state.source, index, begun))

    def after_attention(self, state: TokenState, block: int, stats: AttentionStats) -> TokenState:
        """The scores of the patches that are there."""
        if stats.class_row is None:
            return state
        new, t, carry = stats.class_row.float().sum(dim=1), self.tradeoff[block], state.carry
        if carry is None:
            return state._replace(carry=Evolution(new))
        if carry.index is None:
            scores = (1 - t) * carry.scores + t * new if t < 1 else new
            return state._replace(carry=Evolution(scores))
        if self.normalise:
            n = state.n_prefix
            new = new * ((new.shape[1] - n) / (carry.whole.shape[1] - n))
        old = carry.scores.gather(1, carry.index)
        mixed = (1 - t) * old + t * new[:, : carry.index.shape[1]]
        return state._replace(
            carry=carry._replace(scores=carry.scores.scatter(1, carry.index, mixed))
        )

    def after_block(self, state: TokenState, block: int) -> TokenState:
        return _restored(state) if block in self.stages.ends else state

    def pool(self, state: TokenState) -> TokenState:
        """A stage that the end of the network cut off ends here."""
        return _restored(state)


def _representative(tokens: Tensor, scores: Tensor, index: Tensor) -> Tensor:
    """(B, 1, C): the mean of the tokens that are not in `index`, weighed by their scores."""
    weights = (scores + LEAST).scatter(1, index, 0.0)
    weights = weights / weights.sum(dim=1, keepdim=True)
    return weights[:, None].to(tokens.dtype) @ tokens


def _restored(state: TokenState) -> TokenState:
    """The full grid again: kept tokens in their places among the others."""
    carry = state.carry
    if carry is None or carry.index is None:
        return state
    tokens, count = state.tokens, carry.index.shape[1]
    whole = carry.whole.to(tokens.dtype)
    if carry.begun is not None:
        whole = whole + (tokens[:, count:] - carry.begun)
        tokens = tokens[:, :count]
    return state._replace(
        tokens=put(whole, carry.index, tokens),
        source=carry.source,
        carry=Evolution(carry.scores),
    )


# ------------------------------------------------------------------ the schedule


def _encoders(host: Host, begins: Sequence[int]) -> tuple[int, ...]:
    """Where an encoder begins after the first stage does: no stage may cross that."""
    return tuple(s for s in host.starts if begins and s > begins[0])


def _starts(starts: int | Sequence[int] | None, host: Host) -> tuple[int, ...]:
    if starts is None:
        thirds = {max(1, host.depth // 3), max(1, 2 * host.depth // 3)}
        if len(host.starts) > 1:  # the encoder that begins there, or the next that does
            thirds = {min((s for s in host.starts if s >= third), default=0) for third in thirds}
        return tuple(sorted(s for s in thirds if 0 < s < host.depth))
    given = check_blocks([starts] if isinstance(starts, int) else starts, host, "starts")
    if not given or given[0] == 0:
        raise ValueError(
            f"starts = {list(given)}; expected blocks from 1 to {host.depth - 1}: patches are "
            "ranked by what earlier blocks attend to"
        )
    return given


def _per_block(
    value: float | Sequence[float], host: Host, begins: Sequence[int], name: str
) -> tuple[float, ...]:
    """`value` as listed, or 1 before the first start and `value` from there on."""
    if isinstance(value, int | float):
        first = begins[0] if begins else host.depth
        values = [1.0] * first + [value] * (host.depth - first)
    else:
        values = list(value)
    if len(values) != host.depth:
        raise ValueError(f"{name} has {len(values)} entries; {host.name} has {host.depth} blocks")
    for block, one in enumerate([value] if isinstance(value, int | float) else values):
        if not 0 <= one <= 1:
            raise ValueError(f"{name} = {one} at block {block}; expected a number from 0 to 1")
    return tuple(values)


def _check_ratios(ratios: Sequence[float], host: Host) -> None:
    for block, ratio in enumerate(ratios):
        if int(host.patches * ratio) < 1:
            raise ValueError(
                f"keep = {ratio} at block {block} leaves none of {host.patches} patches; expected "
                f"a ratio from {1 / host.patches:.4g} to 1"
            )


def _stages(
    ratios: Sequence[float], weights: Sequence[float], host: Host, marks: Sequence[int]
) -> Stages:
    """Runs of blocks of one ratio below 1 between two marks, each from its first to its last block
    with an attention of its own."""
    first = [b for b in range(host.depth) if not b or b in marks or ratios[b] != ratios[b - 1]]
    begins, ends = {}, set()
    for begin, following in zip(first, [*first[1:], host.depth], strict=True):
        run = [b for b in range(begin, following) if host.attends(b)]
        if ratios[begin] < 1 and run:
            begins[run[0]] = ratios[begin]
            ends.add(run[-1])
    return Stages(begins, frozenset(ends), _scored(begins, weights, host))


def _scored(begins: Mapping[int, float], weights: Sequence[float], host: Host) -> frozenset[int]:
    """The blocks whose attention a later selection depends on."""
    if not begins:
        return frozenset()
    before = [b for b in range(min(begins)) if host.attends(b)]
    if not before:
        raise ValueError(
            f"keep = {begins[min(begins)]} at block {min(begins)}; expected 1 up to the first "
            "block with an attention of its own: patches are ranked by what earlier blocks attend "
            "to"
        )
    since = max((b for b in before if weights[b] == 1), default=before[0])
    blocks = [b for b in range(since, max(begins)) if host.attends(b)]
    return frozenset(b for b in blocks if weights[b] > 0 or b == before[0])


def _check_sharing(stages: Stages, host: Host) -> None:
    first = min((*stages.begins, *stages.scored), default=host.depth)
    for block, spec in enumerate(host.specs):
        if spec is not None and spec.shares is not None and block > first:
            raise ValueError(
                f"block {block} shares the attention of block {spec.shares}; expected none that do "
                f"after block {first}, from which on patches are scored and left out"
            )


def _counts(stages: Stages, host: Host, extra: int) -> tuple[int, ...]:
    counts, inside = [host.tokens], None
    for block in range(host.depth):
        if block in stages.begins:
            inside = host.n_prefix + int(host.patches * stages.begins[block]) + extra
        if block in stages.ends:
            inside = None
        counts.append(host.tokens if inside is None else inside)
    return tuple(counts)


# ------------------------------------------------------------------ the authors' models


class EvoDeiT(VisionTransformer):
    """DeiT with the evolution in it, the mean of all patches as its feature and a second head;
    arguments are those of the trunk and of `EvoViT`."""

    reducer: EvoViT

    def __init__(
        self,
        *,
        keep: float | Sequence[float] = 0.5,
        starts: int | Sequence[int] | None = None,
        stagewise: bool = True,
        fast: str = "copy",
        tradeoff: float | Sequence[float] = 0.5,
        normalise: bool = False,
        second_head: bool = True,
        global_pool: str = "avg",
        **shape: Any,
    ) -> None:
        super().__init__(global_pool=global_pool, **shape)
        options: dict[str, Any] = {
            "keep": keep,
            "starts": starts,
            "stagewise": stagewise,
            "fast": fast,
            "tradeoff": tradeoff,
            "normalise": normalise,
            "second_head": second_head,
        }
        attach(self, [EvoViT(hosts_of(self)[0], **options)])

    def get_classifier(self) -> Any:
        """The head, and with a second head both."""
        second = self.reducer.head_cls
        return self.head if second is None else (self.head, second)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """New heads for `num_classes` (0: none), and another pooling if given."""
        super().reset_classifier(num_classes, global_pool)
        self.reducer.reset_second_head(num_classes)


RENAMED = (
    (r"^norms\.(\d+)\.", r"blocks.\1.norm1."),
    (r"^projs\.(\d+)\.", r"blocks.\1.attn.proj."),
    (r"^(norm|head)_cls\.", r"reducer.\1_cls."),
)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: EvoDeiT) -> dict[str, Tensor]:
    """A released state dict, made to fit `model`: the authors' parallel lists back in the blocks,
    positions resized, no second head where the model has none. Takes DeiT's layout too."""
    state: dict[str, Any] = {}
    given = dict(state_dict.get("model", state_dict))
    for name, value in given.items():
        for pattern, replacement in RENAMED:
            name = re.sub(pattern, replacement, name)
        if isinstance(model.norm, nn.Identity):
            name = re.sub(r"^norm\.", "fc_norm.", name)
        state[name] = value
    for name in [name for name in given if re.match(r"qks\.\d+\.qk\.", name)]:
        number, kind = name.split(".")[1::2]
        qk, v = state[name], state.get(f"vs.{number}.v.{kind}")
        if v is not None and qk.shape[1:] == v.shape[1:]:
            state[f"blocks.{number}.attn.qkv.{kind}"] = torch.cat([qk, v])
            del state[name], state[f"vs.{number}.v.{kind}"]
    if model.reducer.norm_cls is None:
        state = {n: v for n, v in state.items() if not n.startswith("reducer.")}
    return resize_tables(state, model.position_tables())


def _variant(width: int, heads: int, side: int = 224) -> dict[str, Any]:
    return {"embed_dim": width, "num_heads": heads, "img_size": side}


VARIANTS = {
    "evo_deit_tiny_patch16_224": _variant(192, 3),
    "evo_deit_small_patch16_224": _variant(384, 6),
    "evo_deit_base_patch16_224": _variant(768, 12),
    "evo_deit_base_patch16_384": _variant(768, 12, 384),
}
HEADS = ("head", "reducer.head_cls")
default_cfgs = generate_default_cfgs(
    {name: settings(one["img_size"], "patch_embed.proj", HEADS) for name, one in VARIANTS.items()}
)
STAGE_ENDS = (3, 7, 11)  # where the full grid stands
register(__name__, EvoDeiT, VARIANTS, checkpoint_filter_fn, out_indices=STAGE_ENDS)
