# SPDX-License-Identifier: Apache-2.0
"""The names of SpectFormer's authors, of arguments and of weights, and ours for them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_NAMES = {
    "drop_rate": "proj_drop_rate", "token_label": "aux_head", "stem_hidden_dim": "stem_width",
}  # fmt: skip
_IGNORED = ("sr_ratios", "num_stages", "pretrained", "qk_scale")


def ours(build: Mapping[str, Any]) -> dict[str, Any]:
    """The authors' arguments under our names."""
    return {_NAMES.get(n, n): value for n, value in build.items() if n not in _IGNORED}


def joined(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """q and kv of an attention as one qkv."""
    joined = {}
    for name, value in state.items():
        if ".attn.kv." in name:
            query = state.get(name.replace(".kv.", ".q."))
            value = value if query is None else torch.cat([query, value])
            joined[name.replace(".kv.", ".qkv.")] = value
        elif ".attn.q." not in name or name.replace(".q.", ".kv.") not in state:
            joined[name] = value
    return joined


def renamed(name: str, stages: int) -> str:
    """An entry of the hierarchical family under our name; `stages`: how many there are."""
    found = re.match(r"(patch_embed|block|norm)(\d+)\.(.*)", name)
    if found is None:
        return name
    kind, stage, rest = found[1], int(found[2]), found[3]
    if kind == "patch_embed" and stage == 1:
        return f"stem.{rest}"
    if kind == "norm" and stage == stages:
        return f"norm_head.{rest}"
    place = {"patch_embed": "downsample", "block": "blocks", "norm": "norm"}[kind]
    return f"stages.{stage - 1}.{place}.{rest.replace('dwconv.dwconv', 'dwconv')}"
