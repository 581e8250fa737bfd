# SPDX-License-Identifier: Apache-2.0
"""report.html: what a training, or the judging of a model, came to.

The first screen is for whoever wants to know whether it is good enough; what is below is for those
who want to know why. The page reads what the run's folder holds, measures what is missing
(`explain.evidence`) and keeps that in report.json, so that writing it again is quick.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from markupsafe import Markup

from crosspatch.data.opening import open_source
from crosspatch.data.sources import Source
from crosspatch.deploy.predictor import Predictor
from crosspatch.deploy.torch_engine import TorchEngine
from crosspatch.errors import CrosspatchError, DataError
from crosspatch.explain.evidence import gather, worst
from crosspatch.report import curves, plain, tables
from crosspatch.report.explained import section
from crosspatch.report.mistakes import (
    LABELS,
    MOST_LABELS,
    Pictures,
    mistakes,
    samples,
    suspected,
    write_labels,
)
from crosspatch.report.page import between, percent, render, size, write_page
from crosspatch.report.story import Story, baseline_score, named, read_rows
from crosspatch.training.package import load_model
from crosspatch.training.run import RunFolder

PAGE = "report.html"
EXPLAINED = 3  # mistakes of which it is shown what decided them
Progress = Callable[[str, int, int], None]


def write_report(run_folder: str | Path, *, progress: Progress | None = None) -> Path:
    """Write report.html, label_errors.csv and the evidence in report.json of a run that has ended;
    returns the page's path.

    progress: called with (what is done, pictures done, all). Raises DataError where the run's own
    tables are missing or damaged, UsageError where the folder cannot be written.
    """
    run = RunFolder(run_folder)
    report, rows = read_report(run.path), read_rows(run.path / "predictions.csv")
    source, remarks = _source(report)
    judged = "test" if report.get("test") else "val"
    mine = [row for row in rows if row["split"] == judged]
    if report.get(judged) is None:
        raise DataError(
            f"{run.path} was judged on no picture",
            "a run with pictures to validate or test with",
            "add pictures, about 20 for each class",
        )
    if "evidence" not in report:
        trained_on = [row["path"] for row in read_rows(run.path / "split.csv")
                      if row["split"] == "train"]  # fmt: skip
        evidence = gather(run.path, report, source, mine, trained_on, progress)
        report = {**read_report(run.path), "evidence": evidence}
        run.write_report(report)
    doubted = suspected(rows)
    if doubted:
        write_labels(run.path / LABELS, doubted)
    others = [row for row in rows if row["split"] != judged]
    story = Story(str(report["data"]), judged, report[judged], mine, others, report, source,
                  remarks)  # fmt: skip
    path = run.path / PAGE
    looks = _explained(run.path, story)
    write_page(path, page(story, doubted, LABELS if doubted else "", looks))
    return path


def _explained(run: Path, story: Story) -> Markup:
    """What decided some of the worst mistakes; empty where the network cannot be taken apart."""
    if story.source is None:
        return Markup("")
    try:
        trained = load_model(run)
        predictor = Predictor(TorchEngine(trained), trained.classes, trained.preprocess)
        place = {item.key: index for index, item in enumerate(story.source.items)}
        keys = [row["path"] for row in worst(story.rows, EXPLAINED) if row["path"] in place]
        pixels = [predictor.pixels(partial(story.source.read, place[key])) for key in keys]
        return section(trained, pixels, [named(key, 60) for key in keys])
    except Exception:  # a piece of the page, which is whole without it
        return Markup("")


def judged_page(
    run: Path,
    data: str,
    split: str,
    metrics: dict[str, Any],
    rows: Sequence[dict[str, Any]],
    source: Source,
    remarks: Sequence[str] = (),
) -> str:
    """The page of a model judged on pictures: those of its run, or others.

    run: the run's folder, or where a bundle lies; metrics, rows: of the task, for these pictures.
    Thresholds are chosen on the run's validation pictures, where they are known and others.
    """
    try:
        report = read_report(run)
    except DataError:  # a bundle away from its run
        report = {}
    own = report.get("data") == data and split in ("val", "test")
    if not own:  # what was measured on the run's own pictures says nothing of these
        known = report.get("evidence") or {}
        kept = {key: known[key] for key in ("latency", "bytes") if key in known}
        report = {**report, "evidence": kept, "baseline": {}}
    theirs = read_rows(run / "predictions.csv") if report else []
    asked = {row["path"] for row in rows}
    others = [row for row in theirs if row["split"] == "val" and row["path"] not in asked]
    story = Story(data, split, metrics, rows, others, report, source, tuple(remarks))
    return page(story, suspected(rows))


def read_report(folder: Path) -> dict[str, Any]:
    """report.json of a run. Raises DataError where it is missing or damaged."""
    path = RunFolder(folder).report_path
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(report, dict) or not {"data", "classes", "config"} <= set(report):
            raise ValueError("not the report of a run")
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read ({error})",
            "the report of a run that has ended",
            f"finish the run: crosspatch train DATA --out {folder} --resume",
        ) from error
    return report


def _source(report: dict[str, Any]) -> tuple[Source | None, tuple[str, ...]]:
    """The pictures of a run where they still are what they were, and what there is to say."""
    reading = report["config"].get("reading") or {}
    try:
        source = open_source(report["data"], **reading)
    except CrosspatchError as error:
        return None, (f"Pictures are not shown: {error.got}.",)
    if list(source.classes) != list(report["classes"]):
        return None, ("Pictures are not shown: the data now have other classes.",)
    return source, ()


def page(
    story: Story,
    doubted: list[dict[str, str]],
    labels: str = "",
    explained: Markup | str = "",
) -> str:
    """The page of a story. doubted: rows of `mistakes.suspected`; labels: the file they are in,
    as it is linked, "" without one; explained: a piece about what decided single answers."""
    pictures = Pictures(story.source)
    figure, low, high = story.score
    shown = [
        (pictures.thumb(row["path"]),
         f"{named(row['label'])} → {named(row['suggested'])}? {named(row['path'], 60)}")
        for row in doubted[:MOST_LABELS]
    ]  # fmt: skip
    evidence = story.evidence
    return render(
        "report.html",
        title=named(Path(story.data).name or story.data, 60),
        story=story,
        model=named(story.report.get("model", ""), 60),
        figure=percent(figure),
        span=between((low, high)) if low is not None and high is not None else "",
        kind="mean average precision" if story.several else "accuracy",
        stats=_stats(story),
        lead=plain.lead(story),
        verdict=plain.against_baseline(story),
        can=plain.can(story),
        cannot=plain.cannot(story),
        samples=samples(story, pictures),
        curves=curves.training_curves(story),
        classes=tables.class_table(story),
        groups=tables.group_table(story),
        matrix=tables.matrix(story),
        whole=len(story.classes) <= tables.MATRIX,
        pairs=[[named(a), named(b), f"{n:,}", f"{total:,}"]
               for a, b, n, total in tables.confused_pairs(story)],
        reliability=curves.reliability_figure(story),
        abstain=curves.abstain_figure(story),
        thresholds=tables.threshold_table(story),
        mistakes=mistakes(story, pictures),
        explained=explained,
        gallery=evidence.get("neighbours"),
        doubted=len(doubted),
        labels=labels,
        doubted_shown=[one for one in shown if one[0]],
        robustness=tables.robustness_table(story),
        speed=_speed(story),
        collect=plain.collect(story),
        collect_table=tables.collect_table(story),
        learning=evidence.get("learning"),
        learning_figure=curves.learning_figure(story),
        settings=tables.settings_table(story),
        left_out=evidence.get("left_out") or {},
        seconds=evidence.get("seconds"),
    )  # fmt: skip


def _stats(story: Story) -> list[tuple[str, str, str]]:
    """(value, label, note) beside the headline."""
    figure = story.score[0]
    shown = []
    for kind, said in plain.SIMPLE.items():
        found = story.baseline(kind)
        if found is not None:
            low, high = found.get("low"), found.get("high")
            span = between((low, high)) if low is not None and high is not None else ""
            shown.append((percent(baseline_score(found)), f"{said}, before training", span))
    if not shown and story.commonest is not None:
        shown.append((percent(story.commonest), "always the commonest class", ""))
    if figure is not None and story.several:
        shown.append((percent(story.metrics["accuracy"]), "pictures with every label right", ""))
    speed = story.evidence.get("latency")
    if speed:
        shown.append((f"{1000 * speed['median']:.3g} ms", "for one picture", "one core, decoded"))
    if story.evidence.get("bytes"):
        shown.append((size(story.evidence["bytes"]), "weights", ""))
    return shown


def _speed(story: Story) -> list[tuple[str, str, str]]:
    found, report = story.evidence.get("latency"), story.report
    rows = []
    if found:
        low, high = 1000 * found["low"], 1000 * found["high"]
        rows.append(
            (
                f"{1000 * found['median']:.3g} ms",
                "one picture, one thread",
                f"{low:.3g} to {high:.3g} ms in 9 of 10 of {found['count']} turns",
            )
        )
    if story.evidence.get("bytes"):
        rows.append((size(story.evidence["bytes"]), "weights on the disk", ""))
    if report.get("parameters"):
        rows.append((f"{report['parameters']:,}", "parameters", ""))
    if report.get("macs"):
        rows.append((f"{report['macs'] / 1e6:,.1f} M", "multiply-adds a picture", ""))
    return rows  # fmt: skip
