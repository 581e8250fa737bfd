"""Stratified, seeded, obedient to folders, and written so that it can be read back."""

import csv
import tempfile
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crosspatch.data.skipped import Skipped, write_skipped
from crosspatch.data.sources import Item, Source
from crosspatch.data.split import SPLITS, make_split, read_split, write_split
from crosspatch.errors import DataError


class Counts(Source):
    """Items by numbers alone: `counts[split][label]`."""

    def __init__(self, counts: dict[str | None, list[int]]) -> None:
        self.name, self.skipped = "counts", []
        self.classes = tuple(f"c{label}" for label in range(max(map(len, counts.values()))))
        self.items = tuple(
            Item(f"{split}/c{label}/{number}", label, split)
            for split, numbers in counts.items()
            for label, count in enumerate(numbers)
            for number in range(count)
        )

    def read(self, index):
        return b""

    def _sizes(self):
        return [0] * len(self.items)


def parts(split):
    return [getattr(split, name) for name in SPLITS]


counts = st.lists(st.integers(1, 40), min_size=2, max_size=6)


@given(counts, st.integers(0, 5))
def test_a_flat_source_is_divided_by_class(numbers, seed):
    source = Counts({None: numbers})
    split = make_split(source, seed=seed)
    np.testing.assert_array_equal(np.sort(np.concatenate(parts(split))), np.arange(len(source)))
    for label, count in enumerate(numbers):
        train, val, test = (int((source.labels[part] == label).sum()) for part in parts(split))
        assert train >= 1
        assert test >= (count >= 2)
        assert val >= (count >= 3)
        if count >= 4:
            assert abs(test - 0.15 * count) <= 1
            assert abs(val - 0.15 * count) <= 1


@given(counts, counts, st.sampled_from(["val", "test", "both", "none"]))
def test_folders_are_obeyed(numbers, held, given_as):
    folders = {"train": numbers}
    if given_as in ("val", "both"):
        folders["val"] = held[: len(numbers)]
    if given_as in ("test", "both"):
        folders["test"] = held[: len(numbers)]
    source = Counts(folders)
    split = make_split(source)
    came = np.array([item.split for item in source.items])
    np.testing.assert_array_equal(np.sort(np.concatenate(parts(split))), np.arange(len(source)))
    assert set(came[split.train]) == {"train"}
    if given_as in ("test", "both"):
        assert set(came[split.test]) == {"test"}
        np.testing.assert_array_equal(split.test, np.flatnonzero(came == "test"))
    if given_as == "val":
        np.testing.assert_array_equal(split.train, np.flatnonzero(came == "train"))
        assert abs(len(split.val) - len(split.test)) <= len(numbers)
    if given_as == "both":
        np.testing.assert_array_equal(split.val, np.flatnonzero(came == "val"))


def test_the_seed_decides_and_nothing_else():
    source = Counts({None: [50, 50]})
    once, again, other = (make_split(source, seed=seed) for seed in (3, 3, 4))
    assert all(np.array_equal(a, b) for a, b in zip(parts(once), parts(again), strict=True))
    assert not np.array_equal(once.train, other.train)


@given(st.data())
def test_only_kept_items_are_used(data):
    source = Counts({None: [10, 10]})
    keep = data.draw(st.lists(st.integers(0, 19), unique=True, min_size=1))
    if {0, 1} <= {source.items[index].label for index in keep}:
        split = make_split(source, np.array(keep))
        np.testing.assert_array_equal(np.sort(np.concatenate(parts(split))), np.sort(keep))
    else:
        with pytest.raises(DataError, match="no readable picture"):
            make_split(source, np.array(keep))


def test_fractions_are_followed():
    split = make_split(Counts({None: [100, 100]}), fractions=(0.5, 0.3, 0.2))
    assert [len(part) for part in parts(split)] == [100, 60, 40]
    split = make_split(Counts({None: [100, 100]}), fractions=(0.8, 0.2, 0.0))
    assert [len(part) for part in parts(split)] == [160, 40, 0]


def test_the_table_is_read_back(tmp_path):
    source = Counts({None: [9, 9]})
    split = make_split(source, np.arange(1, 18))
    write_split(tmp_path / "split.csv", source, split)
    lines = (tmp_path / "split.csv").read_text().splitlines()
    assert lines[0] == "path,class,split,size"
    assert len(lines) == 18
    back = read_split(tmp_path / "split.csv", source)
    assert all(np.array_equal(a, b) for a, b in zip(parts(split), parts(back), strict=True))


@given(st.lists(st.text("\r\n,;\"' a", min_size=1), min_size=4, max_size=4, unique=True))
def test_any_name_is_read_back(names):
    source = Counts({None: [2, 2]})
    source.items = tuple(
        replace(item, key=name) for item, name in zip(source.items, names, strict=True)
    )
    split = make_split(source)
    with tempfile.TemporaryDirectory() as place:
        write_split(f"{place}/split.csv", source, split)
        back = read_split(f"{place}/split.csv", source)
        write_skipped(f"{place}/skipped.csv", [Skipped(name, "torn") for name in names])
        with open(f"{place}/skipped.csv", newline="", encoding="utf-8") as file:
            assert [row["path"] for row in csv.DictReader(file)] == names
    assert all(np.array_equal(a, b) for a, b in zip(parts(split), parts(back), strict=True))


@pytest.mark.parametrize(
    ("row", "word"),
    [("gone,c0,train", "gone"), ("None/c0/0,c1,train", "c1"), ("None/c0/0,c0,vall", "val")],
)
def test_a_table_of_other_data_is_refused(tmp_path, row, word):
    (tmp_path / "split.csv").write_text(f"path,class,split\n{row}\n")
    with pytest.raises(DataError, match=word):
        read_split(tmp_path / "split.csv", Counts({None: [3, 3]}))
