# SPDX-License-Identifier: Apache-2.0
"""ConvNeXt: a residual network of convolutions, built as transformers are.

"A ConvNet for the 2020s", Liu, Mao, Wu, Feichtenhofer, Darrell, Xie, arXiv 2201.03545, CVPR 2022.

    stem: x = LN(conv4x4/4(x));   before stages 2, 3, 4: x = conv2x2/2(LN x)
    block: x = x + DropPath(gamma * W2 GELU(W1 LN(dwconv7x7 x)))
    logits = head(LN(mean over the map))

The network is timm's; here are the authors' layout, their layers for layer-wise rates, stems for
small pictures and the folding of gamma. The isotropic models, which timm lacks: one width, patches
of 16, no norm in the stem, the blocks one after another.

    logits = head(LN(mean(blocks(conv16x16/16(x)))))

Departures: with `patch_size` 1 or 2 the stem alone changes (timm's would add a downsampling before
the first stage of 2); rates of layers hold for every depth: three blocks of the third stage are a
layer. Sides that strides do not divide lose their last row or column, as in the authors' code.

Expected (M parameters, GMACs at 224): tiny 28.59, 4.46; small 50.22, 8.68; base 88.59, 15.35; large
197.77, 34.36; xlarge 350.20, 60.92; isotropic small 22.31, 4.29; base 87.08, 16.90; large 305.94,
59.70.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import crosspatch._torchvision  # noqa: F401

import torch
from timm.layers import LayerNorm2d
from timm.models import convnext as timms
from timm.models import generate_default_cfgs
from torch import Tensor, nn

from crosspatch.layers.first_weights import init_weights
from crosspatch.layers.patch_embed import pair
from crosspatch.models.adopted import Adopted, last_norm, quick_linears
from crosspatch.models.pyramid import Pyramid, Stage
from crosspatch.models.registry import register, settings, unwrapped

EPS = 1e-6
GROUP = 3  # blocks of the third stage in one layer of layer-wise rates
STEMS = (1, 2, 4)


class ConvNeXt(Adopted, timms.ConvNeXt):
    """The network of four stages; argument names are timm's.

    img_size: what it is described for, any size of at least 8 patches is taken. patch_size: stride
    of the stem: 4, or 1 or 2 for small pictures; stem_kernel: its kernel, `patch_size` if None.
    kernel_sizes: of the depthwise convolutions, one or one per stage. ls_init_value: first gamma,
    None or 0 for none. head_init_scale: multiplies the classifier's first weights. conv_mlp: 1x1
    convolutions instead of linear layers. stage_norms: a channel norm for the map of every stage,
    as dense prediction has it. Raises ValueError for shapes that do not agree.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        depths: Sequence[int] = (3, 3, 9, 3),
        dims: Sequence[int] = (96, 192, 384, 768),
        patch_size: int = 4,
        stem_kernel: int | None = None,
        kernel_sizes: int | Sequence[int] = 7,
        ls_init_value: float | None = 1e-6,
        head_init_scale: float = 1.0,
        conv_mlp: bool = False,
        stage_norms: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        _check(pair(img_size), patch_size, stem_kernel, depths, dims)
        super().__init__(
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            depths=tuple(depths),
            dims=tuple(dims),
            kernel_sizes=kernel_sizes if isinstance(kernel_sizes, int) else tuple(kernel_sizes),
            ls_init_value=ls_init_value or None,
            head_init_scale=head_init_scale,
            conv_mlp=conv_mlp,
            norm_eps=EPS,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
        )
        kernel = stem_kernel or patch_size
        if kernel != 4 or patch_size != 4:
            padding = (kernel - 1) // 2 if kernel > patch_size else 0
            self.stem[0] = nn.Conv2d(in_chans, dims[0], kernel, patch_size, padding)
            init_weights(self.stem[0])
        for info in self.feature_info:
            info["reduction"] = info["reduction"] * patch_size // 4
        norms = [LayerNorm2d(dim, eps=EPS) for dim in dims] if stage_norms else []
        self.adopt(img_size, stage_norms=norms)

    @classmethod
    def from_authors(cls, **build: Any) -> ConvNeXt:
        """Built with the arguments of the authors' constructor."""
        return cls(**_renamed(build))

    def for_inference(self) -> nn.Module:
        """A copy that computes the same without gammas: what is exported."""
        return fold_gamma(self)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """The authors' layers: the stem, two stages, threes of blocks of stage 3, stage 4, head."""
        if coarse:
            return {"stem": r"^stem", "blocks": r"^stages\.(\d+)"}
        layers = [(r"^stages\.0\.", (1,)), (r"^stages\.1\.", (2,)), (r"^stages\.2\.down", (3,))]
        stages: Any = self.stages
        depth = len(stages[2].blocks) if len(stages) > 2 else 0
        for layer, first in enumerate(range(0, depth, GROUP), start=3):
            blocks = "|".join(str(first + i) for i in range(GROUP))
            layers.append((rf"^stages\.2\.blocks\.(?:{blocks})\.", (layer,)))
        layers.append((r"^stages\.3\.", (layers[-1][1][0] + 1,)))
        return {"stem": r"^stem", "blocks": layers}


class ConvNeXtIsotropic(Pyramid):
    """The isotropic network: `depth` blocks of width `dim` on one grid of patches.

    Every block counts as a stage. Arguments as for `ConvNeXt`. Raises ValueError for a depth below
    1.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        depth: int = 18,
        dim: int = 384,
        patch_size: int = 16,
        kernel_size: int = 7,
        ls_init_value: float | None = None,
        head_init_scale: float = 1.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if depth < 1:
            raise ValueError(f"a depth of {depth}; expected at least 1")
        self.stem = nn.Conv2d(in_chans, dim, patch_size, patch_size)
        rates = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
        block: Any = partial(
            timms.ConvNeXtBlock, dim, kernel_size=kernel_size, ls_init_value=ls_init_value or None
        )
        self.stages = nn.ModuleList(Stage(None, [block(drop_path=rate)]) for rate in rates)
        self.apply(init_weights)
        self.norm_head = nn.LayerNorm(dim, eps=EPS)
        self.finish(
            [dim] * depth,
            [patch_size] * depth,
            img_size=img_size,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
            head_init_scale=head_init_scale,
        )
        quick_linears(self)

    @classmethod
    def from_authors(cls, **build: Any) -> ConvNeXtIsotropic:
        """Built with the arguments of the authors' constructor."""
        return cls(**_renamed(build))

    def for_inference(self) -> nn.Module:
        """A copy that computes the same without gammas: what is exported."""
        return fold_gamma(self)


def fold_gamma(model: nn.Module) -> nn.Module:
    """A copy of either network without gammas, which computes the same: W2' = diag(gamma) W2, b2' =
    gamma b2.

    It is what `ls_init_value=None` builds, so it can be saved and built again.
    """
    folded = copy.deepcopy(model)
    for block in folded.modules():
        if not isinstance(block, timms.ConvNeXtBlock) or block.gamma is None:
            continue
        last: Any = block.mlp.fc2
        with torch.no_grad():
            last.weight.mul_(block.gamma.view(-1, *[1] * (last.weight.ndim - 1)))
            last.bias.mul_(block.gamma)
        block.gamma = None
    return folded


_NAMES = (
    (r"^downsample_layers\.0\.", "stem."),
    (r"^downsample_layers\.(\d+)\.", r"stages.\1.downsample."),
    (r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"^norm(\d)\.", r"stage_norms.\1."),
    (r"^norm\.", "head.norm."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
)
_ISOTROPIC = ((r"^blocks\.(\d+)\.", r"stages.\1.blocks.0."), (r"^norm\.", "norm_head."))
_BLOCK = ((r"\.dwconv\.", ".conv_dw."), (r"\.pwconv(\d)\.", r".mlp.fc\1."))


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """A released state dict, or timm's, under the names of `model`."""
    flat = isinstance(model, ConvNeXtIsotropic)
    patterns = (*(_ISOTROPIC if flat else _NAMES), *_BLOCK)
    own, found = model.state_dict(), {}
    for name, value in unwrapped(state_dict).items():
        for pattern, new in patterns if name not in own else ():
            name = re.sub(pattern, new, name)
        if name in own and value.ndim == 2 and own[name].ndim == 4:
            value = value[:, :, None, None]  # a linear layer for `conv_mlp`
        found[name] = value
    last_norm(found, "head.norm")
    return found


def _renamed(build: Mapping[str, Any]) -> dict[str, Any]:
    arguments = dict(build)
    if "layer_scale_init_value" in arguments:
        arguments["ls_init_value"] = arguments.pop("layer_scale_init_value")
    return arguments


def _check(
    size: tuple[int, int], patch_size: int, kernel: int | None, depths: Sequence, dims: Sequence
) -> None:
    if patch_size not in STEMS:
        raise ValueError(f"patch_size {patch_size}; expected one of {STEMS}")
    if kernel is not None and kernel < patch_size:
        raise ValueError(f"stem_kernel {kernel} would skip pixels at a stride of {patch_size}")
    if len(depths) != 4 or len(dims) != 4:
        raise ValueError(f"depths {tuple(depths)} and dims {tuple(dims)}; expected four of each")
    if min(size) < 8 * patch_size:
        raise ValueError(f"img_size {size}; expected sides of at least {8 * patch_size}")


def _variant(width: int, depth: int) -> dict[str, Any]:
    return {"depths": (3, 3, depth, 3), "dims": tuple(width * 2**i for i in range(4))}


VARIANTS = {
    "convnext_tiny": _variant(96, 9),
    "convnext_small": _variant(96, 27),
    "convnext_base": _variant(128, 27),
    "convnext_large": _variant(192, 27),
    "convnext_xlarge": _variant(256, 27),
    # Ours, for small pictures: a 3x3 stem that keeps every second pixel, gammas that count at once.
    "convnext_micro_32": {
        "img_size": 32,
        "depths": (2, 2, 4, 1),
        "dims": (24, 48, 96, 144),
        "patch_size": 2,
        "stem_kernel": 3,
        "ls_init_value": 0.1,
    },
}
ISOTROPIC = {
    "convnext_isotropic_small": {"dim": 384, "depth": 18},
    "convnext_isotropic_base": {"dim": 768, "depth": 18},
    "convnext_isotropic_large": {"dim": 1024, "depth": 36, "ls_init_value": 1e-6},
    "convnext_isotropic_micro_32": {"img_size": 32, "dim": 64, "depth": 5, "patch_size": 4},
}
default_cfgs = generate_default_cfgs(
    {
        "convnext_micro_32": settings(32, "stem.0", "head.fc", pool_size=(2, 2)),
        **{
            name: settings(
                made.get("img_size", 224),
                "stem",
                "head",
                pool_size=(made.get("img_size", 224) // made.get("patch_size", 16),) * 2,
            )
            for name, made in ISOTROPIC.items()
        },
    }
)
register(__name__, ConvNeXt, VARIANTS, checkpoint_filter_fn, out_indices=(0, 1, 2, 3))
register(__name__, ConvNeXtIsotropic, ISOTROPIC, checkpoint_filter_fn, out_indices=(0, 1, 2, 3))
