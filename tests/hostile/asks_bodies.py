"""Hostile inputs 30 to 50: requests, byte by byte, each with its right status.

What decides: a request that breaks the rules of HTTP, JSON or multipart, or asks for what does not
exist, is refused before a picture is looked at (400, 404, 405), one that is too long in a part has
that part's own status (413 body, 431 headers), a coding or a type that is not read is 415, a client
that is too slow gets 408. After an answer to a request that was not read whole the connection ends.
"""

from __future__ import annotations

import base64
import socket
import threading
from collections.abc import Callable, Iterator

from hostile import made
from hostile.ask import (
    GOOD,
    Request,
    document,
    field,
    form,
    head,
)
from hostile.process import Server
from hostile.talk import Reply, post, talk


def _bodies() -> Iterator[Request]:
    plain = "the rules of the route"
    yield Request(30, "no body", lambda: head(), (400,), "a picture is the body")
    yield Request(31, "no content type", lambda: post(GOOD, kind=None), (200,), plain)
    for kind in ("image/jpeg", "image/x-anything", "application/octet-stream"):
        yield Request(
            31,
            kind,
            lambda kind=kind: post(GOOD, kind=kind),
            (200,),
            "the bytes say what the picture is, the header does not",
        )
    for kind in (
        "text/html",
        "video/mp4",
        "multipart/mixed; boundary=a",
        "application/x-tar",
        "\x80/\xff",
        "image",
    ):
        yield Request(32, f"type {kind!a}", lambda kind=kind: post(GOOD, kind=kind), (415,), plain)
    for kind in ("image/png, text/html", ";"):
        yield Request(
            32,
            f"type {kind!a}",
            lambda kind=kind: post(GOOD, kind=kind),
            (200, 415),
            "RFC 9110, 8.3: what is no type may be taken for none",
        )
    yield Request(
        32,
        "curl's own type",
        lambda: post(GOOD, kind="application/x-www-form-urlencoded"),
        (200,),
        "curl --data-binary says this of every body",
    )
    filed = field("file", GOOD, "a.png")
    yield Request(33, "a good form", lambda: form(filed), (200,), plain)
    bare = post(filed, kind="multipart/form-data")
    yield Request(33, "no boundary", lambda: bare, (400,), "RFC 2046: a boundary is needed")
    wide = f"multipart/form-data; boundary={'b' * (1 << 20)}"
    yield Request(
        33,
        "boundary of 1 MB",
        lambda: post(filed, kind=wide),
        (431,),
        "32 kB of headers",
        closes=True,
    )
    longer = f"multipart/form-data; boundary={'b' * 3000}"
    yield Request(
        33, "boundary of 3 kB", lambda: post(filed, kind=longer), (400,), "RFC 2046: 70 characters"
    )
    yield Request(
        33, "never closed", lambda: form(filed, end=b""), (400,), "RFC 2046: it is closed"
    )
    yield Request(
        33,
        "10 MB before it",
        lambda: form(bytes(9 << 20) + b"\r\n", filed),
        (400,),
        "nothing stands before the first boundary",
    )
    yield Request(
        33,
        "crlf before it",
        lambda: form(b"\r\n" * 200_000, filed),
        (200, 400),
        "RFC 2046, 5.1.1: what stands before the first boundary is passed over",
    )
    parts = [field(f"f{n}", GOOD[:20], "a.png") for n in range(5000)]
    yield Request(
        34, "5000 files", lambda: form(*parts), (400, 413), "four parts: too many or too much"
    )
    names = [field(f"f{n}", b"1") for n in range(5000)]
    yield Request(
        35, "5000 fields", lambda: form(*names), (400, 413), "four parts: too many or too much"
    )
    lines = field("file", GOOD, "a.png").replace(
        b"\r\n\r\n", b"\r\nX-A: " + b"b" * 99 + b"\r\n" * 1, 1
    )
    lines = lines.replace(b"X-A:", b"".join(b"X-%d: a\r\n" % n for n in range(2000)) + b"X-A:")
    yield Request(35, "2000 headers in a part", lambda: form(lines), (400,), "few headers a part")


def _names() -> Iterator[Request]:
    for name, told in {
        "up": "../../x.png",
        "html": "<script>alert(1)</script>",
        "3 kB": "n" * 3072,
        "bidi": "‮gnp.exe",
        "coded newline": "a%0d%0aX-Y: z",
        "nul": "a\\0.png",
    }.items():
        yield Request(
            42,
            f"file name {name}",
            lambda told=told: form(field("file", GOOD, told)),
            (200,),
            "a name is not used",
            silent=told.encode(),
        )
    wide = form(field("file", GOOD, "n" * 4096))
    yield Request(42, "file name 4 kB", lambda: wide, (400,), "4 kB for a header of a part")
    raw = form(field("file", GOOD, "a\r\nX-Evil: 1\r\n.png"))
    yield Request(
        42,
        "file name newline",
        lambda: raw,
        (200, 400),
        "a broken part: refused, or the rest of its name passed over",
        silent=b"X-Evil",
    )


def _documents() -> Iterator[Request]:
    coded = base64.b64encode(GOOD).decode()
    bad = "JSON that is no request"
    yield Request(43, "a good document", lambda: document({"image": coded}), (200,), "RFC 8259")
    whole = f'"image": "{coded}"'
    texts = {
        "depth 10000": "[" * 10_000 + "]" * 10_000,
        "depth in it": '{"image": ' + '{"a":' * 10_000 + "1" + "}" * 10_000 + "}",
        "1e308": f'{{{whole}, "top_k": 1e308}}',
        "1e999": f'{{{whole}, "top_k": 1e999}}',
        "digits": f'{{{whole}, "top_k": 1{"0" * 5000}}}',
        "NaN": f'{{{whole}, "top_k": NaN}}',
        "duplicate": f"{{{whole}, {whole}}}",
        "bad base64": '{"image": "###"}',
        "odd base64": '{"image": "abc"}',
        "number": '{"image": 5}',
        "null": '{"image": null}',
        "list": "[]",
        "nothing": "",
        "cut": '{"image": "',
        "text": "hello",
        "no image": '{"top_k": 3}',
        "surrogate": '{"image": "\\ud800"}',
        "comment": f"{{{whole}}} // x",
        "unknown": f'{{{whole}, "weights": 1}}',
    }
    for name, text in texts.items():
        yield Request(43, f"json {name}", lambda text=text: document(text), (400,), bad)
    yield Request(43, "json not utf-8", lambda: document(b'{"image": "\xff\xfe"}'), (400,), bad)
    yield Request(
        43,
        "json of 50 MB",
        lambda: document('{"image": "' + "A" * (50 << 20) + '"}'),
        (413,),
        "10 MB of body",
        closes=True,
    )
    bomb = base64.b64encode(made.black_png(13500, 13500)).decode()
    yield Request(43, "json with a bomb", lambda: document({"image": bomb}), (422,), "40 Mpx")
    yield Request(
        43,
        "json with a page",
        lambda: document({"image": base64.b64encode(b"<html><body></body></html>").decode()}),
        (415,),
        "HTML is no picture",
    )


def _fetched(server: Server, make: Callable[[str], bytes]) -> Reply:
    """A request that names an address; it must not be visited."""
    visits: list[object] = []
    with socket.create_server(("127.0.0.1", 0)) as trap:
        trap.settimeout(0.3)

        def wait() -> None:
            try:
                visits.append(trap.accept())
            except TimeoutError:
                return

        watch = threading.Thread(target=wait)
        watch.start()
        reply = talk(server.port, make(f"http://127.0.0.1:{trap.getsockname()[1]}/a.png"))
        watch.join()
    assert not visits, "the server went where a request told it to"
    return reply


def _addresses() -> Iterator[Request]:
    never = "nothing is ever fetched, so there is no such field"
    for url in (
        "http://169.254.169.254/latest/meta-data/",
        "file:///etc/passwd",
        "http://localhost/",
        "gopher://127.0.0.1:25/_HELO",
        "https://example.org/a.png",
        "ftp://[::1]/a",
    ):
        yield Request(
            44, f"url {url}", lambda url=url: document({"url": url}), (400,), never, silent=b"root:"
        )
    coded = base64.b64encode(GOOD).decode()
    makers: dict[str, Callable[[str], bytes]] = {
        "alone": lambda url: document({"url": url}),
        "beside": lambda url: document({"image": coded, "url": url}),
        "as image": lambda url: document({"image": url}),
        "field": lambda url: form(field("url", url.encode())),
        "field beside": lambda url: form(field("file", GOOD, "a.png"), field("url", url.encode())),
        "query": lambda url: post(GOOD, target=f"/predict?url={url}"),
        "body": lambda url: post(url.encode(), kind="image/png"),
    }
    for name, make in makers.items():
        status = (415,) if name == "body" else (400,)
        yield Request(
            44,
            f"url {name}",
            bytes,
            status,
            never,
            act=lambda server, make=make: _fetched(server, make),
        )
    for name in (
        "Forwarded",
        "X-Forwarded-Host",
        "Referer",
        "X-Original-URL",
        "X-HTTP-Method-Override",
    ):
        yield Request(
            44,
            f"header {name}",
            lambda name=name: post(GOOD, f"{name}: /etc/passwd"),
            (200,),
            "headers that are not ours change nothing",
        )


def _values() -> Iterator[Request]:
    for value in ("0", "-1", "1000000000", "a", "1.5", "", "NaN", "1e3", "9" * 400, "%00", "１"):
        coded = "".join(f"%{byte:02x}" for byte in value.encode()) if not value.isascii() else value
        yield Request(
            47,
            f"top_k {value[:12]}",
            lambda coded=coded: post(GOOD, target=f"/predict?top_k={coded}"),
            (400,),
            "top_k is a whole number from 1 to 1000",
        )
    yield Request(
        47,
        "top_k twice",
        lambda: post(GOOD, target="/predict?top_k=1&top_k=2"),
        (400,),
        "one value",
    )
    yield Request(
        47,
        "top_k 1000",
        lambda: post(GOOD, target="/predict?top_k=1000"),
        (200,),
        "as many classes as there are",
    )
    for value in ("-5", "abc", "nan", "inf", "1e99"):
        yield Request(
            47,
            f"timeout {value}",
            lambda value=value: post(GOOD, f"X-Timeout-Ms: {value}"),
            (400,),
            "a number of milliseconds",
        )
    yield Request(
        47,
        "timeout 0",
        lambda: post(GOOD, "X-Timeout-Ms: 0"),
        (400, 504),
        "no time at all: refused as a number, or over at once",
    )
    yield Request(
        48,
        "model name",
        lambda: post(GOOD, target="/models/%1b%5b31m%00/predict"),
        (404,),
        "one server, one model",
        silent=b"\x1b",
    )
    yield Request(
        48,
        "model query",
        lambda: post(GOOD, target="/predict?model=%1b%5b31mx"),
        (400,),
        "one server, one model",
        silent=b"\x1b",
    )


ASKED = (*_bodies(), *_names(), *_documents(), *_addresses(), *_values())
