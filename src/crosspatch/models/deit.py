# SPDX-License-Identifier: Apache-2.0
"""DeiT: the plain vision transformer at patch 16, and the same with a distillation token.

"Training data-efficient image transformers & distillation through attention", Touvron et al., arXiv
2012.12877, ICML 2021. The network is the trunk, `models/vit.py`; these are its named sizes, in the
authors' checkpoint layout. The names are timm's too, which keeps its own; there the distilled class
is another, here it is one option.

Expected (M parameters, GMACs): Ti 5.72, 1.25; S 22.05, 4.60; B 86.57, 17.56; B at 384 86.86, 55.48;
distilled Ti 5.91, S 22.44, B 87.34, B at 384 87.63.

`deit_lt_*` are the students of "DeiT-LT", arXiv 2404.02900: the distilled networks, whose positions
are resized to another grid with DINO's scale (h + 0.1) / 14, as the authors' code does at load and
on the way. The authors' own patch embedding works at the base width alone; here at all.
"""

from __future__ import annotations

from typing import Any

import crosspatch._torchvision  # noqa: F401

from timm.models import generate_default_cfgs

from crosspatch.models.registry import register, settings
from crosspatch.models.vit import VisionTransformer, checkpoint_filter_fn


def _variant(width: int, heads: int, side: int = 224, **more: Any) -> dict[str, Any]:
    return {"embed_dim": width, "num_heads": heads, "img_size": side, **more}


PLAIN = {
    "deit_tiny_patch16_224": _variant(192, 3),
    "deit_small_patch16_224": _variant(384, 6),
    "deit_base_patch16_224": _variant(768, 12),
    "deit_base_patch16_384": _variant(768, 12, 384),
}
DISTILLED = {
    name.replace("_patch16", "_distilled_patch16"): {**arguments, "dist_token": True}
    for name, arguments in PLAIN.items()
}
LONG_TAIL = {
    name.replace("deit_", "deit_lt_"): {**arguments, "pos_margin": 0.1}
    for name, arguments in DISTILLED.items()
    if name.endswith("224")
}
# Ours: one branch with the multiply-adds of crossvit_micro_32, for comparisons on small pictures.
SMALL = {
    "vit_micro_32": {
        "img_size": 32,
        "patch_size": 4,
        "stem": "conv",
        "embed_dim": 64,
        "depth": 4,
        "num_heads": 2,
        "mlp_ratio": 2.0,
    }
}
SMALL["deit_micro_distilled_32"] = {**SMALL["vit_micro_32"], "dist_token": True}
HEADS = ("head", "head_dist")
default_cfgs = generate_default_cfgs(
    {
        "vit_micro_32": settings(32, "patch_embed.proj.0", "head"),
        "deit_micro_distilled_32": settings(32, "patch_embed.proj.0", HEADS),
        **{name: settings(224, "patch_embed.proj", HEADS) for name in LONG_TAIL},
    }
)
register(
    __name__, VisionTransformer, PLAIN | DISTILLED | LONG_TAIL, checkpoint_filter_fn, out_indices=3
)
register(__name__, VisionTransformer, SMALL, checkpoint_filter_fn, out_indices=3)
