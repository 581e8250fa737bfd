# SPDX-License-Identifier: Apache-2.0
"""What the head of a request alone says against it, before a byte of its body is read.

Framing that two programs could understand differently (two lengths, a length beside chunks) is
refused, as request smuggling needs it. A server on this computer answers to names of this computer
alone, so that a page from elsewhere cannot reach it by a name that it lets point here (DNS
rebinding), and takes pictures from no page but its own: browsers say where a request comes from.
"""

from __future__ import annotations

import hmac
import ipaddress
from typing import Any, NamedTuple

from crosspatch.deploy.server.limits import Limits
from crosspatch.deploy.server.refusals import Refused

SINGLE = {
    b"host", b"content-length", b"content-type", b"content-encoding", b"transfer-encoding",
    b"authorization", b"origin", b"x-timeout-ms",
}  # fmt: skip
"""Headers that mean nothing when they come twice."""
RAW = ("", "application/octet-stream", "application/x-www-form-urlencoded")
"""Types of a body that is a picture file as it is, beside image/*. The last is what `curl
--data-binary` says of everything."""
SHORT = 65_536  # bytes
FORM, JSON = "multipart/form-data", "application/json"


class Head(NamedTuple):
    """length: bytes announced, None where none are; chunked: the body comes in chunks; kind: the
    media type in lower case, "" without one; fields: header -> its value."""

    length: int | None
    chunked: bool
    kind: str
    fields: dict[bytes, bytes]

    @property
    def announces(self) -> bool:
        """Whether a body is to come."""
        return self.chunked or bool(self.length)

    @property
    def short(self) -> bool:
        """Whether the body is known to be so small that taking it in costs less than a new
        connection."""
        return self.length is not None and self.length <= SHORT


def read_head(scope: dict[str, Any], limits: Limits) -> Head:
    """The head of a request. Raises Refused where it is too large or makes no sense."""
    fields: dict[bytes, bytes] = {}
    size = len(scope.get("raw_path") or b"") + len(scope["query_string"])
    for name, value in scope["headers"]:
        size += len(name) + len(value) + 4
        if name in fields and name in SINGLE:
            raise _bad(f"the header {name.decode()} came twice", "send it once")
        fields[name] = value
    if size > limits.head or len(scope["headers"]) > limits.fields:
        raise headers_too_large(limits)
    if b"host" not in fields and scope.get("http_version") != "1.0":
        raise _bad("the header Host is missing", "send Host: localhost")
    coding, length = fields.get(b"transfer-encoding"), fields.get(b"content-length")
    if coding is not None:
        if length is not None:
            raise _bad("Content-Length and Transfer-Encoding came together", "send one of them")
        if coding.strip().lower() != b"chunked" or scope.get("http_version") == "1.0":
            raise _bad("an unknown Transfer-Encoding", "send Content-Length, or chunks in HTTP/1.1")
    if length is not None and not (length.isdigit() and len(length) <= 15):
        raise _bad("Content-Length is no number of bytes", "send the number of bytes of the body")
    kind = fields.get(b"content-type", b"").split(b";", 1)[0].strip().lower()
    known = None if length is None else int(length)
    return Head(known, coding is not None, kind.decode("latin-1"), fields)


def headers_too_large(limits: Limits) -> Refused:
    """Request line and headers are more than they may be."""
    return Refused(
        "headers_too_large",
        f"the headers are larger than {limits.head:,} bytes, or more than {limits.fields}",
        "send fewer and shorter headers",
    )


def check_host(head: Head) -> None:
    """For a server that listens on this computer alone: raises Refused (wrong_host) for a request
    that was sent to another name than one of this computer's."""
    host = head.fields.get(b"host")
    if host is not None and not is_local(_name(host.decode("latin-1"))):
        raise Refused(
            "wrong_host",
            "this server answers to localhost, 127.0.0.1 and [::1], and the request names another",
            "use one of these names, or start the server with --host",
        )


def is_local(name: str) -> bool:
    """Whether a host's name or address always means this computer."""
    if name.lower() in ("localhost", "localhost."):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _name(host: str) -> str:
    """`localhost:8000` -> `localhost`, `[::1]:8000` -> `::1`."""
    if host.startswith("["):
        inside, _, port = host[1:].partition("]")
        return inside if not port or (port[0] == ":" and port[1:].isdigit()) else ""
    name, colon, port = host.partition(":")
    return name if not colon or port.isdigit() else ""


def check_origin(head: Head) -> None:
    """Raises Refused (cross_origin) for what a browser sends on behalf of a page that is not this
    server's own."""
    site = head.fields.get(b"sec-fetch-site", b"same-origin").strip().lower()
    origin = head.fields.get(b"origin")
    foreign = site not in (b"same-origin", b"none")
    if origin is not None and not foreign:
        own = head.fields.get(b"host", b"").strip().lower()
        foreign = origin.strip().lower().partition(b"://")[2] != own or not own
    if foreign:
        raise Refused(
            "cross_origin",
            "a page of another address sent this, and such pages may not use this server",
            "open the server's own page, or send the picture from a program",
        )


def check_token(head: Head, token: str) -> None:
    """Raises Refused (unauthorised) unless `Authorization: Bearer TOKEN` is there."""
    given = head.fields.get(b"authorization", b"")
    kind, _, said = given.partition(b" ")
    if kind.lower() != b"bearer" or not hmac.compare_digest(said.strip(), token.encode()):
        raise Refused(
            "unauthorised",
            "the token is missing or is another one",
            "send the header Authorization: Bearer TOKEN, with the token the server was given",
        )


def check_type(head: Head, batch: bool) -> None:
    """Raises Refused (not_supported) for a body of a type or an encoding that is not read."""
    if head.fields.get(b"content-encoding", b"identity").strip().lower() not in (b"identity", b""):
        raise Refused(
            "not_supported",
            "a compressed body (Content-Encoding) is not read",
            "send the picture file as it is: it is compressed already",
        )
    if batch and head.kind != FORM:
        raise Refused(
            "not_supported",
            "several pictures come as multipart/form-data",
            "curl -F image=@one.jpg -F image=@two.jpg",
        )
    if head.kind not in (*RAW, FORM, JSON) and not head.kind.startswith("image/"):
        raise Refused(
            "not_supported",
            "the Content-Type is none that is read here",
            "send a picture file (image/*), multipart/form-data with one file, or application/json",
        )


def _bad(message: str, hint: str) -> Refused:
    return Refused("bad_request", message, hint)
