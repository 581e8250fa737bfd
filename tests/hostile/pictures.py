"""Hostile inputs 1 to 29: would-be pictures, made in code, each with its right status.

What decides: a body of no bytes is an error of the request (400); one that does not begin like a
format that is read is an unsupported medium (415); everything else that cannot be read is content
that makes no sense (422), and so are too many pixels. What can be read is answered as `crosspatch
predict` answers it (200). A server reads JPEG, PNG, WebP and BMP unless it is told otherwise. Two
statuses stand only where the promise of little memory may win over the promise to read what is
inside the limits of size, or where a library may be built in two ways.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator

import numpy as np
from PIL import Image

from hostile import made
from hostile.case import Picture
from support.hostile import (
    grey_ramp,
    jpeg_claiming,
    oriented,
    picture,
    png_claiming,
    saved,
)

FORMAT = "formats that are not read are refused by name"
PIXELS = "40 million pixels and 12,000 a side at most, told before a pixel is decoded"
UNKNOWN = "bytes that begin like no format that is read"
BROKEN = "content that cannot be read"
READ = "a whole picture of a format that is read"
HEAVY = "inside the limits of size, but the limit of memory or time may refuse it"


def _good(name: str, image: Image.Image, kind: str = "PNG", item: int = 25, **how) -> Picture:
    return Picture(item, name, lambda: saved(image, kind, **how), (200,), READ)


def _png(image: Image.Image | None = None) -> bytes:
    return saved(image or picture("rings", 1), "PNG")


def _flipped(place: bytes) -> bytes:
    """A PNG with a wrong checksum of its chunk `place`."""
    data = bytearray(_png())
    at = data.index(place)
    (length,) = struct.unpack_from(">I", data, at - 4)
    data[at + 4 + length] ^= 0xFF
    return bytes(data)


def _translucent(mode: str) -> Image.Image:
    image = picture("rings", 3).convert(mode)
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


def _heavy(kind: str, size: tuple[int, int] = (7000, 5714), **how: object) -> bytes:
    """A real picture of just under 40 million pixels, with content that costs its decoder work."""
    tile = np.asarray(picture("rings", 1, (357, 500)))
    rows, columns = -(-size[1] // 357), -(-size[0] // 500)
    image = Image.fromarray(np.tile(tile, (rows, columns, 1))[: size[1], : size[0]])
    stream = io.BytesIO()
    image.save(stream, kind, **how)
    return stream.getvalue()


def _animation(kind: str, frames: int = 3) -> bytes:
    first, *others = (picture("stripes", seed) for seed in range(frames))
    return saved(first, kind, save_all=True, append_images=others, lossless=True)


def _nonsense() -> Iterator[Picture]:
    yield Picture(1, "zero bytes", lambda: b"", (400,), "a request without a body")
    yield Picture(2, "one byte", lambda: b"\x89", (415,), UNKNOWN)
    yield Picture(2, "two bytes of a JPEG", lambda: b"\xff\xd8", (415,), UNKNOWN)
    yield Picture(3, "noise", lambda: np.random.default_rng(3).bytes(1 << 20), (415,), UNKNOWN)
    page = b"<!DOCTYPE html>\n<html><body>404</body></html>\n"
    yield Picture(4, "a page named jpg", lambda: page, (415,), FORMAT, "HTML")
    for share in (1, 50, 99):
        cut = lambda share=share: made.jpeg()[: len(made.jpeg()) * share // 100]
        yield Picture(5, f"cut at {share} percent", cut, (422,), BROKEN)
    junk = np.random.default_rng(6).bytes(1 << 20)
    yield Picture(6, "junk behind it", lambda: made.jpeg() + junk, (200,), READ)


def _pngs() -> Iterator[Picture]:
    yield Picture(7, "png 60000", lambda: png_claiming(60000, 60000), (422,), PIXELS, "60,?000")
    yield Picture(8, "png 13500", lambda: made.black_png(13500, 13500), (422,), PIXELS, "13,?500")
    yield Picture(9, "png 100 Mpx", lambda: made.black_png(10000, 10000), (422,), PIXELS, "10,?000")
    yield Picture(9, "png 12001 wide", lambda: made.black_png(12001, 2), (422,), PIXELS, "12,?001")
    yield Picture(9, "png 12000 wide", lambda: made.black_png(12000, 2), (200,), READ)
    yield Picture(9, "png 40 Mpx", lambda: made.black_png(7000, 5714), (200,), READ)
    yield Picture(9, "png 40 Mpx photo", lambda: _heavy("PNG", compress_level=1), (200,), READ)
    for name, bits, colour in (("rgba", 8, 6), ("16 bit grey", 16, 0), ("16 bit rgba", 16, 6),
                               ("palette", 8, 3), ("grey and alpha", 8, 4)):  # fmt: skip
        big = lambda bits=bits, colour=colour: made.black_png(7000, 5714, bits, colour)
        yield Picture(9, f"png 40 Mpx {name}", big, (200, 422), HEAVY)
    yield Picture(10, "png width 0", lambda: png_claiming(0, 10), (422,), BROKEN)
    yield Picture(10, "png height 0", lambda: png_claiming(10, 0), (422,), BROKEN)
    long = made.text(50 << 20)
    small = made.black_png(64, 64)
    yield Picture(11, "zTXt 50 MB", lambda: made.with_chunks(small, long), (422,), BROKEN)
    yield Picture(
        11, "zTXt 50 MB last", lambda: made.with_chunks(small, long, last=True), (422,), BROKEN
    )
    many = [made.text(900_000)] * 80
    yield Picture(11, "zTXt 80 x 900 kB", lambda: made.with_chunks(small, *many), (422,), BROKEN)
    profile = made.chunk(b"iCCP", b"x\0\0" + made.zeros(50 << 20))
    yield Picture(
        11, "iCCP 50 MB", lambda: made.with_chunks(small, profile), (200, 422),
        "a profile is not used, so one that is too long may be passed over or refused",
    )  # fmt: skip
    yield Picture(12, "png header crc", lambda: _flipped(b"IHDR"), (422,), BROKEN)
    yield Picture(
        12, "png pixels crc", lambda: _flipped(b"IDAT"), (200, 422),
        "pixels carry a checksum of their own inside: a reader may stop at either",
    )  # fmt: skip
    short = made.PNG + made.header(500, 500) + made.chunk(b"IDAT", zlib.compress(bytes(900)))
    yield Picture(
        12, "png too few pixels", lambda: short + made.chunk(b"IEND", b""), (422,), BROKEN
    )


def _films() -> Iterator[Picture]:
    yield Picture(13, "gif 10000 frames", lambda: made.gif(10000), (415,), FORMAT, "GIF")
    yield Picture(14, "animated webp", lambda: _animation("WEBP"), (200,), READ)
    yield Picture(15, "webp 16383", lambda: made.webp_canvas(16383, 16383), (422,), BROKEN)
    yield Picture(15, "webp 2 to 24", lambda: made.webp_canvas(1 << 24, 1 << 24), (422,), BROKEN)
    yield Picture(15, "webp 39 Mpx", lambda: made.webp_canvas(11999, 3300), (200, 422), HEAVY)
    yield Picture(
        15, "webp 40 Mpx photo", lambda: _heavy("WEBP", quality=30, method=0), (200, 422), HEAVY
    )
    yield Picture(15, "webp lies", lambda: made.webp_canvas(100, 100, False), (422,), BROKEN)
    yield Picture(15, "bmp 60000", lambda: made.bmp_claiming(60000, 60000), (422,), PIXELS)
    yield Picture(15, "bmp negative", lambda: made.bmp_claiming(-5, 10), (422,), BROKEN)
    yield Picture(15, "bmp rle", lambda: made.bmp_claiming(5000, 5000, 8, 1), (422,), BROKEN)
    yield Picture(15, "bmp no rows", lambda: made.bmp_claiming(5000, 5000), (422,), BROKEN)


HEADERS = {
    "TIFF": lambda: made.strip_tiff(64, 64, following=8),
    "PSD": lambda: (
        b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 2**31, 2**31, 8, 3) + bytes(40)
    ),
    "EPS": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) run\n",
    "PDF": lambda: b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj<</Prev 9>>endobj\n",
    "FITS": lambda: (
        b"SIMPLE  =                    T".ljust(80) + b"XTENSION= 'BINTABLE'".ljust(2800)
    ),
    "JPEG 2000": made.jpeg_2000,
    "DDS": lambda: b"DDS " + struct.pack("<III", 124, 0x1007, 2**31) + bytes(112),
    "ICNS": lambda: b"icns" + struct.pack(">I4sI", 2**31, b"ic10", 2**31) + bytes(64),
    "SVG": lambda: b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg" width="9"/>',
    "HEIC": lambda: b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64),
}
"""Formats that must never be opened, by the name that the refusal gives them."""


def _foreign() -> Iterator[Picture]:
    yield Picture(16, "tiff directory loop", HEADERS["TIFF"], (415,), FORMAT, "TIFF")
    strip = made.strip_tiff(40000, 40000)
    yield Picture(17, "tiff strip of 40000", lambda: strip, (415,), FORMAT, "TIFF")
    for name in ("PSD", "EPS", "PDF", "FITS", "JPEG 2000", "DDS", "ICNS"):
        yield Picture(18, name, HEADERS[name], (415,), FORMAT, name)
    yield Picture(19, "svg", HEADERS["SVG"], (415,), FORMAT, "SVG")
    yield Picture(20, "heic", HEADERS["HEIC"], (415,), FORMAT, "HEIC")


def _small() -> Iterator[Picture]:
    for width, height in ((1, 1), (1, 5000), (5000, 1), (2, 2)):
        image = Image.new("RGB", (width, height), (180, 40, 90))
        for kind in ("PNG", "JPEG", "WEBP", "BMP"):
            yield _good(f"{width}x{height} {kind}", image, kind, item=21)
    for turn in range(1, 9):
        yield Picture(22, f"turned {turn}", lambda turn=turn: oriented(turn), (200,), READ)
    garbage = b"Exif\0\0" + bytes(range(256)) * 255
    yield Picture(23, "exif garbage", lambda: made.jpeg(exif=garbage), (200,), READ)
    looped = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<HHHII", 1, 0x8769, 4, 1, 8) + bytes(4)
    yield Picture(23, "exif directory loop", lambda: made.jpeg(exif=looped), (200,), READ)
    half = b"\0\0\x10\0lcms" + bytes(30)
    yield Picture(24, "icc cut", lambda: made.jpeg(icc_profile=half), (200,), READ)
    yield Picture(24, "icc cut png", lambda: saved(picture("discs", 1), "PNG", icc_profile=half),
                  (200,), READ)  # fmt: skip


def _modes() -> Iterator[Picture]:
    yield _good("I;16", grey_ramp("I;16"))
    for mode in ("I", "F"):
        make = lambda mode=mode: saved(grey_ramp(mode), "TIFF")
        yield Picture(25, mode, make, (415,), FORMAT, "TIFF")
    yield _good("1", picture("discs", 2).convert("1"))
    yield _good("LA", _translucent("L"))
    yield _good("RGBA", _translucent("RGB"))
    yield _good("P and transparency", picture("rings", 4).quantize(16), transparency=0)
    yield _good("CMYK", picture("discs", 2).convert("CMYK"), "JPEG")
    yield Picture(25, "YCCK", made.ycck, (200,), READ)
    yield Picture(26, "progressive", lambda: made.jpeg(progressive=True), (200,), READ)
    yield Picture(
        26, "arithmetic", made.arithmetic, (200, 422), "libjpeg is built with it or without"
    )
    yield Picture(26, "12 bit", made.twelve_bit, (422,), BROKEN)
    yield Picture(26, "progressive 40 Mpx", lambda: _heavy("JPEG", progressive=True, quality=40),
                  (200, 422), HEAVY)  # fmt: skip
    yield Picture(26, "baseline 40 Mpx", lambda: _heavy("JPEG", quality=40), (200,), READ)
    yield Picture(26, "10000 scans", lambda: made.many_scans(6320, 10000), (422,),
                  "a picture that takes longer than a decoder may")  # fmt: skip
    yield Picture(27, "jpeg 65500", lambda: jpeg_claiming(65500, 65500), (422,), PIXELS, "65,?500")
    yield Picture(27, "jpeg 12000 lies", lambda: jpeg_claiming(12000, 3300), (200, 422),
                  "its markers are whole: libjpeg may fill in what is missing, or not")  # fmt: skip
    page = b"<html><script>alert(1)</script></html>"
    yield Picture(28, "gif and html", lambda: b"GIF89a/*" + made.gif(1)[8:] + b"*/" + page,
                  (415,), FORMAT, "GIF")  # fmt: skip
    yield Picture(28, "jpeg and html", lambda: made.jpeg(comment=page), (200,), READ)
    yield Picture(29, "sgi", made.sgi, (415,), UNKNOWN)
    yield Picture(29, "fli", made.fli, (415,), UNKNOWN)
    yield Picture(29, "j2k", made.jpeg_2000, (415,), FORMAT, "JPEG 2000")
    yield Picture(29, "tiff", lambda: made.tiff([(256, 4, 2**31, 2**31)] * 30), (415,), FORMAT)


PICTURES = (*_nonsense(), *_pngs(), *_films(), *_foreign(), *_small(), *_modes())


def _opened() -> Iterator[Picture]:
    """What a server says that is told to read GIF and TIFF, too."""
    strip = made.strip_tiff(40000, 40000)
    lies = made.tiff([(256, 4, 2**31, 2**31)] * 30)
    pages = [picture("rings", seed) for seed in range(3)]
    yield Picture(13, "gif 10000 frames", lambda: made.gif(10000), (200,), READ)
    yield Picture(13, "gif of three", lambda: _animation("GIF"), (200,), READ)
    yield Picture(13, "gif cut", lambda: _animation("GIF")[:60], (422,), BROKEN)
    yield Picture(16, "tiff directory loop", HEADERS["TIFF"], (422,), BROKEN)
    yield Picture(17, "tiff strip of 40000", lambda: strip, (422,), PIXELS, "40,?000")
    yield Picture(17, "tiff of pages", lambda: saved(pages[0], "TIFF", save_all=True,
                  append_images=pages[1:]), (200,), READ)  # fmt: skip
    for mode in ("I;16", "I", "F"):
        yield _good(f"{mode} tiff", grey_ramp(mode), "TIFF")
    yield Picture(28, "gif and html", lambda: b"GIF89a/*" + made.gif(1)[8:], (200, 422),
                  "its frame does not fill what its header claims")  # fmt: skip
    yield Picture(29, "tiff", lambda: lies, (422,), BROKEN)
    yield Picture(18, "PSD", HEADERS["PSD"], (415,), FORMAT, "PSD")


OPENED = tuple(_opened())
