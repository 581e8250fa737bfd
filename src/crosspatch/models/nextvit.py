# SPDX-License-Identifier: Apache-2.0
"""Next-ViT: convolutions and a few attention blocks, of layers that deployment tools know.

"Next-ViT: Next Generation Vision Transformer for Efficient Deployment in Realistic Industrial
Scenarios", Li, Xia, Li, Li, Wang, Xiao, Wang, Zheng, Pan, arXiv 2207.05501, 2022.

    MHCA(x) = conv1x1(ReLU(BN(grouped conv3x3 x))), groups of 32 channels
    NCB: x = embed x;   x = x + DropPath(MHCA x);   x = x + DropPath(MLP(BN x))
    NTB: x = embed x, to a channels;   t = tokens of BN x;   x = x + DropPath(E-MHSA t)
         y = embed' x, to b channels;  y = y + DropPath(MHCA y)
         z = [x, y];                   z = z + DropPath(MLP(BN z))
    E-MHSA(t) = softmax(q k^T / sqrt 32) v, k and v of BN(mean of every r^2 tokens of t) for r > 1
    stem: four conv3x3-BN-ReLU, strides 2, 1, 1, 2;   logits = head(mean(BN x))
    stages: NCB .. NCB | NCB .. NTB | (NCB NCB NCB NCB NTB) .. | NCB .. NTB

a is 0.75 of the width, rounded to heads; drop-path rates of attention, MHCA and MLP stand as 0.75,
0.25 and 1. Parts, methods and parameter names are timm's; the constructor is ours, as timm's has
its widths fixed.

`merge_norms` gives the network for inference: norms before an MLP or attention go into the layers
behind them, W' = W diag(s), b' = b + W t for the norm s x + t, which averaging does not disturb.
Authors skip them while an ONNX export runs, merged or not; here nothing depends on that.

Departures: `key_pool="2d"` takes the mean of r x r cells (rounded up) instead of r^2 tokens in a
row, which weights do not carry over; maps of fewer than r^2 tokens have the mean of all as their
only key, where the authors' code fails. With "1d" the last tokens of a map that r^2 does not divide
are no keys, as in the authors' code.

Expected (M parameters, GMACs at 224, at 384): small 31.76, 5.8, 17.3; base 44.82, 8.3, 24.6; large
57.87, 10.8, 32.0.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import crosspatch._torchvision  # noqa: F401

from timm.layers import ClassifierHead
from timm.models import generate_default_cfgs
from timm.models import nextvit as timms
from torch import Tensor, nn

from crosspatch.layers.folding import fold_after, fold_before, is_batch_norm
from crosspatch.layers.stage import drop_rates
from crosspatch.models.adopted import Adopted
from crosspatch.models.nextvit_blocks import KEY_POOLS, RELU, TransformerBlock
from crosspatch.models.pyramid import Stage
from crosspatch.models.registry import register, settings, unwrapped

GROUP = 5  # blocks of the third stage that are repeated: four NCB and one NTB


class NextViT(Adopted, timms.NextViT):
    """The network; argument names are timm's.

    img_size: what it is described for, any size is taken. stem_chs, stem_strides: of the stem's
    convolutions (the last two have the same width); dims: widths of NCB by stage;
    transformer_dims: of the NTB that ends a stage or five blocks of the third (the first stage has
    none). depths: blocks by stage, of the third in fives. sr_ratios: r. key_pool: "1d", or "2d" for
    new training. merged: the form that `merge_norms` gives. stage_norms: a batch norm for the map
    of every stage, as dense prediction has it. Raises ValueError for shapes that do not agree.
    """

    merged: bool

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        stem_chs: Sequence[int] = (64, 32, 64),
        stem_strides: Sequence[int] = (2, 1, 1, 2),
        depths: Sequence[int] = (3, 4, 10, 3),
        dims: Sequence[int] = (96, 192, 384, 768),
        transformer_dims: Sequence[int] = (256, 512, 1024),
        strides: Sequence[int] = (1, 2, 2, 2),
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        key_pool: str = "1d",
        head_dim: int = 32,
        mix_block_ratio: float = 0.75,
        merged: bool = False,
        stage_norms: bool = False,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        nn.Module.__init__(self)
        self.merged = False
        _check(depths, key_pool, dims, transformer_dims, head_dim)
        self.in_chans, self.num_classes = in_chans, num_classes
        self.grad_checkpointing = False
        self.stem = _stem(in_chans, stem_chs, stem_strides)
        common = {"drop": proj_drop_rate, "head_dim": head_dim}
        conv = partial(timms.NextConvBlock, act_layer=RELU, **common)
        attention = partial(
            TransformerBlock,
            key_pool=key_pool,
            mix_block_ratio=mix_block_ratio,
            attn_drop=attn_drop_rate,
            **common,
        )
        rates = drop_rates(drop_path_rate, depths)
        stages, widths, width = [], [], stem_chs[-1]
        for i, plan in enumerate(_plan(depths, dims, transformer_dims)):
            kinds = (conv, partial(attention, sr_ratio=sr_ratios[i]))
            stages.append(_stage(width, plan, kinds, strides[i], rates[i]))
            width = plan[-1][1]
            widths.append(width)
        self.stages = nn.Sequential(*stages)
        self.feature_info = [
            {
                "num_chs": out,
                "reduction": math.prod((*stem_strides, *strides[: i + 1])),
                "module": f"stages.{i}",
            }
            for i, out in enumerate(widths)
        ]
        self.num_features = self.head_hidden_size = width
        self.norm = nn.BatchNorm2d(width)
        self.head = ClassifierHead(width, num_classes, global_pool, drop_rate)
        self._initialize_weights()
        if merged:
            _merge(self)
        self.adopt(img_size, stage_norms=[nn.BatchNorm2d(w) for w in widths] if stage_norms else [])

    @classmethod
    def from_authors(cls, **build: Any) -> NextViT:
        """Built with the arguments of the authors' constructor."""
        arguments = dict(build)
        for theirs, ours in (("path_dropout", "drop_path_rate"), ("attn_drop", "attn_drop_rate")):
            if theirs in arguments:
                arguments[ours] = arguments.pop(theirs)
        if "drop" in arguments:
            arguments["proj_drop_rate"] = arguments.pop("drop")
        checkpointing = arguments.pop("use_checkpoint", False)
        model = cls(**arguments)
        model.set_grad_checkpointing(checkpointing)
        return model

    def for_inference(self) -> NextViT:
        """A copy that computes the same without a batch norm: what is exported."""
        return merge_norms(self, convolutions=True)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass instead of keeping their activations."""
        stages: Any = self.stages
        for stage in stages:
            stage.grad_checkpointing = enable


def _stem(in_chans: int, widths: Sequence[int], strides: Sequence[int]) -> nn.Sequential:
    first, second, third = widths
    outs = (first, second, third, third)
    return nn.Sequential(
        *(
            timms.ConvNormAct(width, out, stride=stride, act_layer=RELU)
            for width, out, stride in zip((in_chans, *outs), outs, strides, strict=False)
        )
    )


def _plan(
    depths: Sequence[int], dims: Sequence[int], transformer_dims: Sequence[int]
) -> Iterator[list[tuple[bool, int]]]:
    """By stage: (is it an NTB, width) of every block."""
    for i, (depth, width) in enumerate(zip(depths, dims, strict=True)):
        if i == 0:
            yield [(False, width)] * depth
            continue
        length = GROUP if i == 2 else depth
        group = [(False, width)] * (length - 1) + [(True, transformer_dims[i - 1])]
        yield group * (depth // length)


def _stage(
    width: int,
    plan: Sequence[tuple[bool, int]],
    kinds: Sequence[Callable[..., nn.Module]],
    stride: int,
    rates: Sequence[float],
) -> Stage:
    """The blocks of `plan`, the first with `stride`; kinds: what makes an NCB and an NTB."""
    blocks = []
    for place, (transforms, out) in enumerate(plan):
        step = 1 if place else stride
        blocks.append(kinds[transforms](width, out, stride=step, drop_path=rates[place]))
        width = out
    return Stage(None, blocks)


# ---------------------------------------------------------------------- merging norms


def merge_norms(model: NextViT, convolutions: bool = False) -> NextViT:
    """A copy of `model` for inference, without the norms before MLPs and attention; it computes the
    same with their running statistics.

    It is what `merged=True` builds, so it can be saved and built again. convolutions: also the
    norms behind convolutions, and the last one, which leaves no norm at all.
    """
    made = copy.deepcopy(model).eval()
    if not made.merged:
        _merge(made)
    if convolutions:
        _merge_convolutions(made)
    return made


def _merge(model: NextViT) -> None:
    for block in model.modules():
        if isinstance(block, timms.NextConvBlock):
            fold_before(block.mlp.fc1, block.norm)
            block.norm = nn.Identity()
        elif isinstance(block, TransformerBlock):
            attention: Any = block.e_mhsa
            keys = [block.norm1] + ([attention.norm] if attention.sr_ratio > 1 else [])
            fold_before(attention.q, block.norm1)
            fold_before(attention.k, *keys)
            fold_before(attention.v, *keys)
            fold_before(block.mlp.fc1, block.norm2)
            block.norm1 = block.norm2 = nn.Identity()
            if attention.sr_ratio > 1:
                attention.norm = nn.Identity()
    model.merged = True


def _merge_convolutions(model: NextViT) -> None:
    for module in list(model.modules()):
        if isinstance(module, timms.ConvNormAct | timms.PatchEmbed):
            pair = ("conv", "norm")
        elif isinstance(module, timms.ConvAttention):
            pair = ("group_conv3x3", "norm")
        else:
            continue
        fold_after(module, *pair)
    head: Any = model.head
    averages = head.global_pool.pool_type == "avg"  # a maximum is not that of the scaled map
    if averages and isinstance(head.fc, nn.Linear) and is_batch_norm(model.norm):
        fold_before(head.fc, model.norm)
        model.norm = nn.Identity()


# ---------------------------------------------------------------------- weights and names


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: NextViT) -> dict[str, Tensor]:
    """A released state dict, or timm's, under the names of `model`."""
    stages: Any = model.stages
    places = [f"stages.{i}.blocks.{j}" for i, s in enumerate(stages) for j in range(len(s.blocks))]
    found = {}
    for name, value in unwrapped(state_dict).items():
        block = re.match(r"^features\.(\d+)\.", name)
        if block and int(block[1]) < len(places):
            name = f"{places[int(block[1])]}.{name[block.end() :]}"
            name = re.sub(r"\.mlp\.conv(\d)\.", r".mlp.fc\1.", name)
        found[re.sub(r"^proj_head\.0\.", "head.fc.", name)] = value
    return found


def _check(depths: Sequence[int], key_pool: str, dims: Sequence, wide: Sequence, head: int) -> None:
    if key_pool not in KEY_POOLS:
        raise ValueError(f"key_pool {key_pool!r}; expected one of {', '.join(KEY_POOLS)}")
    if len(depths) != 4 or len(dims) != 4 or len(wide) != 3:
        raise ValueError(
            f"depths {tuple(depths)}, dims {tuple(dims)}, transformer_dims {tuple(wide)}; expected "
            "four, four and three"
        )
    if min(depths) < 1 or depths[2] % GROUP:
        raise ValueError(f"depths {tuple(depths)}; the third must be a multiple of {GROUP}")
    if any(width % head for width in dims):
        raise ValueError(f"dims {tuple(dims)} must divide by heads of {head}")


VARIANTS = {
    "nextvit_small": {"depths": (3, 4, 10, 3)},
    "nextvit_base": {"depths": (3, 4, 20, 3)},
    "nextvit_large": {"depths": (3, 4, 30, 3)},
    # Ours, for small pictures: a stem that keeps every second pixel, heads of 8.
    "nextvit_micro_32": {
        "img_size": 32,
        "stem_chs": (24, 16, 24),
        "stem_strides": (2, 1, 1, 1),
        "depths": (1, 2, 5, 2),
        "dims": (32, 48, 64, 128),
        "transformer_dims": (64, 96, 128),
        "head_dim": 8,
    },
}
default_cfgs = generate_default_cfgs(
    {"nextvit_micro_32": settings(32, "stem.0.conv", "head.fc", pool_size=(2, 2))}
)
register(__name__, NextViT, VARIANTS, checkpoint_filter_fn, out_indices=(0, 1, 2, 3))
