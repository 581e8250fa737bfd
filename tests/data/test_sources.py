"""From folders and archives to classes and items, and the errors on the way."""

import io
import os
import pickle
import shutil
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crosspatch.data import archives, opening, sources
from crosspatch.data.decode import UnreadableImage
from crosspatch.data.layout import lay_out
from crosspatch.data.opening import open_source
from crosspatch.data.trees import is_litter, safe_path
from crosspatch.errors import DataError, UsageError
from support import hostile


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "crosspatch" / "archives"


@pytest.fixture
def folder(tmp_path) -> Path:
    hostile.write_folder(tmp_path / "shapes", 3)
    return tmp_path / "shapes"


def splits(tmp_path: Path, *names: str) -> Path:
    for name in names:
        hostile.write_folder(tmp_path / "shapes" / name, 2)
    return tmp_path / "shapes"


def pack(folder: Path, ending: str, inside: str = "") -> Path:
    target = folder.parent / f"packed{ending}"
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    if ending == ".zip":
        with zipfile.ZipFile(target, "w") as archive:
            for path in files:
                archive.write(path, inside + path.relative_to(folder).as_posix())
    else:
        with tarfile.open(target, f"w:{ending[5:]}") as archive:
            for path in files:
                archive.add(path, inside + path.relative_to(folder).as_posix())
    return target


ENDINGS = [".zip", ".tar", ".tar.gz", ".tar.bz2", ".tar.xz"]


def test_a_folder_of_class_folders(folder):
    source = open_source(folder)
    assert source.name == "shapes"
    assert source.classes == hostile.CLASSES
    assert [item.key for item in source.items[:2]] == ["discs/0000.jpg", "discs/0001.jpg"]
    assert [item.label for item in source.items] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert {item.split for item in source.items} == {None}
    assert source.read(4) == (folder / "rings/0001.jpg").read_bytes()
    assert source.image(4).size == (48, 40)
    assert source.image_size(4) == (40, 48)


@pytest.mark.parametrize("inside", ["", "top/", "./", "./top/"])
@pytest.mark.parametrize("ending", ENDINGS)
def test_archives_equal_their_folder(folder, ending, inside):
    plain, packed = open_source(folder), open_source(pack(folder, ending, inside))
    assert packed.name == "packed"
    assert (packed.classes, packed.items) == (plain.classes, plain.items)
    assert packed.fingerprint() == plain.fingerprint()
    assert all(packed.read(index) == plain.read(index) for index in range(len(plain)))
    assert pickle.loads(pickle.dumps(packed)).read(5) == plain.read(5)


@pytest.mark.parametrize("ending", [None, ".zip", ".tar"])
def test_split_folders(tmp_path, ending):
    folder = splits(tmp_path, "train", "val", "test")
    source = open_source(pack(folder, ending, "top/") if ending else folder)
    assert source.classes == hostile.CLASSES
    assert {item.key.split("/")[0] for item in source.items} == {"train", "val", "test"}
    assert all(item.key.startswith(f"{item.split}/") for item in source.items)


def test_the_size_is_found_whatever_part_of_the_file_tells_it(tmp_path, monkeypatch):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        for name, make in hostile.GOOD.items():
            (tmp_path / folder / name).write_bytes(make())
    source = open_source(tmp_path)
    for head in (30, 200, 1 << 17):
        monkeypatch.setattr(sources, "_HEAD", head)
        for index in range(len(source) // 2):
            width, height = source.image(index).size
            assert source.image_size(index) == (height, width)


def test_data_that_may_not_be_read_is_told(folder, monkeypatch):
    def refuse(_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(opening, "FolderTree", refuse)
    told(folder, UsageError, "Permission denied")


def test_class_folders_are_read_to_any_depth(folder):
    (folder / "rings/2024/may").mkdir(parents=True)
    shutil.copy(folder / "rings/0000.jpg", folder / "rings/2024/may/a.jpg")
    assert "rings/2024/may/a.jpg" in [
        item.key for item in open_source(folder).items if item.label == 1
    ]


def test_a_class_may_be_called_val(folder):
    (folder / "stripes").rename(folder / "val")
    assert open_source(folder).classes == ("discs", "rings", "val")


def test_litter_is_invisible_and_other_files_are_listed(folder):
    for name in (
        ".ipynb_checkpoints/x.jpg",
        "__MACOSX/x.jpg",
        "rings/Thumbs.db",
        "rings/._0000.jpg",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x")
    (folder / "rings/notes.txt").write_text("x")
    (folder / "loose.jpg").write_bytes(b"x")
    source = open_source(folder)
    assert source.classes == hostile.CLASSES
    assert len(source) == 9
    listed = {one.path: one.reason for one in source.skipped}
    assert sorted(listed) == ["loose.jpg", "rings/notes.txt"]
    assert "class folder" in listed["loose.jpg"]
    assert ".txt" in listed["rings/notes.txt"]


def test_loops_of_links_end(folder):
    (folder / "rings/loop").symlink_to(folder)
    (folder / "rings/self").symlink_to(folder / "rings")
    (folder / "discs/above").symlink_to(folder.parent.parent)
    (folder / "discs/gone.jpg").symlink_to(folder / "nothing")
    source = open_source(folder)
    assert len(source) == 9
    assert {one.path for one in source.skipped} == {
        "rings/loop", "rings/self", "discs/above", "discs/gone.jpg",
    }  # fmt: skip


def test_a_linked_folder_is_read(folder, tmp_path):
    (folder / "rings").rename(tmp_path / "elsewhere")
    (folder / "rings").symlink_to(tmp_path / "elsewhere")
    assert len(open_source(folder)) == 9


def test_a_pipe_does_not_hang(folder):
    os.mkfifo(folder / "rings/pipe.jpg")
    assert [one.reason for one in open_source(folder).skipped] == ["not a regular file"]


def test_names_that_are_no_text_are_listed(folder):
    os.rename(os.fsencode(folder / "rings/0000.jpg"), os.fsencode(folder / "rings") + b"/\xff.jpg")
    (one,) = open_source(folder).skipped
    assert "UTF-8" in one.reason
    one.path.encode()


def test_names_differing_only_in_case_are_two_classes(folder):
    (folder / "rings").rename(folder / "Discs")
    source = open_source(folder)
    assert source.classes == ("Discs", "discs", "stripes")
    assert source.remarks == (
        "Discs (3) and discs (3) differ only in case: they are separate classes.",
    )


def test_a_val_class_in_capitals_is_named_with_its_neighbour(tmp_path):
    folder = splits(tmp_path, "train", "val")
    (folder / "val/rings").rename(folder / "val/RINGS")
    (folder / "val/discs").rename(folder / "val/disc")
    told(folder, DataError, "the classes 'RINGS', 'disc'", "RINGS: rings, ", "disc: discs")


def test_a_file_that_vanishes_is_told(folder):
    source = open_source(folder)
    (folder / "discs/0000.jpg").unlink()
    with pytest.raises(UnreadableImage, match="no such file"):
        source.read(0)


def test_the_fingerprint_sees_names_sizes_and_labels(folder):
    seen = {open_source(folder).fingerprint()}
    (folder / "rings/0000.jpg").rename(folder / "rings/a.jpg")
    seen.add(open_source(folder).fingerprint())
    (folder / "rings/a.jpg").write_bytes(b"longer" * 999)
    seen.add(open_source(folder).fingerprint())
    (folder / "rings").rename(folder / "zebras")
    seen.add(open_source(folder).fingerprint())
    assert len(seen) == 4


def test_digits():
    source = open_source("digits")
    assert (source.name, len(source), source.classes) == ("digits", 1797, tuple("0123456789"))
    picture = source.read(0)
    assert (picture.shape, picture.dtype) == ((8, 8, 3), np.uint8)
    assert max(source.read(index).max() for index in range(50)) == 255
    assert len({item.key for item in source.items}) == 1797
    assert source.image(3).size == (8, 8)
    assert source.fingerprint() == open_source("digits").fingerprint()


def told(spec: Path, error: type, *words: str) -> None:
    with pytest.raises(error) as caught:
        open_source(spec)
    for word in words:
        assert word in str(caught.value)
    assert all((caught.value.got, caught.value.expected, caught.value.do))


def test_a_missing_path_names_its_neighbours(folder):
    told(folder.parent / "shape", UsageError, "does not exist", "shapes")
    told(folder.parent / "no/such/place", UsageError, "does not exist", "digits")


def test_single_files_are_no_data(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"x")
    told(tmp_path / "a.jpg", UsageError, "single file")


def test_nothing_to_learn_from(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    told(tmp_path / "empty", DataError, "no picture")
    told(folder / "rings", DataError, "no class folder")
    shutil.rmtree(folder / "discs")
    shutil.rmtree(folder / "rings")
    told(folder, DataError, "one class (stripes)")


def test_an_empty_class_is_named(folder):
    (folder / "blanks").mkdir()
    (folder / "blanks/readme.md").write_text("x")
    told(folder, DataError, "no picture of blanks")


def test_a_class_name_is_one_line(folder):
    (folder / "rings").rename(folder / "ri\nngs")
    told(folder, DataError, "'ri\\nngs'", "Rename")


@pytest.mark.parametrize("name", ["validation", "valid", "Train", "testing"])
def test_split_folders_by_other_names_are_corrected(tmp_path, name):
    told(splits(tmp_path, "train", "test", name), DataError, repr(name), "Rename")


def test_splits_need_train_and_nothing_beside(tmp_path):
    folder = splits(tmp_path, "val", "test")
    told(folder, DataError, "no train")
    hostile.write_folder(folder / "train", 1)
    hostile.write_folder(folder / "unseen", 1)
    told(folder, DataError, "unseen")


def test_a_class_that_train_lacks_is_named_with_its_neighbour(tmp_path):
    folder = splits(tmp_path, "train", "val")
    (folder / "val/rings").rename(folder / "val/ring")
    told(folder, DataError, "'ring'", "rings", "val")


def test_val_may_lack_a_class(tmp_path):
    folder = splits(tmp_path, "train", "val")
    shutil.rmtree(folder / "val/rings")
    source = open_source(folder)
    assert {item.label for item in source.items if item.split == "val"} == {0, 2}
    assert source.remarks == ("val holds no picture of rings.",)


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("share", [0.0, 0.3, 0.6])
def test_broken_archives_are_told(folder, ending, share):
    packed = pack(folder, ending)
    packed.write_bytes(packed.read_bytes()[: int(packed.stat().st_size * share)])
    told(packed, DataError, "archive")


def test_a_tar_that_shrinks_while_it_is_used_is_told(folder):
    packed = pack(folder, ".tar")
    source = open_source(packed)
    os.truncate(packed, 700)
    with pytest.raises(UnreadableImage, match="cut short"):
        source.read(0)


def test_evil_names_never_leave_the_archive(folder, tmp_path):
    packed = pack(folder, ".tar")
    with tarfile.open(packed, "a") as archive:
        for name in ("../out.jpg", "/abs.jpg", "discs/../../x.jpg", "C:/x.jpg"):
            member = tarfile.TarInfo(name)
            member.size = 3
            archive.addfile(member, io.BytesIO(b"abc"))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE):
            member = tarfile.TarInfo(f"discs/{kind!r}.jpg")
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
    source = open_source(packed)
    assert len(source) == 9
    reasons = [one.reason for one in source.skipped]
    assert reasons.count("its path leaves the archive") == 4
    assert reasons.count("a link or device inside the archive") == 3
    assert not (tmp_path / "out.jpg").exists()


def test_evil_zip_entries(folder):
    packed = pack(folder, ".zip")
    with zipfile.ZipFile(packed, "a") as archive:
        archive.writestr("../out.jpg", b"abc")
        archive.writestr("rings\\back.jpg", b"abc")
        link = zipfile.ZipInfo("rings/link.jpg")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("rings/0000.jpg", b"again")
    source = open_source(packed)
    assert len(source) == 10
    assert sorted(one.path for one in source.skipped) == [
        "../out.jpg", "rings/0000.jpg", "rings/link.jpg",
    ]  # fmt: skip


def test_a_damaged_zip_member_is_told(folder):
    packed = pack(folder, ".zip")
    data = bytearray(packed.read_bytes())
    data[300] ^= 0xFF
    packed.write_bytes(data)
    with pytest.raises(UnreadableImage, match="broken inside the archive"):
        open_source(packed).read(0)


def _patched(packed: Path, central: int, local: int, value: bytes) -> None:
    """Overwrite a field of the first member, in the directory at the end and before its data."""
    data = bytearray(packed.read_bytes())
    for magic, place in ((b"PK\x01\x02", central), (b"PK\x03\x04", local)):
        at = data.index(magic) + place
        data[at : at + len(value)] = value
    packed.write_bytes(data)


@pytest.mark.parametrize(
    ("central", "local", "value"),
    [
        (8, 6, b"\x01\x00"),  # flagged as encrypted
        (8, 6, b"\x20\x00"),  # flagged as a patch
        (8, 6, b"\x40\x00"),  # flagged as strongly encrypted
        (16, 14, b"\x01\x02\x03\x04"),  # another CRC
        (10, 8, b"\x63\x00"),  # a method of AES
    ],
)
def test_a_zip_member_that_lies_is_told(folder, central, local, value):
    packed = pack(folder, ".zip")
    _patched(packed, central, local, value)
    source = open_source(packed)
    broken = [one.path for one in source.skipped]
    for place in range(len(source)):
        try:
            source.read(place)
        except UnreadableImage:
            broken.append(source.items[place].key)
    assert len(broken) == 1


def test_a_zip_that_was_packed_again_is_read_anew(folder):
    first = open_source(pack(folder, ".zip")).read(0)
    (folder / "discs/0000.jpg").write_bytes((folder / "discs/0001.jpg").read_bytes())
    again = open_source(pack(folder, ".zip")).read(0)
    assert first != again == (folder / "discs/0000.jpg").read_bytes()


def test_a_compressed_tar_is_unpacked_once(folder, cache, monkeypatch):
    packed = pack(folder, ".tar.xz")
    first = open_source(packed)
    assert sorted(path.suffix for path in cache.iterdir()) == [".json", ".tar"]
    monkeypatch.setattr(archives, "_decompress", None)
    assert open_source(packed).fingerprint() == first.fingerprint()
    os.utime(packed, ns=(1, 1))
    with pytest.raises(TypeError):
        open_source(packed)


def test_an_interrupted_unpacking_leaves_nothing(folder, cache, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(archives, "_write", stop)
    with pytest.raises(KeyboardInterrupt):
        open_source(pack(folder, ".tar.gz"))
    assert not list(cache.iterdir())


def test_a_bomb_is_stopped(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(archives, "_ALWAYS", 1 << 20)
    with tarfile.open(tmp_path / "bomb.tar.gz", "w:gz") as archive:
        member = tarfile.TarInfo("a/zeros.png")
        member.size = 50 << 20
        archive.addfile(member, io.BytesIO(bytes(member.size)))
    told(tmp_path / "bomb.tar.gz", DataError, "200-fold")
    assert not list(cache.iterdir())


def test_a_cache_that_cannot_be_written_is_told(folder, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    told(pack(folder, ".tar.gz"), UsageError, "XDG_CACHE_HOME")


names = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)


@given(
    st.lists(st.one_of(names, st.sampled_from(["..", ".", "", "a\\b", "C:"])), max_size=5).map(
        "/".join
    )
)
def test_a_safe_path_stays_below(name):
    path = safe_path(name)
    if path:
        assert os.path.normpath(f"/base/{path}") == f"/base/{path}"
        assert safe_path(path) == path


class Names:
    """A tree of nothing but names."""

    def __init__(self, paths: list[str]) -> None:
        self.files, self.skipped = dict.fromkeys(sorted(paths), 1), []
        parts = (path.split("/")[:-1] for path in paths)
        self.folders = {"/".join(p[: n + 1]) for p in parts for n in range(len(p))}


word = st.sampled_from(["train", "val", "test", "cat", "dog", "validation", "x", "Train"])
paths = st.lists(
    st.tuples(st.lists(word, max_size=3), st.sampled_from("abc")), max_size=12, unique_by=str
)


@given(paths, st.booleans())
def test_every_name_is_placed_listed_or_refused_with_three_parts(drawn, look_through):
    tree = Names(["/".join([*folders, f"{name}.jpg"]) for folders, name in drawn])
    layout = error = None
    try:
        layout = lay_out(tree, "data", look_through=look_through)
    except DataError as raised:
        error = raised
    if layout is None:
        assert all((error.got, error.expected, error.do))
        return
    assert len(layout.files) + len(layout.skipped) == len(tree.files)
    assert list(layout.classes) == sorted(set(layout.classes))
    assert {file.label for file in layout.files} <= set(range(len(layout.classes)))
    assert len({file.split is None for file in layout.files}) == 1
    for file in layout.files:
        assert file.path.endswith(file.key)
        assert layout.classes[file.label] in file.key.split("/")


def test_litter():
    assert is_litter("a/.b/c.jpg")
    assert is_litter("a/THUMBS.DB")
    assert not is_litter("a.b/c.jpg")


def test_one_class_is_enough_to_be_judged_on(tmp_path) -> None:
    (tmp_path / "dogs").mkdir()
    hostile.picture("stripes", 0).save(tmp_path / "dogs" / "1.png")
    with pytest.raises(DataError, match="one class"):
        open_source(tmp_path)
    assert open_source(tmp_path, least_classes=1).classes == ("dogs",)
