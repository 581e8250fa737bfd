"""The state file: whole or refused, and always one whole file on the disk."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from crosspatch.errors import DataError, UsageError
from crosspatch.training import state
from crosspatch.training.state import BEFORE, LAST, load_state, save_state, sweep

TENSORS = {
    "a": torch.arange(6.0).view(2, 3),
    "b": torch.tensor(3, dtype=torch.int64),
    "c": torch.ones(3, dtype=torch.bfloat16),
    "none": torch.zeros(0),
}


def saved(folder, step=1):
    save_state(folder, {**TENSORS, "step": torch.tensor(step)}, {"step": step, "rows": [{"x": 1}]})


def test_what_is_saved_is_loaded(tmp_path):
    saved(tmp_path / "last")
    tensors, meta, remarks = load_state(tmp_path / "last")
    assert meta == {"step": 1, "rows": [{"x": 1}]}
    assert remarks == []
    for name, tensor in TENSORS.items():
        assert torch.equal(tensors[name], tensor)
        assert tensors[name].dtype == tensor.dtype
    assert load_state(tmp_path / "nothing") is None


def test_the_previous_state_is_kept(tmp_path):
    for step in (1, 2, 3):
        saved(tmp_path, step)
    assert load_state(tmp_path)[1]["step"] == 3
    assert state.read_state(tmp_path / BEFORE)[1]["step"] == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == [BEFORE, LAST]


def flip_byte(path):
    data = bytearray(path.read_bytes())
    data[-20] ^= 0xFF
    path.write_bytes(data)


DAMAGE = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "empty": lambda path: path.write_bytes(b""),
    "page": lambda path: path.write_bytes(b"<html>not a state</html>"),
    "pickle": lambda path: torch.save({"a": 1}, path),
    "flipped": flip_byte,
    "foreign": lambda path: save_file({"a": torch.ones(1)}, path),
    "metadata": lambda path: save_file({"a": torch.ones(1)}, path, {state.KEY: "{"}),
    "newer": lambda path: save_file(
        {"a": torch.ones(1)}, path, {state.KEY: json.dumps({"schema": 9, "crc32": 0, "meta": {}})}
    ),
    "gone": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_falls_back_and_is_named(tmp_path, damage):
    saved(tmp_path, 1)
    saved(tmp_path, 2)
    DAMAGE[damage](tmp_path / LAST)
    _, meta, remarks = load_state(tmp_path)
    assert meta["step"] == 1
    if damage != "gone":
        assert LAST in remarks[0]
        assert "skipped" in remarks[0]


def test_no_whole_state_is_an_error_not_a_new_start(tmp_path):
    saved(tmp_path)
    DAMAGE["cut"](tmp_path / LAST)
    with pytest.raises(DataError, match=r"last\.safetensors.*--overwrite"):
        load_state(tmp_path)


@pytest.mark.parametrize("moment", range(4))
def test_a_kill_at_any_moment_leaves_a_whole_state(tmp_path, monkeypatch, moment):
    saved(tmp_path, 1)
    saved(tmp_path, 2)
    calls, real = [], {name: getattr(os, name) for name in ("replace", "fsync")}

    class Killed(BaseException):
        pass

    def counted(name):
        def call(*args):
            calls.append(name)
            if len(calls) == moment + 1:
                raise Killed
            return real[name](*args)

        return call

    for name in real:
        monkeypatch.setattr(state.os, name, counted(name))
    with pytest.raises(Killed):
        saved(tmp_path, 3)
    monkeypatch.undo()
    assert load_state(tmp_path)[1]["step"] in (2, 3)
    sweep(tmp_path)
    assert not list(tmp_path.glob(".writing-*"))
    saved(tmp_path, 4)
    assert load_state(tmp_path)[1]["step"] == 4


def test_a_full_disk_is_reported_and_leaves_the_last_state(tmp_path, monkeypatch):
    saved(tmp_path, 1)

    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(state, "flush_file", full)
    with pytest.raises(UsageError, match="No space left"):
        saved(tmp_path, 2)
    assert load_state(tmp_path)[1]["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == [LAST]
