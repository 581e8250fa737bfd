"""Reads the golden files: what the authors' code computes on weights and inputs made by a formula.

A file holds no weights. Every entry of the reference's state dict is a formula of its name and
shape, every input one of its shape and seed (standard normal).
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

FOLDER = Path(__file__).parent.parent / "goldens"


class Golden(NamedTuple):
    meta: dict
    outputs: dict[str, torch.Tensor]

    @property
    def state_dict(self) -> dict[str, torch.Tensor]:
        return {name: weights(name, shape) for name, shape, _ in self.meta["layout"]}

    @property
    def images(self) -> torch.Tensor:
        shape = (self.meta["batch"], self.meta["channels"], *self.meta["size"])
        rng = np.random.RandomState(self.meta["seed"])
        return torch.from_numpy(rng.standard_normal(shape).astype("float32"))


def read(name: str) -> Golden:
    """The golden `slug/variant`."""
    with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as file:
        meta = json.loads(file["meta"].tobytes())
        outputs = {key: torch.from_numpy(file[key]) for key in file.files if key != "meta"}
    return Golden(meta, outputs)


def arrays(name: str) -> dict[str, np.ndarray]:
    """The golden `slug/variant` of numbers that belong to no model, without its notes."""
    with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as file:
        return {key: file[key] for key in file.files if key != "meta"}


def weights(name: str, shape: list[int]) -> torch.Tensor:
    """The value of a state dict entry: scaled by fan-in, near 1 for scales, small for tables."""
    rng = np.random.RandomState(zlib.crc32(name.encode()) & 0x7FFFFFFF)
    x = np.asarray(rng.standard_normal(tuple(shape)))
    leaf = name.rpartition(".")[2]
    if leaf == "running_var":
        x = np.abs(x) + 0.5
    elif leaf == "running_mean":
        x = x * 0.1
    elif x.ndim >= 2:
        fan_in = int(np.prod(shape[1:]))
        x = x * 0.2 if shape[0] == 1 else x / np.sqrt(max(1, fan_in))
    elif leaf == "bias":
        x = x * 0.1
    else:
        x = x * 0.1 + 1.0
    return torch.from_numpy(np.asarray(x, dtype="float32"))


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of the difference over that of the expected."""
    return float((got - expected).norm() / expected.norm())
