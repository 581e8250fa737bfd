"""What `crosspatch serve` adds to a call of its engine, and how it bears more than it can do.

    python benchmarks/serve.py overhead [--models digits crossvit_tiny_224]
    python benchmarks/serve.py overload [--seconds 10]
    python benchmarks/serve.py crowd [--count 500]
    python benchmarks/serve.py soak [--minutes 10]

The server is a process of its own on the first cores; whoever sends and measures runs on the last
one (`--client-cores`), so that they do not take time from each other. A model is a word of `bench`
(random weights: speed does not depend on them), a bundle, or `digits`: trained here in a minute.
Pictures are JPEGs of 256 x 256 pixels, no two alike; every answer is compared with the known one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import load
import numpy as np
from serving import NEAR, Sending, at_rate, bare, capacity, staged

from hardware import RESULTS, append

MEGABYTE = 1 << 20
SHARES = (0.5, 1.0, 5.0)
"""Of its capacity, that a server gets."""


def overhead(asked: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """At half load: what an answer takes beyond its decoding and a bare call of the engine.

    outside: latency from the time it was meant to be sent, less decoding and the bare call, so the
    network and the driver's own delay count too; inside: what the server itself says it took, less
    decoding and computing; queue: the part of it that was waiting for others; added: latency less
    queue, decoding and computing, which is what HTTP, JSON and the ways between processes cost;
    own: the same by the server's clock, without the client and the network.
    """
    for model in asked.models:
        with staged(asked, model, 64) as stage:
            bare(stage, 1.0)
            for turn in range(asked.rounds):
                most = capacity(stage, 2.0)
                alone = float(np.median(bare(stage)))
                sending = at_rate(stage, most / 2, asked.seconds, turn)
                alone = (alone + float(np.median(bare(stage)))) / 2
                sent = sending.sent
                good = [one for one in sent if one.status == 200]
                times = [one["timing_ms"] for one in load.parsed(good)]
                decode = [t["decode"] / 1e3 for t in times]
                outside = [one.latency - d - alone for one, d in zip(good, decode, strict=True)]
                inside = [(t["total"] - t["decode"] - t["compute"]) / 1e3 for t in times]
                inner = [(t["queue"] + t["decode"] + t["compute"]) / 1e3 for t in times]
                own = [(t["total"] - t["queue"] - t["decode"] - t["compute"]) / 1e3 for t in times]
                added = [one.latency - spent for one, spent in zip(good, inner, strict=True)]
                yield {
                    "round": turn,
                    "capacity": round(most, 1),
                    "goodput": round(sending.goodput, 1),
                    "requests": len(sent),
                    "refused": sum(one.status == 503 for one in sent),
                    "wrong": stage.wrong(sent),
                    "bare_ms": round(alone * 1e3, 3),
                    **_named("decode", decode),
                    **_named("compute", [t["compute"] / 1e3 for t in times]),
                    **_named("queue", [t["queue"] / 1e3 for t in times]),
                    **_named("inside", inside),
                    **_named("outside", outside),
                    **_named("own", own),
                    **_named("added", added),
                    **_driver(sending),
                    **stage.facts(),
                }


def overload(asked: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Half of what the server can do, all of it, and five times as much: goodput, how long accepted
    ones took, how many were refused and how fast. The capacity is measured before and after."""
    for model in asked.models:
        with staged(asked, model, 64) as stage:
            before = capacity(stage, 3.0)
            found = {share: at_rate(stage, share * before, asked.seconds, 7) for share in SHARES}
            after = capacity(stage, 3.0)
            for share, sending in found.items():
                sent = sending.sent
                good = [one.latency for one in sent if one.status == 200]
                refused = [one.done - one.sent for one in sent if one.status == 503]
                yield {
                    "load": share,
                    "capacity_before": round(before, 1),
                    "capacity_after": round(after, 1),
                    "rate": round(len(sent) / asked.seconds, 1),
                    "goodput": round(sending.goodput, 1),
                    "goodput_share": round(sending.goodput / ((before + after) / 2), 3),
                    "refused_share": round(len(refused) / len(sent), 3),
                    "other": _others(sent),
                    "wrong": stage.wrong(sent),
                    **_named("accepted", good),
                    **_named("refused", refused),
                    **_driver(sending),
                    **stage.facts(),
                }


def crowd(asked: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Many clients at once, each with a picture of its own and none like another; who is refused
    asks again after a moment. nearest: how far the two most alike answers are apart."""
    for model in asked.models:
        with staged(asked, model, asked.count) as stage:
            first: Counter[int] = Counter()
            client = stage.client()
            sent = load.run(partial(_everybody, client, asked.count, first))
            client.close()
            nearest = _nearest(stage.known)
            if nearest < 2 * NEAR:
                raise SystemExit(f"{model} answers two pictures almost alike: {nearest:g} apart")
            yield {
                "clients": asked.count,
                "accepted_at_once": first[200],
                "refused_at_first": first[503],
                "answered": sum(one.status == 200 for one in sent),
                "wrong": stage.wrong(sent),
                "nearest": nearest,
                "allowed": NEAR,
                **stage.facts(),
            }


async def _everybody(client: load.Client, count: int, first: Counter[int]) -> list[load.Sent]:
    """The last answer of each client; first: gets the statuses of their first ones."""

    async def one(number: int) -> load.Sent:
        rng = np.random.default_rng(number)
        sent = await client.send(number, time.perf_counter())
        first[sent.status] += 1
        while sent.status == 503:
            await asyncio.sleep(rng.uniform(0.2, 1.5))
            sent = await client.send(number, time.perf_counter())
        return sent

    return list(await asyncio.gather(*(one(number) for number in range(count))))


def soak(asked: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Good requests at a third of the capacity, hostile ones one after the other beside them; every
    5 s memory and open files of the server with its workers. growth: the median of the last fifth
    against that of the second, for the first one warms up."""
    for model in asked.models:
        with staged(asked, model, 200) as stage:
            rate = capacity(stage, 2.0) / 3
            bad = multiprocessing.get_context("spawn").Queue()
            beside = multiprocessing.get_context("spawn").Process(
                target=_hostile, args=(stage.server.port, asked.minutes * 60, bad)
            )
            beside.start()
            rows, status, wrong = [], Counter[int](), 0
            began = time.perf_counter()
            while (now := time.perf_counter() - began) < asked.minutes * 60:
                sent = at_rate(stage, rate, 5.0, int(now)).sent
                status.update(one.status for one in sent)
                wrong += stage.wrong(sent)
                worst = max(one.latency for one in sent)
                memory = stage.server.memory() / MEGABYTE
                rows.append((now, memory, stage.server.files(), len(stage.server.processes())))
                said = f"{now:6.0f} s  {memory:7.1f} MB  {rows[-1][2:]}  {dict(status)}"
                print(f"{said}  wrong {wrong}  {worst:.2f} s", file=sys.stderr, flush=True)
            hostile = bad.get(timeout=60)
            beside.join()
            series = asked.out.with_name(f"serve-soak-{model}.csv")
            series.unlink(missing_ok=True)
            append(series, [_sample(*row) for row in rows])
            fifth = max(1, len(rows) // 5)
            early, late = np.array(rows[fifth : 2 * fifth]), np.array(rows[-fifth:])
            yield {
                "minutes": asked.minutes,
                "good_requests": sum(status.values()),
                "good_200": status[200],
                "good_503": status[503],
                "good_other": sum(n for code, n in status.items() if code not in (200, 503)),
                "wrong": wrong,
                "hostile_requests": hostile["sent"],
                "hostile_wrong_status": len(hostile["unexpected"]),
                "memory_early_mb": round(float(np.median(early[:, 1])), 1),
                "memory_late_mb": round(float(np.median(late[:, 1])), 1),
                "growth": round(float(np.median(late[:, 1]) / np.median(early[:, 1]) - 1), 4),
                "files_early": int(np.median(early[:, 2])),
                "files_late": int(np.median(late[:, 2])),
                **stage.facts(),
            }
            print(json.dumps(hostile["unexpected"][:20]), file=sys.stderr)


def _sample(seconds: float, memory: float, files: int, processes: int) -> dict[str, Any]:
    return {"seconds": round(seconds, 1), "memory_mb": round(memory, 1), "files": files,
            "processes": processes}  # fmt: skip


def _hostile(port: int, seconds: float, told: Any) -> None:
    """Sends every hostile input in turn until the time is over, in a process of its own."""
    from types import SimpleNamespace

    from hostile import asks_bodies, asks_http
    from hostile.pictures import PICTURES
    from hostile.talk import post, talk

    server: Any = SimpleNamespace(port=port)
    pictures: list[tuple[str, tuple[int, ...], Callable[[], Any]]] = [
        (str(one), one.status, lambda one=one: talk(port, post(one.make()))) for one in PICTURES
    ]
    asks = [(str(one), one.status, lambda one=one: one.send(server))
            for one in (*asks_bodies.ASKED, *asks_http.ASKED)]  # fmt: skip
    cases, sent, unexpected = [*pictures, *asks], 0, []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        name, right, send = cases[sent % len(cases)]
        sent += 1
        try:
            status = send().status
        except OSError as problem:
            status = repr(problem)
        if status not in (*right, 503):  # beside good traffic there may be no room
            unexpected.append([name, status])
    told.put({"sent": sent, "unexpected": unexpected})


def _named(name: str, seconds: Sequence[float]) -> dict[str, float | None]:
    return {f"{name}_{key}": value for key, value in load.spread(seconds).items()}


def _others(sent: Sequence[load.Sent]) -> str:
    """How often which other status came than 200 and 503, and of lost requests why."""
    kinds = (one.body.decode() if one.status == load.LOST else one.status for one in sent
             if one.status not in (200, 503))  # fmt: skip
    return "; ".join(f"{count} {kind}" for kind, count in Counter(kinds).items())


def _driver(sending: Sending) -> dict[str, Any]:
    """What a request of any status cost the server's own process, how late requests were sent, and
    whether that leaves the other figures the server's."""
    each = round(1e3 * sending.busy / len(sending.sent), 3)
    late = _named("driver", sending.delays)
    return {"cpu_ms_a_request": each, **late, "driver_kept_up": sending.kept_up}


def _nearest(known: np.ndarray) -> float:
    """The smallest of the largest differences between two rows."""
    least = np.inf
    for place, row in enumerate(known[:-1]):
        least = min(least, float(np.abs(known[place + 1 :] - row).max(axis=1).min()))
    return round(least, 6)


MODELS = {
    "overhead": ["digits", "crossvit_tiny_224"],
    "overload": ["digits", "crossvit_tiny_224"],
    "crowd": ["digits"],  # answers of random weights are almost alike, so nothing could be crossed
    "soak": ["digits"],
}
COMMANDS = {"overhead": overhead, "overload": overload, "crowd": crowd, "soak": soak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, command in COMMANDS.items():
        one = commands.add_parser(name, help=command.__doc__.split("\n")[0])
        one.add_argument("--models", nargs="+", default=MODELS[name])
        one.add_argument("--client-cores", type=int, default=1)
        one.add_argument("--option", nargs="*", default=[], help="for crosspatch serve, after --")
        one.add_argument("--work", type=Path, help="where models are kept, to be used again")
        one.add_argument("--out", type=Path, default=RESULTS / f"serve-{name}.csv")
        one.add_argument("--seconds", type=float, default=10.0)
        one.add_argument("--rounds", type=int, default=3)
        one.add_argument("--count", type=int, default=500)
        one.add_argument("--minutes", type=float, default=10.0)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        asked.work = asked.work or Path(place)
        asked.work.mkdir(parents=True, exist_ok=True)
        for row in COMMANDS[asked.command](asked):
            append(asked.out, [row])
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
