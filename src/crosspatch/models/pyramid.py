# SPDX-License-Identifier: Apache-2.0
"""timm's contract for networks of stages, whatever is in a stage: what backbones do alike.

    x -> stem -> stages -> norm -> mean over the map -> norm_head -> drop -> head

A backbone builds `stem`, `stages` and one of the norms, tells their widths and strides, and has
everything that timm asks of a model: features, heads, intermediate maps, checkpointing, pruning.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import crosspatch._torchvision  # noqa: F401

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from crosspatch.layers.first_weights import init_linear
from crosspatch.layers.linear import Linear
from crosspatch.layers.patch_embed import pair

POOLS = ("avg", "max", "")


class Stage(nn.Module):
    """`downsample`, then `blocks` one after another; any state goes through."""

    def __init__(self, downsample: nn.Module | None, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.downsample = nn.Identity() if downsample is None else downsample
        self.blocks = nn.Sequential(*blocks)
        self.grad_checkpointing = False

    def forward(self, x: Any) -> Any:
        x = self.downsample(x)
        for block in self.blocks:
            x = run(block, x, self)
        return x


class NormedStage(Stage):
    """A stage with a norm at its end."""

    def __init__(
        self, downsample: nn.Module | None, blocks: Sequence[nn.Module], norm: nn.Module
    ) -> None:
        super().__init__(downsample, blocks)
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))


def run(block: nn.Module, x: Any, stage: Any) -> Any:
    """block(x), recomputed in the backward pass where `stage.grad_checkpointing` says so."""
    if stage.grad_checkpointing and stage.training and torch.is_grad_enabled():
        return torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
    return block(x)


class Pyramid(nn.Module):
    """A backbone of stages whose maps get smaller.

    A subclass sets `stem`, `stages` and, where there is one, `norm` or `norm_head`, and calls
    `finish` at the end of its constructor. `channels_last`: its maps are (B, H, W, C) inside; else
    (B, C, H, W). A stage may give something else than a map: then `to_map` says which map lies in
    it.
    """

    channels_last = False
    stem: nn.Module
    stages: nn.ModuleList
    norm: nn.Module
    norm_head: nn.Module

    def finish(
        self,
        widths: Sequence[int],
        strides: Sequence[int],
        *,
        img_size: int | tuple[int, int],
        in_chans: int,
        num_classes: int,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        head_init_scale: float = 1.0,
    ) -> None:
        """What is alike in all. widths, strides: of the map that each stage gives; img_size: what
        the network is described for; head_init_scale: multiplies the classifier's first weights.
        Raises ValueError for an unknown pooling."""
        _check_pool(global_pool)
        self.img_size, self.in_chans, self.num_classes = pair(img_size), in_chans, num_classes
        self.global_pool, self.drop_rate = global_pool, drop_rate
        self.num_features = self.head_hidden_size = widths[-1]
        self.output_fmt = "NHWC" if self.channels_last else "NCHW"
        self.grad_checkpointing = False
        self.feature_info = [
            {"module": f"stages.{i}", "num_chs": width, "reduction": stride}
            for i, (width, stride) in enumerate(zip(widths, strides, strict=True))
        ]
        self.head_init_scale = head_init_scale
        for name in ("norm", "norm_head"):
            if not hasattr(self, name):
                setattr(self, name, nn.Identity())
        self.head = self.make_head(num_classes)

    def make_head(self, num_classes: int) -> nn.Module:
        """Features (B, C) to logits; nothing for 0 classes."""
        if num_classes <= 0:
            return nn.Identity()
        head = Linear(self.head_hidden_size, num_classes)
        init_linear(head)
        with torch.no_grad():
            head.weight.mul_(self.head_init_scale)
        return head

    def to_map(self, x: Any) -> Tensor:
        """The map in what a stage gives."""
        return x

    def finished(self, x: Any) -> Tensor:
        """The normalised map in what the last stage gives."""
        return self.norm(self.to_map(x))

    # ------------------------------------------------------------------ forward

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) to the normalised map of the last stage, as `output_fmt` says."""
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return self.finished(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The map of `forward_features` to logits (B, K), or to what the classifier reads (B, C);
        with the pooling '' both are maps."""
        x = F.dropout(self.pool(x), self.drop_rate, self.training)
        if pre_logits:
            return x
        if x.ndim < 4 or self.channels_last:
            return self.head(x)
        return self.head(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def pool(self, x: Tensor) -> Tensor:
        """A map to features (B, C), normalised where the norm is behind the pooling; with the
        pooling '' to a map."""
        axes = (1, 2) if self.channels_last else (2, 3)
        if self.global_pool == "avg":
            return self.norm_head(x.mean(dim=axes))
        if self.global_pool == "max":
            return self.norm_head(x.amax(dim=axes))
        if self.channels_last:
            return self.norm_head(x)
        return self.norm_head(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, in_chans, H, W). Logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))

    # ------------------------------------------------------------------ timm's contract

    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head for `num_classes` (0: none), and another pooling if given. Raises ValueError
        for an unknown one."""
        if global_pool is not None:
            _check_pool(global_pool)
            self.global_pool = global_pool
        self.num_classes = num_classes
        self.head = self.make_head(num_classes).to(next(self.parameters()))

    def no_weight_decay(self) -> set[str]:
        """None by name: vectors are not decayed anyway."""
        return set()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that sort parameters by depth, for layer-wise rates."""
        fine = [
            (r"^stages\.(\d+)\.downsample", (0,)),
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^stages\.(\d+)", (99998,)),
            (r"^norm", (99999,)),
        ]
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else fine}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass instead of keeping their activations."""
        self.grad_checkpointing = enable
        for stage in self.stages:
            stage.grad_checkpointing = enable  # type: ignore[assignment]

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """The maps after the stages `indices`, (B, C, h, w) or "NHWC", and the final one.

        As in timm: an int takes the last n stages, None all; norm: the last map normalised. Raises
        ValueError for another format.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt {output_fmt!r}; expected NCHW or NHWC")
        count = len(self.stages)
        wanted, deepest = feature_take_indices(count, indices)
        x, maps = self.stem(x), []
        for number, stage in enumerate(self.stages):
            if stop_early and intermediates_only and number > deepest:
                break
            x = stage(x)
            if number in wanted:
                found = self.to_map(x)
                found = self.norm(found) if norm and number == count - 1 else found
                maps.append(self._formatted(found, output_fmt))
        return maps if intermediates_only else (self.finished(x), maps)

    def _formatted(self, x: Tensor, output_fmt: str) -> Tensor:
        if output_fmt == self.output_fmt:
            return x
        return x.permute(0, 3, 1, 2).contiguous() if self.channels_last else x.permute(0, 2, 3, 1)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages that the maps `indices` do not need; returns the indices kept."""
        wanted, deepest = feature_take_indices(len(self.stages), indices)
        if prune_norm or deepest + 1 < len(self.stages):
            self.norm, self.norm_head = nn.Identity(), nn.Identity()
        self.stages = self.stages[: deepest + 1]
        if prune_head:
            self.reset_classifier(0, "")
        return wanted


def _check_pool(global_pool: str) -> None:
    if global_pool not in POOLS:
        raise ValueError(f"global_pool {global_pool!r}; expected avg, max or ''")
