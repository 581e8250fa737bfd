# SPDX-License-Identifier: Apache-2.0
"""`crosspatch papers [SLUG]`: which papers stand here, in which files, and how true they are."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from crosspatch.cli.options import Output
from crosspatch.errors import UsageError

if TYPE_CHECKING:
    from crosspatch.catalog import Entry

WIDTH = 80
WORD = (
    "A slug (crossvit), a file (models/cct.py), a model (crossvit_micro_32), a mixing, a "
    "reduction, an objective, an arXiv id or words of a title; left alone: all papers."
)
STYLES = {"reproduced": "green", "not shown": "yellow", "contrary": "red"}


def papers(
    word: Annotated[str | None, Parameter(name="SLUG", help=WORD)] = None,
    /,
    *,
    kind: Annotated[str | None, Parameter(metavar="KIND")] = None,
    status: Annotated[str | None, Parameter(metavar="STATUS")] = None,
    output: Output | None = None,
) -> int:
    """Look up a paper: its idea, our files, what differs, what it claims, what was measured.

    Parameters
    ----------
    kind
        Only papers of a kind: model, tokens, mixing, objective, training, data …
    status
        Only papers that are so: built, reconstruction, smallest-form, studied.
    """
    output = output or Output()
    from crosspatch.catalog import entries, find

    found = entries(kind, status)
    if word is not None:
        meant = find(word)
        found = [one for one in found if one in meant]
        if not found:
            raise UsageError(
                f"{word} is {meant[0].status}, {', '.join(meant[0].kinds)}",
                "a paper that --kind and --status leave in the list",
                f"crosspatch papers {meant[0].slug}",
            )

    from crosspatch.cli.screen import Screen, print_json

    if output.json:
        print_json({"papers": [one.to_dict() for one in found]})
        return 0
    with Screen() as screen:
        if word is not None and len(found) == 1:
            _paper(screen, found[0])
        else:
            _table(screen, found)
    return 0


def _table(screen: Any, found: Sequence[Entry]) -> None:
    """A line for each paper, under its first kind: slug, title, status, file."""
    if not found:
        screen.line("no paper is so", "yellow")
        return
    slugs = max(len(one.slug) for one in found)
    files = max(len(_file(one)) for one in found)
    titles = WIDTH - 2 - slugs - 2 - files - 2
    kind = ""
    for one in found:
        if one.kinds[0] != kind:
            screen.line(one.kinds[0], "cyan")
            kind = one.kinds[0]
        mark = "" if one.status == "built" else f"({one.status}) "
        title = textwrap.shorten(mark + one.title, titles, placeholder=" …")
        screen.line(f"  {one.slug:{slugs}}  {title:{titles}}  {_file(one)}".rstrip())
    screen.line()
    number = f"{len(found)} papers" if len(found) > 1 else "1 paper"
    screen.line(f"{number}, built where nothing else is said; crosspatch papers {found[0].slug}")


def _file(entry: Entry) -> str:
    return entry.modules[0] if entry.modules else "–"


def _paper(screen: Any, entry: Entry) -> None:
    """Everything about one paper, in 80 columns."""
    from crosspatch.catalog import address
    from crosspatch.catalog.tables import outcome

    for line in textwrap.wrap(entry.title, WIDTH):
        screen.line(line, "bold")
    screen.line(f"{address(entry.arxiv)} · {', '.join(entry.kinds)} · {entry.status}")
    _list(screen, "the idea", entry.idea, mark="")
    _list(screen, "files", [f"src/crosspatch/{one}" for one in entry.modules], mark="")
    _list(screen, "tests and pages", [*entry.tests, *entry.docs], mark="")
    _list(screen, "names", _names(entry), mark="")
    _list(screen, "the paper claims", entry.claims)
    _list(screen, "what differs here", entry.departures)
    screen.line("measured here" if entry.measured else "measured here: nothing yet", "cyan")
    for one in entry.measured:
        for line in _wrapped(one.claim, "- "):
            screen.line(line)
        span = "" if not one.interval else " (95 %: {:+.1f} to {:+.1f})".format(*one.interval)
        for line in _wrapped(f"{one.figure}{span}; {one.hardware}, {one.date}", "  "):
            screen.line(line)
        for line in _wrapped(one.verdict, "  "):
            screen.line(line, STYLES.get(outcome(one.verdict), ""))
        screen.line("    again:", "cyan")
        screen.lines((line, "") for line in _command(one.command))


def _names(entry: Entry) -> list[str]:
    return [", ".join(entry.names)] if entry.names else []


def _list(screen: Any, head: str, texts: Sequence[str], mark: str = "- ") -> None:
    if texts:
        screen.line(head, "cyan")
    for text in texts:
        for line in _wrapped(text, mark):
            screen.line(line)


def _wrapped(text: str, mark: str) -> list[str]:
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=f"  {mark}",
        subsequent_indent="  " + " " * len(mark),
        break_on_hyphens=False,
    )


def _command(command: str) -> Iterator[str]:
    """A command over several lines that a shell reads as one."""
    lines = textwrap.wrap(command, WIDTH - 8, break_on_hyphens=False, break_long_words=False)
    for place, line in enumerate(lines):
        yield f"    {line}" + (" \\" if place + 1 < len(lines) else "")
