# SPDX-License-Identifier: Apache-2.0
"""Recipe `deit`: a plain vision transformer from scratch, as DeiT trains it.

"Training data-efficient image transformers & distillation through attention", Touvron et al., arXiv
2012.12877; the constants are those of the authors' code.

For: a million pictures, or a comparison with what papers train by this recipe. On a few thousand
pictures it learns slowly: take `small` there.
Hardware and time: GPUs. One core of an AMD EPYC needs 0.13 s for a step of deit_tiny per picture of
224 pixels: two days for one epoch of ImageNet. The constants for a GPU are the authors' or guesses
(the batch): nothing was measured on one.
Expect: on ImageNet-1k (1.28 million pictures of 1000 classes, 300 epochs, batches of 1024) the
paper has 72.2 % with deit_tiny_patch16_224, 79.9 % with deit_small and 81.8 % with deit_base. These
are the paper's figures: we have not trained on ImageNet. Ours: the digits with vit_micro_32
97.8 % on the test split (95.2 to 99.0 with 95 % confidence), 300 epochs in 21 minutes on one busy
core; `small` has 99 % there in a minute.

As the authors do it, and tested number by number against their code: the rates (constant within an
epoch, the first two epochs at 1e-6), the order of repeated augmentation (3 copies), the boxes of
CutMix, mixed and smoothed targets (the partner is the reversed batch). After their description:
decay of all but vectors, positions and the class token, stochastic depth, no clipping, the raw
weights judged. What differs:
- They draw two of fifteen operations, each applied with probability 1/2 at a magnitude of about 9.
  Here two of shift, rotation, shear, brightness, contrast and saturation act, each by an amount
  uniform up to magnitude 9: as strong on average. The other operations are missing.
- Crops are taken out of the picture as it is stored (256 pixels for an input of 224), their
  proportions are relative to its, and they are sampled bilinearly. What lies outside of the picture
  is mirrored, not filled.
- A blanked rectangle has the mean colour instead of noise.
- Inputs of up to 32 pixels get their crop with a padding of 4 in 32, but mirrored, not black.
- Batches of 1024 need a large GPU or several: these are smaller, and the rate with them. There is
  no average of the weights, which the authors keep but neither judge nor release.
- Validation chooses the weights, and test is touched once; theirs are chosen on the test pictures.
"""

from __future__ import annotations

import math
from typing import Any

from crosspatch.training.recipes import halved

# (side up to, preset, smallest model input, largest model input)
SMALL_PICTURES = (40, "vit_micro_32", 32, 32)
PRESET_CPU = (None, "deit_tiny_patch16_224", 224, 224)
PRESET_GPU = (None, "deit_small_patch16_224", 224, 224)

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LONG_SIDES = math.inf  # pictures are always cropped

BATCH_CPU, BATCH_GPU = 64, 256
STEPS_AT_LEAST = 16  # per epoch: batches shrink on small sets until an epoch has as many
BATCH_SMALLEST = 16

EPOCHS = 300
EPOCHS_MOST = 1000  # the paper's longest training

RATE, RATE_BATCH = 5e-4, 512  # peak rate at this batch; others in proportion
RATE_LAST = 1e-5
OPTIMISER = "adamw-fused"
SCHEDULE = "epochs"
WARMUP_MOST = 5  # epochs
WARMUP = 0.2  # of the steps, in runs too short for those
WEIGHT_DECAY = 0.05
DECAY = ("dist_token",)  # decayed, although the model says otherwise
BETAS = (0.9, 0.999)
EMA_HALF_LIFE = 0.0
SMOOTHING = 0.1
CLIP = 0.0
REPEATS = 3
DROP_PATH = 0.1
MIX, MIX_PROB, MIX_ALPHA = ("mixup-batch", "cutmix-batch"), (0.5, 0.5), (0.8, 1.0)

MAGNITUDE = 9 / 10
AUGMENT: dict[str, Any] = {
    "ops": 2,
    "shift": 0.45 * MAGNITUDE,
    "rotate": 30.0 * MAGNITUDE,
    "shear": math.degrees(math.atan(0.3 * MAGNITUDE)),
    "brightness": 0.9 * MAGNITUDE,
    "contrast": 0.9 * MAGNITUDE,
    "saturation": 0.9 * MAGNITUDE,
    "erase": 0.25,
}
CROPS: dict[str, Any] = {"crop_scale": (0.08, 1.0), "ratio": (3 / 4, 4 / 3), "pad": 0.0}
PADDED: dict[str, Any] = {"crop_scale": (1.0, 1.0), "ratio": (1.0, 1.0), "pad": 4 / 32}
TINY_INPUT = 32  # up to here crops are padded instead of resized

FREEZE, LAYER_DECAY, RANGE, WEIGHTS = 0.0, 1.0, None, "none"  # see finetune
REFUSES: tuple[str, ...] = ()  # settings that have no meaning here
PENALTIES: tuple[float, ...] = ()  # of a probe
REASONS = (
    f"Repeated augmentation: each picture comes {REPEATS} times in a row, so that an epoch sees a "
    "third of them.",
    "The rate is constant within an epoch, as in DeiT's training: two epochs at 1e-06, then it "
    "rises.",
)


def preset(side: int, pictures: int, gpu: bool) -> tuple[str, int]:
    """(entry point, model input side) for pictures of this median side."""
    del pictures
    row = PRESET_GPU if gpu else PRESET_CPU
    if side <= SMALL_PICTURES[0]:
        row = SMALL_PICTURES
    _, name, low, high = row
    return name, max(low, min(side, high))


def batch_size(pictures: int, gpu: bool) -> int:
    """Pictures per step: a power of two, small enough for `STEPS_AT_LEAST` steps an epoch."""
    largest = BATCH_GPU if gpu else BATCH_CPU
    return halved(largest, pictures, smallest=BATCH_SMALLEST, steps=STEPS_AT_LEAST)


def epochs(steps_per_epoch: int, gpu: bool) -> int:
    """Epochs of a run for which neither a time nor a number was asked."""
    del steps_per_epoch, gpu
    return EPOCHS


def peak_rate(batch: int) -> float:
    """Peak rate for a batch."""
    return RATE * batch / RATE_BATCH


def last_rate(peak: float) -> float:
    """The rate at the end of a run."""
    return min(peak, RATE_LAST)


def by_length(epochs: float, side: int) -> dict[str, Any]:
    """drop_path, augment (fields of AugmentConfig) and mixing for inputs of this side; the length
    changes none of them."""
    del epochs
    mixing = {"mix": MIX, "mix_prob": MIX_PROB, "mix_alpha": MIX_ALPHA}
    crops = PADDED if side <= TINY_INPUT else CROPS
    return {"drop_path": DROP_PATH, "augment": crops, **mixing}
