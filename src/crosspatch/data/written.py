# SPDX-License-Identifier: Apache-2.0
"""Pictures of a source written as a folder that everything reads: train/ val/ test/ of class
folders, with the bytes of the files as they are.

The folder is filled beside its place under a hidden name and renamed when it is whole.
"""

from __future__ import annotations

import io
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from crosspatch.data.sources import Source
from crosspatch.data.split import SPLITS, Split
from crosspatch.errors import DataError, UsageError

WRITING = ".crosspatch-writing-"


def check_new(out: Path) -> None:
    """Raises UsageError, before any work, where a new folder cannot be made at `out`."""
    if out.exists() or out.is_symlink():
        raise UsageError(f"{out} exists", "a name that is not taken", "choose another --out")
    if not out.parent.is_dir():
        raise UsageError(
            f"{out} would stand in {out.parent}, no such folder",
            "a place in a folder that exists",
            f"make that folder, or --out {out.name}",
        )


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A folder to fill, which is `out` when all went well and else is removed.

    Raises UsageError where `out` is taken or the disk does not take it.
    """
    check_new(out)
    draft = None
    try:
        draft = Path(tempfile.mkdtemp(prefix=WRITING, dir=out.parent))
        draft.chmod(0o755)
        yield draft
        check_new(out)
        os.rename(draft, out)
    except OSError as error:
        raise UsageError(
            f"{out} cannot be written: {error.strerror or error}",
            "a folder that you may write, with room for the pictures",
            "choose another place with --out",
        ) from error
    finally:
        if draft is not None:
            shutil.rmtree(draft, ignore_errors=True)


def write_pictures(
    source: Source,
    split: Split,
    folder: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write the pictures of a split into `folder`. progress: is told how many of how many are done.

    Raises DataError for a class whose name cannot be a folder's, and UnreadableImage for a picture
    that is no longer there.
    """
    for name in source.classes:
        _require_plain(name)
    total, done = sum(len(getattr(split, name)) for name in SPLITS), 0
    tried = Counter[Path]()
    for name in SPLITS:
        for index in getattr(split, name).tolist():
            item = source.items[index]
            place = folder / name / source.named(item.label)
            place.mkdir(parents=True, exist_ok=True)
            _write(source.read(index), place, PurePosixPath(item.key).name, tried)
            done += 1
            progress(done, total)


def _write(data: bytes | np.ndarray, place: Path, name: str, tried: Counter[Path]) -> None:
    if not isinstance(data, bytes):
        buffer = io.BytesIO()
        Image.fromarray(data).save(buffer, "png")
        data, name = buffer.getvalue(), f"{name}.png"
    free_path(place, name, tried).write_bytes(data)


def free_path(folder: Path, name: str, tried: Counter[Path]) -> Path:
    """`folder` / `name`, with a number behind its stem where that is taken. tried: how many numbers
    were tried for a path, so that many pictures of one name are written in one go."""
    path = asked = folder / name
    while path.exists():
        tried[asked] += 1
        path = asked.with_name(f"{asked.stem}-{tried[asked] + 1}{asked.suffix}")
    return path


def _require_plain(name: str) -> None:
    if not name or name.startswith(".") or any(sign in name for sign in "/\\\0"):
        raise DataError(
            f"the class {name!r}",
            "names that a folder can have",
            "rename the class, or use DATA@lt:RATIO, which writes nothing",
        )
