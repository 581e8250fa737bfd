# SPDX-License-Identifier: Apache-2.0
"""Recipe `finetune`: a network that has learnt other pictures goes on with these.

For: a few hundred to some thousand pictures, and weights that have seen something like them:
`--weights RUN` a run of yours, FILE or NAME a released checkpoint; left away, that of the model
below, from the cache of Hugging Face or fetched. Without any, `small` is what trains.
Hardware: 2 CPU cores for small pictures; the constants for a GPU are guesses, nothing was measured
on one.
Time: 200 pictures of 32 pixels (crossvit_micro_32, 80 epochs): 71 to 97 s on two cores of an AMD
EPYC, reading and judging included.
Expect: 200 pictures of five classes of CIFAR-10, after a run of 8 minutes on the other five: 73.3,
73.4 and 72.9 % (three seeds, each ±1.2), where `small` from scratch has 65.1, 64.3 and 66.5,
`small` with the same weights 71.3, 72.5 and 66.9, `probe` with them 62.6, 63.0 and 62.8
(`benchmarks/finetune.py`). Half as many epochs were worse.

The head first, alone: its gradients would spoil the layers below while it knows nothing (ULMFiT,
arXiv 1801.06146, section 3.2). Then every layer with a lower rate than the one above it (BEiT,
arXiv 2106.08254), and the peak of the rate by a range test (Smith, arXiv 1506.01186, section 3.3),
which `--lr` skips. Everything else is as in `small`.
"""

from __future__ import annotations

from typing import Any

from crosspatch.training.recipes import halved, small

# (preset, model input side) where --weights auto decides: timm has released weights of these
PRESET_CPU = ("crossvit_tiny_240", 224)
PRESET_GPU = ("crossvit_9_dagger_240", 224)
WEIGHTS = "auto"  # --weights where it is not given

FREEZE = 0.1  # of the steps: first only the head learns
LAYER_DECAY = 0.75  # of the rate, from a layer to the one below
RANGE = (1e-5, 0.1, 40)  # of the range test: lowest rate, highest rate, steps

MEAN, STD = small.MEAN, small.STD
LONG_SIDES = small.LONG_SIDES

BATCH_CPU, BATCH_GPU = 32, 128
STEPS_AT_LEAST, BATCH_SMALLEST = 16, 16

STEPS_CPU, STEPS_GPU = 800, 8_000  # of a run without --time or --epochs
EPOCHS_CPU, EPOCHS_GPU = (4, 80), (10, 80)  # fewest and most epochs of such a run
EPOCHS_MOST = 200  # with --time

RATE, RATE_BATCH = 1e-3, 128  # peak rate where the range test finds none
RATE_LAST = 0.01  # of the peak
OPTIMISER = "adamw-fused"
SCHEDULE = "cosine"
WEIGHT_DECAY = 0.05
BETAS = (0.9, 0.99)
WARMUP, WARMUP_MOST = 0.1, 5
EMA_HALF_LIFE = 0.02
SMOOTHING = 0.1
CLIP = 1.0
REPEATS = 1
DECAY: tuple[str, ...] = ()
REFUSES: tuple[str, ...] = ()
PENALTIES: tuple[float, ...] = ()
REASONS = (
    f"First {FREEZE:.0%} of the steps only the head learns; then each layer with "
    f"{LAYER_DECAY:g} times the rate of the one above it.",
)

AUGMENT = small.AUGMENT


def preset(side: int, pictures: int, gpu: bool) -> tuple[str, int]:
    """(entry point, model input side), whatever the pictures are."""
    del side, pictures
    return PRESET_GPU if gpu else PRESET_CPU


def batch_size(pictures: int, gpu: bool) -> int:
    """Pictures per step: a power of two, small enough for `STEPS_AT_LEAST` steps an epoch."""
    largest = BATCH_GPU if gpu else BATCH_CPU
    return halved(largest, pictures, smallest=BATCH_SMALLEST, steps=STEPS_AT_LEAST)


def epochs(steps_per_epoch: int, gpu: bool) -> int:
    """Epochs of a run for which neither a time nor a number was asked."""
    steps, (fewest, most) = (STEPS_GPU, EPOCHS_GPU) if gpu else (STEPS_CPU, EPOCHS_CPU)
    return max(fewest, min(most, round(steps / steps_per_epoch)))


def peak_rate(batch: int) -> float:
    """Peak rate for a batch, where the range test finds none."""
    return RATE * (batch / RATE_BATCH) ** 0.5


def last_rate(peak: float) -> float:
    """The rate at the end of a run."""
    return peak * RATE_LAST


def by_length(epochs: float, side: int) -> dict[str, Any]:
    """drop_path, augment and mixing."""
    return small.by_length(epochs, side)
