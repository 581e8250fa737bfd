# SPDX-License-Identifier: Apache-2.0
"""The one shape of every error, and the headers of every answer."""

from __future__ import annotations

import json
from typing import Any

from crosspatch.deploy.server.refusals import Refused
from crosspatch.errors import visible

LONGEST = 400  # letters of a message
Headers = list[tuple[bytes, bytes]]
CAREFUL: Headers = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
]
"""In every answer."""
CLOSED: Headers = [(b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'")]
"""In every answer but the page's, which has a policy of its own."""


def error_object(refused: Refused, request_id: str) -> dict[str, Any]:
    """`{"code", "message", "hint", "request_id"}`; control characters are escaped."""
    return {
        "code": refused.code,
        "message": visible(refused.message)[:LONGEST],
        "hint": visible(refused.hint)[:LONGEST],
        "request_id": request_id,
    }


def render(refused: Refused, request_id: str) -> tuple[Headers, bytes]:
    """Headers and body of an error."""
    body = json.dumps({"error": error_object(refused, request_id)}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    if refused.status == 503:
        headers.append((b"retry-after", b"%d" % (refused.retry_after or 1)))
    if refused.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    return headers, body


def internal() -> Refused:
    """Something went wrong here, through no fault of the request."""
    return Refused(
        "internal",
        "a fault of the server",
        "try again; the server's log tells what happened under this request_id",
    )
