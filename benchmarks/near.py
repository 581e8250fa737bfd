"""Are near-duplicates found, and nothing else? How long does that take?

    python benchmarks/near.py photos.tar cifar10.tar.xz [--sheet pairs.png]

Photos (any tar of pictures): each is changed in one way and put beside its original among the
pictures of the second archive; counted are the changed ones that are paired with their original,
and the photos that are paired with anything else. The second archive (class folders, with splits or
without) is then searched by itself: pairs, sets, those across splits and classes, CPU seconds for
50,000 of its pictures; `--sheet` draws the pairs that leave most unexplained, to be looked at.
Digits: the scans enlarged to 32 pixels, of which no two are one picture.
"""

from __future__ import annotations

import argparse
import io
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance

from crosspatch.data.decode import decode
from crosspatch.data.near import fingerprint, near_groups, near_pairs
from crosspatch.data.opening import open_source
from crosspatch.data.sources import Source
from hardware import RESULTS, append, facts

TIMED = 50_000
Change = Callable[[Image.Image], Image.Image]


def jpeg(quality: int) -> Change:
    def change(image: Image.Image) -> Image.Image:
        stream = io.BytesIO()
        image.save(stream, "JPEG", quality=quality)
        return Image.open(stream).convert("RGB")

    return change


def crop(share: float) -> Change:
    """Cut off `share` of both sides in all, the same left and right, above and below."""

    def change(image: Image.Image) -> Image.Image:
        across, down = (round(side * share / 2) for side in image.size)
        return image.crop((across, down, image.width - across, image.height - down))

    return change


CHANGES: dict[str, Change] = {
    "JPEG 70": jpeg(70),
    "JPEG 30": jpeg(30),
    "half as large": lambda image: image.resize((image.width // 2, image.height // 2)),
    "a tenth as large": lambda image: image.resize(
        (max(16, image.width // 10), max(16, image.height // 10))
    ),
    "10 % brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.1),
    "cropped by 3 %": crop(0.03),
    "cropped by 6 %": crop(0.06),
    "cropped by 10 %": crop(0.10),
    "mirrored": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    "grey": lambda image: image.convert("L").convert("RGB"),
    "half, brighter, cropped by 3 %, JPEG 50": lambda image: jpeg(50)(
        crop(0.03)(CHANGES["10 % brighter"](CHANGES["half as large"](image)))
    ),
}


def photos(archive: Path) -> list[Image.Image]:
    with tarfile.open(archive) as tar:
        return [decode(tar.extractfile(member).read()) for member in tar if member.isfile()]


def stacked(prints: list[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(prints), np.uint8).reshape(len(prints), -1)


def change_rows(images: list[Image.Image], crowd: np.ndarray) -> Iterator[dict]:
    plain, count = stacked([fingerprint(image) for image in images]), len(images)
    for name, change in CHANGES.items():
        changed = stacked([fingerprint(change(image)) for image in images])
        pairs = near_pairs(np.concatenate([plain, changed, crowd]))
        ours = pairs[pairs[:, 0] < 2 * count]
        right = int((ours[:, 1] - ours[:, 0] == count).sum())
        what = f"{count} photos among {len(crowd):,}: {name}"
        yield row(what, found=right, wrong=len(ours) - right, share=f"{right / count:.3f}")


def set_rows(source: Source, sheet: Path | None) -> Iterator[dict]:
    began = time.process_time()
    images = [source.image(item) for item in range(len(source))]
    read = time.process_time()
    prints = [fingerprint(image) for image in images]
    printed = time.process_time()
    near_groups(dict(enumerate(prints[:TIMED])))
    taken = time.process_time() - printed
    scale = min(TIMED, len(source)) / len(source)
    pairs, groups = near_pairs(stacked(prints)), near_groups(dict(enumerate(prints)))
    parts = lambda key: [len({getattr(source.items[at], key) for at in one}) > 1 for one in groups]
    name = f"{len(source):,} pictures of {source.name}"
    yield row(f"{name}: pairs", found=len(pairs))
    yield row(f"{name}: sets", found=len(groups))
    yield row(f"{name}: sets across given splits", found=sum(parts("split")))
    yield row(f"{name}: sets across classes", found=sum(parts("label")))
    timed = f"{min(TIMED, len(source)):,} pictures"
    yield row(f"{timed}: read", seconds=f"{(read - began) * scale:.1f}")
    yield row(f"{timed}: fingerprints", seconds=f"{(printed - read) * scale:.1f}")
    yield row(f"{timed}: search", seconds=f"{taken:.1f}")
    if sheet:
        draw(images, pairs, sheet)


def digit_rows() -> Iterator[dict]:
    source = open_source("digits")
    enlarged = [source.image(item).resize((32, 32)) for item in range(len(source))]
    pairs = near_pairs(stacked([fingerprint(image) for image in enlarged]))
    yield row(f"{len(source):,} digits enlarged to 32 pixels", found=0, wrong=len(pairs))


def draw(images: list[Image.Image], pairs: np.ndarray, target: Path, across: int = 16) -> None:
    """Up to 320 pairs, evenly taken."""
    shown = pairs[np.linspace(0, len(pairs) - 1, min(320, len(pairs))).round().astype(int)]
    sheet = Image.new("RGB", (across * 140, -(-len(shown) // across) * 68), "white")
    for place, pair in enumerate(shown.tolist()):
        for side, item in enumerate(pair):
            at = (place % across * 140 + 66 * side, place // across * 68)
            sheet.paste(images[item].resize((64, 64)), at)
    sheet.save(target)


def row(what: str, found: object = "", wrong: object = "", share: str = "", seconds: str = ""):
    print(f"{found!s:>8} {wrong!s:>6} {share:>6} {seconds:>6}  {what}")
    figures = {"found": found, "wrong": wrong, "share": share, "cpu_seconds": seconds}
    return {"what": what, **figures, **facts("numpy", "pillow")}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("photos", type=Path, help="a tar of pictures")
    parser.add_argument("data", type=Path, help="class folders, or an archive of them")
    parser.add_argument("--sheet", type=Path, help="draw pairs of DATA into this PNG")
    parser.add_argument("--out", type=Path, default=RESULTS / "near.csv")
    given = parser.parse_args()
    source = open_source(given.data)
    crowd = stacked([fingerprint(source.image(item)) for item in range(len(source))])
    rows = [*change_rows(photos(given.photos), crowd), *set_rows(source, given.sheet)]
    append(given.out, [*rows, *digit_rows()])


if __name__ == "__main__":
    main()
