"""The evidence of a report: measured where it can be, left out with a reason where it cannot."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from crosspatch.data.opening import open_source
from crosspatch.deploy.loading import load
from crosspatch.explain.evidence import LEAST, MOST, allowance, chosen, gather, worst
from support.runs import CLASSES, write_run

REPORT = {
    "classes": list(CLASSES), "steps": 10, "seconds": 1.0, "macs": 1e9,
    "config": {"recipe": {"batch": 8}},
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> tuple[Path, Path, list[dict[str, str]], list[str]]:
    """A run, its pictures, rows as predictions.csv has them, keys of the training pictures."""
    root = tmp_path_factory.mktemp("evidence")
    rng, data = np.random.default_rng(0), root / "data"
    for name in CLASSES:
        (data / name).mkdir(parents=True)
        for place in range(16):
            pixels = rng.integers(0, 255, (40, 44, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(data / name / f"{place:02d}.png")
    run, source = write_run(root / "run"), open_source(data)
    tested = [item.key for item in source.items if int(item.key[-6:-4]) >= 10]
    answer = load(run).predict([data / key for key in tested])
    rows = []
    for key, probs in zip(tested, answer.probs, strict=True):
        label, said = key.split("/")[0], CLASSES[int(probs.argmax())]
        rows.append(
            {
                "path": key,
                "label": label,
                "prediction": said,
                "correct": str(int(label == said)),
                "confidence": f"{probs.max():.6f}",
            }
        )
    (data / CLASSES[0] / "03.png").write_bytes(b"damaged")
    trained = [item.key for item in source.items if item.key not in tested]
    return run, data, rows, trained


def test_everything_is_measured_and_counted(world) -> None:
    run, data, rows, trained = world
    told: list[tuple[str, int, int]] = []
    found = gather(run, REPORT, open_source(data), rows, trained, lambda *t: told.append(t))
    assert found["left_out"] == {}
    clean = found["robustness"][0]
    assert clean["accuracy"] == pytest.approx(np.mean([row["correct"] == "1" for row in rows]))
    assert clean["images"] == len(rows) == 24
    assert found["latency"]["median"] > 0
    assert found["bytes"] > 100_000
    near = found["neighbours"]
    assert near["gallery"] == near["of"] - 1  # but the damaged one
    assert set(near["pairs"]) == {row["path"] for row in worst(rows)}
    assert {pair["path"] for pair in near["pairs"].values()} <= set(trained)
    assert found["learning"]["train"] == len(trained) - 1
    assert found["learning"]["test"] == 24
    assert {what for what, _, _ in told} >= {"trying worse pictures"}
    assert all(0 < done <= total for _, done, total in told)


def test_without_pictures_the_rest_is_still_measured(world) -> None:
    run, _, rows, trained = world
    found = gather(run, REPORT, None, rows, trained)
    assert set(found["left_out"]) == {"robustness", "neighbours", "learning"}
    assert found["latency"]["count"] >= 20


def test_what_fails_costs_nothing_else(world, tmp_path) -> None:
    _, data, rows, trained = world
    found = gather(tmp_path, REPORT, open_source(data), rows, trained)  # there is no model
    assert set(found["left_out"]) == {"latency", "robustness", "neighbours"}
    assert "learning" in found


def test_the_worst_are_wrong_and_the_surest_first() -> None:
    rows = [{"path": str(i), "label": "a", "correct": str(i % 2), "confidence": f"0.{i}"}
            for i in range(1, 9)]  # fmt: skip
    assert [row["path"] for row in worst(rows, 3)] == ["8", "6", "4"]
    several = [
        {"path": "x", "correct": "0", "missed": "a", "added": "", "confidence": ""},
        {"path": "y", "correct": "0", "missed": "a|b", "added": "c", "confidence": "0.7|0.6"},
        {"path": "z", "correct": "1", "missed": "", "added": "", "confidence": "0.9"},
    ]
    assert [row["path"] for row in worst(several)] == ["y", "x"]


def test_what_is_spent_follows_from_the_training() -> None:
    assert allowance(1, 8, 1e12) == LEAST
    assert allowance(1, 8, 1e6) > LEAST
    assert allowance(1000, 20, 1e12) == 6000  # a tenth, where a training step costs three times
    assert allowance(10**6, 64, 1e6) == MOST


def test_the_chosen_are_always_the_same() -> None:
    keys = [str(i) for i in range(100)]
    some = chosen(keys, 10)
    assert some == chosen(keys, 10)
    assert len(set(some)) == 10
    assert sorted(some, key=int) == some
    assert chosen(keys, 100) == keys
