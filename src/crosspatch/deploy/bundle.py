# SPDX-License-Identifier: Apache-2.0
"""What a bundle says of itself: one JSON object in the model file, read before any engine sees it.

A bundle is one ONNX file, or the pair of files that OpenVINO writes. Its graph takes uint8 RGB
pictures (B, H, W, 3) of the model's size and gives calibrated probabilities (B, K) float32. This
module does not import torch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from crosspatch.data import jsons
from crosspatch.data.preprocess import Preprocess
from crosspatch.deploy.limits import Refused
from crosspatch.errors import DataError, UsageError

SCHEMAS = {"classify": 1, "multilabel": 2}
"""Of the description, by task: a reader of schema 1 alone would name one class of a picture that
has several."""
SCHEMA = max(SCHEMAS.values())
KEY = "crosspatch"
"""The entry of the model file's metadata that holds the JSON object."""
INPUT, OUTPUT, PATCHES = "image", "probabilities", "patches"
PRECISIONS = ("fp32", "int8-dynamic", "int8-static")
INSTALL = {
    "onnx": "pip install 'crosspatch[onnx]'",
    "onnxruntime": "pip install 'crosspatch[onnx]'",
    "onnxscript": "pip install 'crosspatch[onnx]'",
    "openvino": "pip install 'crosspatch[openvino]'",
}
DECODING = {
    "orientation": "turned upright as its EXIF entry says",
    "grey": "the one channel is used for red, green and blue",
    "16-bit": "divided by the full scale of the fewest bits (8, 10, 12, 14, 16) that hold it",
    "cmyk": "converted to RGB without a profile",
    "transparency": "laid over white",
    "channels": "RGB",
}
"""How a picture file becomes RGB pixels, in words; `crosspatch.data.decode` does it."""
LARGEST = 8192  # pixels a side that a bundle may ask for: a stranger's must not eat the memory
SURE = 0.95  # of the answers from the confidence `sure` on are right
CHECKS = 2  # pictures made by a formula, whose probabilities stand in the bundle
CANDIDATES = 12  # of such pictures, that those are chosen from where tokens are reduced
LONGEST = 4000  # letters in a name, such as that of a reduction
LARGEST_TEXT = 8 << 20  # letters of a description


@dataclass(frozen=True, kw_only=True)
class BundleInfo:
    """Everything that a bundle says of itself.

    classes: names in the order of the probabilities; preprocess: how a picture becomes the input;
    temperature: what the logits are divided by, fitted on `calibrated_on` validation pictures (0:
    not fitted); accuracy: {split, images, accuracy, low, high} of the run, and of multilabel map,
    map_low, map_high, or None; weights: sha256 of the run's model.safetensors; check: what torch
    gave for `check_pictures`, (CHECKS, K); task: out of SCHEMAS; thresholds: (K,) of multilabel, a
    picture has the classes whose probability is not below theirs, else (); reduction: of tokens, as
    `tokens.spec.spell` writes it, "" without one; checks: numbers of the check pictures of a
    reduced model (see `deploy.ties`), () for the first ones; explains: whether the graph has a
    second output, scores of the patches (B, rows, columns) (see `deploy.patch_scores`); sure: the
    confidence from which SURE of the run's validation pictures were named rightly, None where too
    few are to tell or a picture may have several labels. A field that says nothing is not written,
    and a version of crosspatch that does not know one of the others refuses the bundle by its name.
    """

    classes: tuple[str, ...]
    preprocess: Preprocess
    architecture: str
    parameters: int
    macs: int
    weights: str
    precision: str = "fp32"
    temperature: float = 1.0
    calibrated_on: int = 0
    accuracy: dict[str, Any] | None = None
    check: tuple[tuple[float, ...], ...] = ()
    versions: dict[str, str] = field(default_factory=dict)
    decoding: dict[str, str] = field(default_factory=lambda: dict(DECODING))
    task: str = "classify"
    thresholds: tuple[float, ...] = ()
    reduction: str = ""
    checks: tuple[int, ...] = ()
    explains: bool = False
    sure: float | None = None

    @property
    def check_pictures(self) -> np.ndarray:
        """The pictures (n, H, W, 3) uint8 that `check` has torch's answers to."""
        numbers = list(self.checks or range(len(self.check)))
        return check_pictures(self.preprocess.size, max(numbers, default=-1) + 1)[numbers]

    @property
    def schema(self) -> int:
        """What a reader has to know at least."""
        return SCHEMAS[self.task]

    def to_json(self) -> str:
        """One JSON object; the inverse of `from_json`."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for name in ("thresholds", "reduction", "checks", "explains", "sure"):
            if not plain[name]:
                del plain[name]  # older readers know no such thing
        plain |= {"preprocess": self.preprocess.to_dict(), "schema": self.schema}
        return json.dumps(plain, allow_nan=False)

    @classmethod
    def from_json(cls, text: str, name: str = "the bundle") -> BundleInfo:
        """Reads and checks it. Raises DataError for another schema and for what makes no sense."""
        advice = "export the run again with this version of crosspatch"
        try:
            if len(text) > LARGEST_TEXT:
                raise ValueError(f"it has {len(text):,} letters")
            given = jsons.parse(text)
            schema = int(given["schema"])
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(
                f"{name} has no readable description ({error})", "a bundle of crosspatch", advice
            ) from error
        if schema > SCHEMA:
            raise DataError(
                f"{name} has schema {schema}",
                f"this version of crosspatch reads bundles up to schema {SCHEMA}",
                "update crosspatch, or export the run again with this version",
            )
        try:
            return cls(**_checked(given))
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
            raise DataError(
                f"the description in {name} makes no sense ({error})",
                f"a description of schema {SCHEMA}",
                advice,
            ) from error


def _checked(given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a BundleInfo; raises ValueError and its kin for anything impossible."""
    classes = jsons.class_names(given["classes"])
    check = tuple(tuple(float(p) for p in row) for row in given["check"])
    temperature = float(given["temperature"])
    _require_kinds(given)
    if given["precision"] not in PRECISIONS:
        raise ValueError(f"precision {given['precision']!r}")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature {temperature}")
    if any(len(row) != len(classes) for row in check):
        raise ValueError("check rows have another length than classes")
    schema, task = given.pop("schema"), given.get("task", "classify")
    thresholds = tuple(float(one) for one in given.get("thresholds", ()))
    if task not in SCHEMAS or SCHEMAS[task] > schema:
        raise ValueError(f"task {task!r} in schema {schema}")
    if len(thresholds) != (len(classes) if task == "multilabel" else 0):
        raise ValueError(f"{len(thresholds)} thresholds for the task {task}")
    if not all(0 <= one <= 1 for one in thresholds):
        raise ValueError("thresholds are between 0 and 1")
    reduction, checks = given.get("reduction", ""), tuple(given.get("checks", ()))
    if not isinstance(reduction, str) or len(reduction) > LONGEST:
        raise ValueError("reduction must be a name")
    if checks and len(checks) != len(check):
        raise ValueError("another number of check pictures than of their answers")
    if not all(isinstance(one, int) and 0 <= one < CANDIDATES for one in checks):
        raise ValueError(f"check pictures are numbered from 0 to {CANDIDATES - 1}")
    sure = given.get("sure")
    if not isinstance(given.get("explains", False), bool):
        raise ValueError("explains is true or false")
    if sure is not None and not (type(sure) in (int, float) and 0 < sure <= 1):
        raise ValueError(f"sure {sure!r} is no confidence")
    preprocess = Preprocess.from_dict(given["preprocess"])
    if max(preprocess.store) > LARGEST:
        raise ValueError(f"pictures of {preprocess.store} pixels")
    made = {"classes": classes, "check": check, "temperature": temperature}
    made |= {"thresholds": thresholds, "checks": checks}
    return given | made | {"preprocess": preprocess}


def _require_kinds(given: dict[str, Any]) -> None:
    """Raises ValueError for what is of another kind, or longer, than anything we write."""
    for name in ("architecture", "weights"):
        if not isinstance(given[name], str) or len(given[name]) > LONGEST:
            raise ValueError(f"{name} must be a name")
    for name in ("parameters", "macs", "calibrated_on"):
        if not isinstance(given.get(name, 0), int) or given.get(name, 0) < 0:
            raise ValueError(f"{name} {given[name]!r}")
    for name in ("versions", "decoding"):
        words = given.get(name, {})
        if not isinstance(words, dict) or not all(isinstance(v, str) for v in words.values()):
            raise ValueError(f"{name} are texts by name")
    if not isinstance(given.get("accuracy"), dict | None):
        raise ValueError("accuracy must be figures by name")


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk. format: "onnx" or "openvino"; hash: sha256 of its files; size: bytes."""

    path: Path
    format: str
    info: BundleInfo
    hash: str
    size: int


def read_bundle(path: str | Path) -> Bundle:
    """What stands in a bundle, without running it.

    Raises UsageError when the path is no bundle's, DataError when the file is damaged, is not ours,
    is of a newer schema or refers to data outside of it.
    """
    path = Path(path)
    readers = {".onnx": ("onnx", _onnx_text), ".xml": ("openvino", _openvino_text)}
    if path.suffix not in readers:
        raise UsageError(
            f"{path} is not a bundle",
            "a bundle is a file .onnx or .xml; an archive .pt2 is for torch alone, not loaded here",
            "crosspatch export RUN --to onnx",
        )
    if not path.is_file():
        raise UsageError(f"{path} does not exist", "a bundle", "crosspatch export RUN --to onnx")
    kind, text = readers[path.suffix]
    files = [path] if kind == "onnx" else [path, path.with_suffix(".bin")]
    info = BundleInfo.from_json(text(path), str(path))
    digest, size = hashlib.sha256(), 0
    for file in files:
        with file.open("rb") as stream:
            for part in iter(lambda: stream.read(1 << 20), b""):
                digest.update(part)
                size += len(part)
    return Bundle(path, kind, info, digest.hexdigest(), size)


def _onnx_text(path: Path) -> str:
    from crosspatch.deploy.onnx_file import onnx_metadata

    onnx = needed("onnx")
    with _refusing(path):
        return _described(onnx_metadata(onnx, path).get(KEY), path)


def _openvino_text(path: Path) -> str:
    from crosspatch.deploy.openvino_file import openvino_notes

    weights = path.with_suffix(".bin")
    if not weights.is_file():
        raise DataError(
            f"{weights} is missing",
            "the two files that OpenVINO writes, side by side",
            "copy both, or export the run again",
        )
    needed("openvino")
    with _refusing(path):
        return _described(openvino_notes(path, weights).get(KEY), path)


@contextmanager
def _refusing(path: Path) -> Iterator[None]:
    try:
        yield
    except Refused as error:
        raise DataError(
            f"{path} is not run: {error}", "a whole bundle that crosspatch wrote",
            "export the run again with crosspatch export",
        ) from error  # fmt: skip


def _described(text: str | None, path: Path) -> str:
    if text is None:
        raise DataError(
            f"{path} does not say what it is",
            "a bundle that crosspatch wrote",
            "crosspatch export RUN --to onnx",
        )
    return text


def needed(name: str) -> Any:
    """An optional package. Raises UsageError with the command that installs it."""
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UsageError(
            f"{name} cannot be imported ({error})", f"{name} is needed for this", INSTALL[name]
        ) from error


def openvino_core() -> Any:
    """The one OpenVINO of this process; raises as `needed` does.

    Its processor plugin lays an alternate signal stack of its own on the thread that loads it and
    frees it with the plugin: when the last Core is gone, Ctrl-C can end in a segmentation fault. So
    the plugin stays.
    """
    return _core(needed("openvino"))


@cache
def _core(openvino: Any) -> Any:
    return openvino.Core()


def check_pictures(size: tuple[int, int], count: int = CHECKS) -> np.ndarray:
    """Pictures (count, H, W, 3) uint8 made by a formula: waves of several lengths in each colour.

    The same on every machine; a bundle carries what torch makes of them.
    """
    height, width = size
    n, y, x, c = np.ogrid[:count, :height, :width, :3]
    wave = (7 + 3 * n + 2 * c) * x * 4096 // width + (5 + 2 * n + 3 * c) * y * 4096 // height
    turn = wave * 256 // 4096 % 512
    return np.where(turn < 256, turn, 511 - turn).astype(np.uint8)
