# SPDX-License-Identifier: Apache-2.0
"""Batched augmentation on any device: one warp, one colour map, one erasing.

Every draw is a pure function of (seed, epoch, position): position p owns row p of a table whose
rows are blocks of Philox's counter, so any part of the table can be had without the rest, and
neither workers nor batches nor a resumed run can change it. Crop, flip, shift, rotation and shear
are one affine map, sampled once; brightness, contrast, saturation and the normalisation are one
affine map of the colours. The few numbers that steer them are worked out in NumPy, then sent to the
device at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from crosspatch.data.preprocess import Preprocess

_STREAM = 0x61756700 << 32  # keeps these draws apart from all others of the same seed
_DRAWS = 24  # per position; a multiple of 4, the numbers in one block of Philox
_OPS = ("shift", "rotate", "shear", "brightness", "contrast", "saturation")
_LUMA = np.array([0.299, 0.587, 0.114])


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """How strongly to augment. The defaults change nothing.

    `flip`: mirror half of the pictures. `crop_scale`: least and greatest part of the area that is
    kept; `ratio`: least and greatest width-to-height ratio of the part, relative to the picture's;
    `pad`: how far it may reach over each edge, as a part of the side.
    `shift`: greatest shift as a part of the side; `rotate`, `shear`: greatest angle in degrees.
    `brightness`, `contrast`, `saturation`: greatest relative change (0.4: factors 0.6 to 1.4).
    `erase`: probability that a rectangle is blanked. `ops`: how many of shift, rotate, shear,
    brightness, contrast and saturation (those that are not 0) act on one picture.
    """

    flip: bool = False
    crop_scale: tuple[float, float] = (1.0, 1.0)
    ratio: tuple[float, float] = (1.0, 1.0)
    pad: float = 0.0
    shift: float = 0.0
    rotate: float = 0.0
    shear: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    erase: float = 0.0
    ops: int = len(_OPS)

    @property
    def warps(self) -> bool:
        """Whether the geometry may change."""
        crops = (self.crop_scale, self.ratio) != ((1.0, 1.0), (1.0, 1.0))
        return crops or self.flip or any((self.pad, self.shift, self.rotate, self.shear))

    @property
    def recolours(self) -> bool:
        """Whether the colours may change."""
        return any((self.brightness, self.contrast, self.saturation))


class Steering(NamedTuple):
    """What happens to each picture of a batch, float32.

    `warp` (B, 2, 3): where an output point lies in the stored picture, both in [-1, 1]; `matrix`
    (B, 3, 3) and `bias` (B, 3, 1): from RGB in 0 to 255 to normalised colours; `blank` (B, 4):
    left, right, top, bottom of the blanked rectangle, parts of the sides.
    """

    warp: torch.Tensor
    matrix: torch.Tensor
    bias: torch.Tensor
    blank: torch.Tensor


def augment(
    images: torch.Tensor,
    positions: torch.Tensor,
    *,
    epoch: int,
    seed: int,
    config: AugmentConfig,
    preprocess: Preprocess,
    stream: int = 0,
) -> torch.Tensor:
    """uint8 (B, H', W', 3), positions (B,) int64 -> float32 (B, 3, H, W), normalised.

    With the neutral config this is `normalise`. stream: 0 to 255, a table of draws each.
    """
    table = draws(positions, seed=seed, epoch=epoch, stream=stream)
    steering = Steering(*(part.to(images.device) for part in steer(table, config, preprocess)))
    if config.warps:
        pictures = sample(_planar(images), steering.warp, preprocess.size)
    else:
        pictures = _planar(preprocess.centre(images))
    if config.recolours:
        flat = torch.baddbmm(steering.bias, steering.matrix, pictures.flatten(2))
        pictures = flat.view_as(pictures)
    else:
        pictures = _standardise(pictures, preprocess)
    return _blank(pictures, steering.blank) if config.erase else pictures


def placement(
    positions: torch.Tensor, *, epoch: int, seed: int, config: AugmentConfig, preprocess: Preprocess
) -> torch.Tensor:
    """(B, 2, 3) float32: where a point of each picture that `augment` gives lies in the stored one,
    both in [-1, 1], as (across, down, 1) -> (across, down)."""
    if config.warps:
        return steer(draws(positions, seed=seed, epoch=epoch), config, preprocess).warp
    (height, width), (tall, wide) = preprocess.size, preprocess.store
    left, top = (wide - width) // 2, (tall - height) // 2
    middle = torch.tensor(
        [
            [width / wide, 0, (2 * left + width) / wide - 1],
            [0, height / tall, (2 * top + height) / tall - 1],
        ]
    )
    return middle.expand(len(positions), -1, -1)


def normalise(images: torch.Tensor, preprocess: Preprocess) -> torch.Tensor:
    """uint8 (B, H', W', 3) -> its centre, normalised: float32 (B, 3, H, W). No draw is made."""
    return _standardise(_planar(preprocess.centre(images)), preprocess)


def shrunk(images: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """float (B, 3, H, W) -> (B, 3, *size), smaller: bicubic, antialiased as decoded pictures
    are."""
    return F.interpolate(images, size, mode="bicubic", align_corners=False, antialias=True)


def draws(positions: torch.Tensor, *, seed: int, epoch: int, stream: int = 0) -> np.ndarray:
    """Rows `positions` (B,) of the table of (seed, epoch, stream): (B, 24), uniform in [0, 1)."""
    if not len(positions):
        return np.empty((0, _DRAWS))
    rows = positions.cpu().numpy()
    first = int(rows.min())
    key = np.array([seed, _STREAM + (stream << 32) | epoch], dtype=np.uint64)
    philox = np.random.Philox(key=key, counter=first * (_DRAWS // 4))
    table = np.random.Generator(philox).random((int(rows.max()) + 1 - first, _DRAWS))
    return table[rows - first]


def steer(table: np.ndarray, config: AugmentConfig, preprocess: Preprocess) -> Steering:
    """Turn draws (B, 24) into what happens to each picture; the columns are shared out here."""
    amounts = _amounts(table[:, 0:6], table[:, 6:14], config)
    parts = (
        _warp(table[:, 14:19], amounts, config, preprocess.store),
        *_colours(amounts, preprocess),
        _rectangle(table[:, 19:24], config.erase),
    )
    return Steering(*(torch.from_numpy(part.astype(np.float32)) for part in parts))


def _amounts(
    order: np.ndarray, strength: np.ndarray, config: AugmentConfig
) -> dict[str, np.ndarray]:
    """How much of each op every picture gets, in the config's units, signed: (B,), and (B, 2) for
    shift and shear. Of the ops in use, `config.ops` drawn ones act; the others stay 0."""
    greatest = np.array([getattr(config, name) for name in _OPS])
    rank = (order + 2 * (greatest == 0)).argsort(1).argsort(1)
    acts = (rank < config.ops) * greatest
    signed = 2 * strength - 1
    amounts = {name: acts[:, at] * signed[:, at] for at, name in enumerate(_OPS)}
    amounts["shift"] = acts[:, [0, 0]] * signed[:, [0, 6]]
    amounts["shear"] = acts[:, [2, 2]] * signed[:, [2, 7]]
    return amounts


def _warp(
    draw: np.ndarray,
    amounts: dict[str, np.ndarray],
    config: AugmentConfig,
    store: tuple[int, int],
) -> np.ndarray:
    """(B, 2, 3); `draw` (B, 5): area, proportion, place across, place down, mirror."""
    area = _between(config.crop_scale, draw[:, 0])
    ratio = np.exp(_between(np.log(config.ratio), draw[:, 1]))
    part = np.sqrt(np.stack([area * ratio, area / ratio], 1)).clip(max=1)  # of width and height
    centre = (2 * draw[:, 2:4] - 1) * (1 - part + 2 * config.pad) + 2 * amounts["shift"]
    sides = np.array([store[1], store[0]])  # turning is done where pixels are square
    linear = _turn(np.deg2rad(amounts["rotate"]), np.deg2rad(amounts["shear"]))
    linear = linear * (part * sides)[:, None, :] / sides[:, None]
    if config.flip:
        linear[:, :, 0] *= np.where(draw[:, 4:5] < 0.5, -1, 1)
    return np.concatenate([linear, centre[:, :, None]], 2)


def _turn(angle: np.ndarray, shear: np.ndarray) -> np.ndarray:
    """Rotation (B,) after shear (B, 2), both in radians -> (B, 2, 2)."""
    cos, sin, lean = np.cos(angle), np.sin(angle), np.tan(shear)
    one = np.ones_like(cos)
    rotation = np.stack([cos, -sin, sin, cos], 1).reshape(-1, 2, 2)
    return rotation @ np.stack([one, lean[:, 0], lean[:, 1], one], 1).reshape(-1, 2, 2)


def _colours(
    amounts: dict[str, np.ndarray], preprocess: Preprocess
) -> tuple[np.ndarray, np.ndarray]:
    """(B, 3, 3) and (B, 3, 1). Saturation is about each pixel's grey, contrast about the grey of
    the mean colour, brightness multiplies; the normalisation is folded in."""
    mean, std = np.array(preprocess.mean), np.array(preprocess.std)
    gain = (1 + amounts["brightness"]) * (1 + amounts["contrast"])
    lift = -(1 + amounts["brightness"]) * amounts["contrast"] * (mean @ _LUMA)
    saturation = amounts["saturation"][:, None, None]
    mix = np.eye(3) * (1 + saturation) - saturation * _LUMA
    matrix = gain[:, None, None] * mix / (255 * std[:, None])
    return matrix, ((lift[:, None] - mean) / std)[:, :, None]


def _rectangle(draw: np.ndarray, probability: float) -> np.ndarray:
    """(B, 4): a rectangle of 2 to 33 % of the area with sides 1:3 to 3:1, or an empty one.

    `draw` (B, 5): whether, area, proportion, place across, place down.
    """
    area = _between((0.02, 0.33), draw[:, 1]) * (draw[:, 0] < probability)
    proportion = np.exp(_between(np.log([1 / 3, 3]), draw[:, 2]))
    part = np.sqrt(np.stack([area * proportion, area / proportion], 1)).clip(max=1)
    start = draw[:, 3:5] * (1 - part)
    return np.stack([start, start + part], 2).reshape(-1, 4)


def _between(ends: tuple[float, float] | np.ndarray | list[float], draw: np.ndarray) -> np.ndarray:
    return ends[0] + (ends[1] - ends[0]) * draw


def _planar(images: torch.Tensor) -> torch.Tensor:
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W), values unchanged."""
    return images.permute(0, 3, 1, 2).contiguous().float()


def sample(pictures: torch.Tensor, warp: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """pictures (B, C, H', W') through `warp` (B, 2, 3) to (B, C, H, W): bilinear, mirrored at the
    edges. The map is affine, so its grid is one outer sum."""
    height, width = (_midpoints(side, pictures.device) for side in size)
    across = warp[:, :, 0:1] * (2 * width - 1) + warp[:, :, 2:]
    down = warp[:, :, 1:2] * (2 * height - 1)
    grid = (across[:, :, None, :] + down[:, :, :, None]).permute(0, 2, 3, 1)
    return F.grid_sample(pictures, grid, "bilinear", "reflection", align_corners=False)


def _midpoints(side: int, device: torch.device) -> torch.Tensor:
    """The middles of `side` pixels on the line from 0 to 1."""
    return (torch.arange(side, device=device) + 0.5) / side


def _standardise(pictures: torch.Tensor, preprocess: Preprocess) -> torch.Tensor:
    mean, std = (
        255 * pictures.new_tensor(v)[:, None, None] for v in (preprocess.mean, preprocess.std)
    )
    return pictures.sub_(mean).div_(std)


def _blank(pictures: torch.Tensor, blank: torch.Tensor) -> torch.Tensor:
    """Fill each picture's rectangle with the mean colour, which is 0 once normalised."""
    left, right, top, bottom = blank[:, :, None].unbind(1)
    across, down = (_midpoints(side, pictures.device) for side in pictures.shape[:1:-1])
    inside_x = ((across >= left) & (across < right)).float()
    inside_y = ((down >= top) & (down < bottom)).float()
    keep = 1 - inside_y[:, :, None] * inside_x[:, None, :]
    return pictures.mul_(keep[:, None])
