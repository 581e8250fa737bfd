# SPDX-License-Identifier: Apache-2.0
"""The layer around FastAPI that sees every request first, as plain ASGI.

Whatever can be refused by a request's head is refused here, at the cost of a tenth of a millisecond
or less: under five times as many requests as can be answered, most of the work is saying no. (A
short body is let in before its sender hears that the server is busy: most of it lies here already,
and the connection, which costs ten times as much as the refusal, can be used again.) Then the body
is read within its limits, and only a whole and allowed request goes on. Every answer gets
its careful headers here, its line in the log and its place in the metrics.
"""

from __future__ import annotations

import asyncio
import time
import traceback
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from crosspatch.deploy.server.asking import Exchange
from crosspatch.deploy.server.errors import CAREFUL, CLOSED, internal, render
from crosspatch.deploy.server.heads import (
    check_host,
    check_origin,
    check_token,
    check_type,
    read_head,
)
from crosspatch.deploy.server.limits import SEVERAL, Body, Held, Left, Limits, hear_out, taken
from crosspatch.deploy.server.logs import Log
from crosspatch.deploy.server.metrics import Metrics
from crosspatch.deploy.server.openapi import OPEN
from crosspatch.deploy.server.refusals import Refused, busy, draining
from crosspatch.deploy.server.service import Service

ANSWERED = "crosspatch.answered"
"""What the protocol below puts into the scope of a request that it refused itself."""
LEFT = 499
"""The status in the log of a request whose client went; it is never sent."""


class Front:
    """ASGI around `inner`. routes: path -> method; local: whether only this computer's names are
    answered to; `draining`: set when the server is about to end."""

    def __init__(
        self,
        inner: Any,
        service: Service,
        routes: Mapping[str, str],
        *,
        limits: Limits,
        token: str | None,
        local: bool,
        metrics: Metrics,
        log: Log,
    ) -> None:
        self.inner, self.service, self.routes = inner, service, routes
        self.limits, self.token, self.local = limits, token, local
        self.metrics, self.log = metrics, log
        self.held = Held(limits.held)
        self.draining = False

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """One request."""
        if scope["type"] != "http":
            return
        exchange = Exchange(receive)
        reply = Reply(send, exchange, self)
        body: Body | None = None
        try:
            reply.unread = True  # of a head that makes no sense nobody knows what follows
            head = exchange.head = self._head(scope)
            reply.unread = head.announces
            method = self._admit(scope, head)
            if method == "POST":
                several = SEVERAL if scope["path"].endswith("batch") else 1
                body = Body(self.held, head.length, several * self.limits.body)
                if head.announces:
                    exchange.body = await body.read(receive, self.limits.body_seconds)
                    reply.unread = False
            await self.inner({**scope, "method": method, "exchange": exchange}, receive, reply)
        except Refused as refused:
            await self._refuse(refused, exchange, reply)
        except Left:
            exchange.code, reply.status = "left", LEFT
        except asyncio.CancelledError:  # the time to finish is over
            await self._refuse(draining(), exchange, reply)
            raise
        except Exception:
            exchange.told["fault"] = traceback.format_exc()
            await self._refuse(internal(), exchange, reply)
        finally:
            if body is not None:
                body.free()
            if ANSWERED not in scope:
                self.note(scope, exchange, reply.status)

    def _head(self, scope: Any) -> Any:
        head = read_head(scope, self.limits)
        if self.local:
            check_host(head)
        return head

    def _admit(self, scope: Any, head: Any) -> str:
        """The method to go on with; raises Refused."""
        path, method = scope["path"], scope["method"]
        takes = self.routes.get(path)
        if takes is None:
            raise Refused("not_found", "there is nothing at this path", _there(self.routes))
        if method != takes and not (method == "HEAD" and takes == "GET"):
            raise Refused("method", f"this path takes {takes} alone", f"send {takes}")
        if self.token is not None and path not in OPEN:
            check_token(head, self.token)
        if takes == "POST":
            check_origin(head)
            check_type(head, path.endswith("batch"))
            if not self.service.room:
                raise busy(self.service.wait)
        return takes

    async def _refuse(self, refused: Refused, exchange: Exchange, reply: Reply) -> None:
        exchange.code = refused.code
        if reply.status:  # a fault in the middle of an answer: uvicorn cuts the connection
            return
        if refused.status == 503 and reply.unread and exchange.head.short:
            reply.unread = not await taken(exchange.receive, self.limits.linger)
        headers, body = render(refused, exchange.id)
        if refused.status == 405:
            takes = refused.hint.removeprefix("send ")
            headers.append((b"allow", b"GET, HEAD" if takes == "GET" else takes.encode()))
        await reply({"type": "http.response.start", "status": refused.status, "headers": headers})
        await reply({"type": "http.response.body", "body": body, "more_body": reply.unread})
        if reply.unread:  # the answer is on its way whole; what is still sent is not to break it
            await hear_out(exchange.receive, self.limits)
            await reply({"type": "http.response.body", "body": b""})

    def note(self, scope: Any, exchange: Exchange, status: int) -> None:
        """A request is over: metrics and log."""
        seconds = time.monotonic() - exchange.arrived
        path = scope["path"]
        known = path in self.routes
        self.metrics.answered(path if known else "other", status, exchange.code, seconds)
        self.log(
            time=now(),
            id=exchange.id,
            method=scope["method"],
            path=path if known else path[:100],
            status=status,
            code=exchange.code,
            bytes=len(exchange.body) or None,
            **exchange.told,
            total_ms=round(1000 * seconds, 3),
        )

    def note_refused(self, refused: Refused, request_id: str) -> None:
        """What was no whole request was answered below ASGI: metrics and log."""
        self.metrics.answered("other", refused.status, refused.code, 0.0)
        self.log(time=now(), id=request_id, status=refused.status, code=refused.code)


class Reply:
    """ASGI's send, with the headers that every answer has. status: 0 until something is sent;
    unread: a body was announced and is not read, so the connection cannot go on."""

    def __init__(self, send: Any, exchange: Exchange, front: Front) -> None:
        self.send, self.exchange, self.front = send, exchange, front
        self.status, self.unread = 0, False

    async def __call__(self, message: Any) -> None:
        """One message of ASGI."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = [*message["headers"], *CAREFUL]
            if not any(name == b"content-security-policy" for name, _ in headers):
                headers += CLOSED
            headers.append((b"x-request-id", self.exchange.id.encode()))
            if self.unread or self.front.draining:
                headers.append((b"connection", b"close"))
            message = {**message, "headers": headers}
        await self.send(message)


def now() -> str:
    """The time as logs have it: UTC, with milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _there(routes: Mapping[str, str]) -> str:
    return "there are " + ", ".join(f"{takes} {path}" for path, takes in routes.items())
