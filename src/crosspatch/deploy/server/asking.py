# SPDX-License-Identifier: Apache-2.0
"""From a request to an `Ask`, and from an `Answer` to JSON.

A client that leaves takes its ask back.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import os
import random
import re
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

from crosspatch.deploy.server.forms import form_picture, json_picture
from crosspatch.deploy.server.heads import FORM, JSON, Head
from crosspatch.deploy.server.limits import Left, Limits, Receive
from crosspatch.deploy.server.refusals import Refused
from crosspatch.deploy.server.service import Answer, Ask, Service
from crosspatch.errors import visible

T = TypeVar("T")
TOP = 5
"""Classes in an answer where nothing is asked."""
GUILTY = ("unreadable", "too_many_pixels", "not_supported", "decoder_died")
"""Codes that are about the picture itself."""
MOST = 100_000
"""Classes that may be asked for; a model gives as many as it has."""


_ids = random.Random(os.urandom(16))


def new_id() -> str:
    """Of a request: 16 hexadecimal digits, to be found again in the log. It is no secret, and to
    ask the system for each was a tenth of what a refusal costs."""
    return f"{_ids.getrandbits(64):016x}"


class Exchange:
    """One request on its way. id: for the answer and the log; arrived: seconds of time.monotonic;
    body: once it is read; code: "ok" or of the error; told: what the log says besides."""

    __slots__ = ("arrived", "body", "code", "head", "id", "receive", "told")

    def __init__(self, receive: Receive) -> None:
        self.id = new_id()
        self.arrived = time.monotonic()
        self.receive = receive
        self.head = Head(None, False, "", {})
        self.body = b""
        self.code = "ok"
        self.told: dict[str, Any] = {}


async def ask(service: Service, exchange: Exchange, given: Ask) -> Answer:
    """The service's answer. Raises Refused, and Left when the client goes first: its place in the
    queue is free then."""
    return await _unless_left(exchange, service.answer(given))


async def ask_all(service: Service, exchange: Exchange, given: list[Ask]) -> list[Answer | Refused]:
    """An answer or a refusal to each, in their order; half of the queue is left to others. Raises
    Left."""
    places = asyncio.Semaphore(max(1, service.limit // 2))

    async def one(asked: Ask) -> Answer | Refused:
        async with places:
            try:
                return await service.answer(asked)
            except Refused as refused:
                return refused

    async def together() -> list[Answer | Refused]:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(asked)) for asked in given]
        return [task.result() for task in tasks]

    return await _unless_left(exchange, together())


async def _unless_left(exchange: Exchange, work: Coroutine[Any, Any, T]) -> T:
    """What `work` gives; cancelled, and Left raised, when the client goes first."""
    try:
        async with asyncio.timeout(None) as patience:
            leaving = asyncio.create_task(_watch(exchange.receive, patience))
            try:
                return await work
            finally:
                leaving.cancel()
    except TimeoutError:
        if patience.expired():
            raise Left from None
        raise


async def _watch(receive: Receive, patience: asyncio.Timeout) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    patience.reschedule(0)


def picture_of(exchange: Exchange, limits: Limits) -> tuple[bytes, dict[str, int]]:
    """(the picture in a request's body, the numbers that a form or JSON has beside it). Raises
    Refused."""
    head, body = exchange.head, exchange.body
    fields: dict[str, Any] = {}
    if body and head.kind == FORM:
        body, fields = form_picture(head.fields[b"content-type"], body, limits.parts)
    elif body and head.kind == JSON:
        body, fields = json_picture(body)
    if not body:
        raise Refused("empty", "there is no picture in the request", "curl --data-binary @cat.jpg")
    return body, {name: _number(name, value) for name, value in fields.items()}


def _number(name: str, value: Any) -> int:
    known = {"top_k": (1, MOST), "explain": (0, 1), "seen": (0, 1)}
    if name not in known:
        raise Refused(
            "bad_request",
            f"{name[:40]!r} is no field of a request",
            f"the fields beside the picture are {', '.join(known)}; addresses are never fetched",
        )
    low, high = known[name]
    if isinstance(value, str) and re.fullmatch("[0-9]{1,9}", value):
        value = int(value)
    if isinstance(value, float) and value.is_integer():  # to JSON, 3.0 is the number 3
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise Refused("bad_request", f"{name} is out of range", f"a number from {low} to {high}")
    return value


def deadline(exchange: Exchange, milliseconds: int) -> float:
    """When nobody wants the answer any more, in seconds of time.monotonic."""
    return exchange.arrived + milliseconds / 1000


def told(answer: Answer) -> dict[str, Any]:
    """What the log says of an answer."""
    return {
        "picture": answer.picture, "format": answer.format,
        "width": answer.width, "height": answer.height,
        "queue_ms": _ms(answer.queue), "decode_ms": _ms(answer.decode),
        "compute_ms": _ms(answer.compute), "batch": answer.batch,
    }  # fmt: skip


def told_refused(refused: Refused, body: bytes) -> dict[str, Any]:
    """What the log says of a picture that is at fault: which one it was."""
    if refused.code not in GUILTY:
        return {}
    return {"picture": hashlib.sha256(body).hexdigest(), "reason": visible(refused.message)[:200]}


def told_all(found: list[Answer | Refused]) -> dict[str, Any]:
    """What the log says of the answers to a batch."""
    answers = [one for one in found if isinstance(one, Answer)]
    return {
        "pictures": len(found),
        "failed": len(found) - len(answers),
        "picture": [one.picture for one in answers],
    }


def prediction(answer: Answer, exchange: Exchange, bundle: str) -> dict[str, Any]:
    """An answer as JSON has it. bundle: sha256 of what answered."""
    several = {} if answer.labels is None else {"labels": _pairs(answer.labels)}
    seen = answer.seen
    shown = "" if seen is None else base64.b64encode(seen).decode()
    return {
        "request_id": exchange.id,
        "bundle": bundle,
        "predictions": _pairs(answer.predictions),
        **several,
        "confidence": round(answer.confidence, 6),
        "abstain": bool(answer.abstain),
        "threshold": answer.threshold,
        "image": {"width": answer.width, "height": answer.height, "format": answer.format},
        "timing_ms": {
            "queue": _ms(answer.queue),
            "decode": _ms(answer.decode),
            "compute": _ms(answer.compute),
            "total": _ms(time.monotonic() - exchange.arrived),
        },
        "batch": answer.batch,
        **({"seen": f"data:image/png;base64,{shown}"} if shown else {}),
        **({} if answer.patches is None else {"patches": answer.patches}),
    }


def _pairs(pairs: list[tuple[str, float]]) -> list[dict[str, Any]]:
    return [{"class": name, "probability": round(p, 6)} for name, p in pairs]


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 3)
