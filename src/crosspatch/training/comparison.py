# SPDX-License-Identifier: Apache-2.0
"""compare.json: what a comparison compares and how, written before its first run."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from crosspatch.errors import DataError, UsageError
from crosspatch.training.candidates import Candidate
from crosspatch.training.state import TEMPORARY, flush_file, flush_folder

PLAN = "compare.json"
SCHEMA = 1


@dataclass(frozen=True)
class Plan:
    """What is compared and how: the part of compare.json that never changes, more seeds excepted.

    data, reading: as train_run takes them; candidates; common: settings that hold for all; seeds;
    split_seed; epochs of each run, or time: seconds asked for all, and each: those of one run;
    fixed: settings that were measured once so that all runs have the same (threads, eval_every),
    unless a candidate has its own;
    uses: by candidate the sha256 of teachers, labels and weights; seconds: by candidate, expected
    of one run; fingerprint: of the data; remarks: sentences; command, created.
    """

    data: str
    reading: dict[str, Any]
    candidates: tuple[Candidate, ...]
    common: dict[str, Any]
    seeds: tuple[int, ...]
    split_seed: int
    epochs: int | None
    time: float | None
    each: float | None
    fixed: dict[str, Any] = field(default_factory=dict)
    uses: dict[str, dict[str, str]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    fingerprint: str = ""
    remarks: tuple[str, ...] = ()
    command: str = ""
    created: str = ""

    @property
    def expected(self) -> float:
        """Seconds that all runs take, as far as that was foreseen."""
        if self.each is not None:
            return self.each * len(self.seeds) * len(self.candidates)
        return sum(self.seconds.values()) * len(self.seeds)

    def overrides(self, candidate: Candidate, seed: int) -> dict[str, Any]:
        """What train_run is given for one run."""
        length = {"epochs": self.epochs} if self.epochs else {"time": self.each}
        given = {**self.common, **self.fixed, **candidate.settings}
        return {**given, **length, "seed": seed, "split_seed": self.split_seed}

    def runs(self, out: Path) -> Iterator[tuple[Candidate, int, Path]]:
        """Every run in the order in which they are trained, with its folder."""
        for seed in self.seeds:
            for candidate in self.candidates:
                yield candidate, seed, out / candidate.folder / f"seed-{seed}"

    def to_dict(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value is not None}

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> Plan:
        """The inverse of `to_dict`, from JSON."""
        made: dict[str, Any] = {key: given.get(key) for key in ("epochs", "time", "each")}
        made |= {key: given[key] for key in given if key in cls.__dataclass_fields__}
        made["candidates"] = tuple(Candidate(**one) for one in given["candidates"])
        made["seeds"], made["remarks"] = tuple(given["seeds"]), tuple(given["remarks"])
        return cls(**made)


def read_plan(out: Path) -> dict[str, Any]:
    """compare.json. Raises DataError where it is damaged or of a newer version."""
    try:
        kept = json.loads((out / PLAN).read_text(encoding="utf-8"))
        if kept["schema"] == SCHEMA:
            Plan.from_dict(kept["plan"])
            return kept
        why = f"schema {kept['schema']}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = str(error)
    raise DataError(
        f"{out / PLAN} cannot be read ({why})",
        "the plan of a comparison of this version",
        "choose another --out",
    )


def write_plan(
    out: Path, plan: Plan, failed: Mapping[str, str], results: Mapping[str, Any] | None = None
) -> None:
    """compare.json, whole or as it was. Raises UsageError where it cannot be written."""
    whole = {"schema": SCHEMA, "plan": plan.to_dict(), "failed": dict(failed)}
    if results is not None:
        whole["results"] = dict(results)
    text = json.dumps(whole, indent=1, ensure_ascii=False, allow_nan=False, default=str)
    draft = out / f"{TEMPORARY}{PLAN}"
    try:
        out.mkdir(parents=True, exist_ok=True)
        draft.write_text(text + "\n", encoding="utf-8")
        flush_file(draft)
        os.replace(draft, out / PLAN)
        flush_folder(out)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise UsageError(
            f"{out / PLAN} cannot be written: {error.strerror}",
            "a folder that can be written, and room on the disk",
            "make room or choose another --out, then type it again",
        ) from error
