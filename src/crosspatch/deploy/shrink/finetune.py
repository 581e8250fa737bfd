# SPDX-License-Identifier: Apache-2.0
"""`--finetune 10m`: networks with fewer tokens learn on for a while, to get back what that cost.

The run's own loop trains the run's own weights with the reduction in them, on the run's pictures,
split and recipe, at a fifth of its rate; the run as it was is the teacher (`objectives.distill`,
where a picture has one class). Pictures are read once for all, and the time asked for is spent on
steps and validations alone: how many fit is computed from measured ones. Validation chooses the
weights, as in any training; the test pictures are not looked at.

Each is a run folder, RUN/shrink/finetuned-…, which eval, export and predict read, and which goes on
where it was when it is killed.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from crosspatch.data.skipped import write_skipped
from crosspatch.data.sources import Source
from crosspatch.data.split import Split, read_split
from crosspatch.deploy.shrink.candidates import SOURCES, Candidate, Context, register
from crosspatch.deploy.shrink.pupils import Pupil, pupils
from crosspatch.deploy.shrink.result import Measured
from crosspatch.deploy.torch_engine import torch_threads
from crosspatch.errors import DataError, UsageError
from crosspatch.layers import linear
from crosspatch.tasks import make_task
from crosspatch.training import machine as machines
from crosspatch.training import measure
from crosspatch.training import plan as plans
from crosspatch.training.evaluation import predict_probabilities
from crosspatch.training.guard import NotFinite
from crosspatch.training.judge import finish
from crosspatch.training.loop import fit
from crosspatch.training.measure import resolve_products
from crosspatch.training.mix import ATTENTIVE
from crosspatch.training.objective import SUPERVISED, make_objective
from crosspatch.training.package import WEIGHTS, file_hash, load_model
from crosspatch.training.pictures import Pictures, open_source, read_pictures
from crosspatch.training.recipe import Recipe
from crosspatch.training.recipes import load_recipe, small
from crosspatch.training.reporter import Reporter, Silent
from crosspatch.training.run import RunFolder
from crosspatch.training.start import versions_of
from crosspatch.training.state import TEMPORARY, flush_file
from crosspatch.training.warmstart import saved_model

RATE = 0.2  # of the run's peak rate
WARMUP = 0.05  # of the steps
EVAL_SHARE = 0.1  # of the time, that validation may take
SPARE = 0.03  # of the time
FEW = 200  # validation pictures that judge what the search had no time for
DISTILL = {"kind": "soft", "alpha": 0.5, "tau": 2.0}


class Finetuned(NamedTuple):
    """A pupil that has learnt: name: with how long, folder: its run, seconds: of steps and
    validations, over all resumes."""

    pupil: Pupil
    name: str
    folder: Path
    seconds: float
    steps: int


def finetune(
    run: str | Path,
    chosen: Sequence[Pupil],
    seconds: float,
    *,
    data: str | Path | None = None,
    shop: Path | None = None,
    reporter: Reporter | None = None,
) -> Iterator[Finetuned]:
    """Train the `chosen` reductions of a run one after the other, each an equal part of `seconds`.

    data: where the run's pictures are, None: where they were; shop: the folder for them, None:
    RUN/shrink. What was trained by an earlier call is not trained again, and what was interrupted
    goes on. One whose loss stops being finite is left out, and the reporter told.
    Raises UsageError where not even a step fits into the time, DataError where the pictures are no
    longer the run's; Interrupted (exit code 4) after a signal, with the state saved.
    """
    run, tell = Path(run), reporter or Silent()
    school = _School(run, data, shop or run / "shrink", seconds / max(1, len(chosen)), tell)
    for place, pupil in enumerate(chosen, 1):
        if not school.ended(pupil):
            tell.message(
                f"fine-tuning {place} of {len(chosen)}: {pupil.name}, {lasting(school.seconds)}"
            )
        try:
            with _settings_kept():
                done = school.teach(pupil)
        except UsageError as error:
            if not isinstance(error.__cause__, NotFinite):
                raise
            tell.message(f"{pupil.name} was not fine-tuned: {error.got}")
            continue
        yield done


@register("finetuned")
def finetuned(context: Context) -> Iterator[Candidate]:
    """The networks with fewer tokens that lose too much, after they have learnt on for
    `context.further["finetune"]` seconds together, which are not the search's own.

    `context.further["reporter"]`, if there is one, hears how that goes.
    """
    seconds, began = context.further.get("finetune"), time.monotonic()
    chosen = _chosen(context, seconds) if seconds else []
    if seconds and not chosen:
        context.remarks.append(
            "nothing was fine-tuned: no faster network with fewer tokens loses more than the budget"
        )
    how = {"data": context.data, "reporter": context.further.get("reporter")}
    lessons = finetune(context.run, chosen, seconds or 0.0, **how)
    try:
        for one in lessons if chosen else ():
            context.until += time.monotonic() - began
            yield Candidate(
                one.name, "finetuned", partial(load_model, one.folder), one.pupil.macs,
                one.pupil.method, one.pupil.options,
                screen=True, trained=one.seconds, run=str(one.folder),
            )  # fmt: skip
            began = time.monotonic()
    except UsageError as error:  # the time does not hold a step
        context.remarks.append(f"not fine-tuned: {error.got}, where it takes {error.expected}")


def _chosen(context: Context, seconds: float) -> list[Pupil]:
    """Those to train. The choice is kept for the same budget, time and weights: a search that goes
    on measures more, and what was begun is to be found again."""
    weights = file_hash(context.run / "model" / WEIGHTS)
    asked = repr((context.budget, seconds, weights)).encode()
    path = context.folder / f"finetune-{hashlib.sha256(asked).hexdigest()[:8]}.json"
    with suppress(OSError, ValueError, TypeError):
        return [Pupil(**one) for one in json.loads(path.read_text(encoding="utf-8"))]
    found = pupils(context.rows, context.budget)
    found = found or pupils([*context.rows, *_untried(context)], context.budget)
    if found:
        draft = path.with_name(f"{TEMPORARY}{path.name}")
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(json.dumps([asdict(one) for one in found]), encoding="utf-8")
        flush_file(draft)
        os.replace(draft, path)
    return found


def _untried(context: Context) -> list[Measured]:
    """The strongest reduction of each method for which the search had no time, as `FEW` validation
    pictures judge it."""
    known, strongest = {one.name for one in context.rows}, dict[str, Candidate]()
    for one in SOURCES["tokens"](replace(context, remarks=[])):
        best = strongest.get(one.method)
        if one.name not in known and (best is None or one.macs < best.macs):
            strongest[one.method] = one
    if not strongest:
        return []
    tell = context.further.get("reporter") or Silent()
    tell.message(f"looking which of {len(strongest)} untried networks are worth fine-tuning")
    school = _School(context.run, context.data, context.run / "shrink", 0.0, tell)
    return [
        Measured(name=one.name, kind="tokens", method=one.method, options=one.options,
                 macs=one.macs, drop=school.lost(one.make().module, context.trained.module),
                 dropped="no time was left to measure it")
        for one in strongest.values()
    ]  # fmt: skip


class _School:
    """Trains reductions of the run in `run` for `seconds` each, into folders of `shop`."""

    def __init__(
        self, run: Path, data: str | Path | None, shop: Path, seconds: float, tell: Reporter
    ) -> None:
        self.run, self.shop, self.seconds, self.tell = run, shop, seconds, tell
        self.config = RunFolder(run).read_config()
        self.data = str(data if data is not None else self.config["run"]["data"])
        path = (run / "model").resolve()
        kept = {"kind": "run", "where": str(run), "path": str(path)}
        self.origin = kept | {"sha256": file_hash(path / WEIGHTS)}

    @cached_property
    def source(self) -> Source:
        """The run's pictures. Raises DataError where they are others now."""
        source = open_source(self.data, **self.config.get("reading", {}))
        if source.fingerprint() != self.config["run"]["fingerprint"]:
            raise DataError(
                f"the pictures of {self.data} are not those that {self.run} was trained on",
                "the same pictures: others might judge what they have taught",
                "put them back, or say where they are with --data",
            )
        return source

    @cached_property
    def pictures(self) -> Pictures:
        """Read once for all. The test pictures are in no part of it."""
        recipe = Recipe.from_dict(self.config["recipe"])
        split = read_split(self.run / "split.csv", self.source)
        unseen = Split(split.train, split.val, np.empty(0, np.int64))
        prepared = read_pictures(self.source, recipe, self.tell)
        return Pictures(self.source, prepared, unseen, self.source.fingerprint())

    def lost(self, module: Any, before: Any) -> float:
        """How much worse `module` is than `before` on `FEW` validation pictures: a share."""
        images = self.pictures.validation
        if len(images) > FEW:
            images = images.subset(np.sort(np.random.default_rng(0).permutation(len(images))[:FEW]))
        task: Any = make_task(Recipe.from_dict(self.config["recipe"]).task, self.source.classes)
        merits = list[float]()
        for one in (before, module):
            probs = predict_probabilities(one, images, FEW, probabilities=task.probabilities)
            merits.append(float(task.brief(probs, images.labels)[task.merit] or 0.0))
        return merits[0] - merits[1]

    def folder(self, pupil: Pupil) -> RunFolder:
        return RunFolder(pupil.folder(self.shop, self.seconds))

    def ended(self, pupil: Pupil) -> bool:
        """Whether it was trained to its end, from the weights that the run has now."""
        folder = self.folder(pupil)
        return folder.ended and not self._stale(folder)

    def _stale(self, folder: RunFolder) -> bool:
        """Whether what the folder holds began with other weights, or cannot find them any more."""
        if not folder.config_path.is_file():
            return False
        its = folder.read_config().get("recipe", {}).get("weights", {})
        same = ("sha256",) if folder.ended else ("sha256", "path")
        return any(its.get(key) != self.origin[key] for key in same)

    def teach(self, pupil: Pupil) -> Finetuned:
        """Train it, or go on with it; read what came out where it has ended."""
        folder = self.folder(pupil)
        if not self.ended(pupil):
            self._train(pupil, folder, stale=self._stale(folder))
        report = json.loads(folder.report_path.read_text(encoding="utf-8"))
        seconds, steps = float(report["seconds"]), int(report["steps"])
        name = f"{pupil.name}, fine-tuned {lasting(seconds)}"
        return Finetuned(pupil, name, folder.path, seconds, steps)

    def _train(self, pupil: Pupil, folder: RunFolder, stale: bool) -> None:
        begun = folder.unfinished and not stale
        with RunFolder.create(folder.path, overwrite=stale, resume=begun) as run:
            if begun:
                config = run.read_config()
                recipe = Recipe.from_dict(config["recipe"])
            else:
                recipe, reasons, estimate = self._planned(pupil)
                config = self._config(recipe, reasons, estimate)
                self._write(run, config)
            model = saved_model(run, recipe, len(self.source.classes)) if begun else None
            objective = make_objective(recipe, self.source.classes, model)
            facts = {"fingerprint": config["run"]["fingerprint"], "versions": config["versions"]}
            parts = self.pictures.part("train"), self.pictures.validation
            outcome = fit(recipe, objective, *parts, run, self.tell, resume=begun, facts=facts)
            finish(run, recipe, self.pictures, config, outcome, self.tell)
            shutil.rmtree(run.last)  # nobody goes on with it

    def _planned(self, pupil: Pupil) -> tuple[Recipe, list[str], float]:
        """(the run's recipe from its weights at a low rate, as long as fits; what is to be said of
        it; its seconds). Raises UsageError where nothing fits."""
        before = Recipe.from_dict(self.config["recipe"])
        recipe = resolve_products(self._gentle(before, pupil))
        objective = make_objective(replace(recipe, weights={}), self.source.classes)
        per_step = measure.measure_step(recipe, objective, self.pictures.part("train"))
        per_eval = measure.measure_evaluation(recipe, objective, self.pictures.validation)
        recipe = fitted(recipe, per_step, per_eval, self.seconds)
        reasons = [
            f"{pupil.reduction} in the network of {self.run}, which goes on from its weights for "
            f"{recipe.steps:,} steps at a peak rate of {recipe.lr:.2g}.",
            *objective.remarks,
            "The test pictures of that run were not looked at.",
        ]
        return recipe, reasons, plans.run_seconds(recipe, per_step, per_eval)

    def _gentle(self, before: Recipe, pupil: Pupil) -> Recipe:
        """The run's recipe for a network that knows its work: everything that is not said here
        stays, but for the length."""
        machine = machines.look()
        if before.penalties:  # a linear probe has neither rate nor optimiser
            rate = small.peak_rate(before.batch)
            before = replace(before, name="small", lr=rate, optimiser=small.OPTIMISER)
        peak = RATE * before.lr
        mixing = [one for one in zip(before.mix, before.mix_prob, before.mix_alpha, strict=True)
                  if one[0] not in ATTENTIVE]  # fmt: skip
        names, chances, alphas = zip(*mixing, strict=True) if mixing else ((), (), ())
        learnt: dict[str, Any] = {"objective": SUPERVISED, "objective_args": {}, "teacher": {}}
        if before.task == "classify":
            learnt = {"objective": "distill", "objective_args": DISTILL, "teacher": self.origin}
        if before.device != machine.device:
            precision = "bf16" if machine.bf16 else "fp32"
            before = replace(before, device=machine.device, precision=precision)
        return replace(
            before,
            weights=self.origin,
            head_rows=tuple(range(len(self.source.classes))),
            reduce=pupil.reduction,
            **learnt,
            labels={}, sizes=(), penalties=(), freeze=0, layer_decay=1.0, sam=0.0, stages=(),
            schedule="cosine", deferred=0.0, warmup=0,
            lr=peak, min_lr=load_recipe(before.name).last_rate(peak),
            mix=names, mix_prob=chances, mix_alpha=alphas,
            threads=min(before.threads, machine.cores), devices=1, compile=False,
            workers=0 if self.pictures.prepared.images.cached else max(1, machine.cores - 1),
            time_budget=self.seconds,
        )  # fmt: skip

    def _config(self, recipe: Recipe, reasons: list[str], estimate: float) -> dict[str, Any]:
        """As `training.start` writes it."""
        about = self.config["run"]
        asked = {key: getattr(recipe, key)["where"] for key in ("weights", "teacher")
                 if getattr(recipe, key)}  # fmt: skip
        return {
            "run": {
                "data": self.data,
                "command": shlex.join(sys.argv),
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
                "fingerprint": about["fingerprint"],
                "estimate_seconds": round(estimate, 1),
                "memory": self.pictures.prepared.message,
            },
            "reading": self.config.get("reading", {}),
            "why": {"reasons": reasons},
            "asked": {**asked, "reduce": recipe.reduce, "lr": recipe.lr, "steps": recipe.steps},
            "machine": machines.look().to_dict(),
            "versions": versions_of(recipe),
            "recipe": recipe.to_dict(),
        }

    def _write(self, run: RunFolder, config: dict[str, Any]) -> None:
        run.write_classes(self.source.classes)
        shutil.copy(self.run / "split.csv", run.path / "split.csv")
        write_skipped(run.path / "skipped.csv", self.pictures.prepared.skipped)
        run.write_config(config)


def fitted(recipe: Recipe, per_step: float, per_eval: float, seconds: float) -> Recipe:
    """The recipe with as many steps as fit into `seconds` beside their validations, `per_step` and
    `per_eval` being measured. Raises UsageError where not even one does."""
    per_epoch = recipe.steps_per_epoch
    every = max(1, math.ceil(per_eval / (EVAL_SHARE * per_step * per_epoch)))
    each = per_step + per_eval / (every * per_epoch)
    steps = int((seconds * (1 - SPARE) - per_eval) / each)
    if steps < 1:
        raise UsageError(
            f"{seconds:.1f} s for the fine-tuning of a candidate",
            f"at least {(each + per_eval) / (1 - SPARE):.1f} s: one step and one validation",
            "give --finetune more time",
        )
    steps = min(steps, load_recipe(recipe.name).EPOCHS_MOST * per_epoch)
    return replace(recipe, steps=steps, eval_every=every, warmup=round(WARMUP * steps))


def lasting(seconds: float) -> str:
    """For a name: 0.4 s, 12 s, 4 min, 1.5 h."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5970 else f"{seconds / 3600:.1f} h"


@contextmanager
def _settings_kept() -> Iterator[None]:
    """A training sets how this process multiplies: afterwards it is as it was."""
    before = "on" if linear.active() else "off"
    with torch_threads(torch.get_num_threads()), linear.switched(before):
        yield
