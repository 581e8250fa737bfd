# SPDX-License-Identifier: Apache-2.0
"""Training objectives: one paper, one file. An objective owns the model and says what is learnt."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from crosspatch.objectives.teacher import Teacher


class Inputs(NamedTuple):
    """One training batch as an objective sees it.

    images: (B, 3, H, W) float, normalised and augmented; labels: (B,) int64, or (B, K) float32, 0
    or 1, where a picture may have several; draw: (seed, step, rank), from which every random draw
    of the step is made; scale: what a sum over the batch is multiplied with (world / n_global, so
    that the mean over ranks equals one process); index: (B,) int64, places of the pictures in the
    training set; warp: (B, 2, 3), where a point of the augmented picture lies in the stored one,
    both in [-1, 1] (`data.augment.Steering`), or None where no objective reads it; views: the same
    pictures at the further sizes of the recipe, each augmented for itself, (B, 3, H_i, W_i); items:
    (B,) int64, places of the pictures in the source that the training set was taken from.
    """

    images: Tensor
    labels: Tensor
    draw: tuple[int, int, int]
    scale: float
    index: Tensor | None = None
    warp: Tensor | None = None
    views: tuple[Tensor, ...] = ()
    items: Tensor | None = None


class Given(NamedTuple):
    """What an objective is built with besides the model, its task and the rules for labels.

    options: its own, as they were typed; counts: (K,) training pictures of each class, () where
    they are not known; teacher: the network that it learns from, or None; labels: the file of token
    labels and its sha256, {} without one.
    """

    options: dict[str, Any] = {}  # noqa: RUF012 - never written to
    counts: tuple[int, ...] = ()
    teacher: Teacher | None = None
    labels: dict[str, str] = {}  # noqa: RUF012


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
