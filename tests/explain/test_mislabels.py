"""Planted label errors among pictures that are easily told apart."""

from __future__ import annotations

import csv

import numpy as np
import pytest

from crosspatch.errors import UsageError
from crosspatch.explain import mislabels as room
from crosspatch.explain.mislabels import COLUMNS, KIND, mislabels, opinion, write_table

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
