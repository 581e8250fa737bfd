"""What HTTP alone costs: the server's front around a service that answers without a model.

    PYTHONPATH=tests python benchmarks/front.py [--count 3000] [--turns 5] [--csv FILE]

direct: processor time of one request through the application, without a socket. socket: what a
client on a kept connection waits, uvicorn and the network of this computer included; the client is
a thread of the same process, so both sides take turns and the figure is an upper one. refused: by
the head, as in overload, on a new connection each time where there is a socket.
"""

from __future__ import annotations

import argparse
import asyncio
import socket
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from crosspatch.deploy.server.app import create_app
from hardware import append, facts
from support.serving import PAGE, Held, Running, get, post, replies, running

BODY = b"x" * 5000
HEADERS = [(b"host", b"localhost"), (b"content-length", b"5000"), (b"content-type", b"image/png")]


async def direct(front: Any, count: int) -> float:
    """Processor seconds of a request."""

    async def send(message: Any) -> None: ...

    async def receive() -> Any:
        if given:
            return given.pop()
        return await asyncio.Event().wait()  # the client stays

    scope = {"type": "http", "method": "POST", "path": "/predict", "query_string": b"",
             "http_version": "1.1", "headers": HEADERS}  # fmt: skip
    began = time.process_time()
    for _ in range(count):
        given = [{"type": "http.request", "body": BODY, "more_body": False}]
        await front(dict(scope), receive, send)
    return (time.process_time() - began) / count


def kept(one: Running, request: bytes, count: int) -> float:
    """Seconds that a client waits, the median, on one connection."""
    took = []
    with one.connect() as line:
        line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(count):
            began = time.perf_counter()
            line.sendall(request)
            line.recv(65536)
            took.append(time.perf_counter() - began)
    return statistics.median(took)


def anew(one: Running, request: bytes, count: int) -> float:
    """As `kept`, on a connection of its own each time; checks that it is a refusal."""
    took = []
    for _ in range(count):
        began = time.perf_counter()
        with one.connect() as line:
            line.sendall(request)
            reply = next(replies(line, 1))
        took.append(time.perf_counter() - began)
        assert reply.status == 503
    return statistics.median(took)


def measured(count: int) -> dict[str, float]:
    """Microseconds of every kind of request, once."""
    service = Held()
    front = create_app(service, PAGE)  # type: ignore[arg-type]
    found = {"direct answered": asyncio.run(direct(front, count))}
    service.room = False
    found["direct refused"] = asyncio.run(direct(front, count))
    with running(Held()) as one:
        picture = post(BODY, "Content-Type: image/png")
        found["socket answered"] = kept(one, picture, count)
        found["socket livez"] = kept(one, get("/livez"), count)
        one.service.room = False
        found["socket refused"] = anew(one, picture, count // 3)
    return {name: 1e6 * seconds for name, seconds in found.items()}


def main(print_: Callable[..., None] = print) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--count", type=int, default=3000)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--csv", type=Path)
    asked = parser.parse_args()
    turns = [measured(asked.count) for _ in range(asked.turns)]
    rows = []
    for name in turns[0]:
        found = sorted(turn[name] for turn in turns)
        rows.append(
            {"what": name, "median_us": round(statistics.median(found)), "low_us": round(found[0]),
             "high_us": round(found[-1]), **facts("uvicorn", "fastapi", "uvloop", "httptools")}
        )  # fmt: skip
        print_(f"{name:18}{rows[-1]['median_us']:>6} us ({found[0]:.0f} to {found[-1]:.0f})")
    if asked.csv:
        append(asked.csv, rows)


if __name__ == "__main__":
    main()
