"""Several processes: what they say to each other, and that they train as one process does."""

from __future__ import annotations

import csv
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from crosspatch.errors import UsageError
from crosspatch.training import launch, team
from support import team_work
from support.ranks import together

CASES = {
    "plain": {},
    "uneven": {"batch": 7},
    "small set": {"batch": 64, "steps_per_epoch": 1, "steps": 20},
    "repeated": {"repeats": 3},
    "sampler": {"balance": "sampler"},
    "weights": {"class_weights": (0.5, 1.0, 2.0)},
    "spoilt": {"spoil": 11},
}


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return together(3, "support.team_work:words", tmp_path_factory.mktemp("words"))


def test_all_hear_the_same(words):
    for rank, own in enumerate(words):
        assert own["rank"] == rank
        assert own["either"] == [True, True, False]
        assert own["gather"] == [{"from": r, "much": "x" * r} for r in range(3)]
        assert own["share"] == [0, None, "é", math.inf]
        assert own["nothing"] is None
        assert own["state"] == [[[0, 1, 2], [3, 4, 5]], [], {"x": 1}]
        assert own["mean"] == 1
        assert own["weights"] == words[0]["weights"]
        assert own["rows"] == [list(range(total)) for total in range(3, 10)]


def test_a_process_alone_answers_itself():
    assert (team.size(), team.rank(), team.first()) == (1, 0, True)
    assert team.either(True, False) == (True, False)
    assert team.gather(3) == [3]
    assert team.share("x") == "x"
    assert team.share_state(None) is None


def test_the_loss_is_named_before_the_gradient_it_spoils(tmp_path):
    found = together(2, "support.team_work:findings", tmp_path)
    assert found == [[5, "loss", "nan", [1, 3]]] * 2


@pytest.mark.parametrize(("pictures", "momentum"), [(4, 0.1), (5, None)])
def test_batches_are_normalised_over_all_processes(tmp_path, pictures, momentum):
    x = np.random.default_rng(0).normal(3, 2, (pictures, 2, 4, 3)).astype(np.float32).tolist()
    given = {"features": 2, "pictures": x, "momentum": momentum}
    parts = together(2, "support.team_work:normalised", tmp_path, **given)
    whole = team_work.normalised(**given)
    for rank, part in enumerate(parts):
        assert part["names"] == whole["names"]
        for key in ("slope", "evaluated"):
            np.testing.assert_allclose(part[key], whole[key][rank::2], rtol=1e-4, atol=1e-5)
        for key in ("weight", "running"):
            np.testing.assert_allclose(part[key], whole[key], rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The same trainings by one process and by two."""
    folder = tmp_path_factory.mktemp("trained")
    for world in (1, 2):
        (folder / str(world)).mkdir()
        given = {"runs": str(folder / str(world)), "cases": CASES}
        together(world, "support.team_work:trained_all", folder, **given)
    return folder


def rows(run, columns=("step", "train_loss", "val_loss", "val_accuracy", "lr")):
    with (run / "metrics.csv").open() as file:
        return [[float(row[name]) for name in columns] for row in csv.DictReader(file)]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_reach_the_losses_of_one(trained, case):
    one, two = (trained / world / case for world in "12")
    assert len(rows(one)) >= 3
    np.testing.assert_allclose(rows(two), rows(one), rtol=1e-5, atol=1e-5)
    first, second = (load_file(run / "model" / "model.safetensors") for run in (one, two))
    assert first.keys() == second.keys()
    for name, weights in first.items():
        torch.testing.assert_close(second[name], weights, rtol=1e-4, atol=2e-5)


def test_only_the_process_with_the_bad_loss_has_its_pictures_named(trained):
    tables = []
    for world in "12":
        with (trained / world / "spoilt" / "nan.csv").open() as file:
            tables.append(list(csv.DictReader(file)))
    one, two = ([row["path"] for row in table] for table in tables)
    assert len(one) == 8
    assert two == one[1::2]  # the second process has every second picture of the batch
    assert {(row["step"], row["what"], row["back_to"]) for row in tables[1]} == {
        ("12", "loss", "7")
    }


def test_every_picture_is_evaluated_once(tmp_path):
    given = {"counts": [1, 2, 3, 5, 8, 13, 40], "batch": 8}
    whole = team_work.evaluated(**given)
    for part in together(3, "support.team_work:evaluated", tmp_path, **given):
        for count, mine, all_of_it in zip(given["counts"], part, whole, strict=True):
            assert len(mine) == count
            np.testing.assert_allclose(mine, all_of_it, atol=1e-6)


def test_the_number_that_was_asked_for_must_have_been_launched():
    with (
        pytest.raises(UsageError, match="2 processes were asked for, and 1 launched"),
        team.joined(2),
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
