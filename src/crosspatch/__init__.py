# SPDX-License-Identifier: Apache-2.0
"""Crosspatch: train, shrink and ship vision transformers on your own images.

    import crosspatch as xp
    xp.list_models("crossvit*")
    model = xp.create_model("crossvit_9_dagger_224", num_classes=10, img_size=96)
    xp.load_released(model, state_dict)
    reduced, saved = xp.reduce(model, "mctf", r=16)
    xp.load("runs/leaves").predict(["a.jpg", array]).top(3)

Importing the package costs nothing: torch is loaded by the first name that needs it.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from crosspatch.deploy.loading import load
    from crosspatch.deploy.tune import tune
    from crosspatch.models.registry import create_model, list_models, load_released
    from crosspatch.tokens.reduce import reduce

__version__ = "0.1.0.dev0"
__all__ = ["__version__", "create_model", "list_models", "load", "load_released", "reduce", "tune"]

# OpenMP threads spin while they wait; with another job on the cores that costs more than it saves.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

_HOME = {
    "create_model": "crosspatch.models.registry",
    "list_models": "crosspatch.models.registry",
    "load": "crosspatch.deploy.loading",
    "load_released": "crosspatch.models.registry",
    "reduce": "crosspatch.tokens.reduce",
    "tune": "crosspatch.deploy.tune",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'crosspatch' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
