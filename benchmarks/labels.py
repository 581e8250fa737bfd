"""How many planted label errors are found, by which score?

    python benchmarks/labels.py pictures/train --work /tmp/labels [--noise SEED] [--time 8m]

DATA: class folders. 5 % of the pictures get another label, drawn evenly by SEED, and are copied
into WORK/noisy; a run is trained on those, in WORK/run, with one thread. Scored is each opinion by
itself, and what `explain.mislabels` makes of them: the share of the planted errors among the most
suspicious pictures, as many of them as can be taken while half are planted errors. What stands in
WORK already is used again.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from crosspatch.deploy.embedding import embedder
from crosspatch.deploy.loading import load
from crosspatch.explain.mislabels import mislabels, opinion
from crosspatch.metrics import label_errors
from crosspatch.metrics.neighbours import crossvalidated_neighbours
from hardware import RESULTS, append, facts

SHARE = 0.05
ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


def plant(data: Path, noisy: Path, seed: int) -> None:
    """The pictures in folders of their new labels; their names begin with the old ones."""
    files = sorted(path for path in data.rglob("*") if path.suffix.lower() in ENDINGS)
    names = sorted({path.parent.name for path in files})
    rng = np.random.default_rng(seed)
    wrong = np.sort(rng.permutation(len(files))[: round(SHARE * len(files))])
    labels = np.array([names.index(path.parent.name) for path in files])
    labels[wrong] = (labels[wrong] + rng.integers(1, len(names), len(wrong))) % len(names)
    for path, label in zip(files, labels.tolist(), strict=True):
        folder = noisy / names[label]
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / f"{path.parent.name}-{path.name}")


def train(noisy: Path, run: Path, model: str, budget: str) -> None:
    """One thread, one core."""
    command = [sys.executable, "-m", "crosspatch", "train", str(noisy), "--out", str(run)]
    command += ["--model", model, "--time", budget]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def found(scores: np.ndarray, wrong: np.ndarray, precision: float = 0.5) -> float:
    """Share of the errors among as many of the most suspicious pictures as that precision lets."""
    hits = np.cumsum(wrong[np.argsort(-scores, kind="stable")])
    fine = np.flatnonzero(hits >= precision * np.arange(1, len(hits) + 1))
    return float(hits[fine[-1]] / wrong.sum()) if len(fine) else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path, help="class folders")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--noise", type=int, default=0, metavar="SEED", help="of the wrong labels")
    parser.add_argument("--model", default="fcaformer_micro_32")
    parser.add_argument("--time", default="8m")
    parser.add_argument("--out", type=Path, default=RESULTS / "labels.csv")
    given = parser.parse_args()
    noisy, run = given.work / "noisy", given.work / "run"
    if not noisy.is_dir():
        plant(given.data, noisy, given.noise)
    if not run.is_dir():
        train(noisy, run, given.model, given.time)

    files = sorted(path for path in noisy.rglob("*") if path.suffix.lower() in ENDINGS)
    names = sorted({path.parent.name for path in files})
    labels = np.array([names.index(path.parent.name) for path in files])
    truth = np.array([names.index(path.name.split("-")[0]) for path in files])
    wrong, paths = labels != truth, [str(path.relative_to(noisy)) for path in files]
    told = [path.parent.name for path in files]

    own = load(run).predict(files).probs
    features = embedder(run).embed(files)
    scaled = (features - features.mean(axis=0)) / np.maximum(features.std(axis=0), 1e-6)
    began = time.process_time()
    alone = mislabels(None, files, paths, told)
    seconds = time.process_time() - began
    both = mislabels(run, files, paths, told)
    opinions = {
        "the run": own,
        "10 nearest neighbours in the run's features": crossvalidated_neighbours(scaled, labels),
        "layer on the run's features, picture left out": opinion(features, labels, len(names)),
        "layer on whitened patches, picture left out": alone.probs,
        "the run and the layer on patches, pooled": both.probs,
    }
    rows = []
    for name, probs in opinions.items():
        for how in label_errors.SCORES:
            share = found(label_errors.scores(probs, labels, how), wrong)
            rows.append(
                {
                    "opinion": name,
                    "score": how,
                    "accuracy": round(float((probs.argmax(axis=1) == truth).mean()), 4),
                    "found_at_half": round(share, 4),
                    "listed": "",
                    "precision": "",
                    "recall": "",
                    "noise": given.noise,
                    "model": given.model,
                    "time": given.time,
                    **facts("torch", "numpy"),
                }
            )
            print(f"{share:7.1%}  {how:10} {name}")
    for name, result in (("patches", alone), ("run and patches", both)):
        listed = {row["path"] for row in result.rows}
        hits = sum(bool(bad) for path, bad in zip(paths, wrong, strict=True) if path in listed)
        figures = {"listed": len(listed), "precision": round(hits / max(1, len(listed)), 4)}
        figures["recall"] = round(hits / int(wrong.sum()), 4)
        rows.append({**rows[-1], "opinion": f"the list, by {name}", "score": "self",
                     "accuracy": "", "found_at_half": "", **figures})  # fmt: skip
        print(f"the list, by {name}: {figures}")
    print(f"without a run: {seconds:.0f} CPU seconds for {len(files):,} pictures")
    append(given.out, rows)


if __name__ == "__main__":
    main()
