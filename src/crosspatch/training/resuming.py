# SPDX-License-Identifier: Apache-2.0
"""A run that is gone on with: as it was begun, longer after its end, or changed by `--force`.

A run folder that has not ended is continued by `--resume`, with settings left away or as they were,
and also by the very command that began it. What differs is listed, always, and needs `--force`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from crosspatch.data.loading import steps_per_epoch
from crosspatch.data.skipped import write_skipped
from crosspatch.data.sources import DIGITS, Source
from crosspatch.data.split import carry_split, read_split, write_split
from crosspatch.errors import CrosspatchError, DataError, UsageError, option
from crosspatch.training.balance import resolve_balance
from crosspatch.training.changes import (
    CHANGEABLE,
    changed_pictures,
    changed_settings,
    require_changeable,
    scaled,
)
from crosspatch.training.measure import resolve_products
from crosspatch.training.optim import AGAIN
from crosspatch.training.pictures import Pictures, read_pictures
from crosspatch.training.recipe import Recipe
from crosspatch.training.recipes import load_recipe
from crosspatch.training.reporter import Reporter
from crosspatch.training.run import RunFolder
from crosspatch.training.state import load_state


class Asked(NamedTuple):
    """What is asked of a run that is gone on with. given: the settings typed; whole: whether they
    are all of the command that began it (it was typed again, without --resume); force."""

    given: dict[str, Any]
    whole: bool
    force: bool


def with_defaults(source: Source, given: dict[str, Any]) -> dict[str, Any]:
    """The settings typed, and those that the data set itself decides."""
    return {"flip": False, **given} if source.name == DIGITS else given


def begun_reading(out: Path, asked: dict[str, Any], whole: bool) -> dict[str, Any]:
    """How the data of the run in `out` are read: as it was begun.

    Raises UsageError where something else is asked, or, with `whole`, something is missing.
    """
    begun = RunFolder(out).read_config().get("reading", {})
    changed = differing(asked, begun, whole)
    if changed:
        raise UsageError(
            f"the run in {out} was begun with its data read otherwise: {', '.join(changed)}",
            "--resume alone, or the columns and groups it was begun with (--force changes no "
            "labels and no groups)",
            "leave them away, or train anew with --overwrite",
        )
    return begun


def _plain(given: Mapping[str, Any]) -> dict[str, Any]:
    """As config.toml holds it: lists for tuples."""
    return json.loads(json.dumps(dict(given)))


def differing(given: Mapping[str, Any], begun: Mapping[str, Any], whole: bool) -> list[str]:
    """`--epochs 9 (was 3)` for every setting that differs; with `whole`, `no --epochs (was 3)`."""
    now = _plain(given)
    changed = [
        f"{option(key, value)} (was {begun.get(key, 'not given')})"
        for key, value in now.items()
        if begun.get(key) != value
    ]
    gone = [key for key in begun if key not in now] if whole else []
    return changed + [f"no --{key.replace('_', '-')} (was {begun[key]})" for key in gone]


def continue_run(
    run: RunFolder, source: Source, asked: Asked, reporter: Reporter
) -> tuple[Recipe, Pictures, dict[str, Any]]:
    """The recipe, pictures and config that `run` goes on with.

    Raises UsageError and DataError where settings or pictures differ, which they list; with
    `--force` only where what differs cannot change.
    """
    config, longer = _lengthened(run, run.read_config(), asked.given)
    begun = config.get("asked", {})
    given = with_defaults(source, asked.given) if asked.whole else asked.given
    settings = differing(given, begun, asked.whole and not asked.force)
    fingerprint = source.fingerprint()
    moved = fingerprint != config["run"]["fingerprint"]
    files = changed_pictures(run.path, source) if moved else []
    if (settings or files) and not asked.force:
        raise _differs(run, settings, files, asked)
    recipe = Recipe.from_dict(config.get("recipe", {}))
    if settings or files:
        if longer is None and run.ended:
            raise _nothing_to_change(run, settings + files)
        changed = {
            key: given[key] for key, value in _plain(given).items() if begun.get(key) != value
        }
        return _force(run, source, changed, settings + files, config, recipe, reporter)
    split = read_split(run.path / "split.csv", source)
    pictures = Pictures(source, read_pictures(source, recipe, reporter), split, fingerprint)
    if longer is not None:
        run.write_config(config)
        run.report_path.unlink()
        reporter.message(longer)
    elif asked.whole:
        reporter.message(
            f"{run.path} holds this very run, not yet ended: it is continued "
            "(--overwrite would begin anew)."
        )
    return recipe, pictures, config


def _differs(
    run: RunFolder, settings: list[str], files: list[str], asked: Asked
) -> CrosspatchError:
    parts = [f"the run in {run.path} was begun with other settings: {', '.join(settings)}"]
    parts = parts if settings else []
    if files:
        parts.append(f"the pictures are no longer those the run was begun with: {'; '.join(files)}")
    kind = DataError if files else UsageError
    fixed = [key for key in asked.given if not _changeable(key, asked.given, run)]
    force = "" if fixed else "add --resume --force to go on with what is there now, "
    back = [word for word, there in (("leave the settings away", settings),
                                     ("put the pictures back", files)) if there]  # fmt: skip
    return kind(
        "; ".join(parts),
        "the same settings and the same pictures (names, sizes and labels)",
        f"{' and '.join(back)}, {force}or train anew with --overwrite",
    )


def _changeable(key: str, given: Mapping[str, Any], run: RunFolder) -> bool:
    begun = run.read_config().get("asked", {})
    if not differing({key: given[key]}, begun, False):
        return True
    try:
        require_changeable([key])
    except UsageError:
        return False
    return True


def _nothing_to_change(run: RunFolder, listed: list[str]) -> UsageError:
    return UsageError(
        f"--force, and the run in {run.path} has ended: {'; '.join(listed)}",
        "a run that still has steps to do with what was changed",
        "add --epochs N to let it go on, or train anew with --overwrite",
    )


def _force(
    run: RunFolder,
    source: Source,
    given: dict[str, Any],
    listed: list[str],
    config: dict[str, Any],
    recipe: Recipe,
    reporter: Reporter,
) -> tuple[Recipe, Pictures, dict[str, Any]]:
    """The run with other settings and pictures; what it was begun with is written anew."""
    require_changeable(given)
    if list((run.path / "classes.txt").read_text("utf-8").splitlines()) != list(source.classes):
        raise DataError(
            "the classes are no longer those the run was begun with",
            "the same classes: the model has a place for each (--force cannot add one)",
            "put the class folders back, or train anew with --overwrite",
        )
    prepared = read_pictures(source, recipe, reporter)
    split = carry_split(run.path / "split.csv", source, prepared.kept, prepared.alike)
    pictures = Pictures(source, prepared, split, source.fingerprint())
    reasons = [f"--force changed the run while it was under way: {'; '.join(listed)}."]
    changed = _changed_recipe(recipe, given, pictures, reasons)
    _require_steps_left(run, recipe, changed)
    share = changed.steps * changed.batch / (recipe.steps * recipe.batch)
    estimate = round(config["run"]["estimate_seconds"] * share, 1)
    facts = {"fingerprint": pictures.fingerprint, "estimate_seconds": estimate}
    config = {
        **config,
        "run": {**config["run"], **facts},
        "asked": {**config["asked"], **_plain(given)},
        "why": {"reasons": [*config["why"]["reasons"], *reasons]},
        "recipe": changed.to_dict(),
    }
    write_split(run.path / "split.csv", source, split)
    write_skipped(run.path / "skipped.csv", prepared.skipped)
    run.write_config(config)
    run.report_path.unlink(missing_ok=True)
    said = "; ".join([*listed, *changed_settings(recipe, changed).values()])
    reporter.message(
        f"Goes on with what was changed: {said}. Pictures stay in the split they had, new ones "
        "train unless they are copies of others or the data say otherwise. From here on no single "
        "command gives these numbers, and rows of metrics.csv before and after do not compare."
    )
    return changed, pictures, config


def _changed_recipe(
    recipe: Recipe, given: dict[str, Any], pictures: Pictures, reasons: list[str]
) -> Recipe:
    """The recipe with settings as typed or as fields, for these pictures; the schedule keeps its
    length in epochs unless epochs are given."""
    source = load_recipe(recipe.name)
    plain = {key: value for key, value in given.items() if key in CHANGEABLE - {"augment"}}
    old, batch = recipe.steps_per_epoch, given.get("batch", recipe.batch)
    new = steps_per_epoch(len(pictures.split.train), batch)
    steps = scaled(recipe.steps, old, new)
    if "epochs" in given:
        steps = round(given["epochs"] * new)
    changed = replace(
        recipe,
        **{"warmup": scaled(recipe.warmup, old, new), **plain},
        steps=max(1, plain.get("steps", steps)),
        steps_per_epoch=new,
        stages=tuple(scaled(stage, old, new) for stage in recipe.stages),
    )
    if "lr" in given:
        changed = replace(changed, min_lr=source.last_rate(given["lr"]))
    augment = dict(given.get("augment", {}))
    augment |= {"flip": given["flip"]} if "flip" in given else {}
    changed = replace(changed, augment=replace(changed.augment, **augment))
    if "linear" in given:
        changed = resolve_products(changed)
    counts, classes = pictures.counts(), pictures.source.classes
    changed = replace(changed, class_counts=tuple(counts.tolist()))
    return resolve_balance(changed, counts, classes, reasons)


def _require_steps_left(run: RunFolder, then: Recipe, now: Recipe) -> None:
    found = load_state(run.last)
    done = 0 if found is None else found[1]["step"]
    reached = scaled(done, then.steps_per_epoch, now.steps_per_epoch)
    if done < then.steps and reached >= now.steps:
        raise UsageError(
            f"--epochs {now.epochs}, and the run has done {reached / now.steps_per_epoch:.3g}",
            "more epochs than it has had",
            "give more --epochs",
        )


def _lengthened(
    run: RunFolder, config: dict[str, Any], given: dict[str, Any]
) -> tuple[dict[str, Any], str | None]:
    """(the settings of a run that has ended and is to have more epochs, a sentence about it); else
    (the settings as they were, None).

    Raises UsageError when it has had as many already.
    """
    recipe, epochs = Recipe.from_dict(config.get("recipe", {})), given.get("epochs")
    if not run.ended or epochs in (None, config["asked"].get("epochs"), recipe.epochs):
        return config, None
    if recipe.penalties or recipe.schedule == "epochs":
        what = (
            "a linear probe has no epochs" if recipe.penalties else "its one cosine is its recipe"
        )
        raise UsageError(
            f"--epochs {epochs:g} for a run of --recipe {recipe.name} that has ended: {what}",
            "a recipe whose rates may rise once more, such as small",
            "train anew with --overwrite",
        )
    steps = round(epochs * recipe.steps_per_epoch)
    if steps <= recipe.steps:
        raise UsageError(
            f"--epochs {epochs:g}, and the run has ended after {recipe.epochs}",
            "more epochs than it has had",
            f"--resume --epochs {2 * recipe.epochs}, or train anew with --overwrite",
        )
    longer = recipe.longer(steps)
    estimate = config["run"]["estimate_seconds"] * (steps - recipe.steps) / recipe.steps
    config = {
        **config,
        "run": {**config["run"], "estimate_seconds": round(estimate, 1)},
        "asked": {**config["asked"], "epochs": epochs},
        "recipe": longer.to_dict(),
    }
    return config, (
        f"Goes on to {longer.epochs} epochs: the rate rises once more, to {AGAIN * recipe.lr:.2g}, "
        "and falls as half a cosine."
    )
