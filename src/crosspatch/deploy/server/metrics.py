# SPDX-License-Identifier: Apache-2.0
"""What /metrics tells Prometheus; a registry of its own, so that nothing else is mixed in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    ProcessCollector,
    generate_latest,
)

if TYPE_CHECKING:
    from crosspatch.deploy.server.service import Service

SECONDS = (
    0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0,
)  # fmt: skip
SHED = ("busy", "draining", "deadline")
"""Codes of requests that were turned away because there was too much to do."""


class Metrics:
    """Counters and histograms of one server. `observe` may be called from any thread."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        own: Any = {"registry": self.registry}
        ProcessCollector(**own)  # memory, processor seconds, open files of this process
        self._requests = Counter(
            "crosspatch_requests", "Requests by path and status", ["path", "status"], **own
        )
        self._errors = Counter("crosspatch_errors", "Refusals by code", ["code"], **own)
        self._shed = Counter("crosspatch_shed", "Requests turned away for want of room", **own)
        self._whole = Histogram(
            "crosspatch_request_seconds", "From head to answer of pictures that got one",
            buckets=SECONDS, **own,
        )  # fmt: skip
        self._parts = {
            name: Histogram(f"crosspatch_{name}_seconds", text, buckets=SECONDS, **own)
            for name, text in (
                ("queue", "Wait for a place"),
                ("decode", "Decoding of one picture"),
                ("compute", "The model's work on one batch"),
            )
        } | {
            "batch": Histogram(
                "crosspatch_batch_pictures", "Pictures computed together",
                buckets=(1, 2, 4, 8, 16, 32, 64), **own,
            )
        }  # fmt: skip
        self._gauges = {
            name: Gauge(f"crosspatch_{name}", text, **own)
            for name, text in (
                ("queue_depth", "Pictures waiting now"),
                ("queue_limit", "Pictures that may wait"),
                ("ready", "1 when /readyz says yes"),
                ("body_bytes", "Bytes of bodies in memory now"),
            )
        }
        self._restarts = Counter(
            "crosspatch_worker_restarts", "Decoding processes that were replaced", **own
        )
        self._seen = 0
        self._model = Info("crosspatch_model", "What is served", **own)
        self._paths: dict[tuple[str, int], Counter] = {}

    def observe(self, name: str, value: float) -> None:
        """A duration in seconds (queue, decode, compute) or a number of pictures (batch)."""
        if name in self._parts:
            self._parts[name].observe(value)

    def answered(self, path: str, status: int, code: str, seconds: float) -> None:
        """A request is over. path: one that there is, or "other"; code: "ok" or of an error;
        seconds: from its head on."""
        key = path, status
        if key not in self._paths:
            self._paths[key] = self._requests.labels(path, str(status))
        self._paths[key].inc()
        if code != "ok":
            self._errors.labels(code).inc()
            if code in SHED:
                self._shed.inc()
        elif path.startswith("/predict"):
            self._whole.observe(seconds)

    def model(self, service: Service) -> None:
        """What stands in the information about the model."""
        info = service.info
        setting = service.engine.setting
        self._model.info({
            "bundle": service.bundle.hash, "architecture": info.architecture,
            "precision": setting.precision, "engine": setting.engine,
            "threads": str(setting.threads),
        })  # fmt: skip

    def text(self, service: Service, ready: bool, held: int) -> bytes:
        """All of it, in Prometheus' text format."""
        now = {"queue_depth": service.depth, "queue_limit": service.limit}
        for name, value in (now | {"ready": int(ready), "body_bytes": held}).items():
            self._gauges[name].set(value)
        self._restarts.inc(max(0, service.restarts - self._seen))
        self._seen = max(self._seen, service.restarts)
        return generate_latest(self.registry)
