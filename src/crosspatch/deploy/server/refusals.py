# SPDX-License-Identifier: Apache-2.0
"""Why an ask gets no answer: a code, the HTTP status that goes with it, what happened, what to do.

The words are for whoever sent the picture: they hold no path, no address and nothing of a stack.
"""

from __future__ import annotations

import math

STATUS = {
    "empty": 400,
    "bad_request": 400,
    "unauthorised": 401,
    "cross_origin": 403,
    "not_found": 404,
    "method": 405,
    "timeout_body": 408,
    "timeout_headers": 408,
    "too_large": 413,
    "not_supported": 415,
    "wrong_host": 421,
    "unreadable": 422,
    "too_many_pixels": 422,
    "headers_too_large": 431,
    "internal": 500,
    "decoder_died": 500,
    "busy": 503,
    "draining": 503,
    "not_ready": 503,
    "deadline": 504,
}
"""Code -> HTTP status."""


class Refused(Exception):
    """An ask that gets no answer. code: one of STATUS; message: what happened; hint: what to do;
    retry_after: whole seconds after which it is worth another try, None where that is no use."""

    def __init__(self, code: str, message: str, hint: str, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status, self.code = STATUS[code], code
        self.message, self.hint, self.retry_after = message, hint, retry_after


def busy(seconds: float) -> Refused:
    """There is no room; seconds: how long what is waiting will take."""
    after = max(1, math.ceil(min(seconds, 60.0)))
    return Refused(
        "busy",
        "as many pictures are waiting as can be answered in time",
        f"try again in {after} s, or send fewer at a time",
        after,
    )


def draining() -> Refused:
    """The server is about to end."""
    return Refused("draining", "the server is shutting down", "try again where another one runs", 5)


def late() -> Refused:
    """The deadline is over."""
    return Refused(
        "deadline",
        "the answer was not ready before the deadline of the request",
        "allow more time, or send fewer pictures at a time",
    )


def decoder_died() -> Refused:
    """The process that decoded the picture ended."""
    return Refused(
        "decoder_died",
        "the process that decoded this picture ended before it was done",
        "try once more; if it happens again, the picture is at fault: save it anew",
    )


def too_slow() -> Refused:
    """The picture took more time than one may take."""
    return Refused(
        "unreadable",
        "this picture takes too long to decode",
        "save it anew, with fewer pixels",
    )


def broken_engine() -> Refused:
    """The engine failed, or gave what is no number."""
    return Refused(
        "internal",
        "the model gave no usable answer to this picture",
        "check the bundle with crosspatch verify",
    )
