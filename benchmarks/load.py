"""Requests to a server at times that are drawn beforehand, whatever the server does.

Arrivals are a Poisson process. A latency counts from the time at which a request was to be sent,
not from when it was: a server that stalls cannot slow down those who measure it. Connections are
kept alive and used again as browsers and proxies do; where none is free a new one is opened.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
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
    clock; status: of HTTP, or LOST; body: what was
    answered, or why nothing was."""

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
        self.got, self.open, self.keep, self.fresh = bytearray(), True, True, True
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
        how = "was reset" if exc else "ended"
        self._tell((LOST, f"{'a new' if self.fresh else 'a used'} connection {how}".encode()))

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
        except (TimeoutError, OSError) as problem:
            status, body = LOST, repr(problem).encode()
        one = Sent(picture, meant, sent, time.perf_counter(), status, body)
        self.sent.append(one)
        return one

    async def _answer(self, picture: int) -> tuple[int, bytes]:
        line = self._free()
        if line is None:
            loop = asyncio.get_running_loop()
            _, line = await loop.create_connection(Line, "127.0.0.1", self.port)
        answer = await line.ask(self.requests[picture])
        line.fresh = False
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


class Plan(NamedTuple):
    """What one process sends. start: seconds of the clock that all processes share; rate: requests
    a second on average; seconds: for how long; core: the processor it may use."""

    port: int
    pictures: list[bytes]
    target: str
    start: float
    rate: float
    seconds: float
    seed: int
    core: int


async def open_loop(client: Client, plan: Plan) -> list[Sent]:
    """Requests at times that do not depend on answers."""
    rng = np.random.default_rng(plan.seed)
    gaps = rng.exponential(1 / plan.rate, int(plan.rate * plan.seconds * 1.5) + 20)
    times = np.cumsum(gaps)
    times = times[times < plan.seconds]
    chosen = rng.integers(0, len(client.requests), len(times)).tolist()
    tasks = []
    for at, picture in zip((times + plan.start).tolist(), chosen, strict=True):
        pause = at - time.perf_counter()
        await asyncio.sleep(max(0.0, pause))  # also where it is late: answers must be read
        tasks.append(asyncio.create_task(client.send(picture, at)))
    return list(await asyncio.gather(*tasks))


def carried_out(plan: Plan) -> list[Sent]:
    """A plan, in a process of its own."""
    os.sched_setaffinity(0, [plan.core])
    client = Client(plan.port, plan.pictures, plan.target)
    gc.collect()
    gc.freeze()
    gc.disable()
    sent = run(lambda: open_loop(client, plan))
    client.close()
    gc.enable()
    return sent


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


def goodput(sent: Sequence[Sent], start: float, seconds: float) -> float:
    """Good answers a second that had come by the end: later ones do not count."""
    return sum(one.status == 200 and one.done <= start + seconds for one in sent) / seconds


def parsed(sent: Sequence[Sent]) -> list[dict[str, Any]]:
    """The bodies of answered requests."""
    return [json.loads(one.body) for one in sent if one.status == 200]


def spread(seconds: Sequence[float]) -> dict[str, float | None]:
    """p50, p90 and p99 in milliseconds; None where there is no value."""
    names = ("p50_ms", "p90_ms", "p99_ms")
    if not len(seconds):
        return dict.fromkeys(names)
    values = np.percentile(np.asarray(seconds) * 1e3, [50, 90, 99])
    return dict(zip(names, values.round(3).tolist(), strict=True))
