# SPDX-License-Identifier: Apache-2.0
"""The options of an objective, `--objective NAME:option=value,…`, read and checked one by one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from crosspatch.errors import UsageError


class Options:
    """What was typed for the objective `name`; known: each option, and what it may be.

    Raises UsageError for an option that is not known.
    """

    def __init__(self, name: str, given: Mapping[str, Any], known: Mapping[str, str]) -> None:
        self.name, self.given, self.known = name, given, known
        unknown = [key for key in given if key not in known]
        if unknown:
            raise UsageError(
                f"{name} has no option {unknown[0]!r}",
                f"options of {name}: {self._listed(known)}",
                f"remove {unknown[0]}, or correct it",
            )

    def number(
        self,
        key: str,
        default: Any,
        *,
        low: float = 0.0,
        high: float = float("inf"),
        above: bool = False,
        whole: bool = False,
    ) -> Any:
        """A number from `low` (or above it) to `high`, or the default."""
        value = self.given.get(key)
        if value is None:
            return default
        return self._checked(key, value, low=low, high=high, above=above, whole=whole)

    def pair(
        self, key: str, default: Sequence[Any], *, low: float = 0.0, whole: bool = False
    ) -> tuple[Any, Any]:
        """Two numbers, of which one alone stands for both."""
        value = self.given.get(key)
        if value is None:
            return default[0], default[1]
        both = tuple(value) if isinstance(value, list | tuple) else (value, value)
        if len(both) != 2:
            raise self.wrong(key)
        first, second = (self._checked(key, one, low=low, whole=whole) for one in both)
        return first, second

    def word(self, key: str, default: str | None, among: Sequence[str]) -> Any:
        """One of some words."""
        value = self.given.get(key)
        if value is not None and value not in among:
            raise self.wrong(key)
        return default if value is None else value

    def switch(self, key: str, default: bool) -> bool:
        """yes or no."""
        value = self.given.get(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key)
        return value

    def places(self, key: str) -> tuple[int, ...]:
        """Whole numbers, none where none are given."""
        value = self.given.get(key)
        if value is None:
            return ()
        if not isinstance(value, list | tuple) or not all(type(one) is int for one in value):
            raise self.wrong(key)
        return tuple(value)

    def wrong(self, key: str) -> UsageError:
        """The error that says what the option may be, and after it the others."""
        value = self.given[key]
        shown = "/".join(map(str, value)) if isinstance(value, list | tuple) else value
        others = [one for one in self.known if one != key]
        return UsageError(
            f"{self.name}: {key} = {shown}", self._listed([key, *others]), f"change {key}"
        )

    def _listed(self, keys: Iterable[str]) -> str:
        return "; ".join(f"{key}: {self.known[key]}" for key in keys)

    def _checked(
        self,
        key: str,
        value: Any,
        *,
        low: float,
        high: float = float("inf"),
        above: bool = False,
        whole: bool = False,
    ) -> Any:
        kinds = (int,) if whole else (int, float)
        right = type(value) in kinds and low <= value <= high and not (above and value == low)
        right = right and math.isfinite(value)
        if not right:
            raise self.wrong(key)
        return value if whole else float(value)
