"""The pictures of pages that the docs show, made again: `make screenshots`.

    python -m browser.screenshots [FOLDER]

Everything in them is made here: digits, and pictures of `support.hostile`. No screenshot is larger
than LARGEST.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from PIL import Image, ImageFilter

from browser.made import typed
from browser.windows import PHONE, browsing, window
from crosspatch.deploy.server.page import page as document
from crosspatch.deploy.server.service import Service
from support.hostile import BAD, CLASSES, oriented, picture, saved
from support.pages import DOCS
from support.serving import running

LARGEST = 150_000
SHOTS: dict[str, tuple[str, tuple[int, int], dict[str, Any]]] = {
    "audit": ("audit.html", (1040, 1200), {}),
    "report": ("runs/digits/report.html", (1040, 1200), {}),
    "report-phone": ("runs/digits/report.html", PHONE, {"color_scheme": "dark"}),
    "explain-page": ("why.html", (1040, 1200), {}),
    "compare": ("compared/digits/report.html", (1040, 1200), {}),
    "shrink": ("runs/digits/shrunk.html", (1040, 1500), {}),
}
"""Picture -> page, what of it is seen, and how."""


SERVED: dict[str, tuple[tuple[int, int], dict[str, Any]]] = {
    "serve": ((1040, 1240), {}),
    "serve-phone": (PHONE, {"color_scheme": "dark"}),
}
"""Picture -> how the server's page is seen."""
DOUBT = 0.7  # the confidence below which that server is not sure


def photos(folder: Path) -> None:
    """A folder as people have them: copies, a picture on its side, files that cannot be read."""
    for split, seeds in (("train", range(30)), ("test", range(40, 48))):
        for kind in CLASSES:
            (folder / split / kind).mkdir(parents=True)
            for seed in seeds:
                made = picture(kind, seed, (120, 160)).filter(ImageFilter.GaussianBlur(1))
                path = folder / split / kind / f"{kind}-{seed:03d}.jpg"
                path.write_bytes(saved(made, "JPEG", quality=88))
    train, test = folder / "train", folder / "test"
    for seed in (41, 44, 46):
        with Image.open(test / "rings" / f"rings-{seed:03d}.jpg") as known:
            smaller = known.resize((120, 90))
        (train / "rings" / f"copy-{seed}.jpg").write_bytes(saved(smaller, "JPEG", quality=70))
    twice = (train / "discs" / "discs-003.jpg").read_bytes()
    (train / "stripes" / "stripes-100.jpg").write_bytes(twice)
    for name in ("cut50.jpg", "page.jpg", "zero.jpg"):
        (train / "stripes" / name).write_bytes(BAD[name][0]())
    (train / "discs" / "turned.jpg").write_bytes(oriented(6))


def pages(folder: Path) -> None:
    """The pages, as the docs say to make them."""
    photos(folder / "photos")
    digits = folder / "four.png"
    typed("audit", "photos", code=1)
    typed("train", "digits", "--epochs", 12, "--out", "runs/digits")
    _digit(digits)
    typed("predict", "runs/digits", digits.name, "--explain", "why.html")
    typed("shrink", "runs/digits", "--max-drop", 1, "--time", "90s")
    typed("compare", "digits", "--try", "base,mixup,ldam", "--seeds", 3, "--epochs", 3,
          "--model", "vit_micro_32", "--size", 16, "--out", "compared/digits")  # fmt: skip


def asked(folder: Path) -> list[Path]:
    """Pictures for the server's page: a disc, stripes, and stripes beside half a ring."""
    ring, stripes = picture("rings", 60, (480, 640)), picture("stripes", 62, (480, 640))
    both = ring.copy()
    both.paste(stripes.crop((0, 0, 320, 480)), (0, 0))
    made = {"disc": picture("discs", 70, (480, 640)), "stripes": picture("stripes", 63, (480, 640)),
            "both": both}  # fmt: skip
    for name, one in made.items():
        (folder / f"{name}.jpg").write_bytes(saved(one, "JPEG", quality=88))
    return [folder / f"{name}.jpg" for name in made]


def _digit(path: Path) -> None:
    from crosspatch.data.opening import open_source

    source = open_source("digits")
    place = next(place for place, item in enumerate(source.items) if item.label == 4)
    Image.fromarray(source.read(place)).save(path)


def shoot_served(folder: Path, to: Path) -> None:
    """The server's page after three pictures, with the scores of patches over two of them."""
    typed("train", "photos", "--model", "crossvit_micro_32", "--size", 64, "--epochs", 25,
          "--out", "runs/shapes")  # fmt: skip
    typed("export", "runs/shapes", "--explain")
    pictures = asked(folder)
    service = Service(folder / "runs/shapes/bundle.onnx", workers=1, threads=1, threshold=DOUBT)
    with browsing() as browser, running(service, page=document()) as server:
        for name, (size, options) in SERVED.items():
            home = f"http://127.0.0.1:{server.port}/"
            with window(browser, home, size, **options) as (shown, noted):
                shown.wait_for_selector("#limits:not(:empty)")
                for number, path in enumerate(pictures, 1):
                    shown.set_input_files("#files", path)
                    shown.wait_for_selector(f":nth-match(article .told, {number})")
                for card in (2, 0):
                    looked = shown.get_by_role("button", name="Show where it looked")
                    looked.nth(card).click()
                shown.evaluate("scrollTo(0, 0)")
                shown.wait_for_timeout(500)  # bars have grown
                assert noted == [], noted
                shown.screenshot(path=to / f"{name}.png")
            _lighter(to / f"{name}.png")


def _lighter(path: Path) -> None:
    """Fewer colours. Raises AssertionError for a picture that is too large."""
    with Image.open(path) as image:
        image.convert("RGB").quantize(200, dither=Image.Dither.NONE).save(path, optimize=True)
    assert path.stat().st_size < LARGEST, f"{path}: {path.stat().st_size:,} B"


def shoot(folder: Path, to: Path) -> None:
    """A picture of each page. Raises AssertionError for one that is too large."""
    with browsing() as browser:
        for name, (page, size, options) in SHOTS.items():
            with window(browser, folder / page, size, **options) as (shown, noted):
                assert noted == [], noted
                shown.screenshot(path=to / f"{name}.png")
            _lighter(to / f"{name}.png")


def main() -> None:
    to = Path(sys.argv[1] if len(sys.argv) > 1 else DOCS / "figures").resolve()
    with tempfile.TemporaryDirectory() as made, contextlib.chdir(made):
        sys.argv = ["crosspatch"]
        pages(Path(made))
        shoot(Path(made), to)
        shoot_served(Path(made), to)


if __name__ == "__main__":
    main()
