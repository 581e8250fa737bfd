"""Several processes: what they say to each other, and that they train as one process does."""

from __future__ import annotations

import csv
import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from crosspatch.errors import UsageError
from crosspatch.training import launch, team
from support import team_work
from support.once import once, shared
from support.ranks import together

CASES = {
    "flat": {"sam": 0.05, "balance": "drw", "class_weights": [0.5, 0.7, 1.8], "deferred": 0.3},
    "plain": {},
    "uneven": {"batch": 7},
    "small set": {"batch": 64, "steps_per_epoch": 1, "steps": 20},
    "repeated": {"repeats": 3},
    "sampler": {"balance": "sampler"},
    "weights": {"class_weights": (0.5, 1.0, 2.0)},
    "spoilt": {"spoil": 11},
}


COUNTS = {"counts": [1, 2, 3, 5, 8, 13, 40], "batch": 8}


def batches() -> list[dict]:
    rng = np.random.default_rng(0)
    return [
        {"features": 2, "pictures": rng.normal(3, 2, (n, 2, 4, 3)).tolist(), "momentum": momentum}
        for n, momentum in ((4, 0.1), (5, None))
    ]


@pytest.fixture(scope="session")
def two(tmp_path_factory, worker_id):
    """One launch of two processes for all of it: what each told, "0.json" and "1.json", and the
    runs of `CASES`."""

    def make(folder):
        folder.mkdir()
        given = {"batches": batches(), "counts": COUNTS, "runs": str(folder), "cases": CASES}
        together(2, "support.team_work:everything", folder, **given)

    return once(shared(tmp_path_factory, worker_id) / "team-of-two", make)


def test_what_the_processes_say_to_each_other(two):
    """Words, findings, normalisation, evaluation."""
    told = [json.loads((two / f"{rank}.json").read_text()) for rank in range(2)]
    for rank, own in enumerate(told):
        all_hear_the_same(rank, own["words"], told[0]["words"])
        # a loss is named before the gradient it spoils
        assert own["findings"] == [5, "loss", "nan", [1, 3]]
        for batch, part in zip(batches(), own["normalised"], strict=True):
            normalised_over_all(rank, part, team_work.normalised(**batch))
        evaluated_once(own["evaluated"], team_work.evaluated(**COUNTS), COUNTS["counts"])


def all_hear_the_same(rank, own, first):
    assert own["rank"] == rank
    assert own["either"] == [True, True, False]
    assert own["gather"] == [{"from": r, "much": "x" * r} for r in range(2)]
    assert own["share"] == [0, None, "é", math.inf]
    assert own["nothing"] is None
    assert own["state"] == [[[0, 1, 2], [3, 4, 5]], [], {"x": 1}]
    assert own["mean"] == 0.5
    assert own["weights"] == first["weights"]
    assert own["rows"] == [list(range(total)) for total in range(2, 10)]


def normalised_over_all(rank, part, whole):
    assert part["names"] == whole["names"]
    for key in ("slope", "evaluated"):
        np.testing.assert_allclose(part[key], whole[key][rank::2], rtol=1e-4, atol=1e-5)
    for key in ("weight", "running"):
        np.testing.assert_allclose(part[key], whole[key], rtol=1e-5, atol=1e-6)


def evaluated_once(mine, whole, counts):
    for count, part, all_of_it in zip(counts, mine, whole, strict=True):
        assert len(part) == count
        np.testing.assert_allclose(part, all_of_it, atol=1e-6)


def test_a_process_alone_answers_itself():
    assert (team.size(), team.rank(), team.first()) == (1, 0, True)
    assert team.either(True, False) == (True, False)
    assert team.gather(3) == [3]
    assert team.share("x") == "x"
    assert team.share_state(None) is None


def test_two_processes_reach_the_losses_of_one(two, tmp_path):
    team_work.trained_all(str(tmp_path), CASES)
    for case in CASES:
        mine, theirs = tmp_path / case, two / case
        assert len(rows(mine)) >= 3
        np.testing.assert_allclose(rows(theirs), rows(mine), rtol=1e-5, atol=1e-5, err_msg=case)
        first, second = (load_file(run / "model" / "model.safetensors") for run in (mine, theirs))
        assert first.keys() == second.keys()
        for name, weights in first.items():
            torch.testing.assert_close(second[name], weights, rtol=1e-4, atol=2e-5)
    the_pictures_of_the_bad_loss_are_named(tmp_path, two)


def rows(run, columns=("step", "train_loss", "val_loss", "val_accuracy", "lr")):
    with (run / "metrics.csv").open() as file:
        return [[float(row[name]) for name in columns] for row in csv.DictReader(file)]


def the_pictures_of_the_bad_loss_are_named(*folders):
    """Only those of the process that had it."""
    tables = []
    for folder in folders:
        with (folder / "spoilt" / "nan.csv").open() as file:
            tables.append(list(csv.DictReader(file)))
    one, two = ([row["path"] for row in table] for table in tables)
    assert len(one) == 8
    assert two == one[1::2]  # the second process has every second picture of the batch
    found = {(row["step"], row["what"], row["back_to"]) for row in tables[1]}
    assert found == {("12", "loss", "7")}


def test_the_number_that_was_asked_for_must_have_been_launched():
    with (
        pytest.raises(UsageError, match="2 processes were asked for, and 1 launched"),
        team.joined(2),
    ):
        pass


def test_half_of_a_launchers_variables_are_named(monkeypatch):
    for name in team.LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with (
        pytest.raises(UsageError, match=r"WORLD_SIZE is 2 here, and RANK, .* not set"),
        team.joined(),
    ):
        pass


def test_the_one_that_only_lost_another_speaks_last(monkeypatch, tmp_path):
    monkeypatch.setattr(launch.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(launch, "SPEAK_LAST", 0.01)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert launch.speaks()
    assert not launch.speaks(last=True)
    with pytest.raises(SystemExit) as end, launch.one_voice():
        raise launch.PeerLost("a", "b", "c")
    assert end.value.code == 4
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(UsageError), launch.one_voice():
        raise UsageError("a", "b", "c")


@pytest.mark.parametrize(
    ("codes", "culprit", "expected"),
    [([0, 0], 0, 0), ([4, 3], 0, 3), ([4, 4], 1, 4), ([4, -9], 1, 4)],
)
def test_the_exit_code_is_of_the_one_whose_fault_it_was(codes, culprit, expected):
    assert launch._verdict(codes, culprit, True) == expected


def test_a_killed_process_that_nobody_spoke_of_is_named():
    with pytest.raises(launch.Interrupted, match="process 2 of 2 was ended by SIGKILL"):
        launch._verdict([4, -9], 1, False)
