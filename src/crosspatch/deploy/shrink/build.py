# SPDX-License-Identifier: Apache-2.0
"""A candidate's network as bundles in the working folder: fp32, and int8 made of that."""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from crosspatch.deploy.bundle import KEY, Bundle, needed, read_bundle
from crosspatch.deploy.export import bundle_info, export_model
from crosspatch.deploy.loading import weights_hash
from crosspatch.deploy.place import place, workshop
from crosspatch.deploy.quantise import PICTURES, quantise_dynamic, quantise_static
from crosspatch.deploy.shrink.candidates import Candidate
from crosspatch.deploy.shrink.judge import CHUNK, Pictures, Run
from crosspatch.deploy.torch_engine import TorchEngine
from crosspatch.tasks import make_task
from crosspatch.training.package import Trained, model_folder, read_config

INT8 = ("int8-dynamic", "int8-static")


class Network:
    """One candidate's network: the model in memory while it is needed, its bundles on disk.

    folder: the working folder; run: where its weights lie; shown: the pictures that calibrate.
    """

    def __init__(self, candidate: Candidate, folder: Path, run: Path, shown: Pictures) -> None:
        self.candidate, self.folder, self.shown = candidate, folder, shown
        self.run = Path(candidate.run) if candidate.run else run
        self._trained: Trained | None = None

    @property
    def trained(self) -> Trained:
        """The model, with the temperature that the bundle has."""
        if self._trained is None:
            made = self.candidate.make()
            self._trained = self._calibrated(made) if self.candidate.calibrate else made
        return self._trained

    def torch(self) -> Run:
        """uint8 (B, H, W, 3) -> probabilities (B, K), in torch on the processor, at the run's own
        temperature, which changes no answer."""
        made = self._trained or self.candidate.make()
        return TorchEngine(made, device="cpu").run

    def bundle(self, precision: str = "fp32") -> Bundle:
        """The bundle in a precision, made where it is not there yet. Raises DataError for what
        cannot be exported or has nothing to quantise."""
        path = self._path(precision)
        if not path.is_file():
            if precision == "fp32":
                export_model(self.trained.module, path, self._info())
            else:
                self._quantise(precision, path)
        return read_bundle(path)

    def release(self) -> None:
        """Forget the model; its bundles stay."""
        self._trained = None

    def _path(self, precision: str) -> Path:
        name = re.sub(r"[^a-z0-9.]+", "-", self.candidate.name.lower()).strip("-")
        mark = hashlib.sha256(self.candidate.name.encode()).hexdigest()[:6]
        return self.folder / f"{name}-{mark}-{precision}.onnx"

    def _info(self) -> Any:
        folder = model_folder(self.run)
        name = str(read_config(folder)["architecture"])
        return bundle_info(self.trained, name, weights=weights_hash(folder) or "")

    def _quantise(self, precision: str, path: Path) -> None:
        whole = self.bundle("fp32").path
        with workshop(path) as shop:
            made = shop / "quantised.onnx"
            if precision == "int8-dynamic":
                quantise_dynamic(whole, made)
            else:
                quantise_static(whole, made, self._calibration())
            place(made, path)

    def _calibration(self) -> np.ndarray:
        """Up to 256 of the pictures, evenly taken."""
        count = len(self.shown)
        some = np.linspace(0, count - 1, min(count, PICTURES)).round().astype(int)
        return self.shown.images[some]

    def _calibrated(self, made: Trained) -> Trained:
        """With a temperature fitted on the validation pictures. Of several labels to a picture the
        run's stays: thresholds belong to it."""
        if made.task == "multilabel" or not len(self.shown):
            return made
        task = make_task(made.task, made.classes, made.thresholds)
        engine = TorchEngine(made._replace(temperature=1.0), device="cpu")
        images = self.shown.images
        chunks = [images[start : start + CHUNK] for start in range(0, len(images), CHUNK)]
        probs = np.concatenate([engine.run(chunk) for chunk in chunks])
        found = float(task.fit_temperature(probs, self.shown.labels))
        return made._replace(temperature=found, calibrated_on=len(images))


def written(bundle: Bundle, path: Path, accuracy: dict[str, Any] | None) -> int:
    """Put a bundle where the user wants it, with its accuracy in it; returns its bytes."""
    onnx = needed("onnx")
    with workshop(path) as shop:
        model = onnx.load_model(bundle.path)
        info = replace(bundle.info, accuracy=accuracy)
        onnx.helper.set_model_props(model, {KEY: info.to_json()})
        made = shop / "whole.onnx"
        made.write_bytes(model.SerializeToString())
        read_bundle(made)
        return place(made, path)
