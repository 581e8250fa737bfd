# SPDX-License-Identifier: Apache-2.0
"""A reduction as one word: `mctf:r=16`, `evovit:keep=0.5,starts=4/8`, `tome:fine.r=8,coarse.r=13`.

Torch-free, so that the command line can tell at once what is wrong.
"""

from __future__ import annotations

import re
from typing import Any

from crosspatch.errors import UsageError, near

METHODS = {
    "mctf": "mctf:MCTF",
    "tome": "tome:ToMe",
}
"""slug -> module of `crosspatch.tokens` and the class of its `Reducer`."""
FORM = "METHOD or METHOD:option=value,…, such as mctf:r=16"
_NUMBER = re.compile(r"[+-]?\d+")


def parse(text: str) -> tuple[str, dict[str, Any]]:
    """(method, options) of `text`.

    Values are whole numbers, decimals, yes and no, none, or words; / stands between the entries of
    a list; `fine.r=8` is r of one branch of a CrossViT and `fine=none` leaves that one alone.
    Raises UsageError for an unknown method and for text of another form.
    """
    method, _, rest = text.strip().partition(":")
    if method not in METHODS:
        raise UsageError(
            f"there is no token reduction {method!r}",
            f"one of {', '.join(METHODS)}",
            f"--reduce {near(method, METHODS, 1) or 'mctf'}",
        )
    options: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        name, equals, value = part.partition("=")
        branch, dot, inner = name.strip().partition(".")
        place = options.setdefault(branch, {}) if dot else options
        key = inner if dot else branch
        if not equals or not key.isidentifier() or not isinstance(place, dict) or key in place:
            raise UsageError(f"{part!r} in {text!r}", FORM, "--reduce mctf:r=16")
        place[key] = _value(value.strip())
    return method, options


def spell(method: str, options: dict[str, Any]) -> str:
    """The inverse of `parse`."""
    parts = []
    for name, value in options.items():
        inner = value.items() if isinstance(value, dict) else ((None, value),)
        for key, one in inner:
            parts.append(f"{name}{f'.{key}' if key else ''}={_spelled(one)}")
    return f"{method}:{','.join(parts)}" if parts else method


def _value(text: str) -> Any:
    if "/" in text:
        return [_value(part) for part in text.split("/") if part]
    words = {"yes": True, "true": True, "no": False, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    if _NUMBER.fullmatch(text):
        return int(text)
    try:
        return float(text)
    except ValueError:
        return text


def _spelled(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "/".join(map(_spelled, value)) + ("/" if len(value) == 1 else "")
    named = {True: "yes", False: "no", None: "none"}
    return named[value] if value is None or isinstance(value, bool) else str(value)
