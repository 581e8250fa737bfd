"""What is chosen is inside the budget or nothing is; the front is what brute force says."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crosspatch.deploy.shrink.choose import (
    choose,
    complete,
    contenders,
    excess,
    front,
    inside,
    marked,
    nearest,
    scaled,
    span,
)
from crosspatch.deploy.shrink.result import (
    Budget,
    Measured,
    Shrunk,
    Speed,
    Took,
    dumps,
    row_from_json,
    row_to_json,
)
from crosspatch.errors import DataError

PICTURES = 200
BASE = 0.010


def took(seconds: float, spread: float = 0.0, float_: float | None = None) -> Took:
    """What a candidate took whose speed beside the base is known to `spread` of itself."""
    speed = BASE / seconds
    about = Speed(speed, speed * (1 - spread), speed * (1 + spread))
    beside = None if float_ is None else Speed(float_, float_, float_)
    return Took(seconds, 1.2 * seconds, 20, about, about, beside)


def row(
    name: str, seconds: float, lost: int = 0, size: int = 100, spread: float = 0.0, **further
) -> Measured:
    right, drop = PICTURES - 10 - lost, lost / PICTURES
    return Measured(
        name=name, kind="tokens", engine="onnxruntime", precision="fp32", size=size,
        latency={1: took(seconds, spread)}, right=right, pictures=PICTURES, drop=drop,
        low=drop - 0.01, high=drop + 0.01, **further,
    )  # fmt: skip


# few values, so that ties happen
rows = st.lists(
    st.builds(
        row,
        st.just(""),
        seconds=st.sampled_from([0.002, 0.004, 0.005, 0.02]),
        lost=st.integers(-2, 4),
        size=st.sampled_from([50, 60, 100]),
        spread=st.sampled_from([0.0, 0.1, 0.3]),
        dropped=st.sampled_from(["", "", "", "given up"]),
    ),
    max_size=12,
).map(lambda found: [_named(one, place) for place, one in enumerate(found)])
budgets = st.builds(
    Budget,
    max_drop=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    latency=st.sampled_from([None, 0.003, 0.01]),
    size=st.sampled_from([None, 55, 80]),
    threads=st.sampled_from([None, 1]),
)


def _named(one: Measured, place: int) -> Measured:
    return Measured(**{**vars(one), "name": f"candidate {place}"})


@given(rows, budgets)
def test_what_is_chosen_keeps_the_budget_and_nothing_is_chosen_only_where_nothing_does(
    found, asked
):
    able = [
        one
        for one in found
        if not one.dropped
        and 100 * one.drop <= asked.max_drop + 1e-9
        and (asked.latency is None or one.latency[1].median <= asked.latency)
        and (asked.size is None or one.size <= asked.size)
    ]
    best = choose(found, asked)
    assert (best is None) == (not able)
    assert [one for one in found if inside(one, asked)] == able
    if best is None:
        near = nearest(found, asked)
        assert (near is None) == (not [one for one in found if complete(one)])
        assert near is None or excess(near, asked)
        return
    assert best in able
    if asked.size is not None and asked.latency is None:
        assert best.size == min(one.size for one in able)
        return
    fastest = min(one.latency[1].median for one in able)
    assert span(best, asked).low <= max(
        span(one, asked).high for one in able if one.latency[1].median == fastest
    )
    for one in able:
        if span(one, asked).median == fastest:
            assert lost(best) <= lost(one)
            assert lost(best) < lost(one) or best.size <= 1.05 * one.size


def lost(one: Measured) -> float:
    """Points of which the pictures say for certain that they are lost, or won."""
    return 0.0 if one.low <= 0 <= one.high else one.drop


@given(rows, budgets)
def test_the_front_is_what_no_other_beats(found, asked):
    whole = [one for one in found if complete(one)]

    def figures(one):
        return (one.drop, one.latency[1].median, one.size)

    def beats(one, other):
        mine, theirs = figures(one), figures(other)
        return mine != theirs and mine[0] <= theirs[0] and mine[1] <= theirs[1] and (
            mine[2] <= theirs[2]
        )  # fmt: skip

    expected = [one for one in whole if not any(beats(other, one) for other in whole)]
    assert front(found, asked) == expected
    told = marked(found, asked, "")
    assert [one.name for one in told if one.on_front] == [one.name for one in expected]
    assert bool(expected) == bool(whole)


@given(rows, budgets)
def test_contenders_are_the_fastest_inside(found, asked):
    some = contenders(found, asked, 3)
    able = [one for one in found if inside(one, asked)]
    assert len(some) == min(3, len(able))
    slowest = max((one.latency[1].median for one in some), default=0.0)
    assert all(one in some or one.latency[1].median >= slowest for one in able)


def test_overlapping_speeds_are_a_tie_and_the_more_accurate_is_taken():
    fast, slow = row("fast", 0.0040, lost=3, spread=0.1), row("slow", 0.0042, lost=0, spread=0.1)
    assert choose([fast, slow], Budget(max_drop=2.0)) is slow
    open_ = row("fast", 0.0040, lost=1, spread=0.1)
    assert choose([open_, slow], Budget(max_drop=1.0)) is open_, "0.5 points, give or take 1"
    better = row("better", 0.0042, lost=-3, spread=0.1)
    assert choose([open_, slow, better], Budget(max_drop=1.0)) is better
    noisy = row("noisy", 0.0040, lost=1, spread=0.9)
    assert choose([noisy, row("slow", 0.0060)], Budget(max_drop=1.0)) is noisy
    surely = row("slow", 0.0060, lost=0, spread=0.1)
    assert choose([fast, surely], Budget(max_drop=2.0)) is fast
    small, large = row("small", 0.0042, size=50, spread=0.1), row("large", 0.0040, spread=0.1)
    assert choose([large, small], Budget()) is small
    hardly = row("hardly", 0.0042, size=98, spread=0.1)
    assert choose([large, hardly], Budget()) is large


def test_where_only_a_size_is_asked_for_the_smallest_is_taken():
    fast, small = row("fast", 0.001, size=70), row("small", 0.008, size=40)
    assert choose([fast, small], Budget(size=80)) is small
    assert choose([fast, small], Budget(size=80, latency=0.009)) is fast
    assert choose([fast, small], Budget()) is fast


def test_latencies_of_several_groups_are_brought_to_one_base():
    """A group measured while the machine was half as fast says the same."""
    quiet = row("quiet", 0.005)
    busy = Measured(**{**vars(quiet), "latency": {1: took(0.005)._replace(median=0.01, p90=0.02)}})
    (one, other) = scaled([quiet, busy], {1: BASE})
    assert one.latency[1].median == pytest.approx(other.latency[1].median) == pytest.approx(0.005)
    assert other.latency[1].p90 == pytest.approx(0.01)
    assert scaled([one], {1: BASE})[0] == one


def test_the_threads_that_serve_best_unless_some_are_asked_for():
    both = Measured(**{**vars(row("x", 0.004)), "latency": {1: took(0.004), 4: took(0.006)}})
    assert both.best()[0] == 1
    assert both.best(4)[1].median == 0.006
    assert not inside(both, Budget(latency=0.005, threads=4))
    assert inside(both, Budget(latency=0.005))
    with pytest.raises(KeyError):
        both.best(2)


@given(rows, budgets)
def test_figures_are_read_back_as_they_were(found, asked):
    for one in found:
        assert row_from_json(json.loads(json.dumps(row_to_json(one)))) == one
    shrunk = Shrunk(run="r", machine={"cores": 2}, budget=asked, base="", rows=tuple(found))
    assert Shrunk.from_json(json.loads(dumps(shrunk))) == shrunk


@pytest.mark.parametrize("damage", [{"schema": 9}, {"rows": [{}]}, {"budget": 3}, {"more": 1}])
def test_damaged_figures_are_refused(damage):
    whole = json.loads(dumps(Shrunk(run="r", machine={}, budget=Budget(), base="", rows=())))
    with pytest.raises(DataError, match="run crosspatch shrink again"):
        Shrunk.from_json(whole | damage)
