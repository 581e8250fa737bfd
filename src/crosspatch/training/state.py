# SPDX-License-Identifier: Apache-2.0
"""The state of a training, for exact resume: one safetensors file with JSON in its metadata.

`last/last.safetensors` is the newest, `last/last-1.safetensors` the one before. A new state is
written beside them, flushed to the disk and read back; only then are the two moved on. What is
torn, cut or foreign is named and skipped for the older one. `last/good.safetensors` is the newest
that was saved beside a validation, for a run that has to go back, and the last resort when both
others are unusable. Nothing is unpickled, ever. `training.writer` does the writing beside the
training.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crosspatch.data.tensors import read_header, read_tensors
from crosspatch.errors import DataError, UsageError

LAST, BEFORE, GOOD = "last.safetensors", "last-1.safetensors", "good.safetensors"
TEMPORARY = ".writing-"
KEY = "crosspatch-state"
SCHEMA = 1
EXPECTED, DO = "a training state that this program wrote", "train anew with --overwrite"
TYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
"""What a tensor's type is called in a safetensors file."""


def checksum(tensors: Mapping[str, Tensor]) -> int:
    """crc32 over names, types, shapes and bytes, in the order of the names."""
    value = 0
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        head = f"{name} {tensor.dtype} {tuple(tensor.shape)}"
        value = zlib.crc32(head.encode(), value)
        if tensor.numel():
            value = zlib.crc32(_bytes(tensor), value)
    return value


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def flush_folder(folder: Path) -> None:
    """Make renames in `folder` survive a power cut, where the system can."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def flush_file(path: Path) -> None:
    """Bring the file's bytes to the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def write_aside(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> Path:
    """Write a safetensors file under a temporary name beside `path`, flushed; returns that name.

    Raises UsageError when the disk is full or the folder cannot be written; nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        write_tensors(aside, plain, metadata)
        flush_file(aside)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise _unwritable(path, error) from error
    return aside


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write contiguous tensors on the CPU as a safetensors file, piece by piece.

    The library's own writer copies them all into one buffer first and keeps the interpreter busy
    meanwhile; here other threads go on, and no memory is taken. The layout is the library's:
    eight bytes with the length of a JSON header, the header, the tensors, widest types first.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": metadata}
    at = 0
    for name in order:
        tensor = tensors[name]
        end = at + tensor.numel() * tensor.element_size()
        kind, shape = TYPES[tensor.dtype], list(tensor.shape)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            if tensors[name].numel():
                file.write(_bytes(tensors[name]))


def _unwritable(path: Path, error: Exception) -> UsageError:
    return UsageError(
        f"{path} cannot be written: {error.got if isinstance(error, DataError) else error}",
        "a folder that can be written, with room for the state",
        "make room or choose another --out, then continue with --resume",
    )


def save_state(
    folder: Path, tensors: Mapping[str, Tensor], meta: dict[str, Any], name: str = LAST
) -> None:
    """Write a state into `folder`, keeping the previous one; a kill at any moment leaves one whole.

    tensors: name -> tensor (any device); meta: what JSON can hold; name: `LAST`, or `GOOD` for the
    start of a run. Raises UsageError when it cannot be written; the previous state is then
    untouched.
    """
    record = {"schema": SCHEMA, "crc32": checksum(tensors), "meta": meta}
    aside = write_aside(folder / name, tensors, {KEY: json.dumps(record)})
    try:
        read_state(aside)
    except DataError as error:
        aside.unlink(missing_ok=True)
        raise _unwritable(folder / name, error) from error
    if name == LAST and (folder / LAST).exists():
        os.replace(folder / LAST, folder / BEFORE)
    os.replace(aside, folder / name)
    flush_folder(folder)


def keep_good(folder: Path) -> None:
    """Keep the newest state as `GOOD` too: a second name for the same bytes where the system can.

    Raises UsageError when it cannot be written; the good state before it is then untouched.
    """
    aside = folder / f"{TEMPORARY}{os.getpid()}-{GOOD}"
    aside.unlink(missing_ok=True)
    try:
        try:
            os.link(folder / LAST, aside)
        except OSError:  # a file system without second names
            shutil.copyfile(folder / LAST, aside)
            flush_file(aside)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise _unwritable(folder / GOOD, error) from error
    os.replace(aside, folder / GOOD)
    flush_folder(folder)


def read_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read and verify one state file. Raises DataError naming it when it is torn or foreign."""
    header = read_header(path, EXPECTED, DO)
    tensors, note = read_tensors(path, EXPECTED, DO, finite=False), header.metadata.get(KEY)
    if note is None:
        raise _unusable(path, "holds no training state")
    try:
        record = json.loads(note)  # ours: it may hold losses that are not finite
        schema, crc, meta = record["schema"], record["crc32"], record["meta"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _unusable(path, "has unreadable metadata") from error
    if schema != SCHEMA:
        raise _unusable(path, f"has the format {schema}, this version reads {SCHEMA}")
    if crc != checksum(tensors):
        raise _unusable(path, "has damaged contents (the checksum differs)")
    return tensors, meta


def _unusable(path: Path, why: str) -> DataError:
    return DataError(f"{path} {why}", EXPECTED, DO)


def load_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any], list[str]] | None:
    """The newest usable state: (tensors, meta, remarks about skipped files); None if there is none.

    Raises DataError when there are state files and not one of them is usable.
    """
    remarks, found = [], [path for name in (LAST, BEFORE, GOOD) if (path := folder / name).exists()]
    for path in found:
        try:
            tensors, meta = read_state(path)
        except DataError as error:
            remarks.append(f"{error.got}: skipped")
            continue
        return tensors, meta, remarks
    if found:
        raise DataError(
            "; ".join(remarks), "at least one whole training state", "train anew with --overwrite"
        )
    return None


def sweep(folder: Path) -> None:
    """Remove temporary files that a kill left in `folder`."""
    for path in folder.glob(f"{TEMPORARY}*"):
        path.unlink(missing_ok=True)
