# SPDX-License-Identifier: Apache-2.0
"""What a model can and cannot do, in sentences that need no training in statistics."""

from __future__ import annotations

from crosspatch.report.page import between, percent
from crosspatch.report.story import Story, baseline_score, listed, named, plural
from crosspatch.report.tables import collect_rows, confused_pairs

FEW = 20  # judged pictures of a class below which its figures say little
WEAK = 0.8  # share found below which a class is named as weak
COSTLY = 0.02  # points of accuracy that a change must cost at least to be told
SIMPLE = {"linear_probe": "a linear probe", "nearest_class_mean": "the nearest class mean"}


def lead(story: Story) -> str:
    """The result in a sentence or two."""
    images = plural(story.metrics["images"], "picture")
    accuracy = story.metrics.get("accuracy")
    if accuracy is None:
        return "There was no picture to judge it by."
    seen = "that it had never seen" if story.split in ("test", "val") else "of these data"
    low, high = story.metrics["low"], story.metrics["high"]
    sure = f"With {images} the true figure lies between {between((low, high))}, 19 times in 20."
    if story.several:
        return (
            f"Of 100 pictures {seen}, it got every label right on about {100 * accuracy:.0f}. "
            f"{sure}"
        )
    return f"Of 100 pictures {seen}, it names about {100 * accuracy:.0f} rightly. {sure}"


def against_baseline(story: Story) -> tuple[str, str] | None:
    """(level, sentence): what the training brought over the simplest methods."""
    figure, low, _ = story.score
    known = [
        (score, kind)
        for kind in SIMPLE
        if (found := story.baseline(kind)) and (score := baseline_score(found)) is not None
    ]
    if figure is None:
        return None
    if not known:
        if story.commonest is None:
            return None
        text = (
            f"Always naming the commonest class would be right in {percent(story.commonest)}: the "
            f"model is {100 * (figure - story.commonest):+.1f} points from that."
        )
        return ("good" if (low or 0) > story.commonest else "bad"), text
    best, kind = max(known)
    features = named((story.report.get("baseline") or {}).get("features", ""), 60)
    on = f" on {features}" if features else ""
    text = f"{SIMPLE[kind].capitalize()}{on}, which takes seconds, gets {percent(best)}"
    gain = 100 * (figure - best)
    if low is not None and low > best:
        return "good", f"{text}: the training was worth {gain:+.1f} points."
    return "bad", (
        f"{text}, and the model {percent(figure)}: the training has not been shown to bring "
        "anything. Train longer, begin with trained weights, or look at the labels."
    )


def can(story: Story) -> list[str]:
    """What it can do."""
    names = [row["name"] for row in story.classes]
    verb = "marks" if story.several else "tells apart"
    said = [f"It {verb} {plural(len(names), 'class', 'classes')}: {listed(names)}."]
    known = [row for row in story.classes if row["recall"] is not None and row["support"] >= 5]
    best = sorted(known, key=lambda row: (-row["recall"], row["name"]))[:3]
    best = [row for row in best if row["recall"] >= 0.5]
    if best and len(known) > 3:
        found = ", ".join(f"{named(row['name'])} ({percent(row['recall'], 0)})" for row in best)
        said.append(f"It finds most of: {found}.")
    sure = [one for one in story.thresholds() if one[1].answered]
    worth = [one for one in sure if one[1].precision is not None and one[1].coverage >= 0.02]
    figure = story.metrics.get("accuracy") or 0.0
    better = [one for one in worth if one[0] > figure]
    if better:
        _, left = max(better, key=lambda one: (one[0] <= 0.95, one[0]))
        said.append(
            f"It knows when it knows: where it is at least {percent(left.threshold, 0)} sure, "
            f"which is so for {percent(left.coverage, 0)} of the pictures, it is right in "
            f"{percent(left.precision)} of them ({between((left.low, left.high))})."
        )
    return said


def cannot(story: Story) -> list[str]:
    """What it cannot do, and what is not known."""
    said = [*_weak(story), *_confusions(story), *_worse(story)]
    outside = "none of them, or several," if story.several else "one of them"
    said.append(
        "It knows nothing but its classes: of a picture of anything else it will say "
        f"{outside} all the same."
    )
    few = [row["name"] for row in story.classes if row["support"] < FEW]
    if few:
        count = plural(len(few), "class", "classes")
        said.append(
            f"There were fewer than {FEW} pictures to judge {count} by, so little is known of "
            f"{listed(few, 6)}."
        )
    said.append(
        "These figures hold for pictures like those it was judged on; other cameras, seasons or "
        "places may be harder."
    )
    return said


def _weak(story: Story) -> list[str]:
    known = [row for row in story.classes if row["recall"] is not None]
    weak = sorted(known, key=lambda row: (row["recall"], row["name"]))
    weak = [row for row in weak if row["recall"] < WEAK][:3]
    if not weak:
        return []
    parts = []
    for row in weak:
        hits = round(row["recall"] * row["support"])
        parts.append(f"{named(row['name'])} (found {hits:,} of {row['support']:,})")
    dead = [row["name"] for row in known if row["recall"] == 0]
    more = f" It never finds {listed(dead, 8)}." if dead else ""
    return [f"It often misses {', '.join(parts)}.{more}"]


def _confusions(story: Story) -> list[str]:
    pairs = confused_pairs(story, 3)
    if not pairs:
        return []
    parts = [f"{named(true)} for {named(said)} ({times:,} of {total:,})"
             for true, said, times, total in pairs]  # fmt: skip
    return [f"It takes {', '.join(parts)}."]


def _worse(story: Story) -> list[str]:
    found = story.evidence.get("robustness") or []
    costly = [one for one in found if one.get("change_high", 0) < 0 and -one["change"] >= COSTLY]
    if not costly:
        return []
    costly = sorted(costly, key=lambda one: one["change"])[:3]
    parts = [f"{one['said']} ({100 * one['change']:+.0f} points)" for one in costly]
    return [f"It is worse where pictures are {', '.join(parts)}."]


def collect(story: Story) -> list[str]:
    """What more pictures would bring, for the classes where they bring most."""
    support = {row["name"]: row["support"] for row in story.classes}
    rows = [row for row in collect_rows(story)
            if row["gain"] >= 0.005 and support[row["name"]] >= FEW // 2][:3]  # fmt: skip
    said = []
    for row in rows:
        more = f"{row['training']:,} more pictures of" if row["training"] else "Twice as many of"
        said.append(
            f"{more} {named(row['name'])}: from {percent(row['now'], 0)} found to about "
            f"{percent(row['then'], 0)} ({between((row['low'], row['high']), 0)})."
        )
    return said
