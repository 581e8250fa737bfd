# SPDX-License-Identifier: Apache-2.0
"""Recipe `cnn`: a small convolutional network from scratch, with SGD and weak augmentation.

For: pictures of up to some 64 pixels, and the teacher that DeiT-LT learns from: ResNet-32 for CIFAR
there, ResNet-50 for larger pictures on a GPU. On a CPU larger pictures are shrunk to 64 pixels.
Hardware: 2 CPU cores are enough for the small network; ResNet-50 wants a GPU.
Time: as `small`. The constants for a GPU are guesses: nothing was measured on one.

The settings are those that long-tail papers train ResNet-32 with (LDAM-DRW, arXiv 1906.07413,
section 4; for sharpness-aware minimisation arXiv 2212.13827): momentum 0.9, rate 0.1 for batches of
128, five epochs of warm-up, weight decay 5e-4, mirrored and shifted pictures and nothing else. What
differs: half a cosine instead of steps at 80 and 90 % of the run; vectors are not decayed; what
lies outside of the picture is mirrored, not black; validation chooses the weights.
"""

from __future__ import annotations

from typing import Any

from crosspatch.training.recipes import halved, small

SMALL_PRESET, SMALL_SIDE = "resnet32_cifar", 64
LARGE_PRESET, LARGE_SIDE = "resnet50", 224
SMALLEST_SIDE = 16

MEAN, STD = small.MEAN, small.STD
LONG_SIDES = small.LONG_SIDES

BATCH_CPU, BATCH_GPU = 128, 128
STEPS_AT_LEAST = 16  # per epoch: batches shrink on small sets until an epoch has as many
BATCH_SMALLEST = 16
EPOCHS_MOST = 400

OPTIMISER = "sgd"
RATE, RATE_BATCH = 0.1, 128  # peak rate at this batch; others in proportion
RATE_LAST = 1e-3  # of the peak
SCHEDULE = "cosine"
WEIGHT_DECAY = 5e-4
BETAS = (0.9, 0.999)  # the first is the momentum
WARMUP = 0.1  # of the steps, in runs too short for
WARMUP_MOST = 5  # epochs
EMA_HALF_LIFE = 0.0
SMOOTHING = 0.0
CLIP = 0.0
REPEATS = 1
DECAY: tuple[str, ...] = ()
FREEZE, LAYER_DECAY, RANGE, WEIGHTS = 0.0, 1.0, None, "none"  # see finetune
REFUSES: tuple[str, ...] = ()
PENALTIES: tuple[float, ...] = ()  # of a probe
REASONS: tuple[str, ...] = ()

AUGMENT: dict[str, Any] = {}
PADDED: dict[str, Any] = {"crop_scale": (1.0, 1.0), "ratio": (1.0, 1.0), "pad": 4 / 32, "ops": 0}
CROPS: dict[str, Any] = {"crop_scale": (0.25, 1.0), "ratio": (3 / 4, 4 / 3), "pad": 0.0, "ops": 0}

epochs = small.epochs


def preset(side: int, pictures: int, gpu: bool) -> tuple[str, int]:
    """(entry point, model input side) for pictures of this median side."""
    del pictures
    if side > SMALL_SIDE and gpu:
        return LARGE_PRESET, LARGE_SIDE
    return SMALL_PRESET, max(SMALLEST_SIDE, min(side, SMALL_SIDE))


def batch_size(pictures: int, gpu: bool) -> int:
    """Pictures per step: a power of two, small enough for `STEPS_AT_LEAST` steps an epoch."""
    largest = BATCH_GPU if gpu else BATCH_CPU
    return halved(largest, pictures, smallest=BATCH_SMALLEST, steps=STEPS_AT_LEAST)


def peak_rate(batch: int) -> float:
    """Peak rate for a batch."""
    return RATE * batch / RATE_BATCH


def last_rate(peak: float) -> float:
    """The rate at the end of a run."""
    return peak * RATE_LAST


def by_length(epochs: float, side: int) -> dict[str, Any]:
    """drop_path, augment (fields of AugmentConfig) and mixing for inputs of this side; the length
    changes none of them."""
    del epochs
    crops = PADDED if side <= SMALL_SIDE else CROPS
    return {"drop_path": 0.0, "augment": crops, "mix": (), "mix_prob": (), "mix_alpha": ()}
