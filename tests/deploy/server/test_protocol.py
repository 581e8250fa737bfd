"""What only a real connection shows: framing, slow and leaving clients, what follows a refusal."""

from __future__ import annotations

import re
import socket
import struct
import time

import pytest

from crosspatch.deploy.server.heads import SHORT
from crosspatch.deploy.server.limits import Limits
from support.serving import QUICK, Held, Running, ended, get, post, replies, running, until


@pytest.fixture(scope="module")
def server():
    with running(Held()) as one:
        yield one


@pytest.fixture(scope="module")
def quick():
    """A server that loses patience soon."""
    with running(Held(), limits=QUICK) as one:
        yield one


@pytest.fixture(autouse=True)
def fresh(server: Running, quick: Running) -> None:
    for one in (server, quick):
        one.service.asks.clear()
        one.service.gone, one.service.room = 0, True


def good(one: Running) -> None:
    """The server still answers rightly."""
    (reply,) = one.say(post(b"good"))
    assert reply.status == 200
    assert one.front.held.bytes == 0


def chunked(*parts: bytes, lines: tuple[str, ...] = ()) -> bytes:
    body = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts)
    return post(body + b"0\r\n\r\n", "Transfer-Encoding: chunked", *lines, length=False)


def test_requests_on_one_connection_are_answered_in_turn(server: Running) -> None:
    many = server.say(post(b"a") + get("/livez") + chunked(b"b", b"c") + post(b"d"), 4)
    assert [one.status for one in many] == [200] * 4
    assert [ask.body for ask in server.service.asks] == [b"a", b"bc", b"d"]


FRAMING = {
    "negative": post(b"x", "Content-Length: -1", length=False),
    "plus": post(b"x", "Content-Length: +1", length=False),
    "hex": post(b"x", "Content-Length: 0x1", length=False),
    "two": post(b"x", "Content-Length: 1", "Content-Length: 1", length=False),
    "two others": post(b"x", "Content-Length: 1", "Content-Length: 2", length=False),
    "list": post(b"x", "Content-Length: 1, 1", length=False),
    "both": post(b"0\r\n\r\n", "Content-Length: 5", "Transfer-Encoding: chunked", length=False),
    "both, turned": post(b"0\r\n\r\n", "Transfer-Encoding: chunked", "Content-Length: 5"),
    "gzip, chunked": post(b"0\r\n\r\n", "Transfer-Encoding: gzip, chunked", length=False),
    "chunked, gzip": post(b"0\r\n\r\n", "Transfer-Encoding: chunked, gzip", length=False),
    "identity": post(b"x", "Transfer-Encoding: identity", length=False),
    "old and chunked": chunked(b"x").replace(b"HTTP/1.1", b"HTTP/1.0"),
    "space before colon": post(b"x", "Content-Length : 1", length=False),
    "chunk size": post(b"zz\r\n", "Transfer-Encoding: chunked", length=False),
    "huge chunk": post(b"f" * 17 + b"\r\n", "Transfer-Encoding: chunked", length=False),
    "chunk too long": post(b"1\r\nxyz\r\n0\r\n\r\n", "Transfer-Encoding: chunked", length=False),
    "two hosts": post(b"x", "Host: evil.example"),
    "no host": post(b"x").replace(b"Host: localhost\r\n", b""),
    "no http": b"\x16\x03\x01\x02\x00\x01\x00\x01\r\n\r\n",
    "nul in the path": get("/a\0b"),
    "bare return": get("/livez", "A: b\rB: c"),
    "nothing but a name": get("/livez", "hello"),
    "unknown method": get("/livez", method="LOOK"),
}  # fmt: skip


@pytest.mark.parametrize("name", FRAMING)
def test_framing_that_can_be_read_in_two_ways_ends_the_connection(
    server: Running, name: str
) -> None:
    with server.connect() as line:
        line.sendall(FRAMING[name] + post(b"smuggled"))
        (reply,) = replies(line, 1)
        assert (reply.status, reply.code) == (400, "bad_request")
        assert reply.headers["connection"] == "close"
        assert ended(line)
    assert [ask.body for ask in server.service.asks] == []
    good(server)


def test_a_body_that_is_longer_than_told_is_no_second_request(server: Running) -> None:
    with server.connect() as line:
        line.sendall(post(b"abcdef").replace(b"Length: 6", b"Length: 3"))
        assert next(replies(line, 1)).status == 200
        assert ended(line)
    assert [ask.body for ask in server.service.asks] == [b"abc"]


def test_what_is_wrong_behind_a_request_does_not_take_its_answer(server: Running) -> None:
    server.service.gate.clear()
    try:
        with server.connect() as line:
            line.sendall(post(b"first"))
            until(lambda: server.service.asks)
            line.sendall(b"no http at all\r\n\r\n")
            time.sleep(0.1)
            server.service.gate.set()
            (reply,) = replies(line, 1)
            assert reply.status == 200
            assert ended(line)
    finally:
        server.service.gate.set()


def test_too_large_is_said_at_once_and_can_be_read(server: Running) -> None:
    limit = server.front.limits.body
    for head in (f"Content-Length: {limit + 1}", f"Content-Length: {10**14}"):
        begun = time.monotonic()
        (reply,) = server.say(post(b"", head, "Expect: 100-continue", length=False))
        assert (reply.status, reply.code) == (413, "too_large")
        assert reply.headers["connection"] == "close"
        assert time.monotonic() - begun < 1
    for request in (post(bytes(limit + 1)), chunked(*[bytes(1 << 20)] * 11)):
        with server.connect() as line:
            line.sendall(request)  # all of it: the refusal is not lost in a broken connection
            (reply,) = replies(line, 1)
            assert reply.code == "too_large"
    whole = server.say(post(bytes(limit)))
    assert whole[0].status == 200
    good(server)


BETWEEN = {
    "extension": b"1;" + b"a" * 500_000 + b"\r\nx\r\n0\r\n\r\n",
    "trailer": b"1\r\nx\r\n0\r\nA: " + b"a" * 500_000 + b"\r\n\r\n",
    "trailers": b"1\r\nx\r\n0\r\n" + b"A: b\r\n" * 200 + b"\r\n",
    "length": b"0" * 500_000 + b"1\r\nx\r\n0\r\n\r\n",
}


@pytest.mark.parametrize("name", BETWEEN)
def test_what_lies_between_the_pieces_of_a_body_has_a_limit(server: Running, name: str) -> None:
    with server.connect() as line:
        head, tail = BETWEEN[name][:1000], BETWEEN[name][1000:]
        line.sendall(post(head, "Transfer-Encoding: chunked", length=False))
        for at in range(0, len(tail), 50_000):
            time.sleep(0.005)
            line.sendall(tail[at : at + 50_000])
        (reply,) = replies(line, 1)
        assert reply.status in (400, 431)
        assert ended(line)
    assert server.service.asks == []
    (fine,) = server.say(post(b"1;a=b\r\nx\r\n0\r\nA: b\r\n\r\n", "Transfer-Encoding: chunked",
                              length=False))  # fmt: skip
    assert fine.status == 200


def test_a_thousand_requests_at_once_on_one_connection_are_not_kept(server: Running) -> None:
    with server.connect() as line:
        line.sendall(get("/livez") * 1000)
        found = list(replies(line, 1000))
        assert ended(line)
    assert 1 <= len(found) <= 20
    few = server.say(get("/livez") * 10, 10)
    assert [one.status for one in few] == [200] * 10


def test_a_client_that_never_reads_is_cut(quick: Running) -> None:
    def stuck() -> list:
        return [one for one in quick.server.server_state.connections if one.flow.write_paused]

    with socket.socket() as line:
        line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        line.connect(("127.0.0.1", quick.port))

        def fill() -> list:
            line.sendall(get("/openapi.json"))
            return stuck()

        until(fill, 20)
        until(lambda: not stuck())
    good(quick)


def test_a_body_in_a_million_pieces_is_cut_short(server: Running) -> None:
    begun, before = time.process_time(), left(server)
    (reply,) = server.say(chunked(*[b"x"] * (3 << 20)))
    assert reply.code == "bad_request"
    assert left(server) == before  # it is counted once, as what it was
    assert server.service.asks == []
    assert time.process_time() - begun < 10  # of both sides: three million chunks are made here
    few = server.say(chunked(*[b"x" * 10] * 1000))
    assert few[0].status == 200
    good(server)


@pytest.mark.parametrize(
    "request_",
    [get("/livez", "A: " + "a" * 40_000), get("/livez", *[f"A{n}: b" for n in range(101)]),
     get("/livez", "A: " + "a" * (1 << 20)), get("/" + "a" * 33_000),
     b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 20_000],
)  # fmt: skip
def test_headers_have_a_limit(server: Running, request_: bytes) -> None:
    (reply,) = server.say(request_)
    assert (reply.status, reply.code) == (431, "headers_too_large")
    assert server.say(get("/livez", "A: " + "a" * 30_000))[0].status == 200
    good(server)


def test_a_full_house_says_so_and_what_was_sent_is_no_request(server: Running) -> None:
    server.service.room = False
    inside = post(b"inner", path="/predict?top_k=1")
    with server.connect() as line:
        line.sendall(post(inside) + post(b"next"))
        for reply in replies(line, 2):
            assert (reply.status, reply.code) == (503, "busy")
            assert reply.headers["retry-after"] == "3"
    with server.connect() as line:
        line.sendall(post(inside * (SHORT // len(inside) + 1)) + post(b"next"))
        (reply,) = replies(line, 1)
        assert (reply.status, reply.code) == (503, "busy")
        server.service.room = True
        assert ended(line)
    time.sleep(0.05)
    assert server.service.asks == []
    good(server)


@pytest.mark.parametrize(
    ("before", "drops"),
    [
        (b"POST /pre", b"d"), (b"\r\n", b"\r\n"), (b"GET / HTTP/1.1\r\nA: ", b"a"),
    ],
)  # fmt: skip
def test_slow_headers_are_not_waited_for(quick: Running, before: bytes, drops: bytes) -> None:
    with quick.connect() as line:
        line.sendall(before)
        for _ in range(8):
            time.sleep(0.1)
            try:
                line.sendall(drops)
            except OSError:
                break
        line.settimeout(2)
        (reply,) = replies(line, 1)
        assert (reply.status, reply.code) == (408, "timeout_headers")


def test_slow_headers_of_a_second_request_are_not_waited_for_either(quick: Running) -> None:
    with quick.connect() as line:
        line.sendall(post(b"a"))
        assert next(replies(line, 1)).status == 200
        line.sendall(b"GET /")
        (reply,) = replies(line, 1)
        assert reply.code == "timeout_headers"


def test_a_connection_without_a_request_is_closed(quick: Running) -> None:
    with quick.connect() as line:
        line.settimeout(3)
        assert ended(line)


@pytest.mark.parametrize("head", ["Content-Length: 100", "Transfer-Encoding: chunked"])
def test_a_slow_body_is_not_waited_for(quick: Running, head: str) -> None:
    with quick.connect() as line:
        line.sendall(post(b"", head, length=False))
        begun = time.monotonic()
        for _ in range(3):
            time.sleep(0.05)
            line.sendall(b"1\r\nx\r\n")
        (reply,) = replies(line, 1)
        assert (reply.status, reply.code) == (408, "timeout_body")
        assert time.monotonic() - begun < 2
        assert ended(line)
    good(quick)


def leave(line: socket.socket) -> None:
    """As a process that is killed does."""
    line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    line.close()


def left(one: Running) -> float:
    """How many requests for pictures ended because their clients left, as /metrics has it."""
    text = one.say(get("/metrics"))[0].body.decode()
    found = re.search(r'requests_total\{path="/predict",status="499"\} (\S+)', text)
    return float(found[1]) if found else 0.0


def test_a_client_that_leaves_frees_its_place(server: Running) -> None:
    before = left(server)
    server.service.gate.clear()
    try:
        for go in (leave, socket.socket.close):
            lines = [server.connect() for _ in range(5)]
            for line in lines:
                line.sendall(post(b"mine"))
            until(lambda: server.service.depth == 5)
            assert server.front.held.bytes == 20
            for line in lines:
                go(line)
            until(lambda: server.service.depth == 0)
            until(lambda: server.front.held.bytes == 0)
        assert server.service.gone == 10
        until(lambda: left(server) == before + 10)
    finally:
        server.service.gate.set()
    good(server)


def test_a_client_that_leaves_in_its_body_is_forgotten(server: Running) -> None:
    with server.connect() as line:
        line.sendall(post(b"abc").replace(b"Length: 3", b"Length: 9999999"))
        until(lambda: server.front.held.bytes == 9_999_999)
    until(lambda: server.front.held.bytes == 0)
    assert server.service.asks == []
    good(server)


def test_the_client_is_told_to_go_on_only_where_its_body_is_wanted(server: Running) -> None:
    with server.connect() as line:
        line.sendall(post(b"", "Expect: 100-continue", "Content-Length: 3", length=False))
        assert line.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        line.sendall(b"abc")
        assert next(replies(line, 1)).status == 200
    server.service.room = False
    (reply,) = server.say(post(b"", "Expect: 100-continue", "Content-Length: 3", length=False))
    assert reply.code == "busy"


def test_old_clients_are_answered(server: Running) -> None:
    with server.connect() as line:
        line.sendall(post(b"a", version="1.0"))
        assert next(replies(line, 1)).status == 200
        assert ended(line)
    plain = b"POST /predict HTTP/1.0\r\nContent-Length: 1\r\n\r\na"
    assert server.say(plain)[0].status == 200


@pytest.mark.parametrize(
    ("request_", "statuses"),
    [
        (get("/predict", method="OPTIONS"), {405}), (get("/", method="TRACE"), {405}),
        (get("*", method="OPTIONS"), {400, 404, 405}),
        (get("evil.example:443", method="CONNECT"), {400, 404, 405}),
        (get("/livez", "Connection: Upgrade", "Upgrade: websocket"), {200}),
        (get("/nowhere", "Connection: Upgrade", "Upgrade: h2c"), {404}),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", {400, 404, 405}),
    ],
)  # fmt: skip
def test_other_methods_and_protocols_do_nothing(
    server: Running, request_: bytes, statuses: set[int]
) -> None:
    with server.connect() as line:
        line.sendall(request_)
        (reply,) = replies(line, 1)
        assert reply.status in statuses
        if b"Upgrade" in request_ or b"PRI" in request_:
            line.settimeout(3)  # at once, not when an idle connection is closed
            assert ended(line)
    good(server)


def test_a_get_with_a_body_ends_the_connection(server: Running) -> None:
    with server.connect() as line:
        line.sendall(get("/livez", "Content-Length: 5000000000") + b"x" * 1000)
        (reply,) = replies(line, 1)
        assert reply.headers["connection"] == "close"
        assert ended(line)


def test_more_connections_than_allowed_are_told_so() -> None:
    with running(Held(), limits=Limits(connections=3)) as one:
        lines = [one.connect() for _ in range(3)]
        for line in lines:
            line.sendall(get("/livez"))
            assert next(replies(line, 1)).status == 200
        (reply,) = one.say(get("/livez"))
        assert reply.code == "busy"
        for line in lines:
            line.close()
        until(lambda: one.say(get("/livez"))[0].status == 200)


def test_heads_are_answered_without_a_body(server: Running) -> None:
    with server.connect() as line:
        line.sendall(get("/info", "Connection: close", method="HEAD"))
        text = b""
        while part := line.recv(65536):
            text += part
    head, _, body = text.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200")
    assert body == b""
