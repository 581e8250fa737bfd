# SPDX-License-Identifier: Apache-2.0
"""Which pictures train, which choose (val) and which are touched once (test).

Folders decide where they are given. What is missing is carved out by class, seeded:

    given               val                      test
    nothing             15 % of all              15 % of all
    train               15 % of train            15 % of train
    train, test         15 % of train            test
    train, val          one half of val          the other half of val
    train, val, test    val                      test

So no picture given as val or test is ever trained on. In a class of few pictures the first goes to
train, the second to test, the third to val.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from crosspatch.data.layout import SPLITS
from crosspatch.data.sources import Source
from crosspatch.errors import DataError, near

__all__ = ["SPLITS", "Split", "make_split", "read_split", "write_split"]

_STREAM = 0x73706C69  # keeps these draws apart from all others of the same seed


@dataclass(frozen=True)
class Split:
    """Indices (int64, ascending) into a source's items; no item is in two of them."""

    train: np.ndarray
    val: np.ndarray
    test: np.ndarray


def make_split(
    source: Source,
    keep: np.ndarray | None = None,
    seed: int = 0,
    fractions: tuple[float, float, float] = (0.70, 0.15, 0.15),
) -> Split:
    """Divide the items (those in `keep`, indices; None: all) as the table above says.

    Stratified by class; the same items and seed give the same split. `fractions` are of train, val
    and test and add up to 1. Raises DataError for a class without a picture to train on.
    """
    kept = np.arange(len(source)) if keep is None else np.sort(np.asarray(keep, dtype=np.int64))
    given = np.array([source.items[index].split or "train" for index in kept], dtype=object)
    pools = {name: kept[given == name] for name in SPLITS}
    _, val, test = fractions
    labels = source.labels
    if len(pools["val"]) and len(pools["test"]):
        parts = pools
    elif len(pools["val"]):
        halves = _carve(pools["val"], labels, seed, {"test": 0.5})
        parts = {"train": pools["train"], "val": halves["rest"], "test": halves["test"]}
    elif len(pools["test"]):
        carved = _carve(pools["train"], labels, seed, {"val": val})
        parts = {"train": carved["rest"], "val": carved["val"], "test": pools["test"]}
    else:
        carved = _carve(pools["train"], labels, seed, {"test": test, "val": val})
        parts = {"train": carved["rest"], "val": carved["val"], "test": carved["test"]}
    _require_every_class(source, parts["train"])
    return Split(**{name: np.sort(parts[name]) for name in SPLITS})


def write_split(path: str | Path, source: Source, split: Split) -> None:
    """Write split.csv: path, class, split; one row per picture in use, in the order of the
    items."""
    rows = sorted((index, name) for name in SPLITS for index in getattr(split, name).tolist())
    with open(path, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["path", "class", "split"])
        for index, name in rows:
            item = source.items[index]
            table.writerow([item.key, source.classes[item.label], name])


def read_split(path: str | Path, source: Source) -> Split:
    """Read split.csv back. Items that it does not name are in no part.

    Raises DataError when it names a picture that the data lacks, or another class or split for it.
    """
    where = {item.key: index for index, item in enumerate(source.items)}
    parts: dict[str, list[int]] = {name: [] for name in SPLITS}
    with open(path, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            index = where.get(row.get("path") or "")
            if index is None:
                raise _differs(path, f"names {row.get('path')!r}, which the data lacks")
            name = source.classes[source.items[index].label]
            if row.get("class") != name:
                raise _differs(path, f"says class {row.get('class')!r} of {row['path']}")
            if row.get("split") not in SPLITS:
                hint = near(str(row.get("split")), SPLITS, 1)
                raise _differs(path, f"says split {row.get('split')!r} (near: {hint or 'none'})")
            parts[row["split"]].append(index)
    return Split(**{name: np.sort(np.array(parts[name], dtype=np.int64)) for name in SPLITS})


def _carve(
    pool: np.ndarray, labels: np.ndarray, seed: int, shares: dict[str, float]
) -> dict[str, np.ndarray]:
    """Draw `shares` of each class of a pool, in their order; one picture at least stays as
    "rest"."""
    taken: dict[str, list[np.ndarray]] = {name: [pool[:0]] for name in (*shares, "rest")}
    for label in np.unique(labels[pool]):
        members = pool[labels[pool] == label]
        members = np.random.default_rng([_STREAM, seed, int(label)]).permutation(members)
        at = 1
        for name, share in shares.items():
            wanted = max(1, round(share * len(members))) if share > 0 else 0
            part = members[at : at + min(wanted, len(members) - at)]
            taken[name].append(part)
            at += len(part)
        taken["rest"] += [members[:1], members[at:]]
    return {name: np.concatenate(parts) for name, parts in taken.items()}


def _require_every_class(source: Source, train: np.ndarray) -> None:
    present = set(source.labels[train].tolist())
    lost = [name for label, name in enumerate(source.classes) if label not in present]
    if lost:
        raise DataError(
            f"no readable picture to train on in {', '.join(lost[:5])}",
            "Every class has at least one picture that can be read",
            "Add pictures, or remove the folder",
        )


def _differs(path: str | Path, how: str) -> DataError:
    return DataError(
        f"{path} {how}",
        "A split belongs to the data it was made from",
        "Give the same data, or start a new run",
    )
