"""The contract of exact resume, a test or more for every letter; `test_kills` has the long ones.

(a) a state is one file, written aside, flushed, read back, renamed (b) and holds everything; (c) a
run goes on with the same bits (d) past states that are damaged; (e) a full disk, (f) a second
process and (g) signals are met; (h) what changed is listed, and goes on with --force alone.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import time
from functools import partial

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from crosspatch.errors import DataError, Interrupted, UsageError
from crosspatch.training import session, state, writer
from crosspatch.training.run import RunFolder
from crosspatch.training.state import BEFORE, GOOD, LAST, load_state, read_state
from support import kills
from support.loops import Spoil, Stop, halt, same

TINY = {"model": "tiny", "size": 8, "batch": 8, "epochs": 3, "lr": 5e-3}
EVERYTHING = {"drop_path": 0.2, "balance": "sampler"}  # besides mixing, dropout and the average
EACH_STEP, EACH_EPOCH, SELDOM = {"save_long_seconds": 0.0}, {"save_seconds": 0.0}, {}
PACES = (EACH_STEP, EACH_EPOCH, SELDOM)
SEED = int(os.environ.get("KILLS_SEED", "20261121"))


LONG = pytest.mark.long


@pytest.fixture
def short_steps(monkeypatch):
    """Every step of a whole training is told of, so that a reporter can stop it anywhere."""
    monkeypatch.setattr(session, "fit", partial(session.fit, report_seconds=0.0))


def nan_rows(run):
    return (run.path / "nan.csv").read_text() if (run.path / "nan.csv").exists() else None


@pytest.fixture
def begun(train, tmp_path):
    """A run stopped at step 20 of 30, with a state of every step."""
    with pytest.raises(Interrupted):
        train("run", Stop(20, halt()), **EACH_STEP)
    return tmp_path / "run" / "last"


def test_a_one_file_written_aside_flushed_read_back_renamed(tmp_path, monkeypatch):
    done = []

    def noted(room, name):
        real = getattr(room, name)

        def call(*given):
            places = [getattr(one, "name", one) for one in given if not isinstance(one, dict)]
            done.append((name, *(str(one).rpartition("/")[2] for one in places)))
            return real(*given)

        monkeypatch.setattr(room, name, call)

    state.save_state(tmp_path, {"a": torch.ones(3)}, {"step": 1})
    for name in ("write_tensors", "flush_file", "read_state", "flush_folder"):
        noted(state, name)
    noted(state.os, "replace")
    state.save_state(tmp_path, {"a": torch.zeros(3)}, {"step": 2})
    aside = f".writing-{os.getpid()}-{LAST}"
    assert done == [
        ("write_tensors", aside), ("flush_file", aside), ("read_state", aside),
        ("replace", LAST, BEFORE), ("replace", aside, LAST), ("flush_folder", tmp_path.name),
    ]  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == [BEFORE, LAST]
    with safe_open(tmp_path / LAST, framework="pt") as file:
        assert '"step": 2' in file.metadata()[state.KEY]


def test_a_a_state_that_does_not_read_back_replaces_nothing(tmp_path, monkeypatch):
    state.save_state(tmp_path, {"a": torch.ones(3)}, {"step": 1})
    spoil = lambda path: path.write_bytes(path.read_bytes()[:-1] + b"x")
    monkeypatch.setattr(state, "flush_file", spoil)
    with pytest.raises(UsageError, match=r"last\.safetensors cannot be written.*checksum differs"):
        state.save_state(tmp_path, {"a": torch.zeros(3)}, {"step": 2})
    assert [path.name for path in tmp_path.iterdir()] == [LAST]
    assert load_state(tmp_path)[1]["step"] == 1


def test_b_a_state_holds_everything_that_is_listed(begun, recipe):
    tensors, meta, _ = load_state(begun)
    kinds = {name.split("/")[0] for name in tensors}
    assert kinds >= {"objective", "ema", "optimiser", "random"}
    assert {"random/torch", "optimiser/exp_avg_sq/model.head.weight"} <= tensors.keys()
    numbers = meta["stepper"]
    assert {"groups", "scaler", "cuts", "loss_count", "random"} <= numbers.keys()
    assert numbers["groups"][0]["lr"] > 0
    assert {"python", "numpy"} == numbers["random"].keys()
    assert (meta["step"], meta["epoch"]) == (20, 2)
    assert meta["sampler"] == {"seed": recipe.seed, "epoch": 2, "batch": 6}
    assert meta["best"] == max(meta["rows"], key=lambda r: (r["val_accuracy"], -r["val_loss"]))
    assert meta["recipe"] == recipe.to_dict()
    assert meta["fingerprint"] == "f"


def test_b_the_version_of_the_code_is_in_the_state(opened, short_steps, tmp_path):
    with pytest.raises(Interrupted):
        session.train_run("stripes", tmp_path / "r", TINY, Stop(1, halt()))
    meta = load_state(tmp_path / "r" / "last")[1]
    assert meta["versions"].keys() >= {"crosspatch", "torch", "python", "threads"}
    assert meta["fingerprint"] == opened.fingerprint()


def test_b_who_draws_from_python_or_numpy_draws_the_same_after_a_resume(train, monkeypatch):
    drawn = {}
    step = kills.Stepper.step

    def drawing(stepper, batch, epoch, number):
        step(stepper, batch, epoch, number)
        now = random.random(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002
        assert drawn.setdefault(number, now) == now

    monkeypatch.setattr(kills.Stepper, "step", drawing)
    whole, _ = train("whole")
    with pytest.raises(Interrupted):
        train("cut", Stop(13, halt()))
    random.random()
    np.random.rand()  # noqa: NPY002
    same(whole, train("cut", resume=True)[0])
    assert len(drawn) == 30


@pytest.fixture
def everything(monkeypatch, make_recipe):
    """A recipe with mixing, average, dropout, drop path and sampler; its run goes back once."""
    Spoil(monkeypatch, most=0.5)
    return make_recipe(**EVERYTHING)


@pytest.mark.parametrize("count", [3, pytest.param(20, marks=LONG)])
def test_c_killed_at_random_steps_and_resumed_equals_the_whole_run(
    train, whole_run, everything, count
):
    whole = whole_run("everything", use=everything)
    assert nan_rows(whole) is not None
    draw, cut = np.random.default_rng(SEED), 0
    for number in range(count):
        step, place = int(draw.integers(30)), kills.PLACES[draw.integers(5)]
        before, after = (PACES[i] for i in draw.integers(3, size=2))
        told = f"KILLS_SEED={SEED}: kill {number} at step {step}, {place}, {before}"
        work = partial(train, f"cut{number}", use=everything, **before)
        cut += kills.killed(kills.in_step(step, place), work)
        try:
            run, _ = train(f"cut{number}", resume=True, use=everything, **after)
            same(whole, run)
            assert nan_rows(run) == nan_rows(whole)
        except Exception as error:
            raise AssertionError(told) from error
    assert cut == count


@LONG
def test_c_killed_20_times_in_one_run(train, whole_run, everything, tmp_path):
    whole = whole_run("everything", use=everything)
    draw, cut, resume = np.random.default_rng(SEED + 1), 0, False
    for number in range(20):
        state = load_state(tmp_path / "cut" / "last") if resume else None
        at = state[1]["step"] if state else 0
        step = min(29, at + int(draw.integers(1, 4)))
        work = partial(train, "cut", resume=resume, use=everything, **EACH_STEP)
        cut += kills.killed(kills.in_step(step, kills.PLACES[draw.integers(5)]), work)
        resume = (tmp_path / "cut" / "config.toml").exists()
        assert number or resume
    run, _ = train("cut", resume=True, use=everything)
    assert cut >= 10, f"KILLS_SEED={SEED}"
    same(whole, run)
    assert nan_rows(run) == nan_rows(whole)


@pytest.mark.parametrize(
    ("write", "tensor"),
    [(1, 9), (3, 1), *(pytest.param(w, t, marks=LONG) for w, t in ((1, 1), (2, 1), (7, 9)))],
)
def test_c_killed_while_a_state_is_written(train, whole_run, everything, write, tensor, tmp_path):
    whole = whole_run("everything", use=everything)
    hook = kills.while_writing(write, tensor)
    assert kills.killed(hook, partial(train, "cut", use=everything, **EACH_STEP))
    torn = list((tmp_path / "cut" / "last").glob(".writing-*"))
    assert len(torn) == 1
    with pytest.raises(DataError):
        read_state(torn[0])
    run, _ = train("cut", resume=True, use=everything)
    same(whole, run)
    assert not list(run.last.glob(".writing-*"))


@pytest.mark.parametrize("name", ["replace", "fsync"])
@pytest.mark.parametrize("count", [2, *(pytest.param(n, marks=LONG) for n in (1, 3, 4, 5, 6))])
def test_c_killed_between_rename_and_fsync(train, whole_run, everything, name, count):
    whole = whole_run("everything", use=everything)
    hook = kills.before_call(state.os, name, count + 2)  # past those of config.toml
    assert kills.killed(hook, partial(train, "cut", use=everything, **EACH_STEP))
    same(whole, train("cut", resume=True, use=everything)[0])


def results(folder):
    """Everything a run ends with that is no time: weights, averages, moments, tables, figures."""
    import json

    report = json.loads((folder / "report.json").read_text())
    rows = [{k: v for k, v in row.items() if k not in ("elapsed", "images_per_second")}
            for row in report["history"]]  # fmt: skip
    model = load_file(folder / "model" / "model.safetensors")
    tensors = {**model, **{f"state/{k}": v for k, v in load_state(folder / "last")[0].items()}}
    kept = {name: value.numpy(force=True).tobytes() for name, value in tensors.items()}
    figures = [report[key] for key in ("val", "test", "steps", "calibration")]
    tables = [(folder / name).read_text() for name in ("predictions.csv", "split.csv")]
    return kept, rows, figures, tables


@pytest.mark.parametrize("when", kills.WHEN)
def test_c_killed_in_a_whole_training(opened, tmp_path, monkeypatch, when):
    monkeypatch.setattr(session, "fit", partial(session.fit, save_seconds=0.0))
    work = lambda name: session.train_run("stripes", tmp_path / name, TINY)
    work("whole")
    assert kills.killed(kills.WHEN[when], lambda: work("cut"))
    work("cut")  # the same command: it continues what it finds
    assert results(tmp_path / "cut") == results(tmp_path / "whole")


def test_c_the_same_command_continues_and_a_finished_run_is_refused(opened, short_steps, tmp_path):
    whole = session.train_run("stripes", tmp_path / "whole", TINY)
    told = Stop(9, halt())
    with pytest.raises(Interrupted):
        session.train_run("stripes", tmp_path / "r", TINY, told)
    told = Stop()
    summary = session.train_run("stripes", tmp_path / "r", TINY, told)
    assert any("this very run, not yet ended: it is continued" in text for text in told.messages)
    assert summary["test"] == whole["test"]
    with pytest.raises(UsageError, match="already holds a run"):
        session.train_run("stripes", tmp_path / "r", TINY)


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ({**TINY, "epochs": 4}, r"--epochs 4 \(was 3\)"),
        ({**TINY, "seed": 0}, r"--seed 0 \(was not given\)"),
        ({k: v for k, v in TINY.items() if k != "lr"}, r"no --lr \(was 0.005\)"),
    ],
)
def test_c_nothing_that_differs_is_continued_by_itself(opened, short_steps, tmp_path, typed, said):
    with pytest.raises(Interrupted):
        session.train_run("stripes", tmp_path / "r", TINY, Stop(9, halt()))
    before = read_state(tmp_path / "r" / "last" / LAST)[1]
    with pytest.raises(UsageError, match=said) as error:
        session.train_run("stripes", tmp_path / "r", typed)
    assert "--overwrite" in error.value.do
    assert read_state(tmp_path / "r" / "last" / LAST)[1] == before
    begun = RunFolder(tmp_path / "r").read_config()
    assert begun["asked"] == TINY


DAMAGE = {
    "torn": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "zero-length": lambda path: path.write_bytes(b""),
    "foreign": lambda path: path.write_bytes(b"<html>404</html>"),
}


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("files", [(LAST,), (LAST, BEFORE)])
def test_d_damaged_states_are_named_and_the_next_older_one_is_used(
    begun, train, whole_run, how, files
):
    whole = whole_run("plain")
    for name in files:
        DAMAGE[how](begun / name)
    told = Stop()
    run, _ = train("run", told, resume=True)
    assert [name for name in files if any(name in text for text in told.messages)] == list(files)
    same(whole, run)


def test_d_no_whole_state_or_none_at_all_is_an_error(begun, train):
    for name in (LAST, BEFORE, GOOD):
        DAMAGE["torn"](begun / name)
    with pytest.raises(DataError, match=r"last\.safetensors.*last-1.*good.*--overwrite"):
        train("run", resume=True)
    shutil.rmtree(begun)
    with pytest.raises(DataError, match="holds no state, and the run has trained already"):
        train("run", resume=True)
    with pytest.raises(UsageError, match="holds no run"):
        train("never", resume=True)


@pytest.mark.parametrize("at", [1, 2, 9])
def test_e_a_full_disk_comes_out_at_the_next_step_and_leaves_the_last_state(
    train, whole_run, tmp_path, monkeypatch, at
):
    whole = whole_run("plain")
    real, writes = state.write_tensors, []

    def full(path, tensors, metadata):
        writes.append(path)
        real(path, tensors, metadata)
        if len(writes) >= at and path.name.endswith(LAST):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(state, "write_tensors", full)
        with pytest.raises(UsageError, match=r"No space left.*room.*--resume"):
            train("run", **EACH_STEP)
    last = tmp_path / "run" / "last"
    assert not list(last.glob(".writing-*"))
    found = load_state(last)
    assert found is not None
    same(whole, train("run", resume=True)[0])


def test_f_a_second_process_is_told_which_one_trains(train, tmp_path):
    tried = []

    def second():
        with pytest.raises(UsageError, match=rf"process {os.getpid()} is training in"):
            train("run", resume=True)
        tried.append(True)

    train("run", Stop(5, hook=second))
    assert tried


def test_f_a_forked_worker_does_not_keep_the_lock_of_a_dead_run(tmp_path):
    """A worker that outlives its killed parent must not lock the folder for ever."""
    read, write = os.pipe()

    def parent_of_a_worker():
        run = RunFolder.create(tmp_path / "r")
        run.write_config({})
        if os.fork() == 0:
            os.close(write)
            os.read(read, 1)  # lives until the test lets it go
            os._exit(0)
        kills.die()

    assert kills.killed(lambda: None, parent_of_a_worker)
    RunFolder.create(tmp_path / "r", resume=True).close()
    os.close(write)
    os.close(read)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_g_a_signal_while_a_state_is_written_saves_and_ends(
    train, whole_run, tmp_path, monkeypatch, number
):
    whole = whole_run("plain")
    real = writer.save_state

    def slow(*given):
        time.sleep(0.3)
        real(*given)

    began = time.monotonic()
    with monkeypatch.context() as patch:
        patch.setattr(writer, "save_state", slow)
        stop = Stop(9, hook=lambda: signal.raise_signal(number))
        with pytest.raises(Interrupted, match=r"at step 1?\d of 30"):
            train("cut", stop, **EACH_EPOCH)
    assert time.monotonic() - began < 10
    assert load_state(tmp_path / "cut" / "last")[1]["step"] in (9, 10)
    same(whole, train("cut", resume=True)[0])
