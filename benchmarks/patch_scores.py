"""Patches with the highest scores of `export --explain`: what is the answer without them?

    python benchmarks/patch_scores.py RUN DATA [--pictures 500]
    python benchmarks/patch_scores.py --speed crossvit_small_240

Of test pictures of RUN, which DATA holds, a share of the patches is painted over with the mean
colour of the preprocessing: those of the highest scores, those of the least, those nearest to the
centre, where things usually are, and random ones (the mean of `--draws` draws). The drop is that of
the probability of the class that the whole picture was given, in percentage points; intervals
(95 %) are over pictures, paired. --speed: what the second output costs a network, in time (one
thread, one picture, paired turns) and in bytes.
"""

from __future__ import annotations

import argparse
import csv
import math
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import crosspatch as xp
from crosspatch.data.opening import open_source
from crosspatch.data.preprocess import Preprocess
from crosspatch.deploy.bundle import Bundle, check_pictures, read_bundle
from crosspatch.deploy.engines import BundleEngine, open_engine
from crosspatch.deploy.export import bundle_info, export, export_model
from crosspatch.deploy.predictor import Predictor
from crosspatch.metrics.latency import alternate
from crosspatch.processor import usable_cores
from crosspatch.training.package import Trained

from hardware import RESULTS, append, facts  # isort: skip

SHARES = (0.1, 0.25, 0.5)
BATCH = 64


def pictures(run: Path, data: str, bundle: Bundle, engine: Any, most: int) -> np.ndarray:
    """Test pictures of a run (N, H, W, 3) uint8 of the model's size, drawn without regard to
    class."""
    with (run / "split.csv").open(encoding="utf-8", newline="") as file:
        keys = [row["path"] for row in csv.DictReader(file) if row["split"] == "test"]
    keys = [keys[i] for i in np.random.default_rng(0).permutation(len(keys))[:most]]
    source = open_source(data)
    place = {item.key: number for number, item in enumerate(source.items)}
    shown = Predictor(engine, bundle.info.classes, bundle.info.preprocess)
    return np.stack([shown.pixels(source.read(place[key])) for key in keys])


def answers(engine: BundleEngine, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities (N, K) and scores (N, rows, columns)."""
    parts = [engine.explain(images[at : at + BATCH]) for at in range(0, len(images), BATCH)]
    return np.concatenate([p for p, _ in parts]), np.concatenate([s for _, s in parts])


def without(
    images: np.ndarray, order: np.ndarray, count: int, grid: tuple[int, int], colour: np.ndarray
) -> np.ndarray:
    """The first `count` patches of each row of `order` (N, P) painted over."""
    (rows, columns), (height, width) = grid, images.shape[1:3]
    gone = np.zeros(order.shape, bool)
    np.put_along_axis(gone, order[:, :count], True, axis=1)
    y, x = np.arange(height) * rows // height, np.arange(width) * columns // width
    return np.where(gone.reshape(-1, rows, columns)[:, y][:, :, x][..., None], colour, images)


def measured(run: Path, data: str, asked: argparse.Namespace) -> list[dict[str, Any]]:
    """A row of the table for each share of patches."""
    with tempfile.TemporaryDirectory() as folder:
        made = export(run, explain=True, out=Path(folder) / "b.onnx")
        bundle = read_bundle(made.path)
        engine = open_engine(bundle, threads=usable_cores())
        images = pictures(run, data, bundle, engine, asked.pictures)
        whole, scores = answers(engine, images)
        best, grid = whole.argmax(axis=1), scores.shape[1:]
        colour = np.rint(255 * np.array(bundle.info.preprocess.mean)).astype(np.uint8)
        draw = np.random.default_rng(1)
        y, x = np.mgrid[: grid[0], : grid[1]]
        far = np.hypot(y / grid[0] - 0.5 + 0.5 / grid[0], x / grid[1] - 0.5 + 0.5 / grid[1])
        orders = {
            "top": (-scores.reshape(len(images), -1)).argsort(axis=1, kind="stable"),
            "least": scores.reshape(len(images), -1).argsort(axis=1, kind="stable"),
            "centre": np.tile(far.ravel().argsort(kind="stable"), (len(images), 1)),
        }
        each = range(len(images))

        def drop(order: np.ndarray, count: int) -> np.ndarray:
            found, _ = answers(engine, without(images, order, count, grid, colour))
            return 100 * (whole[each, best] - found[each, best])

        rows = []
        for share in SHARES:
            count = max(1, round(share * grid[0] * grid[1]))
            lost = {name: drop(order, count) for name, order in orders.items()}
            some = [draw.permuted(orders["centre"], axis=1) for _ in range(asked.draws)]
            lost["random"] = np.mean([drop(order, count) for order in some], axis=0)
            rows.append({
                "model": bundle.info.architecture, "data": Path(data).name,
                "grid": f"{grid[0]}x{grid[1]}", "pictures": len(images), "patches": count,
                **{name: round(float(one.mean()), 2) for name, one in lost.items()},
                **gap("", lost["top"] - lost["random"]),
                **gap("centre_", lost["top"] - lost["centre"]), **facts("torch", "onnxruntime"),
            })  # fmt: skip
    return rows


def gap(name: str, apart: np.ndarray) -> dict[str, float]:
    """Mean and interval of a difference (N,)."""
    mean, half = float(apart.mean()), 1.96 * float(apart.std(ddof=1)) / math.sqrt(len(apart))
    named = {"gap": mean, "low": mean - half, "high": mean + half}
    return {f"{name}{key}": round(value, 2) for key, value in named.items()}


def speed(name: str) -> dict[str, Any]:
    """Time and size of a bundle with the second output, as a multiple of those without."""
    model = xp.create_model(name, num_classes=1000).eval()
    size = tuple(model.img_size)
    made = Trained(model, tuple(map(str, range(1000))), Preprocess(size, size), 1.0, 0)
    info = bundle_info(made, name)
    image = check_pictures(size, 1)
    with tempfile.TemporaryDirectory() as folder:
        bundles = []
        for explains in (False, True):
            path = Path(folder) / f"{explains}.onnx"
            export_model(model, path, replace(info, explains=explains))
            bundles.append(read_bundle(path))
        one, other = (open_engine(bundle) for bundle in bundles)
        times = alternate(
            {"without": lambda: one.run(image), "with": lambda: other.explain(image)}, seconds=20
        )
    return {
        "model": name, "time": round(times["with"].median / times["without"].median, 3),
        "bytes": round(bundles[1].size / bundles[0].size, 3), **facts("onnxruntime"),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, nargs="?")
    parser.add_argument("data", nargs="?")
    parser.add_argument("--speed", metavar="MODEL")
    parser.add_argument("--pictures", type=int, default=500)
    parser.add_argument("--draws", type=int, default=5)
    asked = parser.parse_args()
    if asked.speed:
        print(speed(asked.speed))
        return
    rows = measured(asked.run, asked.data, asked)
    for row in rows:
        print(row, flush=True)
    append(RESULTS / "patch_scores.csv", rows)


if __name__ == "__main__":
    main()
