# SPDX-License-Identifier: Apache-2.0
"""When and with what a picture was taken, out of its EXIF block: five tags, looked up directly.

The block is foreign bytes: every offset is checked, nothing else is parsed (TIFF 6.0, section 2;
Exif 2.32, section 4.6).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from datetime import datetime
from typing import NamedTuple

_MAKE, _MODEL, _CHANGED, _INNER, _TAKEN, _SERIAL = 0x010F, 0x0110, 0x0132, 0x8769, 0x9003, 0xA431
_TEXT, _MOST = 2, 64  # the type of text; entries and letters that are looked at


class Taken(NamedTuple):
    """camera: make, model and serial number, as far as they are told, else ""; time: seconds since
    1970 of the camera's own clock, None where it does not tell."""

    camera: str
    time: float | None


NOTHING = Taken("", None)


def taken(exif: bytes | None) -> Taken:
    """What an EXIF block says; of none, or of a broken one, nothing."""
    block = (exif or b"").removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(block[:4])
    if order is None or len(block) < 10:
        return NOTHING
    tags = dict(_entries(block, order, *struct.unpack_from(order + "I", block, 4)))
    inner = tags.get(_INNER)
    if isinstance(inner, int):
        tags |= dict(_entries(block, order, inner))
    names = (tags.get(tag) for tag in (_MAKE, _MODEL, _SERIAL))
    camera = " ".join(dict.fromkeys(name for name in names if isinstance(name, str) and name))
    return Taken(camera, _seconds(tags.get(_TAKEN) or tags.get(_CHANGED)))


def _entries(block: bytes, order: str, start: int) -> Iterator[tuple[int, int | str]]:
    if start + 2 > len(block):
        return
    (count,) = struct.unpack_from(order + "H", block, start)
    for number in range(min(count, _MOST)):
        at = start + 2 + 12 * number
        if at + 12 > len(block):
            return
        tag, kind, length, value = struct.unpack_from(order + "HHII", block, at)
        if kind == _TEXT:
            where = at + 8 if length <= 4 else value
            text = block[where : where + min(length, _MOST)].split(b"\0")[0]
            yield tag, text.decode("ascii", "replace").strip()
        else:
            yield tag, value


def _seconds(text: object) -> float | None:
    try:
        moment = datetime.strptime(str(text), "%Y:%m:%d %H:%M:%S")
    except ValueError:
        return None
    return (moment - datetime(1970, 1, 1)).total_seconds()
