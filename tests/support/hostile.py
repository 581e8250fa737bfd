"""Pictures and would-be pictures that a real folder may hold, made in code.

`write_hostile_folder` writes class folders of ordinary pictures with `GOOD` and `BAD` files mixed
in. Each maker returns bytes, so any test can parametrise over them.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("discs", "rings", "stripes")
Maker = Callable[[], bytes]


def picture(kind: str, seed: int, size: tuple[int, int] = (40, 48)) -> Image.Image:
    """An ordinary RGB picture (height, width) whose class is easy to learn."""
    height, width = size
    rng = np.random.default_rng([seed, CLASSES.index(kind)])
    y, x = np.mgrid[:height, :width]
    middle_y, middle_x = rng.uniform(0.4, 0.6, 2) * (height, width)
    away = np.hypot(y - middle_y, x - middle_x) / min(height, width)
    shape = {
        "discs": away < 0.25,
        "rings": abs(away - 0.3) < 0.08,
        "stripes": (x + seed) // 6 % 2 == 0,
    }[kind]
    back, front = rng.integers(0, 90, 3), rng.integers(150, 256, 3)
    noise = rng.integers(-12, 13, (height, width, 1))
    return Image.fromarray(
        np.clip(np.where(shape[..., None], front, back) + noise, 0, 255).astype("u1")
    )


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    """The image as the bytes of a file."""
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def corners() -> Image.Image:
    """An upright picture whose four corners differ: red, green, blue, white, clockwise."""
    pixels = np.zeros((24, 32, 3), np.uint8)
    pixels[:12, :16], pixels[:12, 16:] = (255, 0, 0), (0, 255, 0)
    pixels[12:, 16:], pixels[12:, :16] = (0, 0, 255), (255, 255, 255)
    return Image.fromarray(pixels)


_STORED_AS = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def oriented(orientation: int, kind: str = "JPEG") -> bytes:
    """`corners()` stored turned, with the EXIF tag that turns it upright again."""
    turn = _STORED_AS[orientation]
    image = corners() if turn is None else corners().transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95, "subsampling": 0} if kind == "JPEG" else {}
    options |= {"lossless": True} if kind == "WEBP" else {}
    return saved(image, kind, exif=exif, **options)


def grey_ramp(mode: str) -> Image.Image:
    """64 levels from dark to bright: mode "I;16" over 16 bits, "I" the same, "F" from 0 to 1."""
    levels = np.tile(np.linspace(0, 65535, 64), (16, 1))
    if mode == "F":
        return Image.fromarray((levels / 65535).astype(np.float32))
    return Image.fromarray(levels.astype(np.uint16 if mode == "I;16" else np.int32))


def png_claiming(width: int, height: int) -> bytes:
    """A PNG header with any size, and no pixels to speak of."""
    body = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", body), (b"IDAT", zlib.compress(b"\0" * 64)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )


def jpeg_claiming(width: int, height: int) -> bytes:
    """A small JPEG whose header claims another size."""
    data = bytearray(_jpeg())
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def _jpeg(**options: object) -> bytes:
    return saved(picture("discs", 7, (96, 128)), "JPEG", quality=90, **options)


def _cut(data: bytes, share: float) -> bytes:
    return data[: int(len(data) * share)]


def _translucent(mode: str) -> bytes:
    image = picture("rings", 3).convert(mode)
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return saved(image, "PNG")


def _palette_with_hole() -> bytes:
    return saved(picture("rings", 4).quantize(16), "PNG", transparency=0)


def _animation(kind: str) -> bytes:
    first, *others = (picture("stripes", seed) for seed in range(3))
    return saved(first, kind, save_all=True, append_images=others)


def _damaged_header() -> bytes:
    data = bytearray(saved(picture("discs", 1), "PNG"))
    data[20] ^= 0xFF
    return bytes(data)


GOOD: dict[str, Maker] = {
    "grey16.png": lambda: saved(grey_ramp("I;16"), "PNG"),
    "int32.tif": lambda: saved(grey_ramp("I"), "TIFF"),
    "float.tif": lambda: saved(grey_ramp("F"), "TIFF"),
    "one_bit.png": lambda: saved(picture("discs", 2).convert("1"), "PNG"),
    "grey.jpg": lambda: saved(picture("discs", 2).convert("L"), "JPEG"),
    "cmyk.jpg": lambda: saved(picture("discs", 2).convert("CMYK"), "JPEG"),
    "grey_alpha.png": lambda: _translucent("L"),
    "alpha.png": lambda: _translucent("RGB"),
    "palette_hole.png": _palette_with_hole,
    "animated.gif": lambda: _animation("GIF"),
    "animated.webp": lambda: _animation("WEBP"),
    "phone.mpo.jpg": lambda: _animation("MPO"),
    "progressive.jpg": lambda: _jpeg(progressive=True),
    "trailing_junk.jpg": lambda: _jpeg() + b"junk" * 1000,
    "png_named.jpg": lambda: saved(picture("discs", 5), "PNG"),
    "no_ending": lambda: saved(picture("discs", 6), "BMP"),
    "1x1.png": lambda: saved(Image.new("RGB", (1, 1), "red"), "PNG"),
    "1x3000.png": lambda: saved(Image.new("RGB", (1, 3000), "red"), "PNG"),
    "3000x1.jpg": lambda: saved(Image.new("RGB", (3000, 1), "red"), "JPEG"),
    "garbage_exif.jpg": lambda: _jpeg(exif=b"Exif\0\0" + bytes(range(256)) * 200),
    **{f"exif{turn}.jpg": (lambda turn=turn: oriented(turn)) for turn in range(1, 9)},
}
"""File name -> maker of a picture that must be read."""

BAD: dict[str, tuple[Maker, str]] = {
    "zero.jpg": (lambda: b"", "empty"),
    "one_byte.png": (lambda: b"\x89", "not an image"),
    "page.jpg": (lambda: b"<!DOCTYPE html>\n<html><body>404</body></html>\n", "HTML"),
    "drawing.png": (lambda: b'<?xml version="1.0"?><svg xmlns="x"/>', "SVG"),
    "note.png": (lambda: b"this was a picture once\n", "text"),
    "noise.jpg": (lambda: np.random.default_rng(1).bytes(5000), "not an image"),
    "cut1.jpg": (lambda: _cut(_jpeg(), 0.01), ""),
    "cut50.jpg": (lambda: _cut(_jpeg(), 0.5), "cut short"),
    "cut99.jpg": (lambda: _cut(_jpeg(), 0.99), "cut short"),
    "cut.png": (lambda: _cut(saved(picture("rings", 1), "PNG"), 0.6), "cut short"),
    "cut.webp": (lambda: _cut(saved(picture("rings", 1), "WEBP"), 0.6), ""),
    "cut.bmp": (lambda: _cut(saved(picture("rings", 1), "BMP"), 0.6), "cut short"),
    "cut.gif": (lambda: _cut(_animation("GIF"), 0.2), ""),
    "cut.tif": (lambda: _cut(saved(picture("rings", 1), "TIFF"), 0.6), ""),
    "damaged.png": (_damaged_header, "broken"),
    "giant.png": (lambda: png_claiming(60000, 60000), "60000x60000"),
    "giant.jpg": (lambda: jpeg_claiming(65500, 65500), "65500x65500"),
    "flat.png": (lambda: png_claiming(0, 10), ""),
    "layers.png": (lambda: b"8BPS\0\1" + bytes(60), "PSD"),
    "print.jpg": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n", "EPS"),
    "paper.jpg": (lambda: b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", "PDF"),
    "phone.jpg": (lambda: b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
    "wave.tif": (lambda: b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
    "archive.jpg": (lambda: b"PK\x03\x04" + bytes(60), "zip"),
}
"""File name -> maker of a file that must be refused, and a part of the reason."""


def write_folder(root: Path, per_class: int = 12, size: tuple[int, int] = (40, 48)) -> list[Path]:
    """Class folders of ordinary JPEGs; returns the files."""
    files = []
    for kind in CLASSES:
        folder = root / kind
        folder.mkdir(parents=True, exist_ok=True)
        for seed in range(per_class):
            path = folder / f"{seed:04d}.jpg"
            path.write_bytes(saved(picture(kind, seed, size), "JPEG", quality=90))
            files.append(path)
    return files


def write_hostile_folder(root: Path, per_class: int = 12) -> tuple[list[Path], dict[Path, str]]:
    """Class folders with every GOOD and BAD file mixed in, and litter that is no class and no item.

    Returns the readable pictures, and the unreadable files with a part of the reason each gets.
    """
    good, bad = write_folder(root, per_class), {}
    for number, (name, make) in enumerate(GOOD.items()):
        good.append(root / CLASSES[number % len(CLASSES)] / name)
        good[-1].write_bytes(make())
    for number, (name, (make, reason)) in enumerate(BAD.items()):
        path = root / CLASSES[number % len(CLASSES)] / f"bad_{name}"
        path.write_bytes(make())
        bad[path] = reason
    for litter in (".ipynb_checkpoints", "__MACOSX"):
        (root / litter).mkdir()
        (root / litter / "x.jpg").write_bytes(_jpeg())
    (root / CLASSES[0] / "Thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0")
    (root / CLASSES[1] / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    return good, bad
