"""What size and normalisation do to a run's features (rs-benchmark's structural check).

    python benchmarks/resizing.py RUN pictures/test [--side 16] [--pictures 1000]

DATA: class folders of pictures that the run was not trained on. They are made `--side` pixels
small, as a camera of that size would give them, and embedded at that size and at the run's own,
normalised as the run wants it and not at all, by the run and by the same network with random
weights. Named are half of the pictures by the other half.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from crosspatch.data.opening import open_source
from crosspatch.data.preprocess import Preprocess
from crosspatch.explain.resizing import conclusions, measure
from crosspatch.training.package import load_model, load_untrained, model_folder, read_config
from hardware import RESULTS, append, facts


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("data", type=Path, help="class folders")
    parser.add_argument("--side", type=int, default=16)
    parser.add_argument("--pictures", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=RESULTS / "resizing.csv")
    given = parser.parse_args()
    source = open_source(given.data)
    order = np.random.default_rng(0).permutation(len(source))[: given.pictures]
    small = Preprocess.for_pictures(given.side)
    shown = [small.fit_image(source.image(int(at))) for at in np.sort(order)]
    labels = source.labels[np.sort(order)]
    trained = load_model(given.run)
    scores = measure(trained, load_untrained(given.run), shown, labels, side=given.side)
    append(
        given.out,
        [
            {
                "model": read_config(model_folder(given.run))["architecture"],
                "features": one.features,
                "size": one.size[0],
                "normalised": one.normalised,
                "knn5": round(float(one.neighbours.mean()), 4),
                "linear": round(float(one.linear.mean()), 4),
                "pictures": len(one.linear),
                "side": given.side,
                **facts("torch", "numpy"),
            }
            for one in scores
        ],
    )
    for finding in conclusions(scores):
        for item in finding.items:
            print(f"{item['path']:45} {item['note']}")
        print(finding.text)


if __name__ == "__main__":
    main()
