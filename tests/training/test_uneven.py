"""Whole trainings on tables and on uneven classes: what was decided is kept, resume is exact."""

from __future__ import annotations

import csv
import tomllib
from collections import defaultdict
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from crosspatch.errors import Interrupted, UsageError
from crosspatch.training import session
from crosspatch.training.reporter import Silent
from crosspatch.training.session import train_run

TINY = {"model": "tiny", "size": 8, "batch": 8, "epochs": 3, "lr": 5e-3, "threads": 1}


class Stops(Silent):
    def __init__(self, at=None):
        self.at, self.reasons = at, []

    def plan(self, info):
        self.reasons = info["reasons"]

    def step(self, done, total, loss, images_per_second):
        if self.at is not None and done >= self.at:
            raise Interrupted("stop", "x", "y")


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(session, "fit", partial(session.fit, report_seconds=0.0))


@pytest.fixture
def table(tmp_path):
    """60 pictures of row0 and 6 of row1, of 22 plants, three pictures each; two are copies."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(66):
        label = int(number >= 60)
        picture = rng.integers(0, 60, (8, 8, 3)).astype(np.uint8)
        picture[2 * label + 1] += 150
        Image.fromarray(picture).save(tmp_path / f"{number}.png")
        rows.append((f"{number}.png", f"row{label}", f"plant{number // 3}"))
    (tmp_path / "59.png").write_bytes((tmp_path / "0.png").read_bytes())
    with open(tmp_path / "t.csv", "w", newline="") as file:
        csv.writer(file).writerows([("where", "label", "plant"), *rows, ("gone.png", "row0", "p")])
    return tmp_path / "t.csv"


READING = {"path_column": "where", "group": "plant"}


def trained(table, out, told=None, resume=False, **changed):
    reading = {} if resume else READING
    given = {} if resume else {**TINY, **changed}
    return train_run(table, out, given, told or Stops(), resume, reading=reading)


def test_a_table_is_trained_on_with_its_groups_whole(table, tmp_path):
    told = Stops()
    summary = trained(table, tmp_path / "r", told)
    assert summary["images"] == 66
    with open(tmp_path / "r" / "split.csv") as file:
        where = {row["path"]: row["split"] for row in csv.DictReader(file)}
    plants = defaultdict(set)
    for path, split in where.items():
        plants[int(path.split(".")[0]) // 3].add(split)
    assert {len(splits) for splits in plants.values()} == {1}
    assert where["59.png"] == where["0.png"]
    assert set(where.values()) == {"train", "val", "test"}
    skipped = (tmp_path / "r" / "skipped.csv").read_text().splitlines()
    assert skipped[1:] == ["gone.png,line 68: no such file or directory"]
    reasons = "\n".join(told.reasons)
    assert "path from 'where', label from 'label', group from 'plant'" in reasons
    assert "1 picture is an exact copy of another" in reasons
    assert "got no picture of row1: too few groups" in reasons
    assert "--balance sampler: row0 has " in reasons  # a batch of 8 holds less than one row1
    config = tomllib.loads((tmp_path / "r" / "config.toml").read_text())
    assert config["reading"] == READING
    assert config["recipe"]["balance"] == "sampler"
    assert config["recipe"]["class_weights"] == []


@pytest.mark.parametrize("balance", ["weights", "sampler"])
def test_a_stopped_run_ends_with_the_numbers_of_one_that_was_not(table, tmp_path, balance):
    trained(table, tmp_path / "whole", balance=balance)
    with pytest.raises(Interrupted):
        trained(table, tmp_path / "cut", Stops(at=5), balance=balance)
    trained(table, tmp_path / "cut", resume=True)
    whole, cut = (load_file(tmp_path / name / "model/model.safetensors") for name in
                  ("whole", "cut"))  # fmt: skip
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    figures = []
    for name in ("whole", "cut"):
        with (tmp_path / name / "metrics.csv").open() as file:
            rows = list(csv.DictReader(file))
        figures.append([(row["step"], row["train_loss"], row["val_loss"]) for row in rows])
    assert figures[0] == figures[1]


def test_each_balance_trains_another_model_and_none_is_the_old_one(table, tmp_path):
    found = {}
    for balance in ("none", "weights", "sampler"):
        trained(table, tmp_path / balance, balance=balance)
        model = load_file(tmp_path / balance / "model/model.safetensors")
        found[balance] = model["head.bias"].tolist()
    assert len({tuple(bias) for bias in found.values()}) == 3


def test_columns_of_a_run_cannot_change_on_resume(table, tmp_path):
    with pytest.raises(Interrupted):
        trained(table, tmp_path / "r", Stops(at=2))
    with pytest.raises(UsageError, match=r"group folder \(was plant\)"):
        train_run(table, tmp_path / "r", {}, Stops(), True, reading={"group": "folder"})
    train_run(table, tmp_path / "r", {}, Stops(), True, reading={"group": "plant"})
