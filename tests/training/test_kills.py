"""Kills from outside: whole trainings in processes of their own, ended by signals, then resumed."""

from __future__ import annotations

import csv
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from crosspatch.training.state import load_state

TRAIN = """
import sys
from crosspatch.errors import CrosspatchError
from crosspatch.training import loop, session
from functools import partial
session.fit = partial(loop.fit, save_seconds=0.2, save_long_seconds=0.2)
typed = {} if "resume" in sys.argv else {"size": 8, "epochs": 6, "eval_every": 1}
try:
    session.train_run("digits", sys.argv[1], typed, resume="resume" in sys.argv)
except CrosspatchError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""


def start(folder, *words):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", TRAIN, str(folder), *words]
    with said(folder).open("w") as errors:
        return subprocess.Popen(command, env=environment, stderr=errors)


def said(folder):
    return folder.with_suffix(".log")


def table(folder):
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    timed = ("elapsed", "images_per_second")
    return [{k: v for k, v in row.items() if k not in timed} for row in rows]


def same(one, two):
    assert table(one) == table(two)
    weights = [load_file(f / "model" / "model.safetensors") for f in (one, two)]
    states = [load_state(f / "last")[0] for f in (one, two)]
    for first, second in (weights, states):
        assert first.keys() == second.keys()
        assert [k for k in first if not torch.equal(first[k], second[k])] == []


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    process = start(folder)
    assert process.wait(300) == 0, said(folder).read_text()
    return folder


def wait_for_state(folder, process):
    path = folder / "last" / "last.safetensors"
    until = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, said(folder).read_text()
        assert time.monotonic() < until
        time.sleep(0.02)


FULL = """
mount -t tmpfs -o size={small}k full {disk} || exit 77
"$0" -c "$1" {disk}/run 2> {disk}.log; echo $? > {disk}.code
cp -r {disk}/run {out}
mount -o remount,size=1g {disk} && "$0" -c "$1" {disk}/run resume && cp -r {disk}/run {after}
"""


@pytest.mark.long
@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs a mount of its own")
@pytest.mark.parametrize("states", [0.9, 2.2])
def test_a_full_disk_stops_and_leaves_what_was_saved(whole, tmp_path, states):
    """A small tmpfs that only the process below sees, later made larger."""
    state = (whole / "last" / "last.safetensors").stat().st_size
    disk, out, after = (tmp_path / name for name in ("disk", "out", "after"))
    disk.mkdir()
    small = int(states * state + 2 * sum(f.stat().st_size for f in (whole / "model").iterdir()))
    script = FULL.format(small=small // 1024, disk=disk, out=out, after=after)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", script, sys.executable, TRAIN]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    if not out.exists():
        pytest.skip(f"no mount of its own here: {done.stderr}")
    said = disk.with_suffix(".log").read_text()
    assert disk.with_suffix(".code").read_text() == "2\n", said
    assert "cannot be written" in said
    assert "--resume" in said
    assert not list(out.rglob(".writing-*.safetensors"))
    saved = load_state(out / "last")
    step = saved[1]["step"]
    assert step == 0 if states < 1 else 0 < step < 114
    assert done.returncode == 0, done.stderr
    same(whole, after)


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_process_is_resumable_and_ends_equal(whole, tmp_path, number):
    folder = tmp_path / "run"
    process = start(folder)
    wait_for_state(folder, process)
    process.send_signal(number)
    assert process.wait(10) == 4  # seconds
    assert "--resume" in said(folder).read_text()
    assert load_state(folder / "last")[1]["step"] < 114
    process = start(folder, "resume")
    assert process.wait(300) == 0, said(folder).read_text()
    same(whole, folder)


@pytest.mark.long
def test_processes_killed_at_any_time_end_equal(whole, tmp_path):
    folder, kills, words = tmp_path / "run", 0, ()
    for wait in (0.0, 0.3, 0.1, 0.7, 0.45):
        process = start(folder, *words)
        before = load_state(folder / "last")[1]["step"] if words else 0
        wait_for_state(folder, process)
        until = time.monotonic() + 60
        while words and process.poll() is None and time.monotonic() < until:
            if load_state(folder / "last")[1]["step"] > before:
                break
            time.sleep(0.02)
        time.sleep(wait)
        process.kill()
        kills += process.wait(60) == -signal.SIGKILL
        words = ("resume",)
    assert kills >= 2
    process = start(folder, "resume")
    assert process.wait(300) == 0, said(folder).read_text()
    same(whole, folder)
