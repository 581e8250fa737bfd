# SPDX-License-Identifier: Apache-2.0
"""A forward pass that shows everything that is added to the residual stream, part by part.

"Does Circuit Analysis Interpretability Scale?", Lieberum et al., arXiv 2307.09458 (2023), section
3. A pre-norm network is a sum at the tokens that are read: embeddings, positions, every head, every
bias, every MLP. `logits` computes what the network computes, and hands each of these terms
(`Watch.write`), each factor that direct effects keep as it is (`Watch.hold`: the spread of a norm,
the gate of a GELU, the choice of a maximum) and each map, query, key and value (`Watch.look`) to a
`Watch`, which may put something else in its place.

With the held factors fixed, logits are linear in what was written, and nothing else is added. So
they are the sum of what each part adds (`circuits.py`); a part can be exchanged (`patching.py`).

CrossViT: its class token passes LN, GELU and a Linear on the way into another branch and back.
GELU(u) = u Phi(u); with the gate Phi(u) held, that way is linear too. A fusion's attention writes
in two parts: what the class token takes from the other branch's patches, and what from itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crosspatch.errors import UsageError
from crosspatch.layers.block import Block
from crosspatch.layers.stage import StageReduction
from crosspatch.layers.tokens import TokenState
from crosspatch.models.crossvit import CrossViT
from crosspatch.models.crossvit_fusion import AllTokensEncoder, ClassTokenEncoder, CrossEncoder
from crosspatch.models.lvvit import AUX_WEIGHT, LVViT
from crosspatch.models.resformer import LocalAttention, ResFormer
from crosspatch.models.vit import VisionTransformer
from crosspatch.tokens.host import branch_names, converted, reducers_of

HEADED = ("head", "fusion head", "fusion own")
"""Kinds of which a write is (B, heads, N, C)."""
EXPECTED = "a ViT, DeiT, LV-ViT, ResFormer or CrossViT without a token reduction"


class Part(NamedTuple):
    """A term of the residual stream. branch: fine, coarse, …, "" where there is one, "all" for what
    all write together; kind: "embedding", "positions", "head", "attention bias", "mlp", "fusion
    head" (taken from another branch), "fusion own" (from itself), or some bias; block: its number
    in the branch, of a fusion its encoder's, -1 elsewhere; head: -1 for all of them; layer: of a
    fusion of several."""

    branch: str
    kind: str
    block: int = -1
    head: int = -1
    layer: int = 0

    @property
    def name(self) -> str:
        """As people read it: "fine block 0 head 1"."""
        words = [self.branch]
        if self.kind.startswith("fusion"):
            words += ["fusion", str(self.block)] + (["layer", str(self.layer)] * bool(self.layer))
            words.append(self.kind.removeprefix("fusion "))
        elif self.block >= 0:
            words += ["stage" if self.kind == "stage bias" else "block", str(self.block), self.kind]
        else:
            words.append(self.kind)
        if self.head >= 0:
            words = [*words, str(self.head)]
        return " ".join(word for word in words if word)

    @property
    def whole(self) -> Part:
        """The part with all its heads."""
        return self._replace(head=-1)

    @property
    def constant(self) -> bool:
        """Whether it is the same for every picture: a bias."""
        return self.kind.endswith("bias")


class Watch:
    """Sees a forward pass and changes nothing; subclasses do. sources: it also looks at "sources",
    what every token would write through a head that looked at it alone, (B, H, Nk, C)."""

    sources = False

    def write(self, part: Part, value: Tensor) -> Tensor:
        """What is added to the stream, (B, N, C), of heads (B, H, N, C), or to logits (B, K)."""
        return value

    def hold(self, part: Part, value: Tensor) -> Tensor:
        """A factor, or indices, that direct effects keep."""
        return value

    def look(self, part: Part, what: str, value: Tensor) -> Tensor:
        """Of heads "q", "k", "v" (B, H, N, d) and "attention" (B, H, N, Nk); "logits" (B, K) of a
        branch; "met", the sum of all class tokens (B, 1, C)."""
        return value


def why_not(model: nn.Module) -> str | None:
    """Why the parts of `model` cannot be shown, None where they can."""
    name = type(model).__name__
    if type(model) not in (VisionTransformer, LVViT, ResFormer, CrossViT):
        return f"a {name} is not a sum of parts that is read through one norm"
    if any(reducer is not None for reducer in reducers_of(model)):
        return "its tokens are reduced on the way"
    if model.num_classes <= 0:
        return "it has no classifier"
    if not isinstance(model, CrossViT):
        if not model.global_pool:
            return "it reads all tokens without pooling them"
        if any(type(one) is not StageReduction for one in model.reductions.values()):
            return "what stands between its stages is not linear"
    return None


def explainable(model: nn.Module) -> Any:
    """`model`, or our trunk with its weights where it is a plain ViT of timm's. Raises UsageError
    with the reason for a network that cannot be taken apart."""
    try:
        ours = converted(model)
        reason = why_not(ours)
    except UsageError as error:
        ours, reason = model, error.got
    if reason is not None:
        raise UsageError(
            f"a {type(model).__name__} cannot be taken apart: {reason}",
            EXPECTED,
            "crosspatch train DATA --model crossvit_micro_32, then explain that run",
        )
    return ours


def logits(model: Any, images: Tensor, watch: Watch) -> Tensor:
    """images (B, C, H, W) to the logits (B, K) of `model` as in evaluation, every part of them seen
    by `watch`. Only for what `explainable` gives."""
    run = _crossvit if isinstance(model, CrossViT) else _vit
    return run(model, images, watch)


# ------------------------------------------------------------------ one sequence


def _vit(model: Any, images: Tensor, watch: Watch) -> Tensor:
    state = _embedded(model, images, watch)
    maps: dict[int, Tensor] = {}
    first = 0
    for number, stage in enumerate(model.stages):
        if str(number) in model.reductions:
            state = _reduced(model.reductions[str(number)], state, number, watch)
        for block in range(first, first + len(stage.blocks)):
            tokens = _block(model.blocks[block], state, Part("", "", block), maps, watch)
            state = state._replace(tokens=tokens)
        first += len(stage.blocks)
    tokens = norm(model.norm, state.tokens, Part("", "norm bias"), watch)
    return _classified(model, tokens, watch)


def _embedded(model: Any, images: Tensor, watch: Watch) -> TokenState:
    grid = model._check_size(images)
    patches = model.patch_embed(images)
    prefix = [t for t in (model.cls_token, model.dist_token, model.reg_token) if t is not None]
    tokens = torch.cat([*(t.expand(len(images), -1, -1) for t in prefix), patches], dim=1)
    tokens = watch.write(Part("", "embedding"), tokens)
    positions = model._positions(grid)
    if positions is not None:
        missing = tokens.shape[1] - positions.shape[1]  # prefix tokens without a position
        positions = F.pad(positions, (0, 0, missing, 0)).expand_as(tokens)
        tokens = tokens + watch.write(Part("", "positions"), positions)
    tokens = norm(model.norm_pre, tokens, Part("", "embedding norm bias"), watch)
    return TokenState(tokens, None, None, model.num_prefix_tokens, grid)


def _block(
    block: Any, state: TokenState, place: Part, maps: dict[int, Tensor], watch: Watch
) -> Tensor:
    x = state.tokens
    if not isinstance(block, Block):
        return x
    if block.attn is not None:
        part, shares = place._replace(kind="head"), block.spec.shares
        given = None if shares is None else maps[shares]
        heads, maps[place.block] = _heads(
            block.attn, block.norm1(x), part, watch, given=given, grid=state.grid, scale=block.ls1
        )
        x = x + watch.write(part, heads).sum(dim=1)
        if block.attn.proj.bias is not None:
            bias = block.ls1(block.attn.proj.bias.expand_as(x))
            x = x + watch.write(place._replace(kind="attention bias"), bias)
    if block.mlp is not None:
        x = x + watch.write(place._replace(kind="mlp"), block.ls2(block.mlp(block.norm2(x))))
    return x


def _heads(
    attn: Any,
    x: Tensor,
    part: Part,
    watch: Watch,
    *,
    given: Tensor | None = None,
    grid: Any = None,
    scale: Callable[[Tensor], Tensor] = lambda x: x,
) -> tuple[Tensor, Tensor]:
    """What every head writes (B, H, N, C), without the projection's bias, and the maps."""
    if given is None:
        q, k, v = attn.project(x)
        q, k = watch.look(part, "q", q), watch.look(part, "k", k)
        attention = attn.map(q, k)
    else:
        v, attention = attn.values(x), given
    v = watch.look(part, "v", v)
    attention = watch.look(part, "attention", attention)
    y = attention @ v
    if isinstance(attn, LocalAttention):
        y = y + attn.local(v, grid)
    if watch.sources:
        watch.look(part, "sources", scale(through(attn.proj, v)))
    return scale(through(attn.proj, y)), attention


def through(projection: nn.Linear, y: Tensor) -> Tensor:
    """What heads gathered (B, H, N, d) to what each of them writes (B, H, N, C)."""
    weight = projection.weight.unflatten(1, (y.shape[1], -1))
    return torch.einsum("bhnd,chd->bhnc", y, weight)


def norm(layer: nn.Module, x: Tensor, part: Part, watch: Watch) -> Tensor:
    """A LayerNorm whose spread is held, and whose bias is a part."""
    if isinstance(layer, nn.Identity):
        return x
    if not isinstance(layer, nn.LayerNorm):
        raise TypeError(f"{type(layer).__name__} for a norm; expected a LayerNorm")
    centred = x - x.mean(dim=-1, keepdim=True)
    inverse = (centred.square().mean(dim=-1, keepdim=True) + layer.eps).rsqrt()
    y = centred * watch.hold(part, inverse) * layer.weight
    return y + watch.write(part, layer.bias.expand_as(y))


def _linear(layer: Any, x: Tensor, part: Part, watch: Watch) -> Tensor:
    y = F.linear(x, layer.weight)
    return y if layer.bias is None else y + watch.write(part, layer.bias.expand_as(y))


def _reduced(reduction: Any, state: TokenState, number: int, watch: Watch) -> TokenState:
    conv, linear = reduction.patches, reduction.prefix
    image = state.patches.transpose(1, 2).unflatten(2, state.grid)
    image = F.conv2d(image, conv.weight, None, conv.stride, conv.padding)
    prefix = F.linear(state.tokens[:, : state.n_prefix], linear.weight)
    tokens = torch.cat([prefix, image.flatten(2).transpose(1, 2)], dim=1)
    biases = [linear.bias.expand_as(prefix), conv.bias.expand_as(tokens[:, state.n_prefix :])]
    tokens = tokens + watch.write(Part("", "stage bias", number), torch.cat(biases, dim=1))
    return state._replace(tokens=tokens, grid=(image.shape[2], image.shape[3]))


def _classified(model: Any, x: Tensor, watch: Watch) -> Tensor:
    """Normalised tokens (B, N, C) to logits."""
    n, bias = model.num_prefix_tokens, Part("", "classifier bias")
    if model.dist_token is not None:
        taught = Part("", "distillation classifier bias")
        second = _linear(model.head_dist, x[:, 1], taught, watch)
        return (_linear(model.head, x[:, 0], bias, watch) + second) / 2
    if model.global_pool == "token":
        pooled = x[:, 0]
    elif model.global_pool == "max":
        pooled = _largest(x[:, n:], Part("", "largest"), watch)
    else:
        pooled = x[:, n:].mean(dim=1)
    pooled = norm(model.fc_norm, pooled, Part("", "pool norm bias"), watch)
    found = _linear(model.head, pooled, bias, watch)
    if isinstance(model, LVViT) and model.aux_head is not None:
        dense = _linear(model.aux_head, x[:, n:], Part("", "patch classifier bias"), watch)
        found = found + AUX_WEIGHT * _largest(dense, Part("", "largest"), watch)
    return found


def _largest(x: Tensor, part: Part, watch: Watch) -> Tensor:
    """x (B, N, C) to (B, C), the maximum over N, the choice of which is held."""
    return x.gather(1, watch.hold(part, x.argmax(dim=1, keepdim=True)))[:, 0]


# ------------------------------------------------------------------ several branches


def _crossvit(model: Any, images: Tensor, watch: Watch) -> Tensor:
    names = branch_names(model)
    states = []
    for i, (name, grid) in enumerate(zip(names, model.grids, strict=True)):
        patches = model.patch_embed[i](model.resize[i](images))
        token = model.cls_token[i].expand(len(images), -1, -1)
        tokens = watch.write(Part(name, "embedding"), torch.cat([token, patches], dim=1))
        positions = model.pos_embed[i].expand_as(tokens)
        tokens = tokens + watch.write(Part(name, "positions"), positions)
        states.append(TokenState(tokens, None, None, 1, grid))
    first = [0] * len(names)
    for number, encoder in enumerate(model.blocks):
        for i, blocks in enumerate(encoder.blocks):
            for block in blocks:
                place = Part(names[i], "", first[i])
                tokens = _block(block, states[i], place, {}, watch)
                states[i] = states[i]._replace(tokens=tokens)
                first[i] += 1
        states = _fusion(encoder)(encoder, states, names, number, watch)
    found = []
    for i, name in enumerate(names):
        x = norm(model.norm[i], states[i].tokens, Part(name, "norm bias"), watch)
        pooled = x[:, 1:].mean(dim=1) if model.global_pool == "avg" else x[:, 0]
        one = _linear(model.head[i], pooled, Part(name, "classifier bias"), watch)
        found.append(watch.look(Part(name, "classifier"), "logits", one))
    return torch.stack(found).mean(dim=0)


def _fusion(encoder: nn.Module) -> Callable[..., list[TokenState]]:
    if isinstance(encoder, CrossEncoder):
        return _cross
    if isinstance(encoder, ClassTokenEncoder):
        return _class_tokens
    if isinstance(encoder, AllTokensEncoder):
        return _all_tokens
    return lambda encoder, states, *_: states


def _cross(encoder: Any, states: list, names: Any, number: int, watch: Watch) -> list:
    fused = []
    for i, state in enumerate(states):
        other, place = states[(i + 1) % len(states)], Part(names[i], "", number)
        query = _projected(encoder.projs[i], state.tokens[:, :1], place, "out", watch)
        y = torch.cat([query, other.patches], dim=1)
        stack = encoder.fusion[i]
        for layer, one in enumerate(stack if isinstance(stack, nn.Sequential) else (stack,)):
            y = y[:, :1] + _asked(one, y, place._replace(layer=layer), watch)
        token = _projected(encoder.revert_projs[i], y, place, "back", watch)
        fused.append(state._replace(tokens=torch.cat([token, state.patches], dim=1)))
    return fused


def _asked(layer: Any, y: Tensor, place: Part, watch: Watch) -> Tensor:
    """What the first token gathers from the others, and from itself; and the projection's bias."""
    attn, x = layer.attn, layer.norm1(y)
    part, own = place._replace(kind="fusion head"), place._replace(kind="fusion own")
    split = lambda z: z.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2)
    q, k = watch.look(part, "q", split(attn.wq(x[:, :1]))), watch.look(part, "k", split(attn.wk(x)))
    v = watch.look(part, "v", split(attn.wv(x)))
    row = ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(dim=-1)
    row = watch.look(part, "attention", row)
    if watch.sources:
        watch.look(part, "sources", through(attn.proj, v))
    out = watch.write(own, through(attn.proj, row[..., :1] @ v[:, :, :1])).sum(dim=1)
    if y.shape[1] > 1:
        taken = through(attn.proj, row[..., 1:] @ v[:, :, 1:])
        out = out + watch.write(part, taken).sum(dim=1)
    bias = place._replace(kind="fusion attention bias")
    return out + watch.write(bias, attn.proj.bias.expand_as(out))


def _projected(layers: Any, x: Tensor, place: Part, way: str, watch: Watch) -> Tensor:
    """LN, GELU, Linear: with the gate of the GELU held."""
    u = norm(layers[0], x, place._replace(kind=f"fusion way {way} norm bias"), watch)
    gate = 0.5 * (1 + torch.erf(u / math.sqrt(2)))
    gate = watch.hold(place._replace(kind=f"fusion way {way} gate"), gate)
    return _linear(layers[2], u * gate, place._replace(kind=f"fusion way {way} bias"), watch)


def _class_tokens(encoder: Any, states: list, names: Any, number: int, watch: Watch) -> list:
    places = [Part(name, "", number) for name in names]
    rows = zip(encoder.projs, states, places, strict=True)
    total: Any = sum(_projected(f, s.tokens[:, :1], place, "out", watch) for f, s, place in rows)
    watch.look(Part("all", "fusion", number), "met", total)
    fused = []
    for g, state, place in zip(encoder.revert_projs, states, places, strict=True):
        token = _projected(g, total, place, "back", watch)
        fused.append(state._replace(tokens=torch.cat([token, state.patches], dim=1)))
    return fused


def _all_tokens(encoder: Any, states: list, names: Any, number: int, watch: Watch) -> list:
    places = [Part(name, "", number) for name in names]
    rows = zip(encoder.projs, states, places, strict=True)
    x = torch.cat([_projected(f, s.tokens, place, "out", watch) for f, s, place in rows], dim=1)
    part = Part("all", "fusion head", number)
    heads, _ = _heads(encoder.attn, encoder.norm1(x), part, watch)
    x = x + watch.write(part, heads).sum(dim=1)
    bias = encoder.attn.proj.bias.expand_as(x)
    x = x + watch.write(part._replace(kind="fusion attention bias"), bias)
    parts = x.split([s.tokens.shape[1] for s in states], dim=1)
    rows = zip(encoder.revert_projs, states, parts, places, strict=True)
    return [
        s._replace(tokens=_projected(g, tokens, place, "back", watch))
        for g, s, tokens, place in rows
    ]
