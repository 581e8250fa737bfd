# SPDX-License-Identifier: Apache-2.0
"""One bundle that answers pictures, many at a time: what a server is, without HTTP.

A picture waits for a decoding process (`workers`), is decoded there, waits for the engine and is
computed with whatever else is there (`batching`). How many may be inside is bounded by a number, by
bytes and by time: where those inside will take longer than `patience`, or than the new ask's own
deadline, it is refused at once, so that those accepted are answered about as fast under any load.
An ask that nobody waits for any more gives its place free at once and is not computed.
"""

from __future__ import annotations

import asyncio
import io
import time
from collections.abc import Callable, Sequence
from math import inf
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from crosspatch.data.decode import FORMATS
from crosspatch.deploy.bundle import Bundle, BundleInfo, check_pictures, read_bundle
from crosspatch.deploy.choice import open_bundle
from crosspatch.deploy.engines import TOLERANCE, Engine
from crosspatch.deploy.predictor import decide
from crosspatch.deploy.server import refusals
from crosspatch.deploy.server.batching import Batcher, measure
from crosspatch.deploy.server.decoder import Limits
from crosspatch.deploy.server.refusals import Refused
from crosspatch.deploy.server.workers import Decoded, Workers
from crosspatch.errors import DataError, UsageError
from crosspatch.processor import usable_cores

__all__ = ["Answer", "Ask", "Refused", "Service"]

BATCH = 16
"""Pictures computed together, at most; fewer where the engine gains nothing by more."""
PATIENCE = 1.0
"""Seconds that an ask may have to wait for those before it."""
HELD = 128 << 20
"""Bytes of pictures that wait, as sent and as the model's input."""
FEWEST, MOST = 2, 16
"""Decoding processes unless told: with a second one, a bad picture does not hold up all others."""
THRESHOLD = 0.5
FRESH = 0.1  # share that the latest measurement has in a running mean
NEARLY = 0.9  # share of the places from which the service says that it is full
Observe = Callable[[str, float], None]


class Ask(NamedTuple):
    """A picture and what is wanted of it. body: one picture file as it came; top: how many classes;
    explain: scores of the patches, where `Service.explains`; seen: the model's input as PNG;
    deadline: of `time.monotonic()`, after which nobody wants the answer."""

    body: bytes
    top: int = 5
    explain: bool = False
    seen: bool = False
    deadline: float = inf


class Answer(NamedTuple):
    """predictions: the `top` best of all K classes with their probabilities, best first; labels: of
    a multilabel bundle those that the picture is said to have, else None; confidence: that of the
    best class; abstain: it is below `threshold`, of multilabel: no class reaches its own, and
    threshold is that of the best class; width, height, format: of the picture as sent, upright;
    picture: sha256 of its bytes; queue, decode, compute: seconds; batch: pictures that were
    computed together; seen: PNG; patches: rows x columns, of the best class."""

    predictions: list[tuple[str, float]]
    labels: list[tuple[str, float]] | None
    confidence: float
    abstain: bool
    threshold: float
    width: int
    height: int
    format: str
    picture: str
    queue: float
    decode: float
    compute: float
    batch: int
    seen: bytes | None
    patches: list[list[float]] | None


class _Pending:
    """An ask on its way. Everything but `wanted` is for the event loop's thread alone."""

    def __init__(self, service: Service, ask: Ask, ahead: int) -> None:
        self.service, self.ask, self.ahead = service, ask, ahead
        self.body, self.seen = ask.body, ask.seen
        self.future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self.held = len(ask.body)
        self.entered = self.queued = time.perf_counter()
        self.queue = 0.0
        self.found: Decoded | None = None

    @property
    def wanted(self) -> bool:
        """Whether somebody waits and the deadline is not over."""
        return not self.future.done() and time.monotonic() < self.ask.deadline

    @property
    def pixels(self) -> np.ndarray:
        """(H, W, 3) uint8, once it is decoded."""
        assert self.found is not None
        return self.found.pixels

    def taken(self) -> None:
        """A process begins to decode it."""
        self.queue = time.perf_counter() - self.queued

    def decoded(self, found: Decoded) -> None:
        """It goes on to the engine."""
        self.found, self.queued = found, time.perf_counter()
        self.service._decoded(self)

    def refused(self, why: Refused) -> None:
        """There will be no answer."""
        self.body = b""
        if not self.future.done():
            self.future.set_exception(why)


class Service:
    """A bundle, the engine that runs it and the processes that decode for it.

    path: of the bundle; engine, threads: as in `choice.open_bundle`; workers: decoding processes;
    batch: pictures together, at most; queue: asks inside at once, at most (4 x batch x workers);
    max_wait_ms: how long a batch waits for more; pixels, side, formats: what a picture may be;
    decode_seconds: processor time that one may take; threshold: of `abstain`, None for that of the
    bundle; observe: told "queue", "decode", "compute" (seconds) and "batch" (pictures); patience:
    seconds that an ask may have to wait for those before it. What is None is chosen by measuring.
    """

    info: BundleInfo
    bundle: Bundle

    def __init__(
        self,
        path: str | Path,
        *,
        engine: str = "auto",
        threads: int | None = None,
        workers: int | None = None,
        batch: int | None = None,
        queue: int | None = None,
        max_wait_ms: float = 0,
        pixels: int = 40_000_000,
        side: int = 12_000,
        formats: Sequence[str] = ("JPEG", "PNG", "WebP", "BMP"),
        decode_seconds: float = 1.5,
        threshold: float | None = None,
        observe: Observe | None = None,
        patience: float = PATIENCE,
    ) -> None:
        _check_settings(workers, batch, queue, formats, threshold)
        self.limits = Limits(pixels, side, tuple(formats), decode_seconds)
        self.limit = queue or 0
        self.depth = 0
        self.explains = False
        self._path, self._engine_name, self._threads = Path(path), engine, threads
        self._worker_count, self._batch, self._patience = workers, batch, patience
        self._max_wait, self._threshold = max_wait_ms / 1000, threshold
        self._told = self._observe = observe or _nobody
        self._pending: set[_Pending] = set()
        self._held, self._compute, self._decode, self._pace = 0, 0.0, 0.0, 0.0
        self._state = "starting"
        self._empty: asyncio.Future[None] | None = None
        self._workers: Workers | None = None
        self._batcher: Batcher | None = None

    async def start(self) -> None:
        """Opens the bundle, checks its answers, starts the processes and has each decode once.

        Raises UsageError for a path or an engine that cannot be had, DataError for a damaged
        bundle, for one that does not give the answers that it carries, and where no process starts.
        """
        self._loop = asyncio.get_running_loop()
        try:
            await asyncio.to_thread(self._open)
            threads = self.engine.setting.threads
            usual = min(MOST, max(FEWEST, usable_cores() - threads))
            count = self._worker_count or usual
            self.limit = self.limit or 4 * self.batch * count
            self._workers = Workers(count, self.info.preprocess, self.limits)
            await self._workers.start()
            self._batcher = Batcher(self._run, self.batch, self._max_wait, self._computed)
            await self._warm(count)
        except BaseException:
            await self.stop(0.0)
            raise
        self._state = "ready"

    def _open(self) -> None:
        """What takes long and needs no event loop."""
        self.bundle = read_bundle(self._path)
        self.info = self.bundle.info
        most = max(1, usable_cores() - 1)  # one core decodes and speaks HTTP meanwhile
        self.engine = open_bundle(self.bundle, self._engine_name, self._threads, most=most)
        self.explains = self.info.explains
        check_answers(self.bundle, self.engine)
        economy = measure(self.engine, self.info.preprocess.size, 1 if self._batch else BATCH)
        best, self._compute = economy.best
        self.batch = self._batch or best

    async def _warm(self, count: int) -> None:
        """A picture through every process and the engine, so that the first guest need not wait."""
        stream, kind = io.BytesIO(), self.limits.formats[0]
        picture = Image.fromarray(check_pictures(self.info.preprocess.size, 1)[0])
        picture.save(stream, kind)
        self._observe = _nobody
        asks = [self._through(Ask(stream.getvalue())) for _ in range(count)]
        await asyncio.gather(*asks)
        self._observe = self._told

    @property
    def room(self) -> bool:
        """Whether an ask would be accepted now; costs nothing, so it can be asked before a body is
        read."""
        return self._state == "ready" and self._fits(0)

    @property
    def problem(self) -> str | None:
        """Why the service is not ready for more, None where it is."""
        if self._state != "ready":
            return self._state
        if self._workers is not None and self._workers.failing:
            return "decoding processes die: three within a minute"
        if self.depth > NEARLY * self.limit:
            return f"{self.depth} of {self.limit} places are taken"
        return None

    @property
    def restarts(self) -> int:
        """Decoding processes that were replaced."""
        return self._workers.restarts if self._workers is not None else 0

    @property
    def pids(self) -> list[int]:
        """The decoding processes that live now."""
        return self._workers.pids if self._workers is not None else []

    @property
    def wait(self) -> float:
        """Seconds that an ask which comes now has to wait for those inside, as far as is known."""
        decode = self._decode / self._workers.count if self._workers is not None else 0.0
        return self.depth * max(self._compute, decode, self._pace)

    def _fits(self, size: int, left: float = inf) -> bool:
        """Whether one more ask of `size` bytes with `left` seconds may come in."""
        if not self.depth:
            return True
        inside = self.depth < self.limit and self._held + size <= HELD
        return inside and self.wait <= min(self._patience, left)

    async def answer(self, ask: Ask) -> Answer:
        """What a picture shows. Raises Refused; cancelled, the ask is dropped before computing."""
        if not ask.body:
            raise Refused("empty", "there is no picture in the request", "send a picture's bytes")
        if self._state == "draining":
            raise refusals.draining()
        left = ask.deadline - time.monotonic()
        if left <= 0:
            raise refusals.late()
        if self._state != "ready" or not self._fits(len(ask.body), left):
            raise refusals.busy(self.wait)
        return await self._through(ask)

    async def _through(self, ask: Ask) -> Answer:
        """An accepted ask's whole way."""
        assert self._workers is not None
        job = _Pending(self, ask, self.depth)
        self._pending.add(job)
        self.depth += 1
        self._held += job.held
        alarm = None
        if ask.deadline != inf:
            left = ask.deadline - time.monotonic()
            alarm = self._loop.call_later(left, job.refused, refusals.late())
        self._workers.put(job)
        try:
            return await job.future
        finally:
            if alarm is not None:
                alarm.cancel()
            self._leave(job)

    def _leave(self, job: _Pending) -> None:
        """Frees the place of an ask."""
        job.body = b""
        self._pending.discard(job)
        self._held -= job.held
        self.depth -= 1
        if not self.depth and self._empty is not None and not self._empty.done():
            self._empty.set_result(None)

    def _decoded(self, job: _Pending) -> None:
        """A picture comes from its process."""
        pixels = job.pixels
        assert job.found is not None
        self._decode += FRESH * (job.found.seconds - self._decode)
        if job.wanted and self._batcher is not None:
            self._held += pixels.nbytes - job.held
            job.held, job.body = pixels.nbytes, b""
            self._batcher.put(job)

    def _run(self, jobs: Sequence[_Pending]) -> _Computed:
        """In the engine's thread: a batch through the engine."""
        images = np.stack([job.pixels for job in jobs])
        if self.explains and any(job.ask.explain for job in jobs):
            return self.engine.explain(images)
        return self.engine.run(images), None

    def _computed(
        self, jobs: Sequence[_Pending], found: _Computed | Exception, began: float, seconds: float
    ) -> None:
        """In the engine's thread: a batch is done."""
        try:
            self._loop.call_soon_threadsafe(self._answered, jobs, found, began, seconds)
        except RuntimeError:  # the loop is closed: nobody waits
            return

    def _answered(
        self, jobs: Sequence[_Pending], found: _Computed | Exception, began: float, seconds: float
    ) -> None:
        """Every picture of a batch gets its own row; one without numbers fails alone."""
        now = time.perf_counter()
        self._compute += FRESH * (seconds / len(jobs) - self._compute)
        self._observe("compute", seconds)
        self._observe("batch", len(jobs))
        for place, job in enumerate(jobs):
            if job.future.done():
                continue
            if isinstance(found, Exception) or not np.isfinite(found[0][place]).all():
                job.refused(refusals.broken_engine())
                continue
            job.queue += began - job.queued
            patches = None if found[1] is None or not job.ask.explain else found[1][place]
            answer = self._words(job, found[0][place], patches, seconds, len(jobs))
            self._observe("queue", answer.queue)
            self._observe("decode", answer.decode)
            self._note_pace(job, now)
            job.future.set_result(answer)

    def _note_pace(self, job: _Pending, now: float) -> None:
        """What a picture takes on its whole way, learnt from those that came into a full house."""
        assert self._workers is not None
        if job.ahead >= 2 * max(self._workers.count, self.batch):
            self._pace += FRESH * ((now - job.entered) / (job.ahead + 1) - self._pace)

    def _words(
        self, job: _Pending, row: np.ndarray, patches: Any, seconds: float, together: int
    ) -> Answer:
        """Probabilities (K,) as an answer."""
        info, found = self.info, job.found
        assert found is not None
        order = np.argsort(-row, kind="stable")
        best = order[: max(1, job.ask.top)].tolist()
        labels, confidence, threshold = None, float(row[order[0]]), self.threshold
        abstain = confidence < threshold
        if info.thresholds:
            said = decide(row[None], info.thresholds)[0]
            labels = [(info.classes[k], float(row[k])) for k in order if said[k]]
            threshold, abstain = info.thresholds[order[0]], not labels
        return Answer(
            [(info.classes[k], float(row[k])) for k in best],
            labels,
            confidence,
            abstain,
            threshold,
            found.width,
            found.height,
            found.format,
            found.picture,
            job.queue,
            found.seconds,
            seconds,
            together,
            found.seen,
            None if patches is None else np.asarray(patches, np.float64).tolist(),
        )

    @property
    def threshold(self) -> float:
        """The confidence below which an answer is "not sure"; of multilabel bundles each class has
        its own in `info.thresholds`."""
        sure = self._threshold if self._threshold is not None else self.info.sure
        return THRESHOLD if sure is None else sure

    def drain(self) -> None:
        """From now on asks are refused; those inside are answered."""
        self._state = "draining"

    async def stop(self, grace: float) -> None:
        """Drains for `grace` seconds at most, refuses what is left and ends every process and
        thread. May be called twice, and before `start`."""
        self.drain()
        if self.depth and grace > 0:
            self._empty = asyncio.get_running_loop().create_future()
            await asyncio.wait([self._empty], timeout=grace)
        for job in list(self._pending):
            job.refused(refusals.draining())
        batcher, self._batcher = self._batcher, None
        if self._workers is not None:
            await self._workers.stop()
        if batcher is not None:
            await asyncio.to_thread(batcher.stop)


_Computed = tuple[np.ndarray, np.ndarray | None]


def check_answers(bundle: Bundle, engine: Engine) -> None:
    """Raises DataError unless the engine gives numbers and, in fp32, the answers to the check
    pictures that the bundle carries (`verify.TOLERANCE`)."""
    info = bundle.info
    pictures = info.check_pictures if info.check else check_pictures(info.preprocess.size, 1)
    found = engine.run(pictures)
    advice = "export the run again, or try another engine with --engine"
    if not np.isfinite(found).all():
        raise DataError(
            f"{engine.setting.engine} gave probabilities that are not numbers (NaN or infinite)",
            "Finite numbers for every picture",
            advice,
        )
    if not info.check or engine.setting.precision != "fp32":
        return
    off = float(np.abs(found - np.asarray(info.check)).max())
    if off > TOLERANCE:
        raise DataError(
            f"{engine.setting.engine} answers the check pictures in {bundle.path} off by {off:.2g}",
            f"No more than {TOLERANCE:g}: what is served has to be what was trained",
            advice,
        )


def _check_settings(
    workers: int | None,
    batch: int | None,
    queue: int | None,
    formats: Sequence[str],
    threshold: float | None,
) -> None:
    """Raises UsageError for what makes no sense."""
    for name, value in (("workers", workers), ("batch", batch), ("queue", queue)):
        if value is not None and value < 1:
            raise UsageError(f"--{name} {value}", "One or more", f"--{name} 1")
    unknown = [one for one in formats if one not in FORMATS]
    if unknown or not formats:
        raise UsageError(
            f"formats {', '.join(formats) or 'without a name'}",
            f"Out of {', '.join(FORMATS)}",
            "leave them out for the usual ones",
        )
    if threshold is not None and not 0 <= threshold <= 1:
        raise UsageError(f"--threshold {threshold}", "From 0 to 1", "--threshold 0.5")


def _nobody(name: str, value: float) -> None:
    """Nobody wants to know."""
