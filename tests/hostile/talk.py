"""A client that says anything: bytes onto a socket, at any pace, and what comes back.

It reads while it sends, as a client must that may be refused before it is done.
"""

from __future__ import annotations

import json
import select
import socket
import time
from collections.abc import Iterable
from typing import Any, NamedTuple

PATIENCE = 20.0
"""Seconds that a client waits for anything at all before it calls the server hung."""
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class Reply(NamedTuple):
    """What a server answered. status: 0 where the connection ended without an answer; headers:
    names in small letters; seconds: from the last byte sent to the last one received; closed: the
    server ended the connection; more: bytes behind the answer."""

    status: int
    headers: dict[str, str]
    body: bytes
    seconds: float
    closed: bool = False
    more: bytes = b""

    def json(self) -> Any:
        return json.loads(self.body)


def post(
    body: bytes,
    *headers: str,
    target: str = "/predict",
    kind: str | None = "image/jpeg",
    method: str = "POST",
    length: bool = True,
) -> bytes:
    """The bytes of an ordinary request."""
    lines = [f"{method} {target} HTTP/1.1", "Host: localhost"]
    lines += [f"Content-Type: {kind}"] if kind else []
    lines += [f"Content-Length: {len(body)}"] if length else []
    return "\r\n".join([*lines, *headers, "", ""]).encode("latin-1") + body


def talk(port: int, parts: bytes | Iterable[bytes | float], *, until_closed: float = 0.0) -> Reply:
    """Sends parts, reading meanwhile; a number among them is a pause in seconds. Returns the first
    answer. until_closed: how long to look for the end of the connection after it, in seconds.

    Raises TimeoutError when nothing comes for PATIENCE seconds after the last byte.
    """
    waiting = iter([parts] if isinstance(parts, bytes) else parts)
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as line:
        line.setblocking(False)
        got, ended, last = _exchange(line, waiting)
        seconds = time.monotonic() - last
        answer = _split(bytes(got), ended, seconds)
        end = time.monotonic() + until_closed
        more, closed = bytearray(answer.more), ended
        while not closed and time.monotonic() < end:
            closed = _receive(line, more, end - time.monotonic())
        return answer._replace(closed=closed, more=bytes(more))


def _exchange(line: socket.socket, parts: Iterable[bytes | float]) -> tuple[bytearray, bool, float]:
    """What came, whether the connection ended, and when the last byte was sent."""
    got, waiting = bytearray(), iter(parts)
    unsent, until, all_sent = memoryview(b""), 0.0, False
    last = time.monotonic()
    while not _whole(got):
        now = time.monotonic()
        if not unsent and now >= until and not all_sent:
            part = next(waiting, None)
            if part is None:
                all_sent = True
            elif isinstance(part, float):
                until = now + part
            else:
                unsent = memoryview(part)
        if all_sent and now > last + PATIENCE:
            raise TimeoutError(f"no answer for {PATIENCE:g} s; so far {bytes(got[:200])!r}")
        pause = max(0.0, until - now) if not all_sent else PATIENCE
        ready, free, _ = select.select([line], [line] if unsent else [], [], min(pause, 0.5))
        if free:
            try:
                unsent = unsent[line.send(unsent[: 1 << 18]) :]
                last = time.monotonic()
            except OSError:  # the server has ended the connection: what it said may be there still
                unsent, all_sent = memoryview(b""), True
        if ready and _receive(line, got, 0.0):
            return got, True, last
        if not ready and not free and unsent:
            select.select([line], [line], [], 0.5)
    return got, False, last


def _receive(line: socket.socket, into: bytearray, patience: float) -> bool:
    """Appends what has come; True at the end of the connection."""
    ready, _, _ = select.select([line], [], [], max(0.0, patience))
    if not ready:
        return False
    try:
        part = line.recv(1 << 16)
    except BlockingIOError:
        return False
    except OSError:
        return True
    into += part
    return not part


def _head(got: bytes | bytearray) -> tuple[int, dict[str, str], int] | None:
    """(status, headers, where the body starts), once all headers are there."""
    start = len(CONTINUE) if got.startswith(CONTINUE) else 0
    end = got.find(b"\r\n\r\n", start)
    if end < 0:
        return None
    first, *lines = bytes(got[start:end]).decode("latin-1").split("\r\n")
    pairs = (line.split(":", 1) for line in lines)
    return int(first.split()[1]), {name.lower(): value.strip() for name, value in pairs}, end + 4


def _whole(got: bytearray) -> bool:
    head = _head(got)
    if head is None:
        return False
    _, headers, start = head
    return "content-length" in headers and len(got) >= start + int(headers["content-length"])


def _split(got: bytes, ended: bool, seconds: float) -> Reply:
    head = _head(got)
    if head is None:
        return Reply(0, {}, got, seconds, ended)
    status, headers, start = head
    end = start + int(headers.get("content-length", len(got)))
    return Reply(status, headers, got[start:end], seconds, ended, got[end:])
