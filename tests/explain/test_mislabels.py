"""Planted label errors among pictures that are easily told apart."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from crosspatch.data.audit import audit
from crosspatch.errors import UsageError
from crosspatch.explain import mislabels as room
from crosspatch.explain.mislabels import (
    COLUMNS,
    KIND,
    findings,
    mislabels,
    opinion,
    write_table,
)
from crosspatch.report import audit as pages

NAMES = ("<script>alert(1)</script>", "b\n\x1b[31m", "c")


def stripes(count: int = 150, side: int = 16, seed: int = 0):
    """(pictures, labels): rows, columns or checks, with noise."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    y, x = np.mgrid[:side, :side] // 2 % 2
    kinds = np.stack([y, x, y ^ x])
    noise = rng.integers(0, 120, (count, side, side, 3))
    pictures = 100 * kinds[labels][..., None] + noise
    return list(pictures.astype(np.uint8)), labels


PICTURES, TRUTH = stripes()
GIVEN = TRUTH.copy()
GIVEN[[3, 50, 97]] = (GIVEN[[3, 50, 97]] + 1) % 3
PATHS = [f"{i:03d}.png" for i in range(len(TRUTH))]


def labelled(labels) -> list[str]:
    return [NAMES[label] for label in labels]


def test_planted_errors_are_found_without_a_run():
    told: list[tuple[int, int]] = []
    found = mislabels(None, PICTURES, PATHS, labelled(GIVEN),
                      progress=lambda *done: told.append(done))  # fmt: skip
    assert {row["path"] for row in found.rows[:3]} == {PATHS[3], PATHS[50], PATHS[97]}
    for row in found.rows[:3]:
        assert row["suggested"] == NAMES[TRUTH[int(row["path"][:3])]]
    assert found.finding.level == "warn"
    assert found.finding.kind == KIND
    assert len(found.finding.items) == len(found.rows) < 10
    assert told[-1] == (150, 150)


def test_right_labels_and_few_pictures():
    assert mislabels(None, PICTURES, PATHS, labelled(TRUTH)).finding.level == "good"
    few = mislabels(None, PICTURES[:9], PATHS[:9], labelled(GIVEN[:9]))
    assert few.rows == []
    assert "too few" in few.finding.text
    alone = mislabels(None, PICTURES, PATHS, ["one"] * 150)
    assert "single class" in alone.finding.text
    with pytest.raises(ValueError, match="150 pictures, 1 paths"):
        mislabels(None, PICTURES, PATHS[:1], labelled(TRUTH))


def test_a_picture_that_cannot_be_read_is_passed_over():
    pictures = [b"torn", *PICTURES[1:]]
    found = mislabels(None, pictures, PATHS, labelled(GIVEN))
    assert found.places.tolist() == list(range(1, 150))
    assert {row["path"] for row in found.rows[:3]} == {PATHS[3], PATHS[50], PATHS[97]}


def test_a_run_is_asked_unless_it_has_learnt_by_heart(monkeypatch, tmp_path):
    features = np.eye(3)[TRUTH] + np.random.default_rng(0).normal(0, 0.5, (150, 3))
    ours = opinion(features, GIVEN, 3)
    assert ours[3].argmax() == TRUTH[3]
    (tmp_path / "split.csv").write_text(
        "path,class,split\n" + "".join(f"{path},a,train\n" for path in PATHS)
    )
    parrot = np.eye(3)[GIVEN] * 0.97 + 0.01
    monkeypatch.setattr(room, "_of_run", lambda *given: parrot)
    found = mislabels(tmp_path, PICTURES, PATHS, labelled(GIVEN))
    assert "was not asked" in found.finding.text
    assert {row["path"] for row in found.rows[:3]} == {PATHS[3], PATHS[50], PATHS[97]}
    (tmp_path / "split.csv").unlink()
    found = mislabels(tmp_path, PICTURES, PATHS, labelled(GIVEN))
    assert "was not asked" not in found.finding.text


def test_a_run_that_knows_little_is_not_asked(monkeypatch):
    alone = mislabels(None, PICTURES, PATHS, labelled(GIVEN))
    monkeypatch.setattr(room, "_by_heart", lambda *given: False)
    for share, asked in ((0.34, False), (0.98, True)):
        own = np.full((150, 3), (1 - share) / 2)
        own[np.arange(150), TRUTH] = share
        monkeypatch.setattr(room, "_of_run", lambda *given, own=own: own)
        found = mislabels("run", PICTURES, PATHS, labelled(GIVEN))
        assert (room.WEAK in found.finding.text) is not asked
        assert np.array_equal(found.probs, alone.probs) is not asked
        assert {row["path"] for row in found.rows[:3]} == {PATHS[3], PATHS[50], PATHS[97]}


def test_the_table_is_read_back_and_never_replaces_a_file(tmp_path):
    rows = mislabels(None, PICTURES, PATHS, labelled(GIVEN)).rows
    rows[0]["path"] = 'odd,"name"\udc80.png'
    write_table(tmp_path / "m.csv", rows)
    with (tmp_path / "m.csv").open(errors="surrogateescape", newline="") as file:
        read = list(csv.DictReader(file))
    assert [tuple(one) for one in read] == [COLUMNS] * len(rows)
    assert read[0]["path"] == rows[0]["path"]
    assert {one["label"] for one in read} <= set(NAMES)
    with pytest.raises(UsageError, match="cannot be written"):
        write_table(tmp_path / "m.csv", rows)


CLASSES = ("<script>alert(1)</script>".replace("/", "\N{DIVISION SLASH}"), "it's b", "c")


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """The stripes as PNG files in folders of the labels that they were given, some wrong, in a
    folder `shown` of the working folder."""
    monkeypatch.chdir(tmp_path)
    for picture, label, path in zip(PICTURES, GIVEN, PATHS, strict=True):
        place = tmp_path / "shown" / CLASSES[label]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(place / path)
    return tmp_path / "shown"


@pytest.fixture
def asked(monkeypatch):
    """A run whose opinion says nothing."""
    alike = lambda run, pictures, classes, labels, ok, tell: np.full((len(ok), 3), 1 / 3)
    monkeypatch.setattr(room, "_of_run", alike)


def test_an_audit_is_told_the_command_that_trains_with_better_labels(folders, asked):
    (folders / CLASSES[1] / "cut.png").write_bytes(b"no")
    audited = audit("shown", workers=1)
    (found,) = findings("run", audited)
    assert found.kind == KIND
    assert found.command == "crosspatch train audit-labels.csv"
    wrong = {f"{CLASSES[GIVEN[at]]}/{PATHS[at]}": CLASSES[TRUTH[at]] for at in (3, 50, 97)}
    assert wrong.items() <= {one["path"]: one["suggested"] for one in found.items}.items()
    assert {one["path"] for one in found.items[:3]} == set(wrong)
    rows = list(csv.DictReader(audited.files[Path("audit-labels.csv")].splitlines()))
    assert len(rows) == len({row["path"] for row in rows}) == 151
    told = [
        (row["path"], row["label"], row["was"], float(row["sure"])) for row in rows if row["sure"]
    ]
    assert told == [(str(folders / one["path"]), one["suggested"], one["label"], one["score"])
                    for one in found.items]  # fmt: skip
    assert [row["was"] for row in rows[: len(told)]] == [one["label"] for one in found.items]
    audited.add([found])
    page = pages.page(audited.to_dict(), lambda path: f"data:image/jpeg;base64,{path[-7:-4]}")
    assert "<script>" not in page
    assert "looks like" in page
    assert all(f"base64,{path[-7:-4]}" in page for path in wrong)


def test_what_no_table_can_be_made_of_has_another_command_or_none(folders, asked):
    shutil.make_archive("packed", "tar", folders)
    (found,) = findings("run", audit("packed.tar", workers=1))
    assert (
        found.command == "mkdir packed && tar -xf packed.tar -C packed && crosspatch audit packed"
    )
    assert "in its table" not in found.text
    (folders / "c").rename(folders / "a|c")
    audited = audit("shown", workers=1)
    (found,) = findings("run", audited)
    assert (found.command, audited.files) == ("", {})
    assert len(found.items) >= 3
    assert "in its table" not in found.text
    (folders / "a|c").rename(folders / "c")
    with pytest.raises(UsageError, match="several labels"):
        findings("run", audit("shown", workers=1, multi_label=True))


def test_a_carriage_return_in_a_name_is_read_back(tmp_path):
    rows = mislabels(None, PICTURES, PATHS, labelled(GIVEN)).rows
    rows[0]["path"] = "a\rb.png"
    write_table(tmp_path / "m.csv", rows)
    with (tmp_path / "m.csv").open(newline="") as file:
        read = list(csv.DictReader(file))
    assert [one["path"] for one in read] == [row["path"] for row in rows]
