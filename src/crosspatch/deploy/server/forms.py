# SPDX-License-Identifier: Apache-2.0
"""Pictures out of bodies that are not simply a picture: forms and JSON.

A body is whole and within its limit when it comes here. Of a form no more parts are read than may
be in it; JSON that could grow in memory is refused by counting its brackets and commas first.
"""

from __future__ import annotations

import base64
import binascii
import json
from typing import Any, NamedTuple, NoReturn

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from crosspatch.deploy.server.refusals import Refused

MARKS = 16  # of { [ , : each in a JSON body that has an image and a few numbers
HEADERS, LINE = 8, 4096  # of one part of a form


class Part(NamedTuple):
    """One part of a form. name: its field; filename: None of a part that is no file."""

    name: str
    filename: str | None
    body: bytes


def read_form(content_type: bytes, body: bytes, most: int) -> list[Part]:
    """The parts of a multipart body; names are never used as paths. Raises Refused (bad_request)
    for what is no such body, and for more than `most` parts."""
    _, options = parse_options_header(content_type)
    boundary = options.get(b"boundary", b"")
    if not 1 <= len(boundary) <= 70:
        _bad("the form has no boundary of 1 to 70 letters", "let the client choose it: curl -F")
    collector = _Collector(most)
    try:
        parser = MultipartParser(
            boundary, collector.callbacks(), max_header_count=HEADERS, max_header_size=LINE
        )
        parser.write(body)
        parser.finalize()
    except FormParserError:
        _bad("the form is damaged", "curl -F image=@cat.jpg")
    if not collector.ended:
        _bad("the form ends in the middle", "send it whole: curl -F image=@cat.jpg")
    return collector.parts


class _Collector:
    """What the parser calls; keeps the parts."""

    def __init__(self, most: int) -> None:
        self.most, self.parts, self.ended = most, [], False
        self._headers: dict[bytes, bytes] = {}
        self._field, self._value = bytearray(), bytearray()
        self._body: list[bytes] = []

    def callbacks(self) -> Any:
        names = ("part_begin", "part_data", "part_end", "header_field", "header_value")
        found = {f"on_{name}": getattr(self, name) for name in (*names, "header_end")}
        return found | {"on_end": self.end}

    def part_begin(self) -> None:
        if len(self.parts) >= self.most:
            _bad(f"the form has more than {self.most} parts", "send fewer")
        self._headers, self._body = {}, []

    def part_data(self, data: bytes, start: int, end: int) -> None:
        self._body.append(data[start:end])

    def part_end(self) -> None:
        kind, options = parse_options_header(self._headers.get(b"content-disposition"))
        if kind != b"form-data" or b"name" not in options:
            _bad("a part of the form has no name", "curl -F image=@cat.jpg")
        filename = options.get(b"filename")
        self.parts.append(
            Part(
                options[b"name"].decode("utf-8", "replace"),
                None if filename is None else filename.decode("utf-8", "replace"),
                self._body[0] if len(self._body) == 1 else b"".join(self._body),
            )
        )

    def header_field(self, data: bytes, start: int, end: int) -> None:
        self._field += data[start:end]

    def header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def header_end(self) -> None:
        self._headers[bytes(self._field).strip().lower()] = bytes(self._value)
        self._field.clear()
        self._value.clear()

    def end(self) -> None:
        self.ended = True


def form_picture(content_type: bytes, body: bytes, most: int) -> tuple[bytes, dict[str, str]]:
    """(the one picture of a form, its other fields). Raises Refused."""
    parts = read_form(content_type, body, most)
    files = [part for part in parts if part.filename is not None]
    fields = {part.name: part.body for part in parts if part.filename is None}
    if len(files) != 1 or len(fields) != len(parts) - 1:
        _bad(
            f"the form has {len(files)} files, or a field twice",
            "send one picture: curl -F image=@cat.jpg",
        )
    try:
        return files[0].body, {name: text.decode() for name, text in fields.items()}
    except UnicodeDecodeError:
        return _bad("a field of the form is no text", "curl -F image=@cat.jpg -F top_k=3")


def form_pictures(content_type: bytes, body: bytes, most: int) -> list[bytes]:
    """The pictures of a batch, in order. Raises Refused."""
    parts = read_form(content_type, body, most)
    if not parts or any(part.filename is None for part in parts):
        _bad("a batch is a form of files alone", "curl -F image=@one.jpg -F image=@two.jpg")
    return [part.body for part in parts]


def json_picture(body: bytes) -> tuple[bytes, dict[str, Any]]:
    """(the picture of `{"image": BASE64, …}`, the other entries). Raises Refused."""
    if any(body.count(mark) > MARKS for mark in (b"{", b"[", b",", b":")):
        _bad("the JSON has more in it than a picture and a few numbers", _EXAMPLE)
    try:
        given = json.loads(body.decode(), object_pairs_hook=_once, parse_constant=_no_number)
    except (ValueError, RecursionError):
        _bad("the body is no JSON object with each entry once", _EXAMPLE)
    if not isinstance(given, dict) or not isinstance(given.get("image"), str):
        _bad("the JSON has no text under image", _EXAMPLE)
    try:
        picture = base64.b64decode(given.pop("image").encode("ascii"), validate=True)
    except (binascii.Error, UnicodeEncodeError):
        _bad("what stands under image is not base64", _EXAMPLE)
    return picture, given


_EXAMPLE = 'send {"image": "…base64 of the file…"}; better: send the file itself as the body'


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an entry stands twice")
    return found


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number of JSON")


def _bad(message: str, hint: str) -> NoReturn:
    raise Refused("bad_request", message, hint)
