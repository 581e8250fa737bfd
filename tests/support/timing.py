"""Trainings that are timed for fewer steps than users' are."""

from __future__ import annotations

import pytest

from crosspatch.training import measure


@pytest.fixture(autouse=True)
def few_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps instead of seven are timed before a training."""
    monkeypatch.setattr(measure, "WARM", 1)
    monkeypatch.setattr(measure, "TIMED", 1)
