"""The pages that are opened, written by the commands that people type, or made up where that would
take a thousand classes."""

from __future__ import annotations

import csv
import functools
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from crosspatch.cli.main import main
from crosspatch.deploy.shrink.result import Budget
from crosspatch.report.comparison import write_comparison
from crosspatch.report.mistakes import LABELS, suspected, write_labels
from crosspatch.report.page import write_page
from crosspatch.report.run import page
from crosspatch.report.shrunk import shrunk_page
from crosspatch.report.story import Story
from support.hostile import BAD, CLASSES, GOOD, oriented, picture, saved
from support.made_up import HOSTILE, compared, several, shrunk, story
from support.pages import ROOT

ODD = (
    "<img src=x onerror=alert(1)>", "\"quotes' & <script>alert(1)<", "two\nlines \x1b[31mred",
    "a very long name " * 12,
)  # fmt: skip
"""Names of folders that a disk may hold."""
FEW = ("--model", "vit_micro_32", "--size", "16", "--epochs", "1")


def typed(*words: object, code: int = 0) -> None:
    """A command in this process. Raises AssertionError where its exit code is another."""
    answer = main([str(word) for word in words])
    assert answer == code, f"{words} ended with {answer}"


def photos(folder: Path) -> Path:
    """Splits with every fault that an audit looks for, and names that would be markup."""
    kinds = [*CLASSES, "Discs", *ODD]
    for place, name in enumerate(kinds):
        drawn = CLASSES[place % 3]
        for split, seeds in (("train", range(16)), ("validation", range(14, 20))):
            where = folder / split / name
            where.mkdir(parents=True)
            for seed in seeds:
                made = picture(drawn, seed + 20 * (place // 3), (60, 80))
                (where / f"IMG_{seed:04d} {name[:20]}.jpg").write_bytes(saved(made, "JPEG"))
    train = folder / "train"
    for number, (name, make) in enumerate(GOOD.items()):
        (train / kinds[number % 4] / name).write_bytes(make())
    for number, (name, (make, _)) in enumerate(BAD.items()):
        (train / kinds[number % len(kinds)] / f"bad {name}").write_bytes(make())
    for turn in (3, 6, 8):
        (train / "rings" / f"turned {turn}.jpg").write_bytes(oriented(turn))
    upright = picture("discs", 3, (80, 60)).rotate(90, expand=True)
    (train / "rings" / "lying.jpg").write_bytes(saved(upright, "JPEG"))
    (train / "rings" / "plain.png").write_bytes(saved(Image.new("RGB", (64, 64), "red"), "PNG"))
    (train / "empty").mkdir()
    return folder


def audited(folder: Path) -> None:
    typed("audit", photos(folder / "photos"), "--out", folder / "audit.html", code=1)


def in_a_table(folder: Path) -> None:
    """Names of classes that no disk could hold."""
    rows = []
    for place, name in enumerate([HOSTILE[0], "a / 'b' & [c]", "x" * 300]):
        for seed in range(12):
            path = folder / f"t{place}-{seed}.png"
            path.write_bytes(saved(picture(CLASSES[place], seed), "PNG"))
            rows.append((path.name, name))
    with (folder / "table.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("path", "label"), *rows])
    typed("audit", folder / "table.csv", "--out", folder / "table.html")


def of_digits(folder: Path) -> None:
    """A run of CrossViT: its report, the report of other pictures, and why it said so."""
    run = folder / "digits"
    typed("train", "digits", "--epochs", 2, "--out", run)
    (folder / "report.html").write_bytes((run / "report.html").read_bytes())
    (folder / LABELS).write_bytes((run / LABELS).read_bytes())
    typed("eval", run, "digits", "--report", folder / "eval.html")
    explained(folder, run, "explained-crossvit.html")


def explained(folder: Path, run: Path, name: str) -> None:
    shown = [folder / f"{place} {odd}.png" for place, odd in enumerate((*ODD[:2], "plain"))]
    for path, kind in zip(shown, CLASSES, strict=True):
        path.write_bytes(saved(picture(kind, 1), "PNG"))
    typed("predict", run, *shown, "--explain", folder / name)


def of_three(folder: Path) -> None:
    """A run on pictures of three classes."""
    for kind in CLASSES:
        (folder / "three" / kind).mkdir(parents=True)
        for seed in range(60):
            made = saved(picture(kind, seed), "PNG")
            (folder / "three" / kind / f"{seed}.png").write_bytes(made)
    typed("train", folder / "three", *FEW, "--out", folder / "run-three")
    (folder / "three.html").write_bytes((folder / "run-three" / "report.html").read_bytes())
    (folder / LABELS).touch()


def by_a_comparison(folder: Path) -> None:
    """A comparison of plain ViTs, and why one of them said so."""
    out = folder / "compared"
    typed("compare", "digits", "--try", "base,mixup", *FEW, "--seeds", 1, "--out", out)
    (folder / "compare.html").write_bytes((out / "report.html").read_bytes())
    explained(folder, out / "base" / "seed-0", "explained-vit.html")


def told(folder: Path, name: str, one: Story) -> None:
    doubted = suspected(one.rows)
    if doubted:
        write_labels(folder / LABELS, doubted)
    write_page(folder / name, page(one, doubted, LABELS if doubted else ""))


def in_a_tail(folder: Path) -> None:
    told(folder, "tailed.html", story([f"kind {place}" for place in range(14)]))


def in_a_comparison(folder: Path) -> None:
    (folder / "made-up").mkdir()
    write_comparison(compared(folder / "made-up")).rename(folder / "compare-hostile.html")


def in_a_search(folder: Path) -> None:
    """Searches for a smaller network, with hostile names: of many candidates, of few, of none."""
    none = Budget(max_drop=0.1, latency=1e-4)
    for name, one in (("many", shrunk(40)), ("few", shrunk(4)), ("none", shrunk(4, none))):
        write_page(folder / f"shrunk-{name}.html", shrunk_page(one))


def site(folder: Path) -> None:
    """The docs, built as `make docs` builds them."""
    shutil.copytree(ROOT / "docs", folder / "docs")
    shutil.copy(ROOT / "mkdocs.yml", folder)
    command = [sys.executable, "-m", "zensical", "build", "--strict"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=120)


def _told(name: str, make: Callable[[], Story]) -> Callable[[Path], None]:
    return lambda folder: told(folder, name, make())


MAKERS: dict[Callable[[Path], None], tuple[str, ...]] = {
    audited: ("audit.html",),
    in_a_table: ("table.html",),
    of_digits: ("report.html", "eval.html", "explained-crossvit.html"),
    of_three: ("three.html",),
    by_a_comparison: ("compare.html", "explained-vit.html"),
    in_a_comparison: ("compare-hostile.html",),
    in_a_search: ("shrunk-many.html", "shrunk-few.html", "shrunk-none.html"),
    in_a_tail: ("tailed.html",),
    _told("hostile.html", functools.partial(story, HOSTILE)): ("hostile.html",),
    _told("several.html", functools.partial(several, HOSTILE)): ("several.html",),
    _told(
        "thousand.html", lambda: story([f"kind {place}" for place in range(1000)], 3000)
    ): ("thousand.html",),
    site: ("site/index.html",),
}  # fmt: skip
"""Who writes which pages of a folder."""
PAGES = {page: make for make, pages in MAKERS.items() for page in pages}
