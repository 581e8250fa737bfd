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
train, the second to test, the third to val. Pictures of one group, exact copies and near-duplicates
stay together: the classes then are shared out as well as whole groups allow, the largest group
first. Where a picture may have several labels, each picture is placed as such a group is. Of a
long tail (`longtail`) training pictures are left out at the end.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from crosspatch.data.groups import units
from crosspatch.data.layout import SPLITS
from crosspatch.data.longtail import thin
from crosspatch.data.skipped import quoting
from crosspatch.data.sources import Item, Source
from crosspatch.errors import DataError, near

__all__ = ["SPLITS", "Split", "carry_split", "gaps", "make_split", "read_split", "write_split"]

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
    twins: Iterable[Sequence[int]] = (),
) -> Split:
    """Divide the items (those in `keep`, indices; None: all) as the table above says.

    Stratified by class; the same items and seed give the same split. `fractions` are of train, val
    and test and add up to 1; `twins`: sets of items that are copies of each other. Raises DataError
    for a class without a picture to train on, and for a group that the data's own splits tear
    apart.
    """
    kept = np.arange(len(source)) if keep is None else np.sort(np.asarray(keep, dtype=np.int64))
    given = np.array([source.items[index].split or "train" for index in kept], dtype=object)
    pools = {name: kept[given == name] for name in SPLITS}
    _, val, test = fractions
    _require_whole_groups(source, kept)
    labels = _columns(source) if source.multi else source.labels
    together = units([item.group for item in source.items], twins)
    if len(pools["val"]) and len(pools["test"]):
        parts = pools
    elif len(pools["val"]):
        halves = _carve(pools["val"], labels, together, seed, {"test": 0.5})
        parts = {"train": pools["train"], "val": halves["rest"], "test": halves["test"]}
    elif len(pools["test"]):
        carved = _carve(pools["train"], labels, together, seed, {"val": val})
        parts = {"train": carved["rest"], "val": carved["val"], "test": pools["test"]}
    else:
        carved = _carve(pools["train"], labels, together, seed, {"test": test, "val": val})
        parts = {"train": carved["rest"], "val": carved["val"], "test": carved["test"]}
    _require_every_class(source, parts["train"])
    if source.tail is not None:
        train = np.sort(parts["train"])
        kept = thin(source.labels[train], len(source.classes), source.tail)
        parts = {**parts, "train": train[kept]}
    return Split(**{name: np.sort(parts[name]) for name in SPLITS})


def gaps(source: Source, split: Split) -> list[str]:
    """A sentence for val and test each, where the split left a class without a picture in it."""
    grouped = any(item.group is not None for item in source.items)
    said, why = [], "too few groups" if grouped else "too few to have one there"
    for name in ("val", "test"):
        part = getattr(split, name)
        lost, given = _lacking(source, part), any(item.split == name for item in source.items)
        if lost and len(part) and not given:
            more = f" and {len(lost) - 5} more" if len(lost) > 5 else ""
            said.append(f"{name} got no picture of {', '.join(lost[:5])}{more}: {why}.")
    return said


def _lacking(source: Source, part: np.ndarray) -> list[str]:
    """The classes of which a part (item indices) has no picture."""
    counts = source.counts(part).tolist()
    return [name for name, count in zip(source.classes, counts, strict=True) if not count]


def _columns(source: Source) -> np.ndarray:
    """(N, K + 2): what each part is to have its share of. The classes, pictures without any, and
    pictures."""
    presence = source.presence
    empty = ~presence.any(axis=1, keepdims=True)
    return np.concatenate([presence, empty, np.ones_like(empty)], axis=1).astype(np.float64)


def write_split(path: str | Path, source: Source, split: Split) -> None:
    """Write split.csv: path, class, split, size (`Source.sizes`); one row per picture in use, in
    the order of the items."""
    sizes = source.sizes()
    rows = sorted((index, name) for name in SPLITS for index in getattr(split, name).tolist())
    with open(path, "w", newline="", encoding="utf-8") as file:
        names = (item.key for item in source.items)
        table = csv.writer(file, lineterminator="\n", quoting=quoting(names))
        table.writerow(["path", "class", "split", "size"])
        for index, name in rows:
            item = source.items[index]
            table.writerow([item.key, source.named(item.label), name, sizes[index]])


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
            name = source.named(source.items[index].label)
            if row.get("class") != name:
                raise _differs(path, f"says class {row.get('class')!r} of {row['path']}")
            if row.get("split") not in SPLITS:
                hint = near(str(row.get("split")), SPLITS, 1)
                raise _differs(path, f"says split {row.get('split')!r} (near: {hint or 'none'})")
            parts[row["split"]].append(index)
    return Split(**{name: np.sort(np.array(parts[name], dtype=np.int64)) for name in SPLITS})


def carry_split(
    path: str | Path, source: Source, kept: np.ndarray, twins: Iterable[Sequence[int]] = ()
) -> Split:
    """The split of split.csv for data that have changed since: pictures that it names stay where
    they were, those that are gone leave it, new ones train.

    kept: indices of the readable items; twins: sets of items that are copies. A new picture goes
    where the data say, else where a copy of it or its group is (of several to test, then val).
    Raises DataError for a class that is left without a picture to train on.
    """
    with open(path, newline="", encoding="utf-8") as file:
        known = {row["path"]: row["split"] for row in csv.DictReader(file)}
    together = units([item.group for item in source.items], twins)
    judges = {}
    for name in ("val", "test"):
        judges |= {int(together[i]): name for i in kept if known.get(source.items[i].key) == name}
    parts: dict[str, list[int]] = {name: [] for name in SPLITS}
    for index in np.sort(kept).tolist():
        item = source.items[index]
        told = item.split if item.split != "train" else None
        if source.tail is not None and item.key not in known:
            continue  # what the tail left out cannot be told from what came
        name = known.get(item.key) or told or judges.get(int(together[index]), "train")
        parts[name].append(index)
    split = Split(**{name: np.array(parts[name], dtype=np.int64) for name in SPLITS})
    _require_every_class(source, split.train)
    return split


def _carve(
    pool: np.ndarray,
    labels: np.ndarray,
    together: np.ndarray,
    seed: int,
    shares: dict[str, float],
) -> dict[str, np.ndarray]:
    """Draw `shares` of each class of a pool, in their order; one picture at least stays as "rest".

    labels: (N,), or (N, C) what parts have their share of; together (N,): the unit of every item.
    Units of several pictures are placed first; the pictures that stand alone then fill up what each
    class lacks. With several labels to a picture all are placed as units.
    """
    names = (*shares, "rest")
    if labels.ndim == 2:
        where = _place_units(pool, labels, together, pool, seed, shares)
        return {name: pool[where == number] for number, name in enumerate(names)}
    _, place, count = np.unique(together[pool], return_inverse=True, return_counts=True)
    grouped, alone = pool[count[place] > 1], pool[count[place] == 1]
    where = _place_units(grouped, labels, together, pool, seed, shares)
    taken: dict[str, list[np.ndarray]] = {
        name: [pool[:0], grouped[where == number]] for number, name in enumerate(names)
    }
    for label in np.unique(labels[alone]):
        members = np.random.default_rng([_STREAM, seed, int(label)]).permutation(
            pool[labels[pool] == label]
        )  # all of the class, so that one copy more or less leaves the others where they are
        members = members[np.isin(members, alone)]
        placed = where[labels[grouped] == label]
        at = 0 if (placed == len(shares)).any() else 1
        total, first = len(members) + len(placed), at
        for number, share in enumerate(shares.values()):
            wanted = max(1, round(share * total)) if share > 0 else 0
            wanted = max(0, wanted - int((placed == number).sum()))
            part = members[at : at + min(wanted, len(members) - at)]
            taken[names[number]].append(part)
            at += len(part)
        taken["rest"] += [members[:first], members[at:]]
    return {name: np.concatenate(parts) for name, parts in taken.items()}


def _place_units(
    grouped: np.ndarray,
    labels: np.ndarray,
    together: np.ndarray,
    pool: np.ndarray,
    seed: int,
    shares: dict[str, float],
) -> np.ndarray:
    """int64 (len(grouped),): the part of each grouped item, as a number: those of `shares`, then
    the rest. Items of one unit get the same."""
    _, unit = np.unique(together[grouped], return_inverse=True)
    if not len(grouped):
        return unit
    several = labels.ndim == 2
    classes = labels.shape[1] if several else int(labels.max()) + 1
    counts = np.zeros((unit.max() + 1, classes))
    if several:
        np.add.at(counts, unit, labels[grouped])
        total = labels[pool].sum(axis=0)
    else:
        np.add.at(counts, (unit, labels[grouped]), 1)
        total = np.bincount(labels[pool], minlength=classes)
    parts = np.array([*shares.values(), 1 - sum(shares.values())])
    drawn = np.random.default_rng([_STREAM, seed, classes]).permutation(len(counts))
    # with several labels: what is much of a rare class first, as there is little choice for it
    size = (counts / np.maximum(total, 1)).sum(1) if several else counts.sum(1)
    order = drawn[np.argsort(-size[drawn], kind="stable")]
    held, where = np.zeros((len(parts), classes)), np.zeros(len(counts), np.int64)
    # with several labels: relative to what is wanted, so that all columns fill up at one pace
    scale = np.maximum(total, 1) * (np.maximum(parts, 1e-9)[:, None] if several else 1)
    for one in order:  # to where the squared distance from the wanted counts grows least
        grows = counts[one] * (2 * (held - parts[:, None] * total) + counts[one])
        cost = np.where(parts > 0, (grows / scale).sum(1), np.inf)
        where[one] = len(parts) - 1 - cost[::-1].argmin()
        held[where[one]] += counts[one]
    single = total - counts.sum(0)
    _fill_gaps(where, counts, held, single, parts)
    return where[unit]


def _fill_gaps(
    where: np.ndarray, counts: np.ndarray, held: np.ndarray, single: np.ndarray, parts: np.ndarray
) -> None:
    """Give each part that will lack a class the smallest unit that has it. First the rest, to which
    every class must go; then the others, unless that takes the last of a class from where it is.

    where (U,): part of each unit, changed here; counts (U, K) of the units; held (P, K) of the
    parts, changed too; single (K,): pictures that stand alone, which fill as many gaps; parts (P,):
    the share of each.
    """
    order = [len(parts) - 1, *range(len(parts) - 1)]
    for part in order:
        for label in np.flatnonzero(counts.sum(0)):
            lacking = [one for one in order if parts[one] > 0 and not held[one, label]]
            if part not in lacking[int(single[label]) :]:
                continue
            having = np.flatnonzero(counts[:, label])
            for one in having[counts[having].sum(1).argsort(kind="stable")]:
                left = held[where[one]] - counts[one]
                if part != order[0] and ((counts[one] > 0) & (left + single == 0)).any():
                    continue
                held[where[one]], held[part] = left, held[part] + counts[one]
                where[one] = part
                break


def _require_whole_groups(source: Source, kept: np.ndarray) -> None:
    first: dict[str, Item] = {}
    for item in (source.items[index] for index in kept.tolist()):
        if item.group is None or item.split is None:
            continue
        other = first.setdefault(item.group, item)
        if other.split != item.split:
            raise DataError(
                f"the group {item.group!r} lies in {other.split} ({other.key}) and in "
                f"{item.split} ({item.key})",
                "Pictures of one group lie in one split, else the figures are too good",
                "Move them together, leave the splits out, or leave --group out (--group none)",
            )


def _require_every_class(source: Source, train: np.ndarray) -> None:
    lost = _lacking(source, train)
    if lost:
        raise DataError(
            f"no readable picture to train on in {', '.join(lost[:5])}",
            "Every class has at least one picture that can be read",
            "Add pictures, or remove the class",
        )


def _differs(path: str | Path, how: str) -> DataError:
    return DataError(
        f"{path} {how}",
        "A split belongs to the data it was made from",
        "Give the same data, or start a new run",
    )
