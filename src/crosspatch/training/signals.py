# SPDX-License-Identifier: Apache-2.0
"""SIGINT and SIGTERM during a training: finish the step, save, stop. Nothing here imports torch."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Stopped(Exception):
    """Somebody asked to end before the end."""


@contextmanager
def handled(handler: Callable[[int, object], None], *numbers: int) -> Iterator[None]:
    """`handler` gets these signals for a while, in the main thread; the old handlers come back."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


class Signals:
    """Turns the first SIGINT or SIGTERM into a wish to stop; the second one ends the process.

    A step is finished first; where `at_once` is set the wish raises `Stopped` on the spot.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self.at_once = False

    @contextmanager
    def caught(self) -> Iterator[Signals]:
        """Catches both for a while, in the main thread; the old handlers come back."""

        def wish(number: int, frame: object) -> None:
            self.name = signal.Signals(number).name
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            if self.at_once:
                raise Stopped

        with handled(wish, signal.SIGINT, signal.SIGTERM):
            yield self
