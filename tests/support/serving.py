"""A server in a thread, around a service that a test holds in its hands or a real one."""

from __future__ import annotations

import asyncio
import hashlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPResponse
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import uvloop
from PIL import Image

from crosspatch.deploy.bundle import Bundle, BundleInfo
from crosspatch.deploy.engines import Setting
from crosspatch.deploy.server.app import create_app
from crosspatch.deploy.server.lifecycle import Server, bind
from crosspatch.deploy.server.limits import Limits
from crosspatch.deploy.server.service import Answer, Ask, Refused
from support.bundles import info

PAGE = b"<!doctype html><style>p{}</style><script>let a</script>"


class _Engine(NamedTuple):
    setting: Setting = Setting("onnxruntime", "fp32", 1)


class _Pictures(NamedTuple):
    pixels: int = 1000
    side: int = 100
    formats: tuple[str, ...] = ("PNG",)


class Held:
    """A service without a model: answers with the sha256 of what it got, when a test lets it.

    bad: bodies that are refused as no picture; gate: an answer waits until it is set; asks: what
    was asked; gone: asks that were taken back; fault: what is raised instead of an answer.
    """

    def __init__(self) -> None:
        self.info: BundleInfo = info()
        self.bundle = Bundle(Path("/secret/place.onnx"), "onnx", self.info, "f" * 64, 1)
        self.engine, self.limits = _Engine(), _Pictures()
        self.threshold, self.wait, self.explains = 0.5, 2.5, False
        self.room, self.problem = True, None
        self.depth, self.limit, self.restarts = 0, 8, 0
        self.bad: set[bytes] = set()
        self.fault: Exception | None = None
        self.gate = threading.Event()
        self.gate.set()
        self.asks: list[Ask] = []
        self.gone = 0

    async def answer(self, ask: Ask) -> Answer:
        self.asks.append(ask)
        self.depth += 1
        try:
            while not self.gate.is_set():
                await asyncio.sleep(0.005)
        except asyncio.CancelledError:
            self.gone += 1
            raise
        finally:
            self.depth -= 1
        if self.fault is not None:
            raise self.fault
        if ask.body in self.bad:
            raise Refused("unreadable", "this is\nHTML \x1b[31m", "send a picture")
        shares = [("red", 0.75), ("green", 0.2), ("blue", 0.05)][: ask.top]
        digest = hashlib.sha256(ask.body).hexdigest()
        seen = b"png" if ask.seen else None
        return Answer(
            shares, None, 0.75, False, 0.5, 4, 3, "PNG", digest, 0.1, 0.2, 0.3, 1, seen, None
        )


class Running(NamedTuple):
    """A server that listens. front: its application."""

    port: int
    front: Any
    service: Any
    server: Any

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=10)

    def say(self, data: bytes, answers: int = 1) -> list[Reply]:
        """Sends and reads answers until there are `answers`, or the connection ends."""
        with self.connect() as line:
            line.sendall(data)
            return list(replies(line, answers))


class Reply(NamedTuple):
    """One answer as it came."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str:
        """Of an error; checks its shape."""
        assert self.headers["content-type"] == "application/json"
        (kind,) = self.json
        assert kind == "error"
        assert set(self.json["error"]) == {"code", "message", "hint", "request_id"}
        return self.json["error"]["code"]


def replies(line: socket.socket, most: int) -> Iterator[Reply]:
    """Answers to POST or GET on a connection, until it ends."""
    file = line.makefile("rb")
    for _ in range(most):
        if not file.peek(1):
            return
        response = HTTPResponse(_Given(file))  # type: ignore[arg-type]
        response.begin()
        body = response.read(int(response.headers["content-length"]))
        yield Reply(response.status, {k.lower(): v for k, v in response.headers.items()}, body)


class _Given:
    """What HTTPResponse takes for a socket; it may not read ahead into the next answer."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def makefile(self, mode: str) -> Any:
        return _Open(self.file)


class _Open:
    def __init__(self, file: Any) -> None:
        self.readline, self.read, self.readinto = file.readline, file.read, file.readinto
        self.closed = False

    def flush(self) -> None: ...

    def close(self) -> None: ...


def ended(line: socket.socket) -> bool:
    """Whether the other side closes the connection, sending nothing more."""
    try:
        return line.recv(1) == b""
    except ConnectionResetError:
        return True


def post(
    body: bytes, *lines: str, path: str = "/predict", length: bool = True, version: str = "1.1"
) -> bytes:
    """A whole request."""
    head = [f"POST {path} HTTP/{version}", "Host: localhost", *lines]
    if length:
        head.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*head, "", ""]).encode("latin-1") + body


def get(path: str, *lines: str, method: str = "GET") -> bytes:
    """A whole request without a body."""
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: localhost", *lines, "", ""]).encode()


def picture(colour: tuple[int, int, int] = (200, 30, 10), kind: str = "PNG") -> bytes:
    """A small picture file."""
    stream = BytesIO()
    Image.new("RGB", (40, 30), colour).save(stream, kind)
    return stream.getvalue()


@contextmanager
def running(service: Any, **options: Any) -> Iterator[Running]:
    """A server around `service`, which is started if it can be; options of `create_app`, and the
    page."""
    page = options.pop("page", PAGE)
    listener, ready = bind("127.0.0.1", 0), threading.Event()
    found: dict[str, Any] = {}

    async def whole() -> None:
        found["loop"] = asyncio.get_running_loop()
        if hasattr(service, "start"):
            await service.start()
        front = create_app(service, page, **options)
        found["server"], found["front"] = Server(front, ready.set), front
        await found["server"].serve([listener])
        if hasattr(service, "stop"):
            await service.stop(0.0)

    def work() -> None:
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(whole())
        except BaseException as error:
            found["error"] = error
            ready.set()

    thread = threading.Thread(target=work)
    thread.start()
    port = listener.getsockname()[1]
    try:
        assert ready.wait(60)
        if "error" in found:
            raise found["error"]
        yield Running(port, found["front"], service, found["server"])
    finally:
        if "server" in found:
            found["loop"].call_soon_threadsafe(found["server"]._exit)
        thread.join(40)
        listener.close()
    assert "error" not in found, found["error"]


def until(what: Any, seconds: float = 5.0) -> None:
    """Waits until `what()` is true."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.005)


QUICK = Limits(head_seconds=0.4, body_seconds=0.4, linger=0.5)
"""Limits that a test can wait for."""
