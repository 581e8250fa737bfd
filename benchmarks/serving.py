"""A server under measurement, on its own processors, with pictures whose answers are known."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import load
import numpy as np
import psutil

from crosspatch.deploy.bundle import check_pictures, read_bundle
from crosspatch.deploy.engines import Engine, open_engine
from crosspatch.deploy.predictor import Predictor
from hardware import facts

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "tests"))

from hostile.process import Server  # noqa: E402

from support.hostile import CLASSES, picture, saved  # noqa: E402

TOP = 10
NEAR = 2e-5
"""Largest difference of a probability from the known one: batches add in another order."""
LATE = 0.01
"""Seconds: where a hundredth of the requests was sent later than that, the sender was the limit."""
PACKAGES = ("uvicorn", "fastapi", "onnxruntime", "openvino", "pillow")


class Stage(NamedTuple):
    """What is measured: a model's name, its server, and the pictures with their known answers.
    server_cores, client_cores: processors that each may use; engine: the same as the server's;
    senders: a process for each of the client's; machine: what stands beside every figure."""

    name: str
    server: Server
    engine: Engine
    pictures: list[bytes]
    known: np.ndarray
    classes: tuple[str, ...]
    size: tuple[int, int]
    server_cores: list[int]
    client_cores: list[int]
    senders: Any
    machine: dict[str, str]

    @property
    def shared(self) -> str:
        """Which processors both sides used."""
        both = sorted(set(self.server_cores) & set(self.client_cores))
        return ",".join(map(str, both)) or "none"

    @property
    def target(self) -> str:
        return f"/predict?top_k={self.top}"

    @property
    def top(self) -> int:
        """Classes in an answer: of a thousand nobody asks for all, and 50 kB of JSON take 4 ms."""
        return min(TOP, len(self.classes))

    def client(self) -> load.Client:
        return load.Client(self.server.port, self.pictures, self.target)

    def facts(self) -> dict[str, Any]:
        """The columns that say what was measured where."""
        return {
            "model": self.name,
            "engine": self.engine.setting.describe(),
            "server_cores": len(self.server_cores),
            "client_cores": len(self.client_cores),
            "shared_cores": self.shared,
            **self.machine,
        }

    def wrong(self, sent: Sequence[load.Sent]) -> int:
        """How many good answers are not the known one."""
        return sum(not self.right(one) for one in sent if one.status == 200)

    def right(self, one: load.Sent) -> bool:
        said = {p["class"]: p["probability"] for p in json.loads(one.body)["predictions"]}
        known = self.known[one.picture]
        least = np.sort(known)[-self.top] - NEAR  # of those that are to be named
        off = [abs(said[name] - p) if name in said else max(0.0, p - least - 2 * NEAR)
               for name, p in zip(self.classes, known.tolist(), strict=True)]  # fmt: skip
        return len(said) == self.top and max(off) < NEAR


def bundle_of(model: str, place: Path) -> Path:
    """A bundle of `model`, made in `place` where it is none."""
    if model.endswith((".onnx", ".xml")):
        return Path(model)
    made = place / model / "bundle.onnx"
    if made.exists():
        return made
    words = [sys.executable, "-m", "crosspatch"]
    if model == "digits":
        run = str(made.parent)
        train = ["train", "digits", "--epochs", "1", "--out", run, "--overwrite"]
        subprocess.run([*words, *train], check=True, stdout=subprocess.DEVNULL)
        subprocess.run([*words, "export", run], check=True, stdout=subprocess.DEVNULL)
        return made
    from crosspatch.deploy.subject import prepare

    made.parent.mkdir(parents=True)
    prepare(model, made, ("onnxruntime",), [], strict=True)
    return made


def drawn(count: int, side: int = 256) -> list[bytes]:
    """JPEGs of shapes in drawn colours, no two alike."""
    return [
        saved(picture(CLASSES[n % len(CLASSES)], n, (side, side)), "JPEG", quality=90)
        for n in range(count)
    ]


@contextmanager
def staged(asked: argparse.Namespace, model: str, count: int, *options: str) -> Iterator[Stage]:
    """A server of `model` that runs, on its cores, and this process on others."""
    all_cores = sorted(os.sched_getaffinity(0))
    few = len(all_cores) <= asked.client_cores
    clients = all_cores if few else all_cores[-asked.client_cores :]
    servers = all_cores if few else all_cores[: -asked.client_cores]
    bundle = bundle_of(model, asked.work)
    opened = read_bundle(bundle)
    pictures, machine = drawn(count), facts(*PACKAGES)  # before this process has fewer cores
    os.sched_setaffinity(0, servers)  # threads of the engine inherit it
    try:
        pinned = ",".join(map(str, servers))
        log = asked.work / "serve.log"
        with Server(bundle, log, *options, *asked.option, taskset=pinned) as server:
            info = json.loads(server.get("/info").body)
            engine = open_engine(opened, info["engine"], threads=info["threads"])
            predictor = Predictor(engine, opened.info.classes, opened.info.preprocess)
            known = predictor.predict(pictures, batch=1).probs
            os.sched_setaffinity(0, clients)
            size = opened.info.preprocess.size
            with multiprocessing.get_context("spawn").Pool(len(clients)) as senders:
                yield Stage(
                    model, server, engine, pictures, known, predictor.classes, size, servers,
                    clients, senders, machine,
                )  # fmt: skip
    finally:
        os.sched_setaffinity(0, all_cores)


def capacity(stage: Stage, seconds: float) -> float:
    """Good answers a second at most, of as many clients as bring out most."""
    best = 0.0
    for clients in (4, 8, 16, 32):
        client, start = stage.client(), time.perf_counter()
        sent = load.run(lambda c=client, n=clients: load.closed_loop(c, n, seconds))
        client.close()
        best = max(best, load.goodput(sent, start, seconds))
    return best


class Sending(NamedTuple):
    """What was sent at a rate. start: of the clock; seconds: for how long; busy: seconds of
    processor time that the server's own process spent meanwhile, its decoders left out."""

    sent: list[load.Sent]
    start: float
    seconds: float
    busy: float

    @property
    def goodput(self) -> float:
        return load.goodput(self.sent, self.start, self.seconds)

    @property
    def delays(self) -> list[float]:
        """Seconds that requests were sent too late by those who measure."""
        return [one.sent - one.meant for one in self.sent]

    @property
    def kept_up(self) -> bool:
        """Whether those who measure were fast enough for the figures to be the server's."""
        return float(np.percentile(self.delays, 99)) < LATE


def at_rate(stage: Stage, rate: float, seconds: float, seed: int) -> Sending:
    """Requests by as many processes as there are processors for it, at a rate all together."""
    cores, start = stage.client_cores, time.perf_counter() + 0.5
    plans = [
        load.Plan(
            stage.server.port, stage.pictures, stage.target, start, rate / len(cores), seconds,
            1000 * seed + place, core,
        )
        for place, core in enumerate(cores)
    ]  # fmt: skip
    front = psutil.Process(stage.server.process.pid)
    before = sum(front.cpu_times()[:2])
    found = stage.senders.map(load.carried_out, plans)
    busy = sum(front.cpu_times()[:2]) - before
    return Sending([one for part in found for one in part], start, seconds, busy)


def bare(stage: Stage, seconds: float = 3.0) -> list[float]:
    """Seconds of single calls of the engine, on the server's cores, while the server rests."""
    one, times = check_pictures(stage.size, 1), []
    os.sched_setaffinity(0, stage.server_cores)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        began = time.perf_counter()
        stage.engine.run(one)
        times.append(time.perf_counter() - began)
    os.sched_setaffinity(0, stage.client_cores)
    return times
