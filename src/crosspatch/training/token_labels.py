# SPDX-License-Identifier: Apache-2.0
"""Token labels: written by a teacher (`crosspatch label`), and looked at before a run learns from
them (`crosspatch train --labels`)."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch

from crosspatch.data.augment import normalise
from crosspatch.data.decode import UnreadableImage
from crosspatch.data.opening import open_source
from crosspatch.data.prepare import load_picture
from crosspatch.data.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocess
from crosspatch.data.sources import Source
from crosspatch.data.token_labels import (
    MOST_CLASSES,
    About,
    Draft,
    State,
    TokenLabels,
    keys_hash,
    strongest,
)
from crosspatch.errors import DataError, Interrupted, UsageError
from crosspatch.models.class_map import class_map, map_size
from crosspatch.objectives.teacher import Teacher
from crosspatch.processor import cores
from crosspatch.training import machine
from crosspatch.training.package import read_config
from crosspatch.training.pictures import Pictures
from crosspatch.training.recipe import Recipe
from crosspatch.training.reporter import Reporter, Silent
from crosspatch.training.run import RunFolder
from crosspatch.training.state import flush_folder
from crosspatch.training.teacher import find_teacher, load_teacher, refuse_taught
from crosspatch.training.weights import trained_on

ALL = 32  # so many classes are all kept
TOP = 5  # of more, as the authors do
BATCH = 64  # pictures that the teacher sees at once
TELL = 3  # batches after which the time is estimated
DOING = "labelling"


class Wish(NamedTuple):
    """How pictures are labelled where the teacher does not say: top: logits kept at each place;
    size: (H, W) in pixels; fit: of `data.preprocess.FITS`; batch: pictures at once."""

    top: int | None = None
    size: tuple[int, int] | None = None
    fit: str | None = None
    batch: int = BATCH


def label_pictures(
    spec: str | Path,
    asked: str,
    out: Path,
    wish: Wish | None = None,
    *,
    reading: Mapping[str, Any] | None = None,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Write the labels of every readable picture of `spec`, by the teacher `asked`, to `out`.

    Pictures are not augmented. What was written before an interruption is kept and gone on with.
    Summary: labels, data, teacher, images, skipped, classes, grid, top, size, fit, bytes, seconds
    and images_per_second (of this call), agreement (see `agreement`). Raises UsageError, DataError
    and Interrupted.
    """
    began, wish, reporter = time.perf_counter(), wish or Wish(), reporter or Silent()
    if out.exists():
        raise UsageError(f"{out} exists", "a new file: nothing is overwritten",
                         "choose another --out, or delete it first")  # fmt: skip
    source = open_source(spec, **(reading or {}))
    if source.multi:
        raise UsageError(f"token labels of {spec}, whose pictures may have several labels",
                         "one label to a picture", "leave --multi-label away")  # fmt: skip
    record, teacher, about, preprocess = _prepared(source, asked, wish)
    if about.grid == (1, 1):
        reporter.message(
            f"The teacher's map of {preprocess.size[0]}x{preprocess.size[1]} pixels has one place: "
            "all patches of a picture get one label (--size of more pixels gives more places)."
        )
    draft = Draft(out, about, len(source))
    taught = _taught(record, source)
    todo = draft.todo
    if len(todo) < len(source):
        reporter.message(f"goes on: {len(source) - len(todo):,} pictures were labelled before")
    try:
        _write(draft, source, teacher, preprocess, taught, wish.batch, reporter)
    except KeyboardInterrupt as stop:
        raise Interrupted(
            "stopped by Ctrl-C", f"what was labelled is kept beside {out}", "type the same again"
        ) from stop
    labels = draft.finish()
    flush_folder(out.absolute().parent)
    took = time.perf_counter() - began
    return _summary(labels, source, str(spec), len(todo), took)


def _prepared(
    source: Source, asked: str, wish: Wish
) -> tuple[dict[str, str], Teacher, About, Preprocess]:
    """The teacher, its record, what the labels will be of, and how it is shown pictures: as they
    are, at its size."""
    count = len(source.classes)
    if count > MOST_CLASSES:
        raise UsageError(f"labels of {count:,} classes", f"{MOST_CLASSES:,} classes at most",
                         "leave classes away")  # fmt: skip
    if wish.top is not None and not 1 <= wish.top <= count:
        raise UsageError(f"--top {wish.top} of {count:,} classes", f"1 to {count:,}",
                         "leave --top away")  # fmt: skip
    record = find_teacher(asked)
    student: Any = SimpleNamespace(
        teacher=record, mean=IMAGENET_MEAN, std=IMAGENET_STD, size=None, objective="token-labeling"
    )
    teacher = load_teacher(student, source.classes)
    teacher.size = wish.size or teacher.size
    preprocess = Preprocess(teacher.size, teacher.size, wish.fit or _fit_of(record))
    grid = map_size(teacher.moved(torch.device(machine.look().device)), teacher.size)
    about = About(
        fingerprint=source.fingerprint(),
        keys=keys_hash(source),
        classes=source.classes,
        teacher=record,
        size=teacher.size,
        fit=preprocess.fit,
        grid=grid,
        top=wish.top or (count if count <= ALL else TOP),
    )
    return record, teacher, about, preprocess


def _fit_of(record: Mapping[str, str]) -> str:
    """How the teacher's own pictures were fitted."""
    if record.get("kind") != "run":
        return "crop"
    return Preprocess.from_dict(read_config(Path(record["path"]))["preprocessing"]).fit


def _taught(record: Mapping[str, str], source: Source) -> np.ndarray:
    """The items (indices) that the teacher was trained on, where it is a run on these data."""
    run = RunFolder(Path(record.get("path", "")).parent)
    if record.get("kind") != "run" or not run.config_path.is_file():
        return np.empty(0, np.int64)
    return trained_on(run, source)


def _write(
    draft: Draft,
    source: Source,
    teacher: Teacher,
    preprocess: Preprocess,
    taught: np.ndarray,
    batch: int,
    reporter: Reporter,
) -> None:
    """All rows that are missing."""
    device = torch.device(machine.look().device)
    module, todo, count = teacher.moved(device), draft.todo, len(source)
    done, began = count - len(todo), time.perf_counter()
    for number, (rows, pictures, bad) in enumerate(_loaded(source, todo, preprocess, batch)):
        if len(bad):
            draft.mark(bad, State.UNREADABLE)
        if len(rows):
            with torch.no_grad():
                images = normalise(torch.from_numpy(pictures).to(device), preprocess)
                found = class_map(module, teacher.view(images))
                kept = strongest(teacher.arranged(found), draft.about.top)
            state = np.where(np.isin(rows, taught), State.TAUGHT, State.LABELLED)
            draft.write(rows, *kept, state)
        done += len(rows) + len(bad)
        reporter.progress(DOING, done, count)
        if number + 1 == TELL and done < count:
            speed = (done - count + len(todo)) / (time.perf_counter() - began)
            left = (count - done) / speed
            reporter.message(f"{DOING}: {speed:,.0f} pictures a second, about {left:,.0f} s to go")


def _loaded(
    source: Source, items: np.ndarray, preprocess: Preprocess, batch: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Batch by batch the items that can be read, their pictures uint8 (B, H, W, 3), and the others;
    the next batch is decoded while one is used."""

    def load(item: int) -> np.ndarray | None:
        try:
            return load_picture(source, item, preprocess)
        except UnreadableImage:
            return None

    parts = [items[at : at + batch] for at in range(0, len(items), batch)]
    with ThreadPoolExecutor(cores()) as pool:
        begin = lambda part: [pool.submit(load, int(item)) for item in part]
        waiting: list[Future] = begin(parts[0]) if parts else []
        for number, part in enumerate(parts):
            found = [one.result() for one in waiting]
            waiting = begin(parts[number + 1]) if number + 1 < len(parts) else []
            good = np.array([one is not None for one in found], bool)
            pictures = [one for one in found if one is not None]
            stacked = np.stack(pictures) if pictures else np.empty((0, 1, 1, 3), np.uint8)
            yield part[good], stacked, part[~good]


def _summary(
    labels: TokenLabels, source: Source, data: str, done: int, seconds: float
) -> dict[str, Any]:
    about, state = labels.about, labels.state
    bad = np.flatnonzero(state == State.UNREADABLE)
    return {
        "labels": str(labels.path),
        "data": data,
        "teacher": about.teacher["where"],
        "images": int((state != State.UNREADABLE).sum()),
        "skipped": [source.items[int(item)].key for item in bad],
        "classes": list(about.classes),
        "grid": list(about.grid),
        "top": about.top,
        "size": list(about.size),
        "fit": about.fit,
        "bytes": labels.bytes,
        "seconds": round(seconds, 3),
        "images_per_second": round(done / seconds, 1),
        "agreement": agreement(labels, source),
    }


def agreement(labels: TokenLabels, source: Source, batch: int = 512) -> dict[str, Any]:
    """How often labels name the picture's class: `places`, the largest logit at a place;
    `pictures`, that of the mean over all places; `unseen`, the latter of pictures that the teacher
    was not trained on (None without any) and `unseen_images`, their number."""
    truth, rows = source.labels, np.flatnonzero(labels.state != State.UNREADABLE)
    if not len(rows):
        raise DataError(
            f"none of the {len(source):,} pictures can be read",
            "A picture is a whole JPEG, PNG, WebP, BMP, GIF or TIFF file",
            "Open one of them in an image viewer to see what is wrong",
        )
    places, right = 0.0, np.zeros(len(source), bool)
    for at in range(0, len(rows), batch):
        part = rows[at : at + batch]
        maps = labels.maps(torch.from_numpy(part))
        wanted = torch.from_numpy(truth[part])
        places += float((maps.argmax(dim=1) == wanted[:, None, None]).float().mean((1, 2)).sum())
        right[part] = (maps.mean((2, 3)).argmax(dim=1) == wanted).numpy()
    unseen = labels.state == State.LABELLED
    return {
        "places": places / len(rows),
        "pictures": float(right[rows].mean()),
        "unseen": float(right[unseen].mean()) if unseen.any() else None,
        "unseen_images": int(unseen.sum()),
    }


def find_labels(asked: str | None, source: Source, recipe: Recipe) -> dict[str, str]:
    """What a recipe keeps of the labels that were asked for: their file and its sha256.

    Looked at before a picture is read: raises DataError and UsageError for a file that is not
    whole, or of other data, classes or fitting.
    """
    if asked is None:
        return {}
    if recipe.penalties:
        raise UsageError(f"--labels with --recipe {recipe.name}",
                         "a recipe that trains the network: a linear probe has no patches",
                         "leave --labels away")  # fmt: skip
    path = Path(asked).expanduser()
    if not path.is_file():
        raise UsageError(f"there is no file {asked}", "what crosspatch label wrote",
                         "correct --labels")  # fmt: skip
    labels = TokenLabels(path)
    labels.require(source, recipe.fit, recipe.store)
    return {"path": str(path.resolve()), "sha256": labels.sha256}


def refuse_labels(record: Mapping[str, str], pictures: Pictures) -> list[str]:
    """Sentences on the labels of a recipe, where it has some.

    Raises DataError where a training picture has no labels, and UsageError where their teacher was
    trained on pictures that would judge its student here.
    """
    if not record:
        return []
    labels, split = TokenLabels(record["path"], record["sha256"]), pictures.split
    judging = np.concatenate([split.val, split.test])
    labels.require_rows(split.train, judging, [item.key for item in pictures.source.items])
    if Path(labels.about.teacher.get("path", "-")).exists():
        refuse_taught(labels.about.teacher, pictures)
    about, (rows, columns) = labels.about, labels.about.grid
    return [f"Every patch has a label by {about.teacher['where']}, of {rows}x{columns} a picture."]
