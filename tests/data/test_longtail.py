"""A long tail: the counts of the papers, the same pictures each time, and only of training."""

from __future__ import annotations

import csv
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from crosspatch.data.longtail import Tail, parse_spec, tail_counts, thin
from crosspatch.data.opening import open_source
from crosspatch.data.split import carry_split, make_split, read_split, write_split
from crosspatch.data.written import whole_folder, write_pictures
from crosspatch.errors import DataError, UsageError
from support import goldens
from support.kills import die, killed


@pytest.mark.parametrize(
    ("key", "most", "classes", "ratio"),
    [
        ("c10_if100", 5000, 10, 100),
        ("c10_if50", 5000, 10, 50),
        ("c100_if100", 500, 100, 100),
        ("c100_if50", 500, 100, 50),
    ],
)
def test_the_counts_are_those_of_the_golden(key, most, classes, ratio):
    wanted = goldens.arrays("deit-lt/loss_drw")[f"counts_{key}"]
    assert tail_counts(most, classes, Tail(ratio)) == wanted.tolist()
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(classes), most))
    assert np.bincount(labels[thin(labels, classes, Tail(ratio))]).tolist() == wanted.tolist()


def test_steps_are_two():
    assert tail_counts(100, 5, Tail(20, "step")) == [100, 100, 5, 5, 5]


def test_the_pictures_are_the_first_of_each_class_shuffled_in_turn():
    labels = np.tile(np.arange(3), 40)
    rng, wanted = np.random.RandomState(0), []
    for label, count in enumerate([40, 12, 4]):
        members = np.where(labels == label)[0]
        rng.shuffle(members)
        wanted += members[:count].tolist()
    assert thin(labels, 3, Tail(10)).tolist() == sorted(wanted)


@given(
    st.lists(st.integers(1, 60), min_size=2, max_size=6),
    st.floats(1, 12),
    st.sampled_from(["exp", "step"]),
)
def test_no_class_has_more_than_it_had_and_none_is_lost(having, ratio, kind):
    labels, tail = np.repeat(np.arange(len(having)), having), Tail(ratio, kind)
    wanted = tail_counts(max(having), len(having), tail)
    if min(wanted) < 1:
        with pytest.raises(DataError, match="without a training picture"):
            thin(labels, len(having), tail)
        return
    kept = thin(labels, len(having), tail)
    assert np.bincount(labels[kept]).tolist() == np.minimum(wanted, having).tolist()
    assert len(set(kept.tolist())) == len(kept)


@pytest.mark.parametrize("kind", ["exp", "step"])
@pytest.mark.parametrize(("most", "best"), [(49, 48), (50, 50), (1, 1)])  # 49 * (1 / 49) < 1
def test_the_tail_that_is_advised_works(most, best, kind):
    labels = np.repeat(np.arange(3), most)
    with pytest.raises(DataError) as found:
        thin(labels, 3, Tail(most + 50, kind))
    advised = found.value.do.split()[0]
    assert advised == str(Tail(best, kind))
    tail = parse_spec(f"x{advised}")[1]
    assert np.bincount(labels[thin(labels, 3, tail)]).min() == 1


def test_a_word_is_data_and_its_tail(tmp_path):
    assert parse_spec("digits@lt:100") == ("digits", Tail(100))
    assert parse_spec("a/b.zip@lt:2.5,step") == ("a/b.zip", Tail(2.5, "step"))
    assert parse_spec("digits") == ("digits", None)
    folder = tmp_path / "x@lt:3"
    folder.mkdir()
    assert parse_spec(folder) == (folder, None)
    assert str(Tail(2.5, "step")) == "@lt:2.5,step"


@pytest.mark.parametrize("tail", ["", "0.5", "-3", "nan", "inf", "x", "10,steep", "10,", "1e999"])
def test_nonsense_is_refused(tail):
    with pytest.raises(UsageError) as error:
        open_source(f"digits@lt:{tail}")
    assert error.value.do == "digits@lt:100, or digits@lt:100,step"


def test_what_judges_is_what_it_is_without_a_tail():
    whole, tailed = open_source("digits"), open_source("digits@lt:20")
    every, few = make_split(whole, seed=3), make_split(tailed, seed=3)
    assert np.array_equal(every.test, few.test)
    assert np.array_equal(every.val, few.val)
    assert set(few.train.tolist()) < set(every.train.tolist())
    counts = tailed.counts(few.train)
    assert counts.max() / counts.min() >= 15
    prints = {open_source(f"digits{x}").fingerprint() for x in ("", "@lt:20", "@lt:20,step")}
    assert len(prints) == 3
    with pytest.raises(DataError, match="without a training picture"):
        make_split(open_source("digits@lt:1000"))


@pytest.fixture
def folders(tmp_path):
    """`train` and `test` of two classes, 8 and 4 pictures each, as folder, archive and table."""
    rng, rows = np.random.default_rng(0), []
    root = tmp_path / "photos"
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        for split, count in (("train", 8), ("test", 4)):
            for name in "ab":
                (root / split / name).mkdir(parents=True)
                for number in range(count):
                    path = root / split / name / f"{number}.png"
                    Image.fromarray(rng.integers(0, 255, (8, 8, 3), np.uint8)).save(path)
                    archive.write(path, path.relative_to(tmp_path))
                    rows.append((path.relative_to(tmp_path), name, split))
    with (tmp_path / "t.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "label", "split"), *rows])
    return tmp_path


@pytest.mark.parametrize("name", ["photos", "photos.zip", "t.csv"])
def test_every_kind_of_data_has_a_tail(folders, name):
    source = open_source(f"{folders / name}@lt:6")
    split = make_split(source)
    assert source.counts(split.train).tolist() == [7, 1]
    assert source.counts(split.test).tolist() == [4, 4]
    write_split(folders / "split.csv", source, split)
    assert np.array_equal(read_split(folders / "split.csv", source).train, split.train)
    carried = carry_split(folders / "split.csv", source, np.arange(len(source)))
    assert np.array_equal(carried.train, split.train)


def test_several_labels_have_no_tail(folders):
    with pytest.raises(UsageError, match="several labels"):
        open_source(f"{folders / 't.csv'}@lt:6", multi_label=True)


def test_written_pictures_are_read_as_they_were(folders):
    source = open_source(f"{folders / 'photos.zip'}@lt:6")
    split = make_split(source)
    with whole_folder(folders / "out") as draft:
        write_pictures(source, split, draft)
    again = open_source(folders / "out")
    parts = make_split(again)
    for name in ("train", "val", "test"):
        mine, theirs = getattr(split, name), getattr(parts, name)
        assert sorted(source.read(i) for i in mine) == sorted(again.read(i) for i in theirs)


def test_many_pictures_of_one_name_are_written_in_one_go(tmp_path, monkeypatch):
    for number in range(120):
        place = tmp_path / "photos" / "ab"[number % 2] / str(number)
        place.mkdir(parents=True)
        Image.new("RGB", (4, 4), (number, 0, 0)).save(place / "image.png")
    source = open_source(tmp_path / "photos")
    looked, exists = [], Path.exists
    monkeypatch.setattr(Path, "exists", lambda self, **how: looked.append(1) or exists(self, **how))
    with whole_folder(tmp_path / "out") as draft:
        write_pictures(source, make_split(source), draft)
    assert len({path.read_bytes() for path in (tmp_path / "out").rglob("*.png")}) == 120
    assert len(looked) < 4 * 120


def test_digits_are_written_as_pictures(tmp_path):
    source = open_source("digits@lt:100")
    split = make_split(source)
    with whole_folder(tmp_path / "out") as draft:
        write_pictures(source, split, draft)
    again = open_source(tmp_path / "out")
    assert again.counts(make_split(again).train).tolist() == source.counts(split.train).tolist()
    mine = source.image(int(split.test[0])).tobytes()
    there = [again.image(i) for i in make_split(again).test]
    assert mine in [one.convert("RGB").tobytes() for one in there]


def test_nothing_is_overwritten_and_a_failure_leaves_nothing(folders):
    def fail():
        with whole_folder(folders / "out") as draft:
            (draft / "x").write_text("x")
            raise RuntimeError

    for place in (folders / "photos", folders / "t.csv", folders / "none" / "out"):
        with pytest.raises(UsageError), whole_folder(place):
            pass
    before = sorted(folders.iterdir())
    with pytest.raises(RuntimeError):
        fail()
    assert sorted(folders.iterdir()) == before


def test_a_kill_leaves_no_half_result(folders):
    source = open_source(f"{folders / 'photos'}@lt:6")
    split = make_split(source)

    def work():
        with whole_folder(folders / "out") as draft:
            write_pictures(source, split, draft, lambda done, total: die() if done == 9 else None)

    assert killed(lambda: None, work)
    assert not (folders / "out").exists()
    with whole_folder(folders / "out") as draft:
        write_pictures(source, split, draft)
    assert len([*(folders / "out").rglob("*.png")]) == sum(map(len, vars(split).values()))
