# SPDX-License-Identifier: Apache-2.0
"""What a reduction method is told of the network that it is put on, and the schedules it makes of
that.

A plain ViT is one sequence of blocks, a CrossViT has one per branch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn

from crosspatch.errors import UsageError
from crosspatch.layers.block import Block, BlockSpec
from crosspatch.layers.reducer import Reducer
from crosspatch.models.crossvit import CrossViT
from crosspatch.models.from_timm import Unconvertible, from_timm
from crosspatch.models.vit import VisionTransformer

HOSTS = "a ViT or DeiT of ours, one of timm's that converts, an LV-ViT or a CrossViT"


class Host(NamedTuple):
    """One sequence of blocks over one grid of patches.

    blocks: its modules in order (identities where a spec says that a block does not exist); a
    method may read shapes from them and keep none. width: of the tokens at each block. n_prefix:
    class, distillation and register tokens, which stand first. grid: rows and columns of patches.
    class_token: whether the first token is one. starts: numbers of the blocks where an encoder of a
    CrossViT, or a stage of another width, begins. num_classes: of the head. name: what an error
    calls it.
    """

    blocks: tuple[Any, ...]
    width: tuple[int, ...]
    n_prefix: int
    grid: tuple[int, int]
    class_token: bool
    starts: tuple[int, ...]
    num_classes: int
    name: str

    @property
    def depth(self) -> int:
        return len(self.blocks)

    @property
    def patches(self) -> int:
        """Patches of the full grid."""
        return self.grid[0] * self.grid[1]

    @property
    def tokens(self) -> int:
        """Tokens that enter the first block, prefix included."""
        return self.patches + self.n_prefix

    @property
    def specs(self) -> tuple[BlockSpec | None, ...]:
        """The shape of each block, None for one that does not exist."""
        return tuple(b.spec if isinstance(b, Block) else None for b in self.blocks)

    def attends(self, block: int) -> bool:
        """Whether a reducer's hooks can run at this block: it has an attention of its own."""
        spec = self.specs[block]
        return spec is not None and spec.heads > 0 and spec.shares is None


def hosts_of(model: nn.Module) -> tuple[Host, ...]:
    """The sequences of blocks of `model`, one per branch. Raises UsageError for another network."""
    if isinstance(model, VisionTransformer):
        widths = tuple(stage.width for stage in model.stages for _ in stage.blocks)
        lengths = [len(stage.blocks) for stage in model.stages]
        starts = tuple(sum(lengths[:i]) for i in range(len(lengths)))
        if any(stage.stride > 1 for stage in model.stages):
            raise UsageError(
                "a network whose stages have grids of their own",
                "one grid of patches through all blocks",
                "reduce a plain ViT, or train the network as it is",
            )
        if any(isinstance(block, Block) and block.gridded for block in model.blocks):
            raise UsageError(
                f"a {type(model).__name__}, whose attention looks at the neighbours of each patch",
                "a network that does not ask where the patches that are left lie",
                "reduce a DeiT, or train the network as it is",
            )
        blocks = tuple(model.blocks)
        shape = (model.num_prefix_tokens, model.grid, model.has_class_token)
        return (Host(blocks, widths, *shape, starts, model.num_classes, "the model"),)
    if isinstance(model, CrossViT):
        return tuple(_branch(model, i) for i in range(len(model.grids)))
    raise UsageError(
        f"a {type(model).__name__}",
        HOSTS,
        "reduce such a model, such as deit_small_patch16_224",
    )


def _branch(model: CrossViT, branch: int) -> Host:
    encoders: Any = model.blocks
    lists = [tuple(encoder.blocks[branch]) for encoder in encoders]
    blocks = sum(lists, ())
    starts = tuple(sum(map(len, lists[:i])) for i in range(len(lists)))
    width = (model.embed_dim[branch],) * len(blocks)
    name = f"branch {branch_names(model)[branch]!r}"
    return Host(blocks, width, 1, model.grids[branch], True, starts, model.num_classes, name)


def branch_names(model: nn.Module) -> tuple[str, ...]:
    """What options call the branches of a CrossViT: fine and coarse, or b0, b1, … of more; empty
    for one sequence."""
    if not isinstance(model, CrossViT):
        return ()
    count = len(model.grids)
    return ("fine", "coarse") if count == 2 else tuple(f"b{i}" for i in range(count))


def converted(model: nn.Module) -> nn.Module:
    """`model` where it is ours, else our trunk with its weights. Raises UsageError with the reason
    where timm's network has something that the trunk does not compute."""
    if isinstance(model, VisionTransformer | CrossViT):
        return model
    if not type(model).__module__.startswith("timm."):
        return model
    try:
        return from_timm(model)
    except Unconvertible as error:
        raise UsageError(
            f"a {type(model).__name__} that cannot be reduced: {error}", HOSTS, "take another model"
        ) from error


def attach(model: Any, reducers: Sequence[Reducer | None]) -> None:
    """Put one reducer on each branch of `model` (a ViT has one), in evaluation as in training."""
    for host, reducer in zip(hosts_of(model), reducers, strict=True):
        if reducer is not None:
            reducer.rebuild(list(host.blocks))
            reducer.train(model.training).to(next(model.parameters()).device)
    if isinstance(model, CrossViT):
        mine: Any = reducers
        model.reducers = nn.ModuleList(mine)
    else:
        (model.reducer,) = reducers


def reducers_of(model: nn.Module) -> tuple[Reducer | None, ...]:
    """The reducers on the branches of `model`, None where there is none."""
    if isinstance(model, CrossViT):
        return tuple(model.reducers)
    return (getattr(model, "reducer", None),)


# ------------------------------------------------------------------ schedules


def require_class_token(host: Host, method: str) -> None:
    """Raises ValueError where `host` has no class token, which `method` asks what it attends to."""
    if not host.class_token:
        raise ValueError(
            f"{method} ranks patches by the attention of the class token, and {host.name} has none"
        )


def check_shared(host: Host, reducer: Reducer) -> None:
    """Raises ValueError where `reducer` would run between a block of `host` and one that shares its
    attention map."""
    for block, spec in enumerate(host.specs):
        if spec is None or spec.shares is None:
            continue
        for between in range(spec.shares, block):
            if reducer.active(between):
                raise ValueError(
                    f"block {block} shares the attention map of block {spec.shares}: nothing may "
                    f"be reduced from that one on, and block {between} would be"
                )


def per_block(value: float | Sequence[float], host: Host, name: str) -> tuple[float, ...]:
    """A number for every block: `value` for each that attends, or as listed.

    Raises ValueError for a list of another length, a negative number, or one above 0 at a block
    without an attention of its own.
    """
    if isinstance(value, int | float):
        values: Sequence[float] = [value if host.attends(i) else 0 for i in range(host.depth)]
    else:
        values = value
    if len(values) != host.depth:
        raise ValueError(f"{name} has {len(values)} entries; {host.name} has {host.depth} blocks")
    for block, one in enumerate(values):
        if one < 0:
            raise ValueError(f"{name} = {one} at block {block}; expected 0 or more")
        if one > 0 and not host.attends(block):
            raise ValueError(f"{name} = {one} at block {block}, which has no attention of its own")
    return tuple(values)


def check_blocks(blocks: Sequence[int], host: Host, name: str) -> tuple[int, ...]:
    """The numbers of blocks, sorted. Raises ValueError for one that is not there, is named twice or
    has no attention of its own."""
    for block in blocks:
        if not isinstance(block, int) or not 0 <= block < host.depth:
            raise ValueError(
                f"{name} names block {block}; {host.name} has blocks 0 to {host.depth - 1}"
            )
        if not host.attends(block):
            raise ValueError(f"{name} names block {block}, which has no attention of its own")
    if len(set(blocks)) < len(blocks):
        raise ValueError(f"{name} names a block twice: {sorted(blocks)}")
    return tuple(sorted(blocks))
