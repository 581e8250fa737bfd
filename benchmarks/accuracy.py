"""Does a trained run keep its accuracy in every engine and precision?

    python benchmarks/accuracy.py RUN DATA [--out FILE]

Exports the run as fp32, dynamic int8 and static int8 (scales found on its validation pictures),
names every test picture with every engine that can run them here, and compares with torch picture
by picture: the difference in accuracy with its paired 95 % interval, agreement, largest difference
of a probability, calibration.
"""

from __future__ import annotations

import argparse
import tempfile
from functools import partial
from pathlib import Path

import crosspatch._torchvision  # noqa: F401

import numpy as np

from crosspatch.cli.eval import choose, match_classes
from crosspatch.data.opening import open_source
from crosspatch.deploy.bundle import read_bundle
from crosspatch.deploy.engines import available
from crosspatch.deploy.export import export
from crosspatch.deploy.loading import load
from crosspatch.deploy.quantise import calibration_pictures
from crosspatch.metrics.classification import accuracy, accuracy_interval, ece, nll
from crosspatch.metrics.interval import paired
from hardware import RESULTS, append, facts

KINDS = {"fp32": {}, "int8": {"int8": True}, "int8-static": {"int8": True, "static": True}}


def row(run: Path, who: str, size: int, probs: np.ndarray, reference: np.ndarray, truth) -> dict:
    right, was = probs.argmax(1) == truth, reference.argmax(1) == truth
    gained, lost = int((right & ~was).sum()), int((was & ~right).sum())
    change = paired(gained, lost, len(truth))
    own = accuracy_interval(probs, truth)
    return {
        "run": run.name,
        "who": who,
        "pictures": len(truth),
        "accuracy": round(accuracy(probs, truth), 4),
        "low": round(own[0], 4),
        "high": round(own[1], 4),
        "change": round((gained - lost) / len(truth), 5),
        "change_low": round(change[0], 5),
        "change_high": round(change[1], 5),
        "agreement": round(float((probs.argmax(1) == reference.argmax(1)).mean()), 5),
        "largest_difference": float(f"{np.abs(probs - reference).max():.3g}"),
        "nll": round(nll(probs, truth), 4),
        "ece": round(ece(probs, truth), 4),
        "megabytes": round(size / 1e6, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("data")
    parser.add_argument("--out", type=Path, default=RESULTS / "accuracy.csv")
    asked = parser.parse_args()
    source = open_source(asked.data)
    torch_model = load(asked.run)
    truth = match_classes(source, torch_model.classes)
    chosen, _, _ = choose(asked.run, source, "test")
    truth = truth[chosen]
    loaded = [torch_model.pixels(source.read(int(index))) for index in chosen]
    reference = torch_model.predict(loaded).probs
    weights = (asked.run / "model" / "model.safetensors").stat().st_size
    rows = [row(asked.run, "torch fp32", weights, reference, reference, truth)]
    with tempfile.TemporaryDirectory() as place:
        for kind, how in KINDS.items():
            find = partial(calibration_pictures, asked.run, torch_model.preprocess, asked.data)
            given = {**how, "calibration": find} if "static" in how else how
            made = export(asked.run, "onnx", out=Path(place) / f"{kind}.onnx", **given)
            for engine, precision in available(read_bundle(made.path)):
                name = engine if precision != "bf16" else f"{engine}-bf16"
                found = load(made.path, engine=name, threads=1).predict(loaded).probs
                who = f"{engine} {kind if precision != 'bf16' else precision}"
                rows.append(row(asked.run, who, made.size, found, reference, truth))
                print(*rows[-1].values(), flush=True)
    append(asked.out, [one | facts("torch", "onnxruntime", "openvino") for one in rows])


if __name__ == "__main__":
    main()
