# SPDX-License-Identifier: Apache-2.0
"""What differs between a run as it was begun and as it is to go on: settings and pictures.

Every difference is listed. With `--force` a run goes on with other pictures and with other values
of `CHANGEABLE`; the rest makes the model, or says what was learnt, and is refused.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from crosspatch.data.sources import Source
from crosspatch.errors import DataError, UsageError
from crosspatch.training.recipe import Recipe
from crosspatch.training.run import RunFolder
from crosspatch.training.state import LAST

CHANGEABLE = frozenset(
    (
        "batch", "steps", "steps_per_epoch", "stages", "lr", "min_lr", "warmup", "weight_decay",
        "smoothing", "clip", "mix", "mix_prob", "mix_alpha", "augment", "precision", "compile",
        "workers", "threads", "linear", "balance", "class_weights", "deferred", "class_counts",
        "eval_batch", "time_budget",
    )
)  # fmt: skip
"""Fields of `Recipe` that may change while a run is under way."""
TYPED = {"epochs": "steps", "flip": "augment"}
"""What is typed under another name than its field."""
SHOWN = 3  # pictures named of each kind
REGROUPED = (
    "Saved by {then} and continued by {now} process(es). As before: the pictures of every batch, "
    "how they are augmented, the rates. Not as before: each process draws dropout, stochastic "
    "depth and mixing of its own, and sums differ in the last digits."
)


def changed_settings(then: Recipe, now: Recipe) -> dict[str, str]:
    """The fields that differ, each with `lr 0.005 -> 0.1`."""
    was, is_now = then.to_dict(), now.to_dict()
    return {
        key: f"{key} {was.get(key)} -> {is_now.get(key)}"
        for key in sorted(was.keys() | is_now.keys())
        if was.get(key) != is_now.get(key)
    }


def require_changeable(names: Iterable[str]) -> None:
    """Raises UsageError when one of these settings (fields, or as typed) cannot change."""
    fixed = [name for name in names if TYPED.get(name, name) not in CHANGEABLE]
    if fixed:
        raise UsageError(
            f"{', '.join(fixed)} cannot change while a run is under way, not even with --force",
            "the model, its input, the split and the recipe that the run was begun with",
            "put them back, or train anew with --overwrite",
        )


def scaled(step: int, old: int, new: int) -> int:
    """A step of a run of `old` steps an epoch -> as far in one of `new`, never past the epoch."""
    epoch, rest = divmod(step, old)
    return epoch * new + rest * new // old


def accept_state(
    meta: dict[str, Any],
    now: Recipe,
    facts: Mapping[str, Any],
    force: bool,
    tell: Callable[[str], None],
) -> dict[str, Any]:
    """The metadata of a saved state that a run by `now` goes on from; the very same object where
    nothing differs. Other versions are told of.

    Raises UsageError when settings or pictures differ (`facts` has the fingerprint), unless the run
    was made longer at its end, or `force` is set and they are changeable. Another number of
    processes is told of.
    """
    then = Recipe.from_dict(meta["recipe"])
    regrouped = then.devices != now.devices
    if regrouped:
        tell(REGROUPED.format(then=then.devices, now=now.devices))
        then = then.by(now.devices, now.threads)
    changed = changed_settings(then, now)
    listed = list(changed.values())
    moved = meta.get("fingerprint") != facts.get("fingerprint")
    if moved:
        listed.append("the pictures (names, sizes or labels)")
    if not moved and then == now.shorter and meta["step"] == then.steps:
        return dict(meta)
    if listed and not force:
        raise UsageError(
            f"changed since the state was saved: {'; '.join(listed)}",
            "the data and settings the run was begun with",
            "put them back, add --force to go on with them, or train anew with --overwrite",
        )
    require_changeable(changed)
    for key, was in meta.get("versions", {}).items():
        is_now = facts.get("versions", {}).get(key)
        if is_now != was:
            tell(f"{key} was {was} and is {is_now}: the last digits may differ.")
    if regrouped and not listed:
        return dict(meta)
    return rescaled(meta, then, now) if listed else meta


def rescaled(meta: dict[str, Any], then: Recipe, now: Recipe) -> dict[str, Any]:
    """The metadata of a state of `then`, with its steps as `now` counts them."""
    old, new = then.steps_per_epoch, now.steps_per_epoch
    cuts = [[scaled(at, old, new), times] for at, times in meta["stepper"].get("cuts", ())]
    stepper = {**meta["stepper"], "cuts": cuts}
    return {**meta, "step": scaled(meta["step"], old, new), "stepper": stepper}


def require_untrained(run: RunFolder) -> None:
    """Raises DataError when a run without any state has trained: its states were taken away."""
    if (run.model / "config.json").exists():
        raise DataError(
            f"{run.last} holds no state, and the run has trained already",
            f"{LAST} in it, as the run left it",
            "put it back, or train anew with --overwrite",
        )


def changed_pictures(run: Path, source: Source) -> list[str]:
    """How the pictures differ from those that split.csv and skipped.csv of a run know: how many
    came, went and changed, with the first names of each."""
    known, left_out = _rows(run / "split.csv"), {row["path"] for row in _rows(run / "skipped.csv")}
    sizes = dict(zip((item.key for item in source.items), source.sizes(), strict=True))
    classes = {item.key: source.named(item.label) for item in source.items}
    there = {row["path"] for row in known}
    seen, unread = there | left_out, {one.path for one in source.skipped}
    parts = {
        "came": [key for key in sizes if key not in seen and source.tail is None],
        "went": [key for key in (*there, *left_out) if key not in sizes and key not in unread],
        "changed": [
            row["path"]
            for row in known
            if row["path"] in sizes and row.get("size") not in (None, str(sizes[row["path"]]))
        ],
        "of another class": [
            row["path"] for row in known if classes.get(row["path"], row["class"]) != row["class"]
        ],
    }
    found = [f"{len(keys):,} {how} ({_named(keys)})" for how, keys in parts.items() if keys]
    return found or [
        "what could not be read then, sizes that were not noted then, or the long tail"
    ]


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _named(keys: Iterable[str]) -> str:
    keys = sorted(keys)
    more = f" and {len(keys) - SHOWN:,} more" if len(keys) > SHOWN else ""
    return ", ".join(keys[:SHOWN]) + more
