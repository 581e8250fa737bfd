"""Groups and exact copies lie in one split, and the classes are still shared out."""

import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crosspatch.data.copies import leaks
from crosspatch.data.groups import assign_groups, units
from crosspatch.data.opening import open_source
from crosspatch.data.prepare import prepare
from crosspatch.data.preprocess import Preprocess
from crosspatch.data.sources import Item, Source
from crosspatch.data.split import SPLITS, make_split
from crosspatch.errors import DataError, UsageError
from support import hostile

PREPROCESS = Preprocess((16, 16), (16, 16))


class Listed(Source):
    """Items by (label, group) or (label, group, split) alone."""

    def __init__(self, rows):
        self.name, self.skipped = "listed", []
        self.classes = tuple(f"c{label}" for label in range(1 + max(row[0] for row in rows)))
        self.items = tuple(
            Item(f"c{row[0]}/{at}", row[0], row[2] if len(row) > 2 else None, row[1])
            for at, row in enumerate(rows)
        )

    def read(self, index):
        return b""

    def _sizes(self):
        return [0] * len(self.items)


def parts(split):
    return {name: getattr(split, name) for name in SPLITS}


def shares(split, source, label):
    counts = [int((source.labels[part] == label).sum()) for part in parts(split).values()]
    return np.array(counts) / sum(counts)


rows = st.lists(
    st.tuples(st.integers(0, 3), st.one_of(st.none(), st.sampled_from("abcdefgh"))),
    min_size=1,
    max_size=60,
)


@given(rows, st.integers(0, 3), st.sets(st.integers(0, 59), max_size=4))
def test_no_group_and_no_copy_straddles_and_train_has_every_class(drawn, seed, alike):
    drawn = [*drawn, *((label, None) for label in range(4))]  # every class at least once
    twins = [sorted(at for at in alike if at < len(drawn))]
    source = Listed(drawn)
    split = make_split(source, seed=seed, twins=[one for one in twins if len(one) > 1])
    np.testing.assert_array_equal(
        np.sort(np.concatenate(list(parts(split).values()))), np.arange(len(source))
    )
    where = {int(item): name for name, part in parts(split).items() for item in part}
    for name in {item.group for item in source.items} - {None}:
        assert len({where[at] for at, one in enumerate(source.items) if one.group == name}) == 1
    assert len({where[at] for at in twins[0]}) <= 1
    assert set(source.labels[split.train]) == set(source.labels)


def test_many_small_groups_are_stratified_well():
    rng = np.random.default_rng(0)
    drawn = []
    for group in range(120):  # each patient has pictures of one or two of three kinds
        kinds = rng.choice(3, size=rng.integers(1, 3), p=(0.6, 0.3, 0.1))
        drawn += [(int(kind), f"p{group}") for kind in kinds for _ in range(rng.integers(1, 9))]
    source = Listed(drawn)
    split = make_split(source, seed=1)
    for label in range(3):
        np.testing.assert_allclose(shares(split, source, label), (0.7, 0.15, 0.15), atol=0.05)
    again, other = make_split(source, seed=1), make_split(source, seed=2)
    np.testing.assert_array_equal(split.train, again.train)
    assert not np.array_equal(split.train, other.train)


def test_few_groups_go_to_train_then_test_then_val():
    three = [(label, f"{label}{group}") for label in (0, 1) for group in range(3) for _ in range(9)]
    split = make_split(Listed(three))
    assert [len(part) for part in parts(split).values()] == [18, 18, 18]
    two = [(label, f"{label}{group}") for label in (0, 1) for group in range(2) for _ in range(9)]
    assert [len(part) for part in parts(make_split(Listed(two))).values()] == [18, 0, 18]
    one = [(label, f"{label}") for label in (0, 1) for _ in range(9)]
    assert [len(part) for part in parts(make_split(Listed(one))).values()] == [18, 0, 0]


def test_a_split_of_none_gets_no_group():
    drawn = [(label, f"{label}{group}") for label in (0, 1) for group in range(9) for _ in range(4)]
    assert not len(make_split(Listed(drawn), fractions=(0.8, 0.2, 0.0)).test)


def test_a_group_that_given_splits_tear_apart_is_named():
    torn = Listed([(0, "a", "train"), (1, "b", "train"), (0, "a", "test")])
    with pytest.raises(DataError, match=r"'a' lies in train \(c0/0\) and in test \(c0/2\)"):
        make_split(torn)


def test_units_are_the_connected_ones():
    found = units(["a", None, "a", "b", None, "c"], [(1, 3), (3, 5)])
    assert found.tolist() == [0, 1, 0, 1, 4, 1]


def test_groups_by_folder_pattern_and_none():
    keys = ["cat/p1/x.jpg", "dog/p1/y.jpg", "cat/z.jpg", "train/dog/p2/a/w.jpg"]
    names = ["cat", "dog", "cat", "dog"]
    groups, said = assign_groups(keys, names, "folder")
    assert groups == ["p1", "p1", None, "p2/a"]
    assert said[0].startswith("2 groups")
    assert said[1].startswith("1 pictures have no group")
    assert assign_groups(keys, names, r"p(\d)")[0] == ["1", "1", None, "2"]
    assert assign_groups(keys, names, r"p\d")[0] == ["p1", "p1", None, "p2"]
    for how, word in [("(", "no regular"), ("zebra", "none of the 4"), (r"(\.jpg)", "one group")]:
        with pytest.raises(UsageError, match=word):
            assign_groups(keys, names, how)
    with pytest.raises(UsageError, match="none of the 2"):
        assign_groups(["cat/a.jpg", "dog/b.jpg"], ["cat", "dog"], "folder")


def test_a_folder_source_gets_its_groups(tmp_path):
    for kind in ("cat", "dog"):
        for patient in "abcdefg":
            (tmp_path / kind / patient).mkdir(parents=True)
            for number in range(3):
                data = hostile.saved(hostile.picture("discs", number), "JPEG")
                (tmp_path / kind / patient / f"{number}.jpg").write_bytes(data)
    source = open_source(tmp_path, group="folder")
    assert source.items[0].group == "a"
    assert "7 groups" in source.remarks[0]
    assert {item.group for item in open_source(tmp_path).items} == {None}
    split = make_split(source)
    seen = [{source.items[at].group for at in part} for part in parts(split).values()]
    assert sum(map(len, seen)) == len(set.union(*seen)) == 7
    with pytest.raises(UsageError, match="gives none"):
        open_source("digits", group="folder")


@pytest.fixture
def copies(tmp_path):
    """Nine pictures in three classes, of which discs/0000 has two copies, one in another class."""
    hostile.write_folder(tmp_path / "flat", 3)
    for copy in ("discs/copy.jpg", "rings/copy.jpg"):
        shutil.copy(tmp_path / "flat/discs/0000.jpg", tmp_path / "flat" / copy)
    return tmp_path / "flat"


@pytest.mark.parametrize("workers", [1, 2])
def test_copies_are_found_and_stay_together(copies, workers):
    source = open_source(copies)
    prepared = prepare(source, PREPROCESS, workers=workers)
    (alike,) = prepared.twins
    assert [source.items[at].key for at in alike] == [
        "discs/0000.jpg", "discs/copy.jpg", "rings/copy.jpg",
    ]  # fmt: skip
    assert "2 pictures are exact copies" in prepared.remarks[0]
    assert "discs/0000.jpg and rings/copy.jpg" in prepared.remarks[1]
    for seed in range(8):
        split = make_split(source, prepared.kept, seed, twins=prepared.twins)
        assert sum(bool(set(alike) & set(part.tolist())) for part in parts(split).values()) == 1


def test_files_of_one_size_are_no_copies(tmp_path):
    files = hostile.write_folder(tmp_path, 2)
    most = max(path.stat().st_size for path in files)
    for path in files:
        path.write_bytes(path.read_bytes().ljust(most, b"\0"))
    source = open_source(tmp_path)
    assert source.alike().all()
    assert prepare(source, PREPROCESS).twins == ()


def test_a_copy_of_a_judged_picture_is_not_trained_on(tmp_path):
    for split in ("train", "val", "test"):
        hostile.write_folder(tmp_path / split, 3 if split == "train" else 1)
    for split in ("train", "val"):  # what write_folder gives every split alike is made different
        for path in (tmp_path / split).rglob("0000.jpg"):
            path.write_bytes(path.read_bytes() + split.encode())
    shutil.copy(tmp_path / "test/discs/0000.jpg", tmp_path / "train/rings/leak.jpg")
    shutil.copy(tmp_path / "val/discs/0000.jpg", tmp_path / "train/discs/leak.jpg")
    prepared = prepare(open_source(tmp_path), PREPROCESS)
    reasons = {one.path: one.reason for one in prepared.skipped}
    assert reasons == {
        "train/discs/leak.jpg": "the same file as val/discs/0000.jpg, which is in val",
        "train/rings/leak.jpg": "the same file as test/discs/0000.jpg, which is in test",
    }
    assert prepared.twins == ()
    assert len(prepared.kept) == 15


def test_within_one_split_nothing_leaks():
    source = Listed([(0, None, "train"), (0, None, "train"), (1, None, "test"), (1, None, "val")])
    assert leaks(source, [(0, 1)]) == {}
    assert sorted(leaks(source, [(0, 2, 3)])) == [0, 3]
    flat = Listed([(0, None), (1, None)])
    assert leaks(flat, [(0, 1)]) == {}
