# SPDX-License-Identifier: Apache-2.0
"""How long a run's model takes for one picture on one core, and how large it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from crosspatch.metrics.latency import alternate
from crosspatch.processor import processor

ROUNDS = 200  # at most
LEAST = 20


def latency(run: str | Path, seconds: float = 1.0) -> dict[str, Any]:
    """{median, low, high (seconds; 5 and 95 % of the turns lie below), count, engine, precision,
    threads, processor} of torch with one thread and one picture at a time, in about `seconds`.

    The picture is decoded already. Raises DataError for a damaged run.
    """
    from crosspatch.deploy.loading import load
    from crosspatch.deploy.torch_engine import torch_threads

    predictor = load(run, engine="torch", device="cpu")
    picture = np.full((1, *predictor.preprocess.size, 3), 128, np.uint8)
    with torch_threads(1):
        call = lambda: predictor.engine.run(picture)
        took = alternate({"one": call}, seconds=seconds, least=LEAST, most=ROUNDS)["one"]
    return {
        "median": took.median, "low": took.low, "high": took.high, "count": took.count,
        "engine": "torch", "precision": "fp32", "threads": 1, "processor": processor().name,
    }  # fmt: skip


def weights_size(run: str | Path) -> int:
    """Bytes of the run's weights, 0 where it holds none."""
    path = Path(run) / "model" / "model.safetensors"
    return path.stat().st_size if path.is_file() else 0
