# SPDX-License-Identifier: Apache-2.0
"""Recipe `probe`: a linear classifier on the features of a network that stays as it is.

For: what the features of a trained network are worth on other pictures, and a first classifier for
a few hundred of them: `--weights` names a run folder, whose model, size and preprocessing are
taken, a file or a released checkpoint. Without it the features are those of a random network, the
baseline of every other figure.
Hardware: any. Time: on one core of an AMD EPYC the digits 2 s (crossvit_micro_32); the fit alone,
for 10,000 pictures with 192 features, 9 s.
Expect: with random features of crossvit_micro_32 96.3 % on the test split of the digits (93.3 to
98.0 with 95 % confidence), where `small` has 99 %.

Every picture goes through the network once, as in validation: nothing is drawn. On the features,
each brought to mean 0 and deviation 1, a logistic regression is fitted by L-BFGS for a few
penalties, and validation chooses among them. The fitted layer becomes the model's head.
"""

from __future__ import annotations

from typing import Any

from crosspatch.training.recipes import small

PENALTIES = (1.0, 0.1, 0.01, 1e-3, 1e-4, 1e-5)
"""Times half the squared norm of the weights, beside the mean cross-entropy."""
FREEZE, LAYER_DECAY, RANGE, WEIGHTS = 0.0, 1.0, None, "none"  # see finetune
REFUSES = (
    "epochs", "steps", "time", "lr", "compile", "repeats", "mix", "augment", "flip", "sam",
)  # fmt: skip
AUGMENT: dict[str, Any] = {"flip": False}

MEAN, STD = small.MEAN, small.STD
LONG_SIDES = small.LONG_SIDES
BATCH = 64
EPOCHS_MOST = 1

WEIGHT_DECAY = 0.0
DECAY: tuple[str, ...] = ()
BETAS = small.BETAS
EMA_HALF_LIFE = 0.0
SMOOTHING = 0.0
CLIP = 0.0
REPEATS = 1
OPTIMISER = "adamw-fused"
SCHEDULE = "cosine"
WARMUP, WARMUP_MOST = 0.0, 0
REASONS = (
    "Nothing is drawn: every picture goes through the network once, as in validation.",
    f"A logistic regression on its features for {len(PENALTIES)} penalties; validation chooses.",
)

preset = small.preset


def batch_size(pictures: int, gpu: bool) -> int:
    """Pictures that go through the network at once."""
    del gpu
    return min(BATCH, pictures)


def epochs(steps_per_epoch: int, gpu: bool) -> int:
    """Every picture is seen once."""
    del steps_per_epoch, gpu
    return EPOCHS_MOST


def peak_rate(batch: int) -> float:
    """The length of a full step of L-BFGS."""
    del batch
    return 1.0


def last_rate(peak: float) -> float:
    """The rate at the end of a run."""
    return peak


def by_length(epochs: float, side: int) -> dict[str, Any]:
    """drop_path, augment and mixing: none."""
    del epochs, side
    return {"drop_path": 0.0, "augment": {}, "mix": (), "mix_prob": (), "mix_alpha": ()}
