"""Hostile inputs 1 to 50 at a real server: the right status, no crash, no hang, little memory, and
the next good request is answered as ever."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest

from hostile import asks_bodies, asks_http
from hostile.ask import Request
from hostile.case import Picture
from hostile.conftest import GOOD, probabilities
from hostile.pictures import OPENED, PICTURES
from hostile.process import MEGABYTE, Peak, Server
from hostile.talk import Reply

HANG = 2.0
"""Seconds from the last byte of a request to the last of its answer."""
MEMORY = 300 * MEGABYTE
"""Above idle, at the peak, over the server and all its workers."""
REQUESTS = (*asks_bodies.ASKED, *asks_http.ASKED)
INSIDE = re.compile(
    rb"Traceback|File \"|site-packages|\.py\b|/tmp/|/home/|/work|/usr/|/proc/|0x[0-9a-f]{6,}"
)
"""What no answer may tell: places in the program, paths, addresses in memory."""


def checked(reply: Reply) -> Reply:
    """The reply, which has one of two shapes: an answer, or an error of four parts."""
    assert not INSIDE.search(reply.body), reply.body[:500]
    if reply.status >= 400:
        assert reply.headers["content-type"].startswith("application/json")
        said = reply.json()
        assert set(said) == {"error"}
        assert set(said["error"]) == {"code", "message", "hint", "request_id"}
        assert all(isinstance(one, str) and one for one in said["error"].values()), said
        assert all(one.isprintable() for one in said["error"].values()), said
        assert len(reply.body) < 2000
    if reply.status == 503:
        assert int(reply.headers["retry-after"]) >= 1
    return reply


def survived(server: Server, send: Callable[[], Reply]) -> Reply:
    """Sends something hostile; then the server must be whole, slim and right."""
    before = server.ask(GOOD)
    with Peak(server) as peak:
        reply = send()
    after = server.ask(GOOD)
    assert after.status == 200, after.body
    assert after.json()["predictions"] == before.json()["predictions"]
    assert server.process.poll() is None, server.log.read_text()[-2000:]
    assert reply.seconds < HANG
    assert after.seconds < HANG
    assert peak.bytes - server.idle < MEMORY, f"{(peak.bytes - server.idle) / MEGABYTE:.0f} MB"
    return checked(reply)


def met(case: Picture, server: Server, answer: Callable[[bytes], np.ndarray]) -> None:
    """Sends a would-be picture; the answer must be the right one."""
    data = case.make()
    reply = survived(server, lambda: server.ask(data))
    assert reply.status in case.status, (reply.status, reply.body[:300], case.why)
    if reply.status == 200:
        np.testing.assert_allclose(probabilities(reply), answer(data), atol=1e-6)
    else:
        assert re.search(case.says, reply.json()["error"]["message"]), reply.body


@pytest.mark.parametrize("case", PICTURES, ids=str)
def test_pictures(case: Picture, server: Server, answer) -> None:
    met(case, server, answer)


@pytest.mark.parametrize("case", OPENED, ids=str)
def test_pictures_of_formats_that_have_to_be_asked_for(
    case: Picture, open_server: Server, answer
) -> None:
    met(case, open_server, answer)


@pytest.mark.parametrize("case", REQUESTS, ids=str)
def test_requests(case: Request, server: Server) -> None:
    reply = survived(server, lambda: case.send(server))
    assert reply.status in case.status, (reply.status, reply.body[:300], case.why)
    assert not case.closes or reply.closed, "the connection stays open"
    assert not case.silent or case.silent not in reply.body + repr(reply.headers).encode()


def test_no_process_and_no_file_is_left_over(server: Server) -> None:
    """After all of the above, in one process of tests: what was opened is closed again."""
    for _ in range(20):
        assert server.ask(GOOD).status == 200
    held, processes = server.files(), len(server.processes())
    assert processes == 3, "the server and its two decoders"
    for case in [one for one in PICTURES if one.item not in (8, 9, 15, 26)][::2]:
        server.ask(case.make())
    assert server.ask(GOOD).status == 200
    assert server.files() <= held + 2
    assert len(server.processes()) == processes
    log = server.log.read_text()
    assert "Traceback" not in log
    assert "ERROR" not in log, log[-2000:]
