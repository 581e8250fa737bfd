"""Every kind of network that can be taken apart, tiny, with weights large enough to matter."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

import crosspatch as xp
from crosspatch.layers.block import BlockSpec
from crosspatch.layers.stage import StageSpec
from crosspatch.models.vit import VisionTransformer


def _shaken(model: nn.Module) -> nn.Module:
    """Weights that attend unevenly, and no bias or scale that is 0 or 1."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 2:
                parameter.mul_(4)
            elif parameter.ndim == 1:
                parameter.add_(0.2 * noise)
    return model.eval()


def trunk(**arguments) -> nn.Module:
    torch.manual_seed(0)
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3}
    return _shaken(VisionTransformer(**{**shape, "num_classes": 5, **arguments}))


def named(name: str, **arguments) -> nn.Module:
    torch.manual_seed(0)
    return _shaken(xp.create_model(name, num_classes=5, **arguments))


def crossvit(**arguments) -> nn.Module:
    return named("crossvit_micro_32", **{"depth": ((1, 2, 0), (1, 1, 0)), **arguments})


SPEC = BlockSpec(3, 24, 24, 48)
THREE = {
    "patch_size": (4, 8, 8), "embed_dim": (12, 24, 24), "num_heads": (2, 2, 3),
    "mlp_ratio": (2.0,) * 3, "depth": ((1, 1, 1, 0),) * 2, "scales": (1.0,) * 3,
}  # fmt: skip
MODELS: dict[str, Callable[[], nn.Module]] = {
    "vit": trunk,
    "vit avg": lambda: trunk(global_pool="avg"),
    "vit max": lambda: trunk(global_pool="max"),
    "vit avg, norm before": lambda: trunk(global_pool="avg", fc_norm=False),
    "vit without class token": lambda: trunk(global_pool="avg", class_token=False),
    "vit with registers": lambda: trunk(reg_tokens=2, no_embed_class=True),
    "vit with QK norm and LayerScale": lambda: trunk(qk_norm=True, init_values=0.5),
    "vit with a norm first": lambda: trunk(pre_norm=True),
    "vit without biases": lambda: trunk(qkv_bias=False, proj_bias=False),
    "vit without a final norm": lambda: trunk(final_norm=False),
    "vit without positions": lambda: trunk(pos_embed="none"),
    "vit of uneven blocks": lambda: trunk(
        stages=(
            StageSpec(24, (SPEC, BlockSpec(3, 24, 24, 0, shares=0), BlockSpec(0, 0, 0, 48))),
            StageSpec(30, (BlockSpec(2, 16, 20, 30), BlockSpec(1, 8, 8, 8, exists=False)), 2),
        )
    ),
    "deit distilled": lambda: named("deit_micro_distilled_32"),
    "vit_micro_32": lambda: named("vit_micro_32"),
    "timm vit": lambda: _shaken(_timm()),
    "lvvit": lambda: named("lvvit_micro_32"),
    "lvvit without dense head": lambda: named("lvvit_micro_32", aux_head=False),
    "resformer": lambda: named("resformer_micro_32"),
    "crossvit": crossvit,
    "crossvit avg": lambda: crossvit(global_pool="avg"),
    "crossvit class_token": lambda: crossvit(fusion="class_token"),
    "crossvit all": lambda: crossvit(fusion="all"),
    "crossvit none": lambda: crossvit(fusion="none"),
    "crossvit deep fusion": lambda: crossvit(depth=((1, 1, 2), (0, 1, 1))),
    "crossvit of three": lambda: crossvit(**THREE),
}


def _timm() -> nn.Module:
    import timm

    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", num_classes=5, **shape)


def pictures(count: int = 3, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
