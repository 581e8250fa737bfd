"""Letter (h) of the contract: what changed is listed, and goes on with --force where it can."""

from __future__ import annotations

import csv
import shutil
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from crosspatch.data import prepare
from crosspatch.data.sources import Item
from crosspatch.data.split import carry_split
from crosspatch.errors import DataError, Interrupted, UsageError
from crosspatch.training import session
from crosspatch.training.changes import changed_pictures, scaled
from crosspatch.training.run import RunFolder
from crosspatch.training.session import train_run
from crosspatch.training.state import load_state
from support.loops import Stop, halt, same

TINY = {"model": "tiny", "size": 8, "batch": 8, "epochs": 4, "lr": 5e-3}


@pytest.fixture(autouse=True)
def short_steps(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(session, "fit", partial(session.fit, report_seconds=0.0))


@pytest.fixture
def begun(opened, tmp_path):
    """A run stopped in its second epoch (6 steps an epoch, 24 in all)."""
    with pytest.raises(Interrupted):
        train_run("stripes", tmp_path / "r", TINY, Stop(9, halt()))
    return tmp_path / "r"


def resumed(run, typed=None, reporter=None, **how):
    return train_run("stripes", run, typed or {}, reporter, resume=True, **how)


def splits(run):
    with (run / "split.csv").open() as file:
        return {row["path"]: row["split"] for row in csv.DictReader(file)}


def change(source, *, went=(), came=(), copies=()):
    """The source without the items `went` (positions), with new pictures: (key, label) of each in
    `came`, and `copies` (key, position of the item whose bytes it has)."""
    rng = np.random.default_rng(1)
    kept = [i for i in range(len(source.items)) if i not in went]
    labels = [label for _, label in came]
    new = rng.integers(0, 60, (len(came), 8, 8, 3)).astype(np.uint8)
    for picture, label in zip(new, labels, strict=True):
        picture[2 * label + 1] += 150
    twins = [(Item(key, source.items[i].label, None), source._pictures[i]) for key, i in copies]
    fresh = [(Item(key, label, None), new[n]) for n, (key, label) in enumerate(came)]
    old = [(source.items[i], source._pictures[i]) for i in kept]
    everything = sorted([*old, *fresh, *twins], key=lambda pair: pair[0].key)
    source.items = tuple(item for item, _ in everything)
    source._pictures = np.stack([picture for _, picture in everything])


def test_h_files_that_came_went_and_changed_are_listed(begun, opened):
    opened._pictures[40, 0, 0] += 1
    change(opened, went=[0, 1, 2, 3, 30], came=[("row2/new.png", 2)])
    with pytest.raises(DataError) as error:
        resumed(begun)
    assert "1 came (row2/new.png)" in error.value.got
    gone = ["row0/000.png", "row0/001.png", "row0/002.png"]
    assert f"5 went ({', '.join(gone)} and 2 more)" in error.value.got
    assert "1 changed (row1/040.png)" in error.value.got
    assert "--resume --force" in error.value.do
    with pytest.raises(DataError, match="1 came"):
        train_run("stripes", begun, TINY)


def test_h_a_picture_of_another_class_is_listed(begun, opened):
    items = list(opened.items)
    items[5] = replace(items[5], label=2)
    opened.items = tuple(items)
    with pytest.raises(DataError, match=r"1 of another class \(row0/005.png\)"):
        resumed(begun)


def test_h_settings_and_files_are_listed_together(begun, opened):
    change(opened, went=[7])
    with pytest.raises(DataError, match=r"--lr 0.1 \(was 0.005\).*1 went \(row0/007.png\)"):
        resumed(begun, {"lr": 0.1})


def test_h_a_record_without_sizes_is_read(begun, opened):
    rows = [line.rpartition(",")[0] for line in (begun / "split.csv").read_text().splitlines()]
    (begun / "split.csv").write_text("\n".join(rows) + "\n")
    opened._pictures[40, 0, 0] += 1
    with pytest.raises(DataError, match="sizes that were not noted then"):
        resumed(begun)
    assert changed_pictures(begun, opened) == [
        "what could not be read then, sizes that were not noted then, or the long tail"
    ]


def test_h_a_new_picture_near_a_tested_one_tests(begun, opened, monkeypatch):
    tested = next(key for key, name in splits(begun).items() if name == "test")
    change(opened, came=[("row0/near.png", 0), ("row0/other.png", 0)])
    keys = [item.key for item in opened.items]
    pair = tuple(sorted((keys.index("row0/near.png"), keys.index(tested))))
    monkeypatch.setattr(prepare, "near_groups", lambda prints: (pair,))
    resumed(begun, force=True)
    after = splits(begun)
    assert (after["row0/near.png"], after["row0/other.png"]) == ("test", "train")


def test_h_force_goes_on_with_the_pictures_that_are_there(begun, opened):
    before, told = splits(begun), Stop()
    keys = [item.key for item in opened.items]
    tested = next(key for key, name in before.items() if name == "test")
    gone = [
        keys.index(next(k for k, s in before.items() if s == name)) for name in ("train", "val")
    ]
    came = [(f"row{label}/{kind}new.png", label) for label in range(3) for kind in "abc"]
    change(opened, went=gone, came=came, copies=[("row0/copy.png", keys.index(tested))])
    summary = resumed(begun, reporter=told, force=True)
    after = splits(begun)
    assert {key: after[key] for key in before if key in after} == {
        key: name for key, name in before.items() if key not in [keys[i] for i in gone]
    }
    assert [after[key] for key, _ in came] == ["train"] * 9
    assert after["row0/copy.png"] == "test"
    said = next(text for text in told.messages if text.startswith("Goes on with what was changed"))
    assert "10 came" in said
    assert "2 went" in said
    assert "steps_per_epoch 6 -> 7" in said
    assert summary["steps"] == 28
    assert summary["test"]["images"] == sum(name == "test" for name in after.values())
    config = RunFolder(begun).read_config()
    assert config["run"]["fingerprint"] == opened.fingerprint()
    assert any("--force changed the run" in reason for reason in config["why"]["reasons"])


def test_h_what_was_forced_is_resumed_exactly(begun, opened, tmp_path):
    shutil.copytree(begun, tmp_path / "whole")
    change(opened, went=[4, 5, 50], came=[("row1/new.png", 1)])
    settings = {"lr": 1e-3, "epochs": 6, "batch": 10}
    resumed(tmp_path / "whole", settings, force=True)
    with pytest.raises(Interrupted):
        resumed(begun, settings, Stop(14, halt()), force=True)
    with pytest.raises(UsageError, match=r"--epochs 7 \(was 6\)"):
        resumed(begun, {"epochs": 7})
    resumed(begun)
    same(RunFolder(tmp_path / "whole"), RunFolder(begun))


def test_h_forced_settings_take_effect_where_the_run_stands(begun):
    told = Stop()
    summary = resumed(begun, {"lr": 1e-3, "batch": 16, "epochs": 5}, told, force=True)
    recipe = RunFolder(begun).read_config()["recipe"]
    assert (recipe["lr"], recipe["batch"], recipe["steps_per_epoch"], recipe["steps"]) == (
        1e-3, 16, 3, 15,
    )  # fmt: skip
    assert told.steps == list(range(5, 16))  # one and a half epochs were done
    assert summary["epochs"] == 5
    assert [row["epoch"] for row in load_state(begun / "last")[1]["rows"]] == [1, 2, 3, 4, 5]
    assert max(row["lr"] for row in load_state(begun / "last")[1]["rows"][1:]) <= 1e-3


@pytest.mark.parametrize(
    "typed",
    [{"size": 16}, {"model": "vit_micro_32"}, {"seed": 3}, {"recipe": "deit"}, {"time": 9.0}],
    ids=lambda typed: next(iter(typed)),
)
def test_h_what_cannot_change_is_refused_even_with_force(begun, typed):
    before = (begun / "config.toml").read_text()
    with pytest.raises(UsageError) as error:
        resumed(begun, typed)
    assert "--force" not in error.value.do
    with pytest.raises(UsageError, match="not even with --force"):
        resumed(begun, typed, force=True)
    assert (begun / "config.toml").read_text() == before


def test_h_other_classes_are_refused_even_with_force(begun, opened):
    opened.classes = ("row0", "row1", "row9")
    with pytest.raises(DataError, match=r"classes are no longer.*--force cannot"):
        resumed(begun, force=True)


def test_h_fewer_epochs_than_were_done_are_refused(begun):
    before = (begun / "config.toml").read_text()
    with pytest.raises(UsageError, match=r"--epochs 1, and the run has done 1\.5"):
        resumed(begun, {"epochs": 1}, force=True)
    assert (begun / "config.toml").read_text() == before


def test_h_force_needs_something_to_go_on_with(opened, begun, tmp_path):
    with pytest.raises(UsageError, match="holds no run that could go on"):
        train_run("stripes", tmp_path / "new", TINY, force=True)
    resumed(begun, force=True)
    with pytest.raises(UsageError, match="holds no run that could go on"):
        train_run("stripes", begun, TINY, force=True)
    change(opened, went=[7])
    report = (begun / "report.json").read_text()
    with pytest.raises(UsageError, match=r"has ended: 1 went .*--epochs N"):
        resumed(begun, force=True)
    with pytest.raises(DataError, match="1 went"):
        resumed(begun, {"epochs": 6})
    assert (begun / "report.json").read_text() == report
    longer = resumed(begun, {"epochs": 6}, force=True)
    assert longer["epochs"] == 6
    assert longer["images"] == 71


def test_h_data_that_are_read_otherwise_are_refused(begun, monkeypatch, opened):
    monkeypatch.setattr(session, "open_source", lambda spec, **reading: opened)
    for force in (False, True):
        with pytest.raises(UsageError, match=r"read otherwise: --group folder \(was not given\)"):
            resumed(begun, reading={"group": "folder"}, force=force)
    with pytest.raises(UsageError, match="--group folder"):
        train_run("stripes", begun, TINY, reading={"group": "folder"})


def test_steps_of_another_epoch_length_stay_in_their_epoch():
    for old, new in ((7, 3), (3, 7), (5, 5), (1, 4)):
        for step in range(4 * old + 1):
            at = scaled(step, old, new)
            assert at // new == step // old
            assert (at % new == 0) >= (step % old == 0)
            assert scaled(step + 1, old, new) >= at


def test_a_new_picture_goes_where_its_group_or_the_data_say(opened, tmp_path):
    opened.items = tuple(replace(item, group=f"g{i // 4}") for i, item in enumerate(opened.items))
    rows = ["path,class,split", *(f"{opened.items[i].key},row0,{s}"
                                  for i, s in ((0, "train"), (4, "test"), (8, "val")))]  # fmt: skip
    rows += [
        f"{opened.items[i].key},{opened.classes[opened.items[i].label]},train" for i in (24, 48)
    ]
    (tmp_path / "split.csv").write_text("\n".join(rows) + "\n")
    items = list(opened.items)
    items[60] = replace(items[60], split="val", group=None)
    opened.items = tuple(items)
    split = carry_split(tmp_path / "split.csv", opened, np.arange(72), twins=[(13, 8)])
    assert set(split.test.tolist()) == {4, 5, 6, 7}
    assert set(split.val.tolist()) == {8, 9, 10, 11, 12, 13, 14, 15, 60}
