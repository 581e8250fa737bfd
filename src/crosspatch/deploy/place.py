# SPDX-License-Identifier: Apache-2.0
"""Where a bundle is written: checked before any work, made in a folder beside it, renamed last.

Killed at any moment, there is the old bundle, the new one or none, never a half.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from crosspatch.deploy.bundle import KEY, read_bundle
from crosspatch.errors import DataError, UsageError
from crosspatch.training.state import TEMPORARY, flush_file, flush_folder

SUFFIX = {"onnx": ".onnx", "openvino": ".xml", "torch": ".pt2"}
"""What a run is exported to -> how the file's name ends."""
CLIENT = "client.py"
STALE = 3600  # seconds after which what a killed export left is removed


def default_place(home: Path, to: str, precision: str) -> Path:
    """Where the bundle of a run folder stands: `bundle.onnx`, `bundle-int8-static.xml` …"""
    kind = {"fp32": "", "int8-dynamic": "-int8", "int8-static": "-int8-static"}[precision]
    return home / f"bundle{kind}{SUFFIX[to]}"


def check_place(path: Path, to: str, overwrite: bool = False) -> None:
    """Raises UsageError, before any work, when a bundle cannot be written to `path`.

    A bundle of ours may be replaced, any other file with `overwrite` only.
    """
    end = SUFFIX[to]
    if path.is_dir():
        inside = path / f"bundle{end}"
        raise UsageError(f"{path} is a folder", "the name of a file", f"--out {inside}")
    if path.suffix != end:
        example = path.with_suffix(end) if path.name else f"bundle{end}"
        raise UsageError(f"{path} for --to {to}", f"a name that ends in {end}", f"--out {example}")
    if not path.parent.is_dir():
        raise UsageError(
            f"{path} would stand in {path.parent}, no such folder",
            "a file in a folder that exists",
            f"make that folder, or --out {path.name}",
        )
    if path.exists() and not overwrite and not _ours(path):
        raise UsageError(
            f"{path} exists and is no bundle that crosspatch wrote",
            "a new name, or a bundle to replace",
            "choose another --out, or take that file away",
        )


def _ours(path: Path) -> bool:
    if path.suffix == SUFFIX["torch"]:
        try:
            with zipfile.ZipFile(path) as archive:
                return any(name.endswith(f"/extra/{KEY}") for name in archive.namelist())
        except (OSError, zipfile.BadZipFile):
            return False
    try:
        read_bundle(path)
    except DataError:
        return False
    return True


@contextmanager
def workshop(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path`, removed at the end whatever happens.

    Raises UsageError where it cannot be made, and for a disk that fills up meanwhile.
    """
    _sweep(path.parent)
    try:
        with tempfile.TemporaryDirectory(prefix=f"{TEMPORARY}bundle-", dir=path.parent) as folder:
            yield Path(folder)
    except OSError as error:
        raise UsageError(
            f"{path} cannot be written: {error.strerror or error}",
            "a folder that you may write, with room for the bundle",
            "choose another place with --out",
        ) from error


def _sweep(folder: Path) -> None:
    """Remove what exports that were killed long ago left in `folder`."""
    for old in folder.glob(f"{TEMPORARY}bundle-*"):
        try:
            stale = time.time() - old.stat().st_mtime > STALE
        except OSError:  # its owner has just removed it
            continue
        if stale:
            shutil.rmtree(old, ignore_errors=True)


def place(made: Path, path: Path) -> int:
    """Move a whole bundle from the workshop to `path`; returns its bytes.

    Of OpenVINO's pair the weights come first, while no graph stands there that could belong to
    others.
    """
    pairs = [(made, path)]
    if made.suffix == SUFFIX["openvino"]:
        pairs.insert(0, (made.with_suffix(".bin"), path.with_suffix(".bin")))
    size = sum(source.stat().st_size for source, _ in pairs)
    for source, _ in pairs:
        flush_file(source)
    if len(pairs) > 1:
        path.unlink(missing_ok=True)
    for source, target in pairs:
        os.replace(source, target)
    flush_folder(path.parent)
    return size


def write_client(folder: Path) -> list[str]:
    """Put the client that reads ONNX bundles into `folder`; a remark where another file stands."""
    source = Path(__file__).with_name(CLIENT).read_bytes()
    path = folder / CLIENT
    if path.exists() and path.read_bytes() != source and b"crosspatch" not in path.read_bytes():
        return [f"{path} is another file, so the client that reads the bundle was not written"]
    with workshop(path) as shop:
        made = shop / CLIENT
        made.write_bytes(source)
        os.replace(made, path)
    return []
