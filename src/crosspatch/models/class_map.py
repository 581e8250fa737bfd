# SPDX-License-Identifier: Apache-2.0
"""A classifier at every place of its final feature map: dense logits of networks that were trained
to name a whole picture.

"All Tokens Matter: Token Labeling for Training Better Vision Transformers", Jiang et al., arXiv
2104.10858, NeurIPS 2021, section 3.2; "Re-labeling ImageNet", Yun et al., arXiv 2101.05022: the
last linear layer as a 1x1 convolution before the pooling. Where a head is linear behind an average,
the mean of the map is the network's own answer.

A ViT's head reads each patch token behind the final norm as it reads the class token; LV-ViT's
auxiliary head is made for them. Of a CrossViT the fine branch's patches go through its head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from crosspatch.errors import UsageError
from crosspatch.models.crossvit import CrossViT
from crosspatch.models.lvvit import LVViT
from crosspatch.models.vit import VisionTransformer


def class_map(model: nn.Module, x: Tensor) -> Tensor:
    """x (B, 3, H, W) -> logits (B, K, h, w) at every place of the model's final map.

    Raises UsageError for a model with fewer tokens than patches and for one whose classifier cannot
    be asked at a place.
    """
    if isinstance(model, CrossViT | VisionTransformer):
        return _of_tokens(model, x)
    features = model.forward_features(x) if hasattr(model, "forward_features") else None
    if not isinstance(features, Tensor) or features.ndim != 4 or not hasattr(model, "forward_head"):
        raise _refused(model, "its final features are no map that its head could be put on")
    width = getattr(model, "num_features", features.shape[1])
    last = getattr(model, "output_fmt", "NCHW") == "NHWC" or features.shape[1] != width
    places = features if last else features.permute(0, 2, 3, 1)
    count, rows, columns, wide = places.shape
    shape = (-1, 1, 1, wide) if last else (-1, wide, 1, 1)
    head: Any = model.forward_head
    try:
        logits = head(places.reshape(shape))
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
        raise _refused(model, f"its head takes no single place ({error})") from error
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != count * rows * columns:
        raise _refused(model, "its head gives no logits for a single place")
    return logits.view(count, rows, columns, -1).permute(0, 3, 1, 2)


def _of_tokens(model: Any, x: Tensor) -> Tensor:
    reducers = model.reducers if isinstance(model, CrossViT) else [model.reducer]
    if any(one is not None for one in reducers):
        raise _refused(model, "its tokens are reduced: not every patch has one")
    found: Any = model.run(model.embed(x))[0]
    state = found[0] if isinstance(model, CrossViT) else found
    if isinstance(model, CrossViT):
        logits = model.head[0](model.norm[0](state.patches))
    elif isinstance(model, LVViT) and model.aux_head is not None:
        logits = model.dense_logits(state)
    else:
        patches = model.norm(state.patches)
        logits = model.classify(patches if model.head_dist is None else (patches, patches))
    rows, columns = state.grid
    if logits.shape[1] != rows * columns:
        raise _refused(model, "its final tokens are no grid")
    return logits.transpose(1, 2).unflatten(2, (rows, columns))


def _refused(model: nn.Module, why: str) -> UsageError:
    return UsageError(
        f"a {type(model).__name__} gives no labels of places: {why}",
        "a ViT, LV-ViT or CrossViT without a token reduction, or a convolutional network of timm",
        "name another --teacher",
    )


def map_size(model: nn.Module, size: tuple[int, int]) -> tuple[int, int]:
    """(h, w) of `class_map` for pictures of `size`, from one empty picture.

    Raises UsageError as `class_map` does, and for a size that the model does not take.
    """
    where = next(model.parameters())
    try:
        with torch.no_grad():
            found = class_map(model, torch.zeros(1, 3, *size, device=where.device))
    except (RuntimeError, ValueError, AssertionError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(
            f"a {type(model).__name__} does not take pictures of {size[0]}x{size[1]} ({error})",
            "the size it was trained at; convolutional networks take others",
            "leave --size away",
        ) from error
    return found.shape[2], found.shape[3]
