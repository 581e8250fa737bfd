# SPDX-License-Identifier: Apache-2.0
"""The one thread that runs the engine: it takes the pictures that are there, and waits for none.

While one batch is computed the next gathers, so under load batches grow by themselves and an idle
server answers at once. Pictures that nobody waits for any more are left out before computing.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from crosspatch.deploy.bundle import check_pictures
from crosspatch.deploy.engines import Engine

GAIN = 0.9
"""A larger batch is worth it where a picture takes at most this share of the time it takes in the
one before: a batch delays the first of its pictures for the last."""
LONGEST = 0.25  # seconds that one batch may take
REPEATS = 3


class Item(Protocol):
    """A picture to compute."""

    @property
    def wanted(self) -> bool:
        """Whether somebody still waits for it, and its deadline is not over."""
        ...


class Economy(list[tuple[int, float]]):
    """(pictures together, seconds of each picture), as measured."""

    @property
    def best(self) -> tuple[int, float]:
        """The batch to take at most, and the seconds of each picture in it."""
        best = self[0]
        for size, seconds in self[1:]:
            if seconds <= GAIN * best[1] and size * seconds <= LONGEST:
                best = (size, seconds)
        return best


def measure(engine: Engine, size: tuple[int, int], most: int) -> Economy:
    """What a picture costs alone and in batches of 2, 4 … `most`; the least of REPEATS runs."""
    found, together = Economy(), 1
    while True:
        pictures = np.ascontiguousarray(np.resize(check_pictures(size), (together, *size, 3)))
        engine.run(pictures)
        times = []
        for _ in range(REPEATS):
            began = time.perf_counter()
            engine.run(pictures)
            times.append(time.perf_counter() - began)
        found.append((together, min(times) / together))
        if together >= most or 2 * min(times) > LONGEST:
            return found
        together = min(2 * together, most)


class Batcher:
    """Computes in a thread of its own what `put` brings.

    run: a batch of items -> what the engine makes of them; batch: items together, at most; wait:
    seconds for more to come once there is one; done: called with a batch, what `run` gave or
    raised, when it began (`time.perf_counter`) and the seconds it took. Both are called in that
    thread.
    """

    def __init__(
        self,
        run: Callable[[list[Any]], Any],
        batch: int,
        wait: float,
        done: Callable[[list[Any], Any, float, float], None],
    ) -> None:
        self._compute, self._batch, self._wait, self._done = run, batch, wait, done
        self._ready: queue.SimpleQueue[Item | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def put(self, item: Item) -> None:
        """Queues a picture."""
        self._ready.put(item)

    def stop(self) -> None:
        """Ends the thread after the batch that it computes, and waits for that."""
        self._ready.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (first := self._ready.get()) is not None:
            items, last = self._gather(first)
            items = [item for item in items if item.wanted]
            if items:
                self._batched(items)
            if last:
                return

    def _gather(self, first: Item) -> tuple[list[Item], bool]:
        """A batch, and whether it is the last one."""
        items, until = [first], time.monotonic() + self._wait
        while len(items) < self._batch:
            left = until - time.monotonic() if self._wait else 0.0
            try:
                item = self._ready.get(block=left > 0, timeout=left if left > 0 else None)
            except queue.Empty:
                break
            if item is None:
                return items, True
            items.append(item)
        return items, False

    def _batched(self, items: list[Item]) -> None:
        began = time.perf_counter()
        try:
            found = self._compute(items)
        except Exception as error:  # engines' errors have no common base
            found = error
        self._done(items, found, began, time.perf_counter() - began)
