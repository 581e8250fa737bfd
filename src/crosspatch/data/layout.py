# SPDX-License-Identifier: Apache-2.0
"""What the paths of a data set mean: which folder is a class, which a split, which file a picture.

Pure functions of names, alike for folders and archives. Nothing is guessed: whatever could mean two
things is an error that says what to rename.
"""

from __future__ import annotations

import os.path
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from crosspatch.data.skipped import Skipped
from crosspatch.data.trees import Tree
from crosspatch.errors import DataError, near

SPLITS = ("train", "val", "test")

_READ = "jpg jpeg jpe jfif mpo png apng webp bmp dib gif tif tiff"
_KNOWN = "heic heif avif jp2 j2k jxl psd eps svg ico icns dds fits dcm ppm pgm tga"
PICTURE_ENDINGS = frozenset(f".{ending}" for ending in f"{_READ} {_KNOWN}".split())
"""Files so named are taken for pictures; those of a format we do not read are then listed by
name."""

_MEANT = {
    "train": "train training trainset train_set",
    "val": "val valid validate validation dev eval valset val_set",
    "test": "test testing tests testset test_set",
}
MEANING = {alias: split for split, aliases in _MEANT.items() for alias in aliases.split()}
"""What people call a split -> what it is called here."""


class NoClasses(DataError):
    """Raised for data in which folders name no classes, or too few."""


class Placed(NamedTuple):
    """One picture: `path` in the tree, `key` below the root (they differ under a top folder);
    `label` as in `sources.Item`."""

    path: str
    key: str
    label: int | tuple[int, ...]
    split: str | None
    group: str | None = None


@dataclass
class Layout:
    """The meaning of a tree: classes, pictures in the order of their keys, what was left out, what
    is worth a second look, in sentences, and whether pictures may have several labels."""

    classes: tuple[str, ...]
    files: list[Placed] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    multi: bool = False


def lay_out(tree: Tree, told: str, least_classes: int = 2, *, look_through: bool = False) -> Layout:
    """Find classes, splits and pictures. `told` names the data in errors; `look_through` takes a
    single top folder for the root. Raises DataError (see `sources.open_source`)."""
    pictures, skipped = _pictures(tree)
    if not pictures:
        raise NoClasses(
            f"{told} holds no picture",
            "Each class is a folder with its pictures inside (.jpg, .png, .webp, .bmp, .gif, .tif)",
            "Give the folder that holds the class folders",
        )
    top = _single_top(tree) if look_through else ""
    keys = {path.removeprefix(top): path for path in pictures}
    folders = {folder.removeprefix(top) for folder in tree.folders if folder.startswith(top)}
    splits = _split_folders(keys, folders, told)
    depth = 1 if splits else 0
    found = {
        split: _class_counts(keys, folders, f"{split}/" if split else "")
        for split in (splits or {""})
    }
    classes = check_classes(found, told, least_classes)
    label = {name: number for number, name in enumerate(classes)}
    layout = Layout(classes, skipped=skipped, remarks=class_remarks(found))
    for key in sorted(keys):
        parts = key.split("/")
        if len(parts) < depth + 2:
            layout.skipped.append(Skipped(key, "not in a class folder"))
        else:
            split = parts[0] if splits else None
            layout.files.append(Placed(keys[key], key, label[parts[depth]], split))
    return layout


def _pictures(tree: Tree) -> tuple[list[str], list[Skipped]]:
    pictures, skipped = [], []
    for path in tree.files:
        ending = os.path.splitext(path)[1].lower()
        if not ending or ending in PICTURE_ENDINGS:
            pictures.append(path)
        else:
            skipped.append(Skipped(path, f"not a picture by its name ({ending})"))
    return pictures, skipped


def _single_top(tree: Tree) -> str:
    """`name/` when everything lies in one folder that is itself no class and no split, else ""."""
    tops = {path.split("/", 1)[0] for path in (*tree.files, *tree.folders)}
    if len(tops) != 1:
        return ""
    (top,) = tops
    has_folders = any(folder.startswith(f"{top}/") for folder in tree.folders)
    return f"{top}/" if has_folders and top.lower() not in MEANING else ""


def _split_folders(keys: dict[str, str], folders: set[str], told: str) -> set[str]:
    """The split folders present, an empty set for plain class folders.

    A folder called train, val or the like is a split when it holds folders and no pictures of its
    own; a class may be called `val` as well.
    """
    with_pictures = {key.split("/")[0] for key in keys if key.count("/") == 1}
    with_folders = {folder.split("/")[0] for folder in folders if "/" in folder}
    meant = {name for name in with_folders - with_pictures if name.lower() in MEANING}
    if not meant:
        return set()
    for name in sorted(meant - set(SPLITS)):
        raise DataError(
            f"{told} holds a folder called {name!r}",
            f"Splits are called {', '.join(SPLITS)}",
            f"Rename {name} to {MEANING[name.lower()]}",
        )
    if "train" not in meant:
        raise DataError(
            f"{told} holds {' and '.join(sorted(meant))} but no train",
            f"Of {', '.join(SPLITS)}, train must be there",
            "Add train, or give plain class folders to have them split",
        )
    beside = sorted({key.split("/")[0] for key in keys if "/" in key} - meant)
    if beside:
        hint = near(beside[0], set(SPLITS) - meant, 1)
        raise DataError(
            f"{told} holds pictures in {', '.join(beside[:5])} beside {', '.join(sorted(meant))}",
            f"Beside train, only {', '.join(SPLITS[1:])} are read",
            f"Rename {beside[0]} to {hint}" if hint else f"Move {beside[0]} elsewhere",
        )
    return meant


def check_classes(
    found: dict[str, Counter[str]], told: str, least: int, place: str = "class folder"
) -> tuple[str, ...]:
    """The classes, sorted: those of `train`, or of "" where there are no splits.

    found: split -> pictures per class; place: what holds a class in this data. Raises DataError for
    an empty class, for too few, and for one of val or test that train lacks.
    """
    counts = found["train" if "train" in found else ""]
    _require_classes(counts, told, least, place)
    for split in sorted(found.keys() - {"train", ""}):
        unknown = sorted(name for name in found[split] if found[split][name] and name not in counts)
        if unknown:
            shown = [_shown(name, counts) for name in unknown[:5]]
            names = f"class {shown[0]}" if len(unknown) == 1 else f"classes {', '.join(shown)}"
            hints = [_nearest(name, counts) for name in unknown[:5]]
            raise DataError(
                f"{told}: {split} holds the {names}, which train lacks",
                f"Classes of train near {'; '.join(hints)}",
                f"Rename the {place.split()[-1]}, or add it to train",
            )
    return tuple(sorted(counts))


def class_remarks(found: dict[str, Counter[str]]) -> list[str]:
    """Sentences on what may be a slip: a split that lacks classes, names that differ in case."""
    remarks, counts = [], found["train" if "train" in found else ""]
    for split in sorted(found.keys() - {"train", ""}):
        lost = sorted(name for name in counts if not found[split][name])
        if lost:
            more = f" and {len(lost) - 5} more" if len(lost) > 5 else ""
            remarks.append(f"{split} holds no picture of {', '.join(lost[:5])}{more}.")
    alike: dict[str, list[str]] = {}
    for name in sorted(counts):
        alike.setdefault(_face(name), []).append(name)
    for names in alike.values():
        by_case = len({name.casefold() for name in names}) == 1
        how = "differ only in case" if by_case else "look the same"
        told = (f"{name if by_case else ascii(name)} ({counts[name]:,})" for name in names)
        if len(names) > 1:
            remarks.append(f"{' and '.join(told)} {how}: they are separate classes.")
    return remarks


def _face(name: str) -> str:
    """What a reader sees of a name, whatever its case, spaces and accents are made of."""
    return " ".join(unicodedata.normalize("NFC", name).casefold().split())


def _twins(name: str, known: Iterable[str]) -> list[str]:
    """Those of `known` that look as `name` does, though not by their case alone."""
    same = (one for one in known if _face(one) == _face(name))
    return [one for one in same if one.casefold() != name.casefold()]


def _shown(name: str, known: Iterable[str]) -> str:
    return ascii(name) if _twins(name, known) else repr(name)


def _nearest(name: str, known: Counter[str]) -> str:
    """A name and those of `known` that may be meant by it."""
    twins = _twins(name, known)
    if twins:
        return f"{name!a}: {', '.join(map(ascii, twins))}"
    return f"{name}: {near(name, known) or 'none'}"


def _class_counts(keys: dict[str, str], folders: set[str], below: str) -> Counter[str]:
    """Pictures per class folder below `below`, empty folders with 0."""
    inside = (folder.removeprefix(below) for folder in folders if folder.startswith(below))
    counts: Counter[str] = Counter({name: 0 for name in inside if name and "/" not in name})
    counts.update(
        key.removeprefix(below).split("/")[0]
        for key in keys
        if key.startswith(below) and "/" in key.removeprefix(below)
    )
    return counts


def _require_classes(counts: Counter[str], told: str, least: int, place: str) -> None:
    empty = sorted(name for name, count in counts.items() if count == 0)
    strange = sorted(name for name in counts if not name.isprintable())
    if strange:
        raise DataError(
            f"{told} holds a class called {strange[0]!r}",
            "A class name is one line of printable characters",
            f"Rename the {place.split()[-1]}",
        )
    if len(counts) < least:
        names = "".join(f" ({name})" for name in counts)
        raise NoClasses(
            f"{told} holds {'one class' if counts else f'no {place}'}{names}",
            "A classifier needs at least two classes, each with pictures of its own",
            "Give the folder that holds the class folders, or a table of more classes",
        )
    if empty:
        more = f" and {len(empty) - 5} more" if len(empty) > 5 else ""
        raise DataError(
            f"{told} holds no picture of {', '.join(empty[:5])}{more}",
            f"Every {place} holds at least one picture",
            f"Add pictures, or remove the {place.split()[-1]}",
        )
