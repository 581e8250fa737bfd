# SPDX-License-Identifier: Apache-2.0
"""The decoding processes as the server sees them: given pictures, watched, and replaced.

Each has one picture at a time. One that dies, or that answers nothing for too long and is killed,
costs its own picture an error and is replaced at once; a thread that waits for its end notices it
when it is idle, too. All of this runs on the event loop of the server; nothing polls.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

import crosspatch
from crosspatch.data.decode import FORMATS
from crosspatch.data.preprocess import Preprocess
from crosspatch.deploy.server import refusals
from crosspatch.deploy.server.decoder import OUTCOMES, READY, REPLY, REQUEST, Limits
from crosspatch.deploy.server.refusals import Refused
from crosspatch.errors import DataError

PATIENCE = 1.15
"""Seconds by the clock that a picture may take, for each second of processor time that it may: on a
busy machine, too, every request is answered within 2 s."""
STARTING = 20.0  # seconds that a process may take to start on a machine that is busy
PAUSE = 0.5  # seconds before the next try, where a process ended before it was ready
DEATHS, MINUTE = 3, 60.0
JOINED = 1 << 16  # bytes; a picture up to this size is sent together with its header
BUFFER = 1 << 20  # bytes of a socket
MODULE = "crosspatch.deploy.server.decoder"


class Decoded(NamedTuple):
    """pixels: (H, W, 3) uint8, the model's input; width, height: upright, as sent; format: of the
    file; picture: sha256 of its bytes, hex; seconds: of decoding; seen: the input as PNG."""

    pixels: np.ndarray
    width: int
    height: int
    format: str
    picture: str
    seconds: float
    seen: bytes | None


class Job(Protocol):
    """A picture to decode. wanted: False once nobody waits for it any more."""

    body: bytes
    seen: bool

    @property
    def wanted(self) -> bool: ...

    def taken(self) -> None:
        """A process begins with it."""

    def decoded(self, found: Decoded) -> None:
        """It is decoded."""

    def refused(self, why: Refused) -> None:
        """It is not, and never will be."""


class Gone(Exception):
    """A decoding process ended. status: as `subprocess` says, negative for a signal."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class Worker:
    """One decoding process and the socket to it."""

    def __init__(self, preprocess: Preprocess, limits: Limits) -> None:
        """Starts the process; `ready` waits for it."""
        loop = asyncio.get_running_loop()
        self._size, self._limits = preprocess.size, limits
        self._socket, theirs = socket.socketpair()
        told = {"preprocess": preprocess.to_dict(), "limits": dataclasses.asdict(limits)}
        with theirs:
            for one in (self._socket, theirs):
                one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", MODULE, str(theirs.fileno()), json.dumps(told)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=_environment(),
            )
        self._socket.setblocking(False)
        self.pid = self._process.pid
        self.gone: asyncio.Future[int] = loop.create_future()
        threading.Thread(
            target=self._wait, args=(loop,), name=f"decoder-{self.pid}", daemon=True
        ).start()

    def _wait(self, loop: asyncio.AbstractEventLoop) -> None:
        status = self._process.wait()

        def tell() -> None:
            if not self.gone.done():
                self.gone.set_result(status)

        try:
            loop.call_soon_threadsafe(tell)
        except RuntimeError:  # the loop is closed: nobody asks any more
            return

    async def end(self) -> int:
        """Waits for its end; gives the status, negative for a signal."""
        return await asyncio.shield(self.gone)  # who waits may be cancelled, the future may not

    async def ready(self) -> None:
        """Waits until it takes pictures. Raises Gone, TimeoutError."""
        async with asyncio.timeout(STARTING):
            await self._read(bytearray(len(READY)))

    async def decode(self, body: bytes, seen: bool) -> Decoded | Refused:
        """One picture. Raises Gone when the process ends meanwhile, TimeoutError when it takes too
        long by the clock; after either the worker is of no use."""
        async with asyncio.timeout(PATIENCE * self._limits.seconds):
            await self._write(REQUEST.pack(len(body), seen), body)
            head = await self._read(bytearray(REPLY.size))
            place, width, height, kind, seconds, digest, first, second = REPLY.unpack(head)
            if OUTCOMES[place]:
                message, hint = [
                    bytes(await self._read(bytearray(length))).decode()
                    for length in (first, second)
                ]
                return Refused(OUTCOMES[place], message, hint)
            pixels = np.empty((*self._size, 3), np.uint8)
            if first != pixels.nbytes:
                raise Gone(0)
            await self._read(pixels.data.cast("B"))
            png = bytes(await self._read(bytearray(second))) if second else None
        return Decoded(pixels, width, height, FORMATS[kind], digest.hex(), seconds, png)

    async def _write(self, head: bytes, body: bytes) -> None:
        loop = asyncio.get_running_loop()
        parts = [head + body] if len(body) <= JOINED else [head, body]
        try:
            for part in parts:
                await loop.sock_sendall(self._socket, part)
        except OSError:
            raise Gone(await self.end()) from None

    async def _read(self, into: Any) -> Any:
        """Fills `into` from the socket and gives it back. Raises Gone at its end."""
        loop, rest = asyncio.get_running_loop(), memoryview(into)
        try:
            while rest:
                count = await loop.sock_recv_into(self._socket, rest)
                if not count:
                    raise ConnectionResetError
                rest = rest[count:]
        except OSError:
            raise Gone(await self.end()) from None
        return into

    def close(self) -> None:
        """Tells the process to end once it is done with its picture."""
        self._socket.close()

    def kill(self) -> None:
        """Ends the process at once."""
        self._socket.close()
        self._process.kill()  # does nothing to one that has been waited for


class Workers:
    """A number of decoding processes, and the pictures that wait for them.

    restarts: processes that were replaced; failing: True after DEATHS within a MINUTE that the
    server had no part in.
    """

    def __init__(self, count: int, preprocess: Preprocess, limits: Limits) -> None:
        self.count, self._preprocess, self._limits = count, preprocess, limits
        self.restarts = 0
        self._waiting: deque[Job] = deque()
        self._idle: list[asyncio.Future[None]] = []
        self._deaths: deque[float] = deque(maxlen=DEATHS)
        self._alive: set[Worker] = set()
        self._tasks: list[asyncio.Task[None]] = []
        self._closing = False

    @property
    def pids(self) -> list[int]:
        """The processes that live now."""
        return sorted(worker.pid for worker in self._alive)

    @property
    def failing(self) -> bool:
        """Whether processes die all the time."""
        return len(self._deaths) == DEATHS and time.monotonic() - self._deaths[0] < MINUTE

    async def start(self) -> None:
        """Starts every process. Raises DataError when one cannot be had."""
        first = [Worker(self._preprocess, self._limits) for _ in range(self.count)]
        self._alive.update(first)
        try:
            await asyncio.gather(*(worker.ready() for worker in first))
        except (Gone, TimeoutError) as error:
            await self.stop()
            raise DataError(
                "a process that decodes pictures did not start",
                "Each needs about 60 MB and one more process",
                "Free memory, or ask for fewer with --workers 1",
            ) from error
        self._tasks = [asyncio.create_task(self._tend(worker)) for worker in first]

    def put(self, job: Job) -> None:
        """Queues a picture."""
        self._waiting.append(job)
        self._wake()

    def _wake(self) -> None:
        while self._idle:
            free = self._idle.pop()  # the last one that became idle has the warmest caches
            if not free.done():
                free.set_result(None)
                return

    async def stop(self, grace: float = 1.0) -> None:
        """Ends all processes: those that decode after `grace` seconds at the latest."""
        self._closing = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        alive = list(self._alive)
        for worker in alive:
            worker.close()
        if alive:
            await asyncio.wait([worker.gone for worker in alive], timeout=grace)
        for worker in alive:
            if not worker.gone.done():
                worker.kill()
        for worker in alive:
            await worker.end()
        self._alive.clear()

    async def _tend(self, worker: Worker) -> None:
        """Keeps one place filled with a living process, for good."""
        while True:
            await self._feed(worker)
            self._alive.discard(worker)
            self.restarts += 1
            worker = await self._replacement()

    async def _replacement(self) -> Worker:
        while True:
            worker = Worker(self._preprocess, self._limits)
            self._alive.add(worker)
            try:
                await worker.ready()
            except (Gone, TimeoutError):
                worker.kill()
                await worker.end()
                self._alive.discard(worker)
                self._deaths.append(time.monotonic())
                await asyncio.sleep(PAUSE)
            else:
                return worker

    async def _feed(self, worker: Worker) -> None:
        """Gives pictures to a process until it ends."""
        while (job := await self._next(worker)) is not None:
            job.taken()
            try:
                found = await worker.decode(job.body, job.seen)
            except Gone as gone:
                self._buried(gone.status)
                slow = gone.status == -signal.SIGPROF
                job.refused(refusals.too_slow() if slow else refusals.decoder_died())
                worker.kill()
                await worker.end()
                return
            except TimeoutError:
                job.refused(refusals.too_slow())
                worker.kill()
                await worker.end()
                return
            if isinstance(found, Refused):
                job.refused(found)
            else:
                job.decoded(found)
        self._buried(worker.gone.result())
        worker.close()

    async def _next(self, worker: Worker) -> Job | None:
        """The next picture that somebody waits for, None when the process has ended meanwhile."""
        while not worker.gone.done():
            while self._waiting:
                job = self._waiting.popleft()
                if job.wanted:
                    return job
            free: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._idle.append(free)
            wake = partial(_settle, free)
            worker.gone.add_done_callback(wake)
            try:
                await free
            finally:
                worker.gone.remove_done_callback(wake)
        if self._waiting:  # it may have been told of one as it died
            self._wake()
        return None

    def _buried(self, status: int) -> None:
        """Notes the end of a process, unless it was a picture's that took too long."""
        if status != -signal.SIGPROF:
            self._deaths.append(time.monotonic())


def _environment() -> dict[str, str]:
    """That of a decoding process: it finds this package, computes in one thread, and gives memory
    back as soon as it is free."""
    home = str(Path(crosspatch.__file__).parent.parent)
    paths = [home, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_THRESHOLD_": str(1 << 20),
        "MALLOC_TRIM_THRESHOLD_": str(1 << 20),
    }


def _settle(free: asyncio.Future[None], _: object) -> None:
    if not free.done():
        free.set_result(None)
