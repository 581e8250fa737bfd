# SPDX-License-Identifier: Apache-2.0
"""The pictures of a run: read once, divided into what trains, chooses and tests."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from crosspatch.data import opening
from crosspatch.data.prepare import ImageSet, Prepared, plan_memory, prepare
from crosspatch.data.sources import Source
from crosspatch.data.split import Split
from crosspatch.errors import DataError
from crosspatch.training.recipe import Recipe
from crosspatch.training.reporter import Reporter


@dataclass
class Pictures:
    """What is trained on: the readable pictures of a source, divided."""

    source: Source
    prepared: Prepared
    split: Split
    fingerprint: str

    def part(self, name: str) -> ImageSet:
        """The pictures of a split, as positions among the readable ones."""
        wanted, kept = getattr(self.split, name), self.prepared.kept
        places = np.searchsorted(kept, wanted)
        found = places < len(kept)
        found[found] = kept[places[found]] == wanted[found]
        if not found.all():
            lost = self.source.items[int(wanted[~found][0])].key
            raise DataError(
                f"{lost} can no longer be read",
                "the pictures the run was begun with",
                "put it back, or train anew with --overwrite",
            )
        return self.prepared.images.subset(places)

    @property
    def validation(self) -> ImageSet:
        """The pictures that choose: `val`, or `train` where there are too few to have any."""
        return self.part("val" if len(self.split.val) else "train")

    def counts(self) -> np.ndarray:
        """(K,) training pictures of each class."""
        return self.source.counts(self.split.train)


_SHARED: ContextVar[dict[Any, Any] | None] = ContextVar("shared", default=None)


@contextmanager
def sharing() -> Iterator[None]:
    """In here several runs on the same data open them once and decode each picture once per size:
    `open_source` and `read_pictures` answer again what they did."""
    token = _SHARED.set({})
    try:
        yield
    finally:
        _SHARED.reset(token)


def open_source(spec: str | Path, **reading: Any) -> Source:
    """`data.opening.open_source`, once for the same words inside of `sharing`."""
    kept = _SHARED.get()
    if kept is None:
        return opening.open_source(spec, **reading)
    key = (str(spec), repr(sorted(reading.items())))
    if key not in kept:
        kept[key] = opening.open_source(spec, **reading)
    return kept[key]


def once(key: Hashable, make: Callable[[], Any]) -> Any:
    """What `make` makes, once for the same key inside of `sharing`."""
    kept = _SHARED.get()
    if kept is None:
        return make()
    if key not in kept:
        kept[key] = make()
    return kept[key]


def read_pictures(source: Source, recipe: Recipe, reporter: Reporter) -> Prepared:
    """Every picture decoded once; the reporter hears how much memory that takes, and how far it
    is."""
    kept, key = _SHARED.get(), (id(source), recipe.preprocess)
    if kept is not None and key in kept:
        return kept[key][1]
    _, memory = plan_memory(len(source), recipe.preprocess)
    reporter.message(f"reading: {memory}")
    tell = lambda done, total: reporter.progress("reading pictures", done, total)
    prepared = prepare(source, recipe.preprocess, progress=tell)
    if kept is not None:
        kept[key] = (source, prepared)  # the source is held, so that its id stays its own
    return prepared
