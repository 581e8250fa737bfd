"""Very many pictures to one table: how fast, on how many cores, in how much memory, after a kill?

    python benchmarks/batch.py BUNDLE [--pictures 100000] [--few 2000] [--sizes 32x32 375x500]
                               [--out benchmarks/results/batch.csv] [--folder SCRATCH]

A hundred pictures are drawn by a formula, written as JPEG (quality 88) and linked under many names
in a scratch folder, a thousand to a folder. `crosspatch predict BUNDLE FOLDER --csv` is run as a
user runs it, and watched: pictures a second (of the whole command, start and join included),
processor seconds to a second, memory of all its processes (their shares of what they have in
common counted once) and how much more it ever is than when 5 % were done. It is then killed half
way and typed again: the table must have the same bytes, and the two together must not take much
longer. Beside it the plain path on `--few` pictures, by turns with the parts. A row for each size.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from hardware import RESULTS, append, facts

DISTINCT = 100
PLAIN = "from crosspatch.cli import batch; batch.MANY = {}; import sys; " \
        "from crosspatch.cli.main import main; sys.exit(main())"  # fmt: skip


class Watched(NamedTuple):
    """A command. seconds, of the processor too; memory: (share of the pictures, bytes) by time."""

    seconds: float
    processor: float
    memory: list[tuple[float, int]]


def drawn(seed: int, height: int, width: int) -> Image.Image:
    """Waves of three colours with some noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / 60
    a = rng.uniform(0.5, 3, 6)
    waves = np.stack([np.sin(a[2 * c] * x + a[2 * c + 1] * y + c) for c in range(3)], -1)
    noise = rng.integers(-20, 21, (height, width, 1))
    return Image.fromarray((127 + 100 * waves + noise).clip(0, 255).astype(np.uint8))


def write_pictures(folder: Path, count: int, height: int, width: int) -> Path:
    """`count` names of DISTINCT pictures below a new folder."""
    for place in range(count):
        home = folder / f"{place // 1000:04d}"
        home.mkdir(parents=True, exist_ok=True)
        path = home / f"{place:06d}.jpg"
        if place < DISTINCT:
            drawn(place, height, width).save(path, quality=88)
        else:
            first = folder / "0000" / f"{place % DISTINCT:06d}.jpg"
            try:
                os.link(first, path)
            except OSError:  # a file has only so many names
                shutil.copy(first, path)
    return folder


def family(parent: int) -> list[int]:
    """The process, its children and theirs."""
    try:
        text = Path(f"/proc/{parent}/task/{parent}/children").read_text()
    except OSError:
        return []
    return [parent, *(one for child in text.split() for one in family(int(child)))]


def memory(parent: int) -> int:
    """Bytes of a family, what is shared counted once."""
    total = 0
    for one in family(parent):
        try:
            text = Path(f"/proc/{one}/smaps_rollup").read_text()
            total += 1024 * int(text.partition("Pss:")[2].split()[0])
        except (OSError, IndexError):
            continue
    return total


def watch(command: list[str], table: Path, parts: int, kill_at: float | None = None) -> Watched:
    """Run a command, look at it twice a second; kill it when that share of the parts is there."""
    began, before, seen = time.perf_counter(), os.times(), []
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    folder = table.with_name(f"{table.name}.parts")
    while process.poll() is None:
        made = len(list(folder.glob("*.part"))) / parts
        seen.append((made, memory(process.pid)))
        if kill_at is not None and made >= kill_at:
            process.kill()
            break
        time.sleep(0.5)
    _, error = process.communicate()
    if process.returncode != 0 and kill_at is None:
        raise SystemExit(error.decode())
    after = os.times()
    used = after.children_user + after.children_system
    used -= before.children_user + before.children_system
    return Watched(time.perf_counter() - began, used, seen)


def command(bundle: Path, folder: Path, table: Path, many: int = 1) -> list[str]:
    words = ["predict", str(bundle), str(folder), "--csv", str(table)]
    return [sys.executable, "-c", PLAIN.format(many), *words]


def growth(memory: list[tuple[float, int]]) -> tuple[float, float]:
    """(megabytes when 5 % were done, the most of later by that), the end excluded."""
    inside = [(share, size) for share, size in memory if 0.05 <= share < 0.99]
    if not inside:
        return float("nan"), float("nan")
    return inside[0][1] / 1e6, max(size for _, size in inside) / inside[0][1] - 1


def measure(bundle: Path, home: Path, size: tuple[int, int], pictures: int, few: int) -> dict:
    """The row of one size."""
    from crosspatch.deploy.batch import PART

    many = write_pictures(home / "many", pictures, *size)
    some = write_pictures(home / "few", few, *size)
    table, parts = home / "out.csv", -(-pictures // PART)
    watch(command(bundle, some, table), table, 1)  # the choice of the engine is made and kept
    whole = watch(command(bundle, many, table), table, parts)
    first = table.read_bytes()
    table.unlink()
    killed = watch(command(bundle, many, table), table, parts, kill_at=0.5)
    resumed = watch(command(bundle, many, table), table, parts)
    same = table.read_bytes() == first
    took: dict[int, list[float]] = {1: [], 10**9: []}
    for _ in range(3):
        for kind, seconds in took.items():
            seconds.append(watch(command(bundle, some, table, kind), table, 1).seconds)
    plain, in_parts = statistics.median(took[10**9]), statistics.median(took[1])
    base, more = growth(whole.memory)
    return {
        "bundle": bundle.stem if bundle.stem != "bundle" else bundle.parent.name,
        "size": "x".join(map(str, size)),
        "pictures": pictures,
        "seconds": round(whole.seconds, 1),
        "pictures_per_second": round(pictures / whole.seconds, 1),
        "cores_used": round(whole.processor / whole.seconds, 2),
        "processor_ms_per_picture": round(1e3 * whole.processor / pictures, 3),
        "megabytes": round(base, 1),
        "growth": round(more, 4),
        "killed_and_resumed": round((killed.seconds + resumed.seconds) / whole.seconds, 3),
        "same_bytes": same,
        f"plain_seconds_of_{few}": round(plain, 2),
        f"parts_seconds_of_{few}": round(in_parts, 2),
        "load": round(os.getloadavg()[0], 1),
        **facts("onnxruntime", "pillow"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--pictures", type=int, default=100_000)
    parser.add_argument("--few", type=int, default=2000)
    parser.add_argument("--sizes", nargs="+", default=["32x32", "375x500"])
    parser.add_argument("--out", type=Path, default=RESULTS / "batch.csv")
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    for text in given.sizes:
        height, width = map(int, text.split("x"))
        with tempfile.TemporaryDirectory(dir=given.folder) as name:
            size = (height, width)
            row = measure(given.bundle, Path(name), size, given.pictures, given.few)
        print("\n".join(f"{key:28} {value}" for key, value in row.items()), flush=True)
        append(given.out, [row])


if __name__ == "__main__":
    main()
