# SPDX-License-Identifier: Apache-2.0
"""Lets torchvision be imported beside a CPU-only build of torch.

torchvision's wheel is compiled against the CUDA build. Beside a CPU-only torch its `_C` library
does not load, and the import then stops at operators that nobody declared (`nms`, and `qnms` of
newer releases). Only torchvision's Python part is used here, and timm and torchmetrics import it
too, so the missing operators are declared, without an implementation. Where the library loads,
nothing is done.

Every module of this package that imports torchvision, timm or torchmetrics imports this one first;
as loader workers unpickle a class of ours before anything else, it holds there as well.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch

_declared: list[torch.library.Library] = []  # a Library that is collected takes its operators along


def declare_missing_operators() -> list[str]:
    """Declare what torchvision's import needs and cannot load; returns the names declared."""
    spec = find_spec("torchvision")
    if spec is None or spec.origin is None or _declared:
        return []
    try:
        for library in Path(spec.origin).parent.glob("_C*.so"):
            torch.ops.load_library(str(library))
        missing = []
    except OSError:
        missing = ["nms", "qnms"]
    missing = [name for name in missing if not hasattr(torch.ops.torchvision, name)]
    if missing:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in missing:
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared.append(library)
    return missing


declare_missing_operators()
