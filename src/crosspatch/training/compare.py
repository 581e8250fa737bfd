# SPDX-License-Identifier: Apache-2.0
"""Which of several ways to train is better on these pictures: the runs of `crosspatch compare`.

All candidates get the same budget, the same split and the same seeds, so their answers on the same
test pictures can be paired (`metrics.paired`). `compare.json` holds the plan before the first run;
each run is a run folder, OUT/CANDIDATE/seed-N. Seed by seed all candidates are trained, so that
what is stopped early still compares. Killed at any time it goes on where it was: what has ended is
read, what was interrupted is continued.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from crosspatch.data.sources import Source
from crosspatch.errors import CrosspatchError, DataError, Interrupted, UsageError
from crosspatch.training import machine as machines
from crosspatch.training import plan as plans
from crosspatch.training.candidates import Candidate, parse_candidates
from crosspatch.training.compare_report import write_compared
from crosspatch.training.compared import Compared, read_compared
from crosspatch.training.comparison import PLAN, Plan, read_plan, write_plan
from crosspatch.training.guard import NotFinite
from crosspatch.training.measure import settle_length
from crosspatch.training.objective import SUPERVISED, make_objective
from crosspatch.training.pictures import open_source, sharing
from crosspatch.training.recipe import Recipe
from crosspatch.training.reporter import Reporter, Silent
from crosspatch.training.resuming import with_defaults
from crosspatch.training.run import RunFolder
from crosspatch.training.session import train_run
from crosspatch.training.start import planned
from crosspatch.training.state import TEMPORARY
from crosspatch.training.taught import learns_first

LEFT = 0.02  # of the time is kept for what comes after the runs
SURE = 0.9  # of the time must be left after all was tried out, or it is tried out once more
EPOCHS = 30  # of each run where neither a time nor a number is given


class Watcher(Reporter, Protocol):
    """A reporter that is also told which run begins: its candidate, seed, number and of how many,
    and the seconds that it is expected to take."""

    def begins(self, name: str, seed: int, number: int, total: int, seconds: float) -> None: ...


class Asked(NamedTuple):
    """What was typed: candidates ("" with --resume: those of the comparison), how many seeds, the
    length, settings for all, how the data are read."""

    tries: str
    seeds: int | None = None
    time: float | None = None
    epochs: int | None = None
    common: Mapping[str, Any] = {}
    reading: Mapping[str, Any] = {}


def compare(
    spec: str | Path,
    out: str | Path,
    asked: Asked,
    watcher: Watcher | None = None,
    resume: bool = False,
) -> Compared:
    """Train every candidate with every seed on `spec` into `out`, and compare them.

    Everything is tried out before the first run: a candidate that cannot work is refused with the
    reason. Raises UsageError, DataError; Interrupted, with what is there so far written.
    """
    began, out = time.perf_counter(), Path(out)
    tell: Any = watcher or Silent()
    with sharing():
        plan = _begun(out, str(spec), asked, resume)
        if plan is None:
            candidates = parse_candidates(asked.tries, asked.common)
            _require_free(out)
            source = open_source(spec, **asked.reading)
            plan = _planned(source, str(spec), asked, candidates, tell, began)
            write_plan(out, plan, {})
        else:
            _require_same(plan, open_source(plan.data, **plan.reading), out)
            kept = read_plan(out)
            if plan.seeds != tuple(kept["plan"]["seeds"]):  # more than it was begun with
                write_plan(out, plan, kept.get("failed", {}))
        failed = _train_all(plan, out, tell)
    found = read_compared(plan, out, failed)
    write_compared(found, out, lambda results: write_plan(out, plan, failed, results))
    return found


def _train_all(plan: Plan, out: Path, tell: Any) -> dict[str, str]:
    """Every run that has not ended; what failed, and why, by `CANDIDATE/seed-N`."""
    failed = read_plan(out).get("failed", {})
    total = len(plan.seeds) * len(plan.candidates)
    for number, (candidate, seed, folder) in enumerate(plan.runs(out), 1):
        key = f"{candidate.folder}/seed-{seed}"
        run = RunFolder(folder)
        if run.ended or key in failed:
            continue
        expected = plan.each or plan.seconds.get(candidate.name, 0.0)
        if hasattr(tell, "begins"):
            tell.begins(candidate.name, seed, number, total, expected)
        try:
            how = {"resume": run.unfinished, "reading": plan.reading}
            train_run(plan.data, folder, plan.overrides(candidate, seed), tell, **how)
        except (Interrupted, KeyboardInterrupt):
            _write_so_far(plan, out, failed)
            raise
        except UsageError as error:
            if not isinstance(error.__cause__, NotFinite):
                raise
            failed = {**failed, key: error.got}
            tell.message(f"{candidate.name} with seed {seed} failed: {error.got}")
            write_plan(out, plan, failed)
    return failed


def _write_so_far(plan: Plan, out: Path, failed: dict[str, str]) -> None:
    """What the seeds say that all candidates have ended or failed with, if there are such."""
    ended = {(one.folder, seed) for one, seed, run in plan.runs(out) if RunFolder(run).ended}
    whole = [
        seed
        for seed in plan.seeds
        if all((one.folder, seed) in ended or f"{one.folder}/seed-{seed}" in failed
               for one in plan.candidates)
    ]  # fmt: skip
    if any(seed in whole for _, seed in ended):
        found = read_compared(replace(plan, seeds=tuple(whole)), out, failed)
        write_compared(found, out, lambda results: write_plan(out, plan, failed, results))


def _planned(
    source: Source,
    spec: str,
    asked: Asked,
    candidates: Sequence[Candidate],
    tell: Any,
    began: float,
) -> Plan:
    """The plan, after every candidate was planned, built, and trained for a few steps."""
    split_seed = int(asked.common.get("seed", 0))
    first = {key: value for key, value in asked.common.items() if key != "seed"}
    seeds = tuple(range(split_seed, split_seed + (asked.seeds or 3)))
    runs = len(seeds) * len(candidates)
    epochs = asked.epochs or (None if asked.time else EPOCHS)
    plan = Plan(
        spec, dict(asked.reading), tuple(candidates), first, seeds, split_seed, epochs, asked.time,
        asked.time / runs if asked.time else None, fingerprint=source.fingerprint(),
        command=shlex.join(sys.argv), created=datetime.now(UTC).isoformat(timespec="seconds"),
    )  # fmt: skip
    if "threads" in first:
        plan = replace(plan, fixed={"threads": first["threads"]})
    recipes = list[Recipe]()
    for place, candidate in enumerate(candidates):
        tell.progress("trying candidates out", place, len(candidates))
        recipe, seconds = _tried(plan, candidate, source)
        recipes.append(recipe)
        own = "threads" in candidate.settings
        plan = replace(
            plan,
            fixed=plan.fixed if own else {"threads": recipe.threads},
            uses={**plan.uses, candidate.name: _uses(recipe)},
            seconds={**plan.seconds, candidate.name: round(seconds, 1)},
        )
    tell.progress("trying candidates out", len(candidates), len(candidates))
    if plan.epochs and "eval_every" not in first:
        plan = replace(plan, fixed={**plan.fixed, "eval_every": max(r.eval_every for r in recipes)})
    if asked.time:
        left = asked.time * (1 - LEFT) - (time.perf_counter() - began)
        plan = replace(plan, each=round(left / runs, 3))
        if left < SURE * asked.time:
            for candidate in candidates:  # whether it still fits
                _tried(plan, candidate, source, build=False)
    return replace(plan, remarks=_remarks(plan, recipes))


def _remarks(plan: Plan, recipes: Sequence[Recipe]) -> tuple[str, ...]:
    """What a reader of the comparison should know of how it was made."""
    said = []
    if plan.time and min(recipe.steps / recipe.steps_per_epoch for recipe in recipes) < 5:
        said.append("The time is enough for less than 5 epochs: what helps so soon may not later.")
    sizes = {recipe.size for recipe in recipes}
    if len(sizes) > 1:
        said.append("The candidates see pictures of different sizes.")
    return tuple(said)


def _tried(
    plan: Plan, candidate: Candidate, source: Source, build: bool = True
) -> tuple[Recipe, float]:
    """(the recipe, expected seconds) of a candidate's run; its first steps are made and thrown
    away. Raises what it is refused for, with its name."""
    try:
        given = plans.check_overrides(plan.overrides(candidate, plan.seeds[0]))
        given = with_defaults(source, given)
        recipe, pictures, reasons = planned(source, given, machines.look(), Silent())
        if not len(pictures.split.test):
            raise DataError(
                f"{source.name} has no picture to test with",
                "pictures for a test split, on which candidates are compared",
                "add pictures, about 20 for each class at least",
            )
        if learns_first(recipe) and not recipe.teacher:  # which only its run will train
            recipe = replace(recipe, objective=SUPERVISED, objective_args={})
        if build:
            make_objective(recipe, source.classes)
        return settle_length(recipe, pictures, given, reasons, time.perf_counter())
    except CrosspatchError as error:
        raise _refused(plan, candidate, error) from error


def _refused(plan: Plan, candidate: Candidate, error: CrosspatchError) -> CrosspatchError:
    do = error.do
    if plan.each is not None and "left for training" in error.got:
        runs = len(plan.seeds) * len(plan.candidates)
        do = f"{do}: {runs} runs share it, {max(0.0, plan.each):.1f} s for each; or fewer --seeds"
    return type(error)(f"the candidate {candidate.name}: {error.got}", error.expected, do)


def _uses(recipe: Recipe) -> dict[str, str]:
    """The files that a recipe learns from besides the pictures, by their digests."""
    kinds = ("teacher", "labels", "weights")
    found = {kind: getattr(recipe, kind).get("sha256") for kind in kinds}
    return {kind: digest for kind, digest in found.items() if digest}


def _begun(out: Path, spec: str, asked: Asked, resume: bool) -> Plan | None:
    """The plan of the comparison in `out`, where there is one; with more seeds, if more are asked.

    Raises UsageError where another comparison is asked for, and where there is nothing to resume.
    """
    if not (out / PLAN).is_file():
        if resume:
            raise UsageError(
                f"{out} holds no comparison", "one that was begun", "leave --resume away"
            )
        if not asked.tries:
            raise UsageError("--try is missing", "what is to be compared", "--try base,mixup")
        return None
    kept = read_plan(out)
    plan = Plan.from_dict(kept["plan"])
    differing = _differing(plan, spec, asked, resume)
    if differing:
        raise UsageError(
            f"{out} holds another comparison: {'; '.join(differing)}",
            "the command that began it, or --resume alone (more --seeds may be asked)",
            "choose another --out",
        )
    if asked.seeds and asked.seeds > len(plan.seeds):
        first = plan.seeds[0]
        plan = replace(plan, seeds=tuple(range(first, first + asked.seeds)))
    return plan


def _differing(plan: Plan, spec: str, asked: Asked, resume: bool) -> list[str]:
    """What differs between the comparison that was begun and the one that is asked for."""
    told = []
    if spec != plan.data:
        told.append(f"of {plan.data}")
    if asked.tries:
        mine = [one.text for one in parse_candidates(asked.tries, asked.common)]
        theirs = [one.text for one in plan.candidates]
        told += [f"--try {','.join(theirs)}"] if mine != theirs else []
    if asked.seeds and asked.seeds < len(plan.seeds):
        told.append(f"--seeds {len(plan.seeds)}")
    split_seed = asked.common.get("seed", None if resume else 0)
    told += [f"--seed {plan.split_seed}"] if split_seed not in (None, plan.split_seed) else []
    lengths = {"epochs": asked.epochs, "time": asked.time}
    typed = any(value is not None for value in lengths.values())
    begun = {"epochs": plan.epochs, "time": plan.time}
    if (typed or not resume) and _length(lengths) != _length(begun):
        name, value = _length(begun)
        told.append(f"--{name} {value:g}{'s' if name == 'time' else ''}")
    for mine, theirs in (
        ({k: v for k, v in asked.common.items() if k != "seed"}, plan.common),
        (dict(asked.reading), plan.reading),
    ):
        if (mine or not resume) and _plain(mine) != _plain(theirs):
            names = sorted(k for k in {*mine, *theirs} if mine.get(k) != theirs.get(k))
            told.append(", ".join(f"{k} {theirs.get(k, 'not given')}" for k in names))
    return told


def _length(given: Mapping[str, Any]) -> tuple[str, float]:
    time_, epochs = given["time"], given["epochs"]
    return ("time", time_) if time_ else ("epochs", epochs or EPOCHS)


def _require_same(plan: Plan, source: Source, out: Path) -> None:
    """Raises DataError where pictures, a teacher or labels are no longer what was begun with."""
    if source.fingerprint() != plan.fingerprint:
        raise DataError(
            f"the pictures of {plan.data} are no longer those that {out} was begun with",
            "the same pictures for all runs",
            "put them back, or choose another --out",
        )
    left = [c for c, _, folder in plan.runs(out) if not RunFolder(folder).ended]
    for candidate in {one.name: one for one in left if plan.uses[one.name]}.values():
        given = with_defaults(source, plan.overrides(candidate, plan.seeds[0]))
        recipe, _, _ = planned(source, plans.check_overrides(given), machines.look(), Silent())
        if _uses(recipe) != plan.uses[candidate.name]:
            raise DataError(
                f"what {candidate.name} learns from is no longer what {out} was begun with",
                f"the same {' and '.join(plan.uses[candidate.name])} for all seeds",
                "put it back, or choose another --out",
            )


def _require_free(out: Path) -> None:
    """Makes the folder of a comparison. Raises UsageError where something else is in it, and where
    it cannot be written."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file", "a folder", "choose another --out")
    strange = [one.name for one in out.iterdir()] if out.is_dir() else []
    strange = [name for name in strange if not name.startswith(TEMPORARY)]
    if strange:
        raise UsageError(
            f"{out} holds other files, such as {min(strange)}",
            "a new or an empty folder",
            "choose another --out",
        )
    parent = next(one for one in (out, *out.absolute().parents) if one.exists())
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UsageError(
            f"{out} cannot be written", "a folder that can be written", "choose another --out"
        )


def _plain(given: Any) -> Any:
    return json.loads(json.dumps(given, default=str))
