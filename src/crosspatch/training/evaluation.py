# SPDX-License-Identifier: Apache-2.0
"""Evaluation: probabilities of a whole image set, and the figures made of them."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable

import torch
from torch import nn

from crosspatch.data.augment import normalise
from crosspatch.data.loading import eval_batches
from crosspatch.data.prepare import ImageSet
from crosspatch.training import team
from crosspatch.training.signals import Stopped

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """The autocast context of a precision name; nothing for fp32."""
    if precision not in AUTOCAST:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=AUTOCAST[precision])


def softmax(logits: torch.Tensor) -> torch.Tensor:
    """logits (B, K) -> probabilities (B, K) float32 of one class to a picture."""
    return torch.softmax(logits.float(), dim=-1)


@torch.inference_mode()
def predict_probabilities(
    model: nn.Module,
    images: ImageSet,
    batch: int = 256,
    *,
    device: torch.device | str | None = None,
    precision: str = "fp32",
    workers: int = 0,
    probabilities: Callable[[torch.Tensor], torch.Tensor] = softmax,
    progress: Callable[[int, int], None] | None = None,
    stop: Callable[[], bool] | None = None,
    shared: bool = False,
) -> torch.Tensor:
    """Probabilities (N, K) on the CPU, in the order of `images`.

    probabilities: logits (B, K) -> those, as the task makes them. The model is put into eval mode
    and back. `stop` is asked between batches; when it answers true, `Stopped` is raised. shared:
    the processes of the team have each a part of the pictures, and all get all of the answer.
    Raises ValueError when `images` is empty.
    """
    if len(images) == 0:
        raise ValueError("there is no picture to evaluate")
    shared = shared and len(images) >= team.size()
    world, rank = (team.size(), team.rank()) if shared else (1, 0)
    width = max(1, batch // world) * world
    where = torch.device(device) if device is not None else next(model.parameters()).device
    training, found = model.training, []
    model.eval()
    parts = eval_batches(images, width, rank=rank, world=world, workers=workers)
    try:
        for start in range(0, len(images), width):
            if stop is not None and stop():
                raise Stopped
            for part in itertools.islice(parts, 1):  # none where the last batch is too small
                pixels = normalise(part.images.to(where, non_blocking=True), images.preprocess)
                with autocast(where, precision):
                    logits = model(pixels)
                found.append(probabilities(logits))
            if progress is not None:
                progress(min(start + width, len(images)), len(images))
    finally:
        model.train(training)
    rows = torch.cat(found).cpu()
    return team.interleaved(rows, len(images)) if shared else rows
