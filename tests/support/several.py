"""Pictures with several labels: a bar, a disc and a frame, each there or not, in code."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
from PIL import Image

NAMES = ("bar", "disc", "frame")
SIDE = 16


def picture(seed: int) -> tuple[np.ndarray, tuple[str, ...]]:
    """uint8 (16, 16, 3), and what is on it, drawn independently."""
    rng = np.random.default_rng(seed)
    there = rng.random(3) < np.array([0.5, 0.4, 0.35])
    pixels = rng.integers(0, 80, (SIDE, SIDE, 3))
    y, x = np.mgrid[:SIDE, :SIDE]
    bar = abs(y - rng.integers(3, 13)) < 2
    disc = np.hypot(y - rng.uniform(5, 11), x - rng.uniform(5, 11)) < 3.5
    frame = (np.minimum(y, x) < 2) | (np.maximum(y, x) >= SIDE - 2)
    for on, shape, colour in zip(
        there, (bar, disc, frame), [(200, 60, 60), (60, 200, 60), (80, 80, 220)], strict=True
    ):
        if on:
            pixels[shape] = np.array(colour) + rng.integers(-30, 30, 3)
    names = tuple(name for name, on in zip(NAMES, there, strict=True) if on)
    return pixels.astype(np.uint8), names


def write_pictures(root: Path, count: int) -> list[tuple[str, tuple[str, ...]]]:
    """`root`/pics/000.png and on; returns (path below root, names)."""
    (root / "pics").mkdir(parents=True, exist_ok=True)
    rows = []
    for seed in range(count):
        pixels, names = picture(seed)
        rows.append((f"pics/{seed:03d}.png", names))
        Image.fromarray(pixels).save(root / rows[-1][0])
    return rows


def write_tables(root: Path, rows: list[tuple[str, tuple[str, ...]]]) -> None:
    """The same labels in every way: bar.csv (`a|b`), list.csv, list.jsonl, long.csv (a row for each
    label), and class folders with copies in `folders` (without the pictures that have no label)."""
    tables = {
        "bar": [(path, "|".join(names)) for path, names in rows],
        "list": [(path, json.dumps(names)) for path, names in rows],
        "long": [(path, name) for path, names in rows for name in (names or ("",))],
    }
    for kind, lines in tables.items():
        with (root / f"{kind}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("path", "label"), *lines])
    objects = [json.dumps({"path": path, "labels": names}) for path, names in rows]
    (root / "list.jsonl").write_text("\n".join(objects))
    for path, names in rows:
        for name in names:
            folder = root / "folders" / name
            folder.mkdir(parents=True, exist_ok=True)
            (folder / Path(path).name).write_bytes((root / path).read_bytes())
