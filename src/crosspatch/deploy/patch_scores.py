# SPDX-License-Identifier: Apache-2.0
"""How much each patch of a picture gave to the logit of its most probable class, in the forward
pass: what `export --explain` writes as a second output.

The score of patch k is the sum over all heads h and over the tokens r that are read of

    A_h[r, k] (v_hk W_h) . d logit / d r

with A the attention, v the values, W_h the head's part of the output projection, and the spreads of
the norms (and in a CrossViT the gates of the GELUs) on the way to the logit held. It is the direct
logit attribution of the heads, patch by patch: what `explain.attention.written_from` says of
`explain.circuits.dla` (Lieberum et al., arXiv 2307.09458, section 3.1), with the derivative, linear
with those factors held, written out, as an exported graph has none. What MLPs and tokens that are
no patches give is in no score; what patches do to each other in earlier blocks is counted where it
is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from crosspatch.data.preprocess import Preprocess
from crosspatch.deploy.graph import Shipped
from crosspatch.errors import UsageError
from crosspatch.layers.attention import Attention
from crosspatch.layers.block import Block
from crosspatch.models.crossvit import CrossViT
from crosspatch.models.crossvit_fusion import ClassTokenEncoder, CrossEncoder, MultiScaleEncoder
from crosspatch.models.lvvit import LVViT
from crosspatch.models.resformer import ResFormer
from crosspatch.models.vit import VisionTransformer
from crosspatch.tasks import activate

EXPECTED = (
    "a ViT, DeiT, ResFormer or CrossViT whose tokens are not reduced, that reads a class token or "
    "the mean of its patches"
)
Seen = dict[nn.Module, Tensor]


class Explained(Shipped):
    """The same as `Shipped` with a second answer: (B, H, W, 3) uint8 -> probabilities (B, K) and
    scores of the patches (B, rows, columns) float32, both branches of a CrossViT on the finer grid.

    Raises UsageError with the reason for a network that has no such scores.
    """

    explains = True

    def __init__(
        self,
        module: nn.Module,
        preprocess: Preprocess,
        temperature: float = 1.0,
        task: str = "classify",
    ) -> None:
        if reason := why_no_scores(module):
            raise UsageError(
                f"--explain for a {type(module).__name__}: {reason}",
                EXPECTED,
                "export without --explain, or train --model crossvit_micro_32",
            )
        super().__init__(module, preprocess, temperature, task)
        model: Any = module
        grids = list(model.grids) if isinstance(module, CrossViT) else [model.grid]
        self.grid: tuple[int, int] = max(grids, key=lambda grid: grid[0] * grid[1])
        self.grids: list[tuple[int, int]] = grids
        for number, grid in enumerate(grids):
            for name, old, new in zip(("rows", "columns"), grid, self.grid, strict=True):
                self.register_buffer(f"{name}_{number}", spread(old, new), persistent=False)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        with _watching(self.module) as seen:
            logits = self.module(self.normalised(image))
        probabilities = activate(logits.float() / self.temperature, self.task)
        score = _crossvit if isinstance(self.module, CrossViT) else _vit
        rows = score(self.module, seen, logits.argmax(dim=1))
        total = [self._laid(row.float(), number) for number, row in enumerate(rows)]
        return probabilities, torch.stack(total).sum(dim=0)

    def _laid(self, row: Tensor, number: int) -> Tensor:
        """(B, P) of one branch on the common grid; the sum over the picture stays."""
        patches = row.unflatten(1, self.grids[number])
        down, across = getattr(self, f"rows_{number}"), getattr(self, f"columns_{number}")
        return down @ patches @ across.T


def why_no_scores(module: nn.Module) -> str | None:
    """Why the patches of a network have no scores, None where they have."""
    model: Any = module
    if type(model) not in (VisionTransformer, LVViT, ResFormer, CrossViT):
        return "it is not built of attention over patches that a class token or a mean reads"
    several = isinstance(model, CrossViT)
    if any(one is not None for one in (model.reducers if several else [model.reducer])):
        return "its tokens are reduced on the way, so that patches share a token"
    if model.num_classes <= 0:
        return "it has no classifier"
    if model.global_pool not in ("token", "avg"):
        return f"it reads its tokens by {model.global_pool or 'no pooling'}"
    if several:
        known = (CrossEncoder, ClassTokenEncoder, MultiScaleEncoder)
        if any(type(encoder) not in known for encoder in model.blocks):
            return "its branches meet in an attention over all tokens"
    elif len(model.reductions):
        return "its stages have grids or widths of their own"
    elif getattr(model, "aux_head", None) is not None:
        return "its second classifier reads the largest of its patches"
    if any(_odd(one) for one in model.modules()):
        return "its norms or activations are not those that the formula is of"
    return None


def _odd(module: nn.Module) -> bool:
    """Whether a module stands where LayerNorm or the exact GELU is expected."""
    if isinstance(module, nn.LayerNorm):
        return module.weight is None
    if isinstance(module, Block) and module.attn is not None:
        return not isinstance(module.norm1, nn.LayerNorm)
    if isinstance(module, MultiScaleEncoder):
        ways = [*getattr(module, "projs", ()), *getattr(module, "revert_projs", ())]
        return any(type(way[1]) is not nn.GELU or way[1].approximate != "none" for way in ways)
    return False


def spread(old: int, new: int) -> Tensor:
    """(new, old): the share of each of `old` equal parts of a side that lies in each of `new`."""
    ends, starts = torch.arange(1, new + 1)[:, None] / new, torch.arange(new)[:, None] / new
    high = torch.minimum(ends, torch.arange(1, old + 1)[None] / old)
    low = torch.maximum(starts, torch.arange(old)[None] / old)
    return (high - low).clamp(min=0) * old


@contextmanager
def _watching(model: nn.Module) -> Iterator[Seen]:
    """What every module is given first, by module."""
    seen: Seen = {}

    def note(module: nn.Module, given: tuple[Any, ...]) -> None:
        seen[module] = given[0]

    held = [one.register_forward_pre_hook(note) for one in model.modules() if one is not model]
    try:
        yield seen
    finally:
        for one in held:
            one.remove()


# ------------------------------------------------------------------ one sequence


def _vit(model: Any, seen: Seen, best: Tensor) -> list[Tensor]:
    n, patches = model.num_prefix_tokens, model.grid[0] * model.grid[1]
    if model.dist_token is not None:
        read = slice(0, 2)
        slope = torch.stack([model.head.weight[best], model.head_dist.weight[best]], dim=1) / 2
    else:
        slope = _before_norm(model.fc_norm, seen, model.head.weight[best])[:, None]
        read = slice(0, 1)
        if model.global_pool == "avg":
            read, slope = slice(n, None), slope.expand(-1, patches, -1) / patches
    slope = _before_norm(model.norm, seen, slope, read)
    maps: dict[int, Tensor] = {}
    rows = [
        _written(block, seen, read, slope, maps, number)
        for number, block in enumerate(model.blocks)
        if isinstance(block, Block) and block.attn is not None
    ]
    return [torch.stack(rows).sum(dim=0)[:, n:]]


def _written(
    block: Any, seen: Seen, read: slice, slope: Tensor, maps: dict[int, Tensor], number: int = 0
) -> Tensor:
    """(B, N): what the heads of a block write from each token into the tokens that are `read`,
    along the slopes (B, R, C) there. maps: of the blocks, by number; this one's is added."""
    attn, x = block.attn, block.norm1(seen[block.norm1])
    if block.spec.shares is None:
        q, k, v = attn.project(x)
        maps[number] = attn.map(q[:, :, read], k)
    else:
        v, maps[number] = attn.values(x), maps[block.spec.shares]
    along = _heads(attn, block.ls1(slope)) @ v.transpose(-2, -1)  # (B, H, R, N)
    return (along * maps[number]).sum(dim=(1, 2))


def _heads(attn: Attention | Any, slope: Tensor) -> Tensor:
    """(B, R, C) behind the output projection to (B, H, R, d) in front of it."""
    return (slope @ attn.proj.weight).unflatten(-1, (attn.num_heads, -1)).transpose(1, 2)


def _before_norm(norm: Any, seen: Seen, slope: Tensor, read: slice | None = None) -> Tensor:
    """A slope behind a LayerNorm to the one in front of it, its spread held. read: which of the
    tokens that it was given the slope is of."""
    if isinstance(norm, nn.Identity):
        return slope
    x = seen[norm] if read is None or seen[norm].ndim == 2 else seen[norm][:, read]
    x = x[:, None] if x.ndim < slope.ndim else x
    centred = x - x.mean(dim=-1, keepdim=True)
    inverse = (centred.square().mean(dim=-1, keepdim=True) + norm.eps).rsqrt()
    scaled = slope * norm.weight * inverse
    return scaled - scaled.mean(dim=-1, keepdim=True)


# ------------------------------------------------------------------ several branches


def _crossvit(model: Any, seen: Seen, best: Tensor) -> list[Tensor]:
    counts = [rows * columns for rows, columns in model.grids]
    token = model.global_pool == "token"
    read = slice(0, 1) if token else slice(1, None)
    slopes = []
    for head, norm, count in zip(model.head, model.norm, counts, strict=True):
        slope = head.weight[best][:, None] / len(counts)
        slope = slope if token else slope.expand(-1, count, -1) / count
        slopes.append(_before_norm(norm, seen, slope, read))
    rows: list[list[Tensor]] = [[] for _ in counts]
    for encoder in reversed(model.blocks):
        if token:  # patches go past a fusion as they are
            slopes = _before_fusion(encoder, seen, slopes, rows)
        for i, blocks in enumerate(encoder.blocks):
            found = [_written(block, seen, read, slopes[i], {}) for block in blocks]
            rows[i] += [one[:, 1:] for one in found]
    return [_total(of, seen, count) for of, count in zip(rows, counts, strict=True)]


def _total(rows: list[Tensor], seen: Seen, count: int) -> Tensor:
    if rows:
        return torch.stack(rows).sum(dim=0)
    first = next(iter(seen.values()))
    return first.new_zeros(first.shape[0], count)


def _before_fusion(
    encoder: Any, seen: Seen, slopes: list[Tensor], rows: list[list[Tensor]]
) -> list[Tensor]:
    """Slopes (B, 1, C_i) of the class tokens behind a fusion to those in front of it; what it took
    from patches is added to the rows of their branch."""
    if isinstance(encoder, CrossEncoder):
        found = []
        for i, slope in enumerate(slopes):
            inner = _before_way(encoder.revert_projs[i], seen, slope)
            stack = encoder.fusion[i]
            first: Any = stack[0] if isinstance(stack, nn.Sequential) else stack
            rows[(i + 1) % len(rows)].append(_asked(first, seen, inner))
            found.append(_before_way(encoder.projs[i], seen, inner))
        return found
    if isinstance(encoder, ClassTokenEncoder):
        pairs = zip(encoder.revert_projs, slopes, strict=True)
        total = torch.stack([_before_way(way, seen, slope) for way, slope in pairs]).sum(dim=0)
        return [_before_way(way, seen, total) for way in encoder.projs]
    return slopes


def _asked(layer: Any, seen: Seen, slope: Tensor) -> Tensor:
    """(B, P): what a class token takes from each patch of another branch, along a slope (B, 1, C).
    Later layers of a fusion see nothing but the class token."""
    attn, x = layer.attn, layer.norm1(seen[layer.norm1])
    inner = _heads(attn, slope)[:, :, 0]  # (B, H, d)
    shape = (attn.num_heads, -1)
    query = torch.einsum("bhd,hdc->bhc", inner, attn.wv.weight.unflatten(0, shape))
    along = query @ x.transpose(1, 2)
    if attn.wv.bias is not None:
        along = along + (inner * attn.wv.bias.unflatten(0, shape)).sum(dim=-1, keepdim=True)
    return (along * attn.class_row(x)).sum(dim=1)[:, 1:]


def _before_way(way: Any, seen: Seen, slope: Tensor) -> Tensor:
    """A slope behind LN, GELU, Linear to the one in front of them, spread and gate held."""
    gate = 0.5 * (1 + torch.erf(way[0](seen[way[0]]) / 2**0.5))
    return _before_norm(way[0], seen, (slope @ way[2].weight) * gate)
