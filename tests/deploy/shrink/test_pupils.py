"""What is worth fine-tuning, against brute force."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crosspatch.deploy.shrink.pupils import MOST, Pupil, pupils
from crosspatch.deploy.shrink.result import Budget, Measured, Speed, Took
from crosspatch.tokens import spec

ONE = Speed(1.0, 1.0, 1.0)


def row(name: str, seconds: float, drop: float, **changed: Any) -> Measured:
    took = Took(seconds, seconds, 5, ONE, ONE)
    told: dict[str, Any] = {
        "kind": "tokens", "engine": "onnxruntime", "precision": "fp32", "method": "tome",
        "options": {"r": len(name)}, "latency": {1: took}, "macs": int(1e9 * seconds),
        "drop": drop, "pictures": 100, "size": 1,
    }  # fmt: skip
    return Measured(name=name, **{**told, **changed})


def whole(seconds: float = 1.0) -> Measured:
    return row("as it is", seconds, 0.0, method="", options={}, kind="engines")


cells = st.tuples(st.integers(1, 12), st.integers(0, 12))


@given(st.lists(cells, max_size=9), st.sampled_from([None, 0.35, 0.6]), st.sampled_from([0.5, 3.0]))
def test_those_chosen_are_the_best_of_those_that_lose_too_much(
    cells: list[tuple[int, int]], latency: float | None, most: float
) -> None:
    rows = [row("x" * n, time / 10, drop / 100) for n, (time, drop) in enumerate(cells, 1)]
    budget = Budget(max_drop=most, latency=latency)
    chosen = [one.name for one in pupils([whole(), *rows], budget)]
    by_name = {one.name: (one.latency[1].median, one.drop) for one in rows}
    fine = min([1.0, *(t for t, d in by_name.values() if 100 * d <= most)])
    able = {name: at for name, at in by_name.items() if 100 * at[1] > most and at[0] < fine}
    front = {
        name: at for name, at in able.items()
        if not any(t <= at[0] and d < at[1] for t, d in able.values())
    }  # fmt: skip
    assert set(chosen) <= set(front)
    assert len(chosen) == min(MOST, len(front))
    late = lambda name: latency is not None and front[name][0] > latency
    for name in front:
        if name not in chosen and chosen:
            worst = chosen[-1]
            assert (late(worst), front[worst][1]) <= (late(name), front[name][1])
    assert [late(name) for name in chosen] == sorted(late(name) for name in chosen)


def test_what_was_given_up_before_it_was_timed_is_timed_by_its_multiply_adds() -> None:
    lost = row("lost", 0.5, 0.3, latency={}, engine="", precision="", dropped="early")
    assert pupils([whole(), lost], Budget()) == [
        Pupil("lost", "tome", {"r": 4}, int(5e8))
    ]  # fmt: skip
    heavy = row("heavy", 1.2, 0.3, latency={}, engine="", precision="", dropped="early")
    assert pupils([whole(), heavy], Budget()) == []
    slow = row("x", 0.9, 0.0, macs=int(4e8))  # this method takes twice as long as it should
    assert pupils([whole(), slow, lost], Budget()) == []
    other = row("y", 0.9, 0.0, macs=int(4e8), method="mctf")
    assert [one.name for one in pupils([whole(), other, lost], Budget())] == ["lost"]


def test_float_is_compared_with_float_and_each_reduction_is_trained_once() -> None:
    rows = [
        whole(),
        row("a", 0.1, 0.0, method="", options={}, precision="int8-static", kind="engines"),
        row("b", 0.6, 0.05),
        row("b", 0.5, 0.05, engine="openvino"),
        row("b", 0.2, 0.06, precision="int8-static"),
    ]
    assert [one.name for one in pupils(rows, Budget())] == ["b"]


def test_what_was_fine_tuned_already_is_not_once_more() -> None:
    rows = [whole(), row("a, fine-tuned 4 min", 0.5, 0.05, run="runs/x/shrink/finetuned-tome")]
    assert pupils(rows, Budget()) == []


def test_time_at_the_threads_that_the_budget_means() -> None:
    took = {n: Took(t, t, 5, ONE, ONE) for n, t in ((1, 0.9), (4, 2.0))}
    rows = [whole(), row("a", 1.0, 0.05, latency=took)]
    assert [one.name for one in pupils(rows, Budget(threads=1))] == ["a"]


@pytest.mark.parametrize("options", [{"r": [1, 2]}, {"fine": {"r": 8}, "coarse": {"r": 1}}])
def test_the_folder_is_one_of_the_same_search(options: dict, tmp_path: Any) -> None:
    one = Pupil("any name <b>", "mctf", options)
    assert one.folder(tmp_path, 10.0) == Pupil("another", "mctf", options).folder(tmp_path, 10.0)
    assert one.folder(tmp_path, 10.0) != one.folder(tmp_path, 11.0)
    assert one.folder(tmp_path, 10.0).name.startswith("finetuned-mctf-")
    assert spec.parse(one.reduction) == ("mctf", options)
