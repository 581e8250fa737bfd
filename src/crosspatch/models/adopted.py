# SPDX-License-Identifier: Apache-2.0
"""What a network of timm lacks to be one of ours: the rest of the contract, and quick products.

A thin file derives its class from `Adopted` and from timm's class, in this order, and calls `adopt`
at the end of its constructor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import crosspatch._torchvision  # noqa: F401

from timm.models._features import feature_take_indices
from torch import Tensor, nn

from crosspatch.layers.linear import Linear
from crosspatch.layers.patch_embed import pair


def quick_linears(model: nn.Module) -> None:
    """Send the products of every plain `nn.Linear` in `model` through `layers/linear.py`."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear


def last_norm(state: dict[str, Tensor], name: str) -> None:
    """Where a detector's weights lack the norm `name`, add it: that of its last stage."""
    norms = sorted(
        key for key in state if key.startswith("stage_norms.") and key.endswith("weight")
    )
    if norms and f"{name}.weight" not in state:
        last = norms[-1].removesuffix("weight")
        state |= {f"{name}.{kind}": state[last + kind] for kind in ("weight", "bias")}


class Adopted(nn.Module):
    """The part of the contract that timm's networks of stages leave open.

    stage_norms: a norm for the map of every stage, as dense prediction reads them.
    """

    img_size: tuple[int, int]
    output_fmt: str
    stage_norms: nn.ModuleList | None

    def adopt(
        self,
        img_size: int | tuple[int, int],
        output_fmt: str = "NCHW",
        stage_norms: Sequence[nn.Module] = (),
    ) -> None:
        """img_size: what the network is described for; output_fmt: of `forward_features`."""
        self.img_size, self.output_fmt = pair(img_size), output_fmt
        self.stage_norms = nn.ModuleList(stage_norms) if stage_norms else None
        quick_linears(self)

    def no_weight_decay(self) -> set[str]:
        """None by name: vectors are not decayed anyway."""
        return set()

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

        As in timm: an int takes the last n stages, None all; norm: the last map normalised. With
        `stage_norms` every map is, always. Raises ValueError for another format.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt {output_fmt!r}; expected NCHW or NHWC")
        timms: Any = super()
        found = timms.forward_intermediates(
            x, indices, norm and self.stage_norms is None, stop_early, "NCHW", intermediates_only
        )
        maps = found if intermediates_only else found[1]
        if self.stage_norms is not None:
            norms = [self.stage_norms[i] for i in self._taken(indices)]
            maps = [stage_norm(one) for stage_norm, one in zip(norms, maps, strict=True)]
        if output_fmt == "NHWC":
            maps = [one.permute(0, 2, 3, 1) for one in maps]
        return maps if intermediates_only else (found[0], maps)

    def _taken(self, indices: int | list[int] | None) -> list[int]:
        return feature_take_indices(len(self.stage_norms or ()), indices)[0]

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages that the maps `indices` do not need; returns the indices kept."""
        timms: Any = super()
        wanted = timms.prune_intermediate_layers(indices, prune_norm, prune_head)
        if self.stage_norms is not None:
            self.stage_norms = self.stage_norms[: max(wanted) + 1]
        return wanted
