"""Audits: each planted fault is found, and its command mends it, whatever the names are."""

from __future__ import annotations

import csv
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from crosspatch.data.audit import Audit, audit
from crosspatch.data.decode import read_header
from crosspatch.data.exif import NOTHING, Taken, taken
from crosspatch.data.findings import Place, quoted
from crosspatch.data.layout import MEANING
from crosspatch.data.opening import open_source
from crosspatch.errors import DataError, UsageError
from crosspatch.report.page import write_page
from support.hostile import saved

NASTY = 'it\'s "a" <b>$(x) cat'


def scene(seed: int, side: int = 48) -> Image.Image:
    rng = np.random.default_rng(seed)
    pixels = np.full((side, side, 3), 128.0)
    for cells in (3, 6, 12, 24):
        coarse = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), np.uint8))
        layer = coarse.resize((side, side), Image.Resampling.BICUBIC)
        pixels += (np.asarray(layer, np.float64) - 128) * 2 / cells**0.5
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def put(root: Path, folder: str, count: int, start: int) -> None:
    place = root / folder
    place.mkdir(parents=True, exist_ok=True)
    for seed in range(start, start + count):
        scene(seed).save(place / f"a{seed}z.png")


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two sound classes; the working folder is the one that holds them."""
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "my data"
    put(root, NASTY, 24, 0)
    put(root, "dog", 24, 100)
    return root


def look() -> Audit:
    return audit("my data", workers=1)


def kinds(found: Audit, *levels: str) -> set[str]:
    return {one.kind for one in found.findings if one.level in (levels or ("bad", "warn"))}


def mend(found: Audit, kind: str) -> None:
    """Types the command of a finding into a shell."""
    for path, text in found.files.items():
        path.write_text(text)
    (command,) = [one.command for one in found.findings if one.kind == kind]
    subprocess.run(["sh", "-ec", command], check=True)


def test_sound_pictures_need_no_hand(data: Path) -> None:
    found = look()
    assert kinds(found) == {"small test"}
    assert not found.needs_a_hand
    assert not found.files
    assert [row["all"] for row in found.classes] == [24, 24]


def faults() -> dict:
    def copy_across(root: Path) -> None:
        shutil.copy(root / "dog" / "a100z.png", root / NASTY / "-rf *.png")

    def write(name: str, content: bytes):
        return lambda root: (root / "dog" / name).write_bytes(content)

    small = saved(scene(7).resize((60, 60)), "JPEG", quality=60)
    return {
        "unreadable": write("it's cut.jpg", b""),
        "plain": write("a \"black\" one.png", saved(Image.new("RGB", (50, 50)), "PNG")),
        "tiny": write("tiny.png", saved(scene(500).resize((20, 20)), "PNG")),
        "copies": lambda root: shutil.copy(root / "dog" / "a101z.png", root / "dog" / "b c.png"),
        "copies-classes": copy_across,
        "near-classes": write("near.jpg", small),
        "same name": lambda root: put(root, "Dog", 6, 200),
        "plural": lambda root: put(root, "dogs", 6, 200),
        "spaces": lambda root: put(root, " bird ", 20, 200),
        "numbers": lambda root: put(root, "7", 20, 200),
        "hidden": lambda root: (root / ".ipynb_checkpoints").mkdir(),
        "empty class": lambda root: (root / "an empty one").mkdir(),
        "control signs": write("line\nbreak.png", saved(scene(501), "PNG")),
        "deep": lambda root: [put(root, f"animals/{name}", 20, at)
                              for name, at in (("ant", 200), ("bee", 300))],
        "animated": write("move.gif", saved(scene(502), "GIF", save_all=True,
                                            append_images=[scene(503)])),
        "loose": lambda root: scene(504).save(root / "loose one.png"),
    }  # fmt: skip


@pytest.mark.parametrize("kind", faults())
def test_the_command_of_a_fault_mends_it(data: Path, kind: str) -> None:
    faults()[kind](data)
    found = look()
    assert kind in kinds(found)
    mend(found, kind)
    assert kind not in kinds(look())


@pytest.mark.parametrize("kind", ["split name", "unknown class", "missing class", "copies-splits"])
def test_the_command_of_a_fault_of_splits_mends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "my data"
    put(root, f"train/{NASTY}", 30, 0)
    put(root, "train/dog", 30, 100)
    put(root, "val/dog", 6, 200)
    put(root, f"val/{NASTY}", 6, 300)
    if kind == "split name":
        (root / "val").rename(root / "validation")
    elif kind == "unknown class":
        (root / "val" / "dog").rename(root / "val" / "DOG")
    elif kind == "missing class":
        shutil.rmtree(root / "val" / NASTY)
    else:
        shutil.copy(root / "val/dog/a200z.png", root / "train/dog/copy.png")
    found = look()
    assert kinds(found, "bad") == {kind}
    mend(found, kind)
    assert not look().needs_a_hand
    open_source(root)
    assert (root / "val" / "dog" / "a200z.png").exists()


def test_one_folder_too_many_and_what_a_training_refuses(data: Path) -> None:
    outer = data.with_name("outer")
    outer.mkdir()
    data.rename(outer / "my data")
    found = audit("outer", workers=1)
    (nested,) = [one for one in found.findings if one.kind == "nested"]
    assert nested.command == "crosspatch audit 'outer/my data' --overwrite"
    assert len(found.classes) == 2


def test_bursts_are_kept_together_by_a_table_that_train_reads(data: Path) -> None:
    for number in range(6):
        exif = Image.Exif()
        exif[0x010F], exif[0x0132] = "Maker", f"2026:01:02 03:04:0{number // 3 * 5}"
        (data / "dog" / f"x{number}y.jpg").write_bytes(
            saved(scene(700 + number), "JPEG", exif=exif)
        )
    found = look()
    (bursts,) = [one for one in found.findings if one.kind == "bursts"]
    assert [len(one["paths"]) for one in bursts.items] == [3, 3]
    assert bursts.command == "crosspatch train audit-groups.csv --group group"
    for path, text in found.files.items():
        path.write_text(text)
    source = open_source("audit-groups.csv", group="group")
    groups = [item.group for item in source.items if "/x" in item.key]
    assert len(source) == 54
    assert [groups.count(name) for name in sorted(set(groups))] == [3, 3]


def test_sources_are_told_by_names_and_likeness(data: Path) -> None:
    for kind in (NASTY, "dog"):
        for film in range(8):
            for frame in range(6):
                wide = scene(1000 * (kind == "dog") + 40 * film, 96)
                part = wide.crop((4 * frame, 0, 4 * frame + 60, 60))
                part.save(data / kind / f"film{'abcdefgh'[film]}_{kind[:1]}_frame{frame}.png")
    found = look()
    (sources,) = [one for one in found.findings if one.kind == "sources"]
    words = sources.command.split("--group ")
    assert words[0] == "crosspatch train 'my data' "
    pattern = words[1].strip("'")
    together = {item.group for item in open_source(data, group=pattern).items if "film" in item.key}
    assert len(together) == 16


def test_a_table_is_mended_by_a_table(data: Path) -> None:
    (data / "dog" / "cut.png").write_bytes(b"no")
    rows = [f"{path.relative_to(data.parent)},{path.parent.name[:3]}"
            for path in sorted((data / "dog").iterdir())]  # fmt: skip
    put(data, "ape", 22, 900)
    rows += [f"my data/ape/a{n}z.png,ape" for n in range(900, 922)]
    Path("table.csv").write_text("\n".join(["path,label", *rows]))
    found = audit("table.csv", workers=1)
    (broken,) = [one for one in found.findings if one.kind == "unreadable"]
    assert broken.command == "crosspatch train audit-kept.csv"
    (text,) = found.files.values()
    Path("audit-kept.csv").write_text(text)
    assert len(open_source("audit-kept.csv")) == 46


CLASSES = st.text(
    st.characters(exclude_characters="\0/", exclude_categories=["Cs"]), min_size=1, max_size=6
).filter(lambda name: name.strip(".") == name and name.lower() not in MEANING)


@settings(max_examples=10, deadline=None)
@given(
    names=st.lists(CLASSES, min_size=2, max_size=3, unique=True),
    chosen=st.sets(st.integers(0, 3), min_size=1),
)
@example(['it\'s "a";b', "=1+1"], {0, 3})
@example(["a\rb", "c\nd"], {0})
@example(["cat", "cat|dog"], {1})
@example(["cat", "[cat]"], {1})
@example(["cat", " dog"], {1})
def test_a_table_of_other_labels_holds_every_picture_once(names, chosen) -> None:
    with tempfile.TemporaryDirectory() as place:
        root = Path(place, "x,y")
        for at, name in enumerate(names):
            put(root, name, 2, 2 * at)
            (root / name / f"a{2 * at}z.png").rename(root / name / "a\r;b.png")
        (root / names[0] / "cut.png").write_bytes(b"no")
        found = audit(str(root), beside=Path(place, "audit"), workers=1)
        source, one = found.source, sorted(chosen)[-1]
        others = [name for name in source.classes if name != source.named(source.items[one].label)]
        command = found.relabel({one: (others[0], 0.97)})
        table = Path(place, "audit-labels.csv")
        plain = lambda name: name.isprintable() and name == name.strip() and "|" not in name
        if not all(plain(name) and name != "[cat]" for name in names):
            assert (command, table in found.files) == ("", False)
            return
        assert command == f"crosspatch train {quoted(table)}"
        write_page(table, found.files[table])
        with table.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        was = source.named(source.items[one].label)
        first = {"path": str(root / source.items[one].key), "label": others[0], "was": was}
        assert rows[0] == {**first, "sure": "0.97"}
        assert [row["sure"] for row in rows[1:]] == [""] * (len(source) - 1)
        again = open_source(table)
        told = {item.key: again.named(item.label) for item in again.items}
        meant = {f"x,y/{item.key}": source.named(item.label) for item in source.items}
        assert told == {**meant, f"x,y/{source.items[one].key}": others[0]}


def test_a_table_of_other_labels_keeps_splits_and_groups(data: Path) -> None:
    rows = [
        f"{path.relative_to(data.parent)},{path.parent.name[-3:]},{split},{split} {n // 2}"
        for split, some in (("train", range(16)), ("test", range(16, 24)))
        for n in some
        for path in (data / "dog" / f"a{100 + n}z.png", data / NASTY / f"a{n}z.png")
    ]
    Path("table.csv").write_text("\n".join(["file,class,subset,patient", *rows]))
    found = audit("table.csv", workers=1)
    before = {item.key: item for item in found.source.items}
    assert found.relabel({5: ("dog", 1.0)}) == "crosspatch train audit-labels.csv"
    Path("audit-labels.csv").write_text(found.files[Path("audit-labels.csv")])
    after = {item.key: item for item in open_source("audit-labels.csv").items}
    assert after.keys() == before.keys()
    for key, item in before.items():
        assert (after[key].split, after[key].group) == (item.split, item.group)


def test_other_labels_of_what_is_no_folder(data: Path) -> None:
    shutil.make_archive("packed", "zip", data)
    found = audit("packed.zip", workers=1)
    command = found.relabel({0: ("dog", 1.0)})
    assert command == "mkdir packed && unzip -q packed.zip -d packed && crosspatch audit packed"
    assert not found.files
    assert audit("digits", workers=1).relabel({0: ("1", 1.0)}) == ""


def test_several_labels_and_built_in_data_are_looked_at() -> None:
    found = audit("digits", workers=1)
    assert found.pictures == 1797
    assert not found.needs_a_hand
    assert audit("digits", workers=1, multi_label=True).pictures == 1797


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        audit(str(tmp_path / "none"))
    (tmp_path / "a").mkdir()
    with pytest.raises(DataError):
        audit(str(tmp_path))


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1))
def test_a_path_comes_back_from_a_shell_as_it_was(name: str) -> None:
    said = subprocess.run(
        ["sh", "-c", f"printf %s {quoted(name)}"], capture_output=True, check=True
    )
    assert said.stdout.decode().removeprefix("./" if name.startswith("-") else "") == name
    assert quoted(name).isprintable() or name.endswith("\n")


def test_commands_hold_no_escapes_of_a_terminal() -> None:
    expected = '"$(printf ' + r"""'a\033[31m\045\200\047'""" + ')"'
    assert quoted("a\x1b[31m%\udc80'") == expected
    assert quoted("\ud800\t").isprintable()


def test_an_archive_is_unpacked_first() -> None:
    zipped = Place("my photos.zip", "archive", Path("audit"))
    assert zipped.take_out("tiny") == (
        "mkdir 'my photos' && unzip -q 'my photos.zip' -d 'my photos' && "
        "crosspatch audit 'my photos'"
    )
    assert "tar -xf a.tar.gz -C a &&" in Place("a.tar.gz", "archive", Path("x")).unpack()


@given(st.binary(max_size=200))
def test_no_block_of_foreign_bytes_breaks_the_reading_of_exif(block: bytes) -> None:
    assert isinstance(taken(b"II*\0" + block), Taken)
    assert isinstance(taken(b"Exif\0\0MM\0*" + block), Taken)


def test_when_and_with_what_a_picture_was_taken() -> None:
    exif = Image.Exif()
    exif[0x010F], exif[0x0110], exif[0x0132] = "Maker", "One", "1970:01:02 00:00:01"
    assert taken(exif.tobytes()) == Taken("Maker One", 86401.0)
    exif.get_ifd(0x8769)[0x9003] = "1970:01:01 00:00:07"
    assert taken(exif.tobytes()).time == 7
    assert taken(None) is NOTHING


def test_a_header_says_what_a_file_is() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    header = read_header(saved(Image.new("RGB", (40, 30)), "JPEG", exif=exif))
    assert header[:6] == ("JPEG", "RGB", 40, 30, 6, False)
    assert read_header(saved(Image.new("RGBA", (4, 3)), "PNG")).transparent
    moving = saved(scene(1), "GIF", save_all=True, append_images=[scene(2)])
    assert read_header(moving).several
