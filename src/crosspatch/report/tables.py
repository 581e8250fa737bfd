# SPDX-License-Identifier: Apache-2.0
"""The tables of a report: classes, groups of classes, what is taken for what."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup

from crosspatch.report.page import between, count, percent
from crosspatch.report.story import Story, named, plural

SHOWN = 20  # classes, and pairs, that are shown before a reader asks for all
MATRIX = 20  # classes of which the whole matrix is shown
GROUPS = 10  # of classes, where there are more


class Table(NamedTuple):
    """For the macro `table`; rest: the rows that are folded away, all of them."""

    head: list[str]
    rows: list[list[Any]]
    numbers: list[int]
    rest: list[list[Any]]


class Matrix(NamedTuple):
    """names: of rows and columns; cells: rows of (count, share of the row from 0 to 1)."""

    names: list[str]
    cells: list[list[tuple[int, float]]]


def class_table(story: Story) -> Table:
    """One row per class, those found least often first; folded where there are many."""
    trained, several = story.training, story.several
    head = ["class", *(["trained on"] if trained else []), "judged on", "found", "95 % range", ""]
    head += ["right when it says so", "F1", *(["AP", "threshold"] if several else [])]
    rows = []
    order = sorted(story.classes, key=lambda row: (_or(row["recall"], 2), row["name"]))
    for row in order:
        known = row["recall"] is not None
        span = between((row["recall_low"], row["recall_high"]), 0) if known else "–"
        cells = [named(row["name"])]
        cells += [count(trained.get(row["name"]))] if trained else []
        cells += [count(row["support"]), percent(row["recall"]), span, bar(row["recall"])]
        cells += [percent(row["precision"]), percent(row["f1"])]
        cells += [percent(row["ap"]), f"{row['threshold']:.2f}"] if several else []
        rows.append(cells)
    shift = 1 if trained else 0
    numbers = [i for i in range(1, len(head)) if i != 4 + shift]
    if len(rows) <= SHOWN * 3 // 2:
        return Table(head, rows, numbers, [])
    return Table(head, rows[:SHOWN], numbers, rows)


def group_table(story: Story) -> Table | None:
    """Head, middle and tail of uneven classes; None where they are even."""
    groups = story.metrics.get("groups") or []
    rows = [
        [one["name"], count(len(one["classes"])), count(one["training"]), count(one["images"]),
         percent(one["accuracy"]),
         between((one["low"], one["high"])) if one["accuracy"] is not None else "–"]
        for one in groups
    ]  # fmt: skip
    head = ["classes", "how many", "trained on", "judged on", "found", "95 % range"]
    return Table(head, rows, [1, 2, 3, 4, 5], []) if rows else None


def confused_pairs(story: Story, most: int = SHOWN) -> list[tuple[str, str, int, int]]:
    """(class, what it was taken for, times, pictures of the class), the most frequent first."""
    if "confusion" not in story.metrics:
        return []
    table = np.array(story.metrics["confusion"])
    off = table * (1 - np.eye(len(table), dtype=int))
    order = np.argsort(-off, axis=None, kind="stable")[:most]
    names, found = [row["name"] for row in story.classes], []
    for true, said in zip(*np.unravel_index(order, off.shape), strict=True):
        if off[true, said]:
            total = int(table[true].sum())
            found.append((names[true], names[said], int(off[true, said]), total))
    return found


def matrix(story: Story) -> Matrix | None:
    """Every class against every class where they are few, else groups of classes."""
    if "confusion" not in story.metrics:
        return None
    table = np.array(story.metrics["confusion"])
    names = [named(row["name"], 18) for row in story.classes]
    if len(table) > MATRIX:
        groups = alike(table)
        names = [_group_name([names[i] for i in group]) for group in groups]
        where = np.zeros((len(groups), len(table)), int)
        for place, group in enumerate(groups):
            where[place, group] = 1
        table = where @ table @ where.T
    shares = table / np.maximum(1, table.sum(axis=1, keepdims=True))
    cells = [
        [(int(n), round(float(s), 3)) for n, s in zip(row, share, strict=True)]
        for row, share in zip(table, shares, strict=True)
    ]
    return Matrix(names, cells)


def alike(table: np.ndarray, most: int = GROUPS) -> list[list[int]]:
    """So many groups of classes (or K) that are taken for each other, the largest first.

    table: counts (K, K), K > 1. Ward's linkage over how often two classes are confused, which keeps
    groups of a size where most classes are never confused.
    """
    from scipy.cluster.hierarchy import cut_tree, linkage
    from scipy.spatial.distance import squareform

    share = table / np.maximum(1, table.sum(axis=1, keepdims=True))
    both = (share + share.T) / 2
    apart = 1 - both / max(float((both - np.diag(np.diag(both))).max()), 1e-9)
    np.fill_diagonal(apart, 0)
    tree = linkage(squareform(apart, checks=False), "ward")
    group = cut_tree(tree, n_clusters=min(most, len(table)))[:, 0]
    found = [np.flatnonzero(group == one).tolist() for one in np.unique(group)]
    return sorted(found, key=lambda one: (-len(one), one))


def _group_name(names: list[str]) -> str:
    more = len(names) - 2
    return ", ".join(names[:2]) + (f" + {more}" if more > 0 else "")


def bar(share: float | None) -> Markup:
    """A share as a bar of up to 6 rem."""
    return Markup('<span class="bar" style="width:{:.2f}rem"></span>').format(6 * _or(share, 0))


def _or(value: float | None, other: float) -> float:
    return other if value is None else value


def robustness_table(story: Story) -> Table | None:
    """Accuracy on worse pictures, and what each change costs."""
    found = story.evidence.get("robustness")
    if not found:
        return None
    rows = []
    for one in found:
        cost = low_high = ""
        if "change" in one:
            cost = f"{100 * one['change']:+.1f}"
            low_high = f"{100 * one['change_low']:+.1f} to {100 * one['change_high']:+.1f}"
        cells = [one["said"], percent(one["accuracy"]), between((one["low"], one["high"]))]
        rows.append([*cells, cost, low_high, bar(one["accuracy"])])
    head = ["pictures", "right", "95 % range", "points against clean", "95 % range", ""]
    return Table(head, rows, [1, 2, 3, 4], [])


def threshold_table(story: Story) -> Table | None:
    """For each wanted precision the threshold, and what it leaves."""
    rows = []
    for wanted, left in story.thresholds():
        span = between((left.low, left.high)) if left.answered else "–"
        rows.append([percent(wanted, 0), f"{left.threshold:.3f}", percent(left.coverage),
                     count(left.answered), percent(left.precision), span])  # fmt: skip
    head = ["right at least in", "answer from", "answered", "pictures", "right", "95 % range"]
    return Table(head, rows, [0, 1, 2, 3, 4, 5], []) if rows else None


def collect_rows(story: Story) -> list[dict[str, Any]]:
    """[{name, training, now, then, low, high, gain}] of classes: the share that is found now and
    with twice the training pictures; the greatest gain first."""
    from crosspatch.metrics.learning_curve import Law

    learnt = story.evidence.get("learning")
    if not learnt:
        return []
    recall = {row["name"]: row["recall"] for row in story.classes}
    rows = []
    for one in learnt["classes"]:
        now = recall.get(one["name"])
        if now is None:
            continue
        left, least, most = Law(one["exponent"], one["error"]).remaining(2)
        then, high, low = (1 - (1 - now) * share for share in (left, least, most))
        rows.append({"name": one["name"], "training": story.training.get(one["name"]), "now": now,
                     "then": then, "low": low, "high": high, "gain": then - now})  # fmt: skip
    return sorted(rows, key=lambda row: (-row["gain"], row["name"]))


def collect_table(story: Story) -> Table | None:
    """`collect_rows` for the page; folded where classes are many."""
    rows = [
        [named(one["name"]), count(one["training"]), percent(one["now"], 0),
         percent(one["then"], 0), between((one["low"], one["high"]), 0),
         f"{100 * one['gain']:+.1f}"]
        for one in collect_rows(story)
    ]  # fmt: skip
    head = ["class", "trained on", "found now", "with twice as many", "95 % range", "points"]
    many = len(rows) > SHOWN
    numbers = [1, 2, 3, 4, 5]
    return Table(head, rows[:10] if many else rows, numbers, rows if many else []) if rows else None


def settings_table(story: Story) -> Table | None:
    """How the run was made."""
    report = story.report
    config = report.get("config") or {}
    if not config:
        return None
    recipe, run, split = config.get("recipe", {}), config.get("run", {}), report.get("split", {})
    machine = config.get("machine", {})
    parts = ", ".join(f"{size:,} {name}" for name, size in split.items())
    rows = [
        ["data", named(report.get("data", ""), 200)],
        ["fingerprint of the data", run.get("fingerprint", "")],
        ["pictures", f"{parts} ({plural(report.get('skipped', 0), 'file')} left out)"],
        ["model", named(report.get("model", ""), 80)],
        ["reduction of tokens", named(report.get("reduce") or "none", 80)],
        ["objective", named(report.get("objective", ""), 80)],
        ["size of pictures", " x ".join(map(str, report.get("size", ()))) + " pixels"],
        ["recipe", f"{recipe.get('name')}, {report.get('epochs')} epochs, {report.get('steps')} "
                   f"steps of {recipe.get('batch')}, peak rate {recipe.get('lr', 0):.2g}, "
                   f"seed {recipe.get('seed')}, {recipe.get('precision')}"],
        ["training took", f"{report.get('seconds', 0):,.0f} s on {machine.get('device', '?')}, "
                          f"{plural(machine.get('cores', 0), 'core')}"],
        ["begun", str(run.get("created", ""))],
        ["versions", ", ".join(f"{k} {v}" for k, v in config.get("versions", {}).items())],
        ["command", named(run.get("command", ""), 400)],
    ]  # fmt: skip
    return Table(["", ""], rows, [], [])
