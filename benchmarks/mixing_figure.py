# SPDX-License-Identifier: Apache-2.0
"""Draws docs/figures/mixing.png: what every mixing does with four generated pictures.

python benchmarks/mixing_figure.py [--out docs/figures/mixing.png]
"""

from __future__ import annotations

import argparse

import matplotlib as mpl
import numpy as np
import torch

from crosspatch.mixing import draws
from crosspatch.training.mix import CELLED, MIXER_OF

SIDE, CELL = 96, 24
# a step of the run whose draw shows each one well
STEPS = {"mixup": 0, "cutmix": 2, "mixup-batch": 9, "cutmix-batch": 5, "resizemix": 29,
         "resizemix-beta": 6, "maskmix": 4, "mixpro": 7, "transmix": 12}  # fmt: skip
FOLLOWS = {"mixpro": "as maskmix; the label\nasks the attention too",
           "transmix": "as cutmix-batch; the label\nasks the attention too"}  # fmt: skip


def pictures() -> torch.Tensor:
    """(4, 3, SIDE, SIDE) in [0, 1]: a disc, rings, a chequered square and a triangle."""
    y, x = np.mgrid[0:SIDE, 0:SIDE] / (SIDE - 1) * 2 - 1
    radius = np.hypot(x, y)
    shapes = (
        radius < 0.7,
        (radius * 8 % 2 < 1) & (radius < 0.85),
        (np.abs(x) < 0.7) & (np.abs(y) < 0.7) & ((x * 4 // 1 + y * 4 // 1) % 2 == 0),
        (y < 0.7) & (y > -0.8 + 2 * np.abs(x)),
    )
    inks = ((0.85, 0.25, 0.2), (0.1, 0.35, 0.75), (0.1, 0.1, 0.1), (0.95, 0.75, 0.1))
    papers = ((0.95, 0.9, 0.8), (0.75, 0.9, 0.95), (0.7, 0.85, 0.7), (0.45, 0.3, 0.55))
    shade = 1 - 0.15 * (y + 1) / 2
    made = [
        np.where(shape, np.array(ink)[:, None, None], np.array(paper)[:, None, None] * shade)
        for shape, ink, paper in zip(shapes, inks, papers, strict=True)
    ]
    return torch.from_numpy(np.stack(made)).float()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", default="docs/figures/mixing.png")
    out = parser.parse_args().out
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    images = pictures()
    names = ["as they are", *MIXER_OF]
    figure, axes = plt.subplots(len(names), 4, figsize=(7.2, 1.42 * len(names)))
    for row, name in zip(axes, names, strict=True):
        mixed, lam, partner = images, None, None
        if name in MIXER_OF:
            mixer = MIXER_OF[name](1.0, **({"cell": CELL} if name in CELLED else {}))
            mixed, mixing = mixer(images, draws(0, STEPS[name]))
            lam, partner = mixing.lam.tolist(), mixing.partner.tolist()
        for place, axis in enumerate(row):
            axis.imshow(mixed[place].permute(1, 2, 0).clamp(0, 1).numpy())
            axis.set_xticks([])
            axis.set_yticks([])
            letter = "ABCD"[place]
            if lam is not None and partner is not None:
                letter = (
                    f"{lam[place]:.2f} {letter} + {1 - lam[place]:.2f} {'ABCD'[partner[place]]}"
                )
            axis.set_xlabel(letter, fontsize=7, labelpad=2)
        text = f"{name}\n{FOLLOWS[name]}" if name in FOLLOWS else name
        row[0].set_ylabel(text, rotation=0, ha="right", va="center", fontsize=8, labelpad=6)
    figure.tight_layout(h_pad=0.3, w_pad=0.2)
    figure.savefig(out, dpi=80)


if __name__ == "__main__":
    main()
