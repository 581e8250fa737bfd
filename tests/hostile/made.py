"""Files that no writer would write, from struct and zlib: PNG chunk by chunk, JPEG by its
segments, TIFF, WebP, GIF and the headers of formats that must never be opened."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence

from PIL import Image

from support.hostile import picture, saved

PNG = b"\x89PNG\r\n\x1a\n"
CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
"""Values of a pixel by the colour type of a PNG."""


def chunk(name: bytes, data: bytes, flip: int = 0) -> bytes:
    """One chunk of a PNG; flip: bits of its checksum that are wrong."""
    check = zlib.crc32(name + data) ^ flip
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", check)


def header(width: int, height: int, bits: int = 8, colour: int = 2) -> bytes:
    """The first chunk of a PNG."""
    return chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))


def zeros(count: int) -> bytes:
    """A zlib stream of `count` zero bytes, made in no time: one deflated megabyte, again and again.

    A full flush ends on a byte and forgets what was before, so the part may be repeated. The
    checksum (Adler-32) of n zero bytes is (n mod 65521) << 16 | 1.
    """
    step = 1 << 20

    def part(length: int) -> bytes:
        deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
        return deflate.compress(bytes(length)) + deflate.flush(zlib.Z_FULL_FLUSH)

    body = part(step) * (count // step) + part(count % step)
    return b"\x78\xda" + body + b"\x03\x00" + struct.pack(">I", (count % 65521) << 16 | 1)


def black_png(width: int, height: int, bits: int = 8, colour: int = 2) -> bytes:
    """A whole, valid PNG of one colour (all values zero), small however many pixels it has."""
    row = 1 + (width * CHANNELS[colour] * bits + 7) // 8
    palette = chunk(b"PLTE", bytes(3)) if colour == 3 else b""
    pixels = chunk(b"IDAT", zeros(row * height))
    return PNG + header(width, height, bits, colour) + palette + pixels + chunk(b"IEND", b"")


def with_chunks(data: bytes, *chunks: bytes, last: bool = False) -> bytes:
    """A PNG with further chunks behind its header, or (last) in front of its end."""
    place = len(data) - 12 if last else len(PNG) + 25
    return data[:place] + b"".join(chunks) + data[place:]


def text(length: int) -> bytes:
    """A chunk zTXt of a few kB that unpacks to `length` bytes."""
    return chunk(b"zTXt", b"Comment\0\0" + zeros(length))


def jpeg(side: tuple[int, int] = (96, 128), **options: object) -> bytes:
    """An ordinary JPEG of (height, width) pixels."""
    return saved(picture("discs", 7, side), "JPEG", quality=90, **options)


def resized_header(data: bytes, width: int, height: int) -> bytes:
    """A JPEG whose header claims another size."""
    found = bytearray(data)
    at = next(found.find(mark) for mark in (b"\xff\xc0", b"\xff\xc2") if mark in found) + 5
    found[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(found)


def marked(data: bytes, old: bytes, new: bytes) -> bytes:
    """A JPEG with its first marker `old` replaced."""
    return data.replace(old, new, 1)


def twelve_bit() -> bytes:
    """A JPEG whose frame claims twelve bits a value (SOF1)."""
    data = bytearray(marked(jpeg(), b"\xff\xc0", b"\xff\xc1"))
    data[data.index(b"\xff\xc1") + 4] = 12
    return bytes(data)


def arithmetic() -> bytes:
    """A JPEG that says that it is coded arithmetically (SOF9); any bytes are such a code."""
    return marked(jpeg(), b"\xff\xc0", b"\xff\xc9")


def ycck() -> bytes:
    """A CMYK JPEG whose Adobe segment says YCCK: the first three values are turned into CMY."""
    data = bytearray(saved(picture("rings", 3).convert("CMYK"), "JPEG", quality=95))
    data[data.index(b"Adobe") + 11] = 2
    return bytes(data)


def many_scans(side: int, scans: int) -> bytes:
    """A progressive JPEG of side x side pixels with `scans` scans, each of which the decoder walks
    the whole picture for, though it is a few bytes long.

    Every scan says: no coefficient of the band 1 to 63 is new (an end of band over 32,767 blocks at
    a time), so the file costs some bytes per scan and the decoder some seconds.
    """
    grey = saved(Image.new("L", (16, 16), 90), "JPEG", progressive=True, quality=50)
    start = grey.index(b"\xff\xda")
    first_end = grey.index(b"\xff", start + 2)
    while grey[first_end + 1] == 0:
        first_end = grey.index(b"\xff", first_end + 2)
    head = resized_header(grey[:start], side, side)
    # one Huffman code, the bit 0, for EOB14: run of 2^14 + 14 further bits
    table = b"\xff\xc4" + struct.pack(">HB", 20, 0x10) + b"\x01" + bytes(15) + b"\xe0"
    scan = b"\xff\xda" + struct.pack(">HBBBBBB", 8, 1, 1, 0x00, 1, 63, 0)
    runs = -(-(((side + 7) // 8) ** 2) // 32767)
    bits = "".join("0" + "1" * 14 for _ in range(runs))
    bits += "1" * (-len(bits) % 8)
    coded = int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\x00")
    return head + grey[start:first_end] + table + (scan + coded) * scans + b"\xff\xd9"


def tiff(
    entries: Sequence[tuple[int, int, int, int]], following: int = 0, tail: bytes = b""
) -> bytes:
    """A little-endian TIFF of one directory at 8: entries (tag, type, count, value)."""
    body = struct.pack("<H", len(entries))
    body += b"".join(struct.pack("<HHII", *entry) for entry in sorted(entries))
    return b"II*\0" + struct.pack("<I", 8) + body + struct.pack("<I", following) + tail


def strip_tiff(width: int, height: int, following: int = 0, bits: int = 8) -> bytes:
    """A grey TIFF that claims one strip of all its rows, with next to no data."""
    data_at = 8 + 2 + 8 * 12 + 4
    entries = [
        (256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, bits), (259, 3, 1, 1),
        (262, 3, 1, 1), (273, 4, 1, data_at), (278, 4, 1, height), (279, 4, 1, width * height),
    ]  # fmt: skip
    return tiff(entries, following, bytes(64))


def webp_canvas(width: int, height: int, animated: bool = True) -> bytes:
    """A WebP with a canvas of any size and one small frame in its corner."""
    still = saved(picture("rings", 1), "WEBP", lossless=True)[12:]
    small = picture("rings", 1)

    def part(name: bytes, data: bytes) -> bytes:
        return name + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)

    def three(number: int) -> bytes:
        return struct.pack("<I", number)[:3]

    canvas = three(width - 1) + three(height - 1)
    body = b"WEBP" + part(b"VP8X", struct.pack("<I", 0x02 if animated else 0) + canvas)
    if animated:
        size = three(small.width - 1) + three(small.height - 1)
        frame = three(0) + three(0) + size + three(100) + b"\0" + still
        body += part(b"ANIM", bytes(4) + struct.pack("<H", 0)) + part(b"ANMF", frame)
    else:
        body += still
    return b"RIFF" + struct.pack("<I", len(body)) + body


def gif(frames: int) -> bytes:
    """A GIF of 2x2 pixels with so many frames."""
    frame = b"\x21\xf9\x04\x00\x01\x00\x00\x00" + b"\x2c" + struct.pack("<HHHHB", 0, 0, 2, 2, 0)
    frame += b"\x02\x03\x44\x02\x05\x00"  # clear, three ones, end: three bytes of LZW
    colours = bytes((0, 0, 0, 200, 30, 30))
    return b"GIF89a" + struct.pack("<HHBBB", 2, 2, 0x80, 0, 0) + colours + frame * frames + b";"


def bmp_claiming(width: int, height: int, bits: int = 24, compression: int = 0) -> bytes:
    """The headers of a BMP and a few pixels."""
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, compression, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54 + 64, 0, 0, 54) + info + bytes(64)


def sgi() -> bytes:
    """An SGI picture, run-length coded, whose row table points behind the end."""
    head = struct.pack(">HBBHHHHII", 474, 1, 1, 3, 64, 64, 3, 0, 255).ljust(512, b"\0")
    return head + struct.pack(">I", 0xFFFFFFF0) * 192 + struct.pack(">I", 0x7FFFFFFF) * 192


def fli() -> bytes:
    """An FLI film whose first chunk is longer than its frame."""
    head = struct.pack("<IHHHHHH", 200, 0xAF11, 1, 64, 64, 8, 0).ljust(128, b"\0")
    return (
        head + struct.pack("<IHH", 72, 0xF1FA, 1).ljust(16, b"\0") + struct.pack("<IH", 2**31, 12)
    )


def jpeg_2000() -> bytes:
    """A JPEG 2000 whose size segment claims tiles without end."""
    box = b"\0\0\0\x0cjP  \r\n\x87\n" + b"\0\0\0\x14ftypjp2 \0\0\0\0jp2 "
    size = struct.pack(">HHIIIIIIIIH", 41, 0, 2**31, 2**31, 0, 0, 1, 1, 0, 0, 1) + b"\7\1\1"
    return box + struct.pack(">I", 0) + b"jp2c\xff\x4f\xff\x51" + size
