"""`crosspatch audit` as it is typed: the page, its JSON, the lists, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image


@pytest.fixture
def photos(tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Pictures of five classes, one of them cut short, another with a name like markup."""
    monkeypatch.chdir(tmp_path)
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


WRONG = [
    (("photos", "--out", "x.pdf"), 2, "--out x.pdf"),
    (("photos", "--out", "none/x.html"), 2, "no folder none"),
    (("phtoos",), 2, "does not exist"),
    (("photos", "--run", "none"), 2, "none does not exist"),
    (("photos", "--workers", "0"), 2, "--workers 0"),
]


@pytest.mark.parametrize(("words", "code", "got"), WRONG)
def test_what_is_refused(crosspatch, photos: Path, words, code: int, got: str) -> None:
    told = crosspatch("audit", *words)
    assert told.code == code
    assert got in told.err
    assert not Path("audit.html").exists()
