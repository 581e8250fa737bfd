# SPDX-License-Identifier: Apache-2.0
"""What a network does with one picture: functions and figures.

from crosspatch.explain import ablate, attribute, class_maps, dla, head_svd, importance, patch
from crosspatch.explain import record, rollout, shares
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from crosspatch.explain.attention import class_maps, rollout
    from crosspatch.explain.branches import shares
    from crosspatch.explain.circuits import attribute, dla
    from crosspatch.explain.patching import ablate, importance, patch, record
    from crosspatch.explain.subspace import head_svd

__all__ = [
    "ablate", "attribute", "class_maps", "dla", "head_svd", "importance", "patch", "record",
    "rollout", "shares",
]  # fmt: skip

_HOME = {
    "ablate": "patching",
    "attribute": "circuits",
    "class_maps": "attention",
    "dla": "circuits",
    "head_svd": "subspace",
    "importance": "patching",
    "patch": "patching",
    "record": "patching",
    "rollout": "attention",
    "shares": "branches",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'crosspatch.explain' has no attribute {name!r}")
    return getattr(importlib.import_module(f"crosspatch.explain.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
