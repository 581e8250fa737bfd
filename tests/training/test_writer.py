"""States written beside the training: from a copy, one at a time, errors where they are met."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from crosspatch.errors import UsageError
from crosspatch.training import state, writer
from crosspatch.training.state import GOOD, LAST, TYPES, load_state, read_state, write_tensors
from crosspatch.training.writer import StateWriter

TENSORS = {"a": torch.arange(6.0), "step": torch.tensor(1)}


@pytest.fixture
def held(monkeypatch):
    """Writes wait until this event is set."""
    go, real = threading.Event(), writer.save_state

    def waiting(*given):
        assert go.wait(10)
        real(*given)

    monkeypatch.setattr(writer, "save_state", waiting)
    return go


def test_what_is_written_is_a_copy_of_the_moment(tmp_path, held):
    work, weights, meta = StateWriter(tmp_path), torch.zeros(5), {"rows": [{"x": 1}]}
    work.save({"w": weights}, meta)
    weights += 1
    meta["rows"].append({"x": 2})
    held.set()
    work.wait()
    tensors, told, _ = load_state(tmp_path)
    assert tensors["w"].tolist() == [0] * 5
    assert told == {"rows": [{"x": 1}]}


def test_the_training_goes_on_while_a_state_is_written(tmp_path, held):
    work = StateWriter(tmp_path)
    began = time.monotonic()
    work.save(TENSORS, {"step": 1})
    work.check()
    assert time.monotonic() - began < 5
    assert not (tmp_path / LAST).exists()
    held.set()
    work.save(TENSORS, {"step": 2})  # waits for the first
    assert read_state(tmp_path / LAST)[1]["step"] in (1, 2)
    work.wait()
    assert load_state(tmp_path)[1]["step"] == 2


def test_the_memory_of_the_copy_is_used_again_where_it_fits(tmp_path):
    work = StateWriter(tmp_path)
    work.save({"a": torch.zeros(3), "b": torch.zeros(2)}, {})
    work.wait()
    kept = work._copies
    work.save({"a": torch.ones(3), "b": torch.ones(4), "c": torch.ones(1)}, {})
    work.wait()
    assert work._copies["a"] is kept["a"]
    assert work._copies["b"] is not kept["b"]
    assert {name: t.tolist() for name, t in load_state(tmp_path)[0].items()} == {
        "a": [1] * 3, "b": [1] * 4, "c": [1],
    }  # fmt: skip


def test_the_good_state_is_the_one_that_was_saved_as_such(tmp_path):
    work = StateWriter(tmp_path)
    work.save(TENSORS, {"step": 7}, good=True)
    work.save(TENSORS, {"step": 8})
    work.wait()
    assert (read_state(tmp_path / GOOD)[1]["step"], load_state(tmp_path)[1]["step"]) == (7, 8)


@pytest.mark.parametrize("way", ["save", "check", "wait"])
def test_an_error_is_raised_once_and_where_it_is_met(tmp_path, monkeypatch, way):
    work = StateWriter(tmp_path)
    work.save(TENSORS, {"step": 1})
    work.wait()

    def full(path):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(state, "flush_file", full)
        work.save(TENSORS, {"step": 2})
        work._thread.join()
    call = (lambda: work.save(TENSORS, {"step": 3})) if way == "save" else getattr(work, way)
    with pytest.raises(UsageError, match="No space left"):
        call()
    work.wait()
    assert load_state(tmp_path)[1]["step"] == 1
    work.save(TENSORS, {"step": 4})
    work.close()
    assert load_state(tmp_path)[1]["step"] == 4


def test_the_file_is_the_one_that_the_library_reads_and_writes(tmp_path):
    draw = torch.Generator().manual_seed(0)
    tensors = {
        f"{name} {shape}": torch.randint(0, 2, shape, generator=draw).to(kind)
        for kind, name in TYPES.items()
        for shape in ((3, 5), (), (0,), (1, 2, 3, 1))
    }
    write_tensors(tmp_path / "ours", tensors, {"note": "ü \"'{"})
    save_file(tensors, tmp_path / "theirs", {"note": "ü \"'{"})
    ours, theirs = load_file(tmp_path / "ours"), load_file(tmp_path / "theirs")
    assert ours.keys() == theirs.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert ours[name].dtype == tensor.dtype
        assert torch.equal(ours[name], theirs[name])
    with safe_open(tmp_path / "ours", framework="pt") as file:
        assert file.metadata() == {"note": "ü \"'{"}
    assert int.from_bytes((tmp_path / "ours").read_bytes()[:8], "little") % 8 == 0


def test_every_view_is_written_as_what_it_shows(tmp_path):
    whole = torch.arange(24.0).view(4, 6)
    views = {"columns": whole[:, 1:3], "turned": whole.T, "same": whole, "again": whole}
    state.save_state(tmp_path, views, {})
    tensors, _, _ = load_state(tmp_path)
    assert all(torch.equal(tensors[name], view) for name, view in views.items())
