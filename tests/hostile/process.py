"""A real `crosspatch serve` in a process of its own, and what the system says of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from hostile.talk import Reply, post, talk
from support.command import with_tests

MEGABYTE = 1 << 20
STARTING = 60.0  # seconds, on a machine that does other things, too


class Server:
    """A server as a user starts it. port: where it listens; log: the file it writes its lines to.

    program: what Python runs; taskset: the processors it may use, as `taskset` takes them. Raises
    RuntimeError with what it printed when it does not become ready.
    """

    def __init__(
        self,
        bundle: Path,
        log: Path,
        *options: str,
        program: Sequence[str] = ("-m", "crosspatch"),
        taskset: str = "",
    ) -> None:
        words = [sys.executable, *program, "serve", str(bundle), "--port", "0", "--json", *options]
        words = [*(["taskset", "-c", taskset] if taskset else []), *words]
        self.log, self.idle = log, 0  # idle: bytes at rest, once somebody has measured it
        with log.open("wb") as stream:
            self.process = subprocess.Popen(
                words, stdout=subprocess.PIPE, stderr=stream, env=with_tests()
            )
        self.port = self._started()

    def _started(self) -> int:
        assert self.process.stdout is not None
        timer = threading.Timer(STARTING, self.process.kill)
        timer.start()
        said = b""
        while not said.rstrip().endswith(b"}") and (line := self.process.stdout.readline()):
            said += line
        timer.cancel()
        if not said:
            self.process.wait()
            raise RuntimeError(f"the server did not start: {self.log.read_text()[-2000:]}")
        self.ready = json.loads(said)
        return int(self.ready["address"].rstrip("/").rpartition(":")[2])

    def ask(self, body: bytes, *headers: str, **how) -> Reply:
        """One picture, sent as it should be."""
        return talk(self.port, post(body, *headers, **how))

    def get(self, target: str) -> Reply:
        return talk(self.port, post(b"", target=target, method="GET", kind=None, length=False))

    def processes(self) -> list[int]:
        """The server and all that it has started, by number."""
        found, waiting = [], [self.process.pid]
        while waiting:
            one = waiting.pop()
            found.append(one)
            waiting += _children(one)
        return found

    def memory(self, field: str = "VmRSS") -> int:
        """Bytes that all processes hold (VmRSS), or have held at their peaks (VmHWM). Pages that
        they share count once in each, so it is never too little."""
        return sum(_status(one, field) for one in self.processes())

    def files(self) -> int:
        """How many files and sockets all processes have open."""
        return sum(len(_listed(f"/proc/{one}/fd")) for one in self.processes())

    def stop(self, patience: float = 40.0) -> int:
        """Ends the server as a service manager does; returns its exit code."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(patience)
        finally:
            self.process.kill()
            self.process.wait()
            if self.process.stdout is not None:
                self.process.stdout.close()

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: object, trace: TracebackType | None
    ) -> None:
        self.stop()


class Peak:
    """The most memory that a server had at once while a block ran: the sum of its processes' high
    water marks, set back at the start. It is read every 20 ms as well, for a worker that is ended
    takes its mark with it."""

    def __init__(self, server: Server):
        self.server, self.bytes, self._over = server, 0, threading.Event()

    def __enter__(self) -> Peak:
        for one in self.server.processes():
            try:
                Path(f"/proc/{one}/clear_refs").write_text("5")
            except OSError:  # it has just ended
                continue
        self._watch = threading.Thread(target=self._look, daemon=True)
        self._watch.start()
        return self

    def _look(self) -> None:
        while not self._over.wait(0.02):
            self.bytes = max(self.bytes, self.server.memory("VmHWM"))

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._watch.join()
        self.bytes = max(self.bytes, self.server.memory("VmHWM"))


def settled(server: Server, patience: float = 5.0) -> bool:
    """Waits until nothing is queued and the server calls itself ready."""
    end = time.monotonic() + patience
    while time.monotonic() < end:
        if server.get("/readyz").status == 200:
            return True
        time.sleep(0.05)
    return False


def _children(one: int) -> Sequence[int]:
    found: list[int] = []
    for task in _listed(f"/proc/{one}/task"):
        try:
            found += map(int, Path(f"/proc/{one}/task/{task}/children").read_text().split())
        except OSError:
            continue
    return found


def _listed(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


def _status(one: int, field: str) -> int:
    """A field of /proc/PID/status in bytes; 0 of a process that has ended."""
    try:
        lines = Path(f"/proc/{one}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(field)), 0)
