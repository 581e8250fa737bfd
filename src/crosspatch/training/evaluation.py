# SPDX-License-Identifier: Apache-2.0
"""Evaluation: probabilities of a whole image set, and the figures made of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import nn

from crosspatch.data.augment import normalise
from crosspatch.data.loading import eval_batches
from crosspatch.data.prepare import ImageSet

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Stopped(Exception):
    """The caller's `stop` asked to end an evaluation early."""


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
) -> torch.Tensor:
    """Probabilities (N, K) on the CPU, in the order of `images`.

    probabilities: logits (B, K) -> those, as the task makes them. The model is put into eval mode
    and back. `stop` is asked between batches; when it answers true, `Stopped` is raised. Raises
    ValueError when `images` is empty.
    """
    if len(images) == 0:
        raise ValueError("there is no picture to evaluate")
    where = torch.device(device) if device is not None else next(model.parameters()).device
    training, found, done = model.training, [], 0
    model.eval()
    try:
        for part in eval_batches(images, batch, workers=workers):
            if stop is not None and stop():
                raise Stopped
            pixels = normalise(part.images.to(where, non_blocking=True), images.preprocess)
            with autocast(where, precision):
                logits = model(pixels)
            found.append(probabilities(logits))
            done += len(part.labels)
            if progress is not None:
                progress(done, len(images))
    finally:
        model.train(training)
    return torch.cat(found).cpu()
