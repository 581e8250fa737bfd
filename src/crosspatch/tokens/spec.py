# SPDX-License-Identifier: Apache-2.0
"""A reduction as one word: `mctf:r=16`, `evovit:keep=0.5,starts=4/8`, `tome:fine.r=8,coarse.r=13`.

Torch-free, so that the command line can tell at once what is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from crosspatch.errors import UsageError, near

METHODS = {
    "mctf": "mctf:MCTF",
    "tome": "tome:ToMe",
    "evovit": "evovit:EvoViT",
    "patch-drop": "patch_drop:PatchDrop",
    "stvit": "stvit:STViT",
    "psvit": "psvit:PoolAndShare",
    "dcal": "dcal:DCAL",
}
"""slug -> module of `crosspatch.tokens` and the class of its `Reducer`."""
FORM = "METHOD or METHOD:option=value,…, such as mctf:r=16"
LARGEST, LONGEST = 100_000, 1_000
"""The greatest number that an option may be; entries of a list, letters of a word."""
_NUMBER = re.compile(r"[+-]?\d{1,15}")


def parse(text: str) -> tuple[str, dict[str, Any]]:
    """(method, options) of `text`.

    Values are whole numbers, decimals, yes and no, none, or words; / stands between the entries of
    a list; `fine.r=8` is r of one branch of a CrossViT and `fine=none` leaves that one alone.
    Raises UsageError for an unknown method, for text of another form and for values that no option
    can have.
    """
    method, _, rest = text.strip().partition(":")
    if method not in METHODS:
        raise UsageError(
            f"there is no token reduction {method!r}",
            f"one of {', '.join(METHODS)}",
            f"--reduce {near(method, METHODS, 1) or 'mctf'}",
        )
    return method, parse_options(rest, text, FORM, "--reduce mctf:r=16")


def parse_options(rest: str, text: str, form: str, do: str) -> dict[str, Any]:
    """`option=value,…` as a dict; text: the whole word, form: what it should look like, do: an
    example to type. Raises UsageError for anything else."""
    options: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        name, equals, value = part.partition("=")
        branch, dot, inner = name.strip().partition(".")
        place = options.setdefault(branch, {}) if dot else options
        key = inner if dot else branch
        if not equals or not key.isidentifier() or not isinstance(place, dict) or key in place:
            raise UsageError(f"{part!r} in {text!r}", form, do)
        place[key] = _value(value.strip())
    require_plain(options)
    return options


def require_plain(options: Mapping[str, Any]) -> None:
    """Raises UsageError for values that cannot be kept in a config.json, or are beyond any use:
    what they would build could take all memory."""
    for key, value in options.items():
        if isinstance(value, Mapping):
            require_plain(value)
        elif not _plain(value):
            shown = str(type(value).__name__ if isinstance(value, list | tuple) else value)[:40]
            raise UsageError(
                f"{str(key)[:40]} = {shown}",
                f"numbers up to {LARGEST:,}, words, yes, no, none, or a list of at most "
                f"{LONGEST:,} of them",
                f"another {str(key)[:40]}",
            )


def _plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return len(value) <= LONGEST and all(
            not isinstance(one, list | tuple) and _plain(one) for one in value
        )
    if isinstance(value, str):
        return len(value) <= LONGEST
    if isinstance(value, int | float):
        return abs(value) <= LARGEST  # which no NaN is
    return value is None


def same(one: str, other: str, defaults: Mapping[str, Any]) -> bool:
    """Whether two texts mean the same reduction; defaults: of the method's options."""
    (kind, mine), (theirs, given) = parse(one), parse(other)
    return kind == theirs and {**defaults, **mine} == {**defaults, **given}


def spelt(transforms: Iterable[Mapping[str, Any]]) -> str:
    """The reduction among the transforms of a model, as `spell` writes it; "" without one."""
    found = [one for one in transforms if one.get("kind") == "reduce"]
    return spell(found[0]["method"], found[0].get("options", {})) if found else ""


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
        return "/".join(map(_spelled, value)) + ("/" if len(value) < 2 else "")
    named = {True: "yes", False: "no", None: "none"}
    return named[value] if value is None or isinstance(value, bool) else str(value)
