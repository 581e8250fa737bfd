# SPDX-License-Identifier: Apache-2.0
"""What is done when a loss is no longer finite: find the step, name its pictures, go back.

The run goes back to the last validation before the bad step, and from there on its rate is `CUT`
times what it was; after `TRIES` times it gives up. Where it goes back to depends on steps alone,
never on when a state happened to be saved: a state older than that validation is trained up to it
again, with the rates it had. So a run that was killed ends with the numbers of one that was not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crosspatch.errors import DataError, UsageError
from crosspatch.training import team
from crosspatch.training.state import BEFORE, GOOD, LAST, read_state

CUT = 0.5
TRIES = 3
NAN_COLUMNS = ("try", "step", "what", "value", "back_to", "rate_factor", "path")
WHATS = ("loss", "gradient", "weights", "validation")
SHOWN = 3  # pictures named on the screen; nan.csv has all

Cut = tuple[int, float]


class NotFinite(Exception):
    """Something that must be finite is not.

    step: the step that did it, from 0; what: one of `WHATS`; value: what was found;
    index: (B,) int64, the pictures of its batch, as positions in the set.
    """

    def __init__(self, step: int, what: str, value: float, index: Tensor) -> None:
        super().__init__(f"{what} {value} at step {step}")
        self.step, self.what, self.value, self.index = step, what, value, index


class Watch:
    """Keeps the figures of the steps on their device until `check` reads them all at once, so that
    no step has to wait for a GPU."""

    def __init__(self) -> None:
        self._unread: list[tuple[int, str, Tensor, Tensor]] = []
        self.last = torch.zeros(0, dtype=torch.int64)

    def note(self, step: int, what: str, value: Tensor, index: Tensor) -> None:
        """A figure of a step: a scalar on any device; index: the pictures of its batch."""
        self._unread.append((step, what, value.detach(), index))
        self.last = index

    def found(self) -> NotFinite | None:
        """The first figure since the last call that is not finite, in this process."""
        unread, self._unread = self._unread, []
        if not unread:
            return None
        for (step, what, _, index), value in zip(
            unread, torch.stack([one[2].float() for one in unread]).tolist(), strict=True
        ):
            if not math.isfinite(value):
                return NotFinite(step, what, value, index)
        return None

    def check(self) -> None:
        """Raises NotFinite for the first figure since the last call that is not finite, in any
        process."""
        found = self.found()
        if team.either(found is not None)[0]:
            raise agreed(found)


def agreed(found: NotFinite | None) -> NotFinite:
    """What all processes say of a step when at least one has found something in it: the earliest,
    a loss before a gradient, with the pictures of those that found just that."""
    mine = [found.step, found.what, found.value, found.index.tolist()] if found else None
    told = [one for one in team.gather(mine) if one is not None]
    step, what = min((one[0], WHATS.index(one[1])) for one in told)
    same = [one for one in told if (one[0], one[1]) == (step, WHATS[what])]
    index = torch.tensor([place for one in same for place in one[3]], dtype=torch.int64)
    return NotFinite(step, WHATS[what], same[0][2], index)


def spoilt(named: Iterable[tuple[str, Tensor]]) -> str | None:
    """The first of these tensors that holds a value that is not finite, by name."""
    for name, tensor in named:
        # a sum is several times cheaper, and can only be wrong in one direction
        if not math.isfinite(float(tensor.detach().sum())) and not bool(tensor.isfinite().all()):
            return name
    return None


def factor(cuts: Sequence[Cut], step: int) -> float:
    """What the rate of a step is multiplied with; a cut (from, factor) holds from its step on."""
    return math.prod(times for start, times in cuts if start <= step)


def boundary(due: Sequence[int], step: int) -> int:
    """The step to go back to when `step` was bad: the last validation before it, or the start."""
    return max((at for at in due if at <= step), default=0)


def good_state(
    folder: Path, step: int, cuts: Sequence[Cut], same: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The newest whole state at `step` or before it that lies on the way given by `cuts`.

    same: what its metadata must hold besides. A state is on the way when the steps that led to it
    had the rates that `cuts` gives them; others are of a try that was given up.
    """
    best = None
    for name in (LAST, BEFORE, GOOD):
        try:
            tensors, meta = read_state(folder / name)
        except DataError:
            continue
        at = meta["step"]
        had = [tuple(cut) for cut in meta["stepper"].get("cuts", ()) if cut[0] < at]
        fits = had == [tuple(cut) for cut in cuts if cut[0] < at]
        fits = fits and all(meta.get(key) == value for key, value in same.items())
        if fits and at <= step and (best is None or at > best[1]["step"]):
            best = tensors, meta
    return best


def nan_rows(found: NotFinite, number: int, back: int, keys: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of nan.csv: one for each picture of the bad batch (`keys`)."""
    row = {
        "try": number,
        "step": found.step + 1,
        "what": found.what,
        "value": found.value,
        "back_to": back if number <= TRIES else None,
        "rate_factor": CUT**number if number <= TRIES else None,
    }
    return [{**row, "path": key} for key in keys]


def describe(found: NotFinite, keys: Sequence[str]) -> str:
    """What happened, in words: `the loss became nan at step 12 (a.png, b.png and 6 more)`."""
    named = ", ".join(keys[:SHOWN])
    more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
    return f"the {found.what} became {found.value} at step {found.step + 1:,} ({named}{more})"


def give_up(
    found: NotFinite, keys: Sequence[str], lr: float, table: Path, *, stateless: bool = False
) -> UsageError:
    """The error after the last try, or when no state to go back to was left (`stateless`).

    lr: the peak rate that the run was begun with; table: where nan.csv lies.
    """
    why = (
        "and no state from before is left" if stateless else f"after {TRIES} tries with lower rates"
    )
    return UsageError(
        f"{describe(found, keys)}, {why}",
        f"finite numbers; {table} lists the pictures of every bad batch",
        "look at those pictures, then train anew with --overwrite and a lower rate "
        f"(--lr {lr * CUT ** (TRIES + 1):.1g}) or --precision fp32",
    )
