"""How long does an audit take, and does it find what was planted?

    python benchmarks/audit.py photos.tar pictures/ [--sheet pairs.png]

Speed: 5,000 JPEGs of 500x375 (quality 85) made of the photos in the tar, cropped, turned in hue and
with noise so that they differ, in ten classes; `crosspatch.data.audit` with 2 workers, wall and CPU
seconds. Recall: of the pictures in the folder (class folders, or test/ of such) 1,200 are planted
again: half as large, twice as large, JPEG 50, mirrored, 5 % cut off of each side in all at one
corner, in the middle, 5 % on every side; counted are those that are in one set with their original.
`--sheet` draws 50 of the other pairs, drawn by chance: what the set itself holds.
"""

from __future__ import annotations

import argparse
import io
import os
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from crosspatch.data.audit import audit
from crosspatch.data.decode import decode
from crosspatch.data.near import fingerprint, near_pairs
from crosspatch.data.opening import open_source
from hardware import RESULTS, append, facts

COUNT, SIZE, PLANTED, WORKERS = 5000, (500, 375), 1200, 2
Change = Callable[[Image.Image], Image.Image]


def jpeg(image: Image.Image, quality: int) -> bytes:
    held = io.BytesIO()
    image.save(held, "JPEG", quality=quality)
    return held.getvalue()


def crop(share: float, at: float) -> Change:
    """Cut off `share` of both sides in all, of which `at` above and on the left."""

    def change(image: Image.Image) -> Image.Image:
        off = [max(1, round(side * share)) for side in image.size]
        x, y = (round(one * at) for one in off)
        return image.crop((x, y, x + image.width - off[0], y + image.height - off[1]))

    return change


CHANGES: dict[str, Change] = {
    "half as large": lambda image: image.resize((image.width // 2, image.height // 2)),
    "twice as large": lambda image: image.resize((2 * image.width, 2 * image.height)),
    "JPEG 50": lambda image: decode(jpeg(image, 50)),
    "mirrored": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    "cropped by 5 % in the middle": crop(0.05, 0.5),
    "cropped by 5 % at a corner": crop(0.05, 0.0),
    "cropped by 5 % on every side": crop(0.10, 0.5),
}


def make_photos(archive: Path, folder: Path) -> None:
    with tarfile.open(archive) as tar:
        photos = [decode(tar.extractfile(one).read()) for one in tar if one.isfile()]
    rng = np.random.default_rng(0)
    for number in range(COUNT):
        photo = photos[number % len(photos)]
        side = [int(one * rng.uniform(0.5, 0.8)) for one in photo.size]
        x, y = (
            int(rng.uniform(0, whole - one)) for whole, one in zip(photo.size, side, strict=True)
        )
        part = photo.crop((x, y, x + side[0], y + side[1])).resize(SIZE)
        pixels = np.asarray(part.convert("HSV")).copy()
        pixels[..., 0] += np.uint8(rng.integers(256))
        place = folder / f"class {number % 10}"
        place.mkdir(exist_ok=True)
        new = Image.fromarray(pixels, "HSV").convert("RGB")
        (place / f"{number:05d}.jpg").write_bytes(jpeg(new, 85))


def speed_row(archive: Path) -> dict:
    with tempfile.TemporaryDirectory() as place:
        make_photos(archive, Path(place))
        began, cpu = time.monotonic(), sum(os.times()[:4])
        found = audit(place, workers=WORKERS)
        taken, spent = time.monotonic() - began, sum(os.times()[:4]) - cpu
    what = f"{found.pictures:,} JPEGs of {SIZE[0]}x{SIZE[1]}, {WORKERS} workers"
    return row(what, seconds=f"{taken:.1f}", cpu_seconds=f"{spent:.1f}")


def recall_rows(folder: Path, sheet: Path | None) -> Iterator[dict]:
    source = open_source(folder)
    images = [source.image(at) for at in range(len(source))]
    rng, names = np.random.default_rng(0), list(CHANGES)
    chosen = rng.permutation(len(images))[:PLANTED].tolist()
    kinds = [names[number % len(names)] for number in range(len(chosen))]
    planted = [CHANGES[kind](images[at]) for kind, at in zip(kinds, chosen, strict=True)]
    prints = [fingerprint(image) for image in [*images, *planted]]
    pairs = near_pairs(np.frombuffer(b"".join(prints), np.uint8).reshape(len(prints), -1))
    known = set(map(tuple, pairs.tolist()))
    found = Counter(
        k
        for i, (k, at) in enumerate(zip(kinds, chosen, strict=True))
        if (at, len(images) + i) in known
    )
    total = Counter(kinds)
    for name in names:
        what = f"planted among {len(images):,}: {name}"
        yield row(what, found[name], total[name], f"{found[name] / total[name]:.3f}")
    share = f"{found.total() / total.total():.3f}"
    yield row(f"planted among {len(images):,}: all", found.total(), total.total(), share)
    own = pairs[pairs[:, 1] < len(images)]
    yield row(f"pairs that {len(images):,} pictures of {source.name} hold themselves", len(own))
    if sheet:
        draw(images, own[np.sort(rng.permutation(len(own))[:50])], sheet)


def draw(images: list[Image.Image], pairs: np.ndarray, target: Path, across: int = 10) -> None:
    sheet = Image.new("RGB", (across * 150, -(-len(pairs) // across) * 76), "white")
    for place, pair in enumerate(pairs.tolist()):
        for side, item in enumerate(pair):
            at = (place % across * 150 + 71 * side, place // across * 76)
            sheet.paste(images[item].resize((70, 70)), at)
    sheet.save(target)


def row(what: str, found: object = "", of: object = "", share: str = "", **times: str) -> dict:
    print(f"{found!s:>6} {of!s:>6} {share:>6} {' '.join(times.values()):>12}  {what}")
    seconds = {"seconds": times.get("seconds", ""), "cpu_seconds": times.get("cpu_seconds", "")}
    return {"what": what, "found": found, "of": of, "share": share, **seconds,
            **facts("numpy", "pillow")}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("photos", type=Path, help="a tar of pictures")
    parser.add_argument("pictures", type=Path, help="a folder of class folders")
    parser.add_argument("--sheet", type=Path, help="draw 50 pairs into this PNG")
    parser.add_argument("--out", type=Path, default=RESULTS / "audit.csv")
    given = parser.parse_args()
    append(given.out, [speed_row(given.photos), *recall_rows(given.pictures, given.sheet)])


if __name__ == "__main__":
    main()
