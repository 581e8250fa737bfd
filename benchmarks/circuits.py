"""Heads that matter by patching cost accuracy when they are switched off (arXiv 2307.09458).

    python benchmarks/circuits.py RUN… --data FOLDER [--catalog FOLDER]

FOLDER has train/ and test/ with a folder per class, as the runs were trained on. Heads are ranked
by their mean total effect (resample ablation) on training pictures; accuracy is of test pictures
with the first `--heads` of them switched off at once, beside as many random heads, the mean of
`--draws` draws. And how far attributions are from the logits. What came out of the first run goes
into the catalog.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

from crosspatch import catalog
from crosspatch.catalog import Measured
from crosspatch.data.augment import normalise
from crosspatch.deploy.predictor import Predictor
from crosspatch.deploy.torch_engine import TorchEngine
from crosspatch.explain import ablate, attribute, importance, patch
from crosspatch.explain.forward import HEADED, Part, explainable
from crosspatch.explain.patching import record
from crosspatch.training.package import Trained, load_model, model_folder, read_config

from hardware import RESULTS, append, facts, processor  # isort: skip

COSTS = "Ablating the heads of largest total effect costs more accuracy than random heads."
ADDS = "The contributions of all parts add up to the logits."


def pictures(trained: Trained, folder: Path, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(images (B, 3, H, W), labels (B,)), as many of each class."""
    shown = Predictor(TorchEngine(trained, device="cpu"), trained.classes, trained.preprocess)
    each = count // len(trained.classes)
    named = [(path, label) for label, name in enumerate(trained.classes)
             for path in sorted((folder / name).iterdir())[:each]]  # fmt: skip
    pixels = torch.from_numpy(np.stack([shown.pixels(path) for path, _ in named]))
    seen = replace(trained.preprocess, store=trained.preprocess.size)
    labels = torch.tensor([label for _, label in named])
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(labels)))
    return normalise(pixels[order], seen), labels[order]


def right(model: Any, images: torch.Tensor, labels: torch.Tensor, parts: list[Part]) -> np.ndarray:
    """Which pictures are named rightly (B,), with `parts` switched off."""
    with torch.no_grad():
        said = ablate(model, images, parts) if parts else model(images)
    return (said.argmax(dim=1) == labels).numpy().astype(float)


def measured(run: Path, asked: argparse.Namespace) -> dict[str, Any]:
    """One row of the table."""
    trained = load_model(run)
    model = explainable(trained.module).cpu().eval()
    images, labels = pictures(trained, asked.data / "train", asked.ranking)
    ranked = [part for part, _ in importance(model, images, labels)]
    tests, truth = pictures(trained, asked.data / "test", asked.pictures)
    draw = np.random.default_rng(0)
    best = right(model, tests, truth, ranked[: asked.heads])
    some = [draw.choice(len(ranked), asked.heads, replace=False) for _ in range(asked.draws)]
    others = np.mean([right(model, tests, truth, [ranked[i] for i in s]) for s in some], axis=0)
    gap = 100 * (others - best)
    half = 1.96 * gap.std(ddof=1) / math.sqrt(len(gap))
    parts = len([p for p in record(model, tests[:2]).parts if p.kind in HEADED])
    with torch.no_grad():
        said = model(tests[:64]).double().numpy()
    summed = attribute(model, tests[:64]).values.sum(axis=1)
    direct = patch(model, tests[:32], tests[32:64], ranked, a=0, b=1, effect="direct")
    total = patch(model, tests[:32], tests[32:64], ranked, a=0, b=1)
    ratio = (
        np.abs(direct.patched - direct.clean).mean() / np.abs(total.patched - total.clean).mean()
    )
    return {
        "model": read_config(model_folder(run))["architecture"], "heads": parts,
        "ablated": asked.heads, "pictures": len(truth),
        "whole": round(100 * float(right(model, tests, truth, []).mean()), 2),
        "top": round(100 * float(best.mean()), 2), "random": round(100 * float(others.mean()), 2),
        "gap": round(float(gap.mean()), 2), "low": round(float(gap.mean() - half), 2),
        "high": round(float(gap.mean() + half), 2),
        "sum_error": f"{np.abs(summed - said).max() / np.abs(said).max():.1e}",
        "direct_to_total": round(float(ratio), 2), "first": ranked[0].name, **facts("torch"),
    }  # fmt: skip


def outcomes(row: dict[str, Any], asked: argparse.Namespace) -> list[Measured]:
    """What came out, good or bad."""
    command = (
        f"python benchmarks/circuits.py RUN --data FOLDER --heads {asked.heads} --draws "
        f"{asked.draws} --ranking {asked.ranking} --pictures {asked.pictures}"
    )
    told = (processor(), command, date.today().isoformat())
    costs = (
        f"{row['gap']:+.1f} points: {row['top']:.1f} % of test pictures without the first "
        f"{row['ablated']} of {row['heads']} heads of {row['model']}, {row['random']:.1f} % "
        f"without {row['ablated']} random ones, {row['whole']:.1f} % with all"
    )
    verdict = "as claimed" if row["low"] > 0 else "not shown"
    verdict += " (one run; the interval is over pictures)"
    adds = f"{row['sum_error']} of the largest logit on 64 pictures, against a pass in float32"
    exact = "as claimed" if float(row["sum_error"]) < 1e-5 else "no"
    return [
        Measured(COSTS, costs, (row["low"], row["high"]), *told, verdict),
        Measured(ADDS, adds, (), *told, exact),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--heads", type=int, default=5)
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--ranking", type=int, default=500)
    parser.add_argument("--pictures", type=int, default=2000)
    parser.add_argument("--catalog", type=Path, default=catalog.HERE)
    asked = parser.parse_args()
    rows = [measured(run, asked) for run in asked.runs]
    for row in rows:
        print(row, flush=True)
    append(RESULTS / "circuits.csv", rows)
    catalog.record("circuit-analysis", outcomes(rows[0], asked), asked.catalog)


if __name__ == "__main__":
    main()
