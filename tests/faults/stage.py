"""Where faults are played: pictures, a run that nothing disturbs, and commands in forked copies."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from safetensors.torch import load_file

from crosspatch.cli.main import main
from crosspatch.data.opening import open_source
from crosspatch.errors import DataError
from crosspatch.training import loop, plan, session
from crosspatch.training.state import LAST, load_state, read_state

NOTHING = "nothing"
TIMES = ("elapsed", "images_per_second")
SETTINGS = ("--model", "vit_micro_32", "--size", 16, "--batch", 8, "--epochs", 4)
PER_CLASS = 50
Hook = Callable[[], Any]


class Found(NamedTuple):
    """What a case ends with: in words what happened, and what was lost ("nothing", or names)."""

    happened: str
    lost: str


class Case(NamedTuple):
    """One row of the table: `do(stage, number)` is played `times` times, numbered from 0."""

    what: str
    times: int
    do: Callable[[Stage, int], Found]


CASES: list[Case] = []


def case(what: str, times: int = 1) -> Callable:
    """Make a function a row of the table; `times`: how often `make faults` plays it."""

    def keep(do: Callable[[Stage, int], Found]) -> Callable[[Stage, int], Found]:
        CASES.append(Case(what, times, do))
        return do

    return keep


class Told(NamedTuple):
    """How a command ended: its exit code (negative: the signal), what it printed, seconds."""

    code: int
    text: str
    seconds: float

    def must(self, code: int, *words: str) -> Told:
        """Itself, where it ended with this code and these words; else the case has failed."""
        if self.code != code or not all(word in self.text for word in words):
            raise AssertionError(f"exit {self.code}, not {code} with {words}:\n{self.text[-2000:]}")
        return self


class Command:
    """A command in a forked copy of this process, in a process group of its own."""

    def __init__(self, log: Path, words: tuple[Any, ...], hooks: tuple[Hook, ...]) -> None:
        self.log, self.began = log, time.monotonic()
        self.pid = os.fork()
        if self.pid == 0:
            self._play([str(word) for word in words], hooks)

    def _play(self, words: list[str], hooks: tuple[Hook, ...]) -> None:
        code = 70
        try:
            os.setpgid(0, 0)
            sys.stdout = sys.stderr = self.log.open("a", buffering=1)
            for number in (1, 2):
                os.dup2(sys.stdout.fileno(), number)
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            for hook in hooks:
                hook()
            code = main(words)
        except KeyboardInterrupt:
            code = 130
        except SystemExit as end:  # of several processes that end, one that lets another speak
            code = int(end.code or 0)
        finally:
            sys.stdout.flush()
            os._exit(code)

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self) -> Told:
        """Its end. Processes that it left behind are given five seconds, then are a failure."""
        _, status = os.waitpid(self.pid, 0)
        told = Told(os.waitstatus_to_exitcode(status), self.text, time.monotonic() - self.began)
        until = time.monotonic() + 10
        while self._alive():
            if time.monotonic() > until:
                os.killpg(self.pid, signal.SIGKILL)
                raise AssertionError("processes were left behind")
            time.sleep(0.02)
        return told

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def _alive(self) -> bool:
        try:
            os.killpg(self.pid, 0)
        except ProcessLookupError:
            return False
        return True


class Stage:
    """A folder with `photos`, and `whole`: a run of them that nothing disturbed.

    `patch(room, name, value)` sets how often runs here save and validate.
    """

    def __init__(self, folder: Path, patch: Callable[[Any, str, Any], None] = setattr) -> None:
        self.folder, self.photos = folder, folder / "photos"
        self.count = 0
        patch(session, "fit", partial(loop.fit, save_seconds=0.0, save_long_seconds=0.1))
        seen = lambda recipe, *_: recipe  # else the machine's load decides on validations
        patch(plan, "space_evaluations", seen)
        self._draw()
        self.whole = self.folder / "whole"
        # in this process, so that what it imports need not be imported in every copy
        words = ("train", self.photos, "--out", self.whole, *SETTINGS)
        if main([str(word) for word in words]) != 0:
            raise RuntimeError("the undisturbed run did not end")

    def _draw(self) -> None:
        source = open_source("digits")
        for index, item in enumerate(source.items):
            kind, name = item.key.split("/")
            place = self.photos / kind
            if int(kind) < 3:
                place.mkdir(parents=True, exist_ok=True)
                if len(list(place.iterdir())) < PER_CLASS:
                    Image.fromarray(source.read(index)).save(place / f"{name}.png")

    def new(self) -> Path:
        """A name for another run."""
        self.count += 1
        return self.folder / f"run{self.count}"

    def start(
        self, out: Path, *words: Any, hooks: tuple[Hook, ...] = (), data: Any = None
    ) -> Command:
        """`crosspatch train photos --out OUT` and `words`; without any, the settings of `whole`."""
        log, words = self.folder / f"log-{time.monotonic_ns()}", words or SETTINGS
        return Command(log, ("train", data or self.photos, "--out", out, *words), hooks)

    def run(self, out: Path, *words: Any, hooks: tuple[Hook, ...] = (), data: Any = None) -> Told:
        """`start`, and its end."""
        return self.start(out, *words, hooks=hooks, data=data).wait()

    def finish(self, out: Path, **how: Any) -> str:
        """Continue `out` to its end; what it then lacks beside the undisturbed run."""
        begun = (out / "config.toml").exists()
        self.run(out, *(("--resume",) if begun else SETTINGS), **how).must(0)
        return self.lost(out)

    def lost(self, out: Path, whole: Path | None = None) -> str:
        """Names of results that are not those of the undisturbed run, bit for bit, or "nothing"."""
        one, two = results(whole or self.whole), results(out)
        differ = sorted(name for name in one.keys() | two.keys() if one.get(name) != two.get(name))
        return ", ".join(differ[:5]) or NOTHING

    def stopped(self, hooks: tuple[Hook, ...] = ()) -> Path:
        """A run with two states and more, stopped by SIGTERM before its end."""
        out = self.new()
        command = self.start(out, hooks=hooks)
        self.wait_for(out, command, step=12)
        command.signal(signal.SIGTERM)
        command.wait().must(4, "--resume")
        return out

    def wait_for(self, out: Path, command: Command, step: int) -> None:
        """Until a state of `step` or later lies on the disk."""
        until = time.monotonic() + 60
        while saved(out) < step:
            if time.monotonic() > until or os.waitpid(command.pid, os.WNOHANG)[0]:
                raise AssertionError(f"no state came:\n{command.text[-2000:]}")
            time.sleep(0.005)

    def clear(self) -> None:
        """Free the disk of all but the pictures and the undisturbed run."""
        for path in (*self.folder.glob("run*"), *self.folder.glob("log-*")):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def saved(out: Path) -> int:
    """The step of the newest state; -1 without one."""
    try:
        return read_state(out / "last" / LAST)[1]["step"]
    except (DataError, RuntimeError):  # none yet, or moved on while it was read
        return -1


def results(out: Path) -> dict[str, Any]:
    """Everything that a run ends with, times apart: weights, averages, moments, tables, figures."""
    found: dict[str, Any] = {}
    tensors, meta, _ = load_state(out / "last")
    model = load_file(out / "model" / "model.safetensors")
    for room, some in (("state", tensors), ("model", model)):
        found |= {f"{room}/{name}": tensor.numpy().tobytes() for name, tensor in some.items()}
    found["step"] = meta["step"]
    for name in ("metrics.csv", "predictions.csv", "split.csv"):
        with (out / name).open() as file:
            rows = [
                {k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(file)
            ]
        found[name] = rows
    report = json.loads((out / "report.json").read_text())
    return found | {f"report {key}": report[key] for key in ("val", "test", "calibration", "best")
                    if key != "best"}  # fmt: skip
