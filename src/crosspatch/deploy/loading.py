# SPDX-License-Identifier: Apache-2.0
"""A run folder or a bundle becomes a `Predictor`; torch is imported for a run only.

p = crosspatch.load("runs/leaves")           # torch
p = crosspatch.load("runs/leaves/bundle.onnx")
p.predict(["a.jpg", array]).top(3)
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from crosspatch.deploy.bundle import Bundle, read_bundle
from crosspatch.deploy.choice import open_bundle
from crosspatch.deploy.predictor import Predictor
from crosspatch.errors import CrosspatchError, UsageError, near

MANY = 16  # pictures at once, for a choice by measuring where there are several

CHOICES = ("auto", "onnxruntime", "openvino", "openvino-bf16", "torch")
"""What `engine` may be. auto: torch for a run; for a bundle the fastest, measured once."""


def load(
    path: str | Path,
    *,
    engine: str = "auto",
    threads: int | None = None,
    device: str | None = None,
    batch: int = 1,
    size: tuple[int, int] | None = None,
) -> Predictor:
    """What a run folder or a bundle (.onnx, .xml) holds, ready to name pictures.

    engine: one of CHOICES; threads: None for a choice by measuring; device: torch's, for a run;
    batch: how many pictures will come at once (MANY for a pile), which the choice depends on.
    size: (height, width) that a run's model is to see instead of its own, where it takes others.
    Raises UsageError for a path that is neither and for what cannot be had here, DataError for
    damaged files.
    """
    path = Path(path)
    if engine not in CHOICES:
        raise UsageError(
            f"engine {engine!r}",
            f"the engines are {', '.join(CHOICES)}",
            f"--engine {near(engine, CHOICES, 1) or 'auto'}",
        )
    if threads is not None and threads < 1:
        raise UsageError(f"{threads} threads", "one thread or more", "leave the number out")
    if path.is_dir():
        return _load_run(path, engine, threads, device, size)
    if size is not None:
        raise UsageError(
            f"another size for the bundle {path}",
            "the folder of a run: a bundle has one size",
            "name the run, or leave --size out",
        )
    bundle = read_bundle(path)
    if device not in (None, "cpu"):
        raise UsageError(
            f"device {device!r} for {path}", "a bundle runs on the processor", "leave device out"
        )
    opened = open_bundle(bundle, engine, threads, batch)
    info = bundle.info
    told = {"thresholds": info.thresholds, "reduction": info.reduction}
    return Predictor(opened, info.classes, info.preprocess, info, **told)


def run_of(bundle: Bundle) -> Path | None:
    """The run folder that a bundle lies in, when its weights are those the bundle was made of."""
    folder = bundle.path.parent
    return folder if weights_hash(folder) == bundle.info.weights else None


def folder_of(run: str | Path) -> Path:
    """The folder of a run: the path itself, or the one that a bundle lies in and was made of.

    Raises UsageError for a bundle without its run, DataError for a damaged one.
    """
    path = Path(run)
    if path.suffix not in (".onnx", ".xml") or path.is_dir():
        return path
    home = run_of(read_bundle(path))
    if home is None:
        raise UsageError(
            f"the bundle {path} without its run",
            "a run, or a bundle in the folder of the run it was made of: a bundle answers with "
            "probabilities alone",
            "name the folder of the run",
        )
    return home


def model_of(run: Path, bundle: Bundle) -> bool:
    """Whether a run folder's model has the weights and the reduction that `bundle` was made of."""
    from crosspatch.tokens.spec import spelt
    from crosspatch.training.package import model_folder, read_config

    try:
        transforms = read_config(model_folder(run))["transforms"]
        return bundle.info.reduction == spelt(transforms) and (
            weights_hash(run) == bundle.info.weights
        )
    except (CrosspatchError, OSError, KeyError, TypeError, AttributeError):
        return False


def weights_hash(run: Path) -> str | None:
    """sha256 of a run's weights, None where it holds none."""
    path = run / "model" / "model.safetensors"
    path = path if path.is_file() else run / path.name
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _load_run(
    run: Path,
    engine: str,
    threads: int | None,
    device: str | None,
    size: tuple[int, int] | None,
) -> Predictor:
    if engine not in ("auto", "torch"):
        raise UsageError(
            f"engine {engine} for the run {run}",
            f"{engine.partition('-')[0]} runs a bundle; torch runs a run",
            f"crosspatch export {run} --to {'openvino' if 'openvino' in engine else 'onnx'}, "
            "then name the bundle",
        )
    from crosspatch.deploy.torch_engine import TorchEngine
    from crosspatch.training.package import load_model
    from crosspatch.training.sizes import at_size

    trained = load_model(run) if size is None else at_size(load_model(run), size)
    runner = TorchEngine(trained, threads, device=device)
    told = {"thresholds": trained.thresholds, "reduction": trained.reduction}
    return Predictor(runner, trained.classes, trained.preprocess, **told)
