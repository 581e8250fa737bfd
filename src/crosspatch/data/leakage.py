# SPDX-License-Identifier: Apache-2.0
"""What stands on both sides of a split, or in two classes: copies, near-duplicates, bursts,
pictures of one source.

A burst is pictures of one camera within `SECONDS`, or numbered one after the other in one folder
and nearer to each other than all but one in a thousand pairs of the set. A source is what stands
before the number in a file's name, where pictures of one source are more alike than others of
their class.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from crosspatch.data.copies import same_bytes
from crosspatch.data.findings import Finding, Place, quoted, several
from crosspatch.data.groups import units
from crosspatch.data.lenient import Opened
from crosspatch.data.looking import Look
from crosspatch.data.near import frequencies, near_groups
from crosspatch.data.sources import Source

SECONDS, GAP = 3.0, 2  # between pictures of a burst; between their numbers
RARE, LEAST = 0.999, 0.8  # of random pairs are less alike than a burst; the least cosine
SAMPLE, ALIKE = 4000, 0.65  # pairs that are compared; how often a source's pair is the nearer one
SHARE, BIG = 0.5, 0.3  # of the pictures have a source of several; the most that one source holds
SOURCE = r"([^/]*?)[ _.-]*(?:frame|img|image|view|crop)?[ _.-]*\d+\.[^./]+$"
"""The part of a file's name before its number; `--group` takes it as it stands."""
_NUMBER = re.compile(r"^(.*?)(\d{1,12})\D*$")
_ANY = {"crop", "download", "dsc", "dscf", "dscn", "file", "frame", "image", "images", "img", "p"}
_ANY |= {"photo", "photos", "pic", "pics", "picture", "pictures", "pxl", "sample", "scan"}
_ANY |= {"screenshot", "unnamed", "view", "whatsapp"}
_STRICT = {"test": 0, "val": 1, "train": 2, None: 2}


class Sets(NamedTuple):
    """Sets of items: exact copies, near-duplicates (one item of each set of copies)."""

    twins: tuple[tuple[int, ...], ...]
    near: tuple[tuple[int, ...], ...]


def find_sets(looks: Sequence[Look]) -> Sets:
    """Copies among pictures that can be read and have more than one colour."""
    useful = [at for at, look in enumerate(looks) if look.fault is None]
    twins = same_bytes({at: d for at in useful if (d := looks[at].digest) is not None})
    later = {item for one in twins for item in one[1:]}
    prints = {at: p for at in useful if at not in later and (p := looks[at].printed) is not None}
    return Sets(twins, near_groups(prints))


def copy_findings(
    opened: Opened, looks: Sequence[Look], sets: Sets
) -> Iterator[tuple[Finding, list[int]]]:
    """(finding, the items that its command takes out). Each set is told once: in two classes, else
    in two splits, else as a mere copy."""
    source, place = opened.source, opened.place
    for name, what, found in (
        ("copies", "exact copies", sets.twins), ("near", "near-duplicates", sets.near)
    ):  # fmt: skip
        kinds: dict[str, list[tuple[int, ...]]] = defaultdict(list)
        for one in found:
            labels, splits = ({getattr(source.items[at], key) for at in one}
                              for key in ("label", "split"))  # fmt: skip
            kinds["classes" if len(labels) > 1 else "splits" if len(splits) > 1 else ""].append(one)
        for where, level, title, why in (
            ("classes", "bad", f"of {what} in different classes",
             "One picture cannot be two things: at least one label is wrong. The list holds all "
             "of them: strike out those whose label is right, then take out the rest."),
            ("splits", "bad", f"of {what} on both sides of a split",
             "What was learnt by heart counts as ability, so the figures will be too good. Those "
             "of train go, those that test stay."),
            ("", "warn", f"of {what}",
             "They say nothing new; a training keeps them on one side of the split, and counts "
             "them several times. One of each set stays."),
        ):  # fmt: skip
            sets_here = kinds[where]
            if not sets_here:
                continue
            kind = f"{name}-{where}" if where else name
            going = [at for one in sets_here for at in _going(source, looks, one, where)]
            command = place.take_out(kind)
            items = [{"paths": [source.items[at].key for at in _apart(source, one)],
                      "note": _told(source, one, where)} for one in sets_here]  # fmt: skip
            title = f"{several(len(sets_here), 'set')} {title}"
            yield Finding(level, kind, title, why, command, items), going


def _going(source: Source, looks: Sequence[Look], alike: Sequence[int], where: str) -> list[int]:
    """The items of a set that are taken out."""
    if where == "classes":
        return list(alike)
    if where == "splits":
        strictest = min(_STRICT[source.items[at].split] for at in alike)
        return [at for at in alike if _STRICT[source.items[at].split] > strictest]
    stays = max(alike, key=lambda at: (np.prod(looks[at].shape), looks[at].size, -at))
    return [at for at in alike if at != stays]


def _apart(source: Source, alike: Sequence[int]) -> list[int]:
    """The items of a set, one of each class and split first."""
    seen: Counter[tuple] = Counter()
    rank = {}
    for at in alike:
        key = (source.items[at].label, source.items[at].split)
        rank[at], seen[key] = seen[key], seen[key] + 1
    return sorted(alike, key=lambda at: rank[at])


def _told(source: Source, alike: Sequence[int], where: str) -> str:
    if where == "classes":
        return ", ".join(sorted({source.named(source.items[at].label) for at in alike}))
    if where == "splits":
        return ", ".join(sorted({str(source.items[at].split) for at in alike}))
    return ""


# ---------------------------------------------------------------------- bursts and sources


def burst_sets(source: Source, looks: Sequence[Look]) -> list[tuple[int, ...]]:
    """Sets of items that were taken in one go, each ascending."""
    shown = [at for at, look in enumerate(looks) if look.printed is not None]
    unit = np.zeros((len(looks), 64), np.float32)
    if shown:
        whole = np.frombuffer(b"".join(looks[at].printed or b"" for at in shown), np.uint8)
        low = frequencies(whole.reshape(len(shown), -1))
        unit[shown] = low / np.maximum(np.linalg.norm(low, axis=1, keepdims=True), 1e-6)
    links = [*_by_time(looks), *_by_number(source, shown, unit)]
    joined: dict[int, list[int]] = defaultdict(list)
    for at, unit_of in enumerate(units([None] * len(looks), links).tolist()):
        joined[unit_of].append(at)
    return [tuple(one) for one in joined.values() if len(one) > 1]


def _by_time(looks: Sequence[Look]) -> Iterator[tuple[int, int]]:
    timed = sorted(
        (look.taken.camera, look.taken.time, at)
        for at, look in enumerate(looks)
        if look.taken.time is not None and look.taken.camera
    )
    for one, other in pairwise(timed):
        if one[0] == other[0] and other[1] - one[1] <= SECONDS:
            yield one[2], other[2]


def _by_number(source: Source, shown: Sequence[int], unit: np.ndarray) -> Iterator[tuple[int, int]]:
    if len(shown) < 50:
        return
    draw = np.random.default_rng(2)
    one, other = draw.choice(np.asarray(shown), (2, SAMPLE))
    chance = (unit[one] * unit[other]).sum(1)[one != other]
    least = max(LEAST, float(np.quantile(chance, RARE)))
    numbered = []
    for at in shown:
        hit = _NUMBER.match(source.items[at].key.rsplit(".", 1)[0])
        if hit:
            numbered.append((hit[1], int(hit[2]), at))
    numbered.sort()
    for here, there in pairwise(numbered):
        near = here[0] == there[0] and there[1] - here[1] <= GAP
        if near and float(unit[here[2]] @ unit[there[2]]) >= least:
            yield here[2], there[2]


def burst_findings(
    opened: Opened, bursts: Sequence[tuple[int, ...]]
) -> Iterator[tuple[Finding, list[int]]]:
    """Bursts across given splits, or that a random split would tear apart; `bursts` are those that
    no other finding tells of."""
    source = opened.source
    given = any(item.split for item in source.items)
    if given:
        torn = [one for one in bursts if len({source.items[at].split for at in one}) > 1]
        if torn:
            going = [at for one in torn for at in _going(source, [], one, "splits")]
            yield Finding(
                "bad", "bursts-splits", f"{several(len(torn), 'burst lies', 'bursts lie')} on both "
                "sides of a split", "Pictures taken one after the other show the same thing. Those "
                "of train go, those that test stay.", opened.place.take_out("bursts-splits"),
                _items(source, torn),
            ), going  # fmt: skip
        return
    grouped = any(item.group is not None for item in source.items)
    if bursts and not grouped:
        yield Finding(
            "warn", "bursts", f"{several(len(bursts), 'burst')} of pictures",
            "Pictures taken one after the other show the same thing. A split by chance would put "
            "some on both sides, and the figures would be too good. The table beside this page "
            "names those that belong together.", by_groups(opened.place), _items(source, bursts),
        ), []  # fmt: skip


def by_groups(place: Place) -> str:
    """Trains by the table of groups."""
    if place.kind == "archive":
        return place.unpack()
    return f"crosspatch train {quoted(place.table_of('groups'))} --group group"


def _items(source: Source, sets: Sequence[Sequence[int]]) -> list[dict]:
    return [{"paths": [source.items[at].key for at in one], "note": ""} for one in sets]


def sources_of(source: Source, looks: Sequence[Look]) -> dict[int, str]:
    """item -> what its file's name says before the number, where that seems to be where it comes
    from, else nothing at all."""
    if source.multi:
        return {}
    pattern, found = re.compile(SOURCE), {}
    for at, item in enumerate(source.items):
        hit = pattern.search(item.key)
        word = hit[1].casefold() if hit else ""
        if hit and word and word not in _ANY:
            found[at] = hit[1]
    count = Counter(found.values())
    plenty = {at: name for at, name in found.items() if count[name] > 1}
    classes: dict[str, set] = defaultdict(set)
    for at, name in plenty.items():
        classes[name].add(source.items[at].label)
    names = len(set(plenty.values()))
    enough = len(plenty) >= SHARE * len(source) and names > 1.5 * len(source.classes)
    if not enough or max(count.values()) > BIG * len(source):
        return {}
    return found if _nearer(source, looks, plenty) >= ALIKE else {}


def _nearer(source: Source, looks: Sequence[Look], named: dict[int, str]) -> float:
    """How often two of one source are more alike than two of one class and different sources."""
    usable = [at for at in named if looks[at].printed is not None]
    if len(usable) < 20:
        return 0.0
    whole = np.frombuffer(b"".join(looks[at].printed or b"" for at in usable), np.uint8)
    low = frequencies(whole.reshape(len(usable), -1))
    unit = low / np.maximum(np.linalg.norm(low, axis=1, keepdims=True), 1e-6)
    names = np.unique([named[at] for at in usable], return_inverse=True)[1]
    labels = source.labels[usable]
    order = np.lexsort((names, labels))
    one = np.concatenate([order[:-1], order])
    shuffled = order[np.lexsort((np.random.default_rng(3).random(len(order)), labels[order]))]
    other = np.concatenate([order[1:], shuffled])
    kept = (one != other) & (labels[one] == labels[other])
    alike = (unit[one] * unit[other]).sum(1)[kept]
    same = (names[one] == names[other])[kept]
    if same.sum() < 10 or (~same).sum() < 10:
        return 0.0
    rank = np.argsort(np.argsort(alike)) + 1.0
    inside, outside = same.sum(), (~same).sum()
    return float((rank[same].sum() - inside * (inside + 1) / 2) / (inside * outside))


def source_findings(opened: Opened, named: dict[int, str]) -> Iterator[tuple[Finding, list[int]]]:
    """Sources across given splits, or that a random split would tear apart."""
    source = opened.source
    members: dict[str, list[int]] = defaultdict(list)
    for at, name in named.items():
        members[name].append(at)
    sets = [one for one in members.values() if len(one) > 1]
    if not sets or any(item.group is not None for item in source.items):
        return
    how = "by the names of their files, which agree up to a number"
    if not any(item.split for item in source.items):
        yield Finding(
            "warn", "sources", f"The pictures seem to come from {len(members):,} sources",
            f"They were told {how}, and pictures of one source are more alike than others. Keep "
            "each on one side of the split.", opened.place.train("--group", SOURCE),
            _items(source, sets),
        ), []  # fmt: skip
        return
    torn = [one for one in sets if len({source.items[at].split for at in one}) > 1]
    if torn:
        going = [at for one in torn for at in _going(source, [], one, "splits")]
        yield Finding(
            "bad", "sources-splits", f"{several(len(torn), 'source lies', 'sources lie')} on both "
            "sides of a split", f"Told {how}; pictures of one source are more alike than others. "
            "Those of train go, those that test stay.", opened.place.take_out("sources-splits"),
            _items(source, torn),
        ), going  # fmt: skip
