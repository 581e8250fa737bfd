# SPDX-License-Identifier: Apache-2.0
"""The model of a run as an engine: torch itself, on the accelerator or the processor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch

from crosspatch.data.augment import normalise
from crosspatch.deploy.engines import Setting
from crosspatch.deploy.ties import is_tie
from crosspatch.errors import UsageError
from crosspatch.tasks import activate
from crosspatch.training.package import Trained


class TorchEngine:
    """A trained model in evaluation mode: uint8 pictures in, calibrated probabilities out.

    threads: set for the whole process, as torch has one number only; None leaves it. precision:
    fp32, or bf16 for products in bfloat16 (autocast). device: None for the accelerator where there
    is one. Raises UsageError for another precision.
    """

    def __init__(
        self,
        trained: Trained,
        threads: int | None = None,
        precision: str = "fp32",
        device: torch.device | str | None = None,
    ) -> None:
        if precision not in ("fp32", "bf16"):
            raise UsageError(
                f"{precision} asked of torch", "torch computes in fp32 or bf16", "--engine auto"
            )
        if threads is not None:
            torch.set_num_threads(threads)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.setting = Setting("torch", precision, torch.get_num_threads())
        self._model = trained.module.eval().to(self.device)
        self.reduction = trained.reduction
        self._temperature, self._task = trained.temperature, trained.task
        # the pictures that come have the model's size already: nothing is cut off them
        self._preprocess = replace(trained.preprocess, store=trained.preprocess.size)

    @torch.inference_mode()
    def run(self, images: np.ndarray) -> np.ndarray:
        """uint8 (B, H, W, 3) -> probabilities (B, K) float32."""
        return self._answer(self._inputs(images)).cpu().numpy()

    def is_tie(self, image: np.ndarray, found: np.ndarray, tolerance: float) -> bool:
        """Whether the probabilities `found` (K,) for a picture uint8 (H, W, 3) are this model's own
        once two tokens that score almost the same change places: see `deploy.ties`."""
        return is_tie(self._answer, self._inputs(image[None]), found, tolerance)

    def _inputs(self, images: np.ndarray) -> torch.Tensor:
        pixels = torch.from_numpy(np.require(images, requirements=["C", "W"])).to(self.device)
        return normalise(pixels, self._preprocess)

    def _answer(self, inputs: torch.Tensor) -> torch.Tensor:
        half = self.setting.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=half):
            logits = self._model(inputs)
        return activate(logits.float() / self._temperature, self._task)


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """torch computes with `count` threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
