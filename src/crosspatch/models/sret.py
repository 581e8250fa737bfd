# SPDX-License-Identifier: Apache-2.0
"""SReT: every block is passed through twice, attention in slices pays for the second pass.

"Sliced Recursive Transformer", Shen, Liu, Xing, arXiv 2111.05297, ECCV 2022.

    x -> stem -> stage -> pool -> stage -> pool -> stage -> mean over the map -> LN -> head
    stem    [conv3x3/2 -> BN -> ReLU] three times, widths C1/2, C1, C1, then x + positions
    pool    conv3x3/2, every channel for itself, C to C' (a multiple of C)
    stage   B0 P0 B0 P1 B1 P2 B1 P3 …        B: one set of weights for its passes, P: one for each
    B       x = a x + b DropPath(Attn_g(LN x));   x = c x + d DropPath(MLP(LN x))
    P       x = e x + f MLP'(LN x)                                         non-linear projection
    Attn_g  softmax(q k^T / sqrt(d_h)) v within each of g groups of consecutive tokens, row by row;
            g = groups1 in the first pass of a block, groups2 in those behind

a to f are learned scalars that begin at 1. All norms have an eps of 1e-6.

Departures: where groups2 is not 1, the authors shuffle the tokens before they are cut, anew in each
call, also in evaluation. Here `permutation` says so: "none", the default, leaves them in their
order, as the released check values have it; "train" shuffles anew while training and by one settled
permutation in evaluation; "random" is the authors'. An exported graph has the settled permutation
in either. Groups that do not divide the tokens leave a smaller last one, so any size runs, with
positions resized. The authors tell passes by place, which is right for two passes per block alone;
`groups_by="place"` does so. Models of other numbers of passes (the paper's of over 100 layers) can
be built; the paper does not say their shapes. First weights are torch's, those of the head the
house's.

Expected at 224 (M parameters, GMACs): t 4.76, 1.11, without slices 1.37; lt 4.99, 1.16, 16_14_1
1.22, without 1.42; s 20.90, 4.17, without 4.67; at 384 18.5, at 512 42.8.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial, reduce
from itertools import pairwise
from typing import Any

import crosspatch._torchvision  # noqa: F401

from timm.models import generate_default_cfgs
from torch import Tensor, nn

from crosspatch.layers.patch_embed import pair
from crosspatch.layers.stage import one_a_stage
from crosspatch.layers.windows import counts
from crosspatch.models.pyramid import Pyramid, Stage
from crosspatch.models.registry import register, settings, unwrapped
from crosspatch.models.sret_blocks import (
    PERMUTATIONS,
    Block,
    Norm,
    Pool,
    Projection,
    Recursion,
    Stem,
    resize_positions,
)

GROUPINGS = ("pass", "place")


class SReT(Pyramid):
    """The network; argument names are the authors' or timm's.

    base_dims: width of a head in each stage, times `num_heads` that of the stage. depths: passes of
    each stage; recursive_num: its blocks, which divide them. groups1, groups2: slices of a block's
    first pass and of those behind; 1 is no slice. mlp_ratio, np_mlp_ratio: hidden widths of blocks
    and projections. learned_coefficients: False keeps the scalars of the residuals at 1.
    permutation: "none", "train" or "random". groups_by: "pass", or "place" for the authors' rule,
    where every second pass of a stage has groups2. stem_strides: of its three convolutions.
    drop_path_rate: grows with the passes; a block has the rate of its place among the first.
    img_size: what positions are learnt for, any size runs. Raises ValueError for shapes that do not
    agree.
    """

    channels_last = True

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        base_dims: Sequence[int] = (32, 32, 32),
        num_heads: Sequence[int] = (2, 4, 8),
        depths: Sequence[int] = (4, 10, 6),
        recursive_num: Sequence[int] = (2, 5, 3),
        groups1: Sequence[int] = (8, 4, 1),
        groups2: Sequence[int] = (2, 1, 1),
        mlp_ratio: float = 3.6,
        np_mlp_ratio: float = 1.0,
        learned_coefficients: bool = True,
        permutation: str = "none",
        groups_by: str = "pass",
        stem_strides: Sequence[int] = (2, 2, 2),
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        lists = (base_dims, num_heads, depths, recursive_num, groups1, groups2)
        _check(*lists, stem_strides, permutation, groups_by)
        widths = [base * heads for base, heads in zip(base_dims, num_heads, strict=True)]
        self.learned_coefficients = learned_coefficients
        grid = reduce(counts, stem_strides, pair(img_size))
        self.stem = Stem(in_chans, widths[0], stem_strides, grid)
        shared = {"learned": learned_coefficients, "proj_drop": proj_drop_rate}
        self.stages, previous = nn.ModuleList(), None
        for i, (dim, depth) in enumerate(zip(widths, depths, strict=True)):
            made = partial(Block, dim, num_heads[i], int(dim * mlp_ratio), permutation=permutation)
            project = partial(Projection, dim, int(dim * np_mlp_ratio), **shared)
            cut = _slices(groups1[i], groups2[i], depth, recursive_num[i], groups_by)
            recursions = []
            for number, slices in enumerate(cut):
                rate = drop_path_rate * (sum(depths[:i]) + number) / sum(depths)
                block = made(attn_drop=attn_drop_rate, drop_path=rate, **shared)
                recursions.append(Recursion(block, [project() for _ in slices], slices))
            self.stages.append(Stage(Pool(previous, dim) if previous else None, recursions))
            previous = dim
        self.norm_head = Norm(widths[-1])
        self.finish(
            widths,
            [math.prod(stem_strides) * 2**i for i in range(len(widths))],
            img_size=img_size,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
        )

    @classmethod
    def from_authors(cls, **build: Any) -> SReT:
        """The network of the authors' class for these arguments, or of their function `fn`.

        Its patch_size and stride are ignored, as theirs; passes are told by place. Raises
        ValueError for another function.
        """
        renamed = {_NAMES.get(name, name): value for name, value in build.items()}
        function = str(renamed.pop("fn", "SReT_T"))
        given = VARIANTS.get(function.lower())
        if given is None:
            raise ValueError(f"fn {function!r}; expected one of {', '.join(VARIANTS)}")
        kept = {name: value for name, value in renamed.items() if name not in _IGNORED}
        return cls(**{"groups_by": "place", **given, **kept})

    def no_weight_decay(self) -> set[str]:
        """Positions and the scalars of the residuals."""
        names = (name for name, _ in self.named_parameters())
        return {name for name in names if "coefficient" in name or name.endswith("pos_embed")}


_NAMES = {
    "image_size": "img_size", "depth": "depths", "heads": "num_heads",
    "drop_rate": "proj_drop_rate",
}  # fmt: skip
_IGNORED = ("patch_size", "stride", "pretrained")


def _slices(
    first: int, later: int, depth: int, blocks: int, groups_by: str
) -> list[list[tuple[int, bool]]]:
    """(groups, shuffled) of the passes of each block."""
    passes, cut = depth // blocks, []
    for block in range(blocks):
        places = range(block * passes, (block + 1) * passes)
        second = [n % 2 == 1 if groups_by == "place" else n > places[0] for n in places]
        cut.append([(later if is_later else first, is_later) for is_later in second])
    return cut


def _check(
    base_dims, num_heads, depths, recursive_num, groups1, groups2, strides, permutation, groups_by
) -> None:
    lists = {"recursive_num": recursive_num, "groups1": groups1, "groups2": groups2}
    one_a_stage(len(base_dims), num_heads=num_heads, depths=depths, **lists)
    if len(strides) != 3 or min(strides) < 1:
        raise ValueError(f"stem_strides {tuple(strides)}; the stem has three convolutions")
    if permutation not in PERMUTATIONS:
        raise ValueError(f"permutation {permutation!r}; expected one of {', '.join(PERMUTATIONS)}")
    if groups_by not in GROUPINGS:
        raise ValueError(f"groups_by {groups_by!r}; expected one of {', '.join(GROUPINGS)}")
    if min(*groups1, *groups2) < 1:
        raise ValueError(f"groups1 {tuple(groups1)}, groups2 {tuple(groups2)}; expected 1 or more")
    for depth, blocks in zip(depths, recursive_num, strict=True):
        if blocks < 1 or depth % blocks or depth < blocks:
            raise ValueError(f"depths {depth} of recursive_num {blocks}: blocks divide the passes")
    widths = [base * heads for base, heads in zip(base_dims, num_heads, strict=True)]
    for before, after in pairwise(widths):
        if after % before:
            raise ValueError(f"widths {widths}: each must be a multiple of the one before")


# ---------------------------------------------------------------------- released weights


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: SReT) -> dict[str, Tensor]:
    """A released state dict under the model's names, positions resized.

    Of the copies of a shared block the last one counts, as in the authors' loader; one is enough.
    Scalars of exactly 1 are left away where the model does not learn them.
    """
    stages: Any = model.stages
    passes = [len(stage.blocks[0].projections) for stage in stages]
    given = sorted(unwrapped(state_dict).items(), key=lambda item: _place(item[0]))
    state = {_renamed(name, passes): value for name, value in given}
    if not model.learned_coefficients:
        state = {n: v for n, v in state.items() if "coefficient" not in n or (v != 1).any()}
    table = state.get("stem.pos_embed")
    if table is not None and table.ndim == 4:
        stem: Any = model.stem
        state["stem.pos_embed"] = resize_positions(table, tuple(stem.pos_embed.shape[2:]))
    return state


def _place(name: str) -> int:
    found = re.match(r"transformers\.\d+\.blocks\.(\d+)\.", name)
    return int(found[1]) if found else -1


def _renamed(name: str, passes: Sequence[int]) -> str:
    """transformers.s.blocks.j holds blocks (even j, one for each pass) and projections (odd j)."""
    parts = name.split(".")
    if parts[0] in ("pos_embed", "patch_embed"):
        return ".".join(["stem", *parts[parts[0] == "patch_embed" :]])
    if parts[0] == "pools":
        return ".".join(["stages", str(int(parts[1]) + 1), "downsample", *parts[2:]])
    if parts[0] == "norm":
        return name.replace("norm", "norm_head", 1)
    if parts[0] != "transformers" or int(parts[1]) >= len(passes):
        return name
    stage, (turn, is_projection) = int(parts[1]), divmod(int(parts[3]), 2)
    block, number = divmod(turn, passes[stage])
    inside = f"projections.{number}" if is_projection else "block"
    rest = parts[4:-1] if parts[4].startswith("coefficient") else parts[4:]
    return ".".join(["stages", str(stage), "blocks", str(block), inside, *rest])


def _variants() -> Iterator[tuple[str, dict[str, Any]]]:
    whole = {"groups1": (1, 1, 1), "groups2": (1, 1, 1)}
    light = {"mlp_ratio": 4.0}
    small = {
        "base_dims": (42, 42, 42), "num_heads": (3, 6, 12), "mlp_ratio": 3.0, "np_mlp_ratio": 2.0,
    }  # fmt: skip
    for name, shape in {"sret_t": {}, "sret_lt": light, "sret_s": small}.items():
        yield name, shape
        yield f"{name}_wo_slice", {**shape, **whole}
    yield "sret_lt_16_14_1", {**light, "groups1": (16, 14, 1), "groups2": (1, 1, 1)}
    yield "sret_t_wo_slice_384", {**whole, "img_size": 384}
    for side in (384, 512):
        yield f"sret_s_wo_slice_{side}", {**small, **whole, "img_size": side}


VARIANTS = dict(_variants())
# ours, for small pictures: maps of 16x16, 8x8 and 4x4
SMALL: dict[str, dict[str, Any]] = {
    "sret_micro_32": {
        "img_size": 32, "base_dims": (20, 20, 20), "num_heads": (1, 2, 4), "depths": (2, 2, 4),
        "recursive_num": (1, 1, 2), "mlp_ratio": 2.0, "stem_strides": (2, 1, 1),
    }
}  # fmt: skip


def _settings(arguments: Mapping[str, Any]) -> Any:
    side = arguments.get("img_size", 224)
    last = side // (4 * math.prod(arguments.get("stem_strides", (2, 2, 2))))
    return settings(side, "stem.conv1", "head", pool_size=(last, last))


default_cfgs = generate_default_cfgs(
    {name: _settings(arguments) for name, arguments in (VARIANTS | SMALL).items()}
)
register(__name__, SReT, VARIANTS | SMALL, checkpoint_filter_fn, out_indices=(0, 1, 2))
