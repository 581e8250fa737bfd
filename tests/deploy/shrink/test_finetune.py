"""Reduced networks that learn on: from the run's weights, on its pictures, split and seed, for the
time asked; killed anywhere they go on."""

from __future__ import annotations

import csv
import functools
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from crosspatch.deploy.shrink import finetune as room
from crosspatch.deploy.shrink.candidates import SOURCES, Context
from crosspatch.deploy.shrink.finetune import Finetuned, finetune, fitted, lasting
from crosspatch.deploy.shrink.pupils import Pupil, pupils
from crosspatch.deploy.shrink.result import Budget, Measured
from crosspatch.errors import DataError, Interrupted, UsageError
from crosspatch.layers import linear
from crosspatch.metrics.macs import count_macs
from crosspatch.training import measure
from crosspatch.training.guard import NotFinite
from crosspatch.training.package import load_model, transforms_of
from crosspatch.training.recipe import Recipe
from crosspatch.training.run import RunFolder
from crosspatch.training.session import train_run
from crosspatch.training.teacher import load_teacher
from support.hostile import CLASSES, picture, saved
from support.kills import before_call, in_step, killed
from support.loops import Stop
from support.once import once, shared
from support.several import write_pictures, write_tables
from support.tiny import tiny_recipe

TOME = Pupil("tome hard", "tome", {"r": [6, 4, 2, 1]}, 10)
SETTINGS: dict[str, Any] = {"model": "vit_micro_32", "size": 16, "linear": "off", "threads": 1}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A folder with a run of 2 epochs, and its pictures beside it: read only."""

    def make(folder: Path) -> None:
        for kind in CLASSES:
            (folder / "data" / kind).mkdir(parents=True)
            for seed in range(24):
                drawn = saved(picture(kind, seed, (24, 24)), "PNG")
                (folder / "data" / kind / f"{seed}.png").write_bytes(drawn)
        torch.set_num_threads(1)
        train_run(folder / "data", folder / "run", {**SETTINGS, "epochs": 2, "seed": 5})

    return once(shared(tmp_path_factory, worker_id) / "to-finetune", make)


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of the run, whose pictures stay where they were."""
    shutil.copytree(trained / "run", tmp_path / "run")
    data = str(trained / "data")
    config = RunFolder(tmp_path / "run").read_config()
    config["run"]["data"] = data
    RunFolder(tmp_path / "run").write_config(config)
    return tmp_path / "run"


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step takes 0.1 s and a validation 0.2, so that lengths are the same everywhere."""
    monkeypatch.setattr(measure, "measure_step", lambda *_: 0.1)
    monkeypatch.setattr(measure, "measure_evaluation", lambda *_: 0.2)
    monkeypatch.setattr(room, "fit", functools.partial(room.fit, report_seconds=0.0))
    torch.set_num_threads(1)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


def same(one: Path, other: Path) -> bool:
    mine, theirs = weights(one), weights(other)
    return mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


def only(run: Path, seconds: float = 2.0, **how: Any) -> Finetuned:
    (done,) = finetune(run, [TOME], seconds, **how)
    return done


def test_it_learns_on_from_the_run(run: Path) -> None:
    before = (torch.get_num_threads(), linear.active())
    told = Stop()
    done = only(run, reporter=told)
    after = Recipe.from_dict(RunFolder(done.folder).read_config()["recipe"])
    its = Recipe.from_dict(RunFolder(run).read_config()["recipe"])
    assert done.steps == after.steps > 3
    assert told.steps[-1] == done.steps
    assert done.seconds > 0
    assert done.name == f"tome hard, fine-tuned {lasting(done.seconds)}"
    assert done.folder.parent == run / "shrink"
    assert (after.seed, after.batch, after.size) == (its.seed, its.batch, its.size)
    assert after.lr == pytest.approx(room.RATE * its.lr)
    assert after.objective == "distill"
    assert not load_teacher(after, CLASSES).module.training
    assert (done.folder / "split.csv").read_bytes() == (run / "split.csv").read_bytes()
    assert (done.folder / "classes.txt").read_bytes() == (run / "classes.txt").read_bytes()
    found = load_model(done.folder)
    assert [one["method"] for one in transforms_of(found.module)] == ["tome"]
    assert found.calibrated_on > 0
    assert not same(done.folder, run)
    assert (torch.get_num_threads(), linear.active()) == before


def test_it_begins_with_the_weights_of_the_run(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a rate of nothing, nothing changes but what normalisations have counted."""
    monkeypatch.setattr(room, "RATE", 1e-12)
    done = only(run)
    mine, theirs = weights(done.folder), weights(run)
    assert mine.keys() == theirs.keys()
    learnt = dict(load_model(run).module.named_parameters())
    assert len(learnt) > 20
    assert all(torch.allclose(mine[key], theirs[key], atol=1e-6) for key in learnt)


def test_test_pictures_are_not_looked_at_and_validation_never_trains(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, real = [], room.fit

    def watched(recipe: Any, objective: Any, train: Any, val: Any, *rest: Any, **how: Any) -> Any:
        seen.append((tuple(train.keys), tuple(val.keys)))
        return real(recipe, objective, train, val, *rest, **how)

    monkeypatch.setattr(room, "fit", watched)
    done = only(run)
    with (run / "split.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    parts = {name: {row["path"] for row in rows if row["split"] == name}
             for name in ("train", "val", "test")}  # fmt: skip
    assert [set(one) for one in seen[0]] == [parts["train"], parts["val"]]
    with (done.folder / "predictions.csv").open(newline="") as file:
        assert {row["path"] for row in csv.DictReader(file)} == parts["val"]


def test_what_has_ended_is_not_trained_again(run: Path) -> None:
    first, told = only(run), Stop()
    again = only(run, reporter=told)
    assert again == first
    assert (told.steps, told.messages) == ([], [])
    assert only(run, 3.0).folder != first.folder


def test_of_another_training_of_the_run_it_is_trained_anew(run: Path) -> None:
    first = only(run)
    path = run / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + np.float32(0.123).tobytes())
    told = Stop()
    assert only(run, reporter=told).folder == first.folder
    assert told.steps


@pytest.mark.parametrize("at", [1, 6])
def test_stopped_it_goes_on_and_ends_the_same(run: Path, at: int) -> None:
    whole = only(run)
    kept = shutil.move(whole.folder, run / "kept")
    with pytest.raises(Interrupted):
        only(run, reporter=Stop(at, Interrupted("stop", "x", "y")))
    told = Stop()
    done = only(run, reporter=told)
    assert len(told.steps) <= whole.steps - at + 1
    assert done.steps == whole.steps
    assert same(done.folder, Path(kept))


@pytest.mark.parametrize(
    "hook",
    [in_step(0, "before"), in_step(4, "forward"), before_call(room, "finish"),
     before_call(RunFolder, "write_config"), before_call(shutil, "rmtree")],
    ids=["first step", "a step", "judging", "beginning", "tidying"],
)  # fmt: skip
def test_killed_it_goes_on_and_ends_the_same(run: Path, hook: Any) -> None:
    assert killed(hook, lambda: only(run))
    done = only(run)
    kept = shutil.move(done.folder, run / "kept")
    assert same(only(run).folder, Path(kept))


def test_time_is_shared_out_and_several_are_trained(run: Path) -> None:
    other = Pupil("mctf", "mctf", {"r": 0.3, "blocks": [1]})
    told = Stop()
    found = list(finetune(run, [TOME, other], 4.0, reporter=told))
    assert [one.pupil for one in found] == [TOME, other]
    assert [one.folder.name[:14] for one in found] == ["finetuned-tome", "finetuned-mctf"]
    assert found[0].steps == only(run).steps  # 2 s each
    assert [m for m in told.messages if m.startswith("fine-tuning")] == [
        "fine-tuning 1 of 2: tome hard, 2.0 s", "fine-tuning 2 of 2: mctf, 2.0 s",
    ]  # fmt: skip


def test_other_pictures_are_refused(run: Path, trained: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(trained / "data", moved)
    assert only(run, data=moved).steps
    (moved / CLASSES[0] / "3.png").unlink()
    with pytest.raises(DataError, match="are not those"):
        only(run, 3.0, data=moved)


def test_one_that_diverges_is_left_out_and_told(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoilt(*_: Any, **__: Any) -> None:
        raise UsageError("the loss is NaN", "a finite one", "a lower rate") from NotFinite(
            3, "loss", math.nan, torch.tensor([0])
        )

    monkeypatch.setattr(room, "fit", spoilt)
    told = Stop()
    assert list(finetune(run, [TOME], 2.0, reporter=told)) == []
    assert told.messages[-1] == "tome hard was not fine-tuned: the loss is NaN"


def test_of_several_labels_it_learns_them_itself(tmp_path: Path) -> None:
    write_tables(tmp_path, write_pictures(tmp_path, 60))
    train_run(tmp_path / "bar.csv", tmp_path / "run", {**SETTINGS, "epochs": 1})
    done = only(tmp_path / "run")
    recipe = Recipe.from_dict(RunFolder(done.folder).read_config()["recipe"])
    assert (recipe.objective, recipe.teacher) == ("supervised", {})
    assert load_model(done.folder).thresholds


@given(
    per_step=st.floats(1e-3, 5.0), per_eval=st.floats(0.0, 20.0), seconds=st.floats(0.01, 1000.0)
)
def test_what_is_planned_fits_into_the_time(
    per_step: float, per_eval: float, seconds: float
) -> None:
    try:
        recipe = fitted(tiny_recipe(), per_step, per_eval, seconds)
    except UsageError as error:
        needed = float(error.expected.split()[2])
        assert seconds < needed + 0.06
        assert per_step + 2.2 * per_eval + 0.1 >= 0.9 * seconds
        return
    spent = recipe.steps * per_step + len(recipe.evaluations()) * per_eval
    assert recipe.steps >= 1
    assert spent <= seconds


def context(run: Path, **further: Any) -> Context:
    """What a search knows that has measured the run and one reduction, which loses too much."""
    base = Measured(name="as it is", kind="engines", engine="e", precision="fp32", macs=20,
                    right=9, pictures=9)  # fmt: skip
    lost = Measured(name="tome hard", kind="tokens", method="tome", options=TOME.options, macs=10,
                    right=5, pictures=9, drop=0.4, dropped="early")  # fmt: skip
    return Context(run, load_model(run), 20, Budget(), run / "shrink", rows=[base, lost],
                   until=100.0, further=further)  # fmt: skip


def test_the_search_gets_what_was_trained_as_one_more_candidate(run: Path) -> None:
    told = Stop()
    known = context(run, finetune=2.0, reporter=told)
    (one,) = SOURCES["finetuned"](known)
    assert one.kind == "finetuned"
    assert one.name.startswith("tome hard, fine-tuned ")
    assert (one.method, one.options, one.macs) == ("tome", TOME.options, 10)
    assert one.trained > 0
    assert one.screen
    assert same(Path(one.run), run / "shrink" / Path(one.run).name)
    assert transforms_of(one.make().module)
    assert known.until > 100.0  # its time is not the search's
    assert told.steps
    assert known.remarks == []


def test_a_search_that_goes_on_trains_what_it_had_chosen(run: Path) -> None:
    (first,) = SOURCES["finetuned"](context(run, finetune=2.0))
    later = context(run, finetune=2.0)
    better = replace(later.rows[1], name="tome mild", options={"r": [2, 2, 2, 2]}, drop=0.1)
    later.rows = [*later.rows, replace(better, macs=5)]
    (again,) = SOURCES["finetuned"](later)
    assert (again.name, again.run) == (first.name, first.run)
    later.budget = Budget(max_drop=1.0)
    assert [one.options for one in SOURCES["finetuned"](later)] == [better.options]


def test_what_the_search_had_no_time_for_is_looked_at_and_trained(run: Path) -> None:
    known = context(run, finetune=4.0)
    known.rows, known.macs = known.rows[:1], count_macs(known.trained.module, (3, 16, 16))
    known.rows = [replace(known.rows[0], macs=known.macs)]
    known.budget = Budget(max_drop=0.0)
    school = room._School(run, None, run / "shrink", 1.0, Stop())
    assert school.lost(known.trained.module, known.trained.module) == 0.0
    spoilt = load_model(run).module
    with torch.no_grad():
        spoilt.head.bias.copy_(torch.tensor([99.0, 0.0, 0.0]))  # type: ignore[union-attr]
    losses = [school.lost(spoilt, known.trained.module), school.lost(known.trained.module, spoilt)]
    assert losses[0] == -losses[1] != 0
    untried = room._untried(known)
    assert {one.method for one in untried} >= {"tome", "evovit"}
    assert len({one.method for one in untried}) == len(untried)
    assert all(one.macs < known.macs and one.dropped for one in untried)
    wanted = pupils([*known.rows, *untried], known.budget)
    found = list(SOURCES["finetuned"](known))
    assert [one.method for one in found] == [one.method for one in wanted]
    assert known.remarks == ([] if found else known.remarks)


def test_the_search_is_told_why_nothing_was_trained(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert list(SOURCES["finetuned"](context(run))) == []
    short = context(run, finetune=0.2)
    assert list(SOURCES["finetuned"](short)) == []
    assert short.remarks == [
        "not fine-tuned: 0.2 s for the fine-tuning of a candidate, where it takes at least 0.3 s: "
        "one step and one validation"
    ]
    fine = context(run, finetune=2.0)
    fine.rows = fine.rows[:1]
    monkeypatch.setitem(SOURCES, "tokens", lambda _: [])
    assert list(SOURCES["finetuned"](fine)) == []
    assert fine.remarks == [
        "nothing was fine-tuned: no faster network with fewer tokens loses more than the budget"
    ]


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (9.96, "10 s"), (99.4, "99 s"), (99.6, "2 min"),
     (600, "10 min"), (5969, "99 min"), (7200, "2.0 h")],
)  # fmt: skip
def test_how_long_it_lasted(seconds: float, said: str) -> None:
    assert lasting(seconds) == said
