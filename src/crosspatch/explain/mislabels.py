# SPDX-License-Identifier: Apache-2.0
"""Labels that are likely wrong, by what a trained run makes of the pictures.

Two opinions are pooled (`metrics.label_errors`): that of a linear layer on responses to whitened
patches, which for each picture is fitted to all others (`metrics.ridge.left_out`), and that of a
run, if there is one. A run has seen the labels of its training pictures; where it has learnt them
by heart it is not asked, nor where it knows so little that with it the labels are less likely.
docs/mislabels.md tells what was measured.
"""

from __future__ import annotations

import csv
import io
import shlex
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from crosspatch.data.audit import Audit
from crosspatch.data.findings import Finding
from crosspatch.data.skipped import quoting
from crosspatch.deploy.backbone import Backbone
from crosspatch.deploy.embedding import embedder, of_model, patches_of
from crosspatch.deploy.loading import load, run_of
from crosspatch.deploy.predictor import Picture
from crosspatch.errors import DataError, UsageError
from crosspatch.metrics import label_errors, ridge
from crosspatch.metrics.calibration import apply_temperature, fit_temperature

Progress = Callable[[int, int], None]
COLUMNS = ("path", "label", "suggested", "score")
LEAST = 20  # pictures below which nothing is said
PENALTY = 0.03
SURE = 0.95  # of the score, from which on a label is listed
HEART = 0.98  # share of the training pictures that are named right: labels learnt by heart
SHOWN = 100  # items of the finding; the table has all
KIND = "mislabels"
HEARTFELT = (
    " The run was not asked: it names nearly all of its training pictures as labelled, so that it "
    "hides wrong labels. A run that was trained more briefly sees more."
)
WEAK = (
    " The network was not asked: with its opinion the labels are less likely than by whitened "
    "patches alone, so it knows these pictures too little. One that was trained longer sees more."
)


class Mislabels(NamedTuple):
    """finding: for the audit; rows: of the table, COLUMNS each, the most suspicious first; probs:
    (M, K) the pooled probabilities of the pictures looked at, places: (M,) theirs among those
    given; classes: K names."""

    finding: Finding
    rows: list[dict[str, Any]]
    probs: np.ndarray
    places: np.ndarray
    classes: tuple[str, ...]


def mislabels(
    run: str | Path | Backbone | None,
    pictures: Sequence[Picture],
    paths: Sequence[str],
    labels: Sequence[str],
    *,
    table: str = "mislabels.csv",
    progress: Progress | None = None,
) -> Mislabels:
    """Looks for wrong labels of N pictures, with the eyes of a run (or of a bundle beside its run),
    or of weights that belong to none.

    run: None for the patches alone; pictures: as `Predictor.predict` takes them; paths: their
    names; labels: class names; table: the name that the finding gives to the list. progress: called
    with (pictures done, all), one pass for each opinion. Raises UsageError for a run with several
    labels to a picture and for pictures none of which can be read, DataError for damaged files.
    """
    if not len(pictures) == len(paths) == len(labels):
        raise ValueError(f"{len(pictures)} pictures, {len(paths)} paths, {len(labels)} labels")
    classes = tuple(sorted(set(labels)))
    if len(pictures) < LEAST or len(classes) < 2:
        nothing = np.zeros((0, len(classes)))
        few = _finding([], len(pictures), table, few=True)
        return Mislabels(few, [], nothing, np.zeros(0, np.int64), classes)
    number = {name: place for place, name in enumerate(classes)}
    known = np.array([number[label] for label in labels], np.int64)
    passes = len(pictures) * (1 if run is None else 2)

    def tell(done: int, _: int, before: int = 0) -> None:
        if progress is not None:
            progress(before + done, passes)

    features = patches_of(pictures).embed(pictures, progress=tell)
    ok = np.flatnonzero(np.isfinite(features).all(axis=1))
    names, given = [paths[at] for at in ok.tolist()], known[ok]
    probs, remark = opinion(features[ok], given, len(classes)), ""
    if run is not None:
        own = _of_run(run, pictures, classes, known, ok, partial(tell, before=len(pictures)))
        both = label_errors.pooled(own, probs)
        if _by_heart(run, own, given, names):
            remark = HEARTFELT
        elif _surprise(both, given) > _surprise(probs, given):
            remark = WEAK
        else:
            probs = both
    rows = _rows(probs, given, classes, names)
    return Mislabels(_finding(rows, len(ok), table, remark), rows, probs, ok, classes)


def findings(
    run: str | Path | Backbone, audit: Audit, progress: Progress | None = None
) -> list[Finding]:
    """For `crosspatch audit --run` and `--weights`: the finding, whose command trains with the
    suggested labels.

    Raises as `mislabels` does, and UsageError for data with several labels to a picture.
    """
    source = audit.source
    if source.multi:
        raise UsageError(
            "pictures have several labels",
            "one label to a picture",
            "leave --run or --weights away",
        )
    found = mislabels(
        run,
        [partial(source.read, at) for at in range(len(source))],
        [item.key for item in source.items],
        [source.named(item.label) for item in source.items],
        progress=progress,
    )
    if not found.rows:
        return [found.finding]
    places = {item.key: at for at, item in enumerate(source.items)}
    told = {places[row["path"]]: (row["suggested"], row["score"]) for row in found.rows}
    command, text = audit.relabel(told), found.finding.text
    if command.startswith("crosspatch train"):
        text += (
            " The command trains with the labels that seem right: they stand first in its table; "
            "where the one in the column `was` is right, put it back before."
        )
    return [found.finding._replace(text=text, command=command)]


def opinion(features: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """Probabilities (N, K) by a linear layer on features (N, D) that is fitted without the picture,
    at the temperature that fits the labels (N,) best. Raises ValueError for fewer than two."""
    said = ridge.left_out(features, ridge.one_hot(labels, classes), (PENALTY,))[0]
    raised = np.exp(said - said.max(axis=1, keepdims=True))
    soft = (raised / raised.sum(axis=1, keepdims=True)).astype(np.float32)
    return apply_temperature(soft, fit_temperature(soft, labels))


def _surprise(probs: np.ndarray, labels: np.ndarray) -> float:
    """The mean negative log-likelihood of labels (N,)."""
    own = probs[np.arange(len(labels)), labels]
    return float(-np.log(np.maximum(own, label_errors.FLOOR)).mean())


def _of_run(
    run: str | Path | Backbone,
    pictures: Sequence[Picture],
    classes: tuple[str, ...],
    labels: np.ndarray,
    ok: np.ndarray,
    tell: Progress,
) -> np.ndarray:
    """The run's probabilities of `classes` for the pictures in `ok`; where it knows others, those
    of a layer on its features."""
    chosen = [pictures[at] for at in ok.tolist()]
    if isinstance(run, Backbone):
        seen = of_model(run.trained, run.name).embed(chosen, progress=tell)
        return opinion(seen, labels[ok], len(classes))
    predictor = load(run)
    if predictor.task != "classify":
        raise UsageError(
            f"{run} gives several labels to a picture",
            "a run that names one class",
            "leave the run away",
        )
    if not set(classes) <= set(predictor.classes):
        return opinion(embedder(run).embed(chosen, progress=tell), labels[ok], len(classes))
    columns = [predictor.classes.index(name) for name in classes]
    answer = predictor.predict(chosen, progress=tell)
    found = np.full((len(chosen), len(classes)), 1 / len(classes))
    found[answer.ok] = answer.probs[:, columns] + label_errors.FLOOR
    return found / found.sum(axis=1, keepdims=True)


def _rows(
    probs: np.ndarray, labels: np.ndarray, classes: tuple[str, ...], paths: list[str]
) -> list[dict[str, Any]]:
    """The table: pictures whose label is as unlikely as SURE says."""
    listed, better = label_errors.suspects(probs, labels), label_errors.suggested(probs, labels)
    return [
        {
            "path": paths[at],
            "label": classes[labels[at]],
            "suggested": classes[better[at]],
            "score": round(score, 4),
        }
        for at, score in zip(listed.indices.tolist(), listed.scores.tolist(), strict=True)
        if score >= SURE
    ]


def write_table(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """The rows as a CSV that can be corrected: strike out what is right, keep what to change.

    Raises UsageError where the file exists or cannot be written.
    """
    text = io.StringIO()
    names = (row["path"] for row in rows)
    writer = csv.writer(text, lineterminator="\n", quoting=quoting(names))
    writer.writerow(COLUMNS)
    writer.writerows([row[name] for name in COLUMNS] for row in rows)
    try:
        with path.open("x", encoding="utf-8", errors="surrogateescape", newline="") as file:
            file.write(text.getvalue())
    except OSError as error:
        raise UsageError(
            f"{path} cannot be written: {error.strerror or error}",
            "a new file in a folder that you may write",
            "choose another name",
        ) from error


def _folder(run: str | Path) -> Path:
    """The folder of a run, of a bundle's run where one is named."""
    path = Path(run)
    if path.suffix not in (".onnx", ".xml") or path.is_dir():
        return path
    from crosspatch.deploy.bundle import read_bundle

    return run_of(read_bundle(path)) or path


def _by_heart(
    run: str | Path | Backbone, own: np.ndarray, labels: np.ndarray, paths: list[str]
) -> bool:
    """Whether the run names nearly all pictures right that it was trained on: then its opinion of
    those is that of their labels."""
    if isinstance(run, Backbone):
        return False
    table = _folder(run) / "split.csv"
    if not table.is_file():
        return False
    try:
        with table.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
            trained = {row["path"] for row in csv.DictReader(file) if row["split"] == "train"}
    except (KeyError, csv.Error) as error:
        raise DataError(
            f"{table} cannot be read ({error})", "path and split of every picture", "train again"
        ) from error
    inside = np.array([path in trained for path in paths], bool)
    right = own.argmax(axis=1) == labels
    return bool(inside.sum() >= LEAST and right[inside].mean() >= HEART)


def _finding(
    rows: list[dict[str, Any]], seen: int, table: str, remark: str = "", *, few: bool = False
) -> Finding:
    if few:
        text = f"{seen} pictures, or a single class, are too few to tell which labels are wrong."
        return Finding("good", KIND, "Labels were not checked", text, "", [])
    if not rows:
        text = f"No label of {seen:,} pictures is clearly contradicted.{remark}"
        return Finding("warn" if remark else "good", KIND, "No likely mislabels", text, "", [])
    many = "label is" if len(rows) == 1 else "labels are"
    text = (
        f"Of {seen:,} pictures these are the ones whose label is least "
        f"likely, the least likely first. Look at each: hard pictures are among them.{remark}"
    )
    items = [
        {
            "path": row["path"],
            "note": f"labelled {row['label']}, looks like {row['suggested']} ({row['score']:.3f})",
            **row,
        }
        for row in rows[:SHOWN]
    ]
    title = f"{len(rows):,} {many} likely wrong"
    return Finding("warn", KIND, title, text, f"${{EDITOR:-nano}} {shlex.quote(table)}", items)
