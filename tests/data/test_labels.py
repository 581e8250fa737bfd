"""Several labels to a picture: every way to say them gives the same items, and splits keep their
shares."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crosspatch.data.labels import holds_several, names_in
from crosspatch.data.opening import open_source
from crosspatch.data.prepare import prepare
from crosspatch.data.preprocess import Preprocess
from crosspatch.data.sources import Item, Source
from crosspatch.data.split import SPLITS, gaps, make_split, read_split, write_split
from crosspatch.errors import DataError
from support import several


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("several")
    several.write_tables(folder, several.write_pictures(folder, 30))
    return folder


def named(source: Source) -> dict[str, tuple[str, ...]]:
    return {
        Path(item.key).name: tuple(source.classes[label] for label in item.label)
        for item in source.items
    }


@pytest.mark.parametrize(
    ("name", "told"),
    [("bar.csv", {}), ("list.csv", {}), ("list.jsonl", {}), ("long.csv", {"multi_label": True})],
)
def test_every_way_to_write_labels_gives_the_same_items(root, name, told) -> None:
    source = open_source(root / name, **told)
    expected = {f"{seed:03d}.png": several.picture(seed)[1] for seed in range(30)}
    assert source.multi
    assert named(source) == expected
    table = [[name in names for name in several.NAMES] for names in expected.values()]
    np.testing.assert_array_equal(source.labels, np.array(table, np.float32))
    assert source.labels.dtype == np.float32
    assert source.skipped == []
    remark = next(one for one in source.remarks if one.startswith("multi-label: "))
    assert f"{sum(len(n) > 1 for n in expected.values())} of 30" in remark
    nothing = sum(not names for names in expected.values())
    assert any(f"{nothing} pictures have none of the classes" in one for one in source.remarks)
    assert not any("say again" in one for one in source.remarks)


def test_a_parquet_table_of_lists(root) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [(f"pics/{seed:03d}.png", list(several.picture(seed)[1])) for seed in range(30)]
    table = pyarrow.table({"path": [p for p, _ in rows], "label": [n for _, n in rows]})
    parquet.write_table(table, root / "lists.parquet")
    assert named(open_source(root / "lists.parquet")) == named(open_source(root / "bar.csv"))


def test_copies_in_several_class_folders_are_one_picture_where_that_is_asked(root) -> None:
    apart = open_source(root / "folders")
    assert not apart.multi
    assert len(apart) == sum(len(several.picture(seed)[1]) for seed in range(30))
    prepared = prepare(apart, Preprocess((16, 16), (16, 16)))
    assert any("Copies stand in different classes" in one for one in prepared.remarks)
    together = open_source(root / "folders", multi_label=True)
    expected = {f"{seed:03d}.png": several.picture(seed)[1] for seed in range(30)}
    assert named(together) == {name: names for name, names in expected.items() if names}
    merged = len(apart) - len(together)
    assert f"{merged} files are another's copy in one more class folder" in together.remarks[0]
    prepared = prepare(together, Preprocess((16, 16), (16, 16)))
    assert prepared.twins == ()
    shown = prepared.images.images(np_index := prepared.images.labels.sum(1).argmax()[None])
    name = Path(together.items[int(np_index)].key).name
    np.testing.assert_array_equal(shown[0].numpy(), several.picture(int(name[:3]))[0])


def test_copies_under_another_name_are_one_picture_and_those_of_one_class_are_two(tmp_path) -> None:
    rows = several.write_pictures(tmp_path, 4)
    for number, (place, other) in enumerate([("a/1", "b/2"), ("a/3", "a/4"), ("a/5", "b/6")]):
        for name in (place, other):
            path = tmp_path / "data" / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes((tmp_path / rows[number][0]).read_bytes())
    (tmp_path / "data" / "b" / "cut.png").write_bytes(b"")
    source = open_source(tmp_path / "data", multi_label=True)
    assert {item.key: item.label for item in source.items} == {
        "a/1.png": (0, 1), "a/3.png": (0,), "a/4.png": (0,), "a/5.png": (0, 1), "b/cut.png": (1,),
    }  # fmt: skip
    assert source.read(0) == (tmp_path / rows[0][0]).read_bytes()


def test_copies_in_two_splits_stay_two_pictures(tmp_path) -> None:
    rows = several.write_pictures(tmp_path, 3)
    for number, places in enumerate([("train/a", "train/b"), ("train/a", "test/b"), ("train/b",)]):
        for place in places:
            path = tmp_path / "data" / place / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes((tmp_path / rows[number][0]).read_bytes())
    source = open_source(tmp_path / "data", multi_label=True)
    assert [(item.key, item.label) for item in source.items] == [
        ("test/b/1.png", (1,)), ("train/a/0.png", (0, 1)), ("train/a/1.png", (0,)),
        ("train/b/2.png", (1,)),
    ]  # fmt: skip
    prepared = prepare(source, Preprocess((16, 16), (16, 16)))
    assert [one.path for one in prepared.skipped] == ["train/a/1.png"]  # test keeps its picture


def test_a_class_folder_named_like_two_labels_is_refused(tmp_path) -> None:
    rows = several.write_pictures(tmp_path, 2)
    for name, (path, _) in zip(("a|b", "c"), rows, strict=True):
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / path).rename(tmp_path / "data" / name / "x.png")
    assert open_source(tmp_path / "data").classes == ("a|b", "c")
    with pytest.raises(DataError, match=r"called 'a\|b'.*Rename"):
        open_source(tmp_path / "data", multi_label=True)


def test_single_labels_can_be_taken_for_several(root) -> None:
    source = open_source("digits", multi_label=True)
    assert source.multi
    assert source.labels.shape == (1797, 10)
    assert (source.labels.sum(axis=1) == 1).all()
    np.testing.assert_array_equal(source.labels.argmax(axis=1), open_source("digits").labels)


@pytest.mark.parametrize(
    ("cell", "names"),
    [
        ("a|b", ("a", "b")), (" b | a |a|", ("a", "b")), ("a", ("a",)), ("", ()), (None, ()),
        (float("nan"), ()), ('["b", "a"]', ("a", "b")), ("[]", ()), ([], ()),
        (["x", 3], ("3", "x")),
        (7, ("7",)), ("[1, 2]", ("1", "2")), ("|", ()),
    ],
)  # fmt: skip
def test_cells(cell, names) -> None:
    assert names_in(cell, "line 1") == names
    several = isinstance(cell, list) or (isinstance(cell, str) and ("|" in cell or "[" in cell))
    assert holds_several(cell) == several


@pytest.mark.parametrize(
    "cell", ["['a', 'b']", "[a, b]", [["a"]], ["a", None], ["a|b"], [""], {"a": 1}, '[{"a": 1}]']
)
def test_cells_that_are_no_names(cell) -> None:
    with pytest.raises(DataError, match=r"line 7 holds .* no list of names"):
        names_in(cell, "line 7")


def test_repeated_rows_are_an_error_until_they_are_meant(root) -> None:
    with pytest.raises(DataError, match=r"has the class .*--multi-label"):
        open_source(root / "long.csv")
    text = (root / "bar.csv").read_text() + "pics/000.png,bar\n"
    (root / "more.csv").write_text(text)
    with pytest.raises(DataError, match=r"has the classes .*--multi-label"):
        open_source(root / "more.csv")
    joined = open_source(root / "more.csv", multi_label=True)
    assert named(joined)["000.png"] == tuple(sorted({"bar", *several.picture(0)[1]}))


def test_an_empty_cell_names_no_class_where_there_is_one_label_to_a_picture(root) -> None:
    (root / "one.csv").write_text(
        "path,label\npics/000.png,a\npics/001.png,b\npics/002.png,\npics/003.png,a\n"
    )
    source = open_source(root / "one.csv")
    assert [(one.path, one.reason) for one in source.skipped] == [
        ("pics/002.png", "line 4: names no class")
    ]
    asked = open_source(root / "one.csv", multi_label=True)
    assert asked.skipped == []
    assert named(asked)["002.png"] == ()


def test_one_class_is_enough_where_some_pictures_lack_it(root) -> None:
    rows = [{"path": f"pics/{n:03d}.png", "label": ["bar"] if n % 2 else []} for n in range(8)]
    (root / "detect.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert open_source(root / "detect.jsonl").labels.shape == (8, 1)
    rows = [{**row, "label": ["bar"]} for row in rows]
    (root / "always.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError, match="one class"):
        open_source(root / "always.jsonl")


def test_groups_need_no_single_class(root) -> None:
    source = open_source(root / "bar.csv", group="pics/(..)")
    assert {item.group for item in source.items} == {"00", "01", "02"}
    folders = open_source(root / "folders", multi_label=True, group=r"(\d\d)\d")
    assert {item.group for item in folders.items} <= {"00", "01", "02"}


class Drawn(Source):
    """Items with drawn labels: class k with the chance `shares[k]`."""

    multi = True

    def __init__(self, shares: list[float], count: int, seed: int) -> None:
        self.name, self.skipped = "drawn", []
        self.classes = tuple(f"c{k}" for k in range(len(shares)))
        table = np.random.default_rng(seed).random((count, len(shares))) < shares
        for k in range(len(shares)):
            table[k, k] = True  # of each class there is one picture
        self.items = tuple(
            Item(f"{row:05d}", tuple(np.flatnonzero(there).tolist()), None)
            for row, there in enumerate(table)
        )

    def read(self, index):
        return b""

    def _sizes(self):
        return [0] * len(self.items)


shares = st.lists(st.floats(0.02, 0.9), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(shares, st.integers(30, 150), st.integers(0, 1000))
def test_splits_keep_the_shares_of_every_label(drawn, count, seed) -> None:
    source = Drawn(drawn, count, seed)
    split = make_split(source, seed=seed)
    parts = {name: getattr(split, name) for name in SPLITS}
    whole = np.sort(np.concatenate(list(parts.values())))
    np.testing.assert_array_equal(whole, np.arange(count))
    total = source.presence.sum(axis=0)
    counts = {name: source.counts(part) for name, part in parts.items()}
    assert (counts["train"] >= 1).all()
    for name, share in (("train", 0.7), ("val", 0.15), ("test", 0.15)):
        forced = len(drawn) * (2 if name == "train" else 1)  # a picture of each rare class moves
        assert abs(len(parts[name]) - share * count) <= 2 + forced
        assert (np.abs(counts[name] - share * total) <= 3.5).all(), (name, counts)
    again = make_split(source, seed=seed)
    assert all(np.array_equal(getattr(again, name), part) for name, part in parts.items())


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000))
def test_rare_labels_are_in_every_part_and_lone_ones_train(seed) -> None:
    source = Drawn([0.5, 0.3, 0.0, 0.0], 120, seed)
    rare = [5, 40, 77]  # three pictures of c2, one of c3
    source.items = tuple(
        Item(one.key, tuple(sorted({*one.label} - {2} | ({2} if row in rare else set()))), None)
        for row, one in enumerate(source.items)
    )
    split = make_split(source, seed=seed)
    for name in SPLITS:
        assert source.counts(getattr(split, name))[2] == 1
    assert source.counts(split.train)[3] == 1
    said = "got no picture of c3: too few to have one there."
    assert gaps(source, split) == [f"val {said}", f"test {said}"]


def test_groups_and_copies_are_not_torn_and_given_splits_obeyed() -> None:
    source = Drawn([0.4, 0.3, 0.2], 90, 3)
    source.items = tuple(
        Item(one.key, one.label, None, f"g{row // 3}") for row, one in enumerate(source.items)
    )
    split = make_split(source, twins=[(0, 5, 30)])
    part = {int(index): name for name in SPLITS for index in getattr(split, name)}
    assert all(part[row] == part[row // 3 * 3] for row in range(90))
    assert part[0] == part[5] == part[30]
    source.items = tuple(
        Item(one.key, one.label, "test" if row >= 70 else "train")
        for row, one in enumerate(source.items)
    )
    split = make_split(source)
    assert split.test.tolist() == list(range(70, 90))
    assert 8 <= len(split.val) <= 14


def test_the_table_of_the_split_is_read_back(tmp_path) -> None:
    source = Drawn([0.5, 0.5], 20, 0)
    split = make_split(source)
    write_split(tmp_path / "split.csv", source, split)
    assert "c0|c1" in (tmp_path / "split.csv").read_text()
    back = read_split(tmp_path / "split.csv", source)
    assert all(np.array_equal(getattr(back, name), getattr(split, name)) for name in SPLITS)
    source.items = (source.items[0], Item("00001", (), None), *source.items[2:])
    with pytest.raises(DataError, match="says class"):
        read_split(tmp_path / "split.csv", source)


def test_labels_change_the_fingerprint(root) -> None:
    one, other = open_source(root / "bar.csv"), open_source(root / "bar.csv")
    assert one.fingerprint() == other.fingerprint()
    first = next(item for item in other.items if len(item.label) == 2)
    other.items = tuple(
        Item(item.key, item.label[:1], item.split) if item is first else item
        for item in other.items
    )
    assert one.fingerprint() != other.fingerprint()
