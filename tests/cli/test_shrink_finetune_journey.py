"""`crosspatch shrink RUN --finetune`: to its end for real, and what it leaves is a run."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from crosspatch.training.recipe import Recipe
from crosspatch.training.run import RunFolder

pytestmark = [pytest.mark.long, pytest.mark.pages]


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """(a run on digits, what a search with 20 s of fine-tuning came to)."""
    from crosspatch.cli.main import main

    folder = tmp_path_factory.mktemp("to-shrink") / "run"
    words = ["--model", "vit_micro_32", "--size", "32", "--epochs", "8", "--out", str(folder)]
    assert main(["train", "digits", *words]) == 0
    words = ["--max-drop", "0.5", "--threads", "1", "--time", "1m", "--finetune", "20s"]
    assert main(["shrink", str(folder), *words]) == 0
    return folder, json.loads((folder / "shrunk.json").read_text())


def test_it_trains_for_the_time_asked_and_the_table_has_it(searched: tuple[Path, dict]) -> None:
    folder, found = searched
    rows = [row for row in found["rows"] if row["kind"] == "finetuned"]
    assert rows, found["words"]
    runs = {row["run"] for row in rows}
    spent = 0.0
    for one in map(Path, runs):
        recipe = Recipe.from_dict(RunFolder(one).read_config()["recipe"])
        report = json.loads((one / "report.json").read_text())
        assert report["steps"] == recipe.steps >= 5
        assert report["test"] is None
        spent += report["seconds"]
        with (one / "metrics.csv").open(newline="") as file:
            assert int(list(csv.DictReader(file))[-1]["step"]) == recipe.steps
    assert 8 < spent < 60  # 20 s, on a machine that others use too
    accuracy = lambda row: row["right"] / row["pictures"]
    before = {json.dumps([row["method"], row["options"]]): row for row in found["rows"]
              if row["kind"] == "tokens"}  # fmt: skip
    gained = [accuracy(row) - accuracy(before[key]) for row in rows
              if (key := json.dumps([row["method"], row["options"]])) in before]  # fmt: skip
    assert not gained or max(gained) > 0
    assert max(map(accuracy, rows)) > 0.8
    page = (folder / "shrunk.html").read_text()
    assert all(row["name"] in page for row in rows)
    assert page.count("fine-tuned") >= len(rows)


def test_what_it_leaves_is_read_by_eval_export_and_predict(
    searched: tuple[Path, dict], crosspatch: Any, tmp_path: Path
) -> None:
    _, found = searched
    row = next(row for row in found["rows"] if row["kind"] == "finetuned")
    run = tmp_path / "run"
    shutil.copytree(row["run"], run)
    told = crosspatch("eval", run, "digits", "--split", "val", "--json")
    assert told.code == 0, told.err
    assert crosspatch("export", run).code == 0
    assert (run / "bundle.onnx").is_file()


def test_once_more_nothing_is_trained(searched: tuple[Path, dict], crosspatch: Any) -> None:
    folder, found = searched
    run = Path(next(row for row in found["rows"] if row["kind"] == "finetuned")["run"])
    before = (run / "model" / "model.safetensors").stat().st_mtime_ns
    words = [
        "--max-drop",
        "0.5",
        "--threads",
        "1",
        "--time",
        "30s",
        "--finetune",
        "20s",
        "--resume",
    ]
    told = crosspatch("shrink", folder, *words, "--json")
    assert told.code == 0, told.err
    assert "fine-tuning 1 of" not in told.err
    assert (run / "model" / "model.safetensors").stat().st_mtime_ns == before
