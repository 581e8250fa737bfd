"""Faults: damaged states, pictures and settings that changed, caches full of rubbish."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path

from PIL import Image

from crosspatch.data import prepare
from crosspatch.layers import linear
from crosspatch.objectives.supervised import Supervised
from crosspatch.training.state import BEFORE, GOOD, LAST, load_state
from crosspatch.training.stepper import Stepper
from faults.stage import NOTHING, SETTINGS, Found, Stage, case, saved
from support import kills

DAMAGE = {
    "torn": lambda data: data[:-7],
    "cut in half": lambda data: data[: len(data) // 2],
    "of zero length": lambda data: b"",
    "foreign (a web page)": lambda data: b"<html>404</html>",
    "with one bit changed": lambda data: data[:-99] + bytes([data[-99] ^ 1]) + data[-98:],
}


def _damage(path: Path, how: str) -> None:
    """Put a damaged file in the place of `path`. It is a new one: two names may share a state."""
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(DAMAGE[how](data))


def _damaged(stage: Stage, number: int, names: tuple[str, ...], used: str) -> Found:
    out = stage.stopped()
    for name in names:
        _damage(out / "last" / name, list(DAMAGE)[number])
    stage.run(out, "--resume").must(0, *names, "skipped")
    return Found(f"named, {used} taken ({', '.join(DAMAGE)})", stage.lost(out))


@case("the last state is damaged", len(DAMAGE))
def the_last_state(stage: Stage, number: int) -> Found:
    return _damaged(stage, number, (LAST,), "the one before")


@case("the last two states are damaged", len(DAMAGE))
def the_last_two_states(stage: Stage, number: int) -> Found:
    return _damaged(stage, number, (LAST, BEFORE), "the one of the last validation")


@case("all states are damaged, or gone", 2)
def all_states(stage: Stage, number: int) -> Found:
    out = stage.stopped()
    kept = shutil.copytree(out / "last", out.with_name(f"{out.name}-kept"))
    for name in (LAST, BEFORE, GOOD):
        _damage(out / "last" / name, "torn") if number else (out / "last" / name).unlink()
    stage.run(out, "--resume").must(3, "last", "--overwrite")
    shutil.rmtree(out / "last")
    shutil.move(kept, out / "last")
    return Found("exit 3, named, nothing begun anew; put back, it went on", stage.finish(out))


@case("a picture vanishes, one comes, one changes, before `--resume`")
def pictures_change(stage: Stage, number: int) -> Found:
    out, data = stage.stopped(), shutil.copytree(stage.photos, stage.new())
    gone, changed = sorted((data / "0").iterdir())[0], sorted((data / "1").iterdir())[0]
    gone.unlink()
    changed.write_bytes(changed.read_bytes() + b"x")
    Image.new("RGB", (8, 8)).save(data / "2" / "new.png")
    before = saved(out)
    told = stage.run(out, "--resume", data=data).must(3, "1 came (2/new.png)", "--force")
    told.must(3, f"1 went (0/{gone.name})", f"1 changed (1/{changed.name})")
    kept = saved(out) == before
    lost = stage.finish(out)
    return Found("exit 3, each listed; put back, it went on", lost if kept else "the state")


@case("the same, with `--force`")
def pictures_change_by_force(stage: Stage, number: int) -> Found:
    out, data = stage.stopped(), shutil.copytree(stage.photos, stage.new())
    sorted((data / "0").iterdir())[0].unlink()
    Image.new("RGB", (8, 8)).save(data / "2" / "new.png")
    before = len(load_state(out / "last")[1]["rows"])
    stage.run(out, "--resume", "--force", data=data).must(0, "1 came (2/new.png)", "1 went")
    rows = json.loads((out / "report.json").read_text())["history"]
    lost = NOTHING if len(rows) > before else "rows"
    return Found("said what changed and went on with what was learnt", lost)


@case("other settings with `--resume`, or with the same command", 2)
def settings_change(stage: Stage, number: int) -> Found:
    out = stage.stopped()
    before = results_of_state(out)
    words = ("--resume", "--lr", 0.1) if number else (*SETTINGS, "--lr", 0.1)
    stage.run(out, *words).must(2, "--lr 0.1 (was not given)", "--force")
    kept = results_of_state(out) == before
    return Found("exit 2, listed; without them it went on", stage.finish(out) if kept else "state")


def results_of_state(out: Path) -> dict:
    """Bytes of the run's states."""
    return {path.name: path.read_bytes() for path in (out / "last").glob("*.safetensors")}


@case("a class folder vanishes while the set is read anew in every epoch")
def pictures_vanish_under_way(stage: Stage, number: int) -> Found:
    def small() -> None:
        prepare.free_memory = lambda: 0

    data, out = shutil.copytree(stage.photos, stage.new()), stage.new()
    victims = sorted((data / "0").iterdir())

    def vanish() -> None:
        step = Stepper.step

        def watched(stepper: Stepper, batch: object, epoch: int, at: int) -> None:
            if at == 15:
                for path in victims:
                    path.rename(path.with_suffix(".away"))
            step(stepper, batch, epoch, at)

        Stepper.step = watched

    stage.run(out, hooks=(small, vanish), data=data).must(3, "cannot read 0/")
    for path in victims:
        path.with_suffix(".away").rename(path)
    lost = stage.finish(out, hooks=(small,), data=data)
    return Found("exit 3, named; put back, `--resume` ended it", lost)


def _spoilt() -> None:
    """Step 15 has a loss that is not finite, while its rate is the planned one."""
    step, forward, now = Stepper.step, Supervised.forward, [False]

    def watched(stepper: Stepper, batch: object, epoch: int, at: int) -> None:
        now[0] = at == 15 and not stepper.cuts
        step(stepper, batch, epoch, at)

    def spoilt(objective: Supervised, inputs: object, progress: float) -> dict:
        found = forward(objective, inputs, progress)
        return {**found, "loss": found["loss"] * math.nan} if now[0] else found

    Stepper.step, Supervised.forward = watched, spoilt


@case("a batch whose loss is NaN, and `kill -9` before and after it went back", 4)
def a_bad_batch(stage: Stage, number: int) -> Found:
    whole, out = stage.folder / "whole-nan", stage.new()
    if not whole.exists():
        stage.run(whole, hooks=(_spoilt,)).must(0, "the loss became nan at step 16")
    hook = kills.in_step((13, 15, 14, 22)[number], "before")
    told = stage.run(out, hooks=(_spoilt, hook))
    told.must(-9)
    stage.run(out, *SETTINGS, hooks=(_spoilt,)).must(0)
    same_list = (out / "nan.csv").read_text() == (whole / "nan.csv").read_text()
    lost = stage.lost(out, whole) if same_list else "nan.csv"
    return Found("named its pictures, went back, half the rate; equal to the run not killed", lost)


RUBBISH = (b"\xff\x00garbage", b"", b"[]", b'{"": {"a": 1}}')


@case("rubbish in `$CROSSPATCH_CACHE`, or a folder in its place", len(RUBBISH) + 2)
def a_bad_cache(stage: Stage, number: int) -> Found:
    out, cache = stage.new(), stage.new()

    def use() -> None:
        cache.mkdir()
        os.environ["CROSSPATCH_CACHE"] = str(cache)
        os.environ.pop("CROSSPATCH_LINEAR", None)
        linear.measure = lambda: 0.0
        if number < len(RUBBISH):
            (cache / "linear.json").write_bytes(RUBBISH[number])
        elif number == len(RUBBISH):
            (cache / "linear.json").mkdir()
        else:
            linear._remembered()
            known = json.loads((cache / "linear.json").read_text())
            (cache / "linear.json").write_text(json.dumps(dict.fromkeys(known, "fast")))

    stage.run(out, *SETTINGS, "--linear", "auto", hooks=(use,)).must(0)
    return Found("measured anew; the run is the same", stage.lost(out))
