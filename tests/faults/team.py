"""Faults: one of several processes that train together."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Sequence
from pathlib import Path

from crosspatch.training import launch, loop
from faults.stage import NOTHING, SETTINGS, Command, Found, Hook, Stage, case
from support import kills

WORLD = 2
ENDED = "another process of this training has ended"


def _team(stage: Stage, out: Path, *words: object, hooks: Sequence[Hook] = ()) -> list[Command]:
    """One command in two processes, as their launcher would begin them; hooks: of each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    common |= {"WORLD_SIZE": str(WORLD), "LOCAL_WORLD_SIZE": str(WORLD)}

    def placed(rank: int) -> Hook:
        def hook() -> None:
            os.environ.update(common, RANK=str(rank), LOCAL_RANK=str(rank))
            launch._PARENT = os.getppid()
            if hooks:
                hooks[rank]()

        return hook

    return [stage.start(out, *words, hooks=(placed(rank),)) for rank in range(WORLD)]


def _undisturbed(stage: Stage) -> Path:
    """The run of two processes that nothing disturbs: made once."""
    out = stage.folder / "whole-of-two"
    if not out.exists():
        for command in _team(stage, out, *SETTINGS):
            command.wait().must(0)
    return out


def _finished(stage: Stage, out: Path) -> str:
    whole = _undisturbed(stage)
    for command in _team(stage, out, "--resume"):
        command.wait().must(0)
    return stage.lost(out, whole)


@case("`kill -9` of one of two processes, of either, while they train", 2)
def one_of_two(stage: Stage, number: int) -> Found:
    out = stage.new()
    team = _team(stage, out, *SETTINGS)
    stage.wait_for(out, team[0], 12)
    team[number].signal(signal.SIGKILL)
    told = [command.wait() for command in team]
    told[number].must(-signal.SIGKILL)
    told[1 - number].must(4, ENDED, "--resume")
    return Found("the other ended by itself, exit 4; `--resume` ended it", _finished(stage, out))


@case("`kill -9` of the one that writes, while the best model is written", 1)
def while_it_writes(stage: Stage, number: int) -> Found:
    out = stage.new()
    hooks = (kills.before_call(loop, "save_model", 2), lambda: None)
    first, second = _team(stage, out, *SETTINGS, hooks=hooks)
    first.wait().must(-signal.SIGKILL)
    second.wait().must(4, ENDED)
    return Found("the other ended by itself, exit 4; `--resume` ended it", _finished(stage, out))


@case("SIGTERM to one of two processes, to either", 2)
def one_is_told_to_stop(stage: Stage, number: int) -> Found:
    out = stage.new()
    team = _team(stage, out, *SETTINGS)
    stage.wait_for(out, team[0], 12)
    team[number].signal(signal.SIGTERM)
    told = [command.wait().must(4) for command in team]
    if sum("--resume" in one.text for one in told) != 1:
        raise AssertionError(f"said by both or by none: {told}")
    return Found(
        "both stopped at the same step, exit 4; `--resume` ended it", _finished(stage, out)
    )


@case("a run of two processes goes on with one, and one of one with two", 2)
def another_number(stage: Stage, number: int) -> Found:
    out = stage.new()
    team = _team(stage, out, *SETTINGS) if number == 0 else [stage.start(out)]
    stage.wait_for(out, team[0], 12)
    team[0].signal(signal.SIGTERM)
    for command in team:
        command.wait().must(4)
    kept = (out / "metrics.csv").read_text().splitlines()
    after = (
        [stage.start(out, "--resume", "--devices", 1)]
        if number == 0
        else _team(stage, out, "--resume")
    )
    said = [command.wait().must(0).text for command in after]
    if "Not as before" not in said[0]:
        raise AssertionError(f"it was not said what is no longer exact: {said[0]}")
    there = (out / "metrics.csv").read_text().splitlines()
    lost = (
        NOTHING if there[: len(kept)] == kept and len(there) > len(kept) else "rows of metrics.csv"
    )
    return Found("said what is exact and what is not; went on with what was learnt", lost)
