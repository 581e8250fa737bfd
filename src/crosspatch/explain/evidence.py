# SPDX-License-Identifier: Apache-2.0
"""What a report shows beyond the figures of a training, measured once it has ended.

Robustness, latency, the training pictures nearest to the worst mistakes, what more pictures would
bring. How many pictures are used follows from how much was trained, so that all of it stays near a
tenth of the training; every figure says how many there were.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from crosspatch.data.decode import UnreadableImage
from crosspatch.data.preprocess import Preprocess
from crosspatch.data.sources import Source, match_classes
from crosspatch.deploy.footprint import latency, weights_size
from crosspatch.deploy.loading import load
from crosspatch.deploy.predictor import Predictor
from crosspatch.deploy.robustness import CHANGES, robustness
from crosspatch.explain.collect import SIDE, fixed_features, learning
from crosspatch.metrics.neighbours import nearest
from crosspatch.processor import cores

Progress = Callable[[str, int, int], None]
LEAST, MOST = 300, 12_000  # pictures through the network, whatever was trained
SMALL, CHEAP = 1_200, 5e11  # so many at least where they take no more multiply-adds than this
SHARE = 0.1  # of the training's computing, which takes three times as much a picture
TESTED = 500  # pictures for robustness, at most
GALLERY = 2_000  # training pictures, at most
LEARNT, ASKED = 3_000, 1_000  # training and test pictures for the learning curve, at most
MISTAKES = 12
_STREAM = 0x65766964  # keeps these draws apart from all others of the same seed


def allowance(steps: int, batch: int, macs: float) -> int:
    """How many pictures may pass a network of `macs` multiply-adds after a training of so many
    steps."""
    least = np.clip(CHEAP / max(macs, 1.0), LEAST, SMALL)
    return int(np.clip(3 * SHARE * steps * batch, least, MOST))


def gather(
    run: str | Path,
    report: dict[str, Any],
    source: Source | None,
    rows: Sequence[dict[str, str]],
    trained_on: Sequence[str],
    progress: Progress | None = None,
) -> dict[str, Any]:
    """{latency, bytes, robustness, neighbours, learning, left_out: {name: why}, seconds}.

    report: of the run; source: its pictures, None where they are not there; rows: of
    predictions.csv, those that were judged; trained_on: keys of the training pictures. What fails
    or needs what is not there is left out, with its reason.
    """
    began, tell = time.perf_counter(), progress or (lambda *_: None)
    steps, batch = int(report["steps"]), int(report["config"]["recipe"]["batch"])
    most = allowance(steps, batch, float(report.get("macs") or 0))
    found: dict[str, Any] = {"bytes": weights_size(run)}
    left: dict[str, str] = {}

    def add(name: str, measure: Callable[[], Any]) -> None:
        try:
            value = measure()
        except Exception as error:  # a figure that cannot be had never costs the others
            left[name] = f"{type(error).__name__}: {error}"
        else:
            found.update({name: value} if value is not None else {})
            if value is None:
                left[name] = "too few pictures"

    seconds = float(np.clip(0.02 * report.get("seconds", 0.0), 0.3, 2.0))
    add("latency", partial(latency, run, seconds))
    if source is None:
        reason = "the pictures are no longer where they were"
        left |= dict.fromkeys(("robustness", "neighbours", "learning"), reason)
    else:
        shelf = _Shelf(source, tuple(report["classes"]), tell)
        add("robustness", partial(_robustness, run, shelf, rows, most))
        mistakes = worst(rows)
        add("neighbours", partial(_neighbours, run, shelf, mistakes, trained_on, most))
        add("learning", partial(_learning, shelf, rows, trained_on, most))
    return {**found, "left_out": left, "seconds": round(time.perf_counter() - began, 2)}


def worst(rows: Sequence[dict[str, str]], most: int = MISTAKES) -> list[dict[str, str]]:
    """The wrong answers of which the network was surest; of several labels, those with the most
    labels wrong."""
    wrong = [row for row in rows if row["correct"] != "1"]
    if wrong and "label" not in wrong[0]:
        off = lambda row: sum(len(row[key].split("|")) for key in ("missed", "added") if row[key])
        return sorted(wrong, key=lambda row: (-off(row), row["path"]))[:most]
    return sorted(wrong, key=lambda row: (-float(row["confidence"]), row["path"]))[:most]


def chosen(keys: Sequence[str], most: int) -> list[str]:
    """At most so many of the keys, drawn without regard to class, always the same, in order."""
    if len(keys) <= most:
        return list(keys)
    drawn = np.random.default_rng([_STREAM, len(keys)]).permutation(len(keys))[:most]
    return [str(keys[int(place)]) for place in np.sort(drawn)]


class _Shelf:
    """The pictures of a source by their keys."""

    def __init__(self, source: Source, classes: tuple[str, ...], tell: Progress) -> None:
        self.source, self.classes, self.tell = source, classes, tell
        self.place = {item.key: index for index, item in enumerate(source.items)}
        self.labels = match_classes(source, classes)

    def known(self, keys: Sequence[str]) -> list[str]:
        return [key for key in keys if key in self.place]

    def calls(self, keys: Sequence[str]) -> list[Any]:
        return [partial(self.source.read, self.place[key]) for key in keys]

    def labels_of(self, keys: Sequence[str]) -> np.ndarray:
        return self.labels[[self.place[key] for key in keys]]

    def pixels(self, predictor: Predictor, keys: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """(uint8 (N, H, W, 3) of the model's size, their labels) of those that can be read."""
        read, kept = [], []
        for key, call in zip(keys, self.calls(keys), strict=True):
            try:
                read.append(predictor.pixels(call))
                kept.append(key)
            except UnreadableImage:
                continue
        return np.stack(read), self.labels_of(kept)

    def small(self, keys: Sequence[str], done: int, total: int) -> tuple[np.ndarray, list[str]]:
        """(uint8 (N, 32, 32, 3), keys) of those that can be read."""
        shape = Preprocess.for_pictures(SIDE, "squash")
        read, kept = [], []

        def one(key: str) -> np.ndarray | None:
            try:
                return shape.fit_image(self.source.image(self.place[key], side=SIDE))
            except UnreadableImage:
                return None

        with ThreadPoolExecutor(min(8, cores())) as pool:
            for number, (key, pixels) in enumerate(zip(keys, pool.map(one, keys), strict=True), 1):
                if pixels is not None:
                    read.append(pixels)
                    kept.append(key)
                if number % 100 == 0:
                    self.tell("fitting learning curves", done + number, total)
        return np.array(read, np.uint8).reshape(-1, SIDE, SIDE, 3), kept


def _robustness(
    run: str | Path, shelf: _Shelf, rows: Sequence[dict[str, str]], most: int
) -> list[dict[str, Any]] | None:
    count = min(TESTED, most // (2 * (len(CHANGES) + 1)))
    keys = chosen(shelf.known([row["path"] for row in rows]), count)
    if not keys:
        return None
    predictor = load(run, engine="torch")
    pictures, labels = shelf.pixels(predictor, keys)
    tell = partial(shelf.tell, "trying worse pictures")
    return robustness(predictor, pictures, labels, progress=tell)


def _neighbours(
    run: str | Path,
    shelf: _Shelf,
    mistakes: Sequence[dict[str, str]],
    trained_on: Sequence[str],
    most: int,
) -> dict[str, Any] | None:
    """{gallery, of, pairs: {path of a mistake: {path, class, distance}}}."""
    from crosspatch.deploy.embedding import embedder

    asked = shelf.known([row["path"] for row in mistakes])
    gallery = chosen(shelf.known(trained_on), min(GALLERY, most // 2))
    if not asked or not gallery:
        return None
    embed = embedder(run).embed
    tell = partial(shelf.tell, "looking for similar pictures")
    known = embed(shelf.calls(gallery), progress=tell)
    queries = embed(shelf.calls(asked))
    whole = np.flatnonzero(np.isfinite(known).all(axis=1))
    names = [gallery[int(place)] for place in whole]
    places, distances = nearest(np.nan_to_num(queries), known[whole], 1)
    pairs = {
        key: {
            "path": names[int(place)],
            "class": shelf.source.named(shelf.source.items[shelf.place[names[int(place)]]].label),
            "distance": round(float(distance), 4),
        }
        for key, place, distance in zip(asked, places[:, 0], distances[:, 0], strict=True)
    }
    return {"gallery": len(names), "of": len(trained_on), "pairs": pairs}


def _learning(
    shelf: _Shelf, rows: Sequence[dict[str, str]], trained_on: Sequence[str], most: int
) -> dict[str, Any] | None:
    if shelf.source.multi:
        return None
    wanted = ((trained_on, LEARNT), ([row["path"] for row in rows], ASKED))
    kept = [chosen(shelf.known(keys), min(cap, 3 * most)) for keys, cap in wanted]
    total, done, sets = sum(map(len, kept)), 0, []
    for keys in kept:
        pictures, read = shelf.small(keys, done, total)
        done += len(keys)
        sets.append((fixed_features(pictures), shelf.labels_of(read)))
    return learning(*sets, shelf.classes)
