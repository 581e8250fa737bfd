"""Calls that take turns, on a clock that the test moves."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest

from crosspatch.metrics.latency import WARM_MOST, Timing, alternate, ratio, timing


class Clock:
    """Time that passes only where something is said to take it; notes who was called."""

    def __init__(self) -> None:
        self.now, self.called = 0.0, []

    def __call__(self) -> float:
        return self.now

    def takes(self, name: str, *seconds: float) -> Callable[[], None]:
        """A call that takes each of `seconds` in turn, and the last for ever after."""
        left = list(seconds)

        def call() -> None:
            self.called.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return call


def test_calls_take_turns_and_each_comes_once_untimed_before_it_counts() -> None:
    clock = Clock()
    calls = {"a": clock.takes("a", 1.0), "b": clock.takes("b", 3.0)}
    found = alternate(calls, seconds=0, least=3, warm=0, clock=clock)
    assert clock.called == ["a", "a", "b", "b"] * 3
    assert found["a"] == Timing(1, 1, 1, 3, (1,) * 3)
    assert found["b"].median == 3


def test_it_ends_with_the_time_the_greatest_number_or_the_least() -> None:
    def rounds(**given) -> int:
        clock = Clock()
        calls = {"a": clock.takes("a", 1.0)}
        return alternate(calls, warm=0, settle=0, clock=clock, **given)["a"].count

    assert rounds(seconds=20) == 20
    assert rounds(seconds=20, most=7) == 7
    assert rounds(seconds=0) == 5
    assert rounds(seconds=0, least=1) == 1


def test_slow_first_calls_do_not_count() -> None:
    clock = Clock()
    calls = {"slow": clock.takes("slow", 50, 20, 10, 1), "even": clock.takes("even", 1)}
    found = alternate(calls, seconds=2000, most=5, settle=0, clock=clock)
    assert found["slow"].high == 1
    assert clock.called.count("even") == 5 + 5  # 50, 20, 10, 1, 1: then two rounds agree


def test_warming_up_has_an_end() -> None:
    clock = Clock()
    calls = {"a": clock.takes("a", *(0.8**i for i in range(99)))}
    found = alternate(calls, seconds=1000, most=5, settle=0, clock=clock)
    assert len(clock.called) == WARM_MOST + 5
    clock = Clock()
    found = alternate({"a": clock.takes("a", 100, 50, 25, 12)}, seconds=0, settle=0, clock=clock)
    assert found["a"].turns[0] == 25  # two rounds to warm up, though they do not agree


def test_the_summary_is_by_hand() -> None:
    found = timing([float(i) for i in range(21)])
    assert found[:4] == (10, 1, 19, 21)
    assert timing([2.0])[:4] == (2, 2, 2, 1)


def test_a_ratio_is_of_neighbours_so_a_slow_spell_cancels() -> None:
    slow = [1, 1, 8, 8, 1]
    one, other = timing([2.0 * s for s in slow]), timing([1.0 * s for s in slow])
    assert ratio(one, other)[:4] == (2, 2, 2, 5)
    with pytest.raises(ValueError, match="shorter"):
        ratio(one, timing([1.0]))


@pytest.mark.parametrize("given", [{}, {"least": 0}, {"least": 5, "most": 4}])
def test_impossible_requests(given: dict) -> None:
    calls = {"a": lambda: None} if given else {}
    with pytest.raises(ValueError, match="got"):
        alternate(calls, seconds=0, **given)
    with pytest.raises(ValueError, match="no turn"):
        timing([])


def test_real_time_orders_real_work() -> None:
    calls = {"little": lambda: sum(range(1_000)), "much": lambda: sum(range(50_000))}
    found = alternate(calls, seconds=0.05)
    assert ratio(found["much"], found["little"]).median > 5
    assert found["little"].low <= found["little"].median <= found["little"].high


def test_torch_is_not_needed() -> None:
    script = "import sys, crosspatch.metrics.latency; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"
