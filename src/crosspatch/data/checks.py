# SPDX-License-Identifier: Apache-2.0
"""What the counts, the files and the shapes of pictures say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from crosspatch.data import spectrum
from crosspatch.data.findings import Finding, listed, of_paths, quoted, several
from crosspatch.data.lenient import Opened
from crosspatch.data.looking import Look, lies
from crosspatch.data.traps import Counts, class_folder, nearest

NONE, FEW = 5, 20
"""Readable pictures of a class: below the first it cannot be trained and tested, below the second
it is shaky."""
UNEVEN = 5.0  # times as many pictures in the largest class as in the smallest
LEAST_TEST = 100  # pictures to test on, below which the figures say little
HUGE = 50_000_000  # pixels
SMALL, ODD = 32, 3.0  # pixels of the shorter side; times as long as the median picture
NEARLY_ALL, TURNED = 0.9, 0.05  # share of pictures that lie one way; of those that lie the other


def count_findings(opened: Opened, counts: Counts) -> Iterator[Finding]:
    """counts: split -> readable pictures of each class."""
    place, total = opened.place, Counter()
    for classes in counts.values():
        total.update(classes)
    ordered = sorted(total, key=lambda name: (total[name], name))
    held = [name for name in ordered if total[name]]
    if len(held) < 2:
        yield Finding(
            "bad", "one class", f"There is {several(len(held), 'class', 'classes')} with pictures",
            "A classifier needs at least two classes, each with pictures of its own.",
            place.again(), [],
        )  # fmt: skip
    lost = [name for name in ordered if total[name] < NONE]
    few = [name for name in ordered if NONE <= total[name] < FEW]
    for level, kind, names, why in (
        ("bad", "too few", lost, "That is too few to train, to choose and to test on."),
        ("warn", "few", few, "What is said of such a class will be shaky."),
    ):
        if names:
            shown = [f"{name} ({total[name]})" for name in names]
            yield Finding(
                level, kind, f"{several(len(names), 'class has', 'classes have')} fewer than "
                f"{NONE if level == 'bad' else FEW} pictures that can be read",
                f"{listed(shown)}. {why} Add pictures, then look again.",
                place.again(), [{"path": name, "note": f"{total[name]}"}
                                                   for name in names],
            )  # fmt: skip
    if len(held) > 1 and total[held[-1]] >= UNEVEN * total[held[0]]:
        yield Finding(
            "warn", "uneven", f"{held[-1]} has {total[held[-1]] / total[held[0]]:.0f} times as "
            f"many pictures as {held[0]}", f"{total[held[-1]]:,} against {total[held[0]]:,}. A "
            "network learns to say the frequent class; weights by class set it right, and the "
            "report then tells frequent from rare classes.", place.train("--balance", "auto"), [],
        )  # fmt: skip
    yield from _missing(opened, counts)
    tests = sum(counts.get("test", Counter()).values()) or round(0.15 * sum(total.values()))
    if 0 < tests < LEAST_TEST:
        half = 196 * (0.1 * 0.9 / tests) ** 0.5
        yield Finding(
            "warn", "small test", f"There are about {several(tests, 'picture')} to test on",
            f"An accuracy of 90 % will be known to plus or minus {half:.0f} points only. More "
            "pictures make it sharper.", place.again(), [],
        )  # fmt: skip


def _missing(opened: Opened, counts: Counts) -> Iterator[Finding]:
    """Classes of train that a split lacks, and does not call otherwise; some of its pictures can go
    there."""
    train = counts.get("train", Counter())
    for split in ("val", "test"):
        here = counts.get(split)
        if not here:
            continue
        meant = {nearest(name, train) for name in here if here[name] and name not in train}
        lost = sorted(name for name in train if train[name] and not here[name])
        lost = [name for name in lost if name not in meant]
        if not lost:
            continue
        source, lines = opened.source, []
        for name in lost:
            keys = [item.key for item in source.items
                    if item.split == "train" and source.named(item.label) == name]  # fmt: skip
            wanted = min(max(1, len(keys) // 7), 10)
            there = opened.place.path(class_folder(opened, split, name))
            chosen = " ".join(opened.place.path(opened.top + key) for key in keys[::7][:wanted])
            lines.append(f"mkdir -p {there} && mv -n -- {chosen} {there}/")
        movable = opened.place.kind == "folder"
        yield Finding(
            "bad", "missing class",
            f"{split} has no picture of {several(len(lost), 'class', 'classes')}",
            f"{listed(lost)}. How well they are found stays unknown. One picture in seven, and "
            f"ten at most, can go from train to {split}.",
            "\n".join(lines) if movable else opened.place.unpack(), of_paths(lost),
        )  # fmt: skip


def file_findings(opened: Opened, looks: Sequence[Look]) -> Iterator[Finding]:
    """Files that cannot be read, and those that are not what they seem."""
    place, items = opened.place, opened.source.items
    broken = [{"path": item.key, "note": look.fault}
              for item, look in zip(items, looks, strict=True) if look.fault]  # fmt: skip
    if broken:
        reasons = Counter(str(one["note"]) for one in broken).most_common()
        shown = [f"{several(number, 'file')}: {reason}" for reason, number in reasons]
        yield Finding(
            "bad", "unreadable", f"{several(len(broken), 'file')} cannot be read",
            f"{listed(shown)}. A training leaves them out.", place.take_out("unreadable"), broken,
        )  # fmt: skip
    others = [one for one in opened.source.skipped if one.reason != "not in a class folder"]
    if others:
        yield Finding(
            "good", "left out", f"{several(len(others), 'file is', 'files are')} left out",
            "They are no pictures by their names, or cannot be reached. Nothing has to be done.",
            "", [{"path": one.path, "note": one.reason} for one in others],
        )  # fmt: skip
    for kind, level, is_so, title, why, fix in _SEEMS:
        found = [item.key for item, look in zip(items, looks, strict=True)
                 if look.fault is None and look.header and is_so(item.key, look)]  # fmt: skip
        if found:
            yield Finding(
                level, kind, f"{several(len(found), 'picture')} {title[len(found) > 1]}", why,
                place.take_out(kind) if fix else "", of_paths(found),
            )  # fmt: skip


Test = Callable[[str, Look], bool]
_SEEMS: tuple[tuple[str, str, Test, tuple[str, str], str, bool], ...] = (
    ("plain", "warn", lambda key, look: look.plain,
     ("has a single colour", "have a single colour"),
     "There is nothing to see in them: a lens cap, a failed download, a page of a scan.", True),
    ("lies", "good", lambda key, look: look.header is not None and lies(key, look.header),
     ("is another format than its name says", "are other formats than their names say"),
     "They are read by what they hold, so nothing has to be done; some programs refuse them.",
     False),
    ("animated", "warn", lambda key, look: bool(look.header and look.header.several),
     ("has several frames", "have several frames"),
     "Only the first one is looked at. Take out what is no picture of its class.", True),
    ("huge", "good",
     lambda key, look: bool(look.header and look.header.width * look.header.height > HUGE),
     ("has more than 50 million pixels", "have more than 50 million pixels"),
     "They are read, but slowly. Nothing has to be done.", False),
    ("deep colour", "good",
     lambda key, look: bool(look.header and look.header.mode.startswith(("I", "F"))),
     ("has more than 8 bits a value", "have more than 8 bits a value"),
     "They are scaled to 8 bits, never clipped. Nothing has to be done.", False),
    ("cmyk", "good", lambda key, look: bool(look.header and look.header.mode == "CMYK"),
     ("is made for print (CMYK)", "are made for print (CMYK)"),
     "They are turned into RGB. Colours may differ a little from what a printer shows.", False),
    ("alpha", "good", lambda key, look: bool(look.header and look.header.transparent),
     ("is transparent in places", "are transparent in places"),
     "White is laid under them, here and where the trained model is used.", False),
)  # fmt: skip


def shape_findings(opened: Opened, looks: Sequence[Look]) -> Iterator[Finding]:
    """Pictures that lie on their side, are tiny, or of a strange shape."""
    place, items = opened.place, opened.source.items
    known = [at for at, look in enumerate(looks) if look.fault is None and min(look.shape) > 0]
    if not known:
        return
    key = lambda at: items[at].key
    turned = [at for at in known if (header := looks[at].header) and header.orientation != 1]
    if turned:
        yield Finding(
            "good", "exif", f"{several(len(turned), 'picture is', 'pictures are')} stored turned",
            "The files say how to hold them (EXIF), and that is obeyed, here and where the trained "
            "model is used. Other programs may show them on their side.", "",
            of_paths(map(key, turned)),
        )  # fmt: skip
    height, width = np.array([looks[at].shape for at in known], np.float64).T
    lying = width > 1.05 * height
    standing = height > 1.05 * width
    for most, least, how in ((lying, standing, "wide"), (standing, lying, "tall")):
        if len(known) >= 20 and most.mean() >= NEARLY_ALL and 0 < least.mean() <= TURNED:
            aside = [key(known[at]) for at in np.flatnonzero(least)]
            yield Finding(
                "warn", "sideways", f"{several(len(aside), 'picture')} may lie on the side",
                f"{most.mean():.0%} of the pictures are {how}, these are not, and their files do "
                "not say that they are turned. Turn those that lie on their side, or take them "
                "out.", place.take_out("sideways"), of_paths(aside),
            )  # fmt: skip
    side = np.minimum(height, width)
    tiny = np.flatnonzero(side < min(SMALL, np.median(side)))
    if len(tiny):
        small = [{"path": key(known[at]), "note": f"{width[at]:.0f}x{height[at]:.0f}"}
                 for at in tiny]  # fmt: skip
        yield Finding(
            "warn", "tiny", f"{several(len(tiny), 'picture is', 'pictures are')} tiny",
            f"A side is shorter than {SMALL} pixels, while half of the pictures have "
            f"{np.median(side):.0f} and more: thumbnails, perhaps.", place.take_out("tiny"), small,
        )  # fmt: skip
    aspect = np.log(width / height)
    away = np.abs(aspect - np.median(aspect))
    strange = np.flatnonzero((away > np.log(ODD)) & (np.abs(aspect) > np.log(ODD)))
    if len(strange):
        yield Finding(
            "warn", "aspect", f"{several(len(strange), 'picture has', 'pictures have')} a strange "
            "shape", f"They are more than {ODD:.0f} times as long as wide. Cropping to a square "
            "throws most of them away; padding keeps all.", place.train("--fit", "pad"),
            [{"path": key(known[at]), "note": f"{width[at]:.0f}x{height[at]:.0f}"}
             for at in strange],
        )  # fmt: skip


def spectrum_findings(opened: Opened, looks: Sequence[Look]) -> Iterator[Finding]:
    """Whether the pictures of each class were filtered so that nothing can be learnt from them."""
    seen = [at for at, look in enumerate(looks) if look.spectrum is not None]
    if opened.source.multi or not seen:
        return
    labels = opened.source.labels
    count = np.bincount(labels[seen], minlength=len(opened.source.classes))
    seen = [at for at in seen if count[labels[at]] >= spectrum.FEW]
    found = spectrum.judge([look for at in seen if (look := looks[at].spectrum)], labels[seen])
    if found is None:
        return
    where = quoted(opened.place.spec)
    yield Finding(
        "bad" if found.suspicious else "good", "unlearnable",
        "The pictures seem to have been made unlearnable" if found.suspicious
        else "No sign that the pictures were made unlearnable",
        found.text, f"crosspatch eval RUN {where}   # a run that was trained on other pictures"
        if found.suspicious else "", [],
    )  # fmt: skip
