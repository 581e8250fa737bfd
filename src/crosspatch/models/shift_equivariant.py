# SPDX-License-Identifier: Apache-2.0
"""PolyViT, PolyTwins and PolySwin: transformers that circular shifts of the picture do not disturb.

"Reviving Shift Equivariance in Vision Transformers", Ding et al., arXiv 2306.07470, 2023.

    PolyOrder(x, s), per sample:  (p, q) = arg max over 0 <= i, j < s of ||x[:, i::s, j::s]||
                                  y[h, w] = x[(h + p) mod H, (w + q) mod W]
    PolyViT    t = LN(conv PxP/P (PolyOrder(x, P)));  t = t + DWConv3x3(t)   borders joined, PEG
               z0 = [class; t], no table of positions; the rest is a ViT
    PolyTwins  stage: LN(conv k x k / k), k = 4 2 2 2, then blocks LSA, GSA by turns; PEG behind the
               first one; before the first convolution PolyOrder(x, 4)
        LSA    x = PolyOrder(x, 7);  x = x + attention in windows of 7x7 (LN x)
        GSA    x = PolyOrder(x, r);  x = x + attention(LN x, LN(conv r x r / r (LN x))), r = 8 4 2 1
               both: x = x + MLP(LN x)
        logits = head(mean(LN x))
    PolySwin   windows as in Swin, PolyOrder before each, no mask; between stages PolyOrder(x, 2),
               conv 2x2/2; x = x + LN(MLP x)

PolyOrder stands on the residual stream and is never undone: the maps inside come out rolled, logits
do not depend on it. A CIRCULAR shift of the picture, by any number of pixels, leaves the logits as
they are, up to rounding: of two phases whose energies agree to seven digits the other may be chosen
(in half precision, to three digits, which is no longer rare). Real translations bring new pixels in
at the border: they are not covered, nor is anything that pads, crops or resizes in between.

Sizes: what every grid divides alone keeps that law. Sides must be multiples of `unit` (32 for
PolyTwins; the patch for PolyViT); others raise ValueError. Windows that do not divide a map are
changed to the divisor nearest in ratio, which is the paper's 7 at 224. For PolySwin that happens
at construction, for `img_size`, as its tables belong to a window.

Departures: maps need not be square; energies are summed in float32 and over positions in float64; a
convolution between stages is anchored where the stage before it does not end with an r that it
divides. First weights of the norms before anchors spread by 0.1 around 1: with ones every token has
the same norm, and a new network would choose phases by rounding. The paper's forward-only mode that
also moves the strongest patch to the corner is not here. PolySwin is a reading: the sheet has no
more of it than the lines above, and no vectors.

Expected at 224 (M parameters, GMACs): polyvit tiny 5.68, 1.17; small 21.98, 4.28; base 86.43, 16.35
(the last block computes its class token alone). polytwins small 24.06, 2.93; base 56.07, 8.56;
large 99.27, 15.11. polyswin tiny 28.29, 4.49; small 49.60, 8.74; base 87.77, 15.43.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import crosspatch._torchvision  # noqa: F401

from timm.layers import trunc_normal_
from timm.models import generate_default_cfgs
from torch import Tensor, nn

from crosspatch.layers.first_weights import init_linear
from crosspatch.layers.patch_embed import pair
from crosspatch.layers.stage import drop_rates, one_a_stage
from crosspatch.layers.windows import Size
from crosspatch.models.pyramid import Pyramid, Stage
from crosspatch.models.registry import register, settings, unwrapped
from crosspatch.models.shift_equivariant_blocks import (
    AnchoredEmbed,
    CircularPosition,
    LocalAttention,
    PolyOrder,
    PolySwinBlock,
    SubsampledAttention,
    TwinsBlock,
    fitting_window,
)
from crosspatch.models.vit import VisionTransformer

__all__ = ["PolyOrder", "PolySwin", "PolyTwins", "PolyViT", "checkpoint_filter_fn"]
LayerNorm = partial(nn.LayerNorm, eps=1e-6)
SPREAD = 0.1  # of the first weights of embeddings' norms
FIXED = ("pos_embed", "no_embed_class", "stem", "dynamic_img_size")  # of the trunk, for PolyViT


# ---------------------------------------------------------------------- PolyViT


class AnchoredPatches(nn.Module):
    """Images (B, C, H, W) to tokens (B, h * w, dim) with their positions. Raises ValueError where
    patches do not divide the picture."""

    def __init__(self, in_chans: int, dim: int, patch_size: Size) -> None:
        super().__init__()
        embed = AnchoredEmbed(in_chans, dim, patch_size)
        self.order, self.proj, self.norm = PolyOrder(patch_size), embed.proj, embed.norm
        self.peg = CircularPosition(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.proj(self.order(x)).permute(0, 2, 3, 1))
        return self.peg(x).flatten(1, 2)


class PolyViT(VisionTransformer):
    """The trunk with anchored patches and circular positions; arguments are the trunk's.

    img_size: what it is described for, rounded up to multiples of the patch; pictures of any such
    size run, others raise ValueError. Raises ValueError for the arguments that choose positions or
    the stem.
    """

    def __init__(self, img_size: int | tuple[int, int] = 224, *arguments: Any, **trunk: Any):
        if chosen := sorted(set(FIXED) & set(trunk)):
            raise ValueError(f"{', '.join(chosen)}: PolyViT's own cannot be chosen")
        patch = pair(arguments[0] if arguments else trunk.get("patch_size", 16))
        fixed = {"pos_embed": "none", "stem": AnchoredPatches, "dynamic_img_size": True}
        super().__init__(_rounded(pair(img_size), patch), *arguments, **trunk, **fixed)

    @classmethod
    def from_authors(cls, /, **build: Any) -> PolyViT:
        """Built from the arguments of the authors' constructor: `model_type`, a ViT's name in timm,
        and timm's arguments. Raises ValueError for another name."""
        build = dict(build)
        name = build.pop("model_type", "vit_tiny_patch16_224")
        build.pop("cls", None)
        found = re.match(r"^vit_(tiny|small|base|large)_patch(\d+)_(\d+)", name)
        if found is None:
            raise ValueError(f"model_type {name!r}; expected such as vit_tiny_patch16_224")
        shape = {"patch_size": int(found[2]), "img_size": int(found[3])} | VITS[found[1]]
        return cls(**(shape | _known(build)))

    def _check_size(self, x: Tensor) -> Size:
        _check_size((x.shape[2], x.shape[3]), self.patch_size)
        return super()._check_size(x)


# ---------------------------------------------------------------------- PolyTwins and PolySwin


class _Poly(Pyramid):
    """Stages of anchored blocks; `unit`: what the sides of a picture must be multiples of."""

    channels_last = True
    unit: Size

    def _finish(self, stages: Sequence[Stage], widths: Sequence[int], patch: int, **told: Any):
        self.stages = nn.ModuleList(stages)
        self.norm = LayerNorm(widths[-1])
        self.apply(init_linear)
        self.apply(_spread)
        self.finish(widths, [patch * 2**i for i in range(len(widths))], **told)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) to the normalised map of the last stage, (B, h, w, C), rolled as the
        anchors say. Raises ValueError for sides that are no multiples of `unit`."""
        return super().forward_features(self._entered(x))

    def forward_intermediates(self, x: Tensor, *arguments: Any, **options: Any) -> Any:
        """As in the base; every map is rolled as the anchors before it say."""
        return super().forward_intermediates(self._entered(x), *arguments, **options)

    def _entered(self, x: Tensor) -> Tensor:
        _check_size((x.shape[2], x.shape[3]), self.unit)
        return x.permute(0, 2, 3, 1)


class PolyTwins(_Poly):
    """The network; argument names are timm's.

    img_size: what it is described for, rounded up to multiples of `unit`; pictures of any such size
    run. window_size, sr_ratios: of LSA and, by stage, of GSA. Raises ValueError for lists that do
    not agree and widths that heads do not divide.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 2, 10, 4),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        lists = {"embed_dims": embed_dims, "num_heads": num_heads, "sr_ratios": sr_ratios}
        one_a_stage(len(depths), **lists)
        side = math.lcm(*(patch_size * 2**i * r for i, r in enumerate(sr_ratios)))
        self.unit = pair(math.lcm(side, patch_size * 2 ** (len(depths) - 1)))
        self.stem = AnchoredEmbed(in_chans, embed_dims[0], patch_size)
        options = {"qkv_bias": qkv_bias, "attn_drop": attn_drop_rate, "proj_drop": proj_drop_rate}
        block = partial(TwinsBlock, mlp_ratio=mlp_ratio, norm=LayerNorm, proj_drop=proj_drop_rate)
        stages, down = [], None
        for i, rates in enumerate(drop_rates(drop_path_rate, depths)):
            dim, heads, r = embed_dims[i], num_heads[i], sr_ratios[i]
            blocks = []
            for number, rate in enumerate(rates):
                if number % 2:
                    attention: Any = SubsampledAttention(dim, heads, r, **options)
                else:
                    attention = LocalAttention(dim, heads, window_size, **options)
                blocks.append(block(dim, attention, positions=number == 0, drop_path=rate))
            stages.append(Stage(down, blocks))
            if i + 1 < len(depths):
                settled = len(rates) % 2 == 0 and r % 2 == 0
                down = AnchoredEmbed(dim, embed_dims[i + 1], 2, anchors=not settled)
        self._finish(
            stages,
            embed_dims,
            patch_size,
            img_size=_rounded(pair(img_size), self.unit),
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
        )

    @classmethod
    def from_authors(cls, /, **build: Any) -> PolyTwins:
        """Built from the arguments of the authors' constructor: `model_type`, a Twins-SVT's name in
        timm, and timm's arguments. Raises ValueError for another name."""
        build = dict(build)
        name = build.pop("model_type", "twins_svt_small")
        build.pop("cls", None)
        size = name.removeprefix("twins_svt_")
        if size not in TWINS:
            raise ValueError(f"model_type {name!r}; expected twins_svt_ with {', '.join(TWINS)}")
        return cls(**(TWINS[size] | _known(build)))


class PolySwin(_Poly):
    """The network, a reading of few lines; argument names are timm's.

    img_size: what windows are fitted to, rounded up to what the strides divide; pictures whose
    sides are multiples of `unit` run. Raises ValueError for lists that do not agree and widths that
    heads do not divide.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        one_a_stage(len(depths), num_heads=num_heads)
        widths = [embed_dim * 2**i for i in range(len(depths))]
        strides = [patch_size * 2**i for i in range(len(depths))]
        size = _rounded(pair(img_size), pair(strides[-1]))
        windows = [fitting_window(window_size, (size[0] // s, size[1] // s)) for s in strides]
        units = [(s * h, s * w) for s, (h, w) in zip(strides, windows, strict=True)]
        rows, columns = (math.lcm(*axis) for axis in zip(*units, strict=True))
        self.unit = (rows, columns)
        self.stem = AnchoredEmbed(in_chans, embed_dim, patch_size)
        block = partial(
            PolySwinBlock,
            mlp_ratio=mlp_ratio,
            norm=LayerNorm,
            qkv_bias=qkv_bias,
            attn_drop=attn_drop_rate,
            proj_drop=proj_drop_rate,
        )
        stages = []
        for i, rates in enumerate(drop_rates(drop_path_rate, depths)):
            down = AnchoredEmbed(widths[i - 1], widths[i], 2) if i else None
            made = [
                block(widths[i], num_heads[i], windows[i], number % 2 == 1, drop_path=rate)
                for number, rate in enumerate(rates)
            ]
            stages.append(Stage(down, made))
        self._finish(
            stages,
            widths,
            patch_size,
            img_size=size,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
        )


# ---------------------------------------------------------------------- shapes


def _spread(module: nn.Module) -> None:
    """First weights of the norms before anchors: with ones all tokens would be of equal norm, and
    rounding would choose among the phases."""
    if isinstance(module, AnchoredEmbed) and not module.norm.weight.is_meta:
        trunc_normal_(module.norm.weight, mean=1.0, std=SPREAD)


def _rounded(size: Size, unit: Size) -> Size:
    rows, columns = (-(-side // step) * step for side, step in zip(size, unit, strict=True))
    return rows, columns


def _check_size(size: Size, unit: Size) -> None:
    fits = _rounded(size, unit)
    if fits != size:
        raise ValueError(
            f"an image of {size[0]}x{size[1]}; circular shifts can be undone only where sides are "
            f"multiples of {unit[0]}x{unit[1]}, such as {fits[0]}x{fits[1]}: build it with "
            f"img_size={fits} and resize pictures to that"
        )


def _known(build: Mapping[str, Any]) -> dict[str, Any]:
    """The authors' arguments but those that say where things run."""
    return {name: value for name, value in build.items() if name not in ("pretrained", "use_gpu")}


# ---------------------------------------------------------------------- weights and names


def checkpoint_filter_fn(
    state_dict: Mapping[str, Any], model: PolyViT | PolyTwins | PolySwin
) -> dict[str, Tensor]:
    """A released state dict of PolyViT or PolyTwins, or timm's of Twins, under the model's names:
    bare or in {"model": …} or {"state_dict": …}."""
    state = unwrapped(state_dict)
    if isinstance(model, PolyViT):
        return {
            re.sub(r"^pos_conv\.proj\.(0\.)?", "patch_embed.peg.proj.", name): value
            for name, value in state.items()
        }
    return {_renamed(name): value for name, value in state.items()}


def _renamed(name: str) -> str:
    name = re.sub(r"^patch_embeds\.0\.", "stem.", name)
    name = re.sub(r"^patch_embeds\.(\d+)\.", r"stages.\1.downsample.", name)
    name = re.sub(r"^blocks\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2.", name)
    return re.sub(r"^pos_block\.(\d+)\.proj\.0\.", r"stages.\1.blocks.0.peg.proj.", name)


VITS: dict[str, dict[str, Any]] = {
    "tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
}
TWINS: dict[str, dict[str, Any]] = {
    "small": {},
    "base": {
        "embed_dims": (96, 192, 384, 768), "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24)
    },
    "large": {
        "embed_dims": (128, 256, 512, 1024), "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)
    },
}  # fmt: skip
VARIANTS = {
    PolyViT: {
        f"polyvit_{size}_patch16_224": VITS[size] | {"patch_size": 16}
        for size in ("tiny", "small", "base")
    },
    PolyTwins: {f"polytwins_svt_{size}": arguments for size, arguments in TWINS.items()},
    PolySwin: {
        "polyswin_tiny": {},
        "polyswin_small": {"depths": (2, 2, 18, 2)},
        "polyswin_base": {
            "embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)
        },
    },
}  # fmt: skip
# ours, for small pictures
SMALL = {
    PolyViT: {
        "polyvit_micro_32": {
            "img_size": 32, "patch_size": 4, "embed_dim": 64, "depth": 4, "num_heads": 2,
        }
    },
    PolyTwins: {
        "polytwins_micro_32": {
            "img_size": 32, "patch_size": 2, "embed_dims": (32, 64, 96), "depths": (2, 2, 2),
            "num_heads": (2, 4, 6), "sr_ratios": (4, 2, 1), "window_size": 4, "mlp_ratio": 2.0,
        }
    },
    PolySwin: {
        "polyswin_micro_32": {
            "img_size": 32, "patch_size": 2, "embed_dim": 32, "depths": (2, 2, 1),
            "num_heads": (2, 4, 8), "window_size": 4, "mlp_ratio": 2.0,
        }
    },
}  # fmt: skip


def _settings(model: type[nn.Module], arguments: Mapping[str, Any]) -> Any:
    side, patch = arguments.get("img_size", 224), arguments.get("patch_size", 4)
    if model is PolyViT:
        return settings(side, "patch_embed.proj", "head")
    last = side // (patch * 2 ** (len(arguments.get("depths", (0,) * 4)) - 1))
    return settings(side, "stem.proj", "head", pool_size=(last, last))


default_cfgs = generate_default_cfgs(
    {
        name: _settings(model, arguments)
        for table in (VARIANTS, SMALL)
        for model, family in table.items()
        for name, arguments in family.items()
    }
)
for _model, _out in ((PolyViT, 3), (PolyTwins, (0, 1, 2, 3)), (PolySwin, (0, 1, 2, 3))):
    register(__name__, _model, VARIANTS[_model], checkpoint_filter_fn, out_indices=_out)
    _few = _out if _model is PolyViT else (0, 1, 2)
    register(__name__, _model, SMALL[_model], checkpoint_filter_fn, out_indices=_few)
