# SPDX-License-Identifier: Apache-2.0
"""The names that the authors of the compact transformers give, and the arguments behind them."""

from __future__ import annotations

import re
from typing import Any

OURS = {  # of the authors' arguments, ours
    "embedding_dim": "embed_dim",
    "n_input_channels": "in_chans",
    "num_layers": "depth",
    "attention_dropout": "attn_drop_rate",
    "stochastic_depth": "drop_path_rate",
}
_PLAIN = {"embed_dim": 768, "depth": 14, "num_heads": 6, "mlp_ratio": 4.0}
CLASSES: dict[str, dict[str, Any]] = {  # their defaults
    "CCT": {**_PLAIN, "n_conv_layers": 1, "kernel_size": 7, "stride": 2, "padding": 3},
    "CVT": {**_PLAIN, "n_conv_layers": 0, "kernel_size": 16},
    "ViTLite": {**_PLAIN, "n_conv_layers": 0, "kernel_size": 16, "seq_pool": False},
}
_WIDTHS = {2: (128, 2, 1), 4: (128, 2, 1), 6: (256, 4, 2), 7: (256, 4, 2), 8: (256, 4, 2)}
_WIDTHS |= {14: (384, 6, 3)}  # embed_dim, num_heads, mlp_ratio by depth
_NAME = re.compile(r"(vit|cvt|cct)_(\d+)_(\d+)(?:x(\d+))?_(\d+)(_sine)?(_c100|_fl)?")
_SETS = {"_c100": 100, "_fl": 102}


def shape_of(name: str) -> dict[str, Any]:
    """Constructor arguments of a model by the authors' name, such as cct_7_3x1_32_sine. Raises
    ValueError for another name."""
    found = _NAME.fullmatch(name)
    if not found or int(found[2]) not in _WIDTHS or (found[1] == "cct") != bool(found[4]):
        raise ValueError(
            f"{name!r}; expected a name such as cct_7_3x1_32, cvt_7_4_32 or vit_2_4_32"
        )
    family, depth, kernel, layers, side, sine, classes = found.groups()
    width, heads, ratio = _WIDTHS[int(depth)]
    usual = {"32": 10, "224": 102 if depth == "7" else 1000}.get(side, 1000)
    return {
        "img_size": int(side),
        "num_classes": _SETS.get(classes, usual),
        "embed_dim": width,
        "depth": int(depth),
        "num_heads": heads,
        "mlp_ratio": float(ratio),
        "n_conv_layers": int(layers or 0),
        "kernel_size": int(kernel),
        "seq_pool": family != "vit",
        "positional_embedding": "sine" if sine else "learnable",
    }


_AT_32 = [
    *(f"{family}_{depth}_4_32" for family in ("vit", "cvt") for depth in (2, 4, 6, 7)),
    *(f"cct_{shape}_32" for shape in ("2_3x2", "4_3x2", "6_3x1", "6_3x2", "7_3x1", "7_3x2")),
]
NAMES = [
    *_AT_32,
    *(f"{name}_sine" for name in _AT_32),
    *("cct_7_3x1_32_c100", "cct_7_3x1_32_sine_c100"),
    *("cct_7_7x2_224", "cct_7_7x2_224_sine"),
    *("cct_14_7x2_224", "cct_14_7x2_384", "cct_14_7x2_384_fl"),
]
