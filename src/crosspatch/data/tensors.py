# SPDX-License-Identifier: Apache-2.0
"""The one door through which weights come in: safetensors, and nothing else.

What a file is, its first bytes decide, never its name. A safetensors file is eight bytes with the
length of a JSON header, the header (names, types, shapes, places), and the tensors without a gap.
The header is checked here, within limits, before anything is allocated, and so that a refusal says
why; then the library reads. Pickles run the code of whoever wrote them: they are recognised by
content, in every form that is in use, and refused with what they would call. Nothing that failed
here is tried in another way. This module imports torch only where tensors are asked for.
"""

from __future__ import annotations

import math
import shlex
import stat
import zipfile
from contextlib import suppress
from itertools import islice
from pathlib import Path
from pickletools import genops
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from crosspatch.data import jsons
from crosspatch.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

ENDING = ".safetensors"
BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U16": 2,
         "U8": 1, "BOOL": 1}  # fmt: skip
"""Types that tensors here may have, and the bytes of one value."""
LARGEST_HEADER = 16 << 20  # bytes; the library takes 100 MB, of which Python makes gigabytes
MOST = 100_000  # tensors
DIMENSIONS = 16
HEAD = 1 << 16  # bytes that tell what a file is
OPERATIONS = 2000  # of a pickle, of which it is told
EXPECTED = "a whole .safetensors file of weights"
DO = "train or fetch it again"

KINDS = (
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"Rar!", "a RAR archive"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"BZh", "a bzip2 archive"),
    (b"\xfd7zXZ\0", "an xz archive"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive"),
    (b"\x93NUMPY", "an array of NumPy, which may hold pickled objects"),
    (b"\x89HDF\r\n", "an HDF5 file"),
    (b"GGUF", "a GGUF file"),
    (b"version https://git-lfs", "a pointer of Git LFS, not the file it stands for"),
    (b"<", "a page of HTML or XML"),
)


class Entry(NamedTuple):
    """One tensor in a file: its type (a key of BYTES), its shape, where its bytes begin in it."""

    dtype: str
    shape: tuple[int, ...]
    offset: int


class Header(NamedTuple):
    """metadata: texts by name; tensors: by name."""

    metadata: dict[str, str]
    tensors: dict[str, Entry]


def read_header(path: str | Path, expected: str = EXPECTED, do: str = DO) -> Header:
    """What a safetensors file says it holds, checked against its size. Nothing else is read.

    expected, do: parts of the error. Raises DataError for a file that is missing, torn or none.
    """
    path, head = Path(path), b""
    try:
        status = path.stat()  # before it is opened: a pipe would wait for its other end
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is no regular file")
        with path.open("rb") as file:
            head = file.read(HEAD)
            file.seek(8)
            return _header(file, head, status.st_size)
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        raise DataError(f"{path} is missing or torn ({why})", expected, do) from error
    except ValueError as error:
        raise _refused(path, head, str(error), expected, do) from error


def read_tensors(
    path: str | Path, expected: str = EXPECTED, do: str = DO, *, finite: bool = True
) -> dict[str, Tensor]:
    """The tensors of a file, on the processor.

    finite: refuse weights that are NaN or infinite. Raises DataError for a file that is missing,
    torn or no safetensors, and for such weights, by name.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    read_header(path, expected, do)
    try:
        found = load_file(path)
    except (SafetensorError, OSError, RuntimeError) as error:
        raise DataError(f"{path} is missing or torn ({error})", expected, do) from error
    bad = [name for name, one in found.items() if not _finite(one)] if finite else []
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise DataError(
            f"{path} holds weights that are not finite: {', '.join(map(_named, bad[:3]))}{more}",
            "weights of a training that did not diverge",
            "train again with a lower rate (--lr)",
        )
    return found


def conversion(path: Path) -> str:
    """The command that makes a .safetensors file of a file of torch, in the user's environment."""
    target = path.with_suffix(ENDING)
    target = path.with_stem(f"{path.stem}-converted") if target == path else target
    code = (
        "import torch as t, safetensors.torch as s; "
        f"d = t.load({str(path)!r}, map_location='cpu', weights_only=True); "
        "d = d.get('model', d.get('state_dict', d)); "
        "s.save_file({k: v.clone().contiguous() for k, v in d.items()}, "
        f"{str(target)!r})"
    )
    return f"python -c {shlex.quote(code)}"


def _finite(tensor: Tensor) -> bool:
    """Whether all of its values are; without a copy of its size."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    low, high = tensor.aminmax()
    return math.isfinite(low.item()) and math.isfinite(high.item())


def _header(file: BinaryIO, head: bytes, size: int) -> Header:
    """Raises ValueError with the reason for whatever is no safetensors file of `size` bytes."""
    if len(head) < 8:
        raise ValueError("it is empty" if not head else f"it has {len(head)} bytes")
    length = int.from_bytes(head[:8], "little")
    if not length:
        raise ValueError("its header has the length 0")
    if length > size - 8:
        raise ValueError(f"its header would have {length:,} bytes, and the file has {size:,}")
    if length > LARGEST_HEADER:
        raise ValueError(f"its header has {length:,} bytes, more than {LARGEST_HEADER:,}")
    text = file.read(length)
    if len(text) < length or not text.startswith(b"{"):
        raise ValueError("its header is no JSON object")
    try:
        given = jsons.parse(text.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError("its header is not UTF-8") from error
    except ValueError as error:
        raise ValueError(f"its header is not JSON: {error}") from error
    metadata = given.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("its metadata are not texts")
    if len(given) > MOST:
        raise ValueError(f"it names {len(given):,} tensors, more than {MOST:,}")
    spans = {name: _span(name, one) for name, one in given.items()}
    _require_gapless(spans, size - 8 - length)
    start = 8 + length
    return Header(
        metadata,
        {name: Entry(d, shape, start + begin) for name, (d, shape, begin, _) in spans.items()},
    )


def _span(name: str, given: Any) -> tuple[str, tuple[int, ...], int, int]:
    """(type, shape, begin, end) of an entry of the header; ValueError for what cannot be."""
    told = _named(name)
    if not isinstance(given, dict) or given.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"the tensor {told} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = given["dtype"], given["shape"], given["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BYTES:
        raise ValueError(f"the tensor {told} has the unknown type {jsons.shown(dtype)}")
    if not _counts(shape) or len(shape) > DIMENSIONS:
        raise ValueError(f"the tensor {told} has the impossible shape {jsons.shown(shape)}")
    if not _counts(offsets) or len(offsets) != 2:
        raise ValueError(f"the tensor {told} has the impossible offsets {jsons.shown(offsets)}")
    begin, end = offsets
    needed = math.prod(shape) * BYTES[dtype]
    if end - begin != needed:
        raise ValueError(f"the tensor {told} takes {end - begin:,} bytes, its shape {needed:,}")
    return dtype, tuple(shape), begin, end


def _counts(given: Any) -> bool:
    return isinstance(given, list) and all(type(one) is int and one >= 0 for one in given)


def _require_gapless(spans: dict[str, tuple[str, tuple[int, ...], int, int]], room: int) -> None:
    """Raises ValueError unless the tensors fill `room` bytes, each beginning where one ends."""
    at = 0
    for name, (_, _, begin, end) in sorted(spans.items(), key=lambda one: one[1][2:]):
        if begin != at:
            how = "overlaps another" if begin < at else "leaves a gap before it"
            raise ValueError(f"the tensor {_named(name)} {how}")
        at = end
    if at > room:
        raise ValueError(f"it is cut short: its tensors take {at:,} bytes, and {room:,} are there")
    if at < room:
        raise ValueError(f"{room - at:,} bytes follow its last tensor")


def _named(name: str) -> str:
    return name if name.isprintable() and len(name) <= jsons.SHOWN else jsons.shown(name)


# ------------------------------------------------------------------ what else it may be


def _refused(path: Path, head: bytes, why: str, expected: str, do: str) -> DataError:
    """The error for a file that is no whole safetensors file: what it is instead, where that can be
    told from its content."""
    calls = _pickled(head)
    if calls is not None:
        names = f" (it names {', '.join(calls)})" if calls else ""
        return DataError(
            f"{path} is a pickle, which runs the code of whoever wrote it{names}",
            expected,
            f"where you trust it: {conversion(path)}",
        )
    if head.startswith(b"PK") or (head and _ends_as_zip(path)):
        return DataError(
            f"{path} is a zip archive, in which torch keeps a pickle, which runs the code of "
            "whoever wrote it",
            expected,
            f"where you trust it: {conversion(path)}",
        )
    if head[257:262] == b"ustar":
        return DataError(
            f"{path} is a tar archive, in which torch kept pickles, which run the code of whoever "
            "wrote them",
            expected,
            f"where you trust it: {conversion(path)}",
        )
    kind = next((what for magic, what in KINDS if head.lstrip(b" \r\n").startswith(magic)), None)
    if kind is not None:
        return DataError(f"{path} is {kind}", expected, do)
    return DataError(f"{path} is torn or is no safetensors file ({why})", expected, do)


def _ends_as_zip(path: Path) -> bool:
    try:
        return zipfile.is_zipfile(path)
    except OSError:
        return False


def _pickled(head: bytes) -> list[str] | None:
    """What the pickle that begins with `head` names, as `module.name`; None for what is no pickle.

    It is taken apart, never run. From protocol 2 on a pickle says so; older ones are told by
    operations that all make sense up to their end, or up to a name that is looked up.
    """
    names, texts, done, count = list[str](), list[str](), False, 0
    with suppress(Exception):  # whatever a broken pickle makes of its disassembler
        for operation, argument, _ in islice(genops(head), OPERATIONS):
            count += 1
            done |= operation.name == "STOP"
            if operation.name in ("GLOBAL", "INST"):
                names.append(str(argument).replace(" ", "."))
            elif operation.name == "STACK_GLOBAL" and len(texts) > 1:
                names.append(".".join(texts[-2:]))
            elif isinstance(argument, str):
                texts.append(argument)
    marked = head[:1] == b"\x80" and head[1:2] in {b"\2", b"\3", b"\4", b"\5"} and count > 1
    if not (marked or (done and count > 1) or names):
        return None
    clean = [jsons.shown(name)[1:-1] for name in dict.fromkeys(names)]
    return clean[:3]
