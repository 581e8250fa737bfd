# SPDX-License-Identifier: Apache-2.0
"""`crosspatch data unlearnable DATA --key N --out DIR`: a copy that is hard to learn from.

An experiment (`mixing/cuda_unlearnable.py`), not a protection. PNG copies of the training pictures
in class folders, and `unlearnable.json`, which says everything but the key. Killed at any moment
there is the whole folder or none.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from cyclopts import Parameter

from crosspatch.cli.options import DATA, Columns, Output, at_least, typed
from crosspatch.errors import DataError, UsageError

if TYPE_CHECKING:
    import numpy as np

    from crosspatch.data.sources import Source

SIDECAR, VERSION = "unlearnable.json", 1
ROUNDS = 200_000  # of PBKDF2, so that short keys are not found at once
LARGEST = 1 << 20  # bytes of a sidecar
HONEST = (
    "This deters; it does not protect: sharpening and frequency filters undo it, and one clean "
    "picture beside its copy gives its filter away."
)


class _Rules(NamedTuple):
    """What the copies are made with. classes: in the order in which their filters are drawn."""

    key: int
    blur: float
    part: float
    kernel: int
    classes: tuple[str, ...]


def unlearnable(
    data: Annotated[str, Parameter(help=DATA)],
    /,
    *,
    key: Annotated[int, at_least(0, "--key 93214809217")],
    out: Annotated[Path, Parameter(metavar="DIR")],
    blur: float = 0.3,
    part: float = 1.0,
    kernel: int = 3,
    like: Annotated[Path | None, Parameter(metavar="DIR")] = None,
    columns: Columns | None = None,
    output: Output | None = None,
) -> int:
    """Write copies of the training pictures that networks learn little from (an experiment).

    Parameters
    ----------
    key
        The secret number that the filters follow from: keep it, and let it be long.
    out
        The new folder.
    blur
        How strongly a class is blurred, above 0 and at most 1.
    part
        The share of the pictures that is changed.
    kernel
        Side of the filters in pixels, odd.
    like
        A folder written before: its classes keep their filters, new ones get the next.
    """
    output = output or Output()
    from crosspatch.cli.screen import Screen, print_json
    from crosspatch.data.opening import open_source
    from crosspatch.data.written import check_new

    check_new(out)
    source = open_source(data, least_classes=1, **typed(columns or Columns()))
    if source.multi:
        raise UsageError(
            f"pictures of {data} may have several labels",
            "one class to a picture: each has its own filter",
            "take data with one label to a picture",
        )
    rules = _Rules(key, blur, part, kernel, source.classes)
    rules = _check(rules if like is None else _following(rules, like))
    with Screen(stderr=output.json) as screen:
        told = lambda done, total: screen.progress("protecting", done, total)
        summary = write_copies(source, rules, out, told)
        if not output.json:
            screen.line(
                f"{out}: {summary['changed']:,} of {summary['pictures']:,} pictures filtered"
            )
            screen.line(HONEST, "yellow")
            for one in summary["skipped"]:
                screen.line(f"left out {one['path']}: {one['reason']}", "yellow")
    if output.json:
        print_json({"data": data, "out": str(out), **summary})
    return 0


def write_copies(
    source: Source, rules: _Rules, out: Path, progress: Callable[[int, int], None]
) -> dict[str, Any]:
    """Write the folder; what it holds, as `unlearnable.json` says it, and the pictures left out.

    Raises UsageError where it cannot be written, DataError where no picture can be read.
    """
    from crosspatch.data.written import whole_folder
    from crosspatch.mixing.cuda_unlearnable import make_filters

    chosen = [at for at, item in enumerate(source.items) if item.split in (None, "train")]
    filters = make_filters(rules.key, len(rules.classes), blur=rules.blur, kernel=rules.kernel)
    acts = filters.chosen(len(chosen), rules.part)
    folders = _folders(rules.classes)
    with whole_folder(out) as draft:
        skipped, changed = _write(source, chosen, acts, filters.weights, rules.classes,
                                  [draft / name for name in folders], progress)  # fmt: skip
        if len(skipped) == len(chosen):
            raise DataError(
                f"none of {len(chosen):,} training pictures could be read",
                "pictures (JPEG, PNG, WebP, BMP, GIF or TIFF)",
                f"look at them; the first is {skipped[0]['path']}: {skipped[0]['reason']}"
                if skipped
                else "give a folder with pictures to train on",
            )
        about = {**_about(rules), "pictures": len(chosen) - len(skipped), "changed": changed}
        (draft / SIDECAR).write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n")
    return {**about, "skipped": skipped}


def _write(
    source: Source,
    chosen: list[int],
    acts: np.ndarray,
    weights: np.ndarray,
    classes: tuple[str, ...],
    folders: list[Path],
    progress: Callable[[int, int], None],
) -> tuple[list[dict[str, str]], int]:
    """(pictures that cannot be read, how many copies were filtered)."""
    import numpy as np
    from PIL import Image

    from crosspatch.data.decode import UnreadableImage
    from crosspatch.data.written import free_path
    from crosspatch.mixing.cuda_unlearnable import filtered

    place = {name: at for at, name in enumerate(classes)}
    skipped, changed, tried = [], 0, Counter[Path]()
    for done, (index, act) in enumerate(zip(chosen, acts, strict=True), 1):
        item = source.items[index]
        number = place[source.named(item.label)]
        try:
            pixels = np.asarray(source.image(index).convert("RGB"))
        except UnreadableImage as error:
            skipped.append({"path": item.key, "reason": error.reason})
        else:
            folders[number].mkdir(exist_ok=True)
            copy = filtered(pixels, weights[number]) if act else pixels
            name = f"{_plain(Path(item.key).stem)}.png"
            Image.fromarray(copy).save(free_path(folders[number], name, tried))
            changed += bool(act)
        progress(done, len(chosen))
    return skipped, changed


def _plain(name: str) -> str:
    """A name that every file system takes."""
    return re.sub(r'[\x00-\x1f/\\:*?"<>|]', "_", name).strip(". ")[:80] or "_"


def _folders(classes: tuple[str, ...]) -> list[str]:
    """The folder of each class. Raises DataError where two would have the same."""
    names = [_plain(name) for name in classes]
    twice = [name for name, plain in zip(classes, names, strict=True) if names.count(plain) > 1]
    if twice:
        raise DataError(
            f"classes {' and '.join(twice[:3])}, which would share a folder",
            "names that differ in more than signs that no folder may have",
            "rename one of them",
        )
    return names


def _check(rules: _Rules) -> _Rules:
    """The rules. Raises UsageError for values out of range."""
    right = 0 < rules.blur <= 1 and 0 < rules.part <= 1
    if not right or rules.kernel not in range(3, 32, 2):
        raise UsageError(
            f"--blur {rules.blur} --part {rules.part} --kernel {rules.kernel}",
            "a blur and a part above 0 and at most 1, an odd kernel from 3 to 31",
            "--blur 0.3 --part 1 --kernel 3",
        )
    return rules


def _about(rules: _Rules) -> dict[str, Any]:
    """What `unlearnable.json` says: everything but the key."""
    salt = secrets.token_hex(16)
    return {
        "method": "cuda-unlearnable (arXiv 2303.04278)",
        "version": VERSION,
        "blur": rules.blur,
        "kernel": rules.kernel,
        "part": rules.part,
        "classes": list(rules.classes),
        "salt": salt,
        "key_hash": key_hash(rules.key, salt),
    }


def key_hash(key: int, salt: str) -> str:
    """PBKDF2-SHA256 of the key's digits: tells whether a key is the right one."""
    salted = bytes.fromhex(salt)
    return hashlib.pbkdf2_hmac("sha256", str(key).encode(), salted, ROUNDS).hex()


def _following(rules: _Rules, folder: Path) -> _Rules:
    """The rules with the classes of an older folder first. Raises UsageError where its key, blur or
    kernel are others, DataError where it cannot be read."""
    path = folder / SIDECAR
    try:
        if path.stat().st_size > LARGEST:
            raise ValueError("larger than 1 MB")
        about = json.loads(path.read_text(encoding="utf-8"))
        older = tuple(str(name) for name in about["classes"])
        was = (float(about["blur"]), int(about["kernel"]))
        same_key = about["key_hash"] == key_hash(rules.key, about["salt"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(
            f"{path} cannot be read ({error})",
            f"a folder that crosspatch data unlearnable wrote, with its {SIDECAR}",
            "leave --like away, or name that folder",
        ) from error
    if not same_key or was != (rules.blur, rules.kernel):
        raise UsageError(
            f"--like {folder} with another {'blur or kernel' if same_key else 'key'}",
            f"the key of that folder, --blur {was[0]:g} and --kernel {was[1]}",
            "give the same, or leave --like away",
        )
    return rules._replace(
        classes=(*older, *(name for name in rules.classes if name not in set(older)))
    )
