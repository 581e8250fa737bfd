# SPDX-License-Identifier: Apache-2.0
"""`crosspatch export RUN`: one file that holds network, preprocessing and classes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from crosspatch.cli.options import Output, existing_run
from crosspatch.errors import UsageError

if TYPE_CHECKING:
    import numpy as np

    from crosspatch.deploy.export import Exported


def export(
    run: Annotated[Path, Parameter(help="The folder of a trained run.")],
    /,
    *,
    to: Literal["onnx", "openvino", "torch"] = "onnx",
    int8: bool = False,
    static: bool = False,
    explain: bool = False,
    data: Annotated[str | None, Parameter(metavar="DATA")] = None,
    out: Annotated[Path | None, Parameter(metavar="FILE")] = None,
    output: Output | None = None,
) -> int:
    """Write a run as one file for other programs: uint8 pixels in, probabilities out.

    Parameters
    ----------
    to
        onnx: one file, and a client that runs it. openvino: a pair. torch: for torch.export.load.
    int8
        Keep the weights of Linear layers in 8 bits: a smaller file, down to a third.
    static
        int8 with fixed scales, found on the run's validation pictures.
    explain
        A second output: how much each patch gave to the logit of the most probable class.
    data
        Where the run's pictures are now, for --static.
    out
        The file (left alone: bundle.onnx and the like in the run folder).
    """
    output = output or Output()
    existing_run(run)
    if data is not None and not static:
        raise UsageError(
            "--data without --static", "pictures are needed for static scales only", "add --static"
        )

    from crosspatch.cli.card import renew
    from crosspatch.cli.screen import Screen, print_json
    from crosspatch.deploy import export as room
    from crosspatch.deploy.quantise import expectation
    from crosspatch.report.shipped import note_export

    with Screen(stderr=output.json) as screen:
        if (int8 or static) and to != "torch":
            for remark in expectation():
                screen.line(remark, "yellow")
        exported = room.export(
            run,
            to,
            int8=int8,
            static=static,
            explain=explain,
            out=out,
            calibration=(lambda: _pictures(run, data)) if static else None,
            progress=screen.progress,
        )
        renew(screen, run, lambda: note_export(run, exported, to))
        if not output.json:
            _print(screen, run, exported, to)
    if output.json:
        print_json(_summary(run, exported, to))
    return 0


def _pictures(run: Path, data: str | None) -> np.ndarray:
    from crosspatch.data.preprocess import Preprocess
    from crosspatch.deploy.quantise import calibration_pictures
    from crosspatch.training.package import model_folder, read_config

    preprocess = Preprocess.from_dict(read_config(model_folder(run))["preprocessing"])
    return calibration_pictures(run, preprocess, data)


def _summary(run: Path, exported: Exported, to: str) -> dict[str, Any]:
    info = exported.info
    return {
        "run": str(run),
        "bundle": str(exported.path),
        "to": to,
        "precision": info.precision,
        "size": exported.size,
        "seconds": round(exported.seconds, 3),
        "architecture": info.architecture,
        "reduction": info.reduction,
        "parameters": info.parameters,
        "macs": info.macs,
        "task": info.task,
        "classes": info.classes,
        "thresholds": info.thresholds,
        "preprocess": info.preprocess.to_dict(),
        "temperature": info.temperature,
        "calibrated_on": info.calibrated_on,
        "explains": info.explains,
        "sure": info.sure,
        "accuracy": info.accuracy,
        "difference": exported.difference,
        "weights": info.weights,
        "versions": info.versions,
        "remarks": exported.remarks,
    }


def _figure(found: dict[str, Any], whose: str) -> str:
    """The figure that a run is known by, with its interval."""
    from crosspatch.cli import words

    if "map" not in found:
        span = words.interval(found["low"], found["high"])
        return f"accuracy of the run{whose} {words.percent(found['accuracy'])} ({span})"
    known = found["map_low"] is not None
    span = f" ({words.interval(found['map_low'], found['map_high'])})" if known else ""
    return f"mAP of the run{whose} {words.percent(found['map'])}{span}"


def _print(screen: Any, run: Path, exported: Exported, to: str) -> None:
    from crosspatch.cli import words
    from crosspatch.deploy.quantise import expectation

    info, path = exported.info, exported.path
    height, width = info.preprocess.size
    screen.line(f"{path}, {words.size(exported.size)}, {info.precision}", "bold")
    screen.line(
        f"  {info.architecture}, {words.count(info.parameters)} parameters, pictures of "
        f"{height}x{width} pixels, {words.plural(len(info.classes), 'class', 'classes')}"
    )
    if info.reduction:
        screen.line(f"  tokens reduced by {info.reduction}")
    if info.accuracy is not None:
        figures, whose = info.accuracy, "" if info.precision == "fp32" else " before int8"
        screen.line(f"  {figures['split']} {_figure(figures, whose)}")
    fitted = f"fitted on {words.plural(info.calibrated_on, 'validation picture')}"
    screen.line(
        f"  temperature {words.number(info.temperature)}, "
        f"{fitted if info.calibrated_on else 'not fitted'}"
    )
    if info.explains:
        screen.line("  second output: what each patch gave to the most probable class's logit")
    screen.line(f"  self-check: at most {exported.difference:.1g} from torch in a probability")
    for remark in exported.remarks:
        if remark not in expectation():
            screen.line(f"  {remark}", "yellow")
    screen.line()
    screen.line("next, type", "green")
    if to == "torch":
        screen.line(f"  {words.command('crosspatch', 'export', run, '--to', 'onnx')}")
    else:
        screen.line(f"  {words.command('crosspatch', 'verify', path)} PICTURES…")
        screen.line(f"  {words.command('crosspatch', 'predict', path)} PICTURES…")
