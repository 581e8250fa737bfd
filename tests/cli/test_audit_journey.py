"""`crosspatch audit` as it is typed: the page, its JSON, the lists, what is refused."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from crosspatch.data.opening import open_source


@pytest.fixture
def photos(tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Pictures of five classes, one of them cut short, another with a name like markup."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    for file in pictures.glob("*/*"):
        place = tmp_path / "photos" / f"digit {file.parent.name} <script>x<\u2215script>"
        place.mkdir(parents=True, exist_ok=True)
        Image.open(file).resize((32, 32)).save(place / file.name)
    (place / "cut.png").write_bytes(file.read_bytes()[:60])
    return tmp_path / "photos"


def test_an_audit_finds_and_a_second_one_is_content(crosspatch, photos: Path) -> None:
    told = crosspatch("audit", "photos")
    assert told.code == 1, told.err
    assert "✗ 1 file cannot be read" in told.out
    assert "< audit-unreadable.txt" in told.out
    page, found = Path("audit.html").read_text(), json.loads(Path("audit.json").read_text())
    assert "<script" not in page
    assert "default-src 'none'" in page
    assert found["pictures"] == 61
    (name,) = Path("audit-unreadable.txt").read_text().splitlines()
    (photos / name).unlink()
    again = crosspatch("audit", "photos", "--overwrite", "--json")
    assert again.code == 0
    answer = json.loads(again.out)
    assert answer["unreadable"] == 0
    assert answer["not_looked"]
    assert not Path("audit-unreadable.txt").exists()


def test_nothing_is_written_over(crosspatch, photos: Path) -> None:
    Path("audit.json").write_text("mine")
    told = crosspatch("audit", "photos")
    assert told.code == 2
    assert "audit.json exists" in told.err
    assert "--overwrite" in told.err
    assert Path("audit.json").read_text() == "mine"
    assert not Path("audit.html").exists()


@pytest.fixture
def mistaken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Forty scans of each of six digits in folders of their labels, two of each in the next one's,
    one file cut short. Their paths."""
    monkeypatch.chdir(tmp_path)
    source, wrong, counts = open_source("digits"), set(), [0] * 10
    for at, item in enumerate(source.items):
        counts[item.label] += 1
        if item.label < 6 and counts[item.label] <= 40:
            moved = counts[item.label] > 38
            label = (item.label + moved) % 6
            path = tmp_path / "digits" / str(label) / f"{item.label} '{at}'.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(source.read(at)).save(path)
            wrong |= {str(path)} if moved else set()
    (path.parent / "cut.png").write_bytes(path.read_bytes()[:60])
    return wrong


def test_a_run_tells_wrong_labels_and_its_table_trains(
    crosspatch, digits_run: Path, mistaken: set[str]
) -> None:
    told = crosspatch("audit", "./digits", "--run", digits_run, "--json")
    assert told.code == 1, told.err  # the file that was cut short
    (found,) = [one for one in json.loads(told.out)["findings"] if one["kind"] == "mislabels"]
    listed = {str(Path("digits", one["path"]).absolute()) for one in found["items"]}
    assert len(listed & mistaken) >= 8
    assert found["command"] == "crosspatch train audit-labels.csv"
    page = Path("audit.html").read_text()
    for one in found["items"]:
        assert f"labelled {one['label']}, looks like {one['suggested']}" in page
    with Path("audit-labels.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len({row["path"] for row in rows}) == len(rows) == 241
    assert {row["path"] for row in rows if row["sure"]} == listed
    assert {row["path"] for row in rows[: len(listed)]} == listed
    words = found["command"].split()[1:]
    trained = crosspatch(*words, "--epochs", "1", "--out", "mended", "--json")
    assert trained.code == 0, trained.err
    split = list(csv.DictReader(Path("mended/split.csv").read_text().splitlines()))
    assert len(split) == 240
    right = [row for row in split if Path(row["path"]).name[0] == row["class"]]
    assert len(right) > 240 - len(mistaken)


def test_a_bundle_tells_them_too_where_its_run_is(
    crosspatch, digits_bundle: Path, mistaken: set[str]
) -> None:
    alone = Path(shutil.copy(digits_bundle, "alone.onnx"))
    told = crosspatch("audit", "./digits", "--run", alone)
    assert told.code == 2
    assert "alone.onnx without its run" in told.err
    assert "name the folder of the run" in told.err
    assert not Path("audit.html").exists()
    told = crosspatch("audit", "./digits", "--run", digits_bundle, "--json")
    answer = json.loads(told.out)
    assert answer["not_looked"] == []
    assert {"mislabels", "resizing"} <= {one["kind"] for one in answer["findings"]}


def test_weights_of_no_run_tell_them_too(crosspatch, digits_run: Path, mistaken: set[str]) -> None:
    file = Path(shutil.copy(digits_run / "model" / "model.safetensors", "its own.safetensors"))
    model = json.loads((digits_run / "model" / "config.json").read_text())["architecture"]
    asked = ("audit", "./digits", "--weights", file, "--model", model)
    answer = json.loads(crosspatch(*asked, "--json").out)
    assert answer["not_looked"] == []
    found = {one["kind"]: one for one in answer["findings"]}
    listed = {str(Path("digits", one["path"]).absolute()) for one in found["mislabels"]["items"]}
    assert len(listed & mistaken) >= 8
    ways = [one["path"] for one in found["resizing"]["items"]]
    assert {one.split(",")[0] for one in ways} >= {"the model", "random weights"}


def test_several_labels_are_said_not_to_be_looked_at(
    crosspatch, digits_run: Path, photos: Path
) -> None:
    told = crosspatch("audit", "photos", "--multi-label", "--run", digits_run, "--json")
    answer = json.loads(told.out)
    assert len(answer["not_looked"]) == 2
    assert all("have several labels; leave --run or" in one for one in answer["not_looked"])


WRONG = [
    (("photos", "--out", "x.pdf"), 2, "--out x.pdf"),
    (("photos", "--out", "none/x.html"), 2, "no folder none"),
    (("phtoos",), 2, "does not exist"),
    (("photos", "--run", "none"), 2, "none does not exist"),
    (("photos", "--run", "photos"), 3, "config.json does not exist"),
    (("photos", "--workers", "0"), 2, "--workers 0"),
    (("photos", "--model", "vit_micro_32"), 2, "--model vit_micro_32 without --weights"),
    (("photos", "--weights", "a.safetensors", "--run", "r"), 2, "--run r and --weights"),
    (("photos", "--weights", "a.safetensors"), 3, "a.safetensors does not exist"),
    (("photos", "--weights", "resnet18.a1_in1k"), 2, "are not on this machine"),
]


@pytest.mark.parametrize(("words", "code", "got"), WRONG)
def test_what_is_refused(crosspatch, photos: Path, words, code: int, got: str) -> None:
    told = crosspatch("audit", *words)
    assert told.code == code
    assert got in told.err
    assert not Path("audit.html").exists()
