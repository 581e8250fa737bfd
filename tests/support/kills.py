"""Kills by SIGKILL at chosen places: a forked copy of the test process trains and ends itself.

A fork costs a tenth of a second where a new interpreter costs three; the kill is the real one, with
everything that dies and stays as it would. Each function below makes a hook: called in the child,
it arms the kill.
"""

from __future__ import annotations

import os
import signal
import time
import warnings
from collections.abc import Callable
from typing import Any

from torch.optim import AdamW

from crosspatch.data.preprocess import Preprocess
from crosspatch.objectives.supervised import Supervised
from crosspatch.training import evaluation, judge, loop, state
from crosspatch.training.optim import Ema
from crosspatch.training.stepper import Stepper

Hook = Callable[[], None]
PLACES = ("before", "forward", "update", "average", "after")


def die() -> None:
    """End this process as `kill -9` does."""
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def killed(hook: Hook, work: Callable[[], Any]) -> bool:
    """Do `work` in a forked child with `hook` armed; whether SIGKILL ended it (False: it came to
    its end)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons warn of fork
        child = os.fork()
    if child == 0:
        try:
            hook()
            work()
            os._exit(0)
        finally:
            os._exit(9)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, -signal.SIGKILL), f"the child ended with {code}"
    return code != 0


def before_call(room: Any, name: str, count: int = 1, *, pause: float = 0.0) -> Hook:
    """Kill at call number `count` of `room.name`, after a pause in which other threads go on."""

    def hook() -> None:
        real, calls = getattr(room, name), []

        def counted(*given: Any, **how: Any) -> Any:
            calls.append(1)
            if len(calls) == count:
                time.sleep(pause)
                die()
            return real(*given, **how)

        setattr(room, name, counted)

    return hook


def slow(room: Any, name: str, seconds: float) -> Hook:
    """Not a kill: every call of `room.name` takes so much longer."""

    def hook() -> None:
        real = getattr(room, name)

        def waiting(*given: Any, **how: Any) -> Any:
            time.sleep(seconds)
            return real(*given, **how)

        setattr(room, name, waiting)

    return hook


def in_step(number: int, place: str) -> Hook:
    """Kill in step `number` (from 0): before it, in the forward pass, before the optimiser's
    update, before that of the average, or after all of it."""
    inside = {
        "forward": (Supervised, "forward"),
        "update": (AdamW, "step"),
        "average": (Ema, "update"),
    }

    def hook() -> None:
        step = Stepper.step

        def watched(stepper: Stepper, batch: Any, epoch: int, at: int) -> None:
            if at == number and place == "before":
                die()
            if at == number and place in inside:
                room, name = inside[place]
                before_call(room, name)()
            step(stepper, batch, epoch, at)
            if at == number:
                die()

        Stepper.step = watched

    return hook


def while_writing(write: int, tensor: int, pause: float = 0.05) -> Hook:
    """Kill in the middle of the write of a state: it stalls before tensor `tensor` of write number
    `write` (from 1) while the training goes on, and then all dies."""

    def hook() -> None:
        real, writes = state.write_tensors, []

        def stalling(path: Any, tensors: Any, metadata: Any) -> None:
            writes.append(1)
            if len(writes) == write:
                before_call(state, "_bytes", tensor, pause=pause)()
            real(path, tensors, metadata)

        state.write_tensors = stalling

    return hook


WHEN: dict[str, Hook] = {
    "reading the first picture": before_call(Preprocess, "fit_image"),
    "reading the last pictures": before_call(Preprocess, "fit_image", 70),
    "the first validation": before_call(evaluation, "normalise"),
    "a later validation": before_call(evaluation, "normalise", 2),
    "writing the model": before_call(loop, "save_model"),
    "judging": before_call(judge, "predict_probabilities"),
    "judging the test pictures": before_call(judge, "predict_probabilities", 2),
    "writing the report": before_call(judge.RunFolder, "write_report"),
}
"""Kills in a whole training besides those in steps and writes."""
