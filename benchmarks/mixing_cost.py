# SPDX-License-Identifier: Apache-2.0
"""What mixing costs: every mixer on one batch, and a training step with and without attention.

    python benchmarks/mixing_cost.py [--device cuda] [--repeats 15]

Milliseconds, the median of alternating repeats and the smallest and largest; on a CPU of the
processor, as other programs may share the machine. A step is forward,
backward and AdamW of the supervised objective, the mixing included; `area` is the very same mixing
labelled by area, so what it lacks is the class row and the label. CSV on stdout.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable

import torch

import crosspatch as xp
from crosspatch.layers import linear
from crosspatch.mixing import OneOf, draws
from crosspatch.mixing.mixpro import MaskMix, cell_for
from crosspatch.objectives import Inputs
from crosspatch.objectives.supervised import Supervised
from crosspatch.tasks.classify import Classify
from crosspatch.training.mix import CELLED, MIXER_OF, patch_of

SHAPES = ((64, 32), (32, 224))
MODELS = (("vit_micro_32", 64, 32), ("deit_tiny_patch16_224", 8, 224),
          ("deit_small_patch16_224", 4, 224), ("crossvit_micro_32", 64, 32))  # fmt: skip


def alternate(
    ways: dict[str, Callable[[int], None]], repeats: int, device: str
) -> dict[str, list[float]]:
    """Milliseconds of every way, taken in turn."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(-2, repeats):
        for name, way in ways.items():
            began = clock()
            way(number + 2)
            if device == "cuda":
                torch.cuda.synchronize()
            if number >= 0:
                times[name].append(1e3 * (clock() - began))
    return times


def mixers(count: int, side: int, device: str) -> dict[str, Callable[[int], None]]:
    images = torch.randn(count, 3, side, side, device=device)
    cell = {"cell": cell_for(4 if side == 32 else 16, (side, side))}

    def way(name: str) -> Callable[[int], None]:
        mixer = MIXER_OF[name](1.0, **(cell if name in CELLED else {}))
        return lambda step: mixer(images, draws(0, step))

    return {name: way(name) for name in MIXER_OF}


def steps(name: str, count: int, side: int, device: str) -> dict[str, Callable[[int], None]]:
    images = torch.randn(count, 3, side, side, device=device)
    labels = torch.arange(count, device=device) % 10

    def way(mixer: OneOf | None) -> Callable[[int], None]:
        torch.manual_seed(0)
        model = xp.create_model(name, num_classes=10).to(device)
        learnt = Supervised(model, Classify([str(k) for k in range(10)]), mixer=mixer)
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

        def step(number: int) -> None:
            inputs = Inputs(images, labels, (0, number, 0), 1 / count)
            learnt(inputs, 0.0)["loss"].backward()
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)

        return step

    cell = cell_for(patch_of(xp.create_model(name, num_classes=10), (side, side)), (side, side))
    by = {key: OneOf([MaskMix(cell=cell, progressive=key == "attention")], [1.0])
          for key in ("area", "attention")}  # fmt: skip
    return {"unmixed": way(None), **{key: way(mixer) for key, mixer in by.items()}}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=15)
    given = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    linear.use("auto")
    print(f"# torch {torch.__version__}, {given.device}, {torch.get_num_threads()} threads")
    print("what,batch,side,way,median_ms,least_ms,most_ms")
    todo = [("mixer", *shape, mixers(*shape, given.device)) for shape in SHAPES]
    todo += [(name, count, side, steps(name, count, side, given.device))
             for name, count, side in MODELS]  # fmt: skip
    for what, count, side, ways in todo:
        for way, found in alternate(ways, given.repeats, given.device).items():
            row = (statistics.median(found), min(found), max(found))
            print(what, count, side, way, *(f"{x:.2f}" for x in row), sep=",")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
