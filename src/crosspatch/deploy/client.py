# SPDX-License-Identifier: Apache-2.0
"""Names the classes of pictures with a crosspatch bundle. Needs numpy, onnxruntime and Pillow only.

    python client.py bundle.onnx cat.jpg dog.png

or, in a program: `Client("bundle.onnx").predict("cat.jpg")` gives (class, probability) pairs, most
probable first; `.labels("cat.jpg")` those that the picture has: one, or of a bundle with several
labels to a picture any number. How a picture becomes pixels decides the answer as much as the
network does, so it is done here as in training, step by step; the bundle's metadata hold the
numbers. Copy it freely.
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image

FORMATS = ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"]
T = Image.Transpose
UPRIGHT = dict(enumerate([
    T.FLIP_LEFT_RIGHT, T.ROTATE_180, T.FLIP_TOP_BOTTOM, T.TRANSPOSE, T.ROTATE_270, T.TRANSVERSE,
    T.ROTATE_90,
], start=2))  # fmt: skip


class Client:
    """A bundle in ONNX Runtime. classes: names in the order of the probabilities; thresholds: of
    each class, where a picture may have several, else empty."""

    def __init__(self, bundle):
        self.session = onnxruntime.InferenceSession(bundle, providers=["CPUExecutionProvider"])
        info = json.loads(self.session.get_modelmeta().custom_metadata_map["crosspatch"])
        if info["schema"] > 2:
            raise ValueError(f"this client reads schema 1 and 2, the bundle has {info['schema']}")
        self.classes, self.how = info["classes"], info["preprocess"]
        self.thresholds = dict(zip(self.classes, info.get("thresholds", ()), strict=False))

    def labels(self, picture):
        """A path or an open file -> [(class, probability), ...] of the classes that it has."""
        ranked = self.predict(picture, top=len(self.classes))
        if not self.thresholds:
            return ranked[:1]
        return [(name, p) for name, p in ranked if p >= self.thresholds[name]]

    def predict(self, picture, top=5):
        """A path or an open file -> [(class, probability), ...], most probable first."""
        pixels = self.pixels(picture)[np.newaxis]
        (probabilities,) = self.session.run(["probabilities"], {"image": pixels})
        best = (-probabilities[0]).argsort(kind="stable")[:top]
        return [(self.classes[i], float(probabilities[0][i])) for i in best]

    def pixels(self, picture):
        """What the network sees: uint8 (H, W, 3)."""
        (height, width), (tall, wide) = self.how["size"], self.how["store"]
        with Image.open(picture, formats=FORMATS) as image:
            stored = self.fit(upright_rgb(image, max(tall, wide)), wide, tall)
        top, left = (tall - height) // 2, (wide - width) // 2
        return np.asarray(stored)[top : top + height, left : left + width]

    def fit(self, image, wide, tall):
        """The picture in a frame of wide x tall pixels, cropped, padded or squashed as trained."""
        if image.size == (wide, tall):
            return image
        if self.how["fit"] == "squash":
            return resize(image, (wide, tall))
        across, down = image.width / wide, image.height / tall
        if self.how["fit"] == "crop":  # cover the frame, leave out what hangs over
            scale = min(across, down)
            left = max(0.0, (image.width - wide * scale) / 2)
            top = max(0.0, (image.height - tall * scale) / 2)
            return resize(image, (wide, tall), (left, top, image.width - left, image.height - top))
        scale = min(wide / image.width, tall / image.height)
        sides = [(wide, image.width), (tall, image.height)]
        inner = tuple(min(side, max(1, round(given * scale))) for side, given in sides)
        canvas = Image.new("RGB", (wide, tall), tuple(round(255 * m) for m in self.how["mean"]))
        canvas.paste(resize(image, inner), ((wide - inner[0]) // 2, (tall - inner[1]) // 2))
        return canvas


def resize(image, size, box=None):
    """Antialiased bicubic; large pictures are reduced by a whole number first."""
    return image.resize(size, Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)


def upright_rgb(image, side):
    """8-bit RGB, turned as its EXIF entry says; JPEG may be decoded at half size, never below."""
    image.draft(None, (2 * side, 2 * side))
    image.load()
    exif = Image.Exif()
    exif.load(image.info.get("exif", b""))
    turn = UPRIGHT.get(exif.get(0x0112, 1))
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        image = Image.fromarray(eight_bits(np.asarray(image))).convert("RGB")
    elif image.has_transparency_data:
        picture = image.convert("RGBA")
        white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, picture).convert("RGB")
    else:
        image = image.convert("RGB")
    return image if turn is None else image.transpose(turn)


def eight_bits(pixels):
    """16-bit, 32-bit and float grey, scaled to uint8 by the full scale that holds the brightest."""
    values = np.nan_to_num(pixels.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    low, high = float(values.min()), float(values.max())
    if low >= 0 and high <= 65535:
        unit = pixels.dtype.kind == "f" and high <= 1
        low, high = 0.0, 1.0 if unit else next(2.0**b - 1 for b in range(8, 17, 2) if high < 2**b)
    return np.rint((values - low) * (255 / max(high - low, 1e-300))).astype(np.uint8)


if __name__ == "__main__":
    client = Client(sys.argv[1])
    for name in sys.argv[2:]:
        said = ", ".join(f"{label} {p:.4f}" for label, p in client.labels(name))
        print(f"{name}: {said or 'none'}")
