"""Several processes as a user meets them: `--devices N`, torchrun, and one of them dying."""

from __future__ import annotations

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

ENV = {**os.environ, "OMP_NUM_THREADS": "1", "CROSSPATCH_LINEAR": "off"}
TRAIN = ("train", "digits", "--size", "8", "--batch", "32")


def start(*words, module="crosspatch", **env):
    command = [sys.executable, "-m", module, *map(str, words)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env={**ENV, **env}, start_new_session=True, **pipes)


def ended(process, seconds=240):
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, out, err


def rows(folder):
    with (folder / "metrics.csv").open() as file:
        return [
            [float(row[name]) for name in ("step", "train_loss", "val_loss")]
            for row in csv.DictReader(file)
        ]


def workers(process):
    """The processes that it launched."""
    with open(f"/proc/{process.pid}/task/{process.pid}/children") as file:
        return [int(number) for number in file.read().split()]


def wait_for_state(folder, process):
    until = time.monotonic() + 120
    while not (folder / "last" / "last.safetensors").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.02)


def test_two_processes_train_as_one_and_answer_once(crosspatch, tmp_path):
    runs = [tmp_path / name for name in ("one", "two")]
    words = (*TRAIN, "--epochs", 1, "--json", "--out")
    two = start(*words, runs[1], "--devices", 2)
    for code, out, err in (crosspatch(*words, runs[0]), ended(two)):
        assert code == 0, err
        assert json.loads(out)["steps"] == 39
        assert "epoch" in err
    one, two = map(rows, runs)
    assert two == [pytest.approx(row, rel=1e-3) for row in one]
    assert "devices = 2" in (runs[1] / "config.toml").read_text()


def test_more_processes_than_a_batch_has_pictures(pictures, tmp_path):
    code, _, err = ended(
        start("train", pictures, "--batch", 1, "--devices", 2, "--out", tmp_path / "run")
    )
    assert code == 2
    assert err.count("got batch size 1 for 2 processes") == 1
    assert "Traceback" not in err
    assert not (tmp_path / "run").exists()


def test_what_one_process_meets_ends_both_and_is_said_once(pictures, tmp_path):
    """As on two machines of which one lacks the data; `launch` gives both the same folder."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    place["LOCAL_WORLD_SIZE"] = "2"
    both = [
        start("train", data, "--out", tmp_path / "run", **place, RANK=rank, LOCAL_RANK=rank)
        for rank, data in (("0", pictures), ("1", tmp_path / "gone"))
    ]
    first, second = (ended(one, 90) for one in both)
    assert (first[0], second[0]) == (4, 2)
    assert "does not exist" in second[2]
    assert "error" not in first[2] + first[1]
    assert not (tmp_path / "run" / "config.toml").exists()


@pytest.mark.long
def test_a_process_that_dies_ends_the_other_and_nothing_is_lost(tmp_path):
    whole, run = tmp_path / "whole", tmp_path / "run"
    done = ended(start(*TRAIN, "--epochs", 8, "--out", whole, "--devices", 2))
    assert done[0] == 0, done[2]
    training = start(*TRAIN, "--epochs", 8, "--out", run, "--devices", 2)
    wait_for_state(run, training)
    os.kill(workers(training)[1], signal.SIGKILL)
    began = time.monotonic()
    code, out, err = ended(training, 30)
    assert code == 4
    assert time.monotonic() - began < 20
    assert err.count("--resume") == 1
    assert "Traceback" not in out + err
    code, _, err = ended(start(*TRAIN[:2], "--out", run, "--resume"))
    assert code == 0, err
    assert rows(run) == rows(whole)
    first, second = (load_file(one / "last" / "last.safetensors") for one in (whole, run))
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


@pytest.mark.long
def test_a_signal_stops_all_and_another_number_goes_on(tmp_path):
    """At a rate so low that what one process rounds as two do not stays small to the end."""
    run, words = tmp_path / "run", (*TRAIN, "--epochs", 8, "--lr", 1e-4)
    training = start(*words, "--out", run, "--devices", 2)
    wait_for_state(run, training)
    training.send_signal(signal.SIGINT)
    code, _, err = ended(training, 30)
    assert code == 4, err
    assert err.count("stopped by SIGINT at step") == 1
    code, out, err = ended(start(*TRAIN[:2], "--out", run, "--resume", "--devices", 1))
    assert code == 0, err
    assert "Saved by 2 and continued by 1" in out
    whole = tmp_path / "whole"
    assert ended(start(*words, "--out", whole))[0] == 0
    assert rows(run) == [pytest.approx(row, rel=1e-3) for row in rows(whole)]


@pytest.mark.long
def test_torchrun_on_two_machines(tmp_path):
    """Two launchers that meet at an address stand for two machines, each with its own folder."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    machines = [
        start(
            "--nnodes", 2, "--nproc-per-node", 1, "--rdzv-backend", "c10d", "--rdzv-id", "run",
            "--rdzv-endpoint", f"localhost:{port}", "-m", "--", "crosspatch", *TRAIN,
            "--epochs", 2, "--out", tmp_path / str(number), "--json",
            module="torch.distributed.run",
        )
        for number in range(2)
    ]  # fmt: skip
    ends = [ended(machine) for machine in machines]
    assert [end[0] for end in ends] == [0, 0], ends
    said = [json.loads(end[1]) for end in ends if end[1].strip()]
    assert len(said) == 1
    made = [folder for folder in tmp_path.iterdir() if (folder / "metrics.csv").is_file()]
    assert [str(folder) for folder in made] == [said[0]["run"]]
    assert ended(start(*TRAIN, "--epochs", 2, "--out", tmp_path / "alone"))[0] == 0
    assert rows(made[0]) == [pytest.approx(row, rel=5e-3) for row in rows(tmp_path / "alone")]
