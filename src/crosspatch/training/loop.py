# SPDX-License-Identifier: Apache-2.0
"""The one training loop.

A state is saved at ends of epochs (not more often than every `SAVE_SECONDS`), inside epochs every
`SAVE_LONG_SECONDS`, at the end, and on SIGINT or SIGTERM, in a thread of its own
(`training.writer`). A run that is killed at any moment and resumed ends with the numbers of one
that was not (same machine, same thread count). When a loss is not finite the run goes back and on
with a lower rate: see `training.guard`.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from dataclasses import dataclass
from typing import Any

import torch

from crosspatch.data.loading import train_batches
from crosspatch.data.prepare import ImageSet
from crosspatch.errors import Interrupted, UsageError
from crosspatch.objectives import Objective
from crosspatch.training import launch, team
from crosspatch.training.changes import accept_state, require_untrained
from crosspatch.training.evaluation import predict_probabilities
from crosspatch.training.guard import (
    CUT,
    NAN_COLUMNS,
    TRIES,
    NotFinite,
    agreed,
    boundary,
    describe,
    give_up,
    good_state,
    nan_rows,
)
from crosspatch.training.package import model_config, save_model
from crosspatch.training.recipe import Recipe
from crosspatch.training.reporter import Reporter, Silent
from crosspatch.training.run import RunFolder
from crosspatch.training.signals import Signals, Stopped
from crosspatch.training.state import GOOD, LAST, load_state
from crosspatch.training.stepper import Stepper
from crosspatch.training.writer import StateWriter

SAVE_SECONDS = 15.0
SAVE_LONG_SECONDS = 60.0
REPORT_SECONDS = 0.25
UNVALIDATED: dict[str, Any] = dict.fromkeys(
    ("val_loss", "val_accuracy", "val_low", "val_high", "val_map")
)


def merit(row: dict[str, Any], column: str) -> tuple[float, float]:
    """What rows of metrics.csv are compared by: a figure (none is the least), then the loss."""
    return -1.0 if row[column] is None else row[column], -row["val_loss"]


@dataclass(frozen=True)
class Outcome:
    """What a training ended with: rows of metrics.csv, steps done, seconds over all resumes."""

    best: dict[str, Any]
    final: dict[str, Any]
    rows: list[dict[str, Any]]
    steps: int
    seconds: float


class _Clock:
    """Seconds of the run, over all resumes, and pictures per second of the present stretch."""

    def __init__(self) -> None:
        self.before, self.began = 0.0, time.perf_counter()
        self.reported = self.saved = self.began
        self.images, self.stretch = 0, self.began

    def elapsed(self) -> float:
        return self.before + time.perf_counter() - self.began

    def restart(self) -> None:
        self.images, self.stretch = 0, time.perf_counter()

    def speed(self) -> float:
        return self.images / max(1e-9, time.perf_counter() - self.stretch)


class _Fit:
    """One call of `fit`."""

    def __init__(
        self,
        recipe: Recipe,
        stepper: Stepper,
        train: ImageSet,
        val: ImageSet,
        run: RunFolder,
        reporter: Reporter,
        facts: dict[str, Any],
        pace: tuple[float, float, float],
    ) -> None:
        self.recipe, self.stepper, self.run, self.reporter = recipe, stepper, run, reporter
        self.train, self.val, self.facts = train, val, facts
        self.report_seconds, self.save_seconds, self.save_long_seconds = pace
        self.task: Any = stepper.objective.task
        self.due = recipe.evaluations()
        self.step, self.rows = 0, []
        self.clock, self.signals = _Clock(), Signals()
        self.writer = StateWriter(run.last)

    def go(self) -> Outcome:
        """Train to the end from wherever the state stands."""
        with self.signals.caught():
            try:
                if self.step == 0:
                    self._save(GOOD)
                while not self._done():
                    pass
                self.writer.wait()
            except (Interrupted, Stopped) as stop:
                self._stop(stop)
        return Outcome(
            self.best(), self.rows[-1], self.rows, self.step, round(self.clock.elapsed(), 3)
        )

    def _done(self) -> bool:
        """Train to the end and save; False when the run had to go back."""
        try:
            self._evaluate_if_due()
            while self.step < self.recipe.steps:
                self._train_epoch()
                if not self._evaluate_if_due():
                    self._tell(self._row(self.clock.speed(), None))
            self._save()
        except NotFinite as found:
            self._go_back(found)
            return False
        return True

    def _go_back(self, found: NotFinite) -> None:
        """Name the pictures, return to the last validation and lower the rate from there on.

        Raises UsageError after `TRIES` times, and when no state is left to go back to.
        """
        pictures = self.val if found.what == "validation" else self.train
        keys = pictures.subset(found.index).keys
        number, back = len(self.stepper.cuts) + 1, boundary(self.due, found.step)
        cuts, state = [*self.stepper.cuts, (back, CUT)], None
        if team.first():
            self.run.note_nan(NAN_COLUMNS, nan_rows(found, number, back, keys))
            self.writer.wait()
            same = {"recipe": self.recipe.to_dict(), "fingerprint": self.facts.get("fingerprint")}
            state = good_state(self.run.last, back, cuts, same) if number <= TRIES else None
        state = team.share_state(state)
        if state is None:
            table, left = self.run.path / "nan.csv", number <= TRIES
            raise give_up(found, keys, self.recipe.lr, table, stateless=left) from found
        tensors, meta = state
        self.stepper.restore(tensors, meta["stepper"])
        self.stepper.cuts = cuts
        self.step, self.rows = meta["step"], meta["rows"]
        if team.first():
            self.run.write_metrics(self.rows)
        self._save()
        self.reporter.message(
            f"Back to step {self.step:,}: {describe(found, keys)}. All are listed in nan.csv. From "
            f"step {back:,} on the rate is {CUT**number:g} of the planned one (try {number} of "
            f"{TRIES})."
        )

    def best(self) -> dict[str, Any]:
        """The best row: highest by the task's merit, then lowest loss, then the earliest."""
        return max(self.rows, key=lambda row: merit(row, self.task.merit))

    def _train_epoch(self) -> None:
        r = self.recipe
        epoch, start = divmod(self.step, r.steps_per_epoch)
        end = min(r.steps, (epoch + 1) * r.steps_per_epoch)
        self.clock.restart()
        for batch in train_batches(
            self.train,
            r.batch,
            epoch=epoch,
            seed=r.seed,
            start_batch=start,
            rank=team.rank(),
            world=team.size(),
            workers=r.workers,
            repeats=r.repeats,
            balanced=r.balance == "sampler",
        ):
            self.stepper.step(batch, epoch, self.step)
            self.step += 1
            self.clock.images += batch.n_global
            self._after_step()
            if self.step == end:
                return
        raise UsageError(
            f"epoch {epoch + 1} ended after {self.step - epoch * r.steps_per_epoch} steps",
            f"{end - epoch * r.steps_per_epoch} steps, as the run was planned with",
            "continue with the data the run was begun with, or train anew with --overwrite",
        )

    def _after_step(self) -> None:
        now = time.perf_counter()
        self.writer.check()
        found = self.stepper.watch.found() if self.stepper.reads_each_step else None
        bad, stop, report, save = team.either(
            found is not None,
            self._unwanted(),
            now - self.clock.reported >= self.report_seconds or self.step == self.recipe.steps,
            now - self.clock.saved >= self.save_long_seconds,
        )
        if bad:
            raise agreed(found)
        if stop:
            raise Stopped
        if report:
            self.clock.reported = now
            loss = self.stepper.mean_loss(self.step)
            self.reporter.step(self.step, self.recipe.steps, loss, self.clock.speed())
        if save:
            self._save()

    def _unwanted(self) -> bool:
        """Whether this process was told to stop, or what launched it has ended."""
        return self.signals.name is not None or launch.orphaned()

    def _evaluate_if_due(self) -> bool:
        """Evaluation is owed, not scheduled: a kill between save and evaluation loses no row."""
        if bisect_right(self.due, self.step) <= len(self.rows):
            return False
        if not self.rows:
            self.writer.wait()  # who has a row has a state
        speed = self.clock.speed()
        row = self._row(speed, self._validate())
        self.rows.append(row)
        row["best"] = self.best() is row
        self.stepper.reset_loss()
        if row["best"] and team.first():
            config = model_config(self.recipe, self.task.classes)
            save_model(self.run.model, self.stepper.evaluated, config)
        if team.first():
            self.run.append_metrics(row)
        self._tell(row)
        if team.either(time.perf_counter() - self.clock.saved >= self.save_seconds)[0]:
            self._save(good=True)
        return True

    def _tell(self, row: dict[str, Any]) -> None:
        self.reporter.epoch({**row, "remaining": self._remaining()})

    def _validate(self) -> dict[str, Any]:
        self.stepper.watch.check()
        r = self.recipe
        # a batch here can take longer than who stops us will wait
        self.signals.at_once = team.size() == 1
        try:
            probs = predict_probabilities(
                self.stepper.evaluated,
                self.val,
                r.eval_batch,
                device=self.stepper.device,
                precision=r.precision,
                workers=r.workers,
                probabilities=self.task.probabilities,
                stop=lambda: team.either(self._unwanted())[0],
                shared=True,
            )
        finally:
            self.signals.at_once = False
        bad = (~probs.isfinite().all(1)).nonzero().flatten()
        if len(bad):
            spoilt = len(bad) == len(probs)  # by a step, not by pictures
            what, index = ("weights", self.stepper.watch.last) if spoilt else ("validation", bad)
            raise NotFinite(self.step - 1, what, torch.nan, index)
        return self.task.brief(probs, self.val.labels)

    def _row(self, speed: float, figures: dict[str, Any] | None) -> dict[str, Any]:
        """A row of metrics.csv; an epoch that was not validated has none, and figures None.

        `train_loss` is the mean since the last validation.
        """
        r, loss, found = self.recipe, self.stepper.mean_loss(self.step), figures or UNVALIDATED
        return {
            "epoch": -(-self.step // r.steps_per_epoch),
            "epochs": r.epochs,
            "step": self.step,
            "train_loss": loss,
            **found,
            "lr": self.stepper.lr(self.step - 1),
            "images_per_second": round(speed, 1),
            "elapsed": round(self.clock.elapsed(), 1),
        }

    def _remaining(self) -> float:
        """Seconds to the end at the pace so far, validation and saving included."""
        return self.clock.elapsed() / self.step * (self.recipe.steps - self.step)

    def _save(self, name: str = LAST, *, good: bool = False) -> None:
        self.stepper.mean_loss(self.step)
        self.stepper.check_weights(self.step)
        epoch, batch = divmod(self.step, self.recipe.steps_per_epoch)
        meta = {
            **self.facts,
            "step": self.step,
            "epoch": epoch,
            "sampler": {"seed": self.recipe.seed, "epoch": epoch, "batch": batch},
            "best": self.best() if self.rows else None,
            "rows": self.rows,
            "elapsed": self.clock.elapsed(),
            "recipe": self.recipe.to_dict(),
            "stepper": self.stepper.numbers(),
        }
        if team.first():
            self.writer.save(self.stepper.tensors(), meta, name, good=good)
        self.clock.saved = time.perf_counter()

    def _stop(self, cause: BaseException) -> None:
        try:
            self._save()
        except NotFinite as found:
            self._go_back(found)
        self.writer.wait()
        why = self.signals.name or "the program that watches it"
        raise Interrupted(
            f"stopped by {why} at step {self.step:,} of {self.recipe.steps:,}",
            f"nothing is lost: {self.run.path} holds the state",
            "continue with the same command and --resume",
        ) from cause

    def resume(self, force: bool = False) -> None:
        """Go back to the newest usable state; with `force` also to one of other settings or data.

        Raises UsageError when the run was another one, DataError where its states are gone.
        """
        found = load_state(self.run.last) if team.first() else None
        state = team.share_state(found[:2] if found else None)
        if state is None:
            if team.first():
                require_untrained(self.run)
            self.reporter.message("No state was saved yet: the run begins at its first step.")
            return
        tensors, meta = state
        for remark in found[2] if found else ():
            self.reporter.message(remark)
        accepted = accept_state(meta, self.recipe, self.facts, force, self.reporter.message)
        changed, meta = accepted is not meta, accepted
        self.stepper.restore(tensors, meta["stepper"])
        self.step, self.rows = meta["step"], meta["rows"]
        self.clock.before = meta["elapsed"]
        if changed:  # from here on there is a state of the run as it is now to go back to
            self._save(good=True)
        begins = "No state was saved after the start: the run begins at its first step."
        goes_on = f"Continues at step {self.step:,} of {self.recipe.steps:,}."
        self.reporter.message(goes_on if self.step else begins)


def fit(
    recipe: Recipe,
    objective: Objective,
    train: ImageSet,
    val: ImageSet,
    run: RunFolder,
    reporter: Reporter | None = None,
    *,
    resume: bool = False,
    force: bool = False,
    facts: dict[str, Any] | None = None,
    report_seconds: float = REPORT_SECONDS,
    save_seconds: float = SAVE_SECONDS,
    save_long_seconds: float = SAVE_LONG_SECONDS,
) -> Outcome:
    """Train `objective` by `recipe`; the best model by validation stands in `run.model` afterwards.

    facts: written into the state; "fingerprint" and "versions" are compared on resume; force: go on
    from a state of other data or settings, where that can be (`training.changes`). Raises
    Interrupted (exit code 4) after SIGINT or SIGTERM, with the state saved; UsageError when a
    resumed run has other settings or data, the loss was not finite once more than `guard.TRIES`
    times, or the disk is full.
    """
    pace = (report_seconds, save_seconds, save_long_seconds)
    stepper = Stepper(recipe, objective)
    work = _Fit(recipe, stepper, train, val, run, reporter or Silent(), facts or {}, pace)
    try:
        if resume:
            work.resume(force)
        if team.first():
            run.write_metrics(work.rows)
        return work.go()
    finally:
        work.writer.close()
