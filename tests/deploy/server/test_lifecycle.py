"""Addresses that cannot be had, and the end of a server: what is under way is finished."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from crosspatch.deploy.server import lifecycle
from crosspatch.deploy.server.lifecycle import address_of, bind, loopback
from crosspatch.errors import UsageError
from support.command import with_tests
from support.serving import Reply, ended, get, post, replies, until

SCRIPT = """
import sys, threading
from support.serving import Held, PAGE
from crosspatch.deploy.server import lifecycle

held = Held()
held.start = held.stop = None

async def start(): pass
async def stop(grace): pass

def make(observe):
    held.start, held.stop = start, stop
    return held

def let():
    for line in sys.stdin:
        if line == "go\\n":
            held.gate.set()
        else:
            held.gate.clear()
            print("waits", flush=True)

threading.Thread(target=let, daemon=True).start()
listener = lifecycle.bind("127.0.0.1", 0)
told = lambda *words: print(*words, flush=True)
lifecycle.GRACE = int(sys.argv[1])
sys.exit(lifecycle.run(make, listener, PAGE, ready=lambda s: told(lifecycle.address_of(listener)),
                       told=told))
"""


class Process:
    """A server in a process of its own, whose answers wait for the word."""

    def __init__(self, grace: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", SCRIPT, str(grace)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=with_tests(),
        )  # fmt: skip
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().strip()
        self.port = int(self.address.rpartition(":")[2])

    def gate(self, word: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{word}\n")
        self.process.stdin.flush()
        assert self.process.stdout is not None
        if word == "wait":
            assert self.process.stdout.readline() == "waits\n"

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=10)

    def say(self, data: bytes) -> Reply:
        with self.connect() as line:
            line.sendall(data)
            return next(replies(line, 1))

    def closed(self) -> bool:
        try:
            self.connect().close()
        except ConnectionRefusedError:
            return True
        return False


@pytest.fixture
def process(request: pytest.FixtureRequest) -> Iterator[Process]:
    made = Process(getattr(request, "param", 30))
    try:
        yield made
    finally:
        made.process.kill()
        made.process.communicate()


@pytest.mark.parametrize(
    ("number", "name"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "Ctrl-C")]
)
def test_what_is_under_way_is_finished(process: Process, number: int, name: str) -> None:
    assert process.say(get("/readyz")).status == 200
    process.gate("wait")
    with process.connect() as line, process.connect() as idle:
        line.sendall(post(b"slow"))
        until(lambda: b"crosspatch_queue_depth 1.0" in process.say(get("/metrics")).body)
        os.kill(process.process.pid, number)
        begun = time.monotonic()
        until(lambda: process.say(get("/readyz")).status == 503)
        assert time.monotonic() - begun < lifecycle.NOTICE  # while it still accepts
        until(process.closed, 10)
        assert time.monotonic() - begun >= 0.9 * lifecycle.NOTICE
        idle.settimeout(5)
        assert ended(idle)
        process.gate("go")
        reply = next(replies(line, 1))
        assert reply.status == 200
        assert reply.headers["connection"] == "close"
    out, err = process.process.communicate(timeout=20)
    assert process.process.returncode == 0
    assert f"{name}: finishing what is under way; once more stops at once" in out
    assert err == ""


def test_a_second_signal_ends_at_once(process: Process) -> None:
    process.gate("wait")
    with process.connect() as line:
        line.sendall(post(b"slow"))
        until(lambda: b"crosspatch_queue_depth 1.0" in process.say(get("/metrics")).body)
        os.kill(process.process.pid, signal.SIGTERM)
        assert process.process.stdout is not None
        assert "SIGTERM" in process.process.stdout.readline()
        os.kill(process.process.pid, signal.SIGTERM)
        assert process.process.wait(3) == 1


@pytest.mark.parametrize("process", [1], indirect=True)
def test_what_takes_too_long_is_told_so(process: Process) -> None:
    process.gate("wait")
    with process.connect() as line:
        line.sendall(post(b"slow"))
        until(lambda: b"crosspatch_queue_depth 1.0" in process.say(get("/metrics")).body)
        os.kill(process.process.pid, signal.SIGTERM)
        reply = next(replies(line, 1))
        assert (reply.status, reply.code) == (503, "draining")
    assert process.process.wait(10) == 0


def test_an_address_that_is_taken_is_told_in_three_parts() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(UsageError) as raised:
            bind("127.0.0.1", port)
    assert raised.value.got == f"port {port} of 127.0.0.1 is taken"
    assert f"--port {port + 1}" in raised.value.do


@pytest.mark.parametrize(
    "host", ["no.such.host.invalid", "203.0.113.7", "a" * 300, "é" * 100, "256.1.1.1"]
)
def test_a_host_that_is_not_this_computer_is_told_in_three_parts(host: str) -> None:
    with pytest.raises(UsageError) as raised:
        bind(host, 0)
    assert raised.value.got.startswith(f"--host {host}")
    assert "leave --host" in raised.value.do


@pytest.mark.parametrize(
    ("host", "local", "shown"),
    [
        ("127.0.0.1", True, "http://127.0.0.1:"), ("localhost", True, "http://127.0.0.1:"),
        ("0.0.0.0", False, "http://127.0.0.1:"),
    ],
)  # fmt: skip
def test_whether_others_can_reach_it_is_known(host: str, local: bool, shown: str) -> None:
    with bind(host, 0) as listener:
        assert loopback(listener) is local
        assert address_of(listener).startswith(shown)


def test_two_that_start_at_once_on_one_port_do_not_both_run(tmp_path: Path) -> None:
    """Both have bound it before either listens."""
    first = bind("127.0.0.1", 0)
    second = bind("127.0.0.1", first.getsockname()[1])
    first.listen()
    failed: list[BaseException] = []

    from support.serving import PAGE, Held

    class Quiet(Held):
        async def start(self) -> None: ...

        async def stop(self, grace: float) -> None: ...

    def run() -> None:
        try:
            lifecycle.run(lambda observe: Quiet(), second, PAGE)  # type: ignore[arg-type, return-value]
        except UsageError as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(20)
    first.close()
    assert "is taken" in str(failed[0])
