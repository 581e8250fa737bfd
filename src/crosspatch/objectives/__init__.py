# SPDX-License-Identifier: Apache-2.0
"""Training objectives: one paper, one file. An objective owns the model and says what is learnt."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn


class Inputs(NamedTuple):
    """One training batch as an objective sees it.

    images: (B, 3, H, W) float, normalised and augmented; labels: (B,) int64, or (B, K) float32, 0
    or 1, where a picture may have several; draw: (seed, step, rank), from which every random draw
    of the step is made; scale: what a sum over the batch is multiplied with (world / n_global, so
    that the mean over ranks equals one process).
    """

    images: Tensor
    labels: Tensor
    draw: tuple[int, int, int]
    scale: float


class Objective(Protocol):
    """The seam: a module that owns the model, its teacher, extra heads and their schedule."""

    def __call__(self, inputs: Inputs, progress: float) -> dict[str, Any]:
        """{"loss": scalar to be minimised, "parts": {name: scalar}}; progress runs from 0 to 1."""
        ...

    @property
    def task(self) -> Any:
        """The task whose figures judge the model, such as `tasks.classify.Classify`."""
        ...

    @property
    def exported(self) -> nn.Module:
        """The module that is evaluated, saved and shipped."""
        ...

    @property
    def averaged(self) -> nn.Module:
        """The module whose moving average is kept; it has the exported one's tensors."""
        ...

    def no_decay(self) -> set[str]:
        """Names of this objective's parameters that are not decayed."""
        ...
