# SPDX-License-Identifier: Apache-2.0
"""JSON that an outsider may have written: read within limits, strictly.

Python's reader takes NaN, keeps the last of two equal keys and leaves nesting to the stack. Here
each of these is a ValueError, and so is every text that is longer than said.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

DEEPEST = 64  # nested lists and objects
GREATEST = 1 << 63  # magnitude of a whole number
CLASSES = 100_000  # of a model
LONGEST = 1000  # letters of a class's name
SHOWN = 60  # letters of a stranger's text in an error


def read_text(path: Path, limit: int) -> str:
    """A UTF-8 file of at most `limit` bytes, whatever the file system says of its size.

    Raises ValueError for a larger one and for other bytes, OSError where it cannot be read.
    """
    with path.open("rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"it is larger than {limit / 1e6:.0f} MB")
    return data.decode("utf-8")


def parse(text: str | bytes) -> Any:
    """What a JSON text says. Raises ValueError for anything that is not JSON or is not meant: NaN,
    equal keys, whole numbers beyond 64 bits, nesting deeper than DEEPEST."""
    try:
        found = json.loads(
            text,
            object_pairs_hook=_object,
            parse_constant=_constant,
            parse_int=_whole,
            parse_float=_number,
        )
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    _require_flat(found)
    return found


def class_names(given: Sequence[Any]) -> tuple[str, ...]:
    """The names of classes. Raises ValueError for what cannot be names: too many or too long, twice
    the same. Folders may be called anything, so line breaks and marks that turn the direction of
    writing are left to whoever prints a name (`errors.visible`)."""
    if not isinstance(given, list | tuple):
        raise ValueError("classes must be a list of names")
    if not given:
        raise ValueError("there are no classes")
    if len(given) > CLASSES:
        raise ValueError(f"{len(given):,} classes, more than {CLASSES:,}")
    seen: set[str] = set()
    for name in given:
        if not isinstance(name, str) or not name:
            raise ValueError("classes must be names")
        if len(name) > LONGEST:
            raise ValueError(f"a class has a name of {len(name):,} letters, more than {LONGEST:,}")
        if name in seen:
            raise ValueError(f"two classes are called {shown(name)}")
        seen.add(name)
    return tuple(given)


def shown(value: object) -> str:
    """A stranger's value for an error: in quotes, escaped, and short."""
    text = ascii(value[: SHOWN + 1] if isinstance(value, str) else value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


def _object(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {shown(key)} stands there twice")
        found[key] = value
    return found


def _constant(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def _whole(text: str) -> int:
    if len(text) > 20 or abs(int(text)) > GREATEST:
        raise ValueError(f"a whole number has {len(text)} digits")
    return int(text)


def _number(text: str) -> float:
    value = float(text)
    if abs(value) == float("inf"):
        raise ValueError(f"the number {shown(text)} is too great")
    return value


def _require_flat(found: Any) -> None:
    level, depth = [found], 0
    while level:
        if depth > DEEPEST:
            raise ValueError("it is nested too deeply")
        inner = [one for one in level if isinstance(one, dict | list)]
        level = [v for one in inner for v in (one.values() if isinstance(one, dict) else one)]
        depth += 1
