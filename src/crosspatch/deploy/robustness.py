# SPDX-License-Identifier: Apache-2.0
"""What worse pictures cost: the same pictures blurred, compressed, turned, cropped and darkened.

The changes are made to pictures of the size that the model sees, so that they mean the same for
photographs of any size. They are after Hendrycks and Dietterich (arXiv 1903.12261, section 4.1),
with one strength each that a phone in a pocket, a messenger or a dim room brings.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

from crosspatch.data.decode import decode
from crosspatch.deploy.predictor import BATCH, Predictor, decide
from crosspatch.metrics.interval import paired, wilson

QUALITY, ANGLE, KEPT, BRIGHTNESS = 30, 15, 0.8, 0.4
LEAST_BLUR, BLUR = 0.8, 1 / 75  # standard deviation in pixels: at least so much; of the side


def _blurred(image: Image.Image) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(max(LEAST_BLUR, BLUR * min(image.size))))


def _compressed(image: Image.Image) -> Image.Image:
    held = io.BytesIO()
    image.save(held, "JPEG", quality=QUALITY)
    return decode(held.getvalue())


def _turned(image: Image.Image) -> Image.Image:
    mean = tuple(int(value) for value in np.asarray(image).mean(axis=(0, 1)))
    return image.rotate(ANGLE, Image.Resampling.BICUBIC, fillcolor=mean)


def _cropped(image: Image.Image) -> Image.Image:
    width, height = image.size
    left, top = width * (1 - KEPT) / 2, height * (1 - KEPT) / 2
    box = (left, top, width - left, height - top)
    return image.resize(image.size, Image.Resampling.BICUBIC, box=box)


def _dark(image: Image.Image) -> Image.Image:
    return ImageEnhance.Brightness(image).enhance(BRIGHTNESS)


CHANGES: dict[str, tuple[str, Callable[[Image.Image], Image.Image]]] = {
    "blur": ("blurred", _blurred),
    "jpeg": (f"JPEG of quality {QUALITY}", _compressed),
    "rotation": (f"turned by {ANGLE}°", _turned),
    "crop": (f"the middle {100 * KEPT:.0f} % alone", _cropped),
    "dark": (f"dark ({100 * BRIGHTNESS:.0f} % of the light)", _dark),
}
"""Name of a change -> (in words, what it does to a picture)."""


def changed(pictures: np.ndarray, name: str) -> np.ndarray:
    """uint8 (N, H, W, 3) -> the same with one of `CHANGES`. Raises KeyError for another name."""
    change = CHANGES[name][1]
    return np.stack([np.asarray(change(Image.fromarray(one))) for one in pictures])


def robustness(
    predictor: Predictor,
    pictures: np.ndarray,
    labels: np.ndarray,
    *,
    names: Sequence[str] = tuple(CHANGES),
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """[{name, said, images, accuracy, low, high, change, change_low, change_high}]: as they are
    ("clean"), then with each change.

    pictures: uint8 (N, H, W, 3) of the model's size (`Predictor.pixels`), at least one; labels:
    (N,), or (N, K) of several labels, all of which must be right. change: points of accuracy
    against the same pictures clean, with the paired 95 % interval.
    """
    clean = _right(predictor, pictures, labels)
    found = [{"name": "clean", "said": "as they are", **_share(clean)}]
    for done, name in enumerate(names, 1):
        if progress is not None:
            progress(done * len(pictures), (len(names) + 1) * len(pictures))
        right = _right(predictor, changed(pictures, name), labels)
        gained, lost = int((right & ~clean).sum()), int((clean & ~right).sum())
        low, high = paired(gained, lost, len(right))
        told = {"change": (gained - lost) / len(right), "change_low": low, "change_high": high}
        found.append({"name": name, "said": CHANGES[name][0], **_share(right), **told})
    return found


def _right(predictor: Predictor, pictures: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """bool (N,): which pictures are named rightly."""
    size = BATCH.get(predictor.engine.setting.engine, 16)
    parts = [predictor.forward(pictures[i : i + size]) for i in range(0, len(pictures), size)]
    probs = np.concatenate(parts)
    if labels.ndim == 2:
        return (decide(probs, predictor.thresholds) == (labels > 0)).all(axis=1)
    return probs.argmax(axis=1) == labels


def _share(right: np.ndarray) -> dict[str, Any]:
    low, high = wilson(int(right.sum()), len(right))
    return {"images": len(right), "accuracy": float(right.mean()), "low": low, "high": high}
