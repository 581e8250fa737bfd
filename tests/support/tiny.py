"""A tiny source of pictures in memory, a tiny model, and a recipe of seconds."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from crosspatch.data.augment import AugmentConfig
from crosspatch.data.sources import Item, Source
from crosspatch.training.recipe import Recipe


class Stripes(Source):
    """Noisy 8x8 pictures of `classes` kinds, told apart by the row that is bright."""

    def __init__(self, per_class: int = 24, classes: int = 3, noise: int = 60) -> None:
        self.name, self.skipped = "stripes", []
        self.classes = tuple(f"row{c}" for c in range(classes))
        labels = np.repeat(np.arange(classes), per_class)
        self.items = tuple(
            Item(f"{self.classes[label]}/{place:03d}.png", int(label), None)
            for place, label in enumerate(labels)
        )
        rng = np.random.default_rng(0)
        self._pictures = rng.integers(0, noise, (len(labels), 8, 8, 3)).astype(np.uint8)
        for picture, label in zip(self._pictures, labels, strict=True):
            picture[2 * label + 1] += 150

    def read(self, index: int) -> np.ndarray:
        return self._pictures[index]

    def _sizes(self) -> list[int]:
        return [int(picture.sum()) for picture in self._pictures]


class TinyNet(nn.Module):
    """A stand-in with what real models have: dropout, a normalisation with buffers, a token."""

    def __init__(self, num_classes: int, img_size: tuple[int, int], **_: float) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 2, 2)
        self.norm = nn.BatchNorm2d(8)
        self.token = nn.Parameter(torch.zeros(1, 1, 8))
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(8 * (img_size[0] // 2) * (img_size[1] // 2), num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.stem(x))) + self.token.view(1, 8, 1, 1)
        return self.head(self.drop(x.flatten(1)))

    def no_weight_decay(self) -> set[str]:
        return {"token"}


def tiny_recipe(**changed) -> Recipe:
    settings = {
        "name": "small", "model": "tiny", "size": (8, 8), "store": (8, 8), "fit": "crop",
        "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25), "batch": 8, "steps": 30,
        "steps_per_epoch": 7, "lr": 5e-3, "min_lr": 1e-5, "weight_decay": 0.05,
        "betas": (0.9, 0.99), "warmup": 3, "ema": 0.05, "smoothing": 0.1, "drop_path": 0.0,
        "clip": 1.0, "mix": ("mixup", "cutmix"), "mix_prob": (0.2, 0.2), "mix_alpha": (0.4, 1.0),
        "augment": AugmentConfig(flip=True, crop_scale=(0.8, 1.0), brightness=0.2, ops=1),
    }  # fmt: skip
    return Recipe(**{**settings, **changed})
