# SPDX-License-Identifier: Apache-2.0
"""Which engine runs a bundle, and on how many threads: measured once, kept per machine and bundle.

First the engines take turns on all cores; then the faster one takes turns with itself on half of
them and on one. Opening costs more than measuring (up to 5 s of OpenVINO for 27 M parameters on
four busy cores), so fewer threads are tried only while PATIENCE lasts. The answer is kept in
engines.json of the user's cache (`crosspatch.cache`) under everything it depends on: the bundle's
hash, the batch, the processor and its usable cores, the versions of the engines. Where the cache is
damaged or cannot be written, the measurement is made again. This module does not import torch.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from crosspatch.cache import remembered
from crosspatch.deploy.bundle import Bundle, check_pictures
from crosspatch.deploy.engines import ENGINES, BundleEngine, Engine, Setting, available, open_engine
from crosspatch.errors import CrosspatchError, UsageError
from crosspatch.metrics.latency import alternate
from crosspatch.processor import processor, usable_cores
from crosspatch.versions import installed

SECONDS = 0.4
"""How long the turns of one stage go on; there are two stages."""
TURN = 0.05  # seconds; of large networks fewer pictures than asked are taken, so that it fits in
PATIENCE = 4.0  # seconds, after which no further engine is opened
CACHE = "engines.json"


def choose(
    bundle: Bundle, batch: int = 1, engines: Sequence[str] = ENGINES, threads: int | None = None
) -> Setting:
    """The fastest engine and thread count for batches of `batch` pictures on this machine.

    A batch of which one turn would take longer than TURN is measured with fewer pictures.
    engines: those that may be chosen; threads: at most so many, None for all cores. The precision
    is that of the file: bf16 is never chosen. Raises UsageError when no engine is installed for
    this kind of bundle, DataError when none can load it.
    """
    candidates = [one for one in available(bundle) if one[0] in engines and one[1] != "bf16"]
    if not candidates:
        needs = "openvino" if bundle.format == "openvino" else "onnxruntime or openvino"
        raise UsageError(
            f"no engine for {bundle.path}",
            f"{needs}, installed",
            "pip install 'crosspatch[onnx]' or pip install 'crosspatch[openvino]'",
        )
    cores = min(threads or usable_cores(), usable_cores())
    key = _key(bundle, batch, candidates, cores)
    kept = remembered(CACHE, key, lambda: list(_measure(bundle, batch, candidates, cores)))
    return _setting(kept, candidates, cores) or _measure(bundle, batch, candidates, cores)


def open_bundle(
    bundle: Bundle,
    engine: str = "auto",
    threads: int | None = None,
    batch: int = 1,
    *,
    most: int | None = None,
) -> BundleEngine:
    """The engine that `engine` names for a bundle. most: threads, where their number is chosen.
    Raises UsageError for what cannot be had here, DataError for a damaged file."""
    name, _, precision = engine.partition("-")
    if name == "torch":
        raise UsageError(
            f"engine torch for {bundle.path}",
            "torch runs the folder of a run; a bundle is for onnxruntime or openvino",
            "name the folder of the run, or leave --engine out",
        )
    if threads is not None and engine != "auto":
        return open_engine(bundle, name, precision or None, threads)
    if precision:  # its threads are those that serve fp32 best; refused before that is measured
        open_engine(bundle, name, precision, usable_cores())
    chosen = choose(bundle, batch, ENGINES if name == "auto" else [name], threads or most)
    wanted = Setting(chosen.engine, precision or chosen.precision, threads or chosen.threads)
    return open_engine(bundle, *wanted)


def _measure(
    bundle: Bundle, batch: int, candidates: Sequence[tuple[str, str]], cores: int
) -> Setting:
    """Engines against each other on all cores, then thread counts of the fastest."""
    opened, failures, end = [], [], time.perf_counter() + PATIENCE
    for name, precision in candidates:
        try:
            opened.append(open_engine(bundle, name, precision, cores))
        except CrosspatchError as error:
            failures.append(error)
    if not opened:
        raise failures[0]
    pictures = _pictures(bundle, batch, opened[0])
    best = _fastest(pictures, opened)
    opened = [best]  # the others are closed
    for threads in sorted({1, (cores + 1) // 2} - {cores}, reverse=True):
        if time.perf_counter() < end:
            opened.append(open_engine(bundle, *best.setting._replace(threads=threads)))
    return _fastest(pictures, opened).setting


def _pictures(bundle: Bundle, batch: int, engine: Engine) -> np.ndarray:
    """Up to `batch` pictures, as many as `engine` answers in TURN."""
    size = bundle.info.preprocess.size
    one = check_pictures(size, 1)
    engine.run(one)
    began = time.perf_counter()
    engine.run(one)
    took = max(time.perf_counter() - began, 1e-6)
    return check_pictures(size, max(1, min(batch, int(TURN / took))))


def _fastest(pictures: np.ndarray, engines: Sequence[Engine]) -> Engine:
    if len(engines) == 1:
        return engines[0]
    calls: dict[str, Callable[[], object]] = {
        str(place): lambda engine=engine: engine.run(pictures)
        for place, engine in enumerate(engines)
    }
    began = time.perf_counter()
    for call in calls.values():
        call()
    left = SECONDS - (time.perf_counter() - began)
    settle = 1 if left > SECONDS / 2 else 0
    times = alternate(calls, seconds=left, least=1, warm=0, settle=settle)
    return engines[min(range(len(engines)), key=lambda place: times[str(place)].median)]


def _key(bundle: Bundle, batch: int, candidates: Sequence[tuple[str, str]], cores: int) -> str:
    """A digest of everything the choice depends on."""
    versions = installed(name for name, _ in candidates)
    machine = [processor().describe(), cores]
    facts = [bundle.hash, batch, [list(one) for one in candidates], machine, versions]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _setting(kept: Any, candidates: Sequence[tuple[str, str]], cores: int) -> Setting | None:
    """The setting that the cache holds, when it makes sense."""
    if not isinstance(kept, list) or len(kept) != 3:
        return None
    engine, precision, threads = kept
    whole = isinstance(threads, int) and not isinstance(threads, bool)
    if (engine, precision) not in candidates or not whole or not 1 <= threads <= cores:
        return None
    return Setting(engine, precision, threads)
