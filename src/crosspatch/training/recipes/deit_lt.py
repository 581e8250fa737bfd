# SPDX-License-Identifier: Apache-2.0
"""Recipe `deit-lt`: the student of DeiT-LT, which `--objective deit-lt` trains by it.

For: uneven classes, where the rare ones matter. A network with a distillation token learns from
the labels and from a convolutional teacher, which is trained first on the same pictures (recipe
`cnn`, a third of `--time`).
Hardware: 2 CPU cores for pictures of up to 80 pixels; a GPU for larger ones.
Time: `small`'s, and the teacher's.

Rates, batches and averages are `small`'s, which learn in minutes; the paper trains 1200 epochs at
224 pixels by DeiT's recipe (`--recipe deit --objective deit-lt`). What it lives on is the paper's:
every batch is mixed (MixUp 0.8 or CutMix 1.0, as DeiT draws them) until rare classes weigh more,
labels are smoothed by 0.1, augmentation is strong from the first epoch on, rectangles are blanked.
"""

from __future__ import annotations

from typing import Any

from crosspatch.training.recipes import small

MICRO, MICRO_SIDES = "deit_micro_distilled_32", (16, 32)
MIDDLE_SIDE = 64
LARGE, LARGE_SIDE = "deit_tiny_distilled_patch16_224", 224
SMALL_PICTURES, MIDDLE_PICTURES = 40, 80  # median side up to
PATCH = 4

MEAN, STD = small.MEAN, small.STD
LONG_SIDES = small.LONG_SIDES
EPOCHS_MOST = small.EPOCHS_MOST
OPTIMISER = small.OPTIMISER
SCHEDULE = small.SCHEDULE
WEIGHT_DECAY = small.WEIGHT_DECAY
BETAS = small.BETAS
WARMUP, WARMUP_MOST = small.WARMUP, small.WARMUP_MOST
EMA_HALF_LIFE = small.EMA_HALF_LIFE
SMOOTHING = 0.1
CLIP = small.CLIP
REPEATS = 1
DECAY: tuple[str, ...] = ()
FREEZE, LAYER_DECAY, RANGE, WEIGHTS = 0.0, 1.0, None, "none"  # see finetune
REFUSES: tuple[str, ...] = ()
PENALTIES: tuple[float, ...] = ()  # of a probe
REASONS = ("The teacher sees the student's pictures, augmented and mixed as they are.",)

DROP_PATH = 0.05
MIX, MIX_PROB, MIX_ALPHA = ("mixup-batch", "cutmix-batch"), (0.5, 0.5), (0.8, 1.0)
AUGMENT: dict[str, Any] = {**small.AUGMENT, "erase": 0.25, "ops": 2}

batch_size = small.batch_size
epochs = small.epochs
peak_rate = small.peak_rate
last_rate = small.last_rate


def preset(side: int, pictures: int, gpu: bool) -> tuple[str, int]:
    """(entry point, model input side) for pictures of this median side."""
    del pictures, gpu
    if side > MIDDLE_PICTURES:
        return LARGE, LARGE_SIDE
    if side > SMALL_PICTURES:
        return MICRO, MIDDLE_SIDE
    least, most = MICRO_SIDES
    return MICRO, max(least, min(most, 2 * side) // PATCH * PATCH)


def by_length(epochs: float, side: int) -> dict[str, Any]:
    """drop_path, augment (fields of AugmentConfig) and mixing for inputs of this side; the length
    changes none of them."""
    del epochs
    crops = small.MILD if side < small.TINY_INPUT else small.FULL
    mixing = {"mix": MIX, "mix_prob": MIX_PROB, "mix_alpha": MIX_ALPHA}
    return {"drop_path": DROP_PATH, "augment": crops, **mixing}
