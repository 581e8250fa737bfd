# SPDX-License-Identifier: Apache-2.0
"""`crosspatch eval RUN|BUNDLE DATA`: the figures of a trained model on labelled pictures."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from cyclopts import Parameter

from crosspatch.cli.options import DATA, MULTI, Columns, Output, at_least, side, typed
from crosspatch.cli.predict import ENGINE, MODEL, Engine, check_target, existing_model, write_table
from crosspatch.errors import DataError, UsageError

if TYPE_CHECKING:
    import numpy as np

    from crosspatch.data.sources import Source
    from crosspatch.deploy.predictor import Predictor

AUTO = (
    "Which pictures. auto: what the run kept for testing when DATA is what it was trained on, else "
    "the test or val folder of DATA, else all."
)


def evaluate(
    run: Annotated[Path, Parameter(help=MODEL)],
    data: Annotated[str, Parameter(help=DATA)],
    /,
    *,
    split: Annotated[Literal["auto", "all", "train", "val", "test"], Parameter(help=AUTO)] = "auto",
    topk: Annotated[int, at_least(1, "--topk 5")] = 5,
    engine: Annotated[Engine, Parameter(help=ENGINE)] = "auto",
    size: Annotated[
        int | tuple[int, int] | None, Parameter(converter=side, n_tokens=1, metavar="N|HxW")
    ] = None,
    csv: Annotated[Path | None, Parameter(metavar="FILE")] = None,
    report: Annotated[Path | None, Parameter(metavar="FILE.html")] = None,
    multi_label: Annotated[bool, Parameter(help=f"{MULTI} A run of such labels knows it.")] = False,
    columns: Columns | None = None,
    output: Output | None = None,
) -> int:
    """Measure a trained run, or a bundle of one, on labelled pictures.

    Parameters
    ----------
    topk
        A picture counts for the second accuracy when its class is among so many; not used where
        pictures have several labels.
    size
        Show a run pictures of another size than its own, where its network takes several.
    csv
        Write one row per picture to this table.
    report
        Write a page for people to this file: what the model can and cannot do on these pictures.
    """
    output = output or Output()
    from crosspatch.cli.screen import Screen, print_json
    from crosspatch.deploy.loading import MANY, load

    existing_model(run)
    check_target(csv)
    check_target(report, "--report")
    with Screen(stderr=output.json) as screen:
        reading = typed(columns or Columns())
        shape = (size, size) if isinstance(size, int) else size
        predictor = load(run, engine=engine, batch=MANY, size=shape)
        found = _measure(screen, predictor, run, data, split, topk, reading, multi_label)
        if csv is not None:
            write_table(csv, found.rows)
        if report is not None:
            _write_page(report, run, data, found)
        if not output.json:
            title = f"{run} on {data}: {found.why}"
            _print(screen, title, found.split, found.metrics, found.skipped)
            if report is not None:
                screen.line()
                screen.line(f"to read what it came to, open {report}")
    if output.json:
        skipped = [{"path": path, "reason": reason} for path, reason in found.skipped]
        head = {"run": str(run), "engine": found.engine, "data": data, "split": found.split}
        head |= {"reduction": found.reduction, "size": list(predictor.preprocess.size)}
        print_json({**head, **found.metrics, "skipped": skipped})
    return 0


class _Found(NamedTuple):
    """What was measured: on which split and why, by what, its figures, predictions and unread
    files, how sure it was, and the pictures."""

    split: str
    why: str
    engine: dict[str, Any]
    reduction: str
    metrics: dict[str, Any]
    rows: list[dict[str, Any]]
    skipped: list[tuple[str, str]]
    reliability: list[dict[str, Any]]
    source: Source


def _measure(
    screen: Any,
    predictor: Predictor,
    run: Path,
    data: str,
    split: str,
    topk: int,
    reading: dict[str, Any],
    multi_label: bool,
) -> _Found:
    from crosspatch.data.sources import match_classes
    from crosspatch.metrics.classification import topk as share_in_topk
    from crosspatch.metrics.reliability import of_answers
    from crosspatch.metrics.tails import with_groups
    from crosspatch.tasks import make_task
    from crosspatch.training.package import class_counts

    several = predictor.task == "multilabel"
    reading = reading or _reading_of_run(_folder(run), data)
    source = _opened(run, data, {**reading, "multi_label": several or multi_label}, several)
    labels = match_classes(source, predictor.classes)
    chosen, name, why = choose(_folder(run), source, split)
    answers = predictor.predict(
        [partial(source.read, int(index)) for index in chosen],
        progress=lambda done, total: screen.progress("evaluating", done, total),
    )
    keys = [source.items[index].key for index in chosen]
    if not len(answers.ok):
        raise DataError(
            f"none of {len(chosen):,} pictures in {data} could be read",
            "labelled pictures (JPEG, PNG, WebP, BMP, GIF or TIFF)",
            f"look at them; the first is {keys[0]}: {answers.failures[0].reason}",
        )
    task = make_task(predictor.task, answers.classes, predictor.thresholds)
    truth = labels[chosen[answers.ok]]
    metrics = task.metrics(answers.probs, truth)
    if not several:
        k = min(topk, len(answers.classes))
        metrics["topk"] = {"k": k, "accuracy": share_in_topk(answers.probs, truth, k)}
    metrics = with_groups(metrics, class_counts(_folder(run)))
    read = [keys[place] for place in answers.ok]
    rows = list(task.predictions(read, truth, answers.probs, name))
    skipped = [(one.path, one.reason) for one in source.skipped]
    skipped += [(keys[one.index], one.reason) for one in answers.failures]
    how = (predictor.engine.setting._asdict(), predictor.reduction)
    sure = of_answers(answers.probs, truth)
    return _Found(name, why, *how, metrics, rows, skipped, sure, source)


def _write_page(path: Path, run: Path, data: str, found: _Found) -> None:
    """The page of what was measured. Raises UsageError where it cannot be written."""
    from crosspatch.report.page import write_page
    from crosspatch.report.run import judged_page

    skipped = len(found.skipped)
    told = [f"Judged by {run}: {found.why}."]
    told += [f"{skipped:,} files were left out."] if skipped else []
    metrics = {**found.metrics, "reliability": {"after": found.reliability}}
    page = judged_page(_folder(run), data, found.split, metrics, found.rows, found.source, told)
    write_page(path, page)


def _opened(run: Path, data: str, reading: dict[str, Any], several: bool) -> Source:
    """The labelled pictures; several: whether the model gives several labels to a picture. Raises
    DataError where the data do and the model does not."""
    from crosspatch.data.opening import open_source

    source = open_source(data, least_classes=1, **{**reading, "group": "none"})
    if source.multi and not several:
        raise DataError(
            f"pictures of {data} may have several labels, and {run} names one class of each",
            "data with one label to a picture, or a run that was trained on several",
            f"crosspatch train {data} --multi-label, then evaluate that run",
        )
    return source


def _reading_of_run(folder: Path, data: str) -> dict[str, str]:
    """How the run read its own data, when these are meant: columns need not be told again."""
    from crosspatch.training.run import RunFolder

    run = RunFolder(folder)
    config = run.read_config() if run.config_path.is_file() else {}
    if config.get("run", {}).get("data") != data:
        return {}
    return config.get("reading", {})


def _folder(run: Path) -> Path:
    """The run folder whose split counts: of a bundle the one that it lies in and was made from."""
    if run.is_dir():
        return run

    from crosspatch.deploy.bundle import read_bundle
    from crosspatch.deploy.loading import run_of

    return run_of(read_bundle(run)) or run


def choose(run: Path, source: Source, split: str) -> tuple[np.ndarray, str, str]:
    """(item indices, name of the split, a sentence that says which pictures these are).

    Raises UsageError when `split` is asked for and neither the run nor the folders name it.
    """
    import numpy as np

    from crosspatch.data.split import SPLITS

    every = np.arange(len(source))
    given = np.array([item.split or "" for item in source.items])
    parts = _split_of_run(run, source)
    whose = "the {} pictures of this run (--split all takes all)"
    if parts is None:
        parts = {name: every[given == name] for name in SPLITS}
        whose = "the pictures in its {} folder"
    filled = [name for name in ("test", "val") if len(parts[name])]
    name = (filled or ["all"])[0] if split == "auto" else split
    if name == "all":
        return every, name, "all its pictures"
    if not len(parts[name]):
        raise UsageError(
            f"--split {name}, but there are no {name} pictures",
            "the data the run was trained on, or data in folders train, val and test",
            "--split all",
        )
    return parts[name], name, whose.format(name)


def _split_of_run(run: Path, source: Source) -> dict[str, np.ndarray] | None:
    """The run's own split when `source` holds all pictures that it names, else None."""
    from crosspatch.data.split import SPLITS, read_split

    path = run / "split.csv"
    if not path.is_file():
        return None
    try:
        split = read_split(path, source)
    except DataError:  # other pictures than those of the run: they have no split there
        return None
    return {name: getattr(split, name) for name in SPLITS}


def _print(
    screen: Any, head: str, name: str, metrics: dict[str, Any], skipped: list[tuple[str, str]]
) -> None:
    from crosspatch.cli import words

    screen.line(head)
    screen.score(name, metrics)
    screen.groups(metrics)
    screen.line()
    screen.class_table(metrics)
    if "confusion" in metrics:
        screen.confused(metrics)
    if skipped:
        screen.line()
        screen.line(f"{words.plural(len(skipped), 'file')} left out", "yellow")
        screen.unreadable(skipped)
