# SPDX-License-Identifier: Apache-2.0
"""The process that decodes: bytes of a picture in, the model's input out, within firm limits.

A parser of foreign bytes may crash, swell or never end, so it runs in a process of its own, one
picture at a time. The kernel ends it when a picture takes more processor time than allowed
(SIGPROF), and refuses memory beyond a limit (RLIMIT_AS), which becomes an ordinary refusal. The
process imports the decoder and the preprocessing alone; it ends when its socket closes, so none
outlives its server. Messages are fixed headers and raw bytes; nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import resource
import signal
import socket
import struct
import sys
import time
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from crosspatch.data.decode import FORMATS, UnreadableImage, decode, read_header, sniff
from crosspatch.data.preprocess import Preprocess

MB = 1 << 20
MEMORY = 272 * MB
"""Address space that one picture may take in its process: 40 million pixels take 160 MB as Pillow
holds RGB, and 40 to 80 MB more where they come as grey or a palette. Those with transparency take
twice 160 MB, so of them about 32 million fit."""
WEBP = 16  # bytes that Pillow takes for each pixel of a WebP
REQUEST = struct.Struct("<QB")
"""Bytes of the picture that follows; 1 where the model's input is wanted as a PNG, too."""
REPLY = struct.Struct("<BIIBd32sQQ")
"""Place in OUTCOMES; width and height (upright, as sent); place in FORMATS; seconds; sha256 of the
picture's bytes; bytes of the first and of the second part that follow: pixels and PNG, or the
message and the hint of a refusal."""
OUTCOMES = ("", "not_supported", "unreadable", "too_many_pixels")
READY = b"+"


@dataclass(frozen=True)
class Limits:
    """What a picture may be. pixels, side: of the file as sent; formats: out of `FORMATS`; seconds:
    processor time of one picture; memory: bytes."""

    pixels: int = 40_000_000
    side: int = 12_000
    formats: tuple[str, ...] = ("JPEG", "PNG", "WebP", "BMP")
    seconds: float = 1.5
    memory: int = MEMORY


class Unfit(Exception):
    """A picture that is refused: a code out of OUTCOMES, what is wrong, what to do."""

    def __init__(self, code: str, message: str, hint: str) -> None:
        super().__init__(message)
        self.code, self.message, self.hint = code, message, hint


class Fitted(NamedTuple):
    """pixels: (H, W, 3) uint8, the model's input; width, height: upright, as sent; format: out of
    FORMATS."""

    pixels: np.ndarray
    width: int
    height: int
    format: str


def fit(body: bytes, preprocess: Preprocess, limits: Limits) -> Fitted:
    """One picture file as the model's input, the same that `Predictor.pixels` makes of it.

    Raises Unfit for a format that is not allowed, for too many pixels and for a damaged file.
    """
    kind = sniff(body[:512])
    if kind not in limits.formats:
        raise _not_supported(kind, limits.formats)
    if kind == "WebP":
        _check_webp(body, limits)
    try:
        header = read_header(body, max_pixels=sys.maxsize)
        _check_size(header.width, header.height, limits)
        image = decode(body, side=max(preprocess.store), max_pixels=limits.pixels)
    except UnreadableImage as error:
        raise _unreadable(error.reason) from error
    sideways = header.orientation >= 5
    stored = (header.height, header.width) if sideways else (header.width, header.height)
    pixels = preprocess.centre(preprocess.fit_image(image)[None])[0]
    return Fitted(np.ascontiguousarray(pixels), *stored, header.format)


def as_png(pixels: np.ndarray) -> bytes:
    """(H, W, 3) uint8 as the bytes of a PNG."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG", compress_level=1)
    return stream.getvalue()


def _check_size(width: int, height: int, limits: Limits) -> None:
    if width * height <= limits.pixels and max(width, height) <= limits.side:
        return
    raise Unfit(
        "too_many_pixels",
        f"the picture has {width}x{height} pixels",
        f"send one of at most {limits.pixels:,} pixels and {limits.side:,} on a side",
    )


def _not_supported(kind: str | None, formats: tuple[str, ...]) -> Unfit:
    what = "these bytes are no picture" if kind is None else f"this is {kind}"
    return Unfit("not_supported", what, f"send one of these formats: {', '.join(formats)}")


def _unreadable(reason: str) -> Unfit:
    if "memory" in reason:
        return _too_heavy("unreadable")
    return Unfit("unreadable", f"the picture cannot be read: {reason}", "open it, and save it anew")


def _too_heavy(code: str) -> Unfit:
    return Unfit(
        code,
        "the picture takes more memory to decode than one may",
        "send it with fewer pixels, or as a JPEG",
    )


def _check_webp(body: bytes, limits: Limits) -> None:
    """Its decoder makes the whole canvas four times over as it opens, and does not say what ailed
    it: so the sizes in its header are looked at before (RFC 9649, section 2.5 to 2.7)."""
    kind, head = body[12:16], body[20:30].ljust(10, b"\0")
    if kind == b"VP8X":
        width = 1 + int.from_bytes(head[4:7], "little")
        height = 1 + int.from_bytes(head[7:10], "little")
    elif kind == b"VP8L":
        bits = int.from_bytes(head[1:5], "little")
        width, height = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    else:
        width = int.from_bytes(head[6:8], "little") & 0x3FFF
        height = int.from_bytes(head[8:10], "little") & 0x3FFF
    _check_size(width, height, limits)
    if WEBP * width * height > limits.memory:
        raise _too_heavy("too_many_pixels")


def _reply(body: bytes, seen: bool, preprocess: Preprocess, limits: Limits) -> tuple[bytes, ...]:
    """The parts of the message that answers one picture."""
    began = time.perf_counter()
    digest = hashlib.sha256(body).digest()
    try:
        try:
            found = fit(body, preprocess, limits)
        except MemoryError as error:
            raise _unreadable("memory") from error
        first: Any = found.pixels.data.cast("B")
        second = as_png(found.pixels) if seen else b""
        said = (0, found.width, found.height, FORMATS.index(found.format))
    except Unfit as error:
        first, second = error.message.encode(), error.hint.encode()
        said = (OUTCOMES.index(error.code), 0, 0, 0)
    took = time.perf_counter() - began
    return REPLY.pack(*said, took, digest, len(first), len(second)), first, second


def limit_memory(extra: int) -> None:
    """Lets this process have `extra` bytes of address space more than it has now."""
    statm = "/proc/self/statm"
    if os.path.exists(statm):  # elsewhere there is no cheap way to know what is in use
        with open(statm) as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + extra, used + extra))


def serve(connection: socket.socket, preprocess: Preprocess, limits: Limits) -> None:
    """Answers pictures until the other end closes."""
    stream = connection.makefile("rb")
    connection.sendall(READY)
    while len(head := stream.read(REQUEST.size)) == REQUEST.size:
        length, seen = REQUEST.unpack(head)
        body = stream.read(length)
        signal.setitimer(signal.ITIMER_PROF, limits.seconds)
        parts = _reply(body, bool(seen), preprocess, limits)
        signal.setitimer(signal.ITIMER_PROF, 0)
        del body
        for part in parts:
            connection.sendall(part)
        del parts


def main() -> None:
    """`python -m crosspatch.deploy.server.decoder DESCRIPTOR JSON`: of a socket, and
    {"preprocess", "limits"}."""
    for one in (signal.SIGINT, signal.SIGTERM):  # the server decides when this ends
        signal.signal(one, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    given = json.loads(sys.argv[2])
    limits = Limits(**given["limits"] | {"formats": tuple(given["limits"]["formats"])})
    connection = socket.socket(fileno=int(sys.argv[1]))
    limit_memory(limits.memory)
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the server is gone
        serve(connection, Preprocess.from_dict(given["preprocess"]), limits)


if __name__ == "__main__":
    main()
