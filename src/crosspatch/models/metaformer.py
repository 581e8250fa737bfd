# SPDX-License-Identifier: Apache-2.0
"""MetaFormer: a transformer whose token mixer is left open; PoolFormer, where it is pooling.

"MetaFormer Is Actually What You Need for Vision", Yu, Luo, Zhou, Si, Zhou, Wang, Feng, Yan, arXiv
2111.11418, CVPR 2022.

    stem: conv7x7/4, padding 2               between stages: conv3x3/2; no norms there
    x = x + s1 * Mix(Norm x)                 `metaformer_blocks.py`
    x = x + s2 * conv1x1(GELU(conv1x1(Norm x)))
    logits = head(mean over pixels of Norm x)

    pooling: Mix x = mean over 3x3 - x       identity: Mix x = x       random: a frozen N x N matrix
    attention: heads of 32, q k v without bias       spatial_fc: one learnt N x N matrix
    depthwise: 3x3 filters, one per channel

Norm is over channels and pixels together (one group); with attention anywhere it is over channels,
everywhere, and a learnt map is added before the first stage of attention. s1, s2: a scale per
channel, at first 1e-5, or 1e-6 from 36 blocks on.

timm has poolformer_*, whose head pools before it norms: `xp.create_model` gives the authors'.
Departures: the learnt map is interpolated for other sizes; `reset_classifier` works.

Expected at 224 (M parameters, GMACs): poolformer s12 11.92, 1.81; s24 21.39, 3.39; s36 30.86, 4.97;
m36 56.17, 8.76; m48 73.47, 11.53; id_s12 11.92, 1.81; pppa_s12 14.04, 1.92; ppaa_s12 16.54, 2.55;
pppf_s12 11.92, 1.82; ppff_s12 12.15, 1.89.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import crosspatch._torchvision  # noqa: F401

from timm.models import generate_default_cfgs
from torch import Tensor, nn

from crosspatch.layers.first_weights import init_weights
from crosspatch.layers.patch_embed import pair
from crosspatch.layers.stage import drop_rates, each, one_a_stage
from crosspatch.models.metaformer_blocks import (
    ACTIVATIONS,
    MIXERS,
    NORMS,
    Block,
    DenseStage,
    PositionMap,
    Size,
    make_mixer,
    resize_map,
)
from crosspatch.models.pyramid import Pyramid, Stage
from crosspatch.models.registry import register, settings, unwrapped


class MetaFormer(Pyramid):
    """The network; argument names are the authors' or timm's.

    token_mixers: one of `MIXERS` for all stages, or one for each: pooling, identity, random,
    attention, spatial_fc, depthwise. norm_layer: group, layer, batch or none; by default layer
    where there is attention, else group. act_layer: gelu, relu or silu. pool_size: side of the
    pooling and of the depth-wise filters, odd. head_dim: width of a head of attention. add_pos_emb:
    whether a map is added before the first stage of attention. in_*: the stem's convolution;
    down_*: those between stages. layer_scale_init_value: None for no scales; 1e-1 or None learn
    faster where blocks and epochs are few. residual, mlp: False for the paper's ablations.
    fork_feat: the form for dense tasks, every stage with a norm of its own behind it (`norm0`,
    `norm2`, ... of the authors), the last of which stands for `norm` (the others learn from maps
    only), and no classifier unless `reset_classifier` asks for one.

    Any size of picture runs, but for spatial_fc and random, whose matrices belong to the maps of
    `img_size`. Raises ValueError for unknown parts and for shapes that do not agree.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        depths: Sequence[int] = (2, 2, 6, 2),
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        token_mixers: str | Sequence[str] = "pooling",
        mlp_ratios: float | Sequence[float] = 4.0,
        norm_layer: str | None = None,
        act_layer: str = "gelu",
        pool_size: int = 3,
        head_dim: int = 32,
        add_pos_emb: bool = True,
        in_patch_size: int = 7,
        in_stride: int = 4,
        in_pad: int = 2,
        down_patch_size: int = 3,
        down_stride: int = 2,
        down_pad: int = 1,
        layer_scale_init_value: float | None = 1e-5,
        residual: bool = True,
        mlp: bool = True,
        fork_feat: bool = False,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        count = len(depths)
        mixers, ratios = each(count, token_mixers=token_mixers, mlp_ratios=mlp_ratios)
        norm_layer = norm_layer or ("layer" if "attention" in mixers else "group")
        _check(depths, embed_dims, mixers, norm_layer, act_layer, pool_size)
        norm = NORMS[norm_layer]
        block = partial(
            Block,
            norm=norm,
            act=ACTIVATIONS[act_layer],
            layer_scale=layer_scale_init_value,
            residual=residual,
            mlp=mlp,
            drop=proj_drop_rate,
        )
        mixed = partial(
            make_mixer,
            pool_size=pool_size,
            head_dim=head_dim,
            attn_drop=attn_drop_rate,
            proj_drop=proj_drop_rate,
        )
        first = mixers.index("attention") if "attention" in mixers and add_pos_emb else None
        entry = (in_patch_size, in_stride, in_pad)
        between = (down_patch_size, down_stride, down_pad)
        rates = drop_rates(drop_path_rate, depths)

        self.stem, size = nn.Conv2d(in_chans, embed_dims[0], *entry), pair(img_size)
        self.stages = nn.ModuleList()
        for i, width in enumerate(embed_dims):
            size = _reduced(size, between if i else entry)
            blocks = [
                block(
                    width,
                    mixed(mixers[i], width, size=size),
                    mlp_ratio=ratios[i],
                    drop_path=rate,
                )
                for rate in rates[i]
            ]
            conv = nn.Conv2d(embed_dims[i - 1], width, *between) if i else None
            down = _entrance(conv, PositionMap(width, size) if i == first else None)
            self.stages.append(
                DenseStage(down, blocks, norm(width)) if fork_feat else Stage(down, blocks)
            )
        self.norm = nn.Identity() if fork_feat else norm(embed_dims[-1])
        self.finish(
            embed_dims,
            [in_stride * down_stride**i for i in range(count)],
            img_size=img_size,
            in_chans=in_chans,
            num_classes=0 if fork_feat else num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
        )
        self.stages.apply(_init)

    @classmethod
    def from_authors(cls, fn: str = "poolformer_s12", **build: Any) -> MetaFormer:
        """The network of the authors' entry point `fn`, with arguments of their constructor.

        Where theirs is a class (norm_layer, act_layer, token_mixers), a name stands for it.
        """
        given = {"depths" if name == "layers" else name: value for name, value in build.items()}
        if not given.pop("use_layer_scale", True):
            given["layer_scale_init_value"] = None
        return cls(**{**VARIANTS[fn], **given})

    def to_map(self, x: Any) -> Tensor:
        """The map of a stage, normed in the form for dense tasks."""
        return x[1] if isinstance(x, tuple) else x

    def no_weight_decay(self) -> set[str]:
        """The map of positions."""
        return {name for name, _ in self.named_parameters() if name.endswith("pos_embed")}


def _entrance(conv: nn.Module | None, pos: nn.Module | None) -> nn.Module | None:
    """What lies before the blocks of a stage."""
    parts = {"proj": conv, "pos": pos}
    found = OrderedDict((name, part) for name, part in parts.items() if part is not None)
    return nn.Sequential(found) if found else None


def _check(depths, embed_dims, mixers, norm_layer, act_layer, pool_size) -> None:
    one_a_stage(len(depths), embed_dims=embed_dims)
    for name, value, known in (
        *(("token_mixers", mixer, MIXERS) for mixer in mixers),
        ("norm_layer", norm_layer, NORMS),
        ("act_layer", act_layer, ACTIVATIONS),
    ):
        if value not in known:
            raise ValueError(f"{name} {value!r}; expected one of {', '.join(known)}")
    if pool_size % 2 == 0:
        raise ValueError(f"pool_size {pool_size}; expected an odd one")


def _reduced(size: Size, conv: tuple[int, int, int]) -> Size:
    """The map that a convolution (kernel, stride, padding) makes of one of `size`."""
    kernel, stride, pad = conv
    height, width = ((side + 2 * pad - kernel) // stride + 1 for side in size)
    if min(height, width) < 1:
        raise ValueError(
            f"img_size leaves a map of {size[0]}x{size[1]} to a {kernel}x{kernel} kernel"
        )
    return height, width


def _init(module: nn.Module) -> None:
    """1x1 convolutions and linear layers: truncated normal, biases zero; others as in torch."""
    if isinstance(module, nn.Linear) or getattr(module, "kernel_size", None) == (1, 1):
        init_weights(module)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: MetaFormer) -> dict[str, Tensor]:
    """A released state dict under the model's names: the authors', timm's of poolformer_*, or a
    detector's, of which the backbone is taken; the map of positions resized to the model's."""
    state = unwrapped(state_dict)
    names = _names(state)
    state = {names(name): value for name, value in state.items()}
    for name, module in model.named_modules():
        key = f"{name}.pos_embed"
        if isinstance(module, PositionMap) and key in state and state[key].ndim == 4:
            state[key] = resize_map(state[key], module.size)
    return state


def _names(state: Mapping[str, Any]) -> Callable[[str], str]:
    """Names of a released state dict -> those of the model.

    The authors number stages, convolutions and positions in one list: stages are those entries that
    hold blocks, and what lies before one belongs to it.
    """
    block = re.compile(r"^network\.(\d+)\.\d+\.")
    stages = sorted({int(found[1]) for found in map(block.match, state) if found})
    dense = sorted(int(found[1]) for n in state if (found := re.match(r"^norm(\d+)\.weight", n)))

    def renamed(name: str) -> str:
        if found := re.match(r"^network\.(\d+)\.(.*)", name):
            place, rest = int(found[1]), found[2]
            number = sum(stage < place for stage in stages)
            if place in stages:
                name = f"stages.{number}.blocks.{rest}"
            else:
                name = f"stages.{number}.downsample.{'pos.' * (rest == 'pos_embed')}{rest}"
        elif found := re.match(r"^norm(\d+)\.(.*)", name):
            name = f"stages.{dense.index(int(found[1]))}.norm.{found[2]}"
        name = re.sub(r"\.layer_scale_(\d)$", r".ls\1.gamma", name)
        name = re.sub(r"\.layer_scale(\d)\.scale$", r".ls\1.gamma", name)
        name = re.sub(r"^(patch_embed\.proj|stem\.conv)\.", "stem.", name)
        name = re.sub(r"\.downsample\.conv\.", ".downsample.proj.", name)
        return re.sub(r"^head\.(norm\.|fc\.)", lambda m: {"fc.": "head."}.get(m[1], m[1]), name)

    return renamed


LETTERS = {"p": "pooling", "a": "attention", "f": "spatial_fc", "i": "identity"}
SMALL_DIMS, MEDIUM_DIMS = (64, 128, 320, 512), (96, 192, 384, 768)


def _pools(depth: int, dims: Sequence[int]) -> dict[str, Any]:
    """PoolFormer of `depth` blocks, a sixth in each stage and a half in the third."""
    return {
        "depths": tuple(depth * share // 6 for share in (1, 1, 3, 1)),
        "embed_dims": dims,
        "layer_scale_init_value": 1e-5 if depth < 36 else 1e-6,
    }


POOLFORMERS = {
    "poolformer_s12": _pools(12, SMALL_DIMS),
    "poolformer_s24": _pools(24, SMALL_DIMS),
    "poolformer_s36": _pools(36, SMALL_DIMS),
    "poolformer_m36": _pools(36, MEDIUM_DIMS),
    "poolformer_m48": _pools(48, MEDIUM_DIMS),
}
# the paper's names, and the authors' entry points, which say the size too
HYBRIDS = {
    f"metaformer_{letters}_s12{size}": {"token_mixers": tuple(LETTERS[one] for one in letters)}
    for letters in ("pppa", "ppaa", "pppf", "ppff")
    for size in ("", "_224")
}
METAFORMERS = {"metaformer_id_s12": {"token_mixers": "identity"}, **HYBRIDS}
VARIANTS: dict[str, dict[str, Any]] = {**POOLFORMERS, **METAFORMERS}
# Ours, for small pictures: pooling on maps of 16, 8 and 4 pixels a side.
SMALL: dict[str, dict[str, Any]] = {
    "metaformer_micro_32": {
        "img_size": 32,
        "depths": (3, 3, 3),
        "embed_dims": (24, 48, 96),
        "in_patch_size": 3,
        "in_stride": 2,
        "in_pad": 1,
        "layer_scale_init_value": 0.1,
    }
}


def _settings(name: str) -> Any:
    if name in SMALL:
        return settings(32, "stem", "head", pool_size=(4, 4))
    wide = any(letters in name for letters in ("pppa", "ppaa", "ppff"))
    return settings(224, "stem", "head", pool_size=(7, 7), crop_pct=0.95 if wide else 0.9)


default_cfgs = generate_default_cfgs({name: _settings(name) for name in METAFORMERS | SMALL})
register(
    __name__,
    MetaFormer,
    POOLFORMERS,
    checkpoint_filter_fn,
    out_indices=(0, 1, 2, 3),
    overlay={"first_conv": "stem", "classifier": "head"},
)
register(__name__, MetaFormer, METAFORMERS, checkpoint_filter_fn, out_indices=(0, 1, 2, 3))
register(__name__, MetaFormer, SMALL, checkpoint_filter_fn, out_indices=(0, 1, 2))
