# SPDX-License-Identifier: Apache-2.0
"""One line of JSON per request, written by a thread: a reader that stalls does not stall answers.

Everything foreign goes through JSON's escapes with ASCII alone, so no request can add a line or
colour a terminal. Pictures are told by their sha256, never by their names or what is in them.
"""

from __future__ import annotations

import contextlib
import json
import queue
import threading
from typing import Any, TextIO

MOST = 10_000  # lines that may wait to be written; more are counted and left out


class Log:
    """Lines to a stream. With None as the stream nothing is written."""

    def __init__(self, stream: TextIO | None) -> None:
        self.stream, self.dropped = stream, 0
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        if stream is not None:
            self._thread = threading.Thread(target=self._write, name="log", daemon=True)
            self._thread.start()

    def __call__(self, **entry: Any) -> None:
        """One entry; None values are left out."""
        if self._thread is None:
            return
        if self._lines.qsize() >= MOST:
            self.dropped += 1
            return
        if self.dropped:
            entry["dropped_before"], self.dropped = self.dropped, 0
        self._lines.put(json.dumps({k: v for k, v in entry.items() if v is not None}))

    def close(self, seconds: float = 1.0) -> None:
        """Writes what waits, for at most `seconds`."""
        if self._thread is not None:
            self._lines.put(None)
            self._thread.join(seconds)

    def _write(self) -> None:
        assert self.stream is not None
        while (line := self._lines.get()) is not None:
            lines, last = [line], False
            with contextlib.suppress(queue.Empty):
                while len(lines) < 1000 and not last:
                    more = self._lines.get_nowait()
                    last = more is None
                    lines += [] if more is None else [more]
            with contextlib.suppress(OSError, ValueError):  # a full disk, a reader that has left
                self.stream.write("\n".join(lines) + "\n")
                self.stream.flush()
            if last:
                return
