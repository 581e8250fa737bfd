"""What a hostile request is, and the bytes of ordinary ones."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from hostile.process import Server
from hostile.talk import Reply, post, talk
from support.hostile import picture, saved

GOOD = saved(picture("rings", 5), "PNG")
BYTES = 10_000_000
"""A body's limit."""
Parts = bytes | Iterable[bytes | float]
BOUNDARY = "x5kz"
MULTIPART = f"multipart/form-data; boundary={BOUNDARY}"


class Request(NamedTuple):
    """item: its number in the list of hostile inputs; parts: what is sent, with pauses; status: the
    right one, or two where the standard leaves it open, 0 for an end without an answer; why: which
    rule the status follows from; closes: the connection must end after it; slow: the server waits
    for the client, so the answer comes after its limit of time; silent: the answer must not hold
    these bytes."""

    item: int
    name: str
    parts: Callable[[], Parts]
    status: tuple[int, ...]
    why: str
    closes: bool = False
    silent: bytes = b""
    act: Callable[[Server], Reply] | None = None

    def __str__(self) -> str:
        return f"{self.item}-{self.name}".replace(" ", "-")

    def send(self, server: Server) -> Reply:
        if self.act is not None:
            return self.act(server)
        return talk(server.port, self.parts(), until_closed=3.0 if self.closes else 0.0)


def field(name: str, data: bytes, file: str | None = None, kind: str = "image/png") -> bytes:
    """One part of a form."""
    told = f'Content-Disposition: form-data; name="{name}"'
    told += f'; filename="{file}"\r\nContent-Type: {kind}' if file is not None else ""
    return f"--{BOUNDARY}\r\n{told}\r\n\r\n".encode() + data + b"\r\n"


def form(*fields: bytes, end: bytes = f"--{BOUNDARY}--\r\n".encode()) -> bytes:
    return post(b"".join(fields) + end, kind=MULTIPART)


def document(text: str | bytes | dict) -> bytes:
    """A request with a JSON body."""
    if isinstance(text, dict):
        text = json.dumps(text)
    return post(text if isinstance(text, bytes) else text.encode(), kind="application/json")


def head(*lines: str, method: str = "POST /predict HTTP/1.1") -> bytes:
    """A request's first lines, as they are given."""
    return "\r\n".join([method, "Host: localhost", *lines, "", ""]).encode("latin-1")


def lengthless(data: bytes, size: int) -> list[bytes]:
    """A chunked request of `data` in chunks of `size`; made whole before anybody connects, for a
    connection may not be silent for long."""
    parts = (data[at : at + size] for at in range(0, len(data), size))
    body = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"
    return [head("Content-Type: image/png", "Transfer-Encoding: chunked"), body]


def endless(total: int) -> Iterator[bytes]:
    """So many bytes of a picture that never ends, a part at a time."""
    yield GOOD
    part = bytes(1 << 18)
    for _ in range(total // len(part)):
        yield part


def slowly(first: bytes, rest: bytes, pause: float = 0.25) -> Iterator[bytes | float]:
    """`first` at once, then byte by byte."""
    yield first
    for byte in rest:
        yield pause
        yield bytes([byte])
