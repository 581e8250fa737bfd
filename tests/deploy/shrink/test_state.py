"""What a search keeps: whole or not at all, one search at a time, nothing of another run."""

from __future__ import annotations

import json

import pytest

from crosspatch.deploy.shrink.result import Measured, Speed, Took
from crosspatch.deploy.shrink.state import FILE, State, entered, read, workplace
from crosspatch.errors import UsageError
from support.kills import before_call, killed

IDENTITY = {"weights": "a", "pictures": "b", "machine": "c", "threads": [1, 2]}


def filled() -> State:
    one = Speed(1.0, 0.9, 1.1)
    row = Measured(
        name="x", kind="tokens", engine="onnxruntime", precision="int8-static", size=3,
        latency={1: Took(0.1, 0.2, 11, one, one, one), 2: Took(0.1, 0.2, 11, one, one)},
        options={"fine": {"r": [1, 2]}},
    )  # fmt: skip
    return State(IDENTITY, [row], {1: [0.1, 0.2], 2: [0.3]}, 40, remarks=["said"])


def test_it_is_read_back_as_it_was(tmp_path):
    filled().save(tmp_path)
    assert read(tmp_path) == filled()
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_a_kill_while_it_is_written_leaves_the_one_before(tmp_path):
    from crosspatch.deploy.shrink import state as room

    filled().save(tmp_path)
    other = filled()
    other.rows = []
    for name in ("flush_file", "flush_folder"):
        assert killed(before_call(room, name), lambda: other.save(tmp_path))
        assert read(tmp_path) in (filled(), other)
        assert name != "flush_file" or read(tmp_path) == filled()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": 7}', '{"schema": 1}', "null"])
def test_what_is_torn_is_nothing_to_go_on_with(tmp_path, text):
    (tmp_path / FILE).write_text(text)
    assert read(tmp_path) is None
    with pytest.raises(UsageError, match="leave --resume away"):
        entered(tmp_path, IDENTITY, resume=True)
    assert entered(tmp_path, IDENTITY, resume=False) == State(IDENTITY)


@pytest.mark.parametrize(
    ("name", "said"),
    [("weights", "weights of the run"), ("pictures", "validation pictures"),
     ("machine", "this machine"), ("threads", "number of threads")],
)  # fmt: skip
def test_figures_of_something_else_are_named(tmp_path, name, said):
    filled().save(tmp_path)
    assert entered(tmp_path, IDENTITY, resume=True) == filled()
    with pytest.raises(UsageError, match=said):
        entered(tmp_path, IDENTITY | {name: "other"}, resume=True)


def test_a_damaged_row_makes_the_state_unusable_and_not_half_usable(tmp_path):
    filled().save(tmp_path)
    plain = json.loads((tmp_path / FILE).read_text())
    del plain["rows"][0]["latency"]["1"]["base"]
    (tmp_path / FILE).write_text(json.dumps(plain))
    assert read(tmp_path) is None


def test_one_search_at_a_time(tmp_path):
    second = workplace(tmp_path)
    with workplace(tmp_path), pytest.raises(UsageError, match="another process searches"):
        second.__enter__()
    with workplace(tmp_path) as folder:
        assert folder == tmp_path / "shrink"
