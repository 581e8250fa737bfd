# SPDX-License-Identifier: Apache-2.0
"""Who is told how a training goes: the seam between it and the screen."""

from __future__ import annotations

from typing import Any, Protocol


class Reporter(Protocol):
    """Who is told about the progress of a training. `fit` uses message, step and epoch; the session
    around it the others too. Raising `Interrupted` in one of them saves the state and stops."""

    def message(self, text: str) -> None: ...

    def progress(self, what: str, done: int, total: int) -> None: ...

    def plan(self, info: dict[str, Any]) -> None: ...

    def step(self, done: int, total: int, loss: float, images_per_second: float) -> None: ...

    def epoch(self, row: dict[str, Any]) -> None: ...

    def done(self, summary: dict[str, Any]) -> None: ...


class Silent:
    """A reporter that says nothing."""

    def message(self, text: str) -> None:
        """Drop it."""

    def progress(self, what: str, done: int, total: int) -> None:
        """Drop it."""

    def plan(self, info: dict[str, Any]) -> None:
        """Drop it."""

    def step(self, done: int, total: int, loss: float, images_per_second: float) -> None:
        """Drop it."""

    def epoch(self, row: dict[str, Any]) -> None:
        """Drop it."""

    def done(self, summary: dict[str, Any]) -> None:
        """Drop it."""
