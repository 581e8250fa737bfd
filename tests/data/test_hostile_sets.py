"""Data sets that break other tools, each with its expected outcome, through `crosspatch train`."""

from __future__ import annotations

import csv
import io
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import time
import unicodedata
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from PIL import Image

from crosspatch.cli.main import main
from crosspatch.data import archives, prepare
from crosspatch.data.opening import open_source
from crosspatch.data.preprocess import Preprocess
from crosspatch.data.split import make_split
from crosspatch.training import start
from support import hostile

PREPROCESS = Preprocess((16, 16), (16, 16))
QUICK = ("--model", "vit_micro_32", "--size", "16", "--epochs", "1", "--batch", "8")


class Case(NamedTuple):
    """How the data are made (returns DATA, given a folder of class folders), the exit code, what
    must be said, and the reasons that skipped.csv must give, all others excluded."""

    make: Callable[[Path], Path]
    code: int
    words: tuple[str, ...] = ()
    skipped: dict[str, str] = {}  # noqa: RUF012


def picture(seed: int = 77) -> bytes:
    return hostile.saved(hostile.picture("discs", seed), "PNG")


def put(root: Path, *names: str | bytes, data: bytes | None = None) -> Path:
    """The folder with one more file, or several, each another picture unless `data` is given."""
    for number, name in enumerate(names):
        path = Path(os.fsdecode(os.path.join(os.fsencode(root), os.fsencode(name))))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(77 + number) if data is None else data)
    return root


def given(root: Path, val: str = "val", **changed: str | None) -> Path:
    """The class folders as train, and other pictures of them as `val`; `changed`: other names of
    val's classes, None for one that it lacks."""
    (root / "x").mkdir()
    for kind in [path for path in root.iterdir() if path.name != "x"]:
        kind.rename(root / "x" / kind.name)
    (root / "x").rename(root / "train")
    for number, kind in enumerate(hostile.CLASSES):
        name = changed.get(kind, kind)
        if name is not None:
            for seed in range(50, 53):
                path = root / val / name / f"{seed}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                shown = hostile.picture(hostile.CLASSES[number], seed)
                path.write_bytes(hostile.saved(shown, "PNG"))
    return root


def loop(root: Path) -> Path:
    (root / "rings/loop").symlink_to(root)
    (root / "discs/self.jpg").symlink_to("self.jpg")
    return root


def specials(root: Path) -> Path:
    os.mkfifo(root / "rings/fifo.jpg")
    (root / "rings/device.jpg").symlink_to("/dev/zero")
    inside, here = root / "rings", os.getcwd()
    with socket.socket(socket.AF_UNIX) as bound:
        os.chdir(inside)  # the whole path is too long for a socket
        try:
            bound.bind("socket.jpg")
        finally:
            os.chdir(here)
    return root


def table(
    root: Path,
    separator: str = ",",
    mark: str = "",
    place: Callable[[Path, Path], str] = lambda path, root: path.relative_to(root).as_posix(),
    extra: tuple[tuple[str, str], ...] = (),
) -> Path:
    rows = [(place(path, root), path.parent.name) for path in sorted(root.rglob("*.jpg"))]
    lines = [separator.join(row) for row in (("path", "label"), *rows, *extra)]
    (root / "t.csv").write_text(mark + "\n".join(lines), encoding="utf-8")
    return root / "t.csv"


def renamed(root: Path, name: str, old: str = "rings") -> Path:
    (root / old).rename(root / name)
    return root


def gone(root: Path, *names: str) -> Path:
    for name in names:
        shutil.rmtree(root / name)
    return root


def tar_bomb(root: Path) -> Path:
    path = root.with_name("bomb.tar.gz")
    with tarfile.open(path, "w:gz") as archive:
        member = tarfile.TarInfo("a/zeros.png")
        member.size = 30 << 20
        archive.addfile(member, io.BytesIO(bytes(member.size)))
    return path


def zip_of(root: Path, **more: bytes) -> Path:
    path = root.with_name("packed.zip")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(root.rglob("*.jpg")):
            archive.write(file, file.relative_to(root).as_posix())
        for name, data in more.items():
            archive.writestr(name, data)
    return path


NFC, NFD = unicodedata.normalize("NFC", "café"), unicodedata.normalize("NFD", "café")
HTML = "<img src=x onerror=alert(1)>"

CASES = {
    "class folder with 0 images": Case(
        lambda root: put(root, "blanks/notes.txt"), 3,
        ("holds no picture of blanks", "remove the folder"),
    ),
    "class folder with 1 image": Case(
        lambda root: put(root, "single/1.png"), 0,
        ("smallest single, 1 picture to train on",
         "val got no picture of single: too few to have one there"),
    ),
    "same image in two classes": Case(
        lambda root: put(root, "discs/a.png", "rings/a.png", data=picture()), 0,
        ("1 picture is an exact copy", "in different classes, such as discs/a.png and rings/a.png"),
    ),
    "same image in train and val": Case(
        lambda root: put(given(root), "train/discs/a.png", "val/discs/b.png", data=picture()), 0,
        ("1 left out",),
        {"train/discs/a.png": "the same file as val/discs/b.png, which is in val"},
    ),
    "symlink loop": Case(
        loop, 0, (), {"rings/loop": "already read", "discs/self.jpg": "symbolic links"}
    ),
    "classes that differ only in case": Case(
        lambda root: renamed(root, "Discs"), 0,
        ("Discs (4) and discs (4) differ only in case: they are separate classes",),
    ),
    "files that differ only in case": Case(
        lambda root: put(root, "discs/a.png", "discs/A.png"), 0, ("14 pictures in 3 classes",)
    ),
    "litter": Case(
        lambda root: put(root, ".ipynb_checkpoints/a.png", "discs/.ipynb_checkpoints/a.png",
                         "Thumbs.db", "discs/Thumbs.db", "__MACOSX/discs/._0000.jpg",
                         "discs/._0000.jpg", "discs/.DS_Store", "rings/desktop.ini"), 0,
        ("12 pictures in 3 classes",),
    ),
    "val lacks a class": Case(
        lambda root: given(root, rings=None), 0, ("val holds no picture of rings",)
    ),
    "val with an extra class": Case(
        lambda root: put(given(root), "val/dics/a.png"), 3,
        ("val holds the class 'dics', which train lacks", "near dics: discs", "Rename the folder"),
    ),
    "validation/ folder": Case(
        lambda root: given(root, val="validation"), 3,
        ("holds a folder called 'validation'", "Rename validation to val"),
    ),
    "class called val": Case(
        lambda root: renamed(root, "val"), 0, ("classes discs, stripes, val",)
    ),
    "CSV with a byte order mark": Case(
        lambda root: table(root, mark="\ufeff"), 0, ("12 pictures",)
    ),
    "CSV with semicolons": Case(lambda root: table(root, separator=";"), 0, ("12 pictures",)),
    "CSV with absolute paths": Case(
        lambda root: table(root, place=lambda path, _: str(path)), 0, ("12 pictures",)
    ),
    "CSV with ..": Case(
        lambda root: table(put(root.parent, "up.jpg") and root, extra=(("../up.jpg", "discs"),)), 0,
        ("12 pictures", "1 left out"),
        {"../up.jpg": "line 14: its path leaves the table's folder"},
    ),
    "CSV that names only files elsewhere": Case(
        lambda root: table(root, place=lambda path, _: f"../{path.name}"), 3,
        ("none of the files", "its path leaves the table's folder", "--path-column"),
    ),
    "table naming a file twice": Case(
        lambda root: table(root, extra=(("./discs/0000.jpg", "discs"),)), 0,
        ("1 row of the table says again what another says.",),
    ),
    "table naming a file twice, differently": Case(
        lambda root: table(root, extra=(("./discs/0000.jpg", "rings"),)), 3,
        ("discs/0000.jpg", "'discs' in line 2 and 'rings' in line 14"),
    ),
    "class called like HTML": Case(lambda root: renamed(root, HTML), 0, (HTML,)),
    "class with a newline": Case(
        lambda root: renamed(root, "ri\nngs"), 3, (r"'ri\nngs'", "Rename the folder")
    ),
    "class with a right-to-left mark": Case(
        lambda root: renamed(root, "ri\u202engs"), 3, (r"'ri\u202engs'", "Rename the folder")
    ),
    "class with a very long name": Case(lambda root: renamed(root, "r" * 255), 0, ("r" * 20,)),
    "files with odd names": Case(
        lambda root: put(root, f"discs/{HTML}.png", "discs/a\nb.png", "discs/\u202egnp.png",
                         f"discs/{'n' * 251}.png", "discs/ .png", "discs/-rf.png"), 0,
        ("18 pictures",),
    ),
    "broken files with odd names": Case(
        lambda root: put(root, "discs/a\nb.png", "discs/\u202egnp.png", b"discs/\xff.png",
                         "discs/\x1b[31mred.png", data=b"x"), 0,
        ("4 left out", r"discs/a\nb.png", r"discs/\u202egnp.png", r"discs/\x1b[31mred.png"),
        {"discs/a\nb.png": "text", "discs/\u202egnp.png": "text", r"discs/\udcff.png": "UTF-8",
         "discs/\x1b[31mred.png": "text"},
    ),
    "class folder of broken files": Case(
        lambda root: put(root, "broken/a.png", "broken/b.jpg", data=b"x"), 3,
        ("no readable picture to train on in broken", "remove the class"),
    ),
    "tar bomb": Case(tar_bomb, 3, ("grows more than 200-fold", "give the folder")),
    "zip bomb among the pictures": Case(
        lambda root: zip_of(root, **{"discs/zeros.png": bytes(20 << 20)}), 0, ("1 left out",),
        {"discs/zeros.png": "not an image"},
    ),
    "bomb of pixels": Case(
        lambda root: put(root, "discs/big.png", data=hostile.png_claiming(60000, 60000)), 0,
        ("1 left out",), {"discs/big.png": "60000x60000"},
    ),
    "pipe, device and socket": Case(
        specials, 0, ("3 left out",),
        {f"rings/{name}.jpg": "not a regular file" for name in ("fifo", "device", "socket")},
    ),
    "classes equal but for Unicode": Case(
        lambda root: renamed(renamed(root, NFC), NFD, "discs"), 0,
        (r"'cafe\u0301' (4) and 'caf\xe9' (4) look the same: they are separate classes",),
    ),
    "val spelt otherwise in Unicode": Case(
        lambda root: given(renamed(root, NFC), rings=NFD), 3,
        (r"'cafe\u0301', which train lacks", r"near 'cafe\u0301': 'caf\xe9'", "Rename the folder"),
    ),
    "class with a space at the end": Case(
        lambda root: renamed(root, "discs "), 0,
        ("'discs' (4) and 'discs ' (4) look the same: they are separate classes",),
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def quiet(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def root(tmp_path) -> Path:
    hostile.write_folder(tmp_path / "data", 4)
    return tmp_path / "data"


def train(data: Path, out: Path, capfd) -> tuple[int, str]:
    """(exit code, all that was said, on one line) of a training that takes half a second."""
    capfd.readouterr()
    code = main(["train", str(data), *QUICK, "--out", str(out)])
    return code, " ".join(" ".join(capfd.readouterr()).split())


@pytest.mark.parametrize("name", CASES)
def test_what_becomes_of(name, root, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(archives, "_ALWAYS", 1 << 20)
    case = CASES[name]
    code, said = train(case.make(root), tmp_path / "run", capfd)
    assert code == case.code, said
    for words in case.words:
        assert words in said
    assert "Traceback" not in said
    assert not {"\x1b", "\u202e"} & set(said)
    if code:
        assert " expected " in said or "try " in said
        assert not (tmp_path / "run" / "config.toml").exists()
        return
    with (tmp_path / "run" / "skipped.csv").open(newline="", encoding="utf-8") as file:
        skipped = {row["path"]: row["reason"] for row in csv.DictReader(file)}
    assert skipped.keys() == case.skipped.keys()
    assert all(reason in skipped[path] for path, reason in case.skipped.items())


def test_a_file_that_may_not_be_read_is_listed(root, tmp_path):
    """In a process that lost root's right to read what it likes (prctl 24: PR_CAPBSET_DROP)."""
    (root / "discs/0000.jpg").chmod(0)
    (root / "rings/closed").mkdir(0)
    code = "; ".join((
        "import ctypes, os, sys",
        "rights = (1, 2) if os.geteuid() == 0 else ()",
        "lost = [ctypes.CDLL(None).prctl(24, right, 0, 0, 0) for right in rights]",
        "sum(lost) or os.execv(sys.executable, [sys.executable, *sys.argv[1:]])",
    ))  # fmt: skip
    words = ["-m", "crosspatch", "train", str(root), *QUICK, "--out", str(tmp_path / "run")]
    answer = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=tmp_path
    )
    (root / "rings/closed").chmod(0o755)
    assert answer.returncode == 0, answer.stderr
    assert "2 left out" in answer.stdout
    assert (tmp_path / "run" / "skipped.csv").read_text() == (
        "path,reason\ndiscs/0000.jpg,permission denied\nrings/closed,permission denied\n"
    )


def vanish(path: Path) -> None:
    path.unlink()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:300])


@pytest.mark.parametrize(
    ("harm", "reason"), [(vanish, "no such file"), (cut, "the file is cut short")]
)
def test_a_file_that_is_lost_between_listing_and_decoding_is_listed(
    harm, reason, root, tmp_path, capfd, monkeypatch
):
    look = start.survey

    def lose(source):
        found = look(source)
        harm(root / "discs/0001.jpg")
        return found

    monkeypatch.setattr(start, "survey", lose)
    code, said = train(root, tmp_path / "run", capfd)
    assert code == 0
    assert "11 pictures in 3 classes, 1 left out" in said
    assert f"discs/0001.jpg,{reason}" in (tmp_path / "run" / "skipped.csv").read_text()


@pytest.mark.parametrize(
    ("harm", "reason"), [(vanish, "no such file"), (cut, "the file is cut short")]
)
def test_a_file_that_is_lost_while_training_from_disk_ends_it_by_name(
    harm, reason, root, tmp_path, capfd, monkeypatch
):
    def lose(*given):
        write_split(*given)
        for path in root.rglob("*.jpg"):
            harm(path)

    write_split = start.write_split
    monkeypatch.setattr(start, "write_split", lose)
    monkeypatch.setattr(prepare, "free_memory", lambda: 0)
    code, said = train(root, tmp_path / "run", capfd)
    assert code == 3, said
    assert "decoded again in each epoch" in said
    assert f".jpg: {reason}" in said
    assert "try " in said


def test_a_picture_that_changes_while_training_from_disk_is_read_as_it_is(root):
    images = prepare.prepare(open_source(root), PREPROCESS, memory_fraction=0).images
    Image.new("RGB", (90, 20), "red").save(root / "discs/0000.jpg")
    first, _ = images.images(torch.tensor([0, 1]))
    assert first.shape == (16, 16, 3)
    assert first[..., 0].min() > 200


@pytest.mark.long
def test_a_hundred_thousand_tiny_files_take_seconds(tmp_path):
    """Listed, decoded, compared and divided; of ten pictures, so that most are exact copies."""
    path = tmp_path / "tiny.zip"
    kinds = [hostile.saved(hostile.picture("discs", at, (4, 5)), "PNG") for at in range(10)]
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(100_000):
            archive.writestr(f"c{number % 10}/{number:06d}.png", kinds[number % 10])
    began = time.process_time()
    source = open_source(path)
    prepared = prepare.prepare(source, PREPROCESS, workers=1)
    split = make_split(source, prepared.kept, twins=(*prepared.twins, *prepared.near))
    assert time.process_time() - began < 120
    assert len(prepared.kept) == 100_000
    assert len(split.train) + len(split.val) + len(split.test) == 100_000
