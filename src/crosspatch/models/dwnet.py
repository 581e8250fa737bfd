# SPDX-License-Identifier: Apache-2.0
"""DWNet: Swin with depthwise convolutions in the place of attention, static or predicted.

"Demystifying Local Vision Transformer: Sparse Connectivity, Weight Sharing, and Dynamic Weight",
Han et al., arXiv 2106.04263; as "On the Connection between Local Attention and Dynamic Depth-wise
Convolution", ICLR 2022.

    stem: X = LN(conv4x4/4(x)) [+ position table];   between stages: Linear(LN(cells of 2x2))
    block: X = X + DropPath(D(X));   X = X + DropPath(MLP(BN X))
    D(X) = BN(conv1x1(ReLU(BN(local(ReLU(BN(conv1x1 X)))))))       no norm before D, none of weights
    local, over 7x7 neighbours, zero outside:
      static         w_c of every channel, b_c                       (DWNet)
      dynamic        w_c = W2 ReLU(BN(W1 mean(X))) of every picture and channel, b_c      (D-DW)
      inhomogeneous  w_g(p) = W2 ReLU(BN(W1 X(p) + b1)) + b2 of every place p, shared by the
                     channels of a group g, no bias                  (I-D-DW)
    logits = head(mean(LN X))

The authors' classification code replaces the dynamic layer by the static one right after making it
(a second `if` where `elif` was meant), so `dynamic` alone builds DWNet. `original=True` does so
too. The dynamic weights that were released (51 and 162 M parameters) fit the corrected network
alone, which is the default here. There are no released weights for the inhomogeneous one.

Departures: any size of picture runs, sides that strides do not divide are padded with zeros at the
bottom and at the right; position tables, off in all variants, are resized. Kernels may be of any
odd size. A batch of one picture trains (`DynamicConv`). The authors call the channels that share an
inhomogeneous kernel heads (`inhomo_heads`); they make 32 groups everywhere, which is the default.

The authors train the inhomogeneous and the base networks without mixed precision.

Expected at 224 (M parameters, GMACs): tiny 24.17, 3.73, dynamic 51.13, 3.75, inhomogeneous 26.24,
4.30; base 74.35, 12.81, dynamic 161.6, 12.90, inhomogeneous 80.25, 14.19. Drop path of the paper:
tiny 0.2, base 0.5.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import crosspatch._torchvision  # noqa: F401

from timm.models import generate_default_cfgs
from torch import Tensor, nn

from crosspatch.layers.first_weights import init_linear
from crosspatch.layers.patch_embed import pair
from crosspatch.layers.position import Table, resize_tables
from crosspatch.layers.stage import drop_rates, one_a_stage
from crosspatch.layers.windows import PatchMerging, counts
from crosspatch.models.dwnet_blocks import DwBlock, Embed, LocalSpec
from crosspatch.models.pyramid import Pyramid, Stage
from crosspatch.models.registry import register, settings, unwrapped

GROUPS = 32  # of channels that share an inhomogeneous kernel
WITHOUT_EFFECT = ("num_heads", "qkv_bias", "qk_scale", "attn_drop_rate")  # arguments of Swin's


class DWNet(Pyramid):
    """The network; argument names are the authors', which are mostly Swin's.

    img_size: what it is described for (and the position table made for); any size is taken.
    window_size: side of the kernels. dynamic: kernels are predicted, for every place if
    `inhomogeneous`. inhomo_heads: channels per stage that share an inhomogeneous kernel, None for
    32 groups. original: see the head of this file. reduction_ratio: of the layer that predicts
    kernels. ape: a position table; patch_norm: the norm of the stem. drop_rate: before the head;
    proj_drop_rate: the authors' drop rate, in the stem and the MLPs. Raises ValueError for shapes
    that do not agree.
    """

    channels_last = True

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        window_size: int = 7,
        dynamic: bool = False,
        inhomogeneous: bool = False,
        inhomo_heads: Sequence[int] | None = None,
        original: bool = False,
        reduction_ratio: int = 4,
        mlp_ratio: float = 4.0,
        ape: bool = False,
        patch_norm: bool = True,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        kind = _kind(dynamic, inhomogeneous, original)
        widths = [embed_dim * 2**i for i in range(len(depths))]
        shared = _shared(widths, kind, inhomo_heads)
        _check(window_size, reduction_ratio, embed_dim)
        grid = counts(img_size, patch_size) if ape else None
        norm = nn.LayerNorm if patch_norm else nn.Identity
        self.stem = Embed(in_chans, embed_dim, pair(patch_size), grid, norm, proj_drop_rate)
        rates = drop_rates(drop_path_rate, depths)
        self.stages = nn.ModuleList()
        for i, (width, mine) in enumerate(zip(widths, rates, strict=True)):
            local = LocalSpec(kind, window_size, shared[i], reduction_ratio)
            blocks = [DwBlock(width, local, mlp_ratio, proj_drop_rate, rate) for rate in mine]
            self.stages.append(Stage(PatchMerging(widths[i - 1]) if i else None, blocks))
        self.norm = nn.LayerNorm(widths[-1])
        self.apply(init_linear)
        self.finish(
            widths,
            [patch_size * 2**i for i in range(len(depths))],
            img_size=img_size,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
        )

    @classmethod
    def from_authors(
        cls, *, drop_rate: float = 0.0, use_checkpoint: bool = False, **build: Any
    ) -> DWNet:
        """Built with the arguments of the authors' constructor, whose dropout is inside blocks.

        The corrected network; what Swin's constructor has and this network does not is ignored.
        """
        arguments = {name: value for name, value in build.items() if name not in WITHOUT_EFFECT}
        model = cls(proj_drop_rate=drop_rate, **arguments)
        model.set_grad_checkpointing(use_checkpoint)
        return model

    def no_weight_decay(self) -> set[str]:
        """The position table."""
        return {name for name, _ in self.named_parameters() if name == POSITIONS}


POSITIONS = "stem.absolute_pos_embed"


def _kind(dynamic: bool, inhomogeneous: bool, original: bool) -> str:
    if inhomogeneous and not dynamic:
        raise ValueError("inhomogeneous kernels are dynamic; expected dynamic=True with them")
    if inhomogeneous:
        return "inhomogeneous"
    return "dynamic" if dynamic and not original else "static"


def _shared(widths: Sequence[int], kind: str, given: Sequence[int] | None) -> list[int]:
    """Channels per stage that share an inhomogeneous kernel; 0 where there are none."""
    if kind != "inhomogeneous":
        return [0] * len(widths)
    shared = [width // GROUPS for width in widths] if given is None else list(given)
    one_a_stage(len(widths), inhomo_heads=shared)
    for width, channels in zip(widths, shared, strict=True):
        if channels < 1 or width % channels:
            raise ValueError(
                f"inhomo_heads {shared}: groups of {channels} channels do not divide a width of "
                f"{width}"
            )
    return shared


def _check(kernel: int, reduction: int, embed_dim: int) -> None:
    if kernel < 1 or kernel % 2 == 0:
        raise ValueError(f"window_size {kernel}; expected an odd number")
    if not 1 <= reduction <= embed_dim:
        raise ValueError(f"reduction_ratio {reduction}; expected 1 to the embed_dim {embed_dim}")


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: DWNet) -> dict[str, Tensor]:
    """A released state dict under the model's names: out of {"model": …}, the position table
    resized where it belongs to a square of another size."""
    state = {_renamed(name): value for name, value in unwrapped(state_dict).items()}
    stem = model.stem
    if isinstance(stem, Embed) and stem.grid is not None:
        return resize_tables(state, {POSITIONS: Table(stem.grid, 0)})
    return state


def _renamed(name: str) -> str:
    """The authors' merging ends a stage, ours begins the next."""
    if found := re.fullmatch(r"layers\.(\d+)\.downsample\.(.+)", name):
        return f"stages.{int(found[1]) + 1}.downsample.{found[2]}"
    name = re.sub(r"^layers\.", "stages.", name)
    return re.sub(r"^(?:patch_embed\.|(?=absolute_pos_embed$))", "stem.", name)


KINDS: dict[str, dict[str, Any]] = {
    "dwnet": {},
    "dynamic_dwnet": {"dynamic": True},
    "i_dynamic_dwnet": {"dynamic": True, "inhomogeneous": True},
}
VARIANTS: dict[str, dict[str, Any]] = {
    f"{kind}_{size}": {"embed_dim": width, "depths": (2, 2, depth, 2), **options}
    for kind, options in KINDS.items()
    for size, width, depth in (("tiny", 96, 6), ("base", 128, 18))
}
# Ours, for small pictures: maps of 16x16, 8x8 and 4x4.
SMALL: dict[str, dict[str, Any]] = {
    f"{kind}_micro_32": {
        "img_size": 32,
        "patch_size": 2,
        "embed_dim": 32,
        "depths": (1, 1, 2),
        **options,
    }
    for kind, options in KINDS.items()
}
SMALL["i_dynamic_dwnet_micro_32"]["inhomo_heads"] = (8, 16, 32)

default_cfgs = generate_default_cfgs(
    {name: settings(224, "stem.proj", "head", pool_size=(7, 7)) for name in VARIANTS}
    | {name: settings(32, "stem.proj", "head", pool_size=(4, 4)) for name in SMALL}
)
register(__name__, DWNet, VARIANTS, checkpoint_filter_fn, out_indices=(0, 1, 2, 3))
register(__name__, DWNet, SMALL, checkpoint_filter_fn, out_indices=(0, 1, 2))
