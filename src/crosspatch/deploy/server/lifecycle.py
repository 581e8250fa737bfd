# SPDX-License-Identifier: Apache-2.0
"""From a bundle's path to a server that listens, and to its end.

On the first SIGTERM or Ctrl-C /readyz says no at once, so that whoever sends requests goes
elsewhere; a second later nothing more is accepted, what is under way is finished within GRACE
seconds, and the exit code is 0. A second signal ends at once, with 1.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn

from crosspatch.deploy.server.app import create_app
from crosspatch.deploy.server.front import Front, now
from crosspatch.deploy.server.heads import is_local
from crosspatch.deploy.server.limits import Limits
from crosspatch.deploy.server.logs import Log
from crosspatch.deploy.server.metrics import Metrics
from crosspatch.deploy.server.protocol import Protocol
from crosspatch.deploy.server.service import Service
from crosspatch.errors import UsageError

NOTICE = 1.0
"""Seconds between /readyz saying no and the end of accepting."""
GRACE = 30
"""Seconds for what is under way."""
SIGNALS = (signal.SIGTERM, signal.SIGINT)
WAITING = 2048  # connections that wait to be accepted
FILES = 4096  # open files that a server asks the system for: a connection takes one
Told = Callable[[str], None]


def bind(host: str, port: int) -> socket.socket:
    """A socket that has the address and does not listen yet. port: 0 for any that is free.

    Raises UsageError where the address cannot be had.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = min(found, key=lambda one: one[0] != socket.AF_INET)
        made = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise UsageError(
            f"--host {host} is no address of this computer ({getattr(error, 'strerror', error)})",
            "a name or an address of this computer",
            "leave --host out, or --host 0.0.0.0 for every address",
        ) from error
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
    except OSError as error:
        made.close()
        raise _no_address(host, port, error) from error
    return made


def _listen(listener: socket.socket) -> None:
    """Raises UsageError where another one has begun to listen meanwhile: uvloop would not say."""
    try:
        listener.listen(WAITING)
    except OSError as error:
        raise _no_address(*listener.getsockname()[:2], error) from error


def _no_address(host: str, port: int, error: OSError) -> UsageError:
    if error.errno == errno.EADDRINUSE:
        return UsageError(
            f"port {port} of {host} is taken",
            "a port that nobody listens on",
            f"--port {port + 1 if port < 65535 else 8001}, or --port 0 for any that is free",
        )
    if error.errno in (errno.EACCES, errno.EPERM):
        return UsageError(
            f"port {port} may not be used by you", "a port from 1024 on", "--port 8000"
        )
    return UsageError(
        f"--host {host} --port {port} cannot be had ({error.strerror})",
        "an address of this computer and a free port",
        "leave --host and --port out",
    )


def address_of(listener: socket.socket) -> str:
    """`http://127.0.0.1:8000`; of every address at once that of this computer."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """uvicorn around a front, with our signals and end. ready: called once it listens."""

    def __init__(self, front: Front, ready: Callable[[], None] = lambda: None) -> None:
        super().__init__(
            uvicorn.Config(
                front, http=Protocol, ws="none", lifespan="off", log_config=None,
                access_log=False, server_header=False, proxy_headers=False,
                timeout_keep_alive=front.limits.idle, timeout_graceful_shutdown=GRACE,
            )
        )  # fmt: skip
        self.front, self.ready = front, ready

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are not uvicorn's here."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listens, then says so."""
        await super().startup(sockets)
        self.ready()

    def end(self) -> None:
        """Not ready from now on; the end comes a moment later."""
        self.front.draining = True
        asyncio.get_running_loop().call_later(NOTICE, self._exit)

    def _exit(self) -> None:
        self.should_exit = True


def run(
    make: Callable[[Callable[[str, float], None]], Service],
    listener: socket.socket,
    page: bytes,
    *,
    token: str | None = None,
    batch_api: bool = False,
    local: bool = True,
    limits: Limits | None = None,
    log: Log | None = None,
    ready: Callable[[Service], None] = lambda service: None,
    told: Told = lambda text: None,
) -> int:
    """Serve until a signal comes; the exit code. make: the service, given what it tells its times;
    ready: called once requests are answered; told: sentences on what happens. The rest as in
    `create_app`. Raises UsageError and DataError as `Service.start` does."""
    import uvloop

    for name in ("uvicorn", "uvicorn.error"):  # what matters stands in the log of requests
        logging.getLogger(name).propagate = False
        logging.getLogger(name).addHandler(logging.NullHandler())
    _more_files()
    log, metrics = log or Log(None), Metrics()
    life = _Life(told, log)

    async def whole() -> int:
        life.begin()
        service = make(metrics.observe)
        try:
            await service.start()
            front = create_app(
                service, page, token=token, batch_api=batch_api, local=local, limits=limits,
                metrics=metrics, log=log,
            )  # fmt: skip
            life.server = Server(front, lambda: ready(service))
            _listen(listener)
            await life.server.serve([listener])
        except asyncio.CancelledError:
            if life.signal is None:
                raise
        finally:
            await service.stop(0.0)
        return 0

    with life, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        try:
            return runner.run(whole())
        finally:
            log.close()
            listener.close()


class _Life:
    """What signals do. Used as a context, they are as before at its end."""

    def __init__(self, told: Told, log: Log) -> None:
        self.told, self.log = told, log
        self.server: Server | None = None
        self.signal: int | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[Any] | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Life:
        if threading.current_thread() is threading.main_thread():
            self._before = {one: signal.signal(one, self._came) for one in SIGNALS}
        return self

    def __exit__(self, *failure: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def begin(self) -> None:
        """The loop runs."""
        self._loop, self._task = asyncio.get_running_loop(), asyncio.current_task()
        self._loop.set_exception_handler(self._fault)
        if self.signal is not None:
            self._end()

    def _came(self, number: int, frame: object) -> None:
        if self.signal is not None:
            self.told("stopped at once, whatever was under way")
            self.log.close(0.5)
            os._exit(1)  # decoding processes end with the pipes to them
        self.signal = number
        name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
        self.told(f"{name}: finishing what is under way; once more stops at once")
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._end)

    def _end(self) -> None:
        if self.server is not None and self.server.started:
            self.server.end()
        elif self._task is not None:
            self._task.cancel()

    def _fault(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        self.log(time=now(), code="fault", fault=f"{context.get('message')}: {error!r}"[:1000])


def loopback(listener: socket.socket) -> bool:
    """Whether a socket can be reached from this computer alone."""
    return is_local(listener.getsockname()[0])


def _more_files() -> None:
    """Ask for as many open files as there may be connections, where the system lets us."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
