# SPDX-License-Identifier: Apache-2.0
"""Where a network looks: maps of the class token of every branch, and what fusions take.

Three kinds of maps over the patches of a picture, from the weakest claim to the strongest:

- `class_maps`: the attention of the tokens that are read, head by head, block by block;
- `rollout`: Abnar & Zuidema, "Quantifying Attention Flow in Transformers", arXiv 2005.00928: the
  product over the blocks of (A + I) / 2, A the mean over the heads. Here it also passes CrossViT's
  fusions, so that it says how much of each class token comes from the patches of which branch;
- `written_from`: what heads wrote into the tokens that are read, patch by patch, towards a logit or
  a difference of two. It adds up to what the heads contribute (`circuits.py`), the convolution
  beside a ResFormer's attention left out.

"Read" tokens are the class token's, or all patches where their mean or maximum is classified.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from crosspatch.errors import UsageError
from crosspatch.explain.circuits import Attribution
from crosspatch.explain.forward import HEADED, Part, explainable
from crosspatch.explain.patching import Record, record
from crosspatch.models.crossvit import CrossViT
from crosspatch.tokens.host import branch_names


class Layout(NamedTuple):
    """names: of the branches, ("",) of one; grids: rows and columns of patches; prefix: tokens
    before them; read: whether the first token is read, and not the patches."""

    names: tuple[str, ...]
    grids: tuple[tuple[int, int], ...]
    prefix: int
    read: bool

    @property
    def counts(self) -> list[int]:
        """Tokens of every branch."""
        return [rows * columns + self.prefix for rows, columns in self.grids]


class ClassMap(NamedTuple):
    """What the read tokens of `branch` attend to among the patches of `onto`. block: of the branch,
    or of a fusion its encoder; heads: (B, H, rows, columns); elsewhere: (B, H), what other tokens
    have of it (class, distillation, registers, other branches). Together 1."""

    branch: str
    onto: str
    block: int
    fusion: bool
    heads: np.ndarray
    elsewhere: np.ndarray


class Rollout(NamedTuple):
    """Of how much of what is read in `branch` comes from every patch. maps: branch to (B, rows,
    columns); elsewhere: (B,), from tokens that are no patches. Together 1."""

    branch: str
    maps: dict[str, np.ndarray]
    elsewhere: np.ndarray


def layout(model: Any, images: Tensor) -> Layout:
    """Raises UsageError where stages have grids of their own, and as `explainable` does."""
    model = explainable(model)
    if isinstance(model, CrossViT):
        read = model.global_pool == "token"
        return Layout(branch_names(model), tuple(model.grids), 1, read)
    if any(stage.stride > 1 for stage in model.stages):
        raise UsageError(
            f"a {type(model).__name__} whose stages have grids of their own",
            "one grid of patches through all blocks",
            "use dla() and patch(), which need none",
        )
    grid = model._check_size(images)
    return Layout(("",), (grid,), model.num_prefix_tokens, model.global_pool == "token")


def class_maps(model: nn.Module, images: Tensor) -> list[ClassMap]:
    """The attention of the read tokens in every block and every fusion, in the order of the pass.

    images: (B, C, H, W). Raises UsageError as `layout` does.
    """
    shape, kept = layout(model, images), record(model, images)
    return maps_of(shape, kept)


def maps_of(shape: Layout, kept: Record) -> list[ClassMap]:
    """`class_maps` of a pass that was recorded."""
    found = []
    for (part, what), attention in kept.seen.items():
        if what != "attention":
            continue
        if part.branch == "all":
            for i, name in enumerate(shape.names):
                row = _read(attention, shape, i, joint=True)
                found += [_onto(row, shape, j, name, part, True) for j in range(len(shape.names))]
            continue
        i = shape.names.index(part.branch)
        if part.kind == "fusion head":
            if part.layer == 0:  # later layers see nothing but the class token
                j = (i + 1) % len(shape.names)
                grid = attention[:, :, 0, 1:].unflatten(-1, shape.grids[j])
                own = attention[:, :, 0, 0]
                found.append(_class_map(part, shape.names[j], grid, own, True))
            continue
        row = _read(attention, shape, i)
        grid = row[..., shape.prefix :].unflatten(-1, shape.grids[i])
        own = row[..., : shape.prefix].sum(dim=-1)
        found.append(_class_map(part, part.branch, grid, own, False))
    return found


def _class_map(part: Part, onto: str, grid: Tensor, own: Tensor, fusion: bool) -> ClassMap:
    maps = (grid.double().cpu().numpy(), own.double().cpu().numpy())
    return ClassMap(part.branch, onto, part.block, fusion, *maps)


def _read(attention: Tensor, shape: Layout, branch: int, joint: bool = False) -> Tensor:
    """(B, H, N, Nk) to the row (B, H, Nk) of the tokens that are read."""
    start = sum(shape.counts[:branch]) if joint else 0
    if shape.read:
        return attention[:, :, start]
    stop = start + shape.counts[branch]
    return attention[:, :, start + shape.prefix : stop].mean(dim=2)


def _onto(row: Tensor, shape: Layout, j: int, name: str, part: Part, fusion: bool) -> ClassMap:
    start = sum(shape.counts[:j]) + shape.prefix
    patches = row[..., start : sum(shape.counts[: j + 1])]
    own = row.sum(dim=-1) - patches.sum(dim=-1)
    grid = patches.unflatten(-1, shape.grids[j])
    return _class_map(part._replace(branch=name), shape.names[j], grid, own, fusion)


# ------------------------------------------------------------------ rollout


def rollout(model: nn.Module, images: Tensor) -> list[Rollout]:
    """For every branch, of which patches what is read there is made. images: (B, C, H, W). Raises
    UsageError as `layout` does."""
    return rollout_of(layout(model, images), record(model, images))


def rollout_of(shape: Layout, kept: Record) -> list[Rollout]:
    """`rollout` of a pass that was recorded."""
    count = len(kept.logits)
    total = sum(shape.counts)
    eye = torch.eye(total, dtype=torch.float64).expand(count, -1, -1)
    flow = list(eye.split(shape.counts, dim=1))
    asked: dict[int, tuple[int, Tensor]] = {}
    for (part, what), attention in kept.seen.items():
        if what == "attention":
            mean = attention.double().cpu().mean(dim=1)
            _pass(flow, shape, part, mean, asked)
        elif what == "met":
            token = torch.stack([one[:, :1] for one in flow]).mean(dim=0)
            flow = [torch.cat([token, one[:, 1:]], dim=1) for one in flow]
    _answer(flow, asked)
    return [_rolled(flow[i], shape, i) for i in range(len(flow))]


def _pass(
    flow: list, shape: Layout, part: Part, mean: Tensor, asked: dict[int, tuple[int, Tensor]]
) -> None:
    """One attention (B, N, Nk) over the flows (B, N, all tokens) of the branches. asked: branch to
    its class token's flow behind a fusion, while the others still see the one before."""
    if part.branch == "all":
        joint = torch.cat(flow, dim=1)
        flow[:] = ((joint + mean @ joint) / 2).split(shape.counts, dim=1)
        return
    i = shape.names.index(part.branch)
    if any(part.kind != "fusion head" or block != part.block for block, _ in asked.values()):
        _answer(flow, asked)
    if part.kind != "fusion head":
        flow[i] = (flow[i] + mean @ flow[i]) / 2
    elif part.layer == 0:  # later layers see nothing but the class token
        own, other = flow[i][:, :1], flow[(i + 1) % len(flow)][:, 1:]
        taken = mean[:, :, :1] @ own + mean[:, :, 1:] @ other
        asked[i] = (part.block, (own + taken) / 2)


def _answer(flow: list, asked: dict[int, tuple[int, Tensor]]) -> None:
    for i, (_, token) in asked.items():
        flow[i] = torch.cat([token, flow[i][:, 1:]], dim=1)
    asked.clear()


def _rolled(flow: Tensor, shape: Layout, i: int) -> Rollout:
    row = flow[:, 0] if shape.read else flow[:, shape.prefix :].mean(dim=1)
    maps, start = {}, 0
    for name, grid, count in zip(shape.names, shape.grids, shape.counts, strict=True):
        patches = row[:, start + shape.prefix : start + count]
        maps[name] = patches.unflatten(-1, grid).numpy()
        start += count
    elsewhere = 1 - sum(one.sum(axis=(1, 2)) for one in maps.values())
    return Rollout(shape.names[i], maps, np.asarray(elsewhere))


# ------------------------------------------------------------------ towards a logit


def written_from(shape: Layout, found: Attribution, direction: int = 0) -> dict[str, np.ndarray]:
    """Branch to (B, rows, columns): what all heads wrote from each patch towards a direction.

    found: of `attribute(…, sources=True)`. What they wrote from tokens that are no patches is left
    out. Raises UsageError where the sources were not kept.
    """
    batch = len(found.values)
    maps = {
        name: torch.zeros(batch, *grid, dtype=torch.float64)
        for name, grid in zip(shape.names, shape.grids, strict=True)
    }
    for part, slope in found.slopes.items():
        if part.kind not in HEADED or part.kind == "fusion own" or part.layer:
            continue
        if (part, "sources") not in found.seen:
            raise UsageError(
                "an attribution without sources", "sources=True", "dla(…, sources=True)"
            )
        sources, attention = found.seen[part, "sources"], found.seen[part, "attention"]
        along = torch.einsum("bhnc,bhkc->bhnk", slope[direction], sources)
        keys = (along * attention).sum(dim=(1, 2))  # (B, Nk)
        _added(maps, shape, part, keys)
    return {name: one.numpy() for name, one in maps.items()}


def _added(maps: dict[str, Tensor], shape: Layout, part: Part, keys: Tensor) -> None:
    if part.branch == "all":
        rows = zip(shape.names, keys.split(shape.counts, dim=1), strict=True)
    elif part.kind == "fusion head":
        other = (shape.names.index(part.branch) + 1) % len(shape.names)
        rows = [(shape.names[other], keys)]
    else:
        rows = [(part.branch, keys)]
    for name, row in rows:
        grid = shape.grids[shape.names.index(name)]
        maps[name] += row[:, shape.prefix :].unflatten(-1, grid)
