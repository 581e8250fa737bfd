# SPDX-License-Identifier: Apache-2.0
"""ResNet for CIFAR: the small residual network that teaches DeiT-LT's student.

"Deep Residual Learning for Image Recognition", He et al., arXiv 1512.03385, section 4.2; as the
teacher of "DeiT-LT", arXiv 2404.02900, CVPR 2024.

    x -> 3x3 convolution to 16 -> n blocks of 16, n of 32 (stride 2), n of 64 (stride 2)
    block: relu(bn2(conv2(relu(bn1(conv1 x)))) + shortcut x);  logits = head(mean over pixels)

depth = 6 n + 2. A shortcut between stages has no weights: every other pixel, and channels filled up
with zeros, a quarter of the new width on each side (option A). `use_norm`: the head of LDAM-DRW
training gives cosines between the features and one direction per class, in [-1, 1].

Released teachers load: plain, with the cosine head, and the PaCo wrapper, of which only the query
encoder and the classifier `linear` answer (queue, key encoder and projection are left away).

Expected at 10 classes (M parameters, GMACs at 32 pixels): 20 0.270, 0.041; 32 0.464, 0.069; 44
0.658, 0.098; 56 0.853, 0.126.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import crosspatch._torchvision  # noqa: F401

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from timm.models import checkpoint_seq, generate_default_cfgs
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from crosspatch.layers.patch_embed import pair
from crosspatch.models.registry import register, settings, unwrapped

BLOCK = 2  # convolutions in one


class CosineLinear(nn.Module):
    """(B, in_features) -> cosines (B, out_features) with the columns of `weight` (in, out)."""

    cosine = True  # what LDAM's scale asks for

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(in_features, out_features))
        if not self.weight.is_meta:
            with torch.no_grad():
                self.weight.copy_(F.normalize(torch.empty_like(self.weight).uniform_(-1, 1), dim=0))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1) @ F.normalize(self.weight, dim=0)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}"


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut without weights; x: (B, C_in, H, W)."""

    def __init__(self, in_planes: int, planes: int, stride: int, drop_path: float) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.drop_path = DropPath(drop_path)
        self.stride = stride
        lacking = planes - in_planes
        self.before, self.after = lacking // 2, lacking - lacking // 2

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(self.drop_path(out) + self.shortcut(x))

    def shortcut(self, x: Tensor) -> Tensor:
        """Every `stride`-th pixel, with channels of zeros before and after."""
        if self.stride > 1:
            x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, self.before, self.after)) if self.after else x


class ResNetCifar(nn.Module):
    """The network; argument names are timm's where timm has them.

    depth: 6 n + 2, of all weighted layers; widths: channels of the three stages; use_norm: a cosine
    head; img_size: what it is described for, any size is taken. Raises ValueError for a depth that
    is not 6 n + 2.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 32,
        in_chans: int = 3,
        num_classes: int = 1000,
        depth: int = 32,
        widths: tuple[int, int, int] = (16, 32, 64),
        use_norm: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        stages = len(widths)
        if depth < 2 + stages * BLOCK or (depth - 2) % (stages * BLOCK):
            raise ValueError(f"a depth of {depth}; expected 6 n + 2, such as 20, 32, 44 or 56")
        each = (depth - 2) // (stages * BLOCK)
        self.img_size, self.in_chans, self.num_classes = pair(img_size), in_chans, num_classes
        self.use_norm, self.drop_rate = use_norm, drop_rate
        self.num_features = self.head_hidden_size = widths[-1]
        self.grad_checkpointing = False
        self.conv1 = nn.Conv2d(in_chans, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        rates = torch.linspace(0, drop_path_rate, stages * each, device="cpu").tolist()
        self.feature_info, width, self.stage_names = [], widths[0], list[str]()
        for number, planes in enumerate(widths):
            blocks = []
            for place in range(each):
                stride = 2 if number and not place else 1
                blocks.append(BasicBlock(width, planes, stride, rates[number * each + place]))
                width = planes
            name = f"layer{number + 1}"
            setattr(self, name, nn.Sequential(*blocks))
            self.stage_names.append(name)
            info = {"module": name, "num_chs": planes, "reduction": 2**number}
            self.feature_info.append(info)
        self.init_weights()
        self.linear = self._classifier(num_classes)

    def init_weights(self) -> None:
        """Kaiming's normal for convolutions (fan-in, ReLU); normalisations as built."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and not module.weight.is_meta:
                nn.init.kaiming_normal_(module.weight)

    def _classifier(self, num_classes: int) -> nn.Module:
        if num_classes <= 0:
            return nn.Identity()
        if self.use_norm:
            return CosineLinear(self.num_features, num_classes)
        head = nn.Linear(self.num_features, num_classes)
        if not head.weight.is_meta:
            nn.init.kaiming_normal_(head.weight)
        return head

    @property
    def stages(self) -> list[nn.Module]:
        """The stages that are there, first to last."""
        return [getattr(self, name) for name in self.stage_names]

    def _stage(self, stage: Any, x: Tensor) -> Tensor:
        if self.grad_checkpointing and self.training and not torch.jit.is_scripting():
            return checkpoint_seq(stage, x)
        return stage(x)

    def _stem(self, x: Tensor) -> Tensor:
        return F.relu(self.bn1(self.conv1(x)))

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) to the last map (B, C, H/4, W/4), rounded up."""
        x = self._stem(x)
        for stage in self.stages:
            x = self._stage(stage, x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The last map to logits (B, K), or to its mean (B, C)."""
        x = F.dropout(x.mean(dim=(2, 3)), self.drop_rate, self.training)
        return x if pre_logits else self.linear(x)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, in_chans, H, W) -> logits (B, K); cosines with `use_norm`."""
        return self.forward_head(self.forward_features(x))

    # ------------------------------------------------------------------ timm's contract

    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.linear

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head for `num_classes` (0: none). Raises ValueError for another pool than avg."""
        if global_pool not in (None, "avg"):
            raise ValueError(f"global_pool {global_pool!r}; this network has 'avg' alone")
        self.num_classes = num_classes
        self.linear = self._classifier(num_classes).to(self.conv1.weight)

    def no_weight_decay(self) -> set[str]:
        """None by name: vectors are not decayed anyway."""
        return set()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that sort parameters by depth, for layer-wise rates."""
        blocks = r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)"
        return {"stem": r"^conv1|bn1", "blocks": blocks}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass instead of keeping their activations."""
        self.grad_checkpointing = enable

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """The maps (B, C, h, w) after the stages `indices`, and the last one.

        As in timm: an int takes the last n stages, None all. `norm` has nothing to act on. Raises
        ValueError for another format than NCHW.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt {output_fmt!r}; these are maps: 'NCHW'")
        wanted, deepest = feature_take_indices(len(self.stage_names), indices)
        x, maps = self._stem(x), []
        for number, stage in enumerate(self.stages):
            if stop_early and number > deepest:
                break
            x = self._stage(stage, x)
            if number in wanted:
                maps.append(x)
        return maps if intermediates_only else (x, maps)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages that the intermediates `indices` do not need; returns those kept."""
        wanted, deepest = feature_take_indices(len(self.stage_names), indices)
        for name in self.stage_names[deepest + 1 :]:
            delattr(self, name)
        self.stage_names = self.stage_names[: deepest + 1]
        if prune_head:
            self.linear = nn.Identity()
        return wanted


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: ResNetCifar) -> dict[str, Tensor]:
    """A released teacher under the model's names: out of {"state_dict": …}, without `module.`; of a
    PaCo wrapper the query encoder and `linear`."""
    del model
    state = unwrapped(state_dict)
    query = "encoder_q."
    if not any(name.startswith(query) for name in state):
        return state
    taken = {name: value for name, value in state.items() if name.startswith("linear.")}
    mine = {n.removeprefix(query): v for n, v in state.items() if n.startswith(query)}
    return taken | {n: v for n, v in mine.items() if not n.startswith(("fc.", "linear."))}


VARIANTS: dict[str, dict[str, Any]] = {
    f"resnet{depth}_cifar": {"depth": depth} for depth in (20, 32, 44, 56)
}
# Ours: one block a stage, for comparisons on small pictures and tests.
VARIANTS["resnet_micro_32"] = {"depth": 8}
default_cfgs = generate_default_cfgs({name: settings(32, "conv1", "linear") for name in VARIANTS})
register(__name__, ResNetCifar, VARIANTS, checkpoint_filter_fn, out_indices=(0, 1, 2))
