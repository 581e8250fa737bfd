# SPDX-License-Identifier: Apache-2.0
"""What each paper is, where it stands here, what it claims, and what was measured of that: one file
`<slug>.toml` per paper.

    title, arxiv      of the paper
    kinds, modules    what it is here (model, objective, mixing …), and the files it stands in
    status            built · reconstruction · smallest-form · studied
    departures        what differs from the paper or its authors' code, and why
    claims            what it claims
    [[measured]]      claim, figure, interval (low, high), hardware, command, date, verdict; kept
                      good or bad
"""

from __future__ import annotations

import os
import tomllib
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from crosspatch.errors import DataError, UsageError, near

HERE = Path(__file__).parent
KINDS = ("model", "tokens", "mixing", "objective", "data", "compress", "task", "explain")
STATUSES = ("built", "reconstruction", "smallest-form", "studied")


@dataclass(frozen=True)
class Measured:
    """One outcome. figure: a sentence with numbers; interval: (low, high) of 95 %, in the figure's
    unit, () where there is none; verdict: a sentence."""

    claim: str
    figure: str
    interval: tuple[float, ...]
    hardware: str
    command: str
    date: str
    verdict: str


@dataclass(frozen=True)
class Entry:
    """One paper: see the fields above."""

    slug: str
    title: str
    arxiv: str
    kinds: tuple[str, ...]
    modules: tuple[str, ...]
    status: str
    departures: tuple[str, ...]
    claims: tuple[str, ...]
    measured: tuple[Measured, ...] = ()


def slugs(folder: Path = HERE) -> list[str]:
    """The papers of the catalog."""
    return sorted(path.stem for path in folder.glob("*.toml"))


def load(slug: str, folder: Path = HERE) -> Entry:
    """The entry of a paper. Raises UsageError for an unknown slug, DataError for a damaged file."""
    if slug not in slugs(folder):
        raise UsageError(
            f"there is no paper {slug!r} in the catalog",
            f"one of {', '.join(slugs(folder))}",
            f"near it: {near(slug, slugs(folder)) or 'nothing'}",
        )
    path = folder / f"{slug}.toml"
    try:
        given = tomllib.loads(path.read_text(encoding="utf-8"))
        rows = tuple(_measured(row) for row in given.pop("measured", ()))
        plain: dict[str, Any] = {
            key: tuple(v) if isinstance(v, list) else v for key, v in given.items()
        }
        entry = Entry(slug=slug, measured=rows, **plain)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path} cannot be read ({error})", "an entry", "put it back") from error
    if entry.status not in STATUSES or not set(entry.kinds) <= set(KINDS):
        raise DataError(
            f"{path}: status {entry.status!r}, kinds {', '.join(entry.kinds)}",
            f"a status of {', '.join(STATUSES)}; kinds of {', '.join(KINDS)}",
            "correct the file",
        )
    return entry


def record(slug: str, outcomes: list[Measured], folder: Path = HERE) -> None:
    """Write outcomes into a paper's file; those of the same claim are replaced."""
    import tomli_w

    entry = load(slug, folder)
    new = {one.claim for one in outcomes}
    rows = [one for one in entry.measured if one.claim not in new] + outcomes
    whole = {key: value for key, value in asdict(entry).items() if key not in ("slug", "measured")}
    whole = {key: list(v) if isinstance(v, tuple) else v for key, v in whole.items()}
    whole["measured"] = [asdict(one) | {"interval": list(one.interval)} for one in rows]
    draft = folder / f".writing-{os.getpid()}-{slug}"
    draft.write_text(tomli_w.dumps(whole, multiline_strings=True), encoding="utf-8")
    os.replace(draft, folder / f"{slug}.toml")


def _measured(row: dict[str, Any]) -> Measured:
    known = {one.name for one in fields(Measured)}
    if set(row) != known:
        raise ValueError(f"measured has {sorted(set(row) ^ known)} too many or too few")
    return Measured(**{**row, "interval": tuple(row["interval"])})
