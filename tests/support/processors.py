"""What tests take the processor for, so that they ask the same of every machine."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def without_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """No products in bfloat16: an engine less to expect, and none that is not judged."""
    monkeypatch.setattr("crosspatch.deploy.engines.computes_bf16", lambda: False)
