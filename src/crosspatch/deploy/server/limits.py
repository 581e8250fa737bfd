# SPDX-License-Identifier: Apache-2.0
"""How much a request may take of this machine, and reading a body within that.

Every number is checked before anything parses what was sent: from Content-Length where there is
one, and while the body comes in. All bodies together have a limit too, so that many slow senders
cannot fill the memory that one could not.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from crosspatch.deploy.server.refusals import Refused, busy

Receive = Callable[[], Awaitable[Any]]
SEVERAL = 4
"""How many times the limit of one body a batch of pictures may be."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bytes: body (of one request; a batch may have SEVERAL times as many), held (of all bodies at
    once), head (request line and headers). Numbers: fields (headers), parts (of a form), batch
    (pictures of a batch), pieces (that a body may come in), connections. Seconds: head_seconds,
    body_seconds (to receive them), idle (between requests), linger (that a refused client may be
    silent before it is cut). timeout_ms: milliseconds for an answer, where a request does not
    say."""

    body: int = 10_000_000
    held: int = 64_000_000
    head: int = 32_768
    fields: int = 100
    parts: int = 4
    batch: int = 16
    pieces: int = 16_384
    connections: int = 1000
    head_seconds: float = 8.0
    body_seconds: float = 8.0
    idle: int = 5
    linger: float = 1.0
    timeout_ms: int = 10_000


class Left(Exception):
    """The client has gone: nobody wants an answer."""


class Held:
    """The bytes of all bodies that are in memory now; limit: the most there may be."""

    def __init__(self, limit: int) -> None:
        self.limit, self.bytes = limit, 0

    def take(self, count: int) -> None:
        """Raises Refused (busy) where `count` more are too many; else they are taken."""
        if self.bytes + count > self.limit:
            raise busy(1.0)
        self.bytes += count

    def give(self, count: int) -> None:
        """`count` bytes are free again."""
        self.bytes -= count


class Body:
    """A request's body as it comes in. length: what it was announced with, None of one in chunks;
    limit: the most bytes it may have; `taken`: bytes of `held` that it occupies."""

    def __init__(self, held: Held, length: int | None, limit: int) -> None:
        self.held, self.limit, self.taken = held, limit, 0
        if length is not None:
            if length > limit:
                raise too_large(limit)
            self._take(length)

    def _take(self, count: int) -> None:
        self.held.take(count)
        self.taken += count

    async def read(self, receive: Receive, seconds: float) -> bytes:
        """The whole of it. Raises Refused when it is too large or takes longer than `seconds`, Left
        when the client goes."""
        try:
            async with asyncio.timeout(seconds):
                return await self._whole(receive)
        except TimeoutError:
            raise Refused(
                "timeout_body",
                f"the body was not complete after {seconds:g} s",
                "send it faster, or send a smaller picture",
            ) from None

    async def _whole(self, receive: Receive) -> bytes:
        parts: list[bytes] = []
        count = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise Left
            part = message.get("body", b"")
            count += len(part)
            if count > self.limit:
                raise too_large(self.limit)
            if count > self.taken:
                self._take(count - self.taken)
            parts.append(part)
            if not message.get("more_body", False):
                return parts[0] if len(parts) == 1 else b"".join(parts)

    def free(self) -> None:
        """The bytes are not in memory any more."""
        self.held.give(self.taken)
        self.taken = 0


async def hear_out(receive: Receive, limits: Limits) -> None:
    """Take in and forget what a refused client still sends, so that it reads the refusal instead of
    finding the connection broken: until it is silent, and not for long."""
    most = SEVERAL * limits.body
    try:
        async with asyncio.timeout(limits.body_seconds):
            while most > 0:
                async with asyncio.timeout(limits.linger):
                    message = await receive()
                if message["type"] == "http.disconnect" or not message.get("more_body", False):
                    return
                most -= len(message.get("body", b""))
    except TimeoutError:
        return


async def taken(receive: Receive, seconds: float) -> bool:
    """Take in and forget a short body; whether the whole of it came within `seconds`."""
    try:
        async with asyncio.timeout(seconds):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return False
                if not message.get("more_body", False):
                    return True
    except TimeoutError:
        return False


def too_large(limit: int) -> Refused:
    """The body has more bytes than one may have."""
    return Refused(
        "too_large",
        f"the body is larger than {limit:,} bytes",
        "send a smaller picture: the model looks at a small one anyway",
    )
