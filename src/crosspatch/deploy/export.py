# SPDX-License-Identifier: Apache-2.0
"""A trained run becomes a bundle: one ONNX file, an OpenVINO pair, or a torch.export archive.

The file is run and compared with torch before it gets its name.
"""

from __future__ import annotations

import csv
import json
import platform
import time
from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

import crosspatch
from crosspatch.deploy import ties
from crosspatch.deploy.bundle import (
    CHECKS,
    KEY,
    SURE,
    BundleInfo,
    check_pictures,
    needed,
    openvino_core,
    read_bundle,
)
from crosspatch.deploy.engines import BundleEngine, open_engine
from crosspatch.deploy.graph import OPSET, Shipped, to_onnx, trace
from crosspatch.deploy.loading import weights_hash
from crosspatch.deploy.patch_scores import Explained
from crosspatch.deploy.place import (
    SUFFIX,
    check_place,
    default_place,
    place,
    workshop,
    write_client,
)
from crosspatch.deploy.quantise import expectation, quantise_dynamic, quantise_static
from crosspatch.errors import CrosspatchError, DataError, UsageError, near
from crosspatch.metrics.abstain import threshold_for
from crosspatch.metrics.macs import count_macs
from crosspatch.processor import usable_cores
from crosspatch.training.package import WEIGHTS, Trained, load_model, model_folder, read_config
from crosspatch.versions import installed

BATCHES = (1, 2, 3)
CLOSE = 1e-4  # greatest difference of a probability between torch and an fp32 bundle
PACKAGES = ("torch", "onnx", "onnxscript", "onnxruntime", "openvino")
EXCEPTIONS: dict[str, str] = {}
"""Pattern of architecture names that cannot be exported -> why. The tests prove it both ways."""

Calibration = Callable[[], np.ndarray]
Run = Callable[[np.ndarray], np.ndarray]


class Exported(NamedTuple):
    """path: the bundle; info: what it says of itself; size: bytes of all its files; seconds: the
    whole work; remarks: what the user should know; difference: of probabilities from torch's, the
    greatest."""

    path: Path
    info: BundleInfo
    size: int
    seconds: float
    remarks: list[str]
    difference: float


class Compared(NamedTuple):
    """A graph beside torch: the greatest difference of a probability, near-ties left out, and what
    the user should know of those."""

    difference: float
    remarks: list[str]


def export(
    run: str | Path,
    to: str = "onnx",
    *,
    int8: bool = False,
    static: bool = False,
    explain: bool = False,
    out: str | Path | None = None,
    overwrite: bool = False,
    calibration: Calibration | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Exported:
    """Write a run folder's model as a bundle; beside an ONNX file also the client that reads it.

    to: "onnx", "openvino" or "torch". int8: scales found in every call; static: int8 with fixed
    scales, found on the pictures (N, H, W, 3) uint8 that `calibration` gives. explain: with scores
    of the patches as a second output (`deploy.patch_scores`). out: the file (None:
    in the run folder); a bundle of ours that lies there is replaced, another file with `overwrite`
    only. progress: called with (what, steps done, steps).
    Raises UsageError for what cannot be asked or written there, DataError for a run that cannot be
    read or exported; nothing is left then.
    """
    began = time.perf_counter()
    folder = model_folder(run)
    home = folder.parent if folder.name == "model" else folder
    precision = _precision(to, int8, static, calibration)
    if explain and to == "torch":
        raise UsageError(
            "--explain with --to torch",
            "scores of patches are written for ONNX Runtime and OpenVINO",
            "--to onnx --explain, or crosspatch predict RUN PICTURE --explain page.html",
        )
    path = Path(out) if out is not None else default_place(home, to, precision)
    check_place(path, to, overwrite)
    tell = progress or (lambda what, done, total: None)
    tell("exporting", 0, 3)
    pictures = calibration() if static and calibration is not None else None
    trained, info, remarks = _described(folder, home)
    info = replace(info, explains=explain)
    shipped = _shipped(trained.module, info)
    tell("exporting", 1, 3)
    with workshop(path) as shop:
        if to == "torch":
            made, compared = _write_torch(shipped, shop, info)
        else:
            made = _write_onnx(shipped, shop, info)
            tell("exporting", 2, 3)
            made = _converted(_quantised(made, precision, pictures), to)
            engine = _runner(made)
            compared = _compare(engine.run, shipped, info, precision)
            if explain:
                _compare_patches(engine, shipped, info, precision)
        size = place(made, path)
    remarks += write_client(path.parent) if to == "onnx" else []
    remarks += expectation() if precision != "fp32" else []
    remarks += compared.remarks
    tell("exporting", 3, 3)
    info = replace(info, precision=precision)
    return Exported(path, info, size, time.perf_counter() - began, remarks, compared.difference)


def export_model(module: nn.Module, path: str | Path, info: BundleInfo) -> None:
    """Write `module`, normalised (B, 3, H, W) -> logits (B, K), as an fp32 ONNX bundle.

    H and W are `info.preprocess.size`; `module` is left in evaluation mode. The file is run with
    ONNX Runtime at batches of 1, 2 and 3 before it gets its name. Raises UsageError where a package
    is missing or the file cannot be written, DataError where the graph cannot be made or computes
    something else; nothing is left then.
    """
    shipped = _shipped(module, info)
    with workshop(Path(path)) as shop:
        made = _write_onnx(shipped, shop, info)
        _compare(_runner(made).run, shipped, info, info.precision)
        place(made, Path(path))


def bundle_info(
    trained: Trained,
    architecture: str,
    *,
    weights: str = "",
    accuracy: dict[str, Any] | None = None,
    sure: float | None = None,
) -> BundleInfo:
    """What a bundle of `trained` says of itself, with torch's answers to the check pictures.

    architecture: the name of the model; weights: sha256 of its file, "" where there is none;
    accuracy, sure: as in `BundleInfo`.
    """
    module, preprocess = trained.module, trained.preprocess
    info = BundleInfo(
        classes=trained.classes,
        preprocess=preprocess,
        architecture=architecture,
        parameters=sum(p.numel() for p in module.parameters()),
        macs=count_macs(module, (3, *preprocess.size)),
        weights=weights,
        temperature=trained.temperature,
        calibrated_on=trained.calibrated_on,
        accuracy=accuracy,
        task=trained.task,
        thresholds=trained.thresholds,
        reduction=trained.reduction,
        versions=_versions(),
        sure=sure,
    )
    shipped = _shipped(module, info)
    checks = range(CHECKS)
    if info.reduction:
        checks = ties.steady(shipped.answer, shipped.normalised, preprocess.size)
        info = replace(info, checks=checks)
    answers = _answers(shipped, check_pictures(preprocess.size, max(checks) + 1)[list(checks)])
    return replace(info, check=tuple(tuple(round(float(p), 7) for p in row) for row in answers))


def _precision(to: str, int8: bool, static: bool, calibration: Calibration | None) -> str:
    if to not in SUFFIX:
        raise UsageError(
            f"--to {to}", f"one of {', '.join(SUFFIX)}", f"--to {near(to, SUFFIX, 1) or 'onnx'}"
        )
    if to == "torch" and (int8 or static):
        raise UsageError(
            "int8 with --to torch",
            "int8 is written into ONNX graphs, for ONNX Runtime and OpenVINO",
            "--to onnx --int8",
        )
    if static and calibration is None:
        raise UsageError(
            "static scales, and no pictures to find them on",
            "a call that gives pictures (N, H, W, 3) uint8",
            "give `calibration`, or take int8 without static",
        )
    return "int8-static" if static else "int8-dynamic" if int8 else "fp32"


def _described(folder: Path, home: Path) -> tuple[Trained, BundleInfo, list[str]]:
    """The run's model, what a bundle of it says, and remarks."""
    before = weights_hash(folder) or ""
    trained = load_model(folder)
    weights = weights_hash(folder) or ""
    if before != weights:
        raise DataError(
            f"{folder / WEIGHTS} changed while it was read",
            "a run that is not being trained at this moment",
            "type the same again, or wait for the training's end",
        )
    accuracy, remarks = _accuracy(home / "report.json")
    name = str(read_config(folder)["architecture"])
    sure = None if trained.thresholds else sure_from(home / "predictions.csv")
    info = bundle_info(trained, name, weights=weights, accuracy=accuracy, sure=sure)
    return trained, info, remarks


def sure_from(table: Path) -> float | None:
    """The confidence from which SURE of a run's validation pictures were named rightly.

    table: its predictions.csv. None where it is missing or damaged, or too few pictures are to
    tell.
    """
    try:
        with table.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["split"] == "val"]
        confidence = np.array([float(row["confidence"]) for row in rows])
        right = np.array([row["correct"] == "1" for row in rows], bool)
    except (OSError, ValueError, KeyError, TypeError, csv.Error):
        return None
    found = threshold_for(confidence, right, SURE)
    return found if found is not None and 0 < found <= 1 else None


def _accuracy(report: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """The run's figures on test, else on val, and a remark where there are none."""
    missing = "so the bundle carries no accuracy"
    if not report.is_file():
        return None, [f"{report} is missing (does the training still run?), {missing}"]
    try:
        found = json.loads(report.read_text(encoding="utf-8"))
        for name in ("test", "val"):
            if found[name] and found[name]["accuracy"] is not None:
                keys = ["images", "accuracy", "low", "high"]
                keys += [key for key in ("map", "map_low", "map_high") if key in found[name]]
                return {"split": name, **{key: found[name][key] for key in keys}}, []
    except (OSError, ValueError, KeyError, TypeError):
        return None, [f"{report} is damaged, {missing}"]
    return None, [f"the run was tested on no picture, {missing}"]


def _versions() -> dict[str, str]:
    found = {"crosspatch": crosspatch.__version__, "python": platform.python_version()}
    found |= {name: given for name, given in installed(PACKAGES).items() if given is not None}
    return found | {"opset": str(OPSET)}


def _shipped(module: nn.Module, info: BundleInfo) -> Shipped:
    kind = Explained if info.explains else Shipped
    return kind(module.eval(), info.preprocess, info.temperature, info.task).eval()


@torch.inference_mode()
def _answers(shipped: Shipped, pictures: np.ndarray) -> np.ndarray:
    return shipped.probabilities(torch.from_numpy(pictures)).numpy()


def _traced(shipped: Shipped, info: BundleInfo, finish: Callable[[Any], Any]) -> Any:
    """`finish` of the traced network; what torch's exporters cannot do becomes a DataError."""
    try:
        return finish(trace(shipped))
    except (CrosspatchError, OSError):
        raise
    except Exception as error:  # the exporters' errors have no common base
        known = (why for name, why in EXCEPTIONS.items() if fnmatch(info.architecture, name))
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"{info.architecture} cannot be exported: {first[:200]}",
            next(known, "a network that torch.export can trace and ONNX can hold (up to 2 GB)"),
            "train another --model, or report this with the model's name",
        ) from error


def _write_onnx(shipped: Shipped, shop: Path, info: BundleInfo) -> Path:
    onnx = needed("onnx")

    def written(program: Any) -> bytes:
        model = to_onnx(program)
        onnx.helper.set_model_props(model, {KEY: info.to_json()})
        return model.SerializeToString()

    path = shop / "whole.onnx"
    path.write_bytes(_traced(shipped, info, written))
    return path


def _write_torch(shipped: Shipped, shop: Path, info: BundleInfo) -> tuple[Path, Compared]:
    """(torch's archive, the program in it beside the network)."""
    program = _traced(shipped, info, lambda program: program)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    module = program.module()

    def run(pictures: np.ndarray) -> np.ndarray:
        return module(torch.from_numpy(pictures)).detach().numpy()

    compared = _compare(run, shipped, info, info.precision)
    torch.export.save(program, shop / "whole.pt2", extra_files={KEY: info.to_json()})
    return shop / "whole.pt2", compared


def _quantised(whole: Path, precision: str, pictures: np.ndarray | None) -> Path:
    if precision == "fp32":
        return whole
    made = whole.with_stem("quantised")
    if pictures is None:
        quantise_dynamic(whole, made)
    else:
        quantise_static(whole, made, pictures)
    return made


def _converted(path: Path, to: str) -> Path:
    """The ONNX bundle itself, or OpenVINO's pair of files for it, weights as they are."""
    if to != "openvino":
        return path
    openvino, onnx = needed("openvino"), needed("onnx")
    texts = {entry.key: entry.value for entry in onnx.load_model(path).metadata_props}
    model = openvino_core().read_model(path)
    model.set_rt_info(texts[KEY], KEY)
    openvino.save_model(model, path.with_suffix(".xml"), compress_to_fp16=False)
    return path.with_suffix(".xml")


def _compare(run: Run, shipped: Shipped, info: BundleInfo, precision: str) -> Compared:
    """The answers of `run` beside torch's, at batches of 1, 2 and 3.

    Raises DataError where they are too far apart: for fp32 from `CLOSE` on, for int8 where one is
    no number. Of a model with reduced tokens, pictures whose answer in fp32 is a near-tie's
    (`deploy.ties`) are not compared but counted.
    """
    pictures = check_pictures(shipped.size, max(BATCHES))
    limit, worst, tied = CLOSE if precision == "fp32" else 1.0, 0.0, dict[int, float]()
    for n in BATCHES:
        found, wanted = run(pictures[:n]), _answers(shipped, pictures[:n])
        for i, far in enumerate(np.abs(found - wanted).max(axis=1).tolist()):
            if limit < far and info.reduction and _tied(shipped, pictures[i], found[i]):
                tied[i] = max(far, tied.get(i, 0.0))
            else:
                if not far <= limit:
                    raise _other(far, limit)
                worst = max(worst, far)
    if not tied:
        return Compared(worst, [])
    return Compared(worst, [
        f"token selection differs on {len(tied)} of {len(pictures)} check pictures (a probability "
        f"by up to {max(tied.values()):.2g}): two tokens score almost the same there; verify on "
        "your pictures counts such near-ties"
    ])  # fmt: skip


def _tied(shipped: Shipped, picture: np.ndarray, found: np.ndarray) -> bool:
    inputs = shipped.normalised(torch.from_numpy(picture[None]))
    return ties.is_tie(shipped.answer, inputs, found, CLOSE)


def _other(worst: float, limit: float) -> DataError:
    return DataError(
        f"the exported graph gives other probabilities than torch (by {worst:.2g})",
        f"a difference of {limit:g} at most",
        "report this with the model's name; the run itself is whole",
    )


@torch.inference_mode()
def _compare_patches(
    engine: BundleEngine, shipped: Shipped, info: BundleInfo, precision: str
) -> None:
    """The scores of `engine` beside torch's, at batches of 1, 2 and 3; of int8 only their shape.

    Raises DataError where they are too far apart. Pictures of which two classes are as probable are
    left out: their scores are of either.
    """
    pictures = check_pictures(shipped.size, max(BATCHES))
    for n in BATCHES:
        _, found = engine.explain(pictures[:n])
        said, wanted = (one.numpy() for one in shipped(torch.from_numpy(pictures[:n])))
        far = float("inf")
        if found.shape == wanted.shape and np.isfinite(found).all():
            same = np.ones(n, bool) if precision == "fp32" else np.zeros(n, bool)
            if said.shape[1] > 1:
                best = -np.sort(-said, axis=1)
                same &= best[:, 0] - best[:, 1] > 2 * CLOSE
            scale = max(1.0, float(np.abs(wanted).max()))
            far = float(np.abs(found - wanted)[same].max(initial=0.0)) / scale
        if not far <= CLOSE:
            raise DataError(
                f"the exported graph gives other scores of patches than torch (by {far:.2g})",
                f"a difference of {CLOSE:g} at most",
                "export without --explain, and report this with the model's name",
            )


def _runner(path: Path) -> BundleEngine:
    """What runs the ONNX file, or OpenVINO's pair, on uint8 pictures (B, H, W, 3)."""
    engine = "openvino" if path.suffix == SUFFIX["openvino"] else "onnxruntime"
    return open_engine(read_bundle(path), engine, threads=usable_cores())
