"""Requests to a server at times that are drawn beforehand, whatever the server does.

Arrivals are a Poisson process. A latency counts from the time at which a request was to be sent,
not from when it was: a server that stalls cannot slow down those who measure it. Connections are
kept alive and used again as browsers and proxies do; where none is free a new one is opened.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, NamedTuple

import numpy as np

PATIENCE = 15.0
"""Seconds after which a client gives up: longer than the server's own deadline."""
LOST = 0
"""The status of a request whose connection ended without an answer, or never did."""


class Sent(NamedTuple):
    """One request. picture: its place among the given ones; meant, sent, done: seconds of one
    clock; status: of HTTP, or LOST; body: what was answered."""

    picture: int
    meant: float
    sent: float
    done: float
    status: int
    body: bytes

    @property
    def latency(self) -> float:
        return self.done - self.meant


class Line(asyncio.Protocol):
    """A connection that carries one request at a time."""

    def __init__(self) -> None:
        self.got, self.open, self.keep = bytearray(), True, True
        self.waiting: asyncio.Future[tuple[int, bytes]] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport

    def data_received(self, data: bytes) -> None:
        self.got += data
        end = self.got.find(b"\r\n\r\n")
        if end < 0 or self.waiting is None:
            return
        head = bytes(self.got[:end]).lower()
        length = int(head.partition(b"content-length:")[2].split(b"\r\n", 1)[0])
        if len(self.got) < end + 4 + length:
            return
        self.keep = b"connection: close" not in head
        answer = int(head[9:12]), bytes(self.got[end + 4 : end + 4 + length])
        self.got.clear()
        self._tell(answer)

    def connection_lost(self, exc: Exception | None) -> None:
        self.open = False
        self._tell((LOST, b""))

    def _tell(self, answer: tuple[int, bytes]) -> None:
        waiting, self.waiting = self.waiting, None
        if waiting is not None and not waiting.done():
            waiting.set_result(answer)

    def ask(self, request: bytes) -> asyncio.Future[tuple[int, bytes]]:
        self.waiting = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        return self.waiting


class Client:
    """Sends requests to one port over as many connections as are needed at once."""

    def __init__(self, port: int, pictures: Sequence[bytes], target: str = "/predict") -> None:
        self.port, self.idle = port, list[Line]()
        self.sent: list[Sent] = []
        self.requests = [request(one, target) for one in pictures]

    async def send(self, picture: int, meant: float) -> Sent:
        """One request, which was to be sent at `meant`."""
        sent = time.perf_counter()
        try:
            async with asyncio.timeout(PATIENCE):
                status, body = await self._answer(picture)
        except (TimeoutError, OSError):
            status, body = LOST, b""
        one = Sent(picture, meant, sent, time.perf_counter(), status, body)
        self.sent.append(one)
        return one

    async def _answer(self, picture: int) -> tuple[int, bytes]:
        line = self._free()
        if line is None:
            loop = asyncio.get_running_loop()
            _, line = await loop.create_connection(Line, "127.0.0.1", self.port)
        answer = await line.ask(self.requests[picture])
        if line.keep and line.open:
            self.idle.append(line)
        else:
            line.transport.close()
        return answer

    def _free(self) -> Line | None:
        """A connection that is open and idle, or None."""
        while self.idle:
            line = self.idle.pop()
            if line.open:
                return line
        return None

    def close(self) -> None:
        for line in self.idle:
            line.transport.close()


def request(picture: bytes, target: str = "/predict") -> bytes:
    """The bytes of a request."""
    head = f"POST {target} HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/jpeg\r\n"
    return f"{head}Content-Length: {len(picture)}\r\n\r\n".encode() + picture


async def open_loop(client: Client, rate: float, seconds: float, seed: int = 0) -> list[Sent]:
    """`rate` requests a second on average, at times that do not depend on answers."""
    rng = np.random.default_rng(seed)
    gaps = rng.exponential(1 / rate, int(rate * seconds * 1.5) + 20)
    times = np.cumsum(gaps)
    times = times[times < seconds]
    chosen = rng.integers(0, len(client.requests), len(times)).tolist()
    start, tasks = time.perf_counter() + 0.05, []
    for at, picture in zip((times + start).tolist(), chosen, strict=True):
        pause = at - time.perf_counter()
        await asyncio.sleep(max(0.0, pause))  # also where it is late: answers must be read
        tasks.append(asyncio.create_task(client.send(picture, at)))
    return list(await asyncio.gather(*tasks))


async def closed_loop(client: Client, clients: int, seconds: float) -> list[Sent]:
    """`clients` who each send as soon as they have their answer; those refused wait 20 ms."""
    end, found = time.perf_counter() + seconds, []

    async def one(number: int) -> None:
        while (now := time.perf_counter()) < end:
            done = await client.send((number + len(found)) % len(client.requests), now)
            found.append(done)
            if done.status != 200:
                await asyncio.sleep(0.02)

    await asyncio.gather(*(one(number) for number in range(clients)))
    return found


def run(work: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    """Runs a coroutine on uvloop, which costs this side least."""
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work())


def rate_of(sent: Sequence[Sent], status: int = 200) -> float:
    """Answers of a status per second, from the first that was to be sent to the last that was."""
    chosen = [one for one in sent if one.status == status]
    span = max(one.meant for one in sent) - min(one.meant for one in sent)
    return len(chosen) / max(span, 1e-9)


def parsed(sent: Sequence[Sent]) -> list[dict[str, Any]]:
    """The bodies of answered requests."""
    return [json.loads(one.body) for one in sent if one.status == 200]


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """p50, p90 and p99 in milliseconds, of which there is at least one value."""
    values = np.percentile(np.asarray(seconds or [np.nan]) * 1e3, [50, 90, 99])
    return dict(zip(("p50_ms", "p90_ms", "p99_ms"), values.round(3).tolist(), strict=True))
