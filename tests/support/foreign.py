"""Model files as a stranger may write them, made in code: pickles in all their forms, safetensors
with impossible headers."""

from __future__ import annotations

import functools
import io
import json
import os
import pickle
import struct
import tarfile
from collections.abc import Callable

import numpy as np
import torch

Maker = Callable[[], bytes]
RAN = "crosspatch-hostile-ran"
"""A file that the code of a pickle would leave in the working folder."""


class _Calls:
    def __init__(self, function: Callable, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def pickled(function: Callable, *arguments: object, protocol: int = 2) -> bytes:
    """A pickle that calls a function when it is loaded."""
    return pickle.dumps(_Calls(function, *arguments), protocol)


def named(module: str, name: str, argument: str) -> bytes:
    """The same by names, of a module that need not be there."""
    return f"c{module}\n{name}\n(V{argument}\ntR.".encode()


def _legacy() -> bytes:
    stream = io.BytesIO()
    torch.save({"a": torch.ones(2)}, stream, _use_new_zipfile_serialization=False)
    return stream.getvalue()


def torch_zip() -> bytes:
    """What torch.save writes."""
    stream = io.BytesIO()
    torch.save({"a": torch.ones(2)}, stream)
    return stream.getvalue()


def _tar() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name in ("sys_info", "pickle", "tensors", "storages"):
            data = pickled(os.system, f"touch {RAN}")
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return stream.getvalue()


def _zip(change: Callable[[bytearray], None]) -> bytes:
    """torch's archive, changed where its directory says something."""
    data = bytearray(torch_zip())
    change(data)
    return bytes(data)


def _central(data: bytearray, place: int, value: bytes) -> None:
    at = data.index(b"PK\x01\x02")
    data[at + place : at + place + len(value)] = value


def _renamed(data: bytearray) -> None:
    at = data.rindex(b"data.pkl")
    data[at : at + 8] = b"data.bin"


def _objects() -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.array([_Calls(os.system, f"touch {RAN}")], object), allow_pickle=True)
    return stream.getvalue()


def _npz() -> bytes:
    stream = io.BytesIO()
    np.savez(stream, a=np.array([{"a": 1}], object))
    return stream.getvalue()


PICKLES: dict[str, tuple[Maker, str]] = {
    **{
        f"os.system, protocol {number}": (
            functools.partial(pickled, os.system, f"touch {RAN}", protocol=number),
            r"is a pickle.*\.system",
        )
        for number in range(6)
    },
    "builtins.eval": (lambda: pickled(eval, "1"), r"is a pickle.*\.eval"),
    "builtins.exec, protocol 4": (lambda: pickled(exec, "1", protocol=4), r"builtins\.exec"),
    "a chain of getattr": (
        lambda: named("builtins", "getattr", "system"), r"pickle.*builtins\.getattr",
    ),
    "pip.main": (lambda: named("pip", "main", "install x"), r"pickle.*pip\.main"),
    "cloudpickle": (
        lambda: named("cloudpickle.cloudpickle", "_make_function", "x"),
        r"pickle.*cloudpickle\.cloudpickle\._make_function",
    ),
    "functools": (lambda: pickled(functools.partial, len), r"pickle.*functools\.partial"),
    "a pickle of plain data": (lambda: pickle.dumps({"a": [1, 2]}, 2), "is a pickle"),
    "a pickle of plain data, protocol 0": (lambda: pickle.dumps({"a": [1]}, 0), "is a pickle"),
    "a pickle cut in its middle": (lambda: pickled(os.system, "x" * 99)[:60], "is a pickle"),
    "torch, before its zip": (_legacy, "is a pickle"),
    "torch, tar": (_tar, "tar archive.*kept pickles"),
    "torch, zip": (torch_zip, "zip archive.*keeps a pickle"),
    "zip, an entry renamed": (lambda: _zip(_renamed), "zip archive"),
    "zip, encryption flagged": (lambda: _zip(lambda d: _central(d, 8, b"\x01\0")), "zip archive"),
    "zip, flag 0x20": (lambda: _zip(lambda d: _central(d, 8, b"\x20\0")), "zip archive"),
    "zip, flag 0x40": (lambda: _zip(lambda d: _central(d, 8, b"\x40\0")), "zip archive"),
    "zip, wrong CRC": (lambda: _zip(lambda d: _central(d, 16, b"\1\2\3\4")), "zip archive"),
    "zip behind other bytes": (lambda: b"\x07" * 64 + torch_zip(), "zip archive"),
    "zip with a wrong magic": (lambda: b"XX" + torch_zip()[2:], "zip archive"),
    "7z": (lambda: b"7z\xbc\xaf\x27\x1c\0\x04" + bytes(99), "is a 7z archive"),
    "numpy, an array of objects": (_objects, "array of NumPy, which may hold pickled objects"),
    "numpy, npz": (_npz, "zip archive"),
    "gzip": (lambda: b"\x1f\x8b\x08" + bytes(99), "is a gzip archive"),
    "HDF5": (lambda: b"\x89HDF\r\n\x1a\n" + bytes(99), "is an HDF5 file"),
    "a page": (lambda: b"<!DOCTYPE html><html>not found</html>", "is a page of HTML"),
    "a pointer of Git LFS": (
        lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "pointer of Git LFS",
    ),
}  # fmt: skip
"""name -> (the file, what of it is said)."""


def tensors(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file; header: as it is, or to be written as JSON."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def one(shape: object = (2,), offsets: object = (0, 8), dtype: str = "F32") -> dict:
    """An entry of the header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def _two(first: tuple[int, int], second: tuple[int, int], size: int) -> bytes:
    sizes = [(b - a) // 4 for a, b in (first, second)]
    return tensors({"a": one([sizes[0]], first), "b": one([sizes[1]], second)}, bytes(size))


def _many() -> bytes:
    entry = '{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    return tensors(
        f"{{{','.join(chr(34) + str(n) + chr(34) + ':' + entry for n in range(10**6))}}}".encode()
    )


HEADERS: dict[str, tuple[Maker, str]] = {
    "nothing": (lambda: b"", "it is empty"),
    "seven bytes": (lambda: bytes(7), "it has 7 bytes"),
    "length 0": (lambda: tensors(b""), "length 0"),
    "length 2^63": (lambda: tensors({}, length=1 << 63), "header would have 9,223,372,036,854"),
    "length beyond the file": (lambda: tensors({}, length=1000), "header would have 1,000"),
    "length over 100 MB": (
        lambda: tensors(b"{}" + b" " * ((100 << 20) + 1)), "header has 104,857,603 bytes",
    ),
    "no object": (lambda: tensors(b"[1]     "), "no JSON object"),
    "invalid UTF-8": (lambda: tensors(b'{"\xff\xfe":1}'), "not UTF-8"),
    "no JSON": (lambda: tensors(b'{"a":'), "not JSON"),
    "NaN": (lambda: tensors(b'{"a":NaN}'), "NaN is no number"),
    "nested 100,000 times": (lambda: tensors(b'{"a":' + b"[" * 10**5), "nested too deeply"),
    "nested 100 times": (
        lambda: tensors(b'{"a":' + b"[" * 100 + b"]" * 100 + b"}"), "nested too deeply"
    ),
    "a number of 10,000 digits": (lambda: tensors(b'{"a":' + b"9" * 10**4 + b"}"), "10000 digits"),
    "duplicate keys": (
        lambda: tensors(b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":1}'), "twice",
    ),
    "overlapping": (lambda: _two((0, 8), (4, 12), 12), "'?b'? overlaps"),
    "a gap": (lambda: _two((0, 8), (12, 20), 20), "'?b'? leaves a gap"),
    "a gap at the start": (lambda: tensors({"a": one(offsets=(4, 12))}, bytes(12)), "gap"),
    "negative offsets": (lambda: tensors({"a": one(offsets=(-8, 0))}, bytes(8)), "offsets"),
    "offsets turned round": (lambda: tensors({"a": one(offsets=(8, 0))}, bytes(8)), "takes -8"),
    "three offsets": (lambda: tensors({"a": one(offsets=(0, 4, 8))}, bytes(8)), "offsets"),
    "offsets beyond the file": (
        lambda: tensors({"a": one([1 << 40], (0, 1 << 42))}, bytes(8)), "cut short",
    ),
    "a shape that overflows": (
        lambda: tensors({"a": one([1 << 32, 1 << 32, 4])}, bytes(8)), "its shape 295,147,905,179",
    ),
    "a shape that overflows to the right size": (
        lambda: tensors({"a": one([(1 << 62) + 2, 4], (0, 32))}, bytes(32)), "takes 32",
    ),
    "a negative side": (lambda: tensors({"a": one([-1, -2])}, bytes(8)), "impossible shape"),
    "a side that is true": (lambda: tensors({"a": one([True, 2])}, bytes(8)), "impossible shape"),
    "a side that is a decimal": (lambda: tensors({"a": one([2.0])}, bytes(8)), "impossible shape"),
    "a thousand sides": (lambda: tensors({"a": one([1] * 999 + [2])}, bytes(8)), "impossible sh"),
    "an unknown type": (lambda: tensors({"a": one(dtype="F33")}, bytes(8)), "unknown type 'F33'"),
    "a type that is a list": (lambda: tensors({"a": one(dtype=[])}, bytes(8)), "unknown type"),
    "an entry too much": (lambda: tensors({"a": one() | {"x": 1}}, bytes(8)), "not described by"),
    "no entry": (lambda: tensors({"a": []}, bytes(8)), "not described by"),
    "metadata that are no texts": (
        lambda: tensors({"__metadata__": {"a": {}}, "a": one()}, bytes(8)), "metadata are not",
    ),
    "a million tensors": (_many, "header has|1,000,000 tensors"),
    "cut": (lambda: tensors({"a": one()}, bytes(7)), "cut short"),
    "trailing bytes": (lambda: tensors({"a": one()}, bytes(9)), "1 bytes follow"),
    "a name that paints the terminal": (
        lambda: tensors({"\x1b[31m\u202e": one([9])}, bytes(8)), r"x1b\[31m",
    ),
}  # fmt: skip
"""name -> (the file, what of it is said)."""
