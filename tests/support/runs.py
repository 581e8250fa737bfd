"""The model of a run without its training: a micro ViT with drawn weights that is decided."""

from __future__ import annotations

from pathlib import Path

import torch

from crosspatch.data.augment import AugmentConfig
from crosspatch.training.package import build_model, model_config, save_calibration, save_model
from crosspatch.training.recipe import Recipe

CLASSES = ("ash", "beech", "cedar", "date")


def write_run(folder: Path, *, seed: int = 0, **changed) -> Path:
    """`folder`/model with a vit_micro_32 of four classes, calibrated with 1.25 on 40 pictures."""
    settings = {
        "name": "small", "model": "vit_micro_32", "size": (32, 32), "store": (36, 40),
        "fit": "crop", "mean": (0.5, 0.4, 0.3), "std": (0.25, 0.2, 0.3), "batch": 8, "steps": 30,
        "steps_per_epoch": 7, "lr": 5e-3, "min_lr": 1e-5, "weight_decay": 0.05,
        "betas": (0.9, 0.99), "warmup": 3, "ema": 0.05, "smoothing": 0.1, "drop_path": 0.0,
        "clip": 1.0, "mix": (), "mix_prob": (), "mix_alpha": (), "augment": AugmentConfig(),
        "seed": seed,
    }  # fmt: skip
    recipe = Recipe(**{**settings, **changed})
    module = build_model(recipe, len(CLASSES), training=False)
    with torch.no_grad():
        module.head.weight.mul_(100)
    (folder / "model").mkdir(parents=True)
    save_model(folder / "model", module, model_config(recipe, CLASSES))
    save_calibration(folder / "model", 1.25, 40)
    return folder
