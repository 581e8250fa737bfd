# SPDX-License-Identifier: Apache-2.0
"""What each paper is, where it stands here, what it claims, and what was measured of that: one file
`<slug>.toml` per paper.

    title, arxiv      of the paper
    kinds, modules    what it is here (model, objective, mixing …), and the files it stands in
    names             patterns of the words that stand for it in commands: models, mixings …
    tests, docs       where it is tested and described
    status            built · reconstruction · smallest-form · studied
    idea              five short lines
    departures        what differs from the paper or its authors' code, and why
    claims            what it claims
    [[measured]]      claim, figure, interval (low, high), hardware, command, date, verdict; kept
                      good or bad

`tables` writes the lists in README.md and docs/ from these files; nothing here imports torch.
"""

from __future__ import annotations

import fnmatch
import functools
import os
import tomllib
from dataclasses import asdict, dataclass, fields
from pathlib import Path, PurePosixPath
from typing import Any

from crosspatch.errors import DataError, UsageError, near

HERE = Path(__file__).parent
KINDS = (
    "model", "tokens", "mixing", "objective", "training", "data", "compress", "task", "explain"
)  # fmt: skip
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


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One paper: see the fields above, in the order in which a file has them."""

    slug: str
    title: str
    arxiv: str
    kinds: tuple[str, ...]
    names: tuple[str, ...] = ()
    modules: tuple[str, ...]
    tests: tuple[str, ...] = ()
    docs: tuple[str, ...] = ()
    status: str
    idea: tuple[str, ...] = ()
    departures: tuple[str, ...]
    claims: tuple[str, ...]
    measured: tuple[Measured, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as --json prints them."""
        return {**asdict(self), "address": address(self.arxiv)}


def address(arxiv: str) -> str:
    """Where a paper can be read."""
    return f"https://arxiv.org/abs/{arxiv}"


def entries(kind: str | None = None, status: str | None = None) -> list[Entry]:
    """The papers of a kind and a status, by their first kind (in the order of KINDS) and slug.
    Raises UsageError for a kind or status that there is not."""
    for name, value, known in (("kind", kind, KINDS), ("status", status, STATUSES)):
        if value is not None and value not in known:
            hit = near(value, known) or known[0]
            raise UsageError(f"--{name} {value}", f"one of {', '.join(known)}", f"--{name} {hit}")
    found = [
        one
        for one in map(load, slugs())
        if kind in (None, *one.kinds) and status in (None, one.status)
    ]
    return sorted(found, key=lambda one: (KINDS.index(one.kinds[0]), one.slug))


def find(word: str) -> list[Entry]:
    """The papers that a word stands for: a slug, an arXiv id, a file of ours, the name of a model
    (with a tag of timm's, too), of a mixing, a reduction, an objective, or a part of a title.

    The first of these that fits decides. Raises UsageError with what is near when nothing does.
    """
    known = entries()
    plain = word.strip().lower()
    name = plain.split(".")[0].split(":")[0]
    ways = (
        lambda one: plain == one.slug,
        lambda one: plain.removeprefix("arxiv:").strip() == one.arxiv,
        lambda one: any(_names_file(plain, module) for module in one.modules),
        lambda one: any(fnmatch.fnmatchcase(name, pattern) for pattern in one.names),
        lambda one: len(plain) > 2 and plain in one.title.lower(),
    )
    for fits in ways:
        found = [one for one in known if fits(one)]
        if found:
            return found
    words = {one.slug for one in known} | {n for one in known for n in one.names if "*" not in n}
    raise UsageError(
        f"no paper is called {word!r}",
        f"a slug, a file, a model or an arXiv id; near it: {near(plain, words) or 'nothing'}",
        "crosspatch papers, which lists all",
    )


def _names_file(word: str, module: str) -> bool:
    """Whether a path, however much of it was typed, is that of a module."""
    typed, whole = PurePosixPath(word).parts, ("src", "crosspatch", *PurePosixPath(module).parts)
    return word.endswith(".py") and (typed[-len(whole) :] == whole or whole[-len(typed) :] == typed)


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
    return _read(path, path.stat().st_mtime_ns)


@functools.cache
def _read(path: Path, changed: int) -> Entry:
    """The entry in a file, as it was at that time."""
    del changed
    try:
        given = tomllib.loads(path.read_text(encoding="utf-8"))
        rows = tuple(_measured(row) for row in given.pop("measured", ()))
        plain: dict[str, Any] = {
            key: tuple(v) if isinstance(v, list) else v for key, v in given.items()
        }
        entry = Entry(slug=path.stem, measured=rows, **plain)
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
