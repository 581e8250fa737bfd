"""The run folder: created, refused, locked, and the model in it."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys

import pytest
import torch

from crosspatch.errors import DataError, UsageError
from crosspatch.training.package import build_model, load_model, model_config, save_model
from crosspatch.training.run import METRIC_COLUMNS, RunFolder


def begun(path):
    with RunFolder.create(path) as run:
        run.write_config({"run": {"data": "x"}})
    return run


def test_existing_runs_need_a_word(tmp_path):
    begun(tmp_path / "r")
    with pytest.raises(UsageError, match=r"already holds a run.*--resume.*--overwrite") as error:
        RunFolder.create(tmp_path / "r")
    assert error.value.exit_code == 2
    RunFolder.create(tmp_path / "r", resume=True).close()
    (tmp_path / "r" / "mine.txt").write_text("kept")
    RunFolder.create(tmp_path / "r", overwrite=True).close()
    assert not (tmp_path / "r" / "config.toml").exists()
    assert (tmp_path / "r" / "mine.txt").read_text() == "kept"


def test_folders_that_cannot_be_used_are_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UsageError, match="--out"):
            RunFolder.create(path)
    (tmp_path / "thesis.doc").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(UsageError, match=r"thesis\.doc|file"):
            RunFolder.create(tmp_path, overwrite=overwrite)
    with pytest.raises(UsageError, match="holds no run"):
        RunFolder.create(tmp_path / "new", resume=True)
    assert not (tmp_path / "new").exists()
    with pytest.raises(UsageError, match="both"):
        RunFolder.create(tmp_path / "new", resume=True, overwrite=True)


def test_one_process_per_folder(tmp_path):
    with RunFolder.create(tmp_path / "r") as run:
        run.write_config({})
        with pytest.raises(UsageError, match=r"process \d+ is training"):
            RunFolder.create(tmp_path / "r", resume=True)
    RunFolder.create(tmp_path / "r", resume=True).close()


def test_the_lock_of_a_dead_process_is_no_lock(tmp_path):
    code = (
        "import os, sys; from crosspatch.training.run import RunFolder;"
        "RunFolder.create(sys.argv[1]).write_config({}); os._exit(9)"
    )
    found = subprocess.run([sys.executable, "-c", code, str(tmp_path / "r")], check=False)
    assert found.returncode == 9
    RunFolder.create(tmp_path / "r", resume=True).close()


def test_tables_and_texts(tmp_path):
    with RunFolder.create(tmp_path / "r") as run:
        run.write_config({"run": {"data": "ü"}, "recipe": {"lr": 0.1}})
        assert run.read_config()["run"]["data"] == "ü"
        run.write_classes(["a b", "ü"])
        run.write_metrics([])
        run.append_metrics({"epoch": 1, "val_accuracy": 0.5, "unknown": 3})
        run.write_report({"a": None})
    lines = (run.path / "metrics.csv").read_text().splitlines()
    assert lines[0] == ",".join(METRIC_COLUMNS)
    assert lines[1].startswith("1,,,")
    assert (run.path / "classes.txt").read_text(encoding="utf-8") == "a b\nü\n"
    run.config_path.write_text("a = [")
    with pytest.raises(DataError, match=r"config\.toml cannot be read"):
        run.read_config()


def test_a_full_disk_is_said_whatever_was_being_written(tmp_path):
    def write(number):
        with RunFolder.create(tmp_path / str(number)) as run:
            run.write_config({})
            raise OSError(number, os.strerror(number), "metrics.csv")

    for number, expected in ((errno.ENOSPC, UsageError), (errno.EIO, OSError)):
        with pytest.raises(expected, match=os.strerror(number)):
            write(number)
        RunFolder.create(tmp_path / str(number), resume=True).close()


@pytest.fixture
def model_folder(tmp_path, recipe):
    model = build_model(recipe, 3)
    save_model(tmp_path / "r" / "model", model, model_config(recipe, ("a", "b", "c")))
    return tmp_path / "r" / "model", model


def test_a_model_comes_back(model_folder, recipe):
    folder, model = model_folder
    for path in (folder, folder.parent, str(folder)):
        again, classes, preprocess, *_ = load_model(path)
        assert classes == ("a", "b", "c")
        assert preprocess == recipe.preprocess
        assert not again.training
        for name, value in model.state_dict().items():
            assert torch.equal(again.state_dict()[name], value)
    config = json.loads((folder / "config.json").read_text())
    assert config["transforms"] == []
    assert config["pretrained_cfg"]["input_size"] == [3, 8, 8]


@pytest.mark.parametrize("damage", ["cut", "config", "keys", "gone", "transform", "other"])
def test_damaged_models_are_named(model_folder, damage):
    folder, _ = model_folder
    weights, config = folder / "model.safetensors", folder / "config.json"
    known = json.loads(config.read_text())
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-5])
    elif damage == "config":
        config.write_text("{")
    elif damage == "keys":
        config.write_text("{}")
    elif damage == "gone":
        weights.unlink()
    elif damage == "transform":
        config.write_text(json.dumps({**known, "transforms": ["pruned"]}))
    else:
        known["model_args"]["num_classes"] = 7
        config.write_text(json.dumps(known))
    with pytest.raises(DataError, match=r"config|weights|transform"):
        load_model(folder)
    with pytest.raises(DataError, match="does not exist"):
        load_model(folder / "nowhere")


def test_equal_seeds_build_equal_models(make_recipe):
    one, two, other = (build_model(make_recipe(seed=s), 3) for s in (1, 1, 2))
    assert torch.equal(one.head.weight, two.head.weight)
    assert not torch.equal(one.head.weight, other.head.weight)
