# SPDX-License-Identifier: Apache-2.0
"""States written in a thread of their own, so that the training does not wait for the disk."""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crosspatch.training.state import LAST, keep_good, save_state


class StateWriter:
    """Writes states into `folder`, each from a copy that is made when `save` is called.

    One write at a time: `save` and `wait` wait for the one before. What went wrong in the thread is
    raised by the next call of `save`, `check` or `wait`. The copies are kept and used again: a
    state more of memory, and no time to ask the system for it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._copies: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(
        self,
        tensors: Mapping[str, Tensor],
        meta: dict[str, Any],
        name: str = LAST,
        *,
        good: bool = False,
    ) -> None:
        """Begin to write a state (see `save_state`); with `good` it is kept as the good one too.

        Raises UsageError when the one before could not be written.
        """
        self.wait()
        self._copy(tensors)
        told = copy.deepcopy(meta)
        # a daemon: who quits by a second Ctrl-C does not wait for the disk
        self._thread = threading.Thread(
            target=self._write, args=(told, name, good), name="state-writer", daemon=True
        )
        self._thread.start()

    def _copy(self, tensors: Mapping[str, Tensor]) -> None:
        copies = {}
        for name, tensor in tensors.items():
            kept = self._copies.get(name)
            if kept is None or kept.shape != tensor.shape or kept.dtype != tensor.dtype:
                kept = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            copies[name] = kept.copy_(tensor.detach(), non_blocking=True)
        if any(tensor.is_cuda for tensor in tensors.values()):
            torch.cuda.synchronize()
        self._copies = copies

    def _write(self, meta: dict[str, Any], name: str, good: bool) -> None:
        try:
            save_state(self.folder, self._copies, meta, name)
            if good:
                keep_good(self.folder)
        except BaseException as error:  # raised where the training waits for it
            self._error = error

    def check(self) -> None:
        """Raises what went wrong in a write that has ended; does not wait for one."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Wait until the state lies whole on the disk. Raises UsageError when it cannot be
        written; the state before it is then untouched."""
        self.close()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def close(self) -> None:
        """Wait for the thread, on the way out of a training; raises nothing."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
