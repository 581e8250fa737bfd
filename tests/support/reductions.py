"""One row per token-reduction method: how the laws are tried on it, and which of them hold.

The laws themselves stand in tests/tokens/test_laws.py; the table in docs/tokens.md is checked
against these rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import nn

import crosspatch as xp
from crosspatch.models.vit import VisionTransformer


class Case(NamedTuple):
    """options: of the method on the tiny host (6 blocks, 16 patches, a class token). nothing:
    options that must change no bit of the output, or None where the method has no such. host:
    arguments of the tiny host that this method wants. merges: sizes sum to the number of tokens.
    prefix: the prefix tokens are there after every block, in their places. permutes: shuffling
    patches together with their positions changes nothing. restores: after the last block `source`
    names a token for every patch. trains_only: evaluation is untouched. parameters: it adds some.
    """

    options: dict[str, Any]
    nothing: dict[str, Any] | None
    host: Mapping[str, Any] = MappingProxyType({})
    merges: bool = False
    prefix: bool = True
    permutes: bool = False
    restores: bool = True
    trains_only: bool = False
    parameters: bool = False


CASES: dict[str, Case] = {
    "mctf": Case({"r": 2}, {"r": 0}, merges=True),
    "tome": Case({"r": 2}, {"r": 0}, merges=True),
    "evovit": Case({}, {"keep": 1}, permutes=True),
    "patch-drop": Case({}, {"rate": 0}, permutes=True, restores=False, trains_only=True),
    "stvit": Case({"tokens": 4}, None, parameters=True),
    "psvit": Case({"pool": [1]}, {"share": [], "pool": []}),
    "dcal": Case(
        {"ratio": 0.3, "feature": "mean"}, {"branch": "sa"}, permutes=True, parameters=True
    ),
}


def tiny_host(**arguments: Any) -> VisionTransformer:
    """A ViT of 6 blocks on 4 x 4 patches, seeded, with weights large enough to attend unevenly."""
    torch.manual_seed(0)
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 6, "num_heads": 3}
    model = VisionTransformer(**{**shape, "num_classes": 5, **arguments})
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    return model.eval()


def tiny_crossvit() -> nn.Module:
    """A CrossViT of two encoders with a block in the fine branch and two in the coarse one."""
    torch.manual_seed(0)
    model = xp.create_model("crossvit_micro_32", num_classes=5, depth=((1, 2, 0),) * 2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    return model.eval()


def pictures(count: int = 3, side: int = 32, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))
