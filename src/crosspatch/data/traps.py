# SPDX-License-Identifier: Apache-2.0
"""Traps in the names of folders: two names for one class, a split called otherwise, a folder too
many. Pure functions of names and counts."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

from crosspatch.data.findings import Finding, Place, listed, of_paths, quoted, several
from crosspatch.data.labels import numbers
from crosspatch.data.layout import SPLITS
from crosspatch.data.lenient import Opened
from crosspatch.data.trees import is_litter
from crosspatch.errors import near

_LONG = 5  # letters of names that may be misspelt
Counts = dict[str, Counter[str]]
"""Split ("" where there are none) -> pictures of each class, 0 for an empty folder."""


def trap_findings(opened: Opened) -> Iterator[Finding]:
    """Everything about names that may be a slip."""
    counts = folder_counts(opened)
    yield from _layout(opened)
    if opened.tree is not None:
        yield from _empty(opened, counts)
        yield from _unknown(opened, counts)
    yield from _alike(opened, counts)
    yield from _odd_names(opened, counts)
    yield from _controls(opened)
    yield from _litter(opened.place)
    yield from _deep(opened, counts)


def folder_counts(opened: Opened) -> Counts:
    """Pictures of each class in each split, with the folders that are empty."""
    source, counts = opened.source, defaultdict(Counter)
    for item in source.items:
        for number in numbers(item.label):
            counts[item.split or ""][source.classes[number]] += 1
    if opened.tree is not None:
        names = set(source.classes)
        for folder in opened.tree.folders:
            parts = folder.removeprefix(opened.top).split("/")
            split = opened.splits.get(parts[0]) if opened.splits else ""
            depth = 1 if opened.splits else 0
            if split is not None and len(parts) == depth + 1 and parts[depth] in names:
                counts[split][parts[depth]] += 0
    return dict(counts)


def class_folder(opened: Opened, split: str, name: str) -> str:
    """The folder of a class, below DATA."""
    called = next((one for one, meant in opened.splits.items() if meant == split), "")
    return f"{opened.top}{called}/{name}" if called else f"{opened.top}{name}"


def _layout(opened: Opened) -> Iterator[Finding]:
    place = opened.place
    if opened.top and opened.refusal is not None and place.kind == "folder":
        inner = opened.top.rstrip("/")
        yield Finding(
            "bad", "nested", f"Everything lies in one folder, {inner}",
            "A training would take that folder for the only class.",
            place.again(inner), [],
        )  # fmt: skip
    for called, meant in opened.splits.items():
        if called == meant:
            continue
        there = meant in opened.splits
        how = place.merge([(opened.top + called, opened.top + meant)], ())
        if there:
            how = f"mkdir -p {_aside(place)} && mv -- {place.path(called)} {_aside(place)}/"
        yield Finding(
            "bad", "split name", f"A split is called {called}",
            f"Splits are called {', '.join(SPLITS)}; a training stops at any other name."
            + (f" There is a {meant} as well: one of them goes elsewhere." if there else ""),
            how if place.kind == "folder" else place.unpack(), [],
        )  # fmt: skip
    loose = [one.path for one in opened.source.skipped if one.reason == "not in a class folder"]
    if loose:
        beside = {path.split("/")[0] for path in loose if "/" in path} - set(opened.splits)
        lost = opened.splits and beside and opened.refusal is not None
        yield Finding(
            "bad" if lost else "warn", "loose",
            f"{several(len(loose), 'picture lies', 'pictures lie')} in no class folder",
            "Nobody can tell what they show, so they are not used."
            + (f" They are in {listed(sorted(beside))}, beside the splits." if lost else "")
            + " Move them into class folders; or take them out.",
            place.take_out("loose"), of_paths(loose),
        )  # fmt: skip


def _empty(opened: Opened, counts: Counts) -> Iterator[Finding]:
    """Class folders without a picture in them."""
    place, empty = opened.place, []
    for split, classes in counts.items():
        empty += [class_folder(opened, split, name) for name, n in sorted(classes.items()) if not n]
    if not empty or opened.tree is None:
        return
    files = opened.tree.files
    full = [one for one in empty if any(path.startswith(f"{one}/") for path in files)]
    lines = [f"find {place.path(one)} -type d -empty -delete" for one in empty if one not in full]
    if full:
        moved = " ".join(place.path(one) for one in full)
        lines.append(f"mkdir -p {_aside(place)} && mv -- {moved} {_aside(place)}/")
    yield Finding(
        "bad", "empty class", f"{several(len(empty), 'class folder holds', 'class folders hold')} "
        f"no picture", f"{listed(empty)}. A training stops there: add pictures, or take the "
        "folders away.", "\n".join(lines) if place.kind == "folder" else place.unpack(),
        of_paths(empty, "no picture"),
    )  # fmt: skip


def _unknown(opened: Opened, counts: Counts) -> Iterator[Finding]:
    """Classes of val and test that train lacks."""
    train = counts.get("train")
    if train is None:
        return
    for split in ("val", "test"):
        here = counts.get(split, Counter())
        lacking = sorted(name for name in here if here[name] and name not in train)
        if not lacking:
            continue
        moves, lines, notes = [], [], []
        for name in lacking:
            meant = nearest(name, train)
            old = class_folder(opened, split, name)
            if meant:
                moves.append((old, class_folder(opened, split, meant)))
            elif opened.place.kind == "folder":
                aside = _aside(opened.place)
                lines.append(f"mkdir -p {aside} && mv -- {opened.place.path(old)} {aside}/")
            notes.append({"path": old, "note": f"nearest in train: {meant or 'none'}"})
        taken = [class_folder(opened, split, one) for one in here]
        command = opened.place.merge(moves, taken) if moves else ""
        shown = [f"{name} (nearest: {nearest(name, train) or 'none'})" for name in lacking]
        yield Finding(
            "bad", "unknown class",
            f"{split} has {several(len(lacking), 'class', 'classes')} that train lacks",
            f"{listed(shown)}. What is never trained can never be found.",
            "\n".join(filter(None, [command, *lines])) or opened.place.unpack(), notes,
        )  # fmt: skip


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name that is most likely meant, or ""."""
    faces = {_face(one): one for one in known}
    return faces.get(_face(name)) or near(name, faces.values(), 1)


def _alike(opened: Opened, counts: Counts) -> Iterator[Finding]:
    """Classes whose names are nearly the same."""
    total = Counter()
    trained = counts.get("train")
    for classes in counts.values():  # what train lacks is told by `_unknown`
        total.update({name: n for name, n in classes.items() if trained is None or name in trained})
    for kind, level, how, pairs in (
        ("same name", "bad", "differ only in case, spaces or accents", _same_face(total)),
        ("plural", "warn", "look like one thing and several of it", _plurals(total)),
        ("spelling", "warn", "differ in one letter", _misspelt(total)),
    ):
        if not pairs:
            continue
        shown = [f"{a!r} ({total[a]:,}) and {b!r} ({total[b]:,})" for a, b in pairs]
        moves, taken = [], []
        for one, other in pairs:  # the smaller into the larger
            less, more = sorted((one, other), key=lambda name: (total[name], name))
            for split, classes in counts.items():
                if less in classes:
                    folders = (class_folder(opened, split, name) for name in (less, more))
                    moves.append(tuple(folders))
                    if more in classes:
                        taken.append(class_folder(opened, split, more))
        by_folder = opened.tree is not None
        yield Finding(
            level, kind, f"{several(len(pairs), 'pair', 'pairs')} of classes that {how}",
            f"{listed(shown)}. If they mean the same, a network cannot tell them apart, and every "
            "figure suffers.", opened.place.merge(moves, taken) if by_folder else "",
            [{"paths": list(pair), "note": how} for pair in pairs],
        )  # fmt: skip


def _same_face(names: Counter[str]) -> list[tuple[str, str]]:
    return _together(names, _face)


def _plurals(names: Counter[str]) -> list[tuple[str, str]]:
    faces = {_face(name): name for name in names}
    pairs = []
    for face, name in faces.items():
        for plural in (f"{face}s", f"{face}es", f"{face[:-1]}ies" if face.endswith("y") else ""):
            if len(face) > 2 and plural in faces:
                pairs.append((name, faces[plural]))
    return sorted(set(pairs))


def _misspelt(names: Counter[str]) -> list[tuple[str, str]]:
    """Pairs of one letter changed, added or left out, or two neighbours exchanged. Names with
    digits are numbers of things, not slips."""
    faces = {_face(name): name for name in names}
    words = [one for one in faces if len(one) >= _LONG and not re.search(r"\d", one)]
    buckets: dict[str, set[str]] = defaultdict(set)
    for word in words:
        buckets[word].add(word)
        for at in range(len(word)):
            buckets[word[:at] + word[at + 1 :]].add(word)
    plural = {frozenset(pair) for pair in _plurals(names)}
    pairs = {
        tuple(sorted((faces[one], faces[other])))
        for alike in buckets.values()
        for one in alike
        for other in alike
        if one < other
    }
    return sorted((one, other) for one, other in pairs if frozenset((one, other)) not in plural)


def _together(names: Counter[str], key) -> list[tuple[str, str]]:
    found: dict[str, list[str]] = defaultdict(list)
    for name in sorted(names):
        found[key(name)].append(name)
    return [(alike[0], other) for alike in found.values() for other in alike[1:]]


def _face(name: str) -> str:
    """A name without case, accents, spaces and what stands for them."""
    plain = unicodedata.normalize("NFKD", name).casefold()
    return re.sub(r"[\s_\-.]+", "", "".join(c for c in plain if not unicodedata.combining(c)))


def _odd_names(opened: Opened, counts: Counts) -> Iterator[Finding]:
    names = opened.source.classes
    spaced = [name for name in names if name != " ".join(name.split())]
    known = {class_folder(opened, split, one) for split, c in counts.items() for one in c}
    moves = [
        (class_folder(opened, split, name), class_folder(opened, split, " ".join(name.split())))
        for name in spaced for split, classes in counts.items() if name in classes
    ]  # fmt: skip
    if spaced:
        yield Finding(
            "warn", "spaces", f"{several(len(spaced), 'class name has', 'class names have')} "
            "spaces that nobody sees", f"{listed([repr(name) for name in spaced])}: at the ends, "
            "or several in a row. They are easily lost when a name is typed.",
            opened.place.merge(moves, known) if opened.tree is not None else "", [],
        )  # fmt: skip
    digits = [name for name in names if name.isdecimal()]
    if digits and len(digits) < len(names) / 2:
        aside, folders = _aside(opened.place), [
            opened.place.path(class_folder(opened, split, name))
            for name in digits for split, classes in counts.items() if name in classes
        ]  # fmt: skip
        movable = opened.place.kind == "folder"
        yield Finding(
            "warn", "numbers", f"{several(len(digits), 'class is', 'classes are')} called by a "
            "number", f"{listed(digits)} beside names such as "
            f"{next(name for name in names if name not in digits)}: is it a class, or a folder of "
            "something else?", f"mkdir -p {aside} && mv -- {' '.join(folders)} {aside}/"
            if movable else opened.place.unpack(), [],
        )  # fmt: skip


def _controls(opened: Opened) -> Iterator[Finding]:
    """Files with a line break or the like in their names."""
    found = [item.key for item in opened.source.items if not _printable(item.key)]
    if found:
        inner = '"${1%/*}/$(printf %s "${1##*/}" | tr "[:cntrl:]" _)"'
        how = f"-exec sh -c 'mv -n -- \"$1\" {inner}' _ {{}} \\;"
        movable = opened.place.kind == "folder"
        yield Finding(
            "warn", "control signs", f"{several(len(found), 'name holds', 'names hold')} a line "
            "break or another sign that cannot be printed", "Lists of files leave them out, as "
            "they hold one name a line. The command puts _ in their place.",
            f"find {opened.place.data} -depth -name '*[[:cntrl:]]*' {how}"
            if movable else opened.place.unpack(), of_paths(found),
        )  # fmt: skip


def _printable(name: str) -> bool:
    return not any(unicodedata.category(sign) == "Cc" for sign in name)


def _litter(place: Place) -> Iterator[Finding]:
    """Hidden folders that other tools take for classes; ours does not see them."""
    if place.kind != "folder":
        return
    found = []
    for folder, inner, _ in os.walk(place.spec):
        found += [os.path.relpath(os.path.join(folder, one), place.spec)
                  for one in inner if is_litter(one)]  # fmt: skip
        inner[:] = [one for one in inner if not is_litter(one)]
        if len(Path(folder).relative_to(place.spec).parts) >= 2:
            inner.clear()
    found = sorted(one for one in found if one.isprintable())
    if found:
        yield Finding(
            "warn", "hidden", f"{several(len(found), 'hidden folder', 'hidden folders')} among "
            "the pictures", f"{listed(found)}. They are not read here, but other programs take "
            "them for classes.", "rm -r -- " + " ".join(place.path(one) for one in found),
            of_paths(found),
        )  # fmt: skip


def _deep(opened: Opened, counts: Counts) -> Iterator[Finding]:
    """Classes that hold folders: of further classes, or of what belongs together."""
    if opened.tree is None or opened.source.multi:
        return
    depth = 1 if opened.splits else 0
    inside, own = defaultdict(set), Counter()
    for item in opened.source.items:
        parts = item.key.split("/")
        name = parts[depth] if len(parts) > depth + 1 else ""
        if len(parts) > depth + 2:
            inside[name].add("/".join([*parts[: depth + 1], parts[depth + 1]]))
        else:
            own[name] += 1
    kinds = {name: {one.rsplit("/", 1)[-1] for one in folders} for name, folders in inside.items()}
    deep = sorted(name for name, found in kinds.items() if len(found) > 1 and not own[name])
    classes = [name for name in opened.source.classes if own[name] or name in inside]
    if deep and len(deep) < len(classes):
        opening = opened.top
        lines = []
        for name in deep:
            folders = sorted(inside[name])
            for folder in folders:
                parts = folder.split("/")
                there = "/".join([*parts[:depth], parts[-1]])
                lines.append((opening + folder, opening + there))
        known = {class_folder(opened, split, one) for split, c in counts.items() for one in c}
        yield Finding(
            "warn", "deep", f"{several(len(deep), 'class holds', 'classes hold')} folders and no "
            "pictures of their own", f"{listed(deep)}. All that is below a class folder is that "
            "class. If the folders inside are classes, move them up.",
            _moved_up(opened, lines, known, deep, counts),
            [{"path": one, "note": listed(sorted(inside[one]))} for one in deep],
        )  # fmt: skip
    elif deep and any(item.group is None for item in opened.source.items):
        yield Finding(
            "warn", "folders", "Every class holds folders",
            "If each of them holds what belongs together (one animal, one video, one day), keep "
            "them on one side of the split.", opened.place.train("--group", "folder"), [],
        )  # fmt: skip


def _moved_up(
    opened: Opened,
    moves: list[tuple[str, str]],
    known: set[str],
    emptied: list[str],
    counts: Counts,
) -> str:
    """Folders moved, and those in which they were taken away."""
    place, moved = opened.place, opened.place.merge(moves, known)
    if place.kind != "folder":
        return moved
    gone = [
        f"rmdir -- {place.path(class_folder(opened, split, name))}"
        for split, classes in counts.items() for name in emptied if name in classes
    ]  # fmt: skip
    return "\n".join([moved, *gone])


def _aside(place: Place) -> str:
    """Where folders go that are not to be read: beside DATA."""
    return quoted(f"{place.spec.rstrip('/')}-set-aside")
