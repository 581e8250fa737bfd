# SPDX-License-Identifier: Apache-2.0
"""`crosspatch verify BUNDLE IMAGES…`: does the exported file answer as the trained model does?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from crosspatch.cli.options import Output, existing_run, nothing_readable
from crosspatch.cli.predict import find

if TYPE_CHECKING:
    from crosspatch.cli.screen import Screen
    from crosspatch.deploy.bundle import Bundle
    from crosspatch.deploy.verify import EngineReport, Report

AGAINST = (
    "The folder of the run to compare with (left alone: the run that the bundle lies in, else the "
    "answers of torch that it carries)."
)
ENGINE = "Which engine is looked at (all: every one that is installed)."


def verify(
    bundle: Annotated[Path, Parameter(help="A file .onnx or .xml that crosspatch exported.")],
    /,
    *images: Annotated[str, Parameter(help="Files, folders, or patterns such as 'new/**/*.jpg'.")],
    against: Annotated[Path | None, Parameter(metavar="RUN", help=AGAINST)] = None,
    engine: Annotated[
        Literal["all", "onnxruntime", "openvino", "openvino-bf16"], Parameter(help=ENGINE)
    ] = "all",
    output: Output | None = None,
) -> int:
    """Compare a bundle with the model it was made of, on your own pictures.

    Every engine answers the same pictures as torch: same class or labels, how far the probabilities
    are apart, how fast. Exits with 1 when one of them answers something else.
    """
    output = output or Output()
    if against is not None:
        existing_run(against)

    from crosspatch.cli.screen import Screen, print_json
    from crosspatch.deploy import verify as room
    from crosspatch.deploy.bundle import read_bundle

    read = read_bundle(bundle)
    paths, missing = find(images)
    with Screen(stderr=output.json) as screen:
        report = room.verify(
            read,
            paths,
            run=_run_around(read) if against is None else _made_of(against, read),
            names=paths,
            engines=_engines(read, engine),
            progress=lambda done, total: screen.progress("comparing", done, total),
        )
        unreadable = missing + [(paths[one.index], one.reason) for one in report.failures]
        if images and not report.pictures:
            raise nothing_readable(unreadable)
        if report.run is not None:
            _remember(screen, report)
        if not output.json:
            _print(screen, report, unreadable)
    if output.json:
        rows = [{"path": path, "reason": reason} for path, reason in unreadable]
        print_json(room.summary(report) | {"unreadable": rows, "do": _advice(report)})
    return 0 if report.ok else 1


def _remember(screen: Screen, report: Report) -> None:
    """Keep what was found in the card of the run that the bundle lies in."""
    from crosspatch.cli.card import renew
    from crosspatch.deploy.verify import summary
    from crosspatch.report.shipped import note_verify

    run, path = report.bundle.path.parent, report.bundle.path
    renew(screen, run, lambda: note_verify(run, path, summary(report)))


def _run_around(bundle: Bundle) -> Path | None:
    folder = bundle.path.parent
    return _made_of(folder, bundle) if (folder / "model").is_dir() else None


def _made_of(run: Path, bundle: Bundle) -> Path:
    """The run, or of the models that `crosspatch shrink` left in it the one that has the bundle's
    weights and reduction of tokens."""
    from crosspatch.deploy.loading import model_of

    found = (one for one in (run, *sorted((run / "shrink").glob("*/"))) if model_of(one, bundle))
    return next(found, run)


def _engines(bundle: Bundle, name: str) -> list[tuple[str, str]] | None:
    """(engine, precision) pairs, None for all."""
    if name == "all":
        return None

    from crosspatch.deploy.engines import precision_of

    kind, _, precision = name.partition("-")
    return [(kind, precision or precision_of(bundle.info))]


def _print(screen: Any, report: Report, unreadable: list[tuple[str, str]]) -> None:
    from crosspatch.cli import words

    bundle = report.bundle
    screen.line(str(bundle.path), "bold")
    screen.line(
        f"  {bundle.info.architecture}, {bundle.format} {bundle.info.precision}, "
        f"{words.size(bundle.size)}, sha256 {bundle.hash[:16]}"
    )
    if bundle.info.reduction:
        screen.line(f"  tokens reduced by {bundle.info.reduction}")
    screen.line(f"  compared with {_reference(report)}")
    screen.line(f"  on {_on_what(report)}")
    screen.line()
    _table(screen, report)
    for one in report.engines:
        if one.selection is not None and one.selection["pictures"]:
            screen.line(f"  {one.engine} {one.precision}: {_selection(report, one)}", "yellow")
    if unreadable:
        screen.line()
        screen.line(f"{words.plural(len(unreadable), 'name')} could not be read", "yellow")
        screen.unreadable(unreadable)
    screen.line()
    if report.ok:
        screen.line(_verdict(report), "green")
        return
    for text in report.problems:
        screen.line(f"mismatch  {text}", "red")
    for one in report.engines:
        for text in one.problems:
            screen.line(f"mismatch  {one.engine} {one.precision}: {text}", "red")
        changed = [row for row in one.changed if not row.get("near_tie")]
        for row in changed[:3] if one.problems else []:
            screen.line(f"          {row['picture']}: {row['engine']}, not {row['reference']}")
    screen.line(f"try       {_advice(report)}", "green")


def _reference(report: Report) -> str:
    if report.run is not None and report.torch_milliseconds is None:
        return f"the description of {report.run} alone: its model answers something else"
    if report.run is not None:
        same = "the same weights" if report.same_weights else "OTHER weights"
        return f"the torch model of {report.run} ({same})"
    if report.bundle.info.check:
        return "torch's answers that it carries (name a run with --against RUN)"
    return "nothing: no run is near (--against RUN) and it carries no answers of torch"


def _on_what(report: Report) -> str:
    from crosspatch.cli import words

    if not report.pictures:
        return "its check pictures alone: name pictures of your own to compare more"
    pictures = words.plural(report.pictures, "picture")
    return pictures if report.run else f"{pictures}, the engines with each other"


def _table(screen: Any, report: Report) -> None:
    """One line per engine, and torch's own below."""
    from crosspatch.deploy.verify import meant

    same = f"same {meant(report.bundle)}"
    head = f"  {'engine':18}{same:>14}{'largest diff':>14}{'check diff':>12}"
    screen.line(f"{head}{'latency':>12}   speed", "cyan")
    for one in report.engines:
        same = "–" if one.agreed is None else f"{one.agreed:,} of {report.pictures:,}"
        speed = "" if one.faster is None else f"{one.faster:5.2f}x"
        screen.line(
            f"  {f'{one.engine} {one.precision}':18}{same:>14}{_small(one.difference):>14}"
            f"{_small(one.check):>12}{_milliseconds(one.milliseconds):>12}  {speed}"
        )
    if report.torch_milliseconds is not None:
        took = _milliseconds(report.torch_milliseconds)
        screen.line(f"  {'torch fp32':18}{'':40}{took:>12}   1.00x")
    screen.line("  latency of one picture on one thread")


def _selection(report: Report, one: EngineReport) -> str:
    """`token selection differs on 1 of 200 pictures …`: what near-ties did."""
    found: Any = one.selection
    said = f"token selection differs on {found['pictures']:,} of {report.pictures:,} pictures"
    said += f" (by up to {found['difference']:.1e})"
    if found["near_ties"] is None:
        return said
    if found["near_ties"] == found["pictures"]:
        return f"{said}: two tokens score almost the same there"
    return f"{said}, on {found['near_ties']:,} of them because two tokens score almost the same"


def _small(value: float | None) -> str:
    return "–" if value is None else f"{value:.1e}"


def _milliseconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f} ms"


def _verdict(report: Report) -> str:
    judged = [one for one in report.engines if one.agreed is not None and one.precision != "bf16"]
    if report.torch_milliseconds is not None and judged:
        return "ok        every engine answers as the trained model does"
    if report.bundle.info.precision != "fp32" and report.torch_milliseconds is None:
        return "ok        but int8 was compared with no model: --against RUN does that"
    if report.bundle.info.check:
        return "ok        the check pictures get the answers that torch gave"
    return "ok        but there was nothing to compare it with"


def _advice(report: Report) -> str | None:
    """What to type after a mismatch; None when there is none."""
    from crosspatch.cli.words import command

    if report.ok:
        return None
    run: str | Path = report.run or "RUN"
    target = "openvino" if report.bundle.format == "openvino" else "onnx"
    again = command("crosspatch", "export", run, "--to", target)
    if report.problems or report.bundle.info.precision == "fp32":
        return again
    static = report.bundle.info.precision == "int8-static"
    other = f"{again} --int8" if static else f"{again} --int8 --static"
    return f"{other}, or keep fp32: {again}"
