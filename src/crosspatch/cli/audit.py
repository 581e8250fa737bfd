# SPDX-License-Identifier: Apache-2.0
"""`crosspatch audit DATA`: what is wrong with the pictures, before a training; one page."""

from __future__ import annotations

import importlib
import json
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Group, Parameter

from crosspatch.cli import words
from crosspatch.cli.options import (
    DATA,
    MULTI,
    OUTPUT,
    Columns,
    Output,
    at_least,
    reading_of,
)
from crosspatch.cli.predict import existing_model
from crosspatch.errors import CrosspatchError, UsageError, visible

if TYPE_CHECKING:
    from crosspatch.cli.screen import Screen
    from crosspatch.data.audit import Audit
    from crosspatch.deploy.backbone import Backbone

_WHAT = Group("What is looked at", sort_key=5)
CHECKS = {
    "mislabels": "likely wrong labels",
    "resizing": "how a model's resizing and normalisation suit the pictures",
}
"""Modules of `explain` that look with a trained network: `findings(eyes, audit, progress)`."""
COLOURS = {"bad": "red", "warn": "yellow", "good": "green"}
MARKS = {"bad": "✗", "warn": "!", "good": "✓"}


def audit(
    data: Annotated[str, Parameter(help=DATA)],
    /,
    *,
    out: Annotated[Path, Parameter(group=OUTPUT, metavar="FILE")] = Path("audit.html"),
    overwrite: Annotated[bool, Parameter(group=OUTPUT)] = False,
    run: Annotated[Path | None, Parameter(group=_WHAT, metavar="RUN")] = None,
    weights: Annotated[str | None, Parameter(group=_WHAT, metavar="FILE|NAME")] = None,
    model: Annotated[str | None, Parameter(group=_WHAT, metavar="NAME")] = None,
    workers: Annotated[
        int | None,
        at_least(1, "--workers 2"),
        Parameter(group=_WHAT, metavar="N", show_default="one per core"),
    ] = None,
    columns: Columns | None = None,
    group: Annotated[str | None, Parameter(group=_WHAT, metavar="folder|PATTERN|COLUMN")] = None,
    multi_label: Annotated[bool, Parameter(group=_WHAT, help=MULTI)] = False,
    output: Output | None = None,
) -> int:
    """Look at pictures before a training: one page, and a command for each fault.

    Parameters
    ----------
    out
        The page; its findings as JSON, and lists of files, lie beside it.
    overwrite
        Write over the page of an earlier audit, and over what lies beside it.
    run
        A trained run, or a bundle that lies in its folder: it tells likely wrong labels.
    weights
        Weights of no run in its place: a .safetensors file, or timm's name of a released
        checkpoint that was fetched before.
    model
        The network that a file of weights is of.
    workers
        Processes that decode pictures.
    group
        Pictures that belong together, as for train.
    """
    output = output or Output()
    beside = _check(out, overwrite)
    eyes = _eyes(run, weights, model)

    from crosspatch.cli.screen import Screen, print_json
    from crosspatch.data.audit import audit

    with Screen(stderr=output.json) as screen:
        told = lambda done, total: screen.progress("looking", done, total)
        found = audit(
            data,
            beside=beside,
            workers=workers,
            progress=told,
            **reading_of(columns, group, multi_label),
        )
        _look_closer(found, eyes, screen)
        _write(found, out, beside, overwrite)
        if not output.json:
            _print(screen, found, out)
    if output.json:
        print_json({"out": str(out), **found.to_dict()})
    return 1 if found.needs_a_hand else 0


def _check(out: Path, overwrite: bool) -> Path:
    """What the names of lists begin with. Raises UsageError, before any work, where the page cannot
    be written."""
    if out.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"--out {out}", "the name of a page, which ends with .html",
                         f"--out {out.name or 'audit'}.html")  # fmt: skip
    if not out.parent.is_dir():
        raise UsageError(f"--out {out}: there is no folder {out.parent}",
                         "a folder that exists", f"--out {out.name}")  # fmt: skip
    beside = out.with_suffix("")
    if not overwrite:
        _refuse([out, out.with_suffix(".json")])
    return beside


def _eyes(run: Path | None, weights: str | None, model: str | None) -> Path | Backbone | None:
    """What looks at the pictures beside the audit itself. Raises UsageError or DataError, before
    any work, for what is neither a trained run nor a bundle beside its run, nor weights."""
    if model is not None and weights is None:
        raise UsageError(f"--model {model} without --weights", "the weights of that network",
                         f"--weights FILE --model {model}")  # fmt: skip
    if weights is not None:
        if run is not None:
            raise UsageError(f"--run {run} and --weights {weights}", "one of the two",
                             f"leave --weights {weights} away")  # fmt: skip
        from crosspatch.deploy.backbone import backbone

        return backbone(weights, model)
    if run is not None:
        from crosspatch.deploy.loading import folder_of
        from crosspatch.training.package import model_folder, read_config

        read_config(model_folder(folder_of(existing_model(run))))
    return run


def _refuse(paths: list[Path]) -> None:
    for path in paths:
        if path.exists() or path.is_symlink():
            raise UsageError(f"{path} exists", "a name that is not taken",
                             "add --overwrite, or choose another --out")  # fmt: skip


def _look_closer(found: Audit, eyes: Path | Backbone | None, screen: Screen) -> None:
    """Adds what a trained network can tell, or why nothing was looked at."""
    for name, what in CHECKS.items():
        if eyes is None:
            how = "give a trained run (--run RUN) or weights (--weights FILE --model NAME)"
            found.not_looked.append(f"{what.capitalize()}: {how}.")
            continue
        module = importlib.import_module(f"crosspatch.explain.{name}")
        told: Callable[[int, int], None] = lambda done, total, what=what: screen.progress(
            what, done, total
        )
        try:
            found.add(module.findings(eyes, found, told))
        except CrosspatchError as problem:
            found.not_looked.append(f"{what.capitalize()}: {problem.got}; {problem.do}.")


def _write(found: Audit, out: Path, beside: Path, overwrite: bool) -> None:
    """The page, the JSON and the lists. Lists of an earlier audit that no longer hold are removed
    where --overwrite was given."""
    from crosspatch.report import page as pages
    from crosspatch.report.audit import page

    if not overwrite:
        _refuse(list(found.files))
    else:
        for path in _older(out.with_suffix(".json"), beside):
            path.unlink(missing_ok=True)
    known = {item.key: at for at, item in enumerate(found.source.items)}
    kept: dict[str, str | None] = {}

    def thumbnail(path: str) -> str | None:
        if path not in kept:
            kept[path] = _thumbnail(found, known.get(path))
        return kept[path]

    told = found.to_dict()
    for path, text in found.files.items():
        pages.write_page(path, text)
    text = json.dumps(told, indent=1, ensure_ascii=True, allow_nan=False)
    pages.write_page(out.with_suffix(".json"), text + "\n")
    pages.write_page(out, page(told, thumbnail))


def _older(path: Path, beside: Path) -> list[Path]:
    """Lists that an earlier audit of that name wrote."""
    try:
        names = json.loads(path.read_text(encoding="utf-8"))["files"]
        files = [Path(name) for name in names]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []
    ours = lambda one: one.parent == beside.parent and one.name.startswith(f"{beside.name}-")
    return [one for one in files if ours(one) and one.suffix in (".txt", ".csv")]


def _thumbnail(found: Audit, at: int | None) -> str | None:
    from crosspatch.data.decode import UnreadableImage
    from crosspatch.report.page import THUMB, thumbnail

    if at is None:
        return None
    try:
        return thumbnail(found.source.image(at, side=THUMB))
    except UnreadableImage:
        return None


def _print(screen: Screen, found: Audit, out: Path) -> None:
    screen._hide_bars()
    classes = words.plural(len(found.classes), "class", "classes")
    pictures = words.plural(found.pictures, "picture")
    screen.line(f"{found.data}: {pictures} of {classes}, looked at in "
                f"{words.duration(found.seconds)}", "bold")  # fmt: skip
    for one in found.findings:
        if one.level != "good":
            screen.line(f"{MARKS[one.level]} {one.title}", COLOURS[one.level])
            _indented(screen, one.text)
            for line in one.command.splitlines()[:3]:
                screen.line(f"    {line}", "cyan")
            further = len(one.command.splitlines()) - 3
            if further > 0:
                screen.line(f"    … and {words.plural(further, 'more line')}, on the page", "cyan")
    good = [one.title for one in found.findings if one.level == "good"]
    for title in good:
        screen.line(f"{MARKS['good']} {title}", COLOURS["good"])
    for one in found.not_looked:
        _indented(screen, f"not looked at: {one[0].lower()}{one[1:]}", 2)
    screen.line()
    screen.line(f"written to {out} (open it in a browser) and {out.with_suffix('.json').name}")


def _indented(screen: Screen, text: str, by: int = 4) -> None:
    for line in textwrap.wrap(visible(text), 80 - by, break_on_hyphens=False):
        screen.line(" " * by + line)
