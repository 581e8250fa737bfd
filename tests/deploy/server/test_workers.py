"""Decoding processes die, hang and are replaced; each costs its own picture alone."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable

import psutil
import pytest
from PIL import Image

from crosspatch.data.preprocess import Preprocess
from crosspatch.deploy.server.decoder import Limits
from crosspatch.deploy.server.refusals import Refused
from crosspatch.deploy.server.workers import PATIENCE, Decoded, Workers
from crosspatch.errors import DataError
from support.hostile import GOOD, saved

PREPROCESS = Preprocess((24, 32), (24, 32))
SLOW = "unreadable: this picture takes too long to decode"
GIANT = saved(Image.new("RGB", (7000, 5600)), "PNG")  # takes a third of a second or more


def lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def largest(pids: list[int]) -> int | None:
    """The process that holds the pixels of GIANT, None while there is none."""
    sizes = {pid: psutil.Process(pid).memory_info().rss for pid in pids}
    most = max(pids, key=sizes.__getitem__)
    return most if sizes[most] > min(sizes.values()) + (20 << 20) else None


class Job:
    def __init__(self, body: bytes, wanted: bool = True) -> None:
        self.body, self.seen, self.wanted = body, False, wanted
        loop = asyncio.get_running_loop()
        self.begun: asyncio.Future[None] = loop.create_future()
        self.end: asyncio.Future[Decoded | Refused] = loop.create_future()

    def taken(self) -> None:
        self.begun.set_result(None)

    def decoded(self, found: Decoded) -> None:
        self.end.set_result(found)

    def refused(self, why: Refused) -> None:
        self.end.set_result(why)


def with_workers(
    count: int, use: Callable[[Workers], Awaitable[None]], limits: Limits | None = None
) -> None:
    """Runs `use` with processes; none of them is left afterwards."""

    async def talk() -> None:
        workers = Workers(count, PREPROCESS, limits or Limits(seconds=30.0))
        await workers.start()
        first = workers.pids
        assert len(first) == count
        try:
            async with asyncio.timeout(60):
                await use(workers)
        finally:
            last = workers.pids
            await workers.stop()
        assert workers.pids == []
        assert not any(lives(pid) for pid in {*first, *last})

    asyncio.run(talk())


def put(workers: Workers, *bodies: bytes) -> list[Job]:
    jobs = [Job(body) for body in bodies]
    for job in jobs:
        workers.put(job)
    return jobs


async def code(job: Job) -> str:
    """Why there was nothing, "" where there was."""
    found = await job.end
    return f"{found.code}: {found.message}" if isinstance(found, Refused) else ""


async def whole(workers: Workers) -> float:
    """Waits until every place is filled again; gives the seconds that it took."""
    began = time.monotonic()
    while len(workers.pids) < workers.count:
        await asyncio.sleep(0.005)
    (job,) = put(workers, GOOD["1x1.png"]())
    assert await code(job) == ""
    return time.monotonic() - began


def test_a_process_killed_while_it_decodes_costs_its_own_picture_alone() -> None:
    async def use(workers: Workers) -> None:
        good = GOOD["progressive.jpg"]()
        giant, *others = put(workers, GIANT, *[good] * 20)
        await giant.begun
        await others[0].end  # the second process is at work on the good ones
        while (busy := largest(workers.pids)) is None:
            await asyncio.sleep(0.001)
        os.kill(busy, signal.SIGKILL)
        assert (await code(giant)).startswith("decoder_died")
        assert [await code(job) for job in others] == [""] * 20
        assert await whole(workers) < 2.0
        assert busy not in workers.pids
        assert workers.restarts == 1
        assert not workers.failing

    with_workers(2, use)


def test_an_idle_process_that_is_killed_is_replaced_before_a_picture_comes() -> None:
    async def use(workers: Workers) -> None:
        (pid,) = workers.pids
        os.kill(pid, signal.SIGKILL)
        while pid in workers.pids:
            await asyncio.sleep(0.005)
        assert await whole(workers) < 2.0
        assert workers.restarts == 1

    with_workers(1, use)


def test_a_picture_that_comes_as_its_process_dies_is_answered_or_refused_in_time() -> None:
    async def use(workers: Workers) -> None:
        for _ in range(2):
            (pid,) = workers.pids
            os.kill(pid, signal.SIGKILL)
            jobs = put(workers, *[GOOD["1x1.png"]()] * 3)
            codes = [await code(job) for job in jobs]
            assert set(codes[1:]) == {""}
            assert not codes[0] or codes[0].startswith("decoder_died")
            await whole(workers)

    with_workers(1, use)


def test_three_deaths_within_a_minute_are_a_finding() -> None:
    async def use(workers: Workers) -> None:
        for deaths in (1, 2, 3):
            assert not workers.failing
            (pid,) = workers.pids
            os.kill(pid, signal.SIGKILL)
            while pid in workers.pids:
                await asyncio.sleep(0.005)
            assert await whole(workers) < 2.0
            assert workers.restarts == deaths
        assert workers.failing

    with_workers(1, use)


def test_a_picture_that_takes_too_much_time_is_refused_and_is_no_finding() -> None:
    async def use(workers: Workers) -> None:
        for _ in range(3):
            began = time.monotonic()
            (job,) = put(workers, GIANT)
            assert await code(job) == SLOW
            assert time.monotonic() - began < 2.0
            await whole(workers)
        assert workers.restarts == 3
        assert not workers.failing

    with_workers(1, use, Limits(seconds=0.1))


def test_a_process_that_stands_still_is_killed_by_the_clock() -> None:
    async def use(workers: Workers) -> None:
        (pid,) = workers.pids
        os.kill(pid, signal.SIGSTOP)
        began = time.monotonic()
        (job,) = put(workers, GOOD["1x1.png"]())
        assert await code(job) == SLOW
        assert 0.9 * PATIENCE * 0.4 < time.monotonic() - began < 2.5
        await whole(workers)

    with_workers(1, use, Limits(seconds=0.4))


def test_unwanted_pictures_are_passed_over() -> None:
    async def use(workers: Workers) -> None:
        (first,) = put(workers, GIANT)
        dropped = Job(b"never looked at", wanted=False)
        workers.put(dropped)
        (last,) = put(workers, GOOD["1x1.png"]())
        assert [await code(job) for job in (first, last)] == ["", ""]
        assert not dropped.begun.done()

    with_workers(1, use)


def test_pictures_of_every_size_come_back_whole() -> None:
    async def use(workers: Workers) -> None:
        bodies = [GOOD["1x1.png"](), GOOD["progressive.jpg"]() + bytes(3 << 20)] * 4
        jobs = put(workers, *bodies)
        assert [await code(job) for job in jobs] == [""] * 8
        found = await jobs[1].end
        assert isinstance(found, Decoded)
        assert found.pixels.shape == (24, 32, 3)
        assert found.seconds > 0

    with_workers(2, use)


def test_where_no_process_starts_it_is_said(monkeypatch) -> None:
    monkeypatch.setattr("crosspatch.deploy.server.workers.MODULE", "crosspatch.no_such_module")
    before = psutil.Process().children()

    async def talk() -> None:
        with pytest.raises(DataError, match="did not start"):
            await Workers(2, PREPROCESS, Limits()).start()

    asyncio.run(talk())
    assert psutil.Process().children() == before


SERVER = """
import asyncio, sys
from crosspatch.data.preprocess import Preprocess
from crosspatch.deploy.server.decoder import Limits
from crosspatch.deploy.server.workers import Workers

class Job:
    def __init__(self, body):
        self.body, self.seen, self.wanted = body, False, True
    def taken(self):
        print("taken", flush=True)
    def decoded(self, found): ...
    def refused(self, why): ...

async def main():
    workers = Workers(2, Preprocess((24, 32), (24, 32)), Limits())
    await workers.start()
    print(*workers.pids, flush=True)
    workers.put(Job(sys.stdin.buffer.read()))
    await asyncio.sleep(60)

asyncio.run(main())
"""


def test_no_process_outlives_a_server_that_is_killed() -> None:
    """Neither an idle one nor one that decodes."""
    with subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as server:
        pids = [int(one) for one in server.stdout.readline().split()]
        assert len(pids) == 2
        server.stdin.write(GIANT)
        server.stdin.close()
        assert server.stdout.readline() == b"taken\n"
        server.kill()
        server.wait()
        until = time.monotonic() + 5.0
        while any(lives(pid) for pid in pids) and time.monotonic() < until:
            time.sleep(0.02)
        assert not any(lives(pid) for pid in pids)
