"""What `train` shows, in a terminal and in a pipe."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import pytest
from rich.cells import cell_len
from rich.console import Console

from crosspatch.cli.screen import (
    EPOCH_HEAD,
    Screen,
    baseline_text,
    confused_pairs,
    epoch_line,
    print_json,
)
from crosspatch.tasks.classify import Classify

CLASSES = ("maple", "oak", "birch", "a class whose name is far too long for any table")
BASELINE = {
    "features": "whitened patches", "seconds": 1.2,
    "linear_probe": {"val": {"accuracy": 0.5}, "test": {"accuracy": 0.6}},
    "nearest_class_mean": {"val": {"accuracy": 0.25}},
}  # fmt: skip
PLAN = {
    "data": "leaves",
    "images": 1797,
    "classes": [f"class {i}" for i in range(40)],
    "skipped": 12,
    "skipped_files": [{"path": f"maple/{i}.jpg", "reason": "cut short"} for i in "1234567"],
    "split": {"train": 1257, "val": 270, "test": 270},
    "smallest": {"class": "oak", "images": 122},
    "cache": "1.8 MB for 1,797 pictures held in memory",
    "model": "crossvit_micro_32",
    "size": [32, 32],
    "fit": "pad",
    "reasons": ["crossvit_micro_32, because small pictures learn best " + "with a stem " * 8],
    "parameters": 1_020_000,
    "macs": 23_100_000,
    "epochs": 40,
    "steps": 360,
    "batch": 128,
    "lr": 1e-3,
    "precision": "fp32",
    "device": "cpu",
    "estimate": {"low": 60, "high": 75},
    "baseline": BASELINE,
    "out": "runs/leaves-1",
}  # fmt: skip
ROW = {
    "epoch": 3, "epochs": 40, "step": 27, "train_loss": 1.234, "val_accuracy": 0.914,
    "val_low": 0.887, "val_high": 0.935, "val_loss": 0.4, "lr": 1e-3,
    "images_per_second": 2345.6, "elapsed": 12.2, "remaining": 492.0, "best": True,
}  # fmt: skip


def figures() -> dict[str, Any]:
    """Metrics of 40 pictures, of which maple 2 and oak 3 times were taken for birch."""
    labels = np.arange(40) % 3
    said = labels.copy()
    said[[0, 3]] = 2
    said[[1, 4, 7]] = 2
    return Classify(CLASSES).metrics(np.eye(4, dtype=np.float32)[said] * 0.9 + 0.025, labels)


def summary() -> dict[str, Any]:
    return {
        "test": figures(), "out": "runs/leaves-1", "data": "my leaves", "seconds": 123.0,
        "baseline": BASELINE,
        "files": {"model/model.safetensors": 4_100_000, "report.json": 8_400},
    }  # fmt: skip


def shown(terminal: bool = False, epochs: int = 3) -> str:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=80, markup=False, highlight=False)
    with Screen(console=console) as screen:
        screen.progress("reading", 1, 10)
        screen.progress("reading", 10, 10)
        screen.plan(PLAN)
        for epoch in range(epochs):
            for step in range(5):
                screen.step(5 * epoch + step + 1, 5 * epochs, 2.3, 2345.6)
            screen.epoch(ROW | {"epoch": epoch + 1, "best": epoch != 1})
        screen.done(summary())
    return out.getvalue()


def test_the_first_screen_says_everything_before_the_first_epoch() -> None:
    first = shown().split(EPOCH_HEAD)[0]
    for part in (
        "1,797 pictures in 40 classes, 12 left out", "1,257 train", "270 test",
        "oak, 122 pictures", "1.8 MB", "crossvit_micro_32", "1.02 M parameters",
        "23.10 M multiply-adds", "40 epochs", "360 steps of 128", "because", "1m00s to 1m15s",
        "runs/leaves-1", "maple/1.jpg: cut short", "and 7 more, listed in skipped.csv",
    ):  # fmt: skip
        assert part in first


def test_the_baseline_stands_on_the_first_screen_and_on_the_last() -> None:
    first, last = shown().split(EPOCH_HEAD)
    first = " ".join(first.split())
    assert "baseline 50.0 % of validation by a linear layer on whitened patches" in first
    assert "nearest class mean 25.0 %; took 1 s" in first
    line = "+27.5 points over the baseline, 60.0 % by a linear layer on whitened patches"
    assert line in last
    assert baseline_text({"linear_probe": {}, "seconds": 0}) == "none: there are too few pictures"
    several = {**BASELINE, "linear_probe": {"test": {"map": 0.4}}, "nearest_class_mean": {}}
    assert baseline_text(several).startswith("mAP 40.0 % of test by a linear layer")


def test_in_a_pipe_there_are_plain_lines_one_per_epoch_within_80_columns() -> None:
    text = shown()
    assert "\x1b" not in text
    assert "\r" not in text
    assert max(map(len, text.splitlines())) <= 80
    assert [line.split()[0] for line in text.splitlines() if "91.4 %" in line] == [
        "1/40", "2/40", "3/40",
    ]  # fmt: skip


def test_in_a_terminal_a_bar_stands_below_and_is_gone_at_the_end() -> None:
    text = shown(terminal=True)
    assert "step 1/15  loss 2.300" in text
    assert "step" not in text.split("next, type")[1]


def test_an_epoch_line_fits_its_head() -> None:
    line = epoch_line(ROW)
    assert len(line) == len(EPOCH_HEAD)
    assert line.split() == [
        "3/40", "12", "s", "1.234", "91.4", "%*", "88.7–93.5", "1.0e-03", "2,346", "8m12s",
    ]  # fmt: skip
    worst = {**ROW, "epoch": 1000, "epochs": 1000, "val_accuracy": 1.0, "val_high": 1.0}
    assert len(epoch_line(worst | {"images_per_second": 123456.0, "elapsed": 86000.0})) < 80
    assert "*" not in epoch_line(ROW | {"best": False})


def test_the_last_screen_says_the_score_the_weak_spots_and_what_to_type() -> None:
    last = shown().split(EPOCH_HEAD)[1]
    assert "test accuracy 87.5 % (73.9–94.5 with 95 % confidence, 40 pictures)" in last
    worst = last.split("worst classes\n")[1].splitlines()
    assert worst[0] == "  oak: 10 of 13 found, 76.9 % (49.7–91.8)"
    assert worst[1].startswith("  maple: 12 of 14 found")
    pairs = last.split("most confused\n")[1].splitlines()
    assert pairs[:2] == ["  oak taken for birch: 3 times", "  maple taken for birch: 2 times"]
    assert "model/model.safetensors    4.1 MB" in last
    assert last.rstrip().splitlines()[-3:] == [
        "  crosspatch predict runs/leaves-1 PICTURES…",
        "  crosspatch eval runs/leaves-1 'my leaves'",
        "  crosspatch export runs/leaves-1",
    ]


def test_confused_pairs_are_the_wrong_cells_most_first() -> None:
    pairs = confused_pairs(figures())
    assert [tuple(pair.values()) for pair in pairs] == [("oak", "birch", 3), ("maple", "birch", 2)]


def test_a_split_without_pictures_has_no_score() -> None:
    out = io.StringIO()
    screen = Screen(console=Console(file=out, width=80))
    empty = Classify(CLASSES).metrics(np.zeros((0, 4), np.float32), np.zeros(0, np.int64))
    screen.score("test", empty)
    screen.worst_classes(empty)
    screen.class_table(empty)
    assert "0 pictures, so there is no score" in out.getvalue()


def test_the_class_table_fits_80_columns() -> None:
    out = io.StringIO()
    Screen(console=Console(file=out, width=80)).class_table(
        Classify(("葉" * 40, "b")).metrics(np.eye(2, dtype=np.float32), np.arange(2))
    )
    lines = out.getvalue().splitlines()
    assert max(map(cell_len, lines)) <= 80
    assert len({cell_len(line) for line in lines}) == 1


def test_a_name_cannot_steer_the_terminal() -> None:
    out = io.StringIO()
    screen = Screen(console=Console(file=out, force_terminal=True, width=80))
    screen.unreadable([("evil\x1b[2J\x07.jpg", "no image")])
    assert "\x1b[2J" not in out.getvalue()
    assert "evil\\x1b[2J\\x07.jpg" in out.getvalue()


def test_json_takes_numpy_values_and_refuses_what_json_lacks(capsys: pytest.CaptureFixture) -> None:
    print_json({"a": np.float32(0.5), "b": np.arange(2), "c": "é\udcff"})
    assert json.loads(capsys.readouterr().out) == {"a": 0.5, "b": [0, 1], "c": "é\udcff"}
    with pytest.raises(ValueError, match="JSON"):
        print_json({"a": float("nan")})
    with pytest.raises(TypeError, match="no place in JSON"):
        print_json({"a": object()})
