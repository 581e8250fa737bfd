# SPDX-License-Identifier: Apache-2.0
"""The only place where an image is opened: bytes in, an upright RGB picture out.

The format is decided by the first bytes, never by the name, and only six formats are read: JPEG (of
a phone's MPO its first frame), PNG, WebP, BMP, GIF and TIFF (first frame). Everything else is
refused by name before any parser sees it. The size is checked before a pixel is decoded. Truncated
files are refused. 16-bit, 32-bit and float pictures are scaled to 8 bits, never clipped.
Transparency is laid over white. The EXIF orientation is obeyed. This module does not import torch.
"""

from __future__ import annotations

import io
import os
import re
import stat
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeVar

import numpy as np
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from crosspatch.errors import DataError

T = TypeVar("T")

MAX_PIXELS = 200_000_000
MAX_BYTES = 1 << 29
"""No picture file larger than this (512 MB) is read."""

_READERS: dict[str, type[ImageFile.ImageFile]] = {
    "JPEG": JpegImagePlugin.JpegImageFile,
    "PNG": PngImagePlugin.PngImageFile,
    "WebP": WebPImagePlugin.WebPImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
}
FORMATS = tuple(_READERS)

_SIGNATURES: tuple[tuple[str, bytes], ...] = (
    ("JPEG", rb"\xff\xd8\xff"),
    ("PNG", rb"\x89PNG\r\n\x1a\n"),
    ("WebP", rb"RIFF....WEBP"),
    ("BMP", rb"BM"),
    ("GIF", rb"GIF8[79]a"),
    ("TIFF", rb"II\*\0|MM\0\*|II\+\0|MM\0\+"),
    ("HEIC", rb"....ftyp(hei[cxms]|hev[cxms]|mif1|msf1)"),
    ("AVIF", rb"....ftypavi[fs]"),
    ("a video", rb"....ftyp|\x1aE\xdf\xa3|RIFF....AVI "),
    ("JPEG 2000", rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51"),
    ("JPEG XL", rb"\xff\x0a|\0\0\0\x0cJXL "),
    ("PSD", rb"8BPS"),
    ("EPS", rb"%!PS|\xc5\xd0\xd3\xc6"),
    ("PDF", rb"%PDF"),
    ("FITS", rb"SIMPLE  ="),
    ("DDS", rb"DDS "),
    ("ICNS", rb"icns"),
    ("ICO", rb"\0\0\x01\0"),
    ("DICOM", rb".{128}DICM"),
    ("a NumPy array", rb"\x93NUMPY"),
    ("a zip archive", rb"PK[\x03\x05]\x04?"),
    ("a gzip archive", rb"\x1f\x8b"),
    ("SVG", rb"(?i)\s*(<\?xml[^>]*>\s*)?(<!doctype svg[^>]*>\s*)?<svg"),
    ("HTML", rb"(?i)\s*(<!--.*?-->\s*)?(<!doctype html|<html|<head|<body)"),
    ("text", rb"(\xef\xbb\xbf)?[\t\r\n\x20-\x7e]+\Z"),
)
_KNOWN = tuple((name, re.compile(pattern, re.DOTALL)) for name, pattern in _SIGNATURES)
_HEAD = 512
_STRIP = 1 << 22
"""Pixels; pictures beyond it that are no plain RGB are converted in strips of a quarter of it."""

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UnreadableImage(DataError):
    """A file that is no picture we read, or a broken one. `reason` says why in a few words."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(
            f"cannot read {name}: {reason}",
            f"A picture is a whole file of one of these formats: {', '.join(FORMATS)}",
            "Repair the file or take it out",
        )
        self.name, self.reason = name, reason

    def __reduce__(self) -> tuple:
        return type(self), (self.name, self.reason)


def decode(
    source: str | Path | bytes | BinaryIO,
    *,
    side: int | None = None,
    max_pixels: int = MAX_PIXELS,
    name: str | None = None,
) -> Image.Image:
    """Open one picture as an upright 8-bit RGB image.

    `side` (pixels) is a hint for JPEG: the decoder may halve the picture while it decodes, as long
    as both sides keep at least twice this length. `name` is what errors call a picture that comes
    as bytes. Raises UnreadableImage for anything that is not one whole picture of an allowed format
    with at most `max_pixels` pixels. No metadata of the file is kept.
    """
    name = name or _name_of(source)
    stream = _stream(source, name)
    try:
        image = _open_checked(stream, name, max_pixels)
        if side is not None and isinstance(image, JpegImagePlugin.JpegImageFile):
            image.draft(None, (2 * side, 2 * side))
        _parse(image.load, name)
        turn = _UPRIGHT.get(_orientation(image.info.get("exif")))
        picture = _parse(lambda: _to_rgb(image), name)
        picture.info = {}
        return picture if turn is None else picture.transpose(turn)
    finally:
        if isinstance(source, str | Path):
            stream.close()


def picture_size(
    source: str | Path | bytes | BinaryIO, *, max_pixels: int = MAX_PIXELS, name: str | None = None
) -> tuple[int, int]:
    """(height, width) in pixels of the upright picture, from its header alone.

    Raises UnreadableImage as `decode` does, except for faults that only decoding shows.
    """
    name = name or _name_of(source)
    stream = _stream(source, name)
    try:
        image = _open_checked(stream, name, max_pixels)
        width, height = image.size
        sideways = _orientation(image.info.get("exif")) >= 5
        return (width, height) if sideways else (height, width)
    finally:
        if isinstance(source, str | Path):
            stream.close()


class Header(NamedTuple):
    """What a file says of itself. format: one of FORMATS; mode: Pillow's name of its pixels; width,
    height: as stored, in pixels; orientation: 1 to 8 (EXIF), 1 upright; several: more than one
    frame; transparent: it has an alpha channel or a transparent colour; exif: the block, if any."""

    format: str
    mode: str
    width: int
    height: int
    orientation: int
    several: bool
    transparent: bool
    exif: bytes | None


def read_header(
    source: str | Path | bytes | BinaryIO, *, max_pixels: int = MAX_PIXELS, name: str | None = None
) -> Header:
    """What the header of a picture says; no pixel is decoded. Raises UnreadableImage as
    `picture_size` does."""
    name = name or _name_of(source)
    stream = _stream(source, name)
    try:
        image = _open_checked(stream, name, max_pixels)
        exif = image.info.get("exif")
        several = _parse(lambda: bool(getattr(image, "is_animated", False)), name)
        kind = next(kind for kind, reader in _READERS.items() if isinstance(image, reader))
        return Header(
            kind,
            image.mode,
            *image.size,
            _orientation(exif),
            several,
            _parse(lambda: bool(image.has_transparency_data), name),
            exif if isinstance(exif, bytes) else None,
        )
    finally:
        if isinstance(source, str | Path):
            stream.close()


def sniff(head: bytes) -> str | None:
    """The name of the format that a file's first bytes announce, or None when they are unknown."""
    return next((name for name, pattern in _KNOWN if pattern.match(head)), None)


def _name_of(source: object) -> str:
    if isinstance(source, str | Path):
        return str(source)
    return str(getattr(source, "name", "a picture given as bytes"))


def _stream(source: str | Path | bytes | BinaryIO, name: str) -> BinaryIO:
    if isinstance(source, str | Path):
        return _open_file(source, name)
    if isinstance(source, bytes):
        _refuse_giant(len(source), name)
        return io.BytesIO(source)
    if source.seekable():
        return source
    return _stream(source.read(MAX_BYTES + 1), name)


def _open_file(path: str | Path, name: str) -> BinaryIO:
    status = _ask(lambda: os.stat(path), name)
    if not stat.S_ISREG(status.st_mode):
        raise UnreadableImage(name, "not a regular file")
    _refuse_giant(status.st_size, name)
    return _ask(lambda: open(path, "rb"), name)


def _refuse_giant(length: int, name: str) -> None:
    if length > MAX_BYTES:
        raise UnreadableImage(name, f"larger than {MAX_BYTES >> 20} MB")


def _ask(step: Callable[[], T], name: str) -> T:
    """Run one step of the operating system; its refusal is told in its own words."""
    try:
        return step()
    except OSError as problem:
        raise UnreadableImage(name, (problem.strerror or str(problem)).lower()) from problem
    except ValueError as problem:
        raise UnreadableImage(name, "no valid file name") from problem


def _open_checked(stream: BinaryIO, name: str, max_pixels: int) -> ImageFile.ImageFile:
    """Read the header: format allowed, size within the limit. Nothing is decoded yet."""
    head = stream.read(_HEAD)
    stream.seek(-len(head), os.SEEK_CUR)
    if not head:
        raise UnreadableImage(name, "the file is empty")
    kind = sniff(head)
    if kind not in _READERS:
        raise UnreadableImage(name, "not an image" if kind is None else f"this is {kind}")
    image = _parse(lambda: _READERS[kind](stream), name)
    width, height = image.size
    if width < 1 or height < 1:
        raise UnreadableImage(name, f"its header claims {width}x{height} pixels")
    if width * height > max_pixels:
        raise UnreadableImage(
            name, f"its header claims {width}x{height} pixels, the limit is {max_pixels:,}"
        )
    return image


def _parse(step: Callable[[], T], name: str) -> T:
    """Run one step of Pillow on foreign bytes; whatever it raises there is the file's fault."""
    try:
        return step()
    except MemoryError as problem:
        raise UnreadableImage(name, "too large for the memory of this machine") from problem
    except Exception as problem:
        raise UnreadableImage(name, _reason(problem)) from problem


def _reason(problem: Exception) -> str:
    text = " ".join(str(problem).split())
    if "truncated" in text or "Truncated" in text or isinstance(problem, EOFError | struct.error):
        return "the file is cut short"
    if isinstance(problem, Image.DecompressionBombError):
        return "its header claims more pixels than the limit"
    return f"broken: {text[:120]}" if text else f"broken ({type(problem).__name__})"


def _orientation(exif: object) -> int:
    """The orientation (1 to 8) in an EXIF block, 1 where there is none or it makes no sense.

    One tag is needed, so it is looked up directly: no other metadata is parsed.
    """
    if not isinstance(exif, bytes):
        return 1
    block = exif.removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(block[:4])
    if order is None or len(block) < 10:
        return 1
    (start,) = struct.unpack_from(order + "I", block, 4)
    if start + 2 > len(block):
        return 1
    (count,) = struct.unpack_from(order + "H", block, start)
    for at in range(start + 2, min(start + 2 + 12 * count, len(block) - 11), 12):
        tag, _, _, value = struct.unpack_from(order + "HHIH", block, at)
        if tag == 0x0112:
            return value if 1 <= value <= 8 else 1
    return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB; of a large picture strip by strip, so that there is one copy of it at most."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    grey = image.mode in ("I", "F") or image.mode.startswith("I;")
    width, height = image.size
    if width * height <= _STRIP:
        return _strip_to_rgb(image, _scale([image]) if grey else None)
    boxes = [
        (0, top, width, min(height, top + _rows(width))) for top in range(0, height, _rows(width))
    ]
    scale = _scale(image.crop(box) for box in boxes) if grey else None
    picture = Image.new("RGB", image.size)
    for box in boxes:
        picture.paste(_strip_to_rgb(image.crop(box), scale), box)
    return picture


def _rows(width: int) -> int:
    return max(1, _STRIP // (4 * width))


def _strip_to_rgb(image: Image.Image, scale: tuple[float, float] | None) -> Image.Image:
    if scale is not None:
        return Image.fromarray(_to_8_bits(np.asarray(image), *scale)).convert("RGB")
    return _over_white(image) if image.has_transparency_data else image.convert("RGB")


def _over_white(image: Image.Image) -> Image.Image:
    picture = image.convert("RGBA")
    white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, picture).convert("RGB")


def _scale(strips: Iterable[Image.Image]) -> tuple[float, float]:
    """The grey values that become 0 and 255, so that none is clipped.

    Values from 0 up to 65535 keep their zero and are divided by the full scale of the fewest bits
    (8, 10, 12, 14, 16) that hold the brightest one, so a 12-bit radiograph in a 16-bit file is not
    black; floats up to 1 have full scale 1. Any other range is stretched from its least to its
    greatest value.
    """
    low, high, kind = np.inf, -np.inf, ""
    for strip in strips:
        pixels = np.asarray(strip)
        values, kind = _finite(pixels), pixels.dtype.kind
        low, high = min(low, float(values.min())), max(high, float(values.max()))
    if low >= 0 and high <= 65535:
        unit = kind == "f" and high <= 1
        return 0.0, 1.0 if unit else next(2.0**b - 1 for b in range(8, 17, 2) if high < 2**b)
    return low, high


def _finite(pixels: np.ndarray) -> np.ndarray:
    if pixels.dtype.kind != "f":
        return pixels
    return np.nan_to_num(pixels.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)


def _to_8_bits(pixels: np.ndarray, low: float, high: float) -> np.ndarray:
    """Grey values of any kind -> uint8, `low` to `high` stretched over 0 to 255."""
    if pixels.dtype == np.uint16:
        return _to_8_bits(np.arange(int(high) + 1), low, high)[pixels]
    values = _finite(pixels).astype(np.float64)
    return np.rint((values - low) * (255 / max(high - low, 1e-300))).astype(np.uint8)
