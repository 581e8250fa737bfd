"""What tests take the processor for, so that they ask the same of every machine."""

from __future__ import annotations

import pytest

from crosspatch.processor import Processor

PLAIN = Processor("some processor", 2, ("avx2",))


@pytest.fixture(autouse=True)
def without_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """No products in bfloat16: an engine less to expect, and none that is not judged."""
    monkeypatch.setattr("crosspatch.deploy.engines.computes_bf16", lambda: False)


@pytest.fixture
def plain_processor(monkeypatch: pytest.MonkeyPatch, without_bf16: None) -> None:
    """What `bench` measures in: the precisions that every processor has."""
    for name in ("bench", "subject", "bench_report"):
        monkeypatch.setattr(f"crosspatch.deploy.{name}.processor", lambda: PLAIN)
