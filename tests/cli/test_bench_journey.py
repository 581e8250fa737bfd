"""`crosspatch bench`: a run, a bundle and a model by name on this machine."""

from __future__ import annotations

import csv
import json

import pytest

from crosspatch.deploy import bench as measuring
from crosspatch.deploy import peak


@pytest.fixture(scope="module", autouse=True)
def short():
    """Few turns and small products: what is measured is not what is tested here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measuring, "MOST", 5)
        patch.setattr(peak, "SIZES", (64,))
        patch.setattr(peak, "SECONDS", 0.01)
        yield


def test_a_run_in_every_engine_with_table_figure_and_json(crosspatch, vit_run, tmp_path) -> None:
    answer = crosspatch(
        "bench", vit_run, "--batch", "1,2", "--threads", 1, "--out", tmp_path / "out",
        "--csv", tmp_path / "t.csv", "--json", "--time", "10m",  # a busy machine needs some
    )  # fmt: skip
    assert answer.code == 0, answer.err
    (model,) = answer.json["models"]
    report = json.loads((vit_run / "report.json").read_text())
    assert (model["macs"], model["parameters"]) == (report["macs"], report["parameters"])
    assert model["bytes"]["int8"] < model["bytes"]["fp32"]
    kinds = {(row["engine"], row["precision"]) for row in answer.json["rows"]}
    assert {("torch", "fp32"), ("onnxruntime", "int8"), ("openvino", "fp32")} <= kinds
    assert {row["batch"] for row in answer.json["rows"]} == {1, 2}
    assert all(row["ms"] > 0 and row["times_torch"] > 0 for row in answer.json["rows"])
    assert {one["precision"] for one in answer.json["peaks"]} >= {"fp32", "int8"}
    assert answer.json["hardware"]["processor"]
    assert any("int8" in text for text in answer.json["verdicts"])
    for name in ("t.csv", "out/bench.csv"):
        with (tmp_path / name).open(encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        assert [float(row["ms"]) for row in rows] == [row["ms"] for row in answer.json["rows"]]
        assert {row["torch"] for row in rows} == {answer.json["hardware"]["torch"]}
    assert (tmp_path / "out" / "bench.png").is_file()
    assert not list(vit_run.glob("bundle*"))  # a run is only read


def test_the_screen_shows_a_table_within_80_columns_and_sentences(crosspatch) -> None:
    answer = crosspatch("bench", "vit_micro_32", "--engine", "torch", "--batch", 1, "--threads", 1)
    assert answer.code == 0, answer.err
    lines = answer.out.splitlines()
    head = next(place for place, line in enumerate(lines) if line.startswith("engine"))
    assert lines[head + 1].startswith("torch")
    assert lines[head + 1].endswith("1.00x")
    assert max(map(len, lines)) <= 80
    for part in ("plain products with 1 thread: fp32", "quickest answer: torch fp32, 1 thread",
                 "pictures/s", "multiply-adds", "measured in"):  # fmt: skip
        assert part in answer.out


@pytest.mark.parametrize(
    ("typed", "got", "do"),
    [
        (["--batch", "0"], "--batch 0", "--batch 1,4"),
        (["--batch", "1,,2"], "--batch 1,,2", "--batch 1,4"),
        (["--threads", "many"], "--threads many", "--threads 1,4"),
        (["--threads", "9999"], "--threads 9999", "--threads 1"),
        (["--engine", "tensorrt"], "--engine tensorrt", "--engine torch"),
        (["--time", "10"], "--time '10'", "--time 10m"),
        (["vit_mikro_32"], "there is no model 'vit_mikro_32'", "names"),
        (["no/run"], "no/run does not exist", "crosspatch bench"),
        (["--csv", "no/folder/t.csv"], "no such folder", "--csv out.csv"),
        (["--out", "/proc/none/out"], "--out /proc/none/out", "--out bench"),
    ],
)
def test_wrong_usage_is_told_before_anything_is_measured(crosspatch, typed, got, do) -> None:
    answer = crosspatch("bench", *typed)
    assert answer.code == 2
    first, _, third = answer.err.splitlines()[-3:]
    assert got in first
    assert do in third
    assert "measuring" not in answer.err + answer.out
