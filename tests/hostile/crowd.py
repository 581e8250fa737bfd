"""Many pictures of which no two have the same answer."""

from __future__ import annotations

from PIL import Image

from support.hostile import saved


def distinct(number: int) -> tuple[bytes, tuple[int, int, int]]:
    """A picture of one colour that no other number below 4096 has, and that colour."""
    colour = (40 + number % 16 * 10, 40 + number // 16 % 16 * 10, 40 + number // 256 * 10)
    return saved(Image.new("RGB", (32, 24), colour), "PNG"), colour
