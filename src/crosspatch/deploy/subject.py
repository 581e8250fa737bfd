# SPDX-License-Identifier: Apache-2.0
"""What `bench` measures: a model by its name, the folder of a run, or a bundle.

Weights do not matter for speed, so a model without a run is exported with random ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from crosspatch.data.preprocess import Preprocess
from crosspatch.deploy.bundle import Bundle, BundleInfo, read_bundle
from crosspatch.deploy.engines import available
from crosspatch.errors import CrosspatchError, DataError, UsageError
from crosspatch.processor import processor
from crosspatch.training.package import Trained, load_model, model_folder, read_config

MODEL = "crossvit_tiny_224"
ORDER = ("torch", "onnxruntime", "openvino")
"""The engines as they are listed; torch is what the others are compared with."""


class Subject(NamedTuple):
    """What is measured. trained: for torch, or None; bundles: for the other engines; reduction: of
    its tokens, "" without one."""

    name: str
    trained: Trained | None
    bundles: tuple[Bundle, ...]
    size: tuple[int, int]
    parameters: int
    macs: int
    reduction: str = ""

    def settings(self, engines: Sequence[str]) -> list[tuple[str, str, Bundle | None]]:
        """(engine, precision, its bundle) of all that can run here and is asked for."""
        precisions = ("fp32", "bf16") if "bf16" in processor().features else ("fp32",)
        found: list[tuple[str, str, Bundle | None]] = []
        if self.trained is not None:
            found += [("torch", precision, None) for precision in precisions]
        found += [(*one, bundle) for bundle in self.bundles for one in available(bundle)]
        asked = [one for one in found if one[0] in engines]
        return sorted(asked, key=lambda one: ORDER.index(one[0]))


def prepare(
    name: str,
    place: Path,
    engines: Sequence[str],
    remarks: list[str],
    *,
    size: int | tuple[int, int] | None = None,
    strict: bool = False,
) -> Subject:
    """Finds, loads and exports what is called `name`, into `place` (.onnx) and a file beside it.

    size: pixels, for models by name. remarks: gets a sentence for what cannot be exported; strict:
    that is an error when there is no bundle at all. Raises UsageError for what is not there,
    DataError for damaged runs and bundles.
    """
    path = Path(name)
    is_bundle = path.suffix in (".onnx", ".xml") and not path.is_dir()
    if size is not None and (is_bundle or path.is_dir()):
        raise UsageError(
            f"--size with {name}", "runs and bundles have a size of their own", "leave --size out"
        )
    if is_bundle:
        return _of_bundle(name, read_bundle(path))
    trained, architecture = _load(name, size)

    from crosspatch.deploy.export import bundle_info

    info = bundle_info(trained, architecture)
    bundles: tuple[Bundle, ...] = ()
    if set(engines) - {"torch"}:
        try:
            bundles = _exported(trained, info, place, remarks)
        except CrosspatchError as error:
            if strict:
                raise
            remarks.append(f"{name} runs in torch alone: {error.got}; {error.do}")
    figures = (trained.preprocess.size, info.parameters, info.macs, info.reduction)
    return Subject(name, trained, bundles, *figures)


def _load(name: str, size: int | tuple[int, int] | None) -> tuple[Trained, str]:
    """The model of a run, or one with random weights, and the name of its architecture."""
    path = Path(name)
    if path.is_dir():
        return load_model(path), read_config(model_folder(path))["architecture"]
    if path.exists() or len(path.parts) > 1:
        raise UsageError(
            f"{name} {'is a file' if path.exists() else 'does not exist'}",
            "the name of a model, the folder of a run, or a bundle .onnx or .xml",
            f"crosspatch bench {MODEL}",
        )
    return _untrained(name, size), name


def _of_bundle(name: str, bundle: Bundle) -> Subject:
    """The bundle alone, and torch too where it lies in the folder of its run."""
    run, info = bundle.path.parent, bundle.info
    trained = load_model(run) if (run / "model").is_dir() else None
    if trained is not None:
        parameters = sum(p.numel() for p in trained.module.parameters())
        same = (trained.classes, trained.preprocess, parameters, trained.reduction)
        if same != (info.classes, info.preprocess, info.parameters, info.reduction):
            trained = None  # the bundle of another run
    figures = (info.preprocess.size, info.parameters, info.macs, info.reduction)
    return Subject(name, trained, (bundle,), *figures)


def _untrained(name: str, size: int | tuple[int, int] | None) -> Trained:
    import torch

    from crosspatch.models.registry import create_model

    torch.manual_seed(0)
    module: Any = create_model(name, img_size=size).eval()
    side = size or tuple(module.pretrained_cfg["input_size"][-2:])
    classes = tuple(str(i) for i in range(module.num_classes))
    return Trained(module, classes, Preprocess.for_pictures(side), 1.0, 0)


def _exported(
    trained: Trained, info: BundleInfo, place: Path, remarks: list[str]
) -> tuple[Bundle, ...]:
    """The fp32 bundle, and the one with dynamic int8 where there is something to quantise."""
    from crosspatch.deploy.export import export_model
    from crosspatch.deploy.quantise import quantise_dynamic

    export_model(trained.module, place, info)
    small = place.with_stem(f"{place.stem}-int8")
    try:
        quantise_dynamic(place, small)
    except DataError as error:
        remarks.append(f"no int8 of {info.architecture}: {error.got}")
        return (read_bundle(place),)
    return read_bundle(place), read_bundle(small)
