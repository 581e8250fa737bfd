"""The engine's thread takes what is there, in order, and leaves out what nobody wants."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crosspatch.deploy.engines import Setting
from crosspatch.deploy.server.batching import LONGEST, Batcher, Economy, measure


class Item:
    def __init__(self, number: int, wanted: bool = True) -> None:
        self.number, self.wanted = number, wanted


class Held:
    """A computation that waits at each batch until it is let go, and notes what it got."""

    def __init__(self) -> None:
        self.begun, self.let = threading.Semaphore(0), threading.Semaphore(0)
        self.batches: list[list[int]] = []
        self.done: list[tuple] = []

    def run(self, items: list[Item]) -> list[int]:
        self.batches.append([item.number for item in items])
        self.begun.release()
        assert self.let.acquire(timeout=20)
        if any(item.number < 0 for item in items):
            raise ValueError("below 0")
        return [item.number for item in items]

    def note(self, *what) -> None:
        self.done.append(what)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.booleans(), max_size=30), st.integers(1, 7))
def test_what_gathers_meanwhile_is_computed_together_in_order(wanted, batch) -> None:
    held = Held()
    batcher = Batcher(held.run, batch, 0.0, held.note)
    batcher.put(Item(1000))
    assert held.begun.acquire(timeout=20)
    for number, one in enumerate(wanted):
        batcher.put(Item(number, one))
    held.let.release(len(wanted) + 1)
    batcher.stop()
    chunks = [range(len(wanted))[at : at + batch] for at in range(0, len(wanted), batch)]
    left = [[number for number in chunk if wanted[number]] for chunk in chunks]
    assert held.batches == [[1000], *filter(None, left)]
    assert [found for _, found, _, _ in held.done] == held.batches
    assert all(seconds >= 0 for *_, seconds in held.done)


def test_a_failure_is_told_and_the_next_batch_goes_on() -> None:
    held = Held()
    held.let.release(2)
    batcher = Batcher(held.run, 1, 0.0, held.note)
    batcher.put(Item(-1))
    batcher.put(Item(1))
    batcher.stop()
    assert isinstance(held.done[0][1], ValueError)
    assert held.done[1][1] == [1]


def test_it_waits_for_more_no_longer_than_told() -> None:
    held = Held()
    held.let.release(9)
    batcher = Batcher(held.run, 2, 5.0, held.note)
    batcher.put(Item(1))
    time.sleep(0.05)
    batcher.put(Item(2))
    assert held.begun.acquire(timeout=2.0)  # full: it does not wait for the rest of the time
    batcher.stop()
    assert held.batches == [[1, 2]]
    began = time.monotonic()
    batcher = Batcher(held.run, 2, 0.1, held.note)
    batcher.put(Item(3))
    assert held.begun.acquire(timeout=2.0)
    assert time.monotonic() - began >= 0.1
    batcher.stop()
    assert held.batches[1:] == [[3]]


class Priced:
    """An engine of which a batch of n takes first + n x each seconds."""

    def __init__(self, first: float, each: float) -> None:
        self.setting, self.first, self.each = Setting("onnxruntime", "fp32", 1), first, each
        self.asked: list[int] = []

    def run(self, images: np.ndarray) -> np.ndarray:
        self.asked.append(len(images))
        until = time.perf_counter() + self.first + len(images) * self.each
        while time.perf_counter() < until:
            pass
        return np.ones((len(images), 3), np.float32)


def test_larger_batches_are_taken_only_where_they_are_cheaper() -> None:
    assert measure(Priced(0.004, 0.0001), (8, 8), 16).best[0] >= 8
    assert measure(Priced(0.0, 0.003), (8, 8), 16).best[0] == 1


def test_no_batch_is_measured_that_takes_too_long() -> None:
    engine = Priced(0.0, LONGEST / 3)
    assert [size for size, _ in measure(engine, (8, 8), 16)] == [1, 2]
    assert measure(Priced(0.0, 0.001), (8, 8), 6)[-1][0] == 6


@pytest.mark.parametrize(
    ("prices", "best"),
    [
        ([(1, 1.0)], 1),
        ([(1, 0.01), (2, 0.006), (4, 0.0058)], 2),
        ([(1, 0.01), (2, 0.0098), (4, 0.005), (8, 0.0049)], 4),
        ([(1, 0.1), (2, 0.08), (4, 0.07)], 2),
    ],
)
def test_the_batch_is_the_smallest_from_which_more_gain_nothing(prices, best) -> None:
    assert Economy(prices).best[0] == best
