"""What it costs to feed a model: decoding photos, and a batch from the buffer.

    python benchmarks/loader.py photos.tar [--passes 9] [--out benchmarks/results/loader.csv]

Photos (any tar of pictures): each is decoded and brought to 256x256 (short side to 256, centre cut)
by `crosspatch.data` and by torchvision's ImageFolder with Resize(256) and CenterCrop(256): the same
files, one thread, whole passes in turn in one process. torchvision runs with its default bilinear
filter and with ours, bicubic. Buffer: a training batch of 128 pictures of 32x32, fetched, augmented
and normalised, beside a whole training step on one. Figures are of CPU seconds, which a busy
machine disturbs little.
"""

from __future__ import annotations

import argparse
import csv
import platform
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path

import crosspatch._torchvision

import numpy as np
import PIL
import torch

# isort: split
import torchvision
from torchvision.transforms import v2

import crosspatch as xp
from crosspatch.data.augment import AugmentConfig, augment, normalise
from crosspatch.data.decode import decode
from crosspatch.data.loading import Batch, train_batches
from crosspatch.data.opening import open_source
from crosspatch.data.prepare import ImageSet, prepare
from crosspatch.data.preprocess import Preprocess
from hardware import processor

SIDE, BATCH = 256, 128
USUAL = AugmentConfig(
    flip=True,
    crop_scale=(0.5, 1.0),
    ratio=(0.75, 4 / 3),
    shift=0.1,
    rotate=15.0,
    shear=5.0,
    brightness=0.3,
    contrast=0.3,
    saturation=0.3,
    erase=0.25,
    ops=2,
)
PLAIN = Preprocess((32, 32), (32, 32))
Step = Callable[[], object]


def unpack(archive: Path, root: Path) -> list[Path]:
    """The archive's pictures as files of one class folder, which ImageFolder needs."""
    (root / "all").mkdir(parents=True)
    files = []
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.isfile():
                files.append(root / "all" / Path(member.name).name)
                files[-1].write_bytes(tar.extractfile(member).read())
    return files


def ours(files: list[Path]) -> Step:
    preprocess = Preprocess((224, 224), (SIDE, SIDE))

    def read() -> None:
        for path in files:
            torch.from_numpy(np.array(preprocess.fit_image(decode(path, side=SIDE))))

    return read


def theirs(root: Path, filter_: v2.InterpolationMode) -> Step:
    steps = [v2.Resize(SIDE, filter_), v2.CenterCrop(SIDE), v2.PILToTensor()]
    folder = torchvision.datasets.ImageFolder(str(root), v2.Compose(steps))
    return lambda: [folder[index] for index in range(len(folder))]


def seconds(step: Step) -> float:
    start = time.process_time()
    step()
    return time.process_time() - start


def alternate(steps: dict[str, Step], passes: int) -> dict[str, list[float]]:
    """CPU seconds of each step, in turn; one pass of each before the first is thrown away."""
    for step in steps.values():
        step()
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(passes):
        for name, step in steps.items():
            taken[name].append(seconds(step))
    return taken


def photo_rows(archive: Path, passes: int) -> Iterator[dict]:
    with tempfile.TemporaryDirectory() as folder:
        files = unpack(archive, Path(folder))
        steps = {
            "crosspatch": ours(files),
            "torchvision ImageFolder, bicubic": theirs(Path(folder), v2.InterpolationMode.BICUBIC),
            "torchvision ImageFolder, bilinear": theirs(
                Path(folder), v2.InterpolationMode.BILINEAR
            ),
        }
        taken = alternate(steps, passes)
    for name, each in taken.items():
        speeds = sorted(len(files) / one for one in each)
        ratio = statistics.median(
            other / own for own, other in zip(taken["crosspatch"], each, strict=True)
        )
        yield row(f"{len(files)} photos to {SIDE}: {name}", "images/s/core", speeds, f"{ratio:.3f}")


def digits_set() -> ImageSet:
    return prepare(open_source("digits"), PLAIN).images


def training_step() -> Callable[[Batch], object]:
    """Forward, backward and update of the preset that 32x32 pictures get on a CPU."""
    model = xp.create_model("crossvit_micro_32", num_classes=10)
    optimiser = torch.optim.AdamW(model.parameters(), fused=True)

    def step(batch: Batch) -> None:
        logits = model(normalise(batch.images, PLAIN))
        torch.nn.functional.cross_entropy(logits, batch.labels).backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    return step


def buffer_rows(passes: int) -> Iterator[dict]:
    images = digits_set()
    preprocess = images.preprocess
    work = {
        "fetched": lambda batch: None,
        "fetched, normalised": lambda batch: normalise(batch.images, preprocess),
        "fetched, augmented, normalised": lambda batch: augment(
            batch.images, batch.positions, epoch=0, seed=0, config=USUAL, preprocess=preprocess
        ),
    }
    count = len(images) // BATCH

    def epoch(act: Callable) -> Step:
        return lambda: [act(batch) for batch in train_batches(images, BATCH, epoch=0, seed=0)]

    for name, each in alternate({k: epoch(v) for k, v in work.items()}, 10 * passes).items():
        costs = sorted(1000 * one / count for one in each)
        yield row(f"batch of {BATCH} at 32x32: {name}", "ms/batch", costs, "")
    (taken,) = alternate({"step": epoch(training_step())}, 3).values()
    costs = sorted(1000 * one / count for one in taken)
    yield row(f"batch of {BATCH} at 32x32: one step of crossvit_micro_32", "ms/batch", costs, "")


def row(what: str, unit: str, figures: list[float], ratio: str) -> dict:
    return {
        "what": what,
        "unit": unit,
        "median": f"{statistics.median(figures):.2f}",
        "least": f"{figures[0]:.2f}",
        "greatest": f"{figures[-1]:.2f}",
        "crosspatch_is_faster_by": ratio,
        "passes": len(figures),
        "date": date.today().isoformat(),
        "processor": processor(),
        "versions": f"python {platform.python_version()}, torch {torch.__version__}, "
        f"torchvision {torchvision.__version__}, pillow {PIL.__version__}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("photos", type=Path, help="a tar of pictures")
    parser.add_argument("--passes", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/loader.csv"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = [*photo_rows(given.photos, given.passes), *buffer_rows(given.passes)]
    given.out.parent.mkdir(parents=True, exist_ok=True)
    with open(given.out, "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
    for one in rows:
        print(f"{one['median']:>8} {one['unit']:<14} {one['what']}")


if __name__ == "__main__":
    main()
