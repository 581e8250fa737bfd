# SPDX-License-Identifier: Apache-2.0
"""HorNet: a convolutional backbone whose mixer multiplies features n times.

"HorNet: Efficient High-Order Spatial Interactions with Recursive Gated Convolutions", Rao, Zhao,
Tang, Zhou, Lim, Lu, arXiv 2207.14284, NeurIPS 2022.

    stem: LN(conv4x4/4 x)                    between stages: conv2x2/2(LN x)
    x = x + g1 * gnConv(LN x)                `hornet_gnconv.py`; orders 2, 3, 4, 5 by stage
    x = x + g2 * Linear(GELU(Linear(LN x)))  4 times as wide inside
    logits = head(LN(mean over pixels))

All norms are over channels, eps 1e-6; g1, g2 are scales per channel that begin at 1e-6. In the GF
models the mixers of stages 3 and 4 have global-local filters, learnt for the maps of `img_size`
and interpolated for others.

Departures: a filter is interpolated once per size, not in each pass, as long as nothing is learnt;
under fp16 autocast the mixer runs in fp32.

Expected at 224 (M parameters, GMACs without the Fourier transforms, which no counter sees): tiny
7x7 22.41, 3.97, GF 22.99, 3.89; small 49.53, 8.81 and 50.40, 8.69; base 87.26, 15.57 and 88.42,
15.41; large 194.54, 34.80 and 196.29, 34.56; GF at 384: base 92.10, 45.3, large 201.81, 101.6. The
authors count the large ones with the 10,450 classes of their pre-training: 209, 211 and 216.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import crosspatch._torchvision  # noqa: F401

import torch
from timm.layers import DropPath, LayerNorm2d
from timm.models import generate_default_cfgs
from torch import Tensor, nn

from crosspatch.layers.first_weights import init_weights
from crosspatch.layers.linear import Linear
from crosspatch.layers.patch_embed import pair
from crosspatch.layers.spectrum import resize_filter
from crosspatch.layers.stage import drop_rates, one_a_stage
from crosspatch.models.hornet_gnconv import EPS, SCALE, GlobalLocalFilter, GnConv
from crosspatch.models.pyramid import Pyramid, Stage
from crosspatch.models.registry import register, settings, unwrapped


class Block(nn.Module):
    """A gated convolution and a perceptron, each normed before and scaled after; (B, C, H, W).

    layer_scale: first value of the scales, None for none. `mixer` goes to the `GnConv`.
    """

    def __init__(
        self,
        dim: int,
        *,
        mlp_ratio: float = 4.0,
        layer_scale: float | None = 1e-6,
        drop: float = 0.0,
        drop_path: float = 0.0,
        **mixer: Any,
    ) -> None:
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.norm1 = LayerNorm2d(dim, eps=EPS)
        self.gnconv = GnConv(dim, **mixer)
        self.norm2 = nn.LayerNorm(dim, eps=EPS)
        self.pwconv1 = Linear(dim, hidden)
        self.act = nn.GELU()
        self.pwconv2 = Linear(hidden, dim)
        self.drop = nn.Dropout(drop)
        self.gamma1, self.gamma2 = (
            None if layer_scale is None else nn.Parameter(layer_scale * torch.ones(dim))
            for _ in range(2)
        )
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        y = self.drop(self.gnconv(self.norm1(x)))
        y = y if self.gamma1 is None else self.gamma1[:, None, None] * y
        x = x + self.drop_path(y)
        y = self.norm2(x.permute(0, 2, 3, 1))
        y = self.drop(self.pwconv2(self.act(self.pwconv1(y))))
        y = y if self.gamma2 is None else self.gamma2 * y
        return x + self.drop_path(y.permute(0, 3, 1, 2))


class HorNet(Pyramid):
    """The network; argument names are the authors' or timm's.

    img_size: the side or (H, W) whose maps the global filters are learnt for; pictures of any size
    from the last stride on run. base_dim: width of the first stage, doubled in each. orders: n of
    each stage. gf_stages: stages (0-based) with global-local filters instead of a depth-wise
    convolution of `kernel_size`. scale: s, of what the filters give. patch_size: of the stem.
    layer_scale_init_value: None for no scales. uniform_init: Xavier's, not a truncated normal.
    Raises ValueError where widths and orders do not agree, or img_size is smaller than the last
    stride.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        base_dim: int = 64,
        depths: Sequence[int] = (2, 3, 18, 2),
        orders: Sequence[int] = (2, 3, 4, 5),
        gf_stages: Sequence[int] = (),
        kernel_size: int = 7,
        scale: float = SCALE,
        mlp_ratio: float = 4.0,
        patch_size: int = 4,
        layer_scale_init_value: float | None = 1e-6,
        head_init_scale: float = 1.0,
        uniform_init: bool = False,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        widths = [base_dim * 2**i for i in range(len(depths))]
        strides = [patch_size * 2**i for i in range(len(depths))]
        _check(pair(img_size), strides[-1], depths, orders, gf_stages)
        self.stem = nn.Sequential(
            nn.Conv2d(in_chans, base_dim, patch_size, patch_size), LayerNorm2d(base_dim, eps=EPS)
        )
        block = partial(
            Block,
            kernel_size=kernel_size,
            scale=scale,
            mlp_ratio=mlp_ratio,
            layer_scale=layer_scale_init_value,
            drop=proj_drop_rate,
        )
        rates = drop_rates(drop_path_rate, depths)
        maps = _maps(pair(img_size), patch_size, len(depths))
        self.stages = nn.ModuleList()
        for i, (width, order) in enumerate(zip(widths, orders, strict=True)):
            made = partial(
                block, width, order=order, filter_size=maps[i] if i in gf_stages else None
            )
            blocks = [made(drop_path=rate) for rate in rates[i]]
            self.stages.append(Stage(_downsample(width) if i else None, blocks))
        self.norm_head = nn.LayerNorm(widths[-1], eps=EPS)
        self.apply(_init_uniform if uniform_init else init_weights)
        self.finish(
            widths,
            strides,
            img_size=img_size,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
            head_init_scale=head_init_scale,
        )

    @classmethod
    def from_authors(cls, variant: str = "hornet_tiny_7x7", **build: Any) -> HorNet:
        """The network of an entry point of the authors, with arguments of theirs."""
        return cls(**{**VARIANTS[variant], **build})


def _init_uniform(module: nn.Module) -> None:
    """Xavier's uniform numbers in convolutions and linear layers, biases 0."""
    if isinstance(module, nn.Conv2d | nn.Linear) and not module.weight.is_meta:
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _downsample(width: int) -> nn.Sequential:
    return nn.Sequential(LayerNorm2d(width // 2, eps=EPS), nn.Conv2d(width // 2, width, 2, 2))


def _maps(size: tuple[int, int], patch_size: int, stages: int) -> list[tuple[int, int]]:
    """The maps of the stages: cut to whole windows, one after another."""
    maps = [(size[0] // patch_size, size[1] // patch_size)]
    for _ in range(stages - 1):
        maps.append((maps[-1][0] // 2, maps[-1][1] // 2))
    return maps


def _check(size, stride, depths, orders, gf_stages) -> None:
    one_a_stage(len(depths), orders=orders)
    if unknown := sorted(set(gf_stages) - set(range(len(depths)))):
        raise ValueError(f"gf_stages {unknown}; there are stages 0 to {len(depths) - 1}")
    if min(size) < stride:
        raise ValueError(f"img_size {size}; expected sides of {stride} or more")


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: HorNet) -> dict[str, Tensor]:
    """A released state dict under the model's names, its filters interpolated to the model's."""
    state = {_renamed(name): value for name, value in unwrapped(state_dict).items()}
    for name, module in model.named_modules():
        key = f"{name}.complex_weight"
        if isinstance(module, GlobalLocalFilter) and key in state and state[key].ndim == 4:
            given, size = state[key], module.complex_weight.shape[1:3]
            state[key] = resize_filter(given, (size[0], size[1])).to(given.dtype)
    return state


def _renamed(name: str) -> str:
    name = re.sub(r"^downsample_layers\.0\.", "stem.", name)
    name = re.sub(r"^downsample_layers\.(\d+)\.", r"stages.\1.downsample.", name)
    name = re.sub(r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2.", name)
    return re.sub(r"^norm\.", "norm_head.", name)


GF = {"gf_stages": (2, 3)}
WIDTHS = {"tiny": 64, "small": 96, "base": 128, "large": 192}
VARIANTS: dict[str, dict[str, Any]] = {
    f"hornet_{size}_{mixer}": {"base_dim": width, **more}
    for size, width in WIDTHS.items()
    for mixer, more in (("7x7", {}), ("gf", GF), ("gf_img384", {**GF, "img_size": 384}))
    if mixer != "gf_img384" or size in ("base", "large")
}
# Ours, for small pictures: three stages of 16, 8 and 4 pixels a side.
MICRO = {
    "img_size": 32,
    "patch_size": 2,
    "base_dim": 24,
    "depths": (1, 2, 3),
    "orders": (2, 3, 4),
    "layer_scale_init_value": 0.1,
}
SMALL = {
    "hornet_micro_32": MICRO,
    "hornet_gf_micro_32": {**MICRO, "gf_stages": (1, 2)},
}


def _settings(arguments: Mapping[str, Any]) -> Any:
    side = arguments.get("img_size", 224)
    last = side // 32 if side > 32 else 4
    return settings(side, "stem.0", "head", pool_size=(last, last))


default_cfgs = generate_default_cfgs(
    {name: _settings(arguments) for name, arguments in (VARIANTS | SMALL).items()}
)
register(__name__, HorNet, VARIANTS, checkpoint_filter_fn, out_indices=(0, 1, 2, 3))
register(__name__, HorNet, SMALL, checkpoint_filter_fn, out_indices=(0, 1, 2))
