# SPDX-License-Identifier: Apache-2.0
"""uvicorn's HTTP protocol with the limits that have to hold below ASGI.

A request line and headers that never end, bytes that are no HTTP, a body in a million pieces, a
client that opens a connection and says nothing: none of it reaches an application, so it is timed,
counted and answered here, in the one shape of errors.
"""

from __future__ import annotations

import asyncio
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from crosspatch.deploy.server.asking import new_id
from crosspatch.deploy.server.errors import CAREFUL, CLOSED, render
from crosspatch.deploy.server.front import ANSWERED, Front
from crosspatch.deploy.server.heads import headers_too_large
from crosspatch.deploy.server.limits import SEVERAL
from crosspatch.deploy.server.refusals import Refused, busy

PIPELINED = 16
"""Requests that may wait on one connection behind the one that is answered."""


class Protocol(HttpToolsProtocol):
    """One connection. The application of its configuration is a Front."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        front = self.config.loaded_app
        assert isinstance(front, Front)
        self.front, self.allowed = front, front.limits
        self.heading = True  # the head of a request is awaited or comes in
        self.head_bytes = self.pieces = self.empty = self.forgotten = 0
        self.refused = False  # what still comes is forgotten
        self.alarm: asyncio.TimerHandle | None = None
        self.deaf: asyncio.TimerHandle | None = None
        self.running: Any = None  # the request that is answered now, or was last

    def connection_made(self, transport: Any) -> None:
        """Counts and times it."""
        super().connection_made(transport)
        if len(self.connections) > self.allowed.connections:
            self._refuse(busy(self.front.service.wait))
            return
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has gone."""
        self._unwatch()
        if self.deaf is not None:
            self.deaf.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Feeds the parser; after a refusal what comes is forgotten, up to a limit."""
        if self.refused:
            self.forgotten += len(data)
            if self.forgotten > SEVERAL * self.allowed.body:
                self.transport.close()
            return
        self._unset_keepalive_if_required()
        if self.heading:
            self.head_bytes += len(data)
        before = self.pieces
        try:
            self.parser.feed_data(data)  # type: ignore[union-attr]
        except httptools.HttpParserUpgrade:
            self.cycle.keep_alive = False  # answered as if nothing had been asked for, then closed
        except httptools.HttpParserError:
            self._refuse(self._complaint())
        else:
            self._weigh(len(data), before)

    def _complaint(self) -> Refused:
        """Why the parser stopped."""
        if self.headers is not None and len(self.headers) > self.allowed.fields:
            return headers_too_large(self.allowed)
        if self.pieces > self.allowed.pieces:
            return _malformed("the body comes in too many pieces")
        if len(self.pipeline) >= PIPELINED:
            return _malformed("too many requests at once on one connection")
        return _malformed()

    def _weigh(self, count: int, before: int) -> None:
        """What came was understood; it may still be too much, or the beginning of too little."""
        if not self.heading:  # between the pieces of a body lie lengths, extensions and trailers
            self.empty = self.empty + count if self.pieces == before else 0
            if self.empty > self.allowed.head:
                self._refuse(_malformed("there is too much between the pieces of the body"))
        elif self.head_bytes > self.allowed.head:
            self._refuse(headers_too_large(self.allowed))
        elif self.alarm is None and self._idle:
            self._watch()

    @property
    def _idle(self) -> bool:
        return self.running is None or self.running.response_complete

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        self.running = cycle
        super()._start_asgi_task(cycle, app)

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header, or one behind a body."""
        super().on_header(name, value)
        if len(self.headers) > self.allowed.fields:
            raise ValueError("too many headers")  # the parser stops and says so to data_received

    def on_headers_complete(self) -> None:
        """The head is whole: no longer timed."""
        if len(self.pipeline) >= PIPELINED:
            raise ValueError("too many requests")
        self._unwatch()
        self.heading, self.pieces, self.empty = False, 0, 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A piece of a body."""
        self.pieces += 1
        if self.pieces > self.allowed.pieces:
            raise ValueError("too many pieces")
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The next bytes are another request's head."""
        self.heading, self.head_bytes = True, 0
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Answered. What was refused behind it in the same connection gets no answer of its own."""
        if self.refused:
            self.server_state.total_requests += 1
            self.transport.close()
            return
        super().on_response_complete()

    def pause_writing(self) -> None:
        """The client does not read: not for long."""
        super().pause_writing()
        self.deaf = self.loop.call_later(self.allowed.body_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """The client reads."""
        if self.deaf is not None:
            self.deaf.cancel()
            self.deaf = None
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """In our shape, should uvicorn ever refuse something by itself."""
        self._refuse(_malformed())

    def _watch(self) -> None:
        """From now on a head has to come in time."""
        self.alarm = self.loop.call_later(self.allowed.head_seconds, self._late)

    def _unwatch(self) -> None:
        if self.alarm is not None:
            self.alarm.cancel()
            self.alarm = None

    def _late(self) -> None:
        if not self.head_bytes:  # a connection without a request
            self.transport.close()
            return
        seconds = self.allowed.head_seconds
        self._refuse(
            Refused(
                "timeout_headers",
                f"the headers were not complete after {seconds:g} s",
                "send them faster",
            )
        )

    def _refuse(self, refused: Refused) -> None:
        """Answers, and closes once the client has had the time to read it.

        An answer that is owed to an earlier request goes first, and is the last.
        """
        if self.refused or self.transport.is_closing():
            return
        self.refused = True
        self._unwatch()
        guilty: Any = None if self.heading else self.cycle  # whose body is wrong
        if not self._idle and (self.running is not guilty or guilty.response_started):
            self.pipeline.clear()
            self.running.keep_alive = False
            return
        if self._idle and guilty is not None:  # it has its answer
            self.transport.close()
            return
        if guilty is not None:
            guilty.scope[ANSWERED] = guilty.disconnected = True
            guilty.message_event.set()
        self._answer(refused)

    def _answer(self, refused: Refused) -> None:
        number = new_id()
        headers, body = render(refused, number)
        headers = [*headers, *CAREFUL, *CLOSED, (b"connection", b"close")]
        lines = [b"%b: %b\r\n" % header for header in headers]
        self.transport.write(b"".join([STATUS_LINE[refused.status], *lines, b"\r\n", body]))
        self.front.note_refused(refused, number)
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._fade(-1, self.loop.time() + self.allowed.body_seconds)

    def _fade(self, heard: int, end: float) -> None:
        """Closes once the client has been silent for a while, and at `end` at the latest."""
        if self.forgotten == heard or self.loop.time() >= end:
            self.transport.close()
        elif not self.transport.is_closing():
            self.loop.call_later(self.allowed.linger, self._fade, self.forgotten, end)


def _malformed(message: str = "this is no valid HTTP request") -> Refused:
    return Refused("bad_request", message, "use an HTTP client, such as curl")
