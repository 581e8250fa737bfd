# SPDX-License-Identifier: Apache-2.0
"""card.md, written behind what a verb has done: a card that fails never spoils the work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from crosspatch.errors import reason


def renew(screen: Any, run: Path, note: Callable[[], bool] | None = None) -> str | None:
    """Write the card of the run in `run` and return its path; None where there was nothing new to
    say (`note` gave False) or it could not be written, which the screen then says."""
    try:
        if note is not None and not note():
            return None
        from crosspatch.report.card import write_card

        return str(write_card(run))
    except Exception as error:
        screen.line(f"card.md was not written: {reason(error)}", "yellow")
        return None
