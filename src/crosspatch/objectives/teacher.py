# SPDX-License-Identifier: Apache-2.0
"""A teacher: a trained network that is asked and never changed.

It is no part of the objective's module, so that its weights are neither saved with a run's state
nor averaged, decayed or sent between processes; it follows the pictures to their device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crosspatch.errors import DataError, UsageError


class Scale(NamedTuple):
    """How pictures are normalised: mean and std of each channel, of values in [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


class Teacher:
    """Answers for the pictures that a student sees, as they are augmented and mixed.

    module: normalised (B, 3, H, W) -> logits (B, K); size: what it takes, in pixels; own, student:
    how it and the student normalise; where: as the user named it; seen: (H, W) of the student's
    pictures (None: `size`); order: the teacher's column for each class of the student, () where
    they are the same, None where its classes are others and only its features can be learnt.
    """

    def __init__(
        self,
        module: nn.Module,
        size: tuple[int, int],
        own: Scale,
        student: Scale,
        where: str,
        *,
        seen: tuple[int, int] | None = None,
        order: tuple[int, ...] | None = (),
    ) -> None:
        self.module = module.eval().requires_grad_(False)
        self.size, self.own, self.student, self.where = size, own, student, where
        self.seen, self.order = seen or size, order

    @property
    def agrees(self) -> bool:
        """Whether it answers with the student's classes."""
        return self.order is not None

    def view(self, images: Tensor) -> Tensor:
        """A student's images (B, 3, H, W) as the teacher takes them: its normalisation, its size
        (bicubic)."""
        images = images.detach()
        if self.own != self.student:
            mine, theirs = (
                (images.new_tensor(s.mean)[:, None, None], images.new_tensor(s.std)[:, None, None])
                for s in (self.own, self.student)
            )
            images = (images * theirs[1] + theirs[0] - mine[0]) / mine[1]
        if tuple(images.shape[2:]) == self.size:
            return images
        return F.interpolate(images.float(), self.size, mode="bicubic", align_corners=False)

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) as the student sees them -> (B, K) float32, in the student's classes.

        Raises DataError where an answer is not finite.
        """
        answer = self.moved(images.device)(self.view(images))
        self.require_finite(answer)
        return self.arranged(answer)

    def arranged(self, answer: Tensor) -> Tensor:
        """The teacher's own logits as float32, in the order of the student's classes."""
        return (answer[:, list(self.order)] if self.order else answer).float()

    def require_finite(self, answer: Tensor) -> None:
        """Raises DataError where an answer is not finite."""
        if not answer.isfinite().all():
            raise DataError(
                f"the teacher {self.where} answers with numbers that are not finite",
                "a network whose training did not diverge",
                "name another --teacher",
            )

    def require_agreement(self) -> None:
        """Raises UsageError where its classes are not those of the student."""
        if not self.agrees:
            raise UsageError(
                f"the teacher {self.where} answers with other classes",
                "a teacher of the same classes, where answers are learnt",
                "train a teacher on these data first, or --distill scalekd, which learns features",
            )

    def moved(self, device: torch.device) -> nn.Module:
        """The network, on the device, in evaluation mode."""
        if next(self.module.parameters()).device != device:
            self.module.to(device)
        return self.module.eval()
