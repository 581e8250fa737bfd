# SPDX-License-Identifier: Apache-2.0
"""SMT: convolutions of several kernels modulate the values where maps are large, attention where
they are small.

"Scale-Aware Modulation Meet Transformer", Lin et al., arXiv 2307.08579, ICCV 2023.

    x -> stem -> SAM blocks -> conv3 -> SAM blocks -> conv3 -> SAM and attention blocks in turn
      -> conv3 -> attention blocks -> mean -> head;   conv3 of stride 2, a LN after each stage
    stem = LN(conv2(ReLU(BN(conv3(x))))), both of stride 2
    block:  x = x + DropPath(g1 * Mixer(LN x));  x = x + DropPath(g2 * FFN(LN x))
    FFN(x) = Linear(GELU(h + depthwise3x3(h))), h = Linear(x)
    SAM(x) = Linear(m * Linear_v(x)), scale-aware modulation
      s = Linear_s(x), cut into n heads; head i through a depthwise convolution of 3 + 2 i
                                                                multi-head mixed convolution
      m = conv1(GELU(BN(conv1(shuffle(s)))))                    scale-aware aggregation
      shuffle puts channel j of every head side by side, and the first conv1 sees those alone
    Attention(x) = Linear(softmax(q k^T / sqrt d) v + depthwise3x3(v)), over the whole map

No position table anywhere, so any size runs. The norms after the stem and the convolutions between
stages have an epsilon of 1e-5, all others one of 1e-6. g1 and g2 are 1 without layer scale.

Departures: the modulator is not kept for pictures of it. A released file with layer scales loads
into a model without, the scales multiplied into the layer before them. S is built as the authors'
code builds it, 22.6 M, where their table says 21 M; a file of other depths is refused with its own.

Expected (M parameters, GMACs at 224): t 11.51, 2.46; s 22.55, 4.84; b 32.04, 7.97; l 80.59, 17.91.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import crosspatch._torchvision  # noqa: F401

from timm.models import generate_default_cfgs
from torch import Tensor, nn

from crosspatch.errors import DataError
from crosspatch.layers.first_weights import init_fan_out
from crosspatch.layers.maps import Downsample
from crosspatch.layers.stage import drop_rates, one_a_stage
from crosspatch.models.pyramid import NormedStage, Pyramid
from crosspatch.models.registry import register, settings, unwrapped
from crosspatch.models.smt_blocks import (
    Attention,
    Block,
    ConvMlp,
    Norm,
    ScaleAwareModulation,
    Stem,
)

MIXERS = ("sam", "alternate", "attention")
PATCHES = (2, 4)


class SMT(Pyramid):
    """The network; argument names are timm's or the authors'.

    mixers: of the blocks of each stage, "sam", "attention" or "alternate", which begins with SAM.
    ca_num_heads: heads of SAM, sa_num_heads: of attention, where the stage has such. head_conv: the
    stem's first kernel; patch_size: its stride, 2 or 4. expand_ratio: of SAM. layer_scale: first
    value of g1 and g2, None for none (the authors train L with 1e-4). img_size: what it is
    described for, any size is taken. Raises ValueError for shapes that do not agree.
    """

    channels_last = True

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 2, 8, 1),
        mixers: Sequence[str] = ("sam", "sam", "alternate", "attention"),
        ca_num_heads: Sequence[int] = (4, 4, 4, -1),
        sa_num_heads: Sequence[int] = (-1, -1, 8, 16),
        mlp_ratios: Sequence[float] = (4, 4, 4, 2),
        qkv_bias: bool = True,
        head_conv: int = 3,
        patch_size: int = 4,
        expand_ratio: int = 2,
        layer_scale: float | None = None,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        _check(embed_dims, depths, mixers, ca_num_heads, sa_num_heads, mlp_ratios)
        if patch_size not in PATCHES:
            raise ValueError(f"patch_size {patch_size}; the stem takes 2 or 4")
        rates = drop_rates(drop_path_rate, depths)
        shared = {"qkv_bias": qkv_bias, "proj_drop": proj_drop_rate}
        self.stem = Stem(in_chans, embed_dims[0], head_conv, patch_size)
        stages = []
        for i, (dim, mine) in enumerate(zip(embed_dims, rates, strict=True)):
            sam = partial(ScaleAwareModulation, dim, ca_num_heads[i], expand_ratio, **shared)
            attention = partial(Attention, dim, sa_num_heads[i], attn_drop=attn_drop_rate, **shared)
            blocks = []
            for b, rate in enumerate(mine):
                mixer = sam() if _is_sam(mixers[i], b) else attention()
                mlp = ConvMlp(dim, int(dim * mlp_ratios[i]), proj_drop_rate)
                blocks.append(Block(dim, mixer, mlp, rate, layer_scale))
            downsample = Downsample(embed_dims[i - 1], dim) if i else None
            stages.append(NormedStage(downsample, blocks, Norm(dim)))
        self.stages = nn.ModuleList(stages)
        self.finish(
            embed_dims,
            [patch_size * 2**i for i in range(len(depths))],
            img_size=img_size,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
        )
        self.apply(init_fan_out)

    @classmethod
    def from_authors(cls, **build: Any) -> SMT:
        """The network of the authors' class for these arguments; without widths that of their
        function for T. Their class alone has ratios of 8, 6, 4 and 2 and no bias in the products.

        `ca_attentions` says where SAM stands: 1 or 0 per stage, in turn with attention in the
        third.
        """
        if "embed_dims" in build:
            build = {"mlp_ratios": (8, 6, 4, 2), "qkv_bias": False, **build}
        if "ca_attentions" in build:
            build["mixers"] = [
                ("alternate" if i == 2 else "sam") if sam else "attention"
                for i, sam in enumerate(build.pop("ca_attentions"))
            ]
        value = build.pop("layerscale_value", 1e-4)
        if build.pop("use_layerscale", False):
            build["layer_scale"] = value
        if "drop_rate" in build:
            build["proj_drop_rate"] = build.pop("drop_rate")
        return cls(**build)


def _is_sam(mixer: str, number: int) -> bool:
    return mixer == "sam" or (mixer == "alternate" and number % 2 == 0)


def _check(embed_dims, depths, mixers, ca_num_heads, sa_num_heads, mlp_ratios) -> None:
    heads = {"ca_num_heads": ca_num_heads, "sa_num_heads": sa_num_heads}
    lists = {"embed_dims": embed_dims, "mixers": mixers, "mlp_ratios": mlp_ratios}
    one_a_stage(len(depths), **lists, **heads)
    if not set(mixers) <= set(MIXERS):
        raise ValueError(f"mixers {tuple(mixers)}; expected one of {', '.join(MIXERS)} per stage")
    for i, dim in enumerate(embed_dims):
        asked = [ca_num_heads[i]] * (mixers[i] != "attention")
        asked += [sa_num_heads[i]] * (mixers[i] != "sam")
        for heads in asked:
            if heads < 1 or dim % heads:
                raise ValueError(f"stage {i}: a width of {dim} must divide by {heads} heads")


# ---------------------------------------------------------------------- released weights

PLACES = {"patch_embed": "downsample", "block": "blocks", "norm": "norm"}


def depths_of(state: Mapping[str, Any]) -> tuple[int, ...]:
    """The blocks of each stage that a state dict in the authors' layout holds."""
    places = {tuple(name.split(".")[:2]) for name in state if name.startswith("block")}
    stages = sorted({stage for stage, _ in places})
    return tuple(1 + max(int(b) for s, b in places if s == stage) for stage in stages)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: SMT) -> dict[str, Tensor]:
    """A released state dict under the model's names, with or without layer scales as the model is.

    Raises DataError for one of other depths.
    """
    state = unwrapped(state_dict)
    stages: Any = model.stages
    mine, theirs = tuple(len(stage.blocks) for stage in stages), depths_of(state)
    if theirs and theirs != mine:
        raise DataError(
            f"the weights have depths {theirs}, {type(model).__name__} has {mine}",
            "the same number of blocks in every stage",
            f"build the model with depths={theirs}",
        )
    state = {_renamed(name): value for name, value in state.items()}
    if any(name.endswith("gamma_1") for name in model.state_dict()):
        return state
    return _folded(state)


def _renamed(name: str) -> str:
    """patch_embed1 is the stem; other patch_embedK, blockK and normK belong to stage K - 1."""
    head, _, rest = name.partition(".")
    kind = head.rstrip("0123456789")
    if head == "patch_embed1":
        return f"stem.{rest}"
    if kind == head or kind not in PLACES:
        return name
    rest = rest.replace("dwconv.dwconv", "dwconv")
    return f"stages.{int(head.removeprefix(kind)) - 1}.{PLACES[kind]}.{rest}"


def _folded(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Layer scales multiplied into the linear layer whose output they scale."""
    last = {"gamma_1": "attn.proj", "gamma_2": "mlp.fc2"}
    for name in [n for n in state if n.endswith(tuple(last))]:
        block, _, kind = name.rpartition(".")
        scale, layer = state.pop(name), f"{block}.{last[kind]}"
        state[f"{layer}.weight"] = scale[:, None] * state[f"{layer}.weight"]
        state[f"{layer}.bias"] = scale * state[f"{layer}.bias"]
    return state


WIDE = {"mlp_ratios": (8, 6, 4, 2), "head_conv": 7}
VARIANTS: dict[str, dict[str, Any]] = {
    "smt_t": {"depths": (2, 2, 8, 1)},
    "smt_s": {"depths": (3, 4, 18, 2)},
    "smt_b": {"depths": (4, 6, 28, 2), **WIDE},
    "smt_l": {"depths": (4, 6, 28, 4), "embed_dims": (96, 192, 384, 768), **WIDE},
}
# Ours, for small pictures: maps of 16, 8 and 4, one stage of each kind.
SMALL: dict[str, dict[str, Any]] = {
    "smt_micro_32": {
        "img_size": 32,
        "patch_size": 2,
        "embed_dims": (24, 48, 96),
        "depths": (1, 2, 1),
        "mixers": ("sam", "alternate", "attention"),
        "ca_num_heads": (4, 4, -1),
        "sa_num_heads": (-1, 4, 8),
        "mlp_ratios": (4, 4, 2),
    }
}
default_cfgs = generate_default_cfgs(
    {name: settings(224, "stem.conv.0", "head", pool_size=(7, 7)) for name in VARIANTS}
    | {name: settings(32, "stem.conv.0", "head", pool_size=(4, 4)) for name in SMALL}
)
register(__name__, SMT, VARIANTS, checkpoint_filter_fn, out_indices=(0, 1, 2, 3))
register(__name__, SMT, SMALL, checkpoint_filter_fn, out_indices=(0, 1, 2))
