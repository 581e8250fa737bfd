# SPDX-License-Identifier: Apache-2.0
"""How a picture of any size becomes the model's input: one choice for train, eval and predict."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from crosspatch.errors import UsageError, near

FITS = ("crop", "pad", "squash")
"""crop: cover the frame, cut what hangs over; pad: fit inside, fill with the mean colour; squash:
stretch to the frame, proportions lost."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Pictures = TypeVar("Pictures")


@dataclass(frozen=True)
class Preprocess:
    """Everything between a decoded picture and the model, stored with the model.

    `size` (H, W) is the model's input in pixels. `store` (H', W') >= size is what `fit_image` makes
    and a buffer holds: where it is larger, training crops have freedom and `centre` takes the
    middle. `mean` and `std` are per channel, for values from 0 to 1. Raises UsageError on
    impossible values.
    """

    size: tuple[int, int]
    store: tuple[int, int]
    fit: str = "crop"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self) -> None:
        if self.fit not in FITS:
            raise UsageError(
                f"got fit {self.fit!r}",
                f"A picture is fitted by one of: {', '.join(FITS)}",
                f"Use --fit {near(self.fit, FITS, 1) or FITS[0]}",
            )
        if len(self.size) != 2 or min(self.size) < 1 or self._room() < (0, 0):
            raise UsageError(
                f"got size {self.size} and store {self.store}",
                "Both are (height, width) in pixels, and store is nowhere smaller than size",
                "Give a size of at least 1x1",
            )
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise UsageError(
                f"got mean {self.mean} and std {self.std}",
                "Each holds three numbers, those of std above 0",
                "Leave them out for the usual ones",
            )

    @classmethod
    def for_pictures(
        cls,
        size: int | tuple[int, int],
        fit: str = "crop",
        picture_side: int = 0,
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
    ) -> Preprocess:
        """The usual choice for pictures whose shorter side is about `picture_side` pixels.

        With fit=crop, pictures large enough are stored 8/7 larger than the input (256 for 224).
        """
        height, width = (size, size) if isinstance(size, int) else size
        larger = (round(height * 8 / 7), round(width * 8 / 7))
        roomy = fit == "crop" and picture_side >= max(larger)
        return cls((height, width), larger if roomy else (height, width), fit, mean, std)

    def fit_image(self, image: Image.Image) -> np.ndarray:
        """An RGB picture of any size as uint8 (H', W', 3): antialiased bicubic, one resize."""
        height, width = self.store
        if image.size == (width, height):
            return np.asarray(image)
        if self.fit == "pad":
            return np.asarray(self._padded(image))
        box = self._covering_box(image.size) if self.fit == "crop" else None
        return np.asarray(_resized(image, (width, height), box))

    def centre(self, pictures: Pictures) -> Pictures:
        """uint8 (B, H', W', 3), array or tensor -> its middle (B, H, W, 3), a view."""
        (height, width), (room_y, room_x) = self.size, self._room()
        top, left = room_y // 2, room_x // 2
        return pictures[:, top : top + height, left : left + width]  # type: ignore[index]

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and text, for JSON and TOML."""
        values = dataclasses.asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Preprocess:
        """The inverse of `to_dict`. Raises UsageError on unknown or missing entries."""
        names = [field.name for field in dataclasses.fields(cls)]
        if sorted(values) != sorted(names):
            raise UsageError(
                f"got preprocessing entries {sorted(values)}",
                f"The entries are {sorted(names)}",
                "Load a model that this version wrote",
            )
        plain: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in values.items()
        }
        return cls(**plain)

    def _room(self) -> tuple[int, int]:
        room = (self.store[0] - self.size[0], self.store[1] - self.size[1])
        return room if min(room) >= 0 else (-1, -1)

    def _covering_box(self, size: tuple[int, int]) -> tuple[float, float, float, float]:
        """The largest centred box with the proportions of `store`: (left, top, right, bottom)."""
        width, height = size
        scale = min(width / self.store[1], height / self.store[0])
        left = max(0.0, (width - self.store[1] * scale) / 2)
        top = max(0.0, (height - self.store[0] * scale) / 2)
        return left, top, width - left, height - top

    def _padded(self, image: Image.Image) -> Image.Image:
        height, width = self.store
        scale = min(width / image.width, height / image.height)
        inner = (
            min(width, max(1, round(image.width * scale))),
            min(height, max(1, round(image.height * scale))),
        )
        canvas = Image.new("RGB", (width, height), tuple(round(255 * m) for m in self.mean))
        canvas.paste(_resized(image, inner), ((width - inner[0]) // 2, (height - inner[1]) // 2))
        return canvas


def _resized(
    image: Image.Image,
    size: tuple[int, int],
    box: tuple[float, float, float, float] | None = None,
) -> Image.Image:
    return image.resize(size, Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)
