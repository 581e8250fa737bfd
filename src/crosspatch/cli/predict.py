# SPDX-License-Identifier: Apache-2.0
"""`crosspatch predict RUN|BUNDLE IMAGES…`: names the class of files, folders and patterns.

For a bundle torch is never imported.
"""

from __future__ import annotations

import csv
import glob
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from crosspatch.cli import batch
from crosspatch.cli.options import Output, at_least, existing_run, nothing_readable
from crosspatch.errors import UsageError, visible

MODEL = "The folder of a trained run, or a bundle (.onnx, .xml) that was exported from one."
ENGINE = (
    "What computes. auto: torch for a run; for a bundle the fastest that is installed, measured "
    "once per machine."
)
EXPLAINED = 8  # pictures on one page of --explain
Engine = Literal["auto", "onnxruntime", "openvino", "openvino-bf16", "torch"]


def predict(
    run: Annotated[Path, Parameter(help=MODEL)],
    /,
    *images: Annotated[str, Parameter(help="Files, folders, or patterns such as 'new/**/*.jpg'.")],
    topk: Annotated[int, at_least(1, "--topk 3")] = 3,
    engine: Annotated[Engine, Parameter(help=ENGINE)] = "auto",
    csv: Annotated[Path | None, Parameter(metavar="FILE")] = None,
    show_tokens: Annotated[Path | None, Parameter(metavar="FILE.png")] = None,
    explain: Annotated[Path | None, Parameter(metavar="FILE.html")] = None,
    workers: Annotated[int | None, at_least(1, "--workers 2")] = None,
    overwrite: bool = False,
    output: Output | None = None,
) -> int:
    """Name the class of pictures.

    Parameters
    ----------
    topk
        How many classes are named for each picture, most probable first. A run of several labels
        shows all that a picture has.
    csv
        Write the answers to this table as well. A thousand pictures and more are answered in
        parts, which lie beside it until it is whole: the same command goes on after a kill.
    show_tokens
        Draw into this file which patches of the picture a reduced run keeps and merges at each
        block. Takes one picture.
    explain
        Write a page that shows where the network looked and what decided: which parts, and which
        branch of a CrossViT. Takes a run and up to eight pictures.
    workers
        How many processes answer a thousand pictures and more, of a bundle; one to a core if left
        alone. Each holds the model once.
    overwrite
        Begin a table anew whose parts are of another model, other pictures or other options.
    """
    output = output or Output()
    if not images:
        raise UsageError(
            "no picture is named",
            "files, folders or patterns after the run or bundle",
            f"crosspatch predict {run} PICTURES…",
        )
    existing_model(run)
    check_target(csv)
    paths, missing = find(images)
    if show_tokens is not None:
        _check_drawing(show_tokens, run, paths)
    if explain is not None:
        _check_explaining(explain, run, paths)
    if csv is not None and not (show_tokens or explain) and batch.wanted(csv, len(paths)):
        how = {"topk": topk, "engine": engine, "workers": workers, "overwrite": overwrite}
        return batch.predict_table(run, paths, missing, csv, output, **how)

    from crosspatch.cli.screen import Screen, print_json

    panels: list[Any] = []
    with Screen(stderr=output.json) as screen:
        from crosspatch.deploy import table
        from crosspatch.deploy.loading import MANY, load

        trained = _taken_apart(run) if explain is not None else None
        predictor = load(run, engine=engine, batch=MANY if len(paths) > 1 else 1)
        answers = predictor.predict(
            paths, progress=lambda done, total: screen.progress("predicting", done, total)
        )
        several = bool(answers.thresholds)
        unreadable = missing + [(paths[one.index], one.reason) for one in answers.failures]
        rows = table.rows_of(paths, answers, topk)
        if csv is not None:
            names = table.columns(min(topk, len(answers.classes)), several)
            bad = [table.bad_row(*one, len(names)) for one in unreadable]
            csv.write_bytes(table.lines([names, *map(table.good_row, rows), *bad]))
        if not output.json:
            _print(screen, rows, unreadable)
        if show_tokens is not None and rows:
            from crosspatch.explain.tokens import draw_run, summary

            panels = draw_run(run, paths[0], show_tokens)
            screen.line(f"{show_tokens}: {summary(panels)}")
        if explain is not None and rows:
            _explain(screen, explain, run, trained, [row["path"] for row in rows])
    if not rows:
        raise nothing_readable(unreadable)
    if output.json:
        print_json({
            "run": str(run),
            "engine": predictor.engine.setting._asdict(),
            "reduction": predictor.reduction,
            "classes": answers.classes,
            **({"thresholds": answers.thresholds} if several else {}),
            "predictions": rows,
            **({"explained": str(explain)} if explain is not None else {}),
            **({"tokens": [panel.counts() for panel in panels]} if panels else {}),
            "unreadable": [{"path": path, "reason": reason} for path, reason in unreadable],
        })  # fmt: skip
    return 0


def existing_model(path: Path) -> Path:
    """The path, when it is a folder or may be a bundle; raises UsageError otherwise."""
    if path.suffix in (".onnx", ".xml", ".pt2") and (path.is_file() or not path.exists()):
        return path  # what is wrong with it is said where it is read
    return existing_run(path)


def _check_drawing(target: Path, run: Path, paths: list[str]) -> None:
    """Raises UsageError where --show-tokens cannot be done."""
    if not run.is_dir():
        raise UsageError(
            f"--show-tokens with the bundle {run}",
            "the folder of a run: inside a bundle there are no blocks to look at",
            f"crosspatch predict {run.parent} PICTURE --show-tokens {target}",
        )
    if len(paths) != 1:
        raise UsageError(
            f"--show-tokens with {len(paths)} pictures", "one picture", "name one picture"
        )
    if target.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise UsageError(
            f"--show-tokens {target}", "a file that ends in .png", "--show-tokens tokens.png"
        )
    check_target(target, "--show-tokens", "tokens.png")


def _check_explaining(target: Path, run: Path, paths: list[str]) -> None:
    """Raises UsageError where --explain cannot be done."""
    from crosspatch.cli import words

    if not run.is_dir():
        raise UsageError(
            f"--explain with the bundle {run}",
            "the folder of a run: inside a bundle there are no parts to look at",
            words.command("crosspatch", "predict", run.parent, "PICTURE", "--explain", target),
        )
    if len(paths) > EXPLAINED:
        raise UsageError(
            f"--explain with {len(paths):,} pictures",
            f"{EXPLAINED} pictures or fewer on a page",
            "name the pictures that you want to understand",
        )
    if target.suffix.lower() not in (".html", ".htm"):
        raise UsageError(
            f"--explain {target}", "a file that ends in .html", "--explain explained.html"
        )
    check_target(target, "--explain", "explained.html")


def _taken_apart(run: Path) -> Any:
    """The model of a run. Raises UsageError where it cannot be taken apart."""
    from crosspatch.explain.forward import explainable
    from crosspatch.training.package import load_model

    trained = load_model(run)
    explainable(trained.module)
    return trained


def _explain(screen: Any, target: Path, run: Path, trained: Any, paths: list[str]) -> None:
    from crosspatch.cli import words
    from crosspatch.report.explained import explained
    from crosspatch.report.page import write_page

    html = explained(
        run,
        *paths,
        names=[visible(path) for path in paths],
        trained=trained,
        progress=lambda done, total: screen.progress("explaining", done, total),
    )
    write_page(target, html)
    screen.line(f"{visible(str(target))}: why, for {words.plural(len(paths), 'picture')}")


def find(names: Iterable[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """(files in the order given, each once; (name, reason) of what is not there or left out).

    In folders, hidden files, litter of systems and files that are no pictures by their names are
    passed over; what is named itself is always tried.
    """
    found: dict[str, None] = {}
    missing: list[tuple[str, str]] = []
    for name in names:
        try:
            files, left_out = _files(name)
        except OSError as error:
            files, left_out = [], [(name, (error.strerror or str(error)).lower())]
        found.update(dict.fromkeys(files))
        missing += left_out
    return list(found), missing


def _files(name: str) -> tuple[list[str], list[tuple[str, str]]]:
    if os.path.isdir(name):
        files, left_out = _inside(name)
        return files, left_out or ([] if files else [(name, "no picture in this folder")])
    if os.path.lexists(name):
        return [name], []
    if not glob.has_magic(name):
        return [], [(name, "no such file")]
    files = sorted(path for path in glob.iglob(name, recursive=True) if not os.path.isdir(path))
    return files, [] if files else [(name, "no file has such a name")]


def _inside(folder: str) -> tuple[list[str], list[tuple[str, str]]]:
    from crosspatch.data.layout import PICTURE_ENDINGS
    from crosspatch.data.trees import FolderTree

    tree = FolderTree(folder)
    endings = {key: os.path.splitext(key)[1].lower() for key in tree.files}
    files = [key for key, end in endings.items() if not end or end in PICTURE_ENDINGS]
    skipped = [(os.path.join(folder, one.path), one.reason) for one in tree.skipped]
    return [os.path.join(folder, key) for key in files], skipped


def check_target(path: Path | None, flag: str = "--csv", example: str = "out.csv") -> None:
    """Raises UsageError, before any work, when a file cannot be written to `path`."""
    if path is None:
        return
    do = f"{flag} {example}"
    if path.is_dir() or not path.parent.is_dir():
        what = "is a folder" if path.is_dir() else f"would stand in {path.parent}, no such folder"
        raise UsageError(f"{flag} {path} {what}", "a file in a folder that exists", do)
    existed = path.exists()
    try:
        path.open("a", encoding="utf-8").close()
        if not existed:
            path.unlink()
    except OSError as error:
        raise UsageError(
            f"{flag} {path} cannot be written: {error.strerror}", "a file that you may write", do
        ) from error


def write_table(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Rows with the same keys as a CSV file (UTF-8, one header line)."""
    rows = list(rows)
    with path.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else ["path"])
        writer.writeheader()
        writer.writerows(rows)


def _print(screen: Any, rows: list[dict[str, Any]], unreadable: list[tuple[str, str]]) -> None:
    from rich.cells import cell_len

    from crosspatch.cli import words

    width = min(max((cell_len(row["path"]) for row in rows), default=0), 40)
    for row in rows:
        top = _said(row.get("labels", row["top"])) or f"none (nearest: {_said(row['top'][:1])})"
        path = visible(row["path"])
        screen.line(f"{path + ' ' * (width - cell_len(path))}  {top}")
    if unreadable and rows:
        screen.line()
        screen.line(f"{words.plural(len(unreadable), 'name')} could not be read", "yellow")
        screen.unreadable(unreadable)


def _said(pairs: list[dict[str, Any]]) -> str:
    """`red 98.1 %, round 77.0 %`."""
    from crosspatch.cli import words

    return ", ".join(f"{one['class']} {words.percent(one['probability'])}" for one in pairs)
