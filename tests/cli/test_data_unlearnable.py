"""Unlearnable copies of a data set: what is written, continued, refused, and left when killed."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from crosspatch.cli import data_unlearnable as verb
from crosspatch.cli.data_unlearnable import SIDECAR, key_hash, unlearnable
from crosspatch.cli.options import Output
from crosspatch.data.opening import open_source
from crosspatch.errors import DataError, UsageError
from crosspatch.mixing.cuda_unlearnable import filtered, make_filters


@pytest.fixture(autouse=True)
def fast_hashes(monkeypatch):
    monkeypatch.setattr(verb, "ROUNDS", 10)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for part in ("train", "test"):
        for name in ("bee", "ant"):
            folder = tmp_path / "data" / part / name
            (folder / "more").mkdir(parents=True)
            for stem in ("a", "more/a", "b"):
                pixels = rng.integers(0, 200, (9, 12, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{stem}.png")
    (tmp_path / "data" / "train" / "ant" / "torn.jpg").write_bytes(b"\xff\xd8\xff torn")
    return tmp_path / "data"


def run(data, out, **options) -> int:
    return unlearnable(str(data), **{"key": 77, "out": out, **options})


def files(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def test_copies_of_the_training_pictures_lie_in_class_folders(data, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    assert run(data, out, output=Output(json=True)) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["pictures"], said["changed"], len(said["skipped"])) == (6, 6, 1)
    assert said["skipped"][0]["path"] == "train/ant/torn.jpg"
    names = ["a-2.png", "a.png", "b.png"]
    assert files(out) == sorted([SIDECAR, *(f"{c}/{n}" for c in ("ant", "bee") for n in names)])
    about = json.loads((out / SIDECAR).read_text())
    assert about["classes"] == ["ant", "bee"]
    assert (about["blur"], about["kernel"], about["part"]) == (0.3, 3, 1.0)
    assert about["key_hash"] == key_hash(77, about["salt"])
    assert "77" not in {str(value) for value in about.values()}
    source, weights = open_source(data), make_filters(77, 2).weights
    for index, item in enumerate(source.items):
        if item.key == "train/bee/b.png":
            wanted = filtered(np.asarray(source.image(index)), weights[1])
            assert np.array_equal(np.asarray(Image.open(out / "bee" / "b.png")), wanted)
    assert len(open_source(out)) == 6
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_a_part_of_them_is_changed(data, tmp_path) -> None:
    run(data, tmp_path / "out", part=0.5)
    about = json.loads((tmp_path / "out" / SIDECAR).read_text())
    acts = make_filters(77, 2).chosen(7, 0.5)
    assert 0 < about["changed"] < 6
    assert about["changed"] in (acts.sum(), acts.sum() - 1)  # the torn one may be among them


def test_a_new_class_gets_the_next_filter_and_the_others_keep_theirs(data, tmp_path) -> None:
    run(data, tmp_path / "one")
    shutil.copytree(data / "train" / "bee", data / "train" / "aaa")
    run(data, tmp_path / "two", like=tmp_path / "one")
    assert json.loads((tmp_path / "two" / SIDECAR).read_text())["classes"] == ["ant", "bee", "aaa"]
    for name in ("ant/b.png", "bee/b.png"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    clean = np.asarray(Image.open(data / "train" / "bee" / "b.png"))
    wanted = filtered(clean, make_filters(77, 3).weights[2])
    assert np.array_equal(np.asarray(Image.open(tmp_path / "two" / "aaa" / "b.png")), wanted)
    for wrong, match in (({"key": 78}, "another key"), ({"blur": 0.2}, "another blur")):
        with pytest.raises(UsageError, match=match):
            run(data, tmp_path / "x", like=tmp_path / "one", **wrong)
    for content in ("{", "[]", '{"classes": 3}', "[" * 50_000):
        (tmp_path / "one" / SIDECAR).write_text(content)
        with pytest.raises(DataError, match=SIDECAR):
            run(data, tmp_path / "x", like=tmp_path / "one")
    assert not (tmp_path / "x").exists()


def test_what_cannot_be_is_refused_and_nothing_is_written(data, tmp_path) -> None:
    (tmp_path / "there").mkdir()
    before = files(tmp_path)
    for options, match in (
        ({"out": tmp_path / "there"}, "exists"),
        ({"out": tmp_path / "no" / "out"}, "no such folder"),
        ({"blur": 0.0}, "--blur 0"),
        ({"blur": float("nan")}, "--blur nan"),
        ({"part": 1.5}, "--part 1.5"),
        ({"kernel": 4}, "--kernel 4"),
    ):
        with pytest.raises(UsageError, match=match):
            run(data, options.pop("out", tmp_path / "out"), **options)
    broken = tmp_path / "broken" / "c"
    broken.mkdir(parents=True)
    (broken / "x.jpg").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(DataError, match="none of 1 training pictures"):
        run(tmp_path / "broken", tmp_path / "out")
    assert files(tmp_path) == sorted([*before, "broken/c/x.jpg"])


def test_stopped_on_the_way_it_leaves_nothing(data, tmp_path, monkeypatch) -> None:
    calls = []

    def stop(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return filtered(*arguments)

    monkeypatch.setattr("crosspatch.mixing.cuda_unlearnable.filtered", stop)
    with pytest.raises(KeyboardInterrupt):
        run(data, tmp_path / "out")
    assert os.listdir(tmp_path) == ["data"]
    monkeypatch.undo()
    monkeypatch.setattr(verb, "ROUNDS", 10)
    assert run(data, tmp_path / "out") == 0
