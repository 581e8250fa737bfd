# SPDX-License-Identifier: Apache-2.0
"""The page that ends a command: written after everything else, and never at its cost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from crosspatch.errors import Interrupted, reason

if TYPE_CHECKING:
    from crosspatch.cli.screen import Screen


def told(screen: Screen, out: Path, write: Callable[[], Path], again: str) -> str | None:
    """Write the page of what is in the folder `out` and say where it is; its path, None where it
    failed: what was trained is whole all the same. again: what to type for another try.

    Raises Interrupted when it is stopped.
    """
    try:
        path = write()
    except KeyboardInterrupt as stop:
        kept = f"{out} is whole; only its page is missing"
        raise Interrupted("stopped by Ctrl-C", kept, again) from stop
    except Exception as error:  # whatever a page lacks, the run is there
        screen.line(f"the page could not be written: {reason(error)}", "yellow")
        screen.line(f"{out} is whole; only its page is missing", "yellow")
        screen.line(f"to try again, type: {again}", "yellow")
        return None
    screen._hide_bars()
    screen.line(f"to read what it came to, open {path}")
    return str(path)
