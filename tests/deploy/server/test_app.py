"""Paths, bodies, refusals, headers, metrics and logs: the application without a socket."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
import re
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from crosspatch.deploy.server.app import create_app, page_policy
from crosspatch.deploy.server.heads import SHORT
from crosspatch.deploy.server.limits import Limits
from crosspatch.deploy.server.logs import Log
from crosspatch.deploy.server.refusals import STATUS
from support.serving import PAGE, Held


class Client:
    """Requests to an application, one at a time."""

    def __init__(self, service: Held | None = None, **options: Any) -> None:
        self.service = service or Held()
        self.stream = io.StringIO()
        self.told: list[dict[str, Any]] = []
        self.front = create_app(self.service, PAGE, log=Log(self.stream), **options)  # type: ignore[arg-type]
        write = self.front.log
        self.front.log = lambda **entry: (self.told.append(entry), write(**entry))  # type: ignore[assignment]
        self.close = write.close

    def __call__(self, method: str, path: str, **given: Any) -> httpx.Response:
        async def ask() -> httpx.Response:
            transport = httpx.ASGITransport(self.front)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as one:
                return await one.request(method, path, **given)

        return asyncio.run(ask())

    def post(self, body: bytes = b"a picture", path: str = "/predict", **given: Any) -> Any:
        return self("POST", path, content=body, **given)

    def log(self) -> list[dict[str, Any]]:
        self.close()
        return [json.loads(line) for line in self.stream.getvalue().splitlines()]


@pytest.fixture
def client() -> Client:
    return Client()


def code(answer: httpx.Response) -> str:
    """Of an error, whose shape and status are checked."""
    assert answer.headers["content-type"] == "application/json"
    error = answer.json()["error"]
    assert set(answer.json()) == {"error"}
    assert set(error) == {"code", "message", "hint", "request_id"}
    assert error["request_id"] == answer.headers["x-request-id"]
    assert STATUS[error["code"]] == answer.status_code
    assert ("retry-after" in answer.headers) == (answer.status_code == 503)
    return error["code"]


def test_an_answer_has_what_is_promised(client: Client) -> None:
    answer = client.post()
    assert answer.status_code == 200
    made = answer.json()
    assert made.pop("timing_ms").keys() == {"queue", "decode", "compute", "total"}
    assert made == {
        "request_id": answer.headers["x-request-id"],
        "bundle": "f" * 64,
        "predictions": [
            {"class": "red", "probability": 0.75},
            {"class": "green", "probability": 0.2},
            {"class": "blue", "probability": 0.05},
        ],
        "confidence": 0.75,
        "abstain": False,
        "threshold": 0.5,
        "image": {"width": 4, "height": 3, "format": "PNG"},
        "batch": 1,
    }


def test_options_come_in_the_address_the_form_and_json(client: Client) -> None:
    seen = client.post(path="/predict?top_k=2&seen=1").json()
    assert [one["class"] for one in seen["predictions"]] == ["red", "green"]
    assert base64.b64decode(seen["seen"].removeprefix("data:image/png;base64,")) == b"png"
    form = {"files": {"any": b"x"}, "data": {"top_k": "1"}}
    assert len(client("POST", "/predict", **form).json()["predictions"]) == 1
    coded = {"image": base64.b64encode(b"x").decode(), "top_k": 1}
    assert len(client("POST", "/predict", json=coded).json()["predictions"]) == 1


KINDS = (None, "image/png", "image/whatever", "application/octet-stream", "IMAGE/JPEG; a=b",
         "application/x-www-form-urlencoded")  # fmt: skip


QUICKLY = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@QUICKLY
@given(body=st.binary(min_size=1, max_size=3000), kind=st.sampled_from(KINDS), name=st.text())
def test_a_picture_reaches_the_model_as_it_was_however_it_is_sent(
    client: Client, body: bytes, kind: str | None, name: str
) -> None:
    client.service.asks.clear()
    client.told.clear()
    assert client.post(body, headers={} if kind is None else {"content-type": kind}).is_success
    safe = name.encode("utf-8", "replace").decode() or "a"
    assert client("POST", "/predict", files={"image": (safe, body)}).is_success
    assert client("POST", "/predict", json={"image": base64.b64encode(body).decode()}).is_success
    assert [ask.body for ask in client.service.asks] == [body] * 3
    assert {one["picture"] for one in client.told} == {hashlib.sha256(body).hexdigest()}


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/docs", 404), ("GET", "/redoc", 404), ("GET", "/predict/", 404),
        ("GET", "/../etc/passwd", 404), ("POST", "/predict/batch", 404), ("GET", "/%00", 404),
        ("GET", "/predict", 405), ("PUT", "/predict", 405), ("OPTIONS", "/predict", 405),
        ("TRACE", "/", 405), ("POST", "/", 405), ("DELETE", "/info", 405),
        ("HEAD", "/predict", 405),
    ],
)  # fmt: skip
def test_there_is_nothing_else(client: Client, method: str, path: str, status: int) -> None:
    answer = client(method, path)
    assert answer.status_code == status
    if method != "HEAD":
        assert code(answer) == {404: "not_found", 405: "method"}[status]
    if status == 405:
        assert answer.headers["allow"] in ("POST", "GET, HEAD")
    assert client.service.asks == []


@pytest.mark.parametrize("path", ["/", "/livez", "/readyz", "/metrics", "/info", "/openapi.json"])
def test_what_can_be_read_can_be_asked_for_by_head(client: Client, path: str) -> None:
    whole, head = client("GET", path), client("HEAD", path)
    assert whole.status_code == head.status_code == 200
    assert whole.headers["content-type"] == head.headers["content-type"]
    for name in ("x-content-type-options", "referrer-policy", "content-security-policy"):
        assert whole.headers[name]


BAD = "bad_request"
COMMAS = b'{"image": "eA==", "top_k": [' + b"1," * 50 + b"1]}"


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        ({"path": "/predict?top_k=0"}, BAD), ({"path": "/predict?top_k=-1"}, BAD),
        ({"path": "/predict?top_k=1000000000"}, BAD), ({"path": "/predict?top_k=a"}, BAD),
        ({"path": "/predict?top_k=1_0"}, BAD), ({"path": "/predict?top_k=1&top_k=2"}, BAD),
        ({"path": "/predict?url=http://localhost"}, BAD), ({"path": "/predict?seen=yes"}, BAD),
        ({"path": "/predict?explain=1"}, BAD), ({"body": b""}, "empty"),
        ({"headers": {"x-timeout-ms": "0"}}, BAD), ({"headers": {"x-timeout-ms": "x"}}, BAD),
        ({"headers": {"content-type": "text/html"}}, "not_supported"),
        ({"headers": {"content-type": "imagex"}}, "not_supported"),
        ({"headers": {"content-encoding": "gzip"}}, "not_supported"),
        ({"headers": {"content-type": "multipart/form-data"}}, BAD),
        ({"headers": {"content-type": "multipart/form-data; boundary=" + "a" * 71}}, BAD),
        ({"headers": {"content-type": "multipart/form-data; boundary=a"}}, BAD),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_before_the_model_sees_it(
    client: Client, request_: dict[str, Any], expected: str
) -> None:
    assert code(client.post(**request_)) == expected
    assert client.service.asks == []


@pytest.mark.parametrize(
    "body",
    [
        b"", b"null", b"[]", b"{}", b'{"image": 1}', b'{"image": ""}', b'{"image": "%%%"}',
        b'{"image": "eA==", "image": "eQ=="}', b'{"image": "eA==", "top_k": NaN}', COMMAS,
        b'{"image": "eA==", "top_k": 1e308}', b'{"image": "eA==", "top_k": true}',
        b'{"image": "eA==", "url": "http://169.254.169.254/"}', b"[" * 10_000,
        b'{"image": "eA==", "top_k": ' + b"9" * 10_000 + b"}", b'{"image": "\xff"}',
        b'{"image": "eA==" } x', '{"image": "eA=="}'.encode("utf-16"), b'{"a":' * 5 + b"1",
        '{"image": "é"}'.encode(),
    ],
)  # fmt: skip
def test_json_that_is_not_a_picture_with_numbers_is_refused(client: Client, body: bytes) -> None:
    answer = client.post(body, headers={"content-type": "application/json"})
    assert code(answer) in (BAD, "empty")
    assert client.service.asks == []


def form(*parts: bytes, end: bytes = b"--b--\r\n") -> bytes:
    return b"".join(b"--b\r\n" + part + b"\r\n" for part in parts) + end


FILE = b'Content-Disposition: form-data; name="a"; filename="a.png"\r\n\r\nx'
FIELD = b'Content-Disposition: form-data; name="top_k"\r\n\r\n2'


@pytest.mark.parametrize(
    "body",
    [
        b"x" * 1000, form(), form(FIELD), form(FILE, FILE), form(FILE, FIELD, FIELD),
        form(FILE, *[FIELD.replace(b"top_k", b"%d" % n) for n in range(5000)]),
        form(FILE, end=b""), form(FILE, FIELD.replace(b"top_k", b"url")), form(b"A: b\r\n\r\nx"),
        form(FILE, FIELD.replace(b"2", b"\xff")), form(b"A: " + b"a" * 5000 + b"\r\n\r\nx"),
        form(b"A: a\r\n" * 100 + b"\r\nx"), form(FILE.replace(b'"a"', b'""')[:10]),
        b"\r\n" * 5000 + b"x", form(FILE.replace(b"form-data", b"attachment")),
        form(FILE, FIELD, FIELD.replace(b"top_k", b"seen"), FIELD.replace(b"top_k", b"x"), FIELD),
    ],
)  # fmt: skip
def test_forms_of_another_kind_are_refused(client: Client, body: bytes) -> None:
    answer = client.post(body, headers={"content-type": "multipart/form-data; boundary=b"})
    assert code(answer) == BAD
    assert client.service.asks == []
    good = form(FILE, FIELD)
    kind = {"content-type": 'multipart/form-data; boundary="b"'}
    assert len(client.post(good, headers=kind).json()["predictions"]) == 2


def spoken(
    client: Client, more: list[tuple[bytes, bytes]], close: bool = True, **scope: Any
) -> tuple[int, dict]:
    """Status and JSON of the answer to headers as they are, as no client would send them."""
    sent: list[Any] = []

    async def receive() -> Any:
        if given:
            return given.pop()
        return await asyncio.Event().wait()

    async def send(message: Any) -> None:
        sent.append(message)

    given = [{"type": "http.request", "body": b"x", "more_body": False}]
    usual = {"type": "http", "method": "POST", "path": "/predict", "query_string": b"",
             "http_version": "1.1", "headers": [(b"host", b"localhost"), *more]}  # fmt: skip
    asyncio.run(client.front(usual | scope, receive, send))
    assert ((b"connection", b"close") in sent[0]["headers"]) is close
    return sent[0]["status"], json.loads(b"".join(one.get("body", b"") for one in sent))


LENGTH, CHUNKED = (b"content-length", b"1"), (b"transfer-encoding", b"chunked")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ([LENGTH, LENGTH], 400), ([LENGTH, CHUNKED], 400), ([CHUNKED, CHUNKED], 400),
        ([(b"content-length", b"-1")], 400), ([(b"content-length", b"1 ")], 400),
        ([(b"content-length", b"9" * 16)], 400), ([(b"content-length", b"")], 400),
        ([(b"transfer-encoding", b"gzip, chunked")], 400), ([(b"host", b"localhost")], 400),
        ([(b"transfer-encoding", b"chunked, chunked")], 400),
        ([LENGTH, (b"content-type", b"image/png"), (b"content-type", b"image/png")], 400),
        ([LENGTH, (b"a", b"b" * 33_000)], 431), ([LENGTH, *[(b"a", b"b")] * 100], 431),
    ],
)  # fmt: skip
def test_no_server_below_is_trusted_with_framing(headers: Any, status: int) -> None:
    client = Client()
    assert spoken(client, headers)[0] == status
    assert client.service.asks == []
    assert client.front.held.bytes == 0


def test_chunks_and_a_missing_host_belong_to_one_version_each() -> None:
    assert spoken(Client(), [CHUNKED], http_version="1.0")[0] == 400
    assert spoken(Client(local=False), [], headers=[LENGTH])[0] == 400
    assert spoken(Client(), [], headers=[LENGTH], http_version="1.0", close=False)[0] == 200


@pytest.mark.parametrize(
    ("host", "fine"),
    [
        ("localhost", True), ("localhost:8000", True), ("LOCALHOST", True), ("127.0.0.1:1", True),
        ("127.1.2.3", True), ("[::1]:8000", True), ("[::1]", True), ("evil.example", False),
        ("127.0.0.1.evil.example", False), ("localhost.evil.example", False), ("", False),
        ("192.168.0.1", False), ("[::2]", False), ("localhost:x", False), ("[::1]x", False),
        ("localhost@evil.example", False), ("0.0.0.0", False), ("localhost:80:80", False),
    ],
)  # fmt: skip
def test_on_this_computer_only_its_own_names_are_answered_to(host: str, fine: bool) -> None:
    answer = Client().post(headers={"host": host})
    assert (answer.status_code == 200) is fine
    assert fine or code(answer) == "wrong_host"
    assert Client(local=False).post(headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    ("headers", "fine"),
    [
        ({"origin": "http://localhost"}, True), ({"origin": "https://localhost"}, True),
        ({"sec-fetch-site": "same-origin"}, True), ({"sec-fetch-site": "none"}, True),
        ({"origin": "http://evil.example"}, False), ({"origin": "null"}, False),
        ({"origin": "http://localhost:3000"}, False), ({"sec-fetch-site": "cross-site"}, False),
        ({"sec-fetch-site": "same-site"}, False),
        ({"sec-fetch-site": "cross-site", "origin": "http://localhost"}, False),
    ],
)  # fmt: skip
def test_pages_from_elsewhere_cannot_use_it(headers: dict[str, str], fine: bool) -> None:
    for local in (True, False):
        client = Client(local=local)
        answer = client.post(headers=headers)
        assert (answer.status_code == 200) is fine
        assert fine or code(answer) == "cross_origin"
        assert client("GET", "/", headers=headers).status_code == 200
        assert "access-control-allow-origin" not in answer.headers


def test_a_token_guards_everything_but_the_page_and_the_probes() -> None:
    client = Client(token="open sesame".replace(" ", "-"))
    right = {"authorization": "Bearer open-sesame"}
    for path in ("/info", "/metrics", "/openapi.json"):
        for wrong in ({}, {"authorization": "Bearer x"}, {"authorization": "Basic open-sesame"},
                      {"authorization": "Bearer ü".encode()}):  # fmt: skip
            answer = client("GET", path, headers=wrong)
            assert code(answer) == "unauthorised"
            assert answer.headers["www-authenticate"] == "Bearer"
        assert client("GET", path, headers=right).status_code == 200
    assert code(client.post()) == "unauthorised"
    assert client.post(headers=right).status_code == 200
    for path in ("/", "/livez", "/readyz"):
        assert client("GET", path).status_code == 200


def test_a_full_service_refuses_by_the_head_alone() -> None:
    client = Client()
    client.service.room = False
    for length in (10, SHORT, SHORT + 1):  # a short body is taken in, and the connection goes on
        answer = client.post(b"x" * length)
        assert code(answer) == "busy"
        assert answer.headers["retry-after"] == "3"
        assert ("connection" in answer.headers) == (length > SHORT)

    async def never() -> Any:
        raise AssertionError("the body was read")

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http", "method": "POST", "path": "/predict", "query_string": b"",
        "http_version": "1.1", "headers": [(b"host", b"localhost")],
    }  # fmt: skip
    asyncio.run(client.front(scope, never, send))
    assert sent[0]["status"] == 503
    assert client.service.asks == []


def test_all_bodies_together_have_a_limit_and_give_their_bytes_back() -> None:
    client = Client(limits=Limits(body=100, held=150))
    assert code(client.post(b"x" * 101)) == "too_large"
    client.front.held.take(100)
    assert code(client.post(b"x" * 60)) == "busy"
    assert client.post(b"x" * 50).status_code == 200
    assert client.front.held.bytes == 100


@QUICKLY
@given(pieces=st.lists(st.integers(0, 60), min_size=1, max_size=8), limit=st.integers(1, 120))
def test_a_body_in_pieces_counts_as_a_whole(client: Client, pieces: list[int], limit: int) -> None:
    client.front.limits = Limits(body=limit, held=1000)

    async def body() -> Any:
        for size in pieces:
            yield b"x" * size

    answer = client("POST", "/predict", content=body())
    whole = sum(pieces)
    assert answer.status_code == (413 if whole > limit else 200 if whole else 400)
    assert client.front.held.bytes == 0


def test_a_fault_tells_the_log_and_not_the_client(client: Client) -> None:
    client.service.fault = RuntimeError("in /secret/place at 0x7f00")
    answer = client.post()
    assert code(answer) == "internal"
    assert "secret" not in answer.text
    assert "Traceback" not in answer.text
    assert "/secret/place" in client.log()[0]["fault"]


def test_nothing_that_was_sent_comes_back_raw(client: Client) -> None:
    client.service.bad.add(b"html")
    answer = client.post(b"html")
    assert code(answer) == "unreadable"
    assert answer.json()["error"]["message"] == "this is\\nHTML \\x1b[31m"
    told = client("GET", "/%0a%1b[31m<script>", headers={"x-request-id": "mine"})
    assert "script" not in told.text
    assert told.headers["x-request-id"] != "mine"
    lines = client.stream.getvalue
    assert client.log()[0]["picture"] == hashlib.sha256(b"html").hexdigest()
    assert len(lines().splitlines()) == 2
    assert re.fullmatch(r"[\n -~]*", lines())


def test_the_log_has_one_line_per_request(client: Client) -> None:
    client.post(b"abc")
    client.post(b"")
    client("GET", "/livez")
    first, second, third = client.log()
    assert first["picture"] == hashlib.sha256(b"abc").hexdigest()
    told = {"method": "POST", "path": "/predict", "status": 200, "code": "ok", "bytes": 3,
            "format": "PNG", "width": 4, "height": 3, "queue_ms": 100.0, "decode_ms": 200.0,
            "compute_ms": 300.0, "batch": 1}  # fmt: skip
    assert told.items() <= first.items()
    assert (second["status"], second["code"]) == (400, "empty")
    assert (third["path"], third["status"]) == ("/livez", 200)
    assert len({one["id"] for one in (first, second, third)}) == 3


def test_a_log_that_cannot_be_written_changes_nothing() -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    front = create_app(Held(), PAGE, log=Log(Full()))  # type: ignore[arg-type]
    client = Client()
    client.front = front
    assert [client.post().status_code for _ in range(3)] == [200] * 3
    front.log.close()


def test_readiness_follows_the_service_and_the_end(client: Client) -> None:
    assert client("GET", "/readyz").json() == {"ok": True}
    client.service.problem = "three deaths"
    assert code(client("GET", "/readyz")) == "not_ready"
    assert client("GET", "/livez").status_code == 200
    client.service.problem, client.front.draining = None, True
    answer = client("GET", "/readyz")
    assert code(answer) == "draining"
    assert answer.headers["connection"] == "close"
    assert client.post().status_code == 200  # what still comes is answered


def test_metrics_count_what_happened(client: Client) -> None:
    client.post()
    client.service.room = False
    client.post()
    client("GET", "/nowhere")
    client.service.restarts = 3
    for name in ("queue", "decode", "compute", "batch"):
        client.front.metrics.observe(name, 1.0)
    answer = client("GET", "/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    for line in (
        'crosspatch_requests_total{path="/predict",status="200"} 1.0',
        'crosspatch_requests_total{path="/predict",status="503"} 1.0',
        'crosspatch_requests_total{path="other",status="404"} 1.0',
        "crosspatch_shed_total 1.0", "crosspatch_worker_restarts_total 3.0",
        "crosspatch_queue_limit 8.0", "crosspatch_ready 1.0",
        "crosspatch_request_seconds_count 1.0",
        "crosspatch_queue_seconds_count 1.0", "crosspatch_decode_seconds_count 1.0",
        "crosspatch_compute_seconds_count 1.0", "crosspatch_batch_pictures_count 1.0",
    ):  # fmt: skip
        assert line in answer.text.splitlines()
    assert f'bundle="{"f" * 64}"' in answer.text


def test_a_batch_is_answered_in_order_and_a_bad_picture_fails_alone() -> None:
    client = Client(batch_api=True)
    client.service.bad.add(b"2")
    files = [(f"n{n}", (f"{n}.png", b"%d" % n)) for n in range(16)]
    answer = client("POST", "/predict/batch", files=files)
    assert answer.status_code == 200
    rows = answer.json()["answers"]
    assert [("error" in row) for row in rows] == [n == 2 for n in range(16)]
    assert rows[2]["error"]["code"] == "unreadable"
    assert sorted(ask.body for ask in client.service.asks) == sorted(b"%d" % n for n in range(16))
    (told,) = client.log()
    assert (told["pictures"], told["failed"]) == (16, 1)
    expected = [hashlib.sha256(b"%d" % n).hexdigest() for n in range(16) if n != 2]
    assert told["picture"] == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"files": [(f"{n}", (f"{n}", b"x")) for n in range(17)]}, BAD),
        ({"files": {"a": b"x"}, "data": {"top_k": "1"}}, BAD),
        ({"content": b"raw"}, "not_supported"),
        ({"content": b"", "headers": {"content-type": "multipart/form-data; boundary=b"}}, "empty"),
    ],
)
def test_batches_of_another_kind_are_refused(given: dict[str, Any], expected: str) -> None:
    client = Client(batch_api=True)
    assert code(client("POST", "/predict/batch", **given)) == expected
    assert client.service.asks == []


def test_a_deadline_counts_from_the_head(client: Client) -> None:
    import time

    before = time.monotonic()
    client.post(headers={"x-timeout-ms": "2000"})
    client.post()
    first, second = (ask.deadline - before for ask in client.service.asks)
    assert 2 <= first < 4
    assert 10 <= second < 14


def test_the_page_may_run_its_own_scripts_and_nothing_else(client: Client) -> None:
    answer = client("GET", "/")
    assert answer.content == PAGE
    policy = answer.headers["content-security-policy"]
    hashed = base64.b64encode(hashlib.sha256(b"let a").digest()).decode()
    assert f"script-src 'sha256-{hashed}';" in policy
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "script-src 'none'" in page_policy(b"<p>no script")


def test_info_tells_what_is_served(client: Client) -> None:
    told = client("GET", "/info").json()
    assert told["classes"] == ["red", "green", "blue"]
    assert told["limits"] == {
        "bytes": 10_000_000, "pixels": 1000, "side": 100, "formats": ["PNG"],
    }  # fmt: skip
    assert "secret" not in json.dumps(told)
