"""The model card: every line that it owes its reader, "not measured" for what nobody measured, and
names that stay text."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from crosspatch.errors import DataError
from crosspatch.report import card, shipped
from crosspatch.report.card import write_card

HOSTILE = ["<script>alert(1)</script>", "a|b`c`\n# d", "[x](http://evil)"]
HEADINGS = [
    "What it is for", "Data", "Who should not use it", "Network", "From a file to its input",
    "Training", "How good it is", "How sure it is", "Worse pictures", "How fast it is",
    "How it was made smaller", "Does the exported file answer alike", "Licences",
    "To make it again", "Hashes",
]  # fmt: skip


def class_rows(names):
    return [
        {"name": name, "precision": 0.5, "recall": 0.25 + 0.5 * (place % 2), "recall_low": 0.2,
         "recall_high": 0.9, "f1": 0.4, "support": 4}
        for place, name in enumerate(names)
    ]  # fmt: skip


def figures(names):
    return {
        "images": 4 * len(names), "accuracy": 0.5, "low": 0.4, "high": 0.6,
        "topk": {"k": 5, "accuracy": 0.9}, "macro_f1": 0.45, "nll": 1.2, "ece": 0.03,
        "uncalibrated": {"nll": 1.3, "ece": 0.08}, "classes": class_rows(names),
    }  # fmt: skip


def report_of(names, data="pictures"):
    return {
        "schema": 1, "data": str(data), "task": "classify", "model": "crossvit_micro_32",
        "reduce": "", "objective": "supervised", "parameters": 424852, "macs": 12181056,
        "size": [32, 32], "classes": names, "images": 8 * len(names), "skipped": 1,
        "split": {"train": 4, "val": 2, "test": 2}, "epochs": 2, "steps": 20,
        "val": figures(names), "test": figures(names), "seconds": 3600.0,
        "calibration": {"temperature": 0.75, "images": 20},
        "config": {
            "run": {"command": "crosspatch train pictures", "fingerprint": "f" * 64,
                    "created": "2026-01-01T00:00:00+00:00"},
            "reading": {}, "why": {"reasons": ["because | of `this`"]},
            "machine": {"cores": 4, "memory": 8e9, "device": "cpu"},
            "versions": {"crosspatch": "0.1", "torch": "2.0", "threads": "2"},
            "recipe": {"name": "small", "batch": 8, "seed": 3, "split_seed": 3, "threads": 2,
                       "device": "cpu", "precision": "fp32", "balance": "drw", "mix": ["transmix"],
                       "sam": 0.05, "devices": 1},
        },
    }  # fmt: skip


CONFIG = {"preprocessing": {"size": [32, 32], "store": [36, 36], "fit": "pad",
                            "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}}  # fmt: skip


def make_run(folder: Path, names, **changed) -> Path:
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "model.safetensors").write_bytes(b"weights")
    (folder / "model" / "config.json").write_text(json.dumps(CONFIG))
    (folder / "report.json").write_text(json.dumps(report_of(names) | changed))
    with (folder / "split.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "class", "split", "size"])
        writer.writerows([f"{i}.png", name, "train", 9] for i, name in enumerate(names))
    with (folder / "predictions.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["path", "split", "label", "prediction", "correct", "confidence", "label_probability"]
        )
        for place in range(20):  # the surer half is right
            right = int(place >= 10)
            writer.writerow([place, "test", names[0], names[0], right, place / 20, 0.5])
    return folder


def part(text: str, heading: str) -> str:
    return text.split(f"## {heading}\n")[1].split("\n## ")[0]


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "run", ["cat", "dog", "owl"])


def test_a_card_has_every_part_in_order(run):
    path = write_card(run)
    text = path.read_text()
    assert path == run / "card.md"
    assert re.findall(r"^## (.*)$", text, re.M) == HEADINGS
    for told in ("50.0 % (40.0 to 60.0 %)", "424,852 parameters", "12,181,056", "7 B on the disk",
                 "8.0 % before and 3.0 % after", "20 Wh", "crosspatch train pictures", "Apache-2.0",
                 "arXiv 2103.14899", "f" * 64, "1 left out", "fills", "36 x 36"):  # fmt: skip
        assert told in text.replace("is filled", "fills"), told
    assert "because \\| of \\`this\\`" in part(text, "Data")
    assert "cat (25.0 % found)" in part(text, "Who should not use it")
    assert "never seen was not measured" in part(text, "Who should not use it")


def test_papers_of_all_that_it_was_trained_with_are_linked(run):
    slugs = re.findall(r"`crosspatch papers (\S+)`", part(write_card(run).read_text(), "Network"))
    assert slugs == ["crossvit", "transmix", "ldam", "sam"]


def test_what_was_not_measured_says_so(run):
    text = write_card(run).read_text()
    for heading in ("Worse pictures", "How fast it is", "Does the exported file answer alike"):
        assert "not measured" in part(text, heading).lower(), heading
    assert "baseline: not measured" in part(text, "How good it is")
    assert "kinds of pictures it has seen was not measured" in text


def test_a_run_without_judged_pictures_and_settings_has_a_card(tmp_path):
    run = make_run(tmp_path / "run", ["a"], test=None, val=None, config={}, calibration=None)
    for name in ("predictions.csv", "split.csv", "model/config.json", "model/model.safetensors"):
        (run / name).unlink()
    text = write_card(run).read_text()
    assert re.findall(r"^## (.*)$", text, re.M) == HEADINGS
    assert "its accuracy was not measured" in text
    assert "energy: not measured" in text
    assert "Abstaining: not measured" in text


def test_answering_less_often_is_more_often_right(run):
    table = part(write_card(run).read_text(), "How sure it is")
    rows = [line.split(" | ") for line in table.splitlines() if re.match(r"\| \d", line)]
    assert [row[1] for row in rows] == ["100.0 %", "90.0 %", "75.0 %", "50.0 %", "25.0 %"]
    assert [row[2] for row in rows] == ["50.0 %", "55.6 %", "66.7 %", "100.0 %", "100.0 %"]


def test_names_that_are_no_names_stay_text(tmp_path):
    run = make_run(tmp_path / "run", HOSTILE, data="<script>|`x`\n## fake")
    text = write_card(run).read_text()
    assert "<" not in text
    assert re.findall(r"^## (.*)$", text, re.M) == HEADINGS
    assert "](http://" not in text
    for block in re.findall(r"(?:^\|.*\n)+", text, re.M):  # as many cells in every row of a table
        cells = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(cells) == 1, block


def test_several_labels_have_their_own_figures(tmp_path):
    rows = [row | {"ap": 0.7, "threshold": 0.4} for row in class_rows(["a", "b"])]
    rows[0] |= {"recall_low": None, "recall_high": None, "precision": None}
    found = figures(["a", "b"]) | {"map": 0.7, "map_low": 0.6, "map_high": None, "classes": rows}
    del found["topk"]
    run = make_run(tmp_path / "run", ["a", "b"], task="multilabel", test=found)
    (run / "predictions.csv").write_text("path,split,labels,correct,confidence\nx,test,a|b,1,0.9\n")
    (run / "split.csv").write_text("path,class,split,size\nx,a|b,train,1\ny,,test,1\n")
    text = write_card(run).read_text()
    assert "naming all classes of a picture" in text
    assert "mean average precision 70.0 %, 8 pictures" in text
    assert "| class | pictures | found | 95 % range | precision | F1 | average precision |" in text
    assert "| a | 1 | 0 | 0 |" in text
    assert "Abstaining: not measured" in text


def test_a_thousand_classes_fold(tmp_path):
    run = make_run(tmp_path / "run", [f"class{n:04d}" for n in range(1000)])
    text = write_card(run).read_text()
    assert len(text.splitlines()) < 250
    assert "the other 980 stand in classes.txt" in text
    assert "the other 980 stand in report.json" in text


def test_kinds_of_pictures_are_looked_up_once(tmp_path):
    data = tmp_path / "data"
    for kind, grey in (("cat", True), ("dog", False)):
        (data / kind).mkdir(parents=True)
        for place in range(3):
            pixels = np.zeros((20 + place, 30, 3), np.uint8)
            pixels[..., 0] = 0 if grey else 200
            Image.fromarray(pixels).save(data / kind / f"{place}.png")
    run = make_run(tmp_path / "run", ["cat", "dog"], data=str(data))
    with (run / "split.csv").open("w", newline="") as file:
        rows = [["path", "class", "split", "size"]]
        rows += [[f"{k}/{n}.png", k, "train", 1] for k in ("cat", "dog") for n in range(3)]
        csv.writer(file).writerows(rows)
    said = part(write_card(run).read_text(), "Who should not use it")
    assert "shorter side of 20 to 22 pixels (median 21)" in said
    assert "grey pictures (50 %)" in said
    assert ".png (6)" in said
    shutil.rmtree(data)
    assert part(write_card(run).read_text(), "Who should not use it") == said


def test_evidence_and_baseline_are_shown_where_they_are(tmp_path):
    one = {"accuracy": 0.3, "low": 0.2, "high": 0.4, "images": 12}
    run = make_run(
        tmp_path / "run", ["a", "b"],
        baseline={"features": "random", "linear_probe": {"test": one}},
        evidence={
            "latency": {"median": 0.002, "low": 0.001, "high": 0.003, "count": 9},
            "robustness": [{"name": "blur", "said": "blurred", "accuracy": 0.4, "low": 0.3,
                            "high": 0.5, "change": -0.1, "change_low": -0.2, "change_high": 0.0}],
        },
    )  # fmt: skip
    text = write_card(run).read_text()
    assert "linear probe on random, before training: accuracy 30.0 % (20.0 to 40.0 %)" in text
    assert "| blurred | 40.0 % | 30.0 to 50.0 % | -10.0 (-20.0 to +0.0) |" in text
    assert "| torch, decoded picture | 2 ms (1 to 3) |" in text


def test_what_is_known_of_a_bundle(run):
    (run / "bundle.onnx").write_bytes(b"graph")
    own = shipped.digest(run / "model" / "model.safetensors")
    engine = {"engine": "onnxruntime", "precision": "fp32", "agreed": 198, "difference": 2e-6,
              "check": 1e-7, "milliseconds": 1.25, "faster": 2.0, "ok": True}  # fmt: skip
    summary = {
        "precision": "fp32", "size": 5, "sha256": shipped.digest(run / "bundle.onnx"),
        "weights": own, "format": "onnx", "pictures": 200, "same_weights": True, "ok": True,
        "torch_milliseconds": 2.5, "latency_threads": 1, "engines": [engine],
    }  # fmt: skip
    assert shipped.note_verify(run, run / "bundle.onnx", summary)
    text = write_card(run).read_text()
    assert "198 of 200 answers as torch's, at most 2.0e-06 apart, ok" in text
    assert "at most 1.00 points: 2 of 200 answers changed" in text
    assert "| onnxruntime fp32 (bundle.onnx) | 1.25 ms |" in text
    assert "bundle.onnx, sha256" in text
    (run / "model" / "model.safetensors").write_bytes(b"other")
    assert "bundle.onnx, made of OTHER weights, sha256" in write_card(run).read_text()


def test_a_bundle_elsewhere_is_not_remembered(run, tmp_path):
    (tmp_path / "bundle.onnx").write_bytes(b"graph")
    before = (run / "report.json").read_bytes()
    summary = dict.fromkeys([*shipped.VERIFIED, "precision", "size", "sha256", "weights"], 0)
    summary |= {"engines": [], "format": "onnx"}
    assert not shipped.note_verify(run, tmp_path / "bundle.onnx", summary)
    assert (run / "report.json").read_bytes() == before


def test_a_damaged_run_is_refused(run):
    (run / "report.json").write_text("{")
    with pytest.raises(DataError, match=r"report\.json cannot be read"):
        write_card(run)
    (run / "report.json").write_text(json.dumps(report_of(["a"]) | {"split": 3}))
    with pytest.raises(DataError, match=r"report\.json cannot be read"):
        write_card(run)
    (run / "report.json").unlink()
    with pytest.raises(DataError, match="finish the run"):
        card.write_card(run)
    assert not (run / "card.md").exists()
