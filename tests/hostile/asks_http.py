"""Hostile requests of HTTP itself: lengths, chunks, slow clients, those that leave, paths, headers,
methods and codings (36 to 41, 45, 49 and 50)."""

from __future__ import annotations

import gzip
import socket
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from functools import partial

from hostile import made
from hostile.ask import (
    BYTES,
    GOOD,
    Request,
    endless,
    field,
    form,
    head,
    lengthless,
    slowly,
)
from hostile.process import Server
from hostile.talk import Reply, post, talk


def _lengths() -> Iterator[Request]:
    big = 100 << 20
    told = head("Content-Type: image/png", f"Content-Length: {big}")
    yield Request(
        36,
        "100 MB told",
        lambda: (p for p in (told, *endless(big))),
        (413,),
        "10 MB of body",
        closes=True,
    )

    def untold() -> Iterator[bytes]:
        yield head("Content-Type: image/png", "Transfer-Encoding: chunked")
        for part in endless(big):
            yield b"%x\r\n" % len(part) + part + b"\r\n"
        yield b"0\r\n\r\n"

    yield Request(36, "100 MB untold", untold, (413,), "10 MB of body", closes=True)
    over = bytes(BYTES + 1)
    yield Request(36, "one byte over", lambda: post(over), (413,), "10 MB of body", closes=True)
    padded = GOOD + bytes(BYTES - len(GOOD))
    yield Request(36, "to the byte", lambda: post(padded), (200,), "10 MB of body")
    expects = head(f"Content-Length: {big}", "Expect: 100-continue")
    yield Request(36, "100 MB expected", lambda: expects, (413,), "10 MB of body", closes=True)

    def lying(*lines: str) -> Callable[[], bytes]:
        return lambda: head("Content-Type: image/png", *lines) + GOOD

    size = len(GOOD)
    smuggled = "RFC 9112, 6.3: a length that is no length, or two of them, ends the connection"
    yield Request(
        37,
        "too small",
        lying(f"Content-Length: {size // 2}"),
        (422,),
        "half a picture; what follows is no request",
    )
    yield Request(
        37,
        "too big",
        lying(f"Content-Length: {size + 5}"),
        (408,),
        "the rest never comes",
        closes=True,
    )
    for name, lines in {
        "negative": ["Content-Length: -1"],
        "hex": [f"Content-Length: 0x{size:x}"],
        "plus": [f"Content-Length: +{size}"],
        "overflow": [f"Content-Length: {2**64 + size}"],
        "empty": ["Content-Length:"],
        "two": [f"Content-Length: {size}", f"Content-Length: {size + 1}"],
        "a list": [f"Content-Length: {size}, {size + 1}"],
        "and chunked": [f"Content-Length: {size}", "Transfer-Encoding: chunked"],
        "chunked and": ["Transfer-Encoding: chunked", f"Content-Length: {size}"],
        "chunked twice": ["Transfer-Encoding: chunked, identity"],
        "vertical tab": ["Transfer-Encoding: \x0bchunked"],
        "space": [f"Content-Length : {size}"],
        "folded": [f"Content-Length: {size}\r\n 1"],
    }.items():
        status = (400, 413) if name == "overflow" else (400,)
        yield Request(37, f"length {name}", lying(*lines), status, smuggled, closes=True)
    chunked = head("Content-Type: image/png", "Transfer-Encoding: chunked")
    for name, body in {
        "huge": b"ffffffffffffffff0\r\n",
        "negative": b"-5\r\nhello\r\n",
        "word": b"zz\r\n",
        "bare lf": b"1\nx\n0\n\n",
        "longer than told": b"1\r\nxyz\r\n0\r\n\r\n",
    }.items():
        yield Request(
            37,
            f"chunk {name}",
            lambda body=body: chunked + body,
            (400,),
            "RFC 9112, 7.1",
            closes=True,
        )
    extension = chunked + b"1;" + b"a" * 100_000 + b"\r\nx\r\n0\r\n\r\n"
    yield Request(
        37,
        "chunk extension of 100 kB",
        lambda: extension,
        (400, 415),
        "RFC 9112, 7.1.1: to be passed over (then x is no picture), long ones refused",
    )
    three = GOOD + bytes((3 << 20) - size)
    yield Request(
        38,
        "3 MB in chunks of 1",
        lambda: lengthless(three, 1),
        (200, 400),
        "legal, and what costs more to read than it brings may be refused",
    )
    yield Request(38, "a chunked picture", lambda: lengthless(GOOD, 100), (200,), "RFC 9112, 7.1")


def _slow() -> Iterator[Request]:
    whole = post(GOOD)
    end = whole.index(b"\r\n\r\n")
    yield Request(
        39,
        "slow headers",
        lambda: slowly(whole[:40], whole[40:]),
        (408,),
        "8 s for the headers",
        closes=True,
    )
    yield Request(
        39,
        "slow body",
        lambda: slowly(whole[: end + 30], whole[end + 30 :]),
        (408,),
        "8 s for the body",
        closes=True,
    )
    chunked = head("Content-Type: image/png", "Transfer-Encoding: chunked")
    drops = b"".join(b"1\r\n%c\r\n" % byte for byte in GOOD)
    yield Request(
        39,
        "slow chunks",
        lambda: slowly(chunked, drops, 0.1),
        (408,),
        "8 s for the body",
        closes=True,
    )
    part = form(field("file", GOOD, "a.png"))
    yield Request(
        39,
        "slow form",
        lambda: slowly(part[:200], part[200:]),
        (408,),
        "8 s for the body",
        closes=True,
    )


def _leaving(server: Server, picture: bytes, wait: float, count: int) -> Reply:
    """Clients that send a picture and are gone after `wait` seconds by a reset; then a good one."""
    lines = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(count)]
    for line in lines:
        line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        line.sendall(post(picture))
    time.sleep(wait)
    for line in lines:
        line.close()
    return talk(server.port, post(GOOD))


def _gone() -> Iterator[Request]:
    slow = made.many_scans(3160, 300)  # 0.2 s to decode: thirty of them are 3 s of two decoders
    for name, picture, wait, count in (
        ("queued", slow, 0.2, 30),
        ("decoding", slow, 0.05, 1),
        ("computing", GOOD, 0.002, 8),
        ("sending", GOOD, 0.0, 8),
    ):
        yield Request(
            40,
            f"gone while {name}",
            bytes,
            (200,),
            "the places of those who left are free at once",
            act=partial(_leaving, picture=picture, wait=wait, count=count),
        )


PATHS = (
    "/../etc/passwd",
    "/../../../../etc/passwd",
    "/%2e%2e%2fetc%2fpasswd",
    "/..%5c..%5cwindows",
    "/%00",
    "/predict%00.png",
    "//etc/passwd",
    "/etc/passwd",
    "/C:/Windows/win.ini",
    "/file=/etc/passwd",
    "/static/..%2f..%2fetc/passwd",
    "/predict/../../etc/passwd",
    "/docs",
    "/redoc",
    "/admin",
    "/models",
    "/v2/repository/index",
    "/shutdown",
    "/%f0%28%8c%28",
    "/predict/",
    "/PREDICT",
    "/.git/config",
    "/%252e%252e%252f",
)


def _paths() -> Iterator[Request]:
    gone = "nothing but its own few routes exists"
    for path in PATHS:
        yield Request(
            41,
            f"path {path}",
            lambda path=path: post(b"", target=path, method="GET", kind=None, length=False),
            (404,),
            gone,
            silent=b"root:",
        )
    far = "/" + "a" * 10_000
    yield Request(
        41,
        "path of 10 kB",
        lambda: head(method=f"GET {far} HTTP/1.1"),
        (404,),
        gone,
        silent=b"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    )
    yield Request(
        41,
        "path with NUL",
        lambda: head(method="GET /a\0b HTTP/1.1"),
        (400,),
        "RFC 9112, 3: no such character in a target",
        closes=True,
    )


def _headers() -> Iterator[Request]:
    long = "RFC 6585, 5: 32 kB of headers"
    yield Request(
        45,
        "header of 1 MB",
        lambda: post(GOOD, "X-A: " + "a" * (1 << 20)),
        (431,),
        long,
        closes=True,
    )
    many = [f"X-{n}: {'a' * 40}" for n in range(1000)]
    yield Request(45, "1000 headers", lambda: post(GOOD, *many), (431,), long, closes=True)
    few = [f"X-{n}: a" for n in range(90)]
    yield Request(45, "90 headers", lambda: post(GOOD, *few), (200,), "under 32 kB and 100 of them")
    for name, line in {
        "bare cr": "X-A: b\rX-B: c",
        "nul": "X-A: b\0c",
        "no colon": "hello",
        "space in a name": "X A: b",
        "no name": ": b",
    }.items():
        yield Request(
            45,
            f"header {name}",
            lambda line=line: post(GOOD, line),
            (400,),
            "RFC 9112, 5",
            closes=True,
        )
    for name, first in {
        "noise": bytes(range(128, 256)),
        "tls": b"\x16\x03\x01\x02\x00\x01\x00\x01",
        "no http": b"GET /",
        "version 9": b"GET / HTTP/9.9",
        "http 2": b"PRI * HTTP/2.0",
    }.items():
        yield Request(
            45,
            f"first line {name}",
            lambda first=first: first + b"\r\n\r\n\r\n",
            (400, 505) if name in ("version 9", "http 2") else (400,),
            "RFC 9112, 3",
            closes=True,
        )
    for name, host in {"foreign": "evil.example", "port": "evil.example:8000", "empty": ""}.items():
        yield Request(
            45,
            f"host {name}",
            lambda host=host: post(GOOD).replace(b"Host: localhost", f"Host: {host}".encode()),
            (400, 421),
            "a page elsewhere must not reach a server of this machine by another name",
        )
    for name, lines in {
        "origin": "Origin: http://evil.example",
        "null": "Origin: null",
        "site": "Sec-Fetch-Site: cross-site",
    }.items():
        yield Request(
            45,
            f"from a page, {name}",
            lambda lines=lines: post(GOOD, lines),
            (403,),
            "a page elsewhere must not use a server of this machine",
        )


def _codings() -> Iterator[Request]:
    unread = "RFC 9110, 8.4: codings are not read, so no bomb is opened"
    bodies = {
        "gzip": gzip.compress(GOOD),
        "deflate": zlib.compress(GOOD),
        "br": b"\x8b\x00\x80" + GOOD,
        "zstd": b"\x28\xb5\x2f\xfd" + GOOD,
        "gzip, gzip": gzip.compress(gzip.compress(GOOD)),
        "x-unknown": GOOD,
    }
    for name, body in bodies.items():
        yield Request(
            49,
            f"coding {name}",
            lambda name=name, body=body: post(body, f"Content-Encoding: {name}"),
            (415,),
            unread,
        )
    bomb = gzip.compress(bytes(1 << 24), 9)
    yield Request(49, "gzip bomb", lambda: post(bomb, "Content-Encoding: gzip"), (415,), unread)
    yield Request(
        49, "gzip bomb untold", lambda: post(bomb), (415,), "a gzip archive is no picture"
    )
    yield Request(
        49,
        "identity",
        lambda: post(GOOD, "Content-Encoding: identity"),
        (200, 415),
        "RFC 9110, 8.4.1: it should not be sent",
    )


def _methods() -> Iterator[Request]:
    old = f"POST /predict HTTP/1.0\r\nContent-Length: {len(GOOD)}\r\n\r\n".encode() + GOOD
    yield Request(
        50, "http 1.0", lambda: old, (200, 400), "HTTP/1.0 asks for no Host; we may", closes=True
    )
    named = old.replace(b"\r\n", b"\r\nHost: localhost\r\n", 1)
    yield Request(50, "http 1.0 with host", lambda: named, (200,), "RFC 9110, 2.5", closes=True)
    for method in ("OPTIONS", "TRACE", "DELETE", "PUT", "PATCH", "GET", "PROPFIND"):
        yield Request(
            50,
            method,
            lambda method=method: head(method=f"{method} /predict HTTP/1.1"),
            (405,),
            "RFC 9110, 15.5.6: POST alone",
        )
    yield Request(
        50,
        "OPTIONS *",
        lambda: head(method="OPTIONS * HTTP/1.1"),
        (404, 405),
        "RFC 9110, 9.3.7: it may be answered; we have no such route",
    )
    yield Request(
        50,
        "CONNECT",
        lambda: head(method="CONNECT example.org:443 HTTP/1.1"),
        (400, 405),
        "RFC 9110, 9.3.6: no tunnel here",
    )
    yield Request(
        50,
        "absolute target",
        lambda: head(method="GET http://example.org/ HTTP/1.1"),
        (200, 421),
        "RFC 9112, 3.2.2: taken by its path, or refused by its host",
    )
    yield Request(
        50,
        "unknown method",
        lambda: head(method="BREW /predict HTTP/1.1"),
        (400, 405),
        "RFC 9110, 9: no such method",
    )
    upgrade = [
        "Connection: Upgrade",
        "Upgrade: websocket",
        "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
    ]
    yield Request(
        50,
        "websocket",
        lambda: head(*upgrade, method="GET /predict HTTP/1.1"),
        (405,),
        "RFC 9110, 7.8: an upgrade may be passed over",
    )
    h2 = ["Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQAAP__"]
    yield Request(
        50,
        "h2c",
        lambda: head(*h2, method="GET /livez HTTP/1.1"),
        (200,),
        "RFC 9110, 7.8: an upgrade may be passed over",
    )


ASKED = (*_lengths(), *_slow(), *_gone(), *_paths(), *_headers(), *_codings(), *_methods())
