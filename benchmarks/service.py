# SPDX-License-Identifier: Apache-2.0
"""What `Service.answer` costs beyond decoding and the engine, at half load and at five times load.

    python benchmarks/service.py BUNDLE PICTURE... [--seconds 10] [--workers N] [--csv FILE]

Without HTTP. First the capacity: as many asks as fit, without a pause, for some seconds. Then asks
come by chance (exponential gaps, seeded) at half and at five times that rate, each for `--seconds`.
Overhead is the answer's time less decoding and computing; its waiting for a free process and for
the batch before it is told apart as `queue`. On a machine that is busy with other things these
figures are those of the other things.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import itertools
import random
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from crosspatch.deploy.server.service import Answer, Ask, Refused, Service
from crosspatch.processor import processor
from crosspatch.versions import installed

FIELDS = ("load", "rate", "goodput", "refused", "p50", "p90", "p99", "over50", "over99", "queue50")


async def one(service: Service, body: bytes, times: list[tuple[float, Answer | None]]) -> None:
    """Asks once; notes the seconds, and the answer or None where it was refused."""
    began = time.perf_counter()
    try:
        answer = await service.answer(Ask(body))
    except Refused as refused:
        if refused.code != "busy":
            raise
        answer = None
    times.append((time.perf_counter() - began, answer))


async def capacity(service: Service, bodies: Sequence[bytes], seconds: float) -> float:
    """Answers a second when there are always as many asks as keep every part busy."""
    many = min(service.limit, 2 * (len(service.pids) + service.batch))
    times: list[tuple[float, Answer | None]] = []
    until = time.perf_counter() + seconds
    source = itertools.cycle(bodies)

    async def client() -> None:
        while time.perf_counter() < until:
            await one(service, next(source), times)

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(many)))
    return sum(answer is not None for _, answer in times) / (time.perf_counter() - began)


async def offered(
    service: Service, bodies: Sequence[bytes], rate: float, seconds: float
) -> list[tuple[float, Answer | None]]:
    """Asks that come `rate` times a second, whether or not there was an answer."""
    times: list[tuple[float, Answer | None]] = []
    chance, source, tasks = random.Random(0), itertools.cycle(bodies), set[asyncio.Task]()
    due = began = time.perf_counter()
    while due < began + seconds:
        due += chance.expovariate(rate)
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        task = asyncio.create_task(one(service, next(source), times))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    await asyncio.gather(*tasks)
    return times


def row(load: str, rate: float, times: list, seconds: float) -> dict[str, object]:
    """Figures of one load; milliseconds."""
    good = [(took, answer) for took, answer in times if answer is not None]
    took = 1e3 * np.array([took for took, _ in good])
    engine = 1e3 * np.array([answer.decode + answer.compute for _, answer in good])
    queue = 1e3 * np.array([answer.queue for _, answer in good])
    p50, p90, p99 = np.percentile(took, [50, 90, 99]).round(2).tolist()
    over50, over99 = np.percentile(took - engine, [50, 99]).round(2).tolist()
    found = (
        load,
        round(rate, 1),
        round(len(good) / seconds, 1),
        len(times) - len(good),
        *(p50, p90, p99, over50, over99, round(float(np.median(queue)), 2)),
    )
    return dict(zip(FIELDS, found, strict=True))


async def measure(args: argparse.Namespace) -> list[dict[str, object]]:
    """Every row; prints what was chosen."""
    service = Service(args.bundle, workers=args.workers, batch=args.batch)
    await service.start()
    print(
        f"{processor().describe()}; {service.engine.setting.describe()}, "
        f"{len(service.pids)} processes, batch {service.batch}, {service.limit} places"
    )
    bodies = [path.read_bytes() for path in args.pictures]
    most = await capacity(service, bodies, args.seconds / 2)
    print(f"capacity {most:.1f} pictures a second")
    rows = []
    for load, share in (("half", 0.5), ("five times", 5.0)):
        times = await offered(service, bodies, share * most, args.seconds)
        rows.append(row(load, share * most, times, args.seconds))
        print(rows[-1])
    await service.stop(10.0)
    return [{"capacity": round(most, 1), "batch": service.batch, **one} for one in rows]


def main() -> None:
    """Parses, measures, writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("pictures", type=Path, nargs="+")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--workers", type=int)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    rows = asyncio.run(measure(args))
    if args.csv:
        told = {"machine": processor().describe(), **installed(["onnxruntime", "pillow", "numpy"])}
        rows = [one | told for one in rows]
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
