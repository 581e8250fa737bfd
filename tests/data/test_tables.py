"""Tables as data: every dialect gives the same items, and whatever is ambiguous is an error."""

import io
import json
import pickle
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from crosspatch.data import shelf, tables
from crosspatch.data.opening import open_source
from crosspatch.data.split import make_split
from crosspatch.errors import DataError, UsageError
from support import hostile


@pytest.fixture
def folder(tmp_path) -> Path:
    """`shapes/<class>/000N.jpg`, three of each of three classes."""
    hostile.write_folder(tmp_path / "shapes", 3)
    return tmp_path


def listing(folder: Path) -> list[tuple[str, str]]:
    files = sorted((folder / "shapes").rglob("*.jpg"))
    return [(path.relative_to(folder).as_posix(), path.parent.name) for path in files]


def write(folder: Path, text: str, name: str = "t.csv", encoding: str = "utf-8") -> Path:
    (folder / name).write_bytes(text.encode(encoding))
    return folder / name


def table(folder: Path, rows=None, head: str = "path,label", **how) -> Path:
    rows = listing(folder) if rows is None else rows
    return write(folder, "\n".join([head, *(",".join(map(str, row)) for row in rows)]), **how)


def items(source) -> list[tuple[str, str]]:
    return [(item.key, source.classes[item.label]) for item in source.items]


def refused(path: Path, error: type, *words: str, **how) -> None:
    with pytest.raises(error) as caught:
        open_source(path, **how)
    for word in words:
        assert word in str(caught.value)
    assert all((caught.value.got, caught.value.expected, caught.value.do))


def dialects(folder: Path) -> dict[str, Path]:
    rows = listing(folder)
    objects = [{"image": path, "class": name} for path, name in rows]
    lines = [f"{path};{name}" for path, name in rows]
    return {
        "plain": table(folder),
        "bom": table(folder, name="bom.csv", encoding="utf-8-sig"),
        "utf16": table(folder, name="wide.csv", encoding="utf-16"),
        "semicolons": write(folder, "\r\n".join(["Path;Label", *lines, ""]), "s.csv"),
        "quotes": table(folder, [(f'"{p}"', f' "{n}"') for p, n in rows], name="q.csv"),
        "tabs": write(
            folder, "\n".join(["file\tcategory", *(f"{p}\t{n}" for p, n in rows)]), "t.tsv"
        ),
        "index": table(
            folder, [(at, *row) for at, row in enumerate(rows)], ",path,label", name="i.csv"
        ),
        "windows": table(folder, [(p.replace("/", "\\"), n) for p, n in rows], name="w.csv"),
        "dots": table(folder, [(f"./x/../{p}", n) for p, n in rows], name="d.csv"),
        "absolute": table(folder, [(folder / p, n) for p, n in rows], name="a.csv"),
        "blank lines": table(folder, [*rows, ("", ""), ()], name="b.csv"),
        "jsonl": write(folder, "\n".join(map(json.dumps, objects)), "o.jsonl"),
        "json": write(folder, json.dumps(objects), "o.json"),
    }


def test_every_dialect_gives_the_same_items(folder):
    expected = items(open_source(folder / "shapes"))
    for name, path in dialects(folder).items():
        source = open_source(path)
        assert items(source) == [(f"shapes/{key}", label) for key, label in expected], name
        assert source.skipped == [], name
        assert source.read(0) == (folder / "shapes/discs/0000.jpg").read_bytes(), name
        assert source.image(4).size == (48, 40)
        assert source.image_size(4) == (40, 48)
        assert source.remarks[0].startswith("Columns of the table: path from "), name
        assert source.name == path.stem


def test_parquet(folder):
    import pyarrow
    from pyarrow import parquet

    rows = [{"path": path, "label": name, "patient": at} for at, (path, name) in
            enumerate(listing(folder))]  # fmt: skip
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "t.parquet")
    source = open_source(folder / "t.parquet")
    assert items(source) == listing(folder)
    assert [item.group for item in source.items] == [str(at) for at in range(9)]
    (folder / "t.parquet").write_bytes(b"PAR1")
    refused(folder / "t.parquet", DataError, "cannot read the table")


def test_parquet_without_its_reader_says_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    refused(write(folder, "x", "t.parquet"), UsageError, "pip install 'crosspatch[tables]'")


def test_split_and_group_columns_are_found_and_obeyed(folder):
    rows = [
        (path, name, ("train", "val", "test")[at % 3], f"p{at % 3}")
        for at, (path, name) in enumerate(listing(folder))
    ]
    source = open_source(table(folder, rows, "path,label,split,patient"))
    assert [item.split for item in source.items] == ["train", "val", "test"] * 3
    assert [item.group for item in source.items] == ["p0", "p1", "p2"] * 3
    assert "split from 'split', group from 'patient'" in source.remarks[0]
    split = make_split(source)
    assert split.val.tolist() == [1, 4, 7]
    plain = open_source(folder / "t.csv", split_column="none", group="none")
    assert {(item.split, item.group) for item in plain.items} == {(None, None)}


def test_groups_may_be_a_column_a_folder_or_an_expression(folder):
    rows = [(*row, at % 2) for at, row in enumerate(listing(folder))]
    path = table(folder, rows, "path,label,plant")
    assert {item.group for item in open_source(path, group="plant").items} == {"0", "1"}
    by_name = open_source(path, group=r"(\d+)\.jpg")
    assert {item.group for item in by_name.items} == {"0000", "0001", "0002"}
    refused(path, UsageError, "no column 'plants'", "--group plant", group="plants")
    refused(path, UsageError, "gives none", group="folder")


def test_columns_by_other_names_are_told(folder):
    path = table(folder, [(n, "x", p) for p, n in listing(folder)], "what,label,where")
    refused(path, UsageError, "hold the path", "--path-column", "what, label, where")
    source = open_source(path, path_column="where", label_column="what")
    assert items(source) == listing(folder)
    refused(path, UsageError, "no column 'wher'", "--path-column where", path_column="wher")
    refused(path, UsageError, "asked for twice", path_column="what", label_column="what")
    refused(folder / "shapes", UsageError, "is no table", label_column="what")


def test_two_possible_columns_are_not_guessed_between(folder):
    path = table(folder, [(p, n, n) for p, n in listing(folder)], "path,label,class")
    refused(path, UsageError, "label or class", "--label-column label")
    path = table(folder, [(p, n, 1, 2) for p, n in listing(folder)], "path,label,group,patient")
    refused(path, UsageError, "group or patient", "--group none")
    assert len(open_source(path, group="none")) == 9


def test_files_that_are_not_there_are_listed(folder):
    extra = [("shapes/gone.jpg", "discs"), ("../up.jpg", "discs"), ("shapes", "discs"),
             ("shapes/rings/0000.jpg", "rings"), ("C:\\x\\y.jpg", "discs"), ("", "discs"),
             ("shapes/discs/0001.jpg", ""), ("/proc/none/../../etc/nothing", "rings")]  # fmt: skip
    (folder.parent / "up.jpg").write_bytes(b"x")
    source = open_source(table(folder, [*listing(folder), *extra]))
    assert len(source) == 9
    assert [(one.path, one.reason) for one in source.skipped] == [
        ("../up.jpg", "line 12: its path leaves the table's folder"),
        ("/etc/nothing", "line 18: no such file or directory"),
        ("C:\\x\\y.jpg", "line 15: a path of another machine"),
        ("line 16", "line 16: names no file"),
        ("shapes", "line 13: not a regular file"),
        ("shapes/discs/0001.jpg", "line 17: names no class"),
        ("shapes/gone.jpg", "line 11: no such file or directory"),
    ]
    assert "1 row of the table says again" in source.remarks[1]


def test_absolute_paths_elsewhere_are_read_as_the_user_wrote_them(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    files = hostile.write_folder(other, 1)
    rows = [(path, path.parent.name) for path in files]
    source = open_source(table(folder, rows))
    assert [item.key for item in source.items] == [path.as_posix() for path in sorted(files)]
    assert source.read(0) == sorted(files)[0].read_bytes()


def test_contradictions_name_both_lines(folder):
    rows = listing(folder)
    twice = table(folder, [*rows, (f"./{rows[0][0]}", "rings")])
    refused(twice, DataError, "'discs' in line 2 and 'rings' in line 11", "--multi-label")
    marked = [(*row, "train") for row in rows]
    twice = table(folder, [*marked, (*rows[0], "test")], "path,label,split")
    refused(twice, DataError, "the split 'train' in line 2 and 'test' in line 11")


def test_a_list_that_is_no_json_is_refused(folder):
    rows = [*listing(folder)[1:], (listing(folder)[0][0], "\"['discs', 'rings']\"")]
    refused(table(folder, rows), DataError, "line 10 holds", "no list of names", "discs")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("validation", ("line 3 says split 'validation'", "Write val for validation")),
        ("Train", ("Write train for Train",)),
        ("fold1", ("line 3 says split 'fold1'", "--split-column none")),
        ("", ("line 3 names no split",)),
    ],
)
def test_splits_are_not_guessed(folder, value, words):
    rows = [(*row, value if at == 1 else "train") for at, row in enumerate(listing(folder))]
    refused(table(folder, rows, "path,label,split"), DataError, *words)


def test_splits_need_train_and_its_classes(folder):
    rows = [(*row, "val") for row in listing(folder)]
    refused(table(folder, rows, "path,label,split"), DataError, "val but no train")
    rows = [(*row, "train") for row in listing(folder)]
    rows[0] = (rows[0][0], "DISCS", "val")
    refused(table(folder, rows, "path,label,split"), DataError, "'DISCS'", "DISCS: discs")
    rows[0] = (rows[0][0], "discs", "val")
    source = open_source(table(folder, rows, "path,label,split"))
    assert source.remarks[1] == "val holds no picture of rings, stripes."


def test_classes_without_a_file_and_single_classes_are_refused(folder):
    lost = [*listing(folder), ("shapes/gone.jpg", "stars")]
    refused(table(folder, lost), DataError, "no picture of stars", "remove the class")
    refused(table(folder, [(p, "discs") for p, _ in listing(folder)]), DataError, "one class")
    gone = [(f"elsewhere/{p}", n) for p, n in listing(folder)]
    refused(table(folder, gone), DataError, "none of the files", "--path-column")


@pytest.mark.parametrize(
    ("name", "text", "word"),
    [
        ("t.csv", "", "no column"),
        ("t.csv", "path,label\n", "no row"),
        ("t.csv", "path,path,label\na,b,c\n", "two columns"),
        ("t.csv", "path,label\na.jpg\n", "line 2 has 1 values for 2 columns"),
        ("t.csv", 'path,label\n"a.jpg,b\n', "line 2"),
        ("t.csv", "path,label\na\0.jpg,b\n", "zero bytes"),
        ("t.csv", f"path,label\n{'a' * 200_000},b\n", "line 2"),
        ("t.jsonl", '{"path": 1}\n{"path"\n', "line 2 is no JSON"),
        ("t.jsonl", "3\n", "line 1 is no JSON object"),
        ("t.json", "[" * 100_000, "no JSON"),
    ],
)
def test_broken_tables_are_told(folder, name, text, word):
    with pytest.raises((DataError, UsageError), match=word):
        open_source(write(folder, text, name))


def test_a_table_of_another_encoding_is_read_and_said(folder):
    (folder / "shapes").rename(folder / "Blätter")
    rows = [(f"Blätter/{name}/000{at}.jpg", name) for name in ("discs", "rings") for at in (0, 1)]
    source = open_source(table(folder, rows, encoding="cp1252"))
    assert len(source) == 4
    assert "Windows-1252" in source.remarks[1]
    assert len(open_source(table(folder, rows))) == 4


def test_numbers_are_class_names_and_nothing_is_a_missing_label(folder):
    rows = [{"path": p, "label": at % 2} for at, (p, _) in enumerate(listing(folder))]
    rows.append({"path": "shapes/discs/0001.jpg", "label": float("nan")})
    source = open_source(write(folder, "\n".join(map(json.dumps, rows)), "t.jsonl"))
    assert source.classes == ("0", "1")
    assert source.skipped[0].reason == "line 10: names no class"


def test_the_guesses_are_distinct():
    names = [name for guesses in tables.GUESSES.values() for name in guesses.split()]
    assert len(names) == len(set(names))


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def pack(folder: Path, name: str, inside: str = "") -> Path:
    """All files of the folder in an archive elsewhere, below `inside`."""
    target = folder.with_name(f"{folder.name}-packed") / name
    target.parent.mkdir(exist_ok=True)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    if name.endswith(".zip"):
        with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
            for path in files:
                archive.write(path, inside + path.relative_to(folder).as_posix())
    else:
        with tarfile.open(target, f"w:{Path(name).suffix[1:].replace('tar', '')}") as archive:
            for path in files:
                archive.add(path, inside + path.relative_to(folder).as_posix())
    return target


@pytest.mark.parametrize("inside", ["", "top/", "./"])
@pytest.mark.parametrize("name", ["p.zip", "p.tar", "p.tar.gz", "p.tar.xz"])
def test_a_table_in_an_archive_is_read_as_one_in_a_folder(folder, name, inside):
    rows = [(*row, f"g{at % 2}") for at, row in enumerate(listing(folder))]
    plain = open_source(table(folder, rows, "path,label,patient"))
    packed = pack(folder, name, inside)
    within = inside.removeprefix("./")
    for spec in (packed, packed / within / "t.csv", str(packed)):
        source = open_source(spec)
        assert (source.items, source.classes) == (plain.items, plain.classes)
        assert (source.remarks, source.skipped) == (plain.remarks, [])
        assert source.fingerprint() == plain.fingerprint()
        again = pickle.loads(pickle.dumps(source))
        assert [again.read(at) for at in range(9)] == [plain.read(at) for at in range(9)]
        assert source.image_size(4) == (40, 48)
    assert {item.group for item in open_source(packed, group=r"(\d+)\.jpg").items} == {
        "0000", "0001", "0002",
    }  # fmt: skip


def test_every_dialect_is_read_in_an_archive(folder):
    import pyarrow
    from pyarrow import parquet

    expected = listing(folder)
    found = dialects(folder)
    objects = [{"path": path, "label": name} for path, name in expected]
    parquet.write_table(pyarrow.Table.from_pylist(objects), folder / "t.parquet")
    packed = pack(folder, "p.zip")
    for name, path in {**found, "parquet": folder / "t.parquet"}.items():
        if name != "absolute":
            assert items(open_source(packed / path.name)) == expected, name
    refused(packed, DataError, f"{packed} holds {len(found) + 1} tables", "crosspatch train ")
    refused(packed / "a.csv", DataError, "none of the files", "which leaves the archive")
    refused(packed / "x.csv", UsageError, f"{packed} holds no table x.csv", "crosspatch train ")
    refused(packed / "shapes", UsageError, "holds no table shapes")


def test_rows_that_lead_out_of_the_archive_or_nowhere_are_listed(folder):
    extra = ["../up.jpg", "shapes/../../up.jpg", "/etc/passwd", "C:\\x.jpg", "shapes/gone.jpg",
             "shapes", "shapes/link.jpg", ".hidden/x.jpg", "up.jpg/", ""]  # fmt: skip
    (folder.parent / "up.jpg").write_bytes(b"x")
    table(folder, [*listing(folder), *((path, "discs") for path in extra)])
    packed = pack(folder, "p.tar")
    with tarfile.open(packed, "a") as archive:
        for name in ("../up.jpg", ".hidden/x.jpg"):
            member = tarfile.TarInfo(name)
            member.size = 3
            archive.addfile(member, io.BytesIO(b"abc"))
        member = tarfile.TarInfo("shapes/link.jpg")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(member)
    source = open_source(packed)
    assert len(source) == 9
    assert {one.path: one.reason.split(": ")[1] for one in source.skipped} == {
        "../up.jpg": "its path leaves the table's folder",
        "shapes/../../up.jpg": "its path leaves the table's folder",
        "/etc/passwd": "an absolute path, which leaves the archive",
        "C:\\x.jpg": "a path of another machine",
        "shapes/gone.jpg": "not in the archive",
        "shapes": "not a regular file",
        "shapes/link.jpg": "a link or device inside the archive",
        ".hidden/x.jpg": "hidden",
        "up.jpg": "not in the archive",
        "line 20": "names no file",
    }


def test_class_folders_win_and_the_table_beside_them_is_said(folder):
    table(folder / "shapes", [(f"discs/{at}.jpg", "x") for at in range(3)], name="notes.csv")
    top = pack(folder, "top.zip")
    for spec in (folder / "shapes", top, pack(folder / "shapes", "p.zip")):
        source = open_source(spec)
        assert source.classes == hostile.CLASSES
        inner = "shapes/notes.csv" if spec == top else "notes.csv"
        (said,) = source.remarks
        assert f"{inner} beside them was not read: {spec / inner} as DATA would be." in said


def test_columns_that_are_told_mean_the_table(folder):
    rows = [(path.removeprefix("shapes/"), f"c{at % 2}") for at, (path, _) in
            enumerate(listing(folder))]  # fmt: skip
    table(folder / "shapes", rows, "path,kind")
    packed = pack(folder / "shapes", "p.zip")
    assert open_source(packed).classes == hostile.CLASSES
    assert open_source(packed, label_column="kind").classes == ("c0", "c1")


def test_folders_called_like_splits_beside_a_table_are_no_classes(folder):
    (folder / "shapes/discs").rename(folder / "shapes/train")
    (folder / "shapes/rings").rename(folder / "shapes/test")
    for path in (folder / "shapes/stripes").iterdir():
        path.unlink()
    (folder / "shapes/stripes").rmdir()
    table(folder / "shapes", [("train/0000.jpg", "a"), ("test/0000.jpg", "b")])
    packed = pack(folder / "shapes", "p.zip")
    for spec in (folder / "shapes", packed):
        refused(spec, DataError, "test and train with pictures in them, and t.csv", "crosspatch tr")
    assert open_source(packed / "t.csv").classes == ("a", "b")


def test_a_folder_that_holds_a_table_and_no_classes_says_what_to_type(folder):
    path = table(folder)
    refused(folder, DataError, "one class (shapes)", f"crosspatch train {path}")
    (folder / "my list.csv").write_text("x")
    refused(folder, DataError, f"crosspatch train '{folder}/my list.csv' or {path}")
    (folder / "shapes/discs").rename(folder / "discs")
    assert len(open_source(folder).classes) == 2


def test_faults_of_class_folders_are_told_in_spite_of_a_table(folder):
    (folder / "shapes").rename(folder / "train")
    hostile.write_folder(folder / "validation", 1)
    (folder / "readme.csv").write_text("a,b\n1,2\n")
    refused(pack(folder, "p.zip"), DataError, "'validation'", "Rename validation to val")


def test_a_broken_or_giant_table_in_an_archive_is_told(folder, monkeypatch):
    table(folder)
    packed = pack(folder, "p.tar")
    data = packed.read_bytes()
    at = data.index(b"path,label\n")
    with monkeypatch.context() as patch:
        patch.setattr(shelf, "MAX_BYTES", 10)
        refused(packed, DataError, "t.csv is larger than 0 MB")
    packed.write_bytes(data[:at] + b"\0" * 40 + data[at + 40 :])
    refused(packed, DataError, f"cannot read the table {packed / 't.csv'}: it holds zero bytes")
    packed = pack(folder, "p.zip")
    with zipfile.ZipFile(packed) as archive:
        at = archive.getinfo("t.csv").header_offset + 60
    data = bytearray(packed.read_bytes())
    data[at] ^= 0xFF
    packed.write_bytes(data)
    refused(packed, DataError, f"cannot read the table {packed / 't.csv'}: broken inside")
