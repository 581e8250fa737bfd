# SPDX-License-Identifier: Apache-2.0
"""Opening an archive as a tree. A compressed tar is decompressed once, into the user's cache
folder.

The cache holds `<name>-<key>.tar` (the plain tar) and `<name>-<key>.json` (its index); the key is
made of the archive's path, size and modification time. Both are written under another name, flushed
and renamed, so what lies there is whole. The folder is `$XDG_CACHE_HOME/crosspatch/archives`, where
XDG_CACHE_HOME defaults to `~/.cache`; it may be deleted at any time.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import lzma
import os
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from crosspatch.data.trees import TarTree, Tree, ZipTree, broken_archive
from crosspatch.errors import DataError, UsageError

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")

Unpacker = type[gzip.GzipFile] | type[bz2.BZ2File] | type[lzma.LZMAFile]

_UNPACKERS: dict[bytes, Unpacker] = {
    b"\x1f\x8b": gzip.GzipFile,
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ\0": lzma.LZMAFile,
}
_BLOCK = 1 << 20
_RATIO = 200
_ALWAYS = 1 << 30


def open_archive(path: Path) -> Tree:
    """The tree of a zip or of a tar, compressed or not; the content decides, not the name.

    Raises DataError for a broken archive, for one that grows more than 200-fold (beyond 1 GB), and
    where the disk is full; UsageError where the cache folder cannot be written.
    """
    if zipfile.is_zipfile(path):
        return ZipTree(path)
    unpack = _unpacker(path)
    if unpack is None:
        return TarTree(path)
    plain = _cached(path)
    if not plain.exists():
        with _into_cache(plain) as file:
            _decompress(path, unpack, file)
    try:
        return TarTree(plain, index=plain.with_suffix(".json"))
    except DataError as problem:
        plain.unlink()
        raise broken_archive(path, problem.__cause__ or problem) from problem


def is_archive(path: Path) -> bool:
    """Whether a file is an archive by its content, or by its name when it is a broken one."""
    by_name = path.name.lower().endswith(ARCHIVES)
    return by_name or zipfile.is_zipfile(path) or tarfile.is_tarfile(path)


def cache_folder() -> Path:
    """Where decompressed archives lie. It need not exist."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "crosspatch" / "archives"


def _unpacker(path: Path) -> Unpacker | None:
    with open(path, "rb") as file:
        head = file.read(6)
    return next((unpack for magic, unpack in _UNPACKERS.items() if head.startswith(magic)), None)


def _cached(path: Path) -> Path:
    status = path.stat()
    identity = f"{path.resolve()}\0{status.st_size}\0{status.st_mtime_ns}"
    key = hashlib.sha256(identity.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return cache_folder() / f"{path.name.split('.')[0]}-{key}.tar"


@contextmanager
def _into_cache(target: Path) -> Iterator[IO[bytes]]:
    """A file that becomes `target` when everything was written, and nothing when not."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, aside = tempfile.mkstemp(prefix=target.stem, suffix=".part", dir=target.parent)
    except OSError as problem:
        raise UsageError(
            f"cannot write the cache folder {target.parent} ({problem.strerror})",
            "A compressed tar is decompressed there once",
            "Set XDG_CACHE_HOME to a folder that can be written, or unpack the archive yourself",
        ) from problem
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, target)
    except BaseException:
        os.unlink(aside)
        raise


def _decompress(path: Path, unpack: Unpacker, target: IO[bytes]) -> None:
    limit = max(_ALWAYS, _RATIO * path.stat().st_size)
    written = 0
    with unpack(path) as packed:
        while block := _next_block(path, packed):
            written += len(block)
            if written > limit:
                raise DataError(
                    f"{path} grows more than {_RATIO}-fold when it is decompressed",
                    "An archive of pictures hardly grows",
                    "Unpack it yourself if you trust it, and give the folder",
                )
            _write(target, block)


def _next_block(path: Path, packed: gzip.GzipFile | bz2.BZ2File | lzma.LZMAFile) -> bytes:
    try:
        return packed.read(_BLOCK)
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as problem:
        raise broken_archive(path, problem) from problem


def _write(target: IO[bytes], block: bytes) -> None:
    try:
        target.write(block)
    except OSError as problem:
        raise DataError(
            f"cannot write the decompressed archive into {cache_folder()} ({problem.strerror})",
            "It needs about the size of the pictures there",
            "Make room, or set XDG_CACHE_HOME to a larger disk",
        ) from problem
