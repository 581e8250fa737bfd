"""Faults: kills, at every kind of moment, and signals."""

from __future__ import annotations

import signal
import time

import numpy as np

from crosspatch.cli.screen import Screen
from crosspatch.data.preprocess import Preprocess
from crosspatch.training import evaluation, judge, loop, state
from faults.stage import SETTINGS, Found, Stage, case, saved
from support import kills

STEPS = 40  # of the runs of the stage, at the least
AGAIN = "killed; the same command ended it"


def _killed(stage: Stage, *hooks: object) -> Found:
    """A run that a hook kills, and the end of it."""
    out = stage.new()
    stage.run(out, hooks=hooks).must(-signal.SIGKILL)
    stage.run(out, *SETTINGS).must(0)
    return Found(AGAIN, stage.lost(out))


@case("`kill -9` at a random step, before, in and after its parts", 20)
def at_random_steps(stage: Stage, number: int) -> Found:
    draw = np.random.default_rng([7, number])
    return _killed(stage, kills.in_step(int(draw.integers(STEPS)), kills.PLACES[draw.integers(5)]))


@case("`kill -9` again and again in one run, at random times")
def again_and_again(stage: Stage, number: int) -> Found:
    """Where a run ends before the next kill, the rest of them falls on another."""
    outs, draw, cut = [stage.new()], np.random.default_rng([8, number]), 0
    while cut < 6:
        command = stage.start(outs[-1], *SETTINGS)
        stage.wait_for(outs[-1], command, saved(outs[-1]) + 1)
        time.sleep(float(draw.uniform(0, 0.15)))
        command.signal(signal.SIGKILL)
        cut += command.wait().code == -signal.SIGKILL
        if (outs[-1] / "report.json").exists():
            outs.append(stage.new())
    lost = {stage.finish(out) for out in outs if out.exists()}
    return Found(f"killed {cut} times; `--resume` ended it", ", ".join(sorted(lost)))


@case("`kill -9` while pictures are read", 3)
def while_loading(stage: Stage, number: int) -> Found:
    return _killed(stage, kills.before_call(Screen, "progress", 1 + number))


@case("`kill -9` of a process that reads pictures")
def a_reader(stage: Stage, number: int) -> Found:
    out = stage.new()
    told = stage.run(out, hooks=(kills.before_call(Preprocess, "fit_image", 9),))
    told.must(3, "a process that decodes pictures was killed")
    stage.run(out).must(0)
    return Found("exit 3, named; begun anew", stage.lost(out))


@case("`kill -9` while a state is written", 6)
def while_writing(stage: Stage, number: int) -> Found:
    return _killed(stage, kills.while_writing(1 + number, 1 + 3 * number, pause=0.03))


@case("`kill -9` between the renames and flushes of a state", 6)
def between_renames(stage: Stage, number: int) -> Found:
    name, count = ("replace", "fsync")[number % 2], 6 + number
    return _killed(stage, kills.before_call(state.os, name, count))


@case("`kill -9` while the best model is written", 2)
def while_the_model_is_written(stage: Stage, number: int) -> Found:
    return _killed(stage, kills.before_call(loop, "save_model", 1 + number))


@case("`kill -9` in a validation", 3)
def in_a_validation(stage: Stage, number: int) -> Found:
    return _killed(stage, kills.before_call(evaluation, "normalise", 2 + number))


@case("`kill -9` in the last judgement, on val, on test, before the report", 3)
def in_the_judgement(stage: Stage, number: int) -> Found:
    judging = (
        kills.before_call(judge, "predict_probabilities"),
        kills.before_call(judge, "predict_probabilities", 2),
        kills.before_call(judge.RunFolder, "write_report"),
    )
    return _killed(stage, judging[number])


def _signalled(stage: Stage, *numbers: int) -> tuple[object, object, float]:
    out = stage.new()
    command = stage.start(out)
    stage.wait_for(out, command, 9)
    began = time.monotonic()
    for number in numbers:
        command.signal(number)
        time.sleep(0.001)
    return out, command.wait(), time.monotonic() - began


@case("SIGTERM", 3)
def terminated(stage: Stage, number: int) -> Found:
    out, told, seconds = _signalled(stage, signal.SIGTERM)
    told.must(4, "stopped by SIGTERM", "--resume")
    late = "" if seconds < 10 else f"{seconds:.0f} s until it ended; "
    return Found("exit 4 within 10 s; `--resume` ended it", late + stage.finish(out))


@case("Ctrl-C", 3)
def interrupted(stage: Stage, number: int) -> Found:
    out, told, _ = _signalled(stage, signal.SIGINT)
    told.must(4, "stopped by SIGINT", "--resume")
    return Found("exit 4; `--resume` ended it", stage.finish(out))


@case("Ctrl-C twice, at once", 3)
def interrupted_twice(stage: Stage, number: int) -> Found:
    out, told, _ = _signalled(stage, signal.SIGINT, signal.SIGINT)
    told.must(4, "--resume")
    return Found("exit 4 at once; `--resume` ended it", stage.finish(out))
