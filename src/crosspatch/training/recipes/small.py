# SPDX-License-Identifier: Apache-2.0
"""Recipe `small` (the default): a classifier from scratch, tonight, on the machine at hand.

For: 100 to 100,000 pictures of any size, two to a few hundred classes, no released weights.
Hardware: 2 CPU cores are enough; one GPU makes larger pictures and longer runs worthwhile.
Time: the embedded digits about a minute on 2 cores; CIFAR-10 with `--time 15m` the 15 minutes.
Expect: digits 99 % on the test split; CIFAR-10 in those 15 minutes 74 % (two Zen 3 cores). The
constants for a GPU are guesses so far: nothing was measured on one.

AdamW, warm-up and cosine, an average of the weights that is scaled to the run, label smoothing,
stochastic depth, gradient clipping, random affine and colour changes, and in long runs MixUp and
CutMix. Everything is a constant here; the functions only look them up.
"""

from __future__ import annotations

from typing import Any

from crosspatch.training.recipes import halved

# Which preset: the first row whose side is not smaller than the median side of the pictures.
# (side up to, preset, smallest model input, largest model input)
PRESETS_CPU = (
    (40, "crossvit_micro_32", 24, 40),
    (80, "crossvit_mini_64", 64, 64),
    (None, "crossvit_mini_96", 96, 96),
)
PRESETS_GPU = (
    (40, "crossvit_mini_32", 24, 40),
    (80, "crossvit_mini_64", 64, 64),
    (None, "crossvit_9_dagger_224", 224, 224),
)
FEW_PICTURES = 3_000  # below: the micro preset, where the pictures are small
FEW_PRESET = "crossvit_micro_32"
FEW_FOR_GPU_224 = 5_000  # below: the 96-pixel preset on a GPU too
ENLARGED = (16, 32)  # smaller pictures are enlarged to twice their side, within these bounds

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LONG_SIDES = 1.8  # median long/short side from which --fit pad is chosen instead of crop

BATCH_CPU, BATCH_GPU = 64, 512
STEPS_AT_LEAST = 16  # per epoch: batches shrink on small sets until an epoch has as many
BATCH_SMALLEST = 16

STEPS_CPU, STEPS_GPU = 800, 12_000  # of a run without --time or --epochs
EPOCHS_CPU, EPOCHS_GPU = (12, 80), (40, 300)  # fewest and most epochs of such a run
EPOCHS_MOST = 400  # with --time: a longer run seldom helps

RATE, RATE_BATCH = 1.4e-3, 128  # peak rate at this batch; other batches by the square root
RATE_LARGEST = 4e-3
RATE_LAST = 0.01  # of the peak
OPTIMISER = "adamw-fused"
SCHEDULE = "cosine"
WEIGHT_DECAY = 0.05
BETAS = (0.9, 0.99)
WARMUP = 0.08  # of the steps
WARMUP_MOST = 5  # epochs
EMA_HALF_LIFE = 0.02  # of the run
SMOOTHING = 0.1
CLIP = 1.0
REPEATS = 1
DECAY: tuple[str, ...] = ()  # names that are decayed, although the model says otherwise
FREEZE, LAYER_DECAY, RANGE, WEIGHTS = 0.0, 1.0, None, "none"  # see finetune
REFUSES: tuple[str, ...] = ()  # settings that have no meaning here
PENALTIES: tuple[float, ...] = ()  # of a probe
REASONS: tuple[str, ...] = ()

# Regularisation grows with the epochs: (epochs up to, stochastic depth, augmentation, mixing).
# Five epochs of CIFAR-10: with one operation and the full crops 60.8 % on test, mild 63.3 %.
MILD: dict[str, Any] = {"crop_scale": (0.8, 1.0), "ratio": (0.9, 1.1)}
FULL: dict[str, Any] = {"crop_scale": (0.6, 1.0), "ratio": (0.8, 1.25)}
STRENGTH = (
    (30, 0.0, {**MILD, "ops": 0}, False),
    (60, 0.05, {**MILD, "ops": 2}, False),
    (None, 0.1, {**FULL, "ops": 2}, True),
)
TINY_INPUT = 32  # smaller inputs are mostly signs: their crops stay mild
MIX, MIX_PROB, MIX_ALPHA = ("mixup", "cutmix"), (0.3, 0.5), (0.4, 1.0)

AUGMENT: dict[str, Any] = {
    "shift": 0.1,
    "rotate": 12.0,
    "shear": 6.0,
    "brightness": 0.2,
    "contrast": 0.2,
    "saturation": 0.2,
    "erase": 0.0,
}


def row_for(table: tuple, value: float) -> tuple:
    """The first row of a table whose bound (its first entry; None = none) is not below `value`."""
    return next(row for row in table if row[0] is None or value <= row[0])


def preset(side: int, pictures: int, gpu: bool) -> tuple[str, int]:
    """(entry point, model input side) for pictures of this median side."""
    table = PRESETS_GPU if gpu else PRESETS_CPU
    bound, name, low, high = row_for(table, side)
    if gpu and bound is None and pictures < FEW_FOR_GPU_224:
        bound, name, low, high = PRESETS_CPU[-1]
    if bound == PRESETS_CPU[0][0] and pictures < FEW_PICTURES:
        name = FEW_PRESET
    if bound == PRESETS_CPU[0][0] and side < low:
        return name, max(ENLARGED[0], min(ENLARGED[1], 2 * side))
    return name, max(low, min(side, high))


def batch_size(pictures: int, gpu: bool) -> int:
    """Pictures per step: a power of two, small enough for `STEPS_AT_LEAST` steps an epoch."""
    largest = BATCH_GPU if gpu else BATCH_CPU
    return halved(largest, pictures, smallest=BATCH_SMALLEST, steps=STEPS_AT_LEAST)


def epochs(steps_per_epoch: int, gpu: bool) -> int:
    """Epochs of a run for which neither a time nor a number was asked."""
    steps, (fewest, most) = (STEPS_GPU, EPOCHS_GPU) if gpu else (STEPS_CPU, EPOCHS_CPU)
    return max(fewest, min(most, round(steps / steps_per_epoch)))


def peak_rate(batch: int) -> float:
    """Peak rate for a batch."""
    return min(RATE_LARGEST, RATE * (batch / RATE_BATCH) ** 0.5)


def last_rate(peak: float) -> float:
    """The rate at the end of a run."""
    return peak * RATE_LAST


def by_length(epochs: float, side: int) -> dict[str, Any]:
    """What depends on how often each picture is seen, for inputs of this side: drop_path, augment
    (fields of AugmentConfig) and mixing."""
    _, drop_path, augment, mixed = row_for(STRENGTH, epochs)
    if side < TINY_INPUT:
        augment = {**augment, **MILD}
    names, prob, alpha = (MIX, MIX_PROB, MIX_ALPHA) if mixed else ((), (), ())
    mixing = {"mix": names, "mix_prob": prob, "mix_alpha": alpha}
    return {"drop_path": drop_path, "augment": augment, **mixing}
