"""What is costly to make is made by one of the test processes and read by all."""

from __future__ import annotations

import fcntl
from collections.abc import Callable
from pathlib import Path

import pytest


def once(folder: Path, make: Callable[[Path], None]) -> Path:
    """`folder`, made by the first of the test processes that needs it."""
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            aside = folder.with_suffix(".making")
            make(aside)
            aside.rename(folder)
    return folder


def shared(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A folder that all processes of this test run share."""
    base = tmp_path_factory.getbasetemp()
    return base if worker_id == "master" else base.parent
