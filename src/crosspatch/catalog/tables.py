# SPDX-License-Identifier: Apache-2.0
"""The lists of papers in README.md and docs/, written from the catalog between two comments.

    <!-- papers:begin VIEW -->   …   <!-- papers:end -->

`python -m crosspatch.catalog.tables` writes them anew in the repository that it is called in; a
test fails while one of them says something else than the catalog. VIEW is one of `VIEWS`.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from crosspatch.catalog import KINDS, Entry, address, entries
from crosspatch.errors import DataError

PAGES = ("README.md", "docs/systems.md", "docs/backbones.md")
BLOCK = re.compile(r"(<!-- papers:begin (\S+) -->\n).*?(<!-- papers:end -->)", re.DOTALL)
OUTCOMES = ("reproduced", "not shown", "contrary", "other")
HEADS = {
    "model": "Backbones",
    "tokens": "Fewer tokens",
    "mixing": "Mixing pictures",
    "objective": "Objectives",
    "training": "Training",
    "data": "Data",
    "compress": "Compression",
    "task": "Tasks",
    "explain": "Explanations",
}
"""A heading for each kind."""


def outcome(verdict: str) -> str:
    """The word of OUTCOMES for a verdict's sentence."""
    plain = verdict.lower()
    if plain.startswith("not reproduced"):
        return "contrary"
    if plain.startswith(("not shown", "no difference")):
        return "not shown"
    return "reproduced" if plain.startswith("reproduced") else "other"


def measured_in_short(entry: Entry) -> str:
    """`2 reproduced, 1 not shown`, or a dash."""
    counts = Counter(outcome(one.verdict) for one in entry.measured)
    said = {"contrary": "not reproduced", "other": "measured beside CrossViT"}
    return ", ".join(f"{counts[o]} {said.get(o, o)}" for o in OUTCOMES if counts[o]) or "–"


def cell(text: str) -> str:
    """Text that stays in one cell of a Markdown table."""
    return re.sub(r"\s+", " ", text).replace("|", "\\|").strip()


def overview() -> list[str]:
    """One line for each paper."""
    rows = ["| slug | paper | what it is here | status |", "|---|---|---|---|"]
    for one in entries():
        paper = f"[{cell(one.title)}]({address(one.arxiv)})"
        rows.append(f"| `{one.slug}` | {paper} | {', '.join(one.kinds)} | {one.status} |")
    return rows


def by_kind() -> list[str]:
    """A section for each kind: the file, what the paper claims first, what was measured."""
    lines = []
    for kind in KINDS:
        found = [one for one in entries() if one.kinds[0] == kind]
        if not found:
            continue
        lines += [f"## {HEADS[kind]}", "", "| slug | paper | file | it claims | measured here |"]
        lines += ["|---|---|---|---|---|"]
        for one in found:
            file = f"`{one.modules[0]}`" if one.modules else "–"
            paper = f"[{one.arxiv}]({address(one.arxiv)})"
            slug = f"`{one.slug}`" + ("" if one.status == "built" else f" ({one.status})")
            claim, short = cell(one.claims[0]), measured_in_short(one)
            lines.append(f"| {slug} | {paper} | {file} | {claim} | {short} |")
        lines.append("")
    return lines[:-1]


def backbones() -> list[str]:
    """One line for each paper that brings a network."""
    lines = ["| file | paper | arXiv |", "|---|---|---|"]
    for one in entries("model"):
        file = next(module for module in one.modules if module.startswith("models/"))
        lines.append(f"| `{file}` | {cell(one.title)} | {one.arxiv} |")
    return lines


VIEWS: dict[str, Callable[[], list[str]]] = {
    "overview": overview,
    "by-kind": by_kind,
    "backbones": backbones,
}


def block(view: str) -> str:
    """The lines of a view between their comments."""
    text = "\n".join(VIEWS[view]())
    return f"<!-- papers:begin {view} -->\n{text}\n<!-- papers:end -->"


def renewed(text: str, name: str = "the page") -> str:
    """A page with its lists as the catalog has them. Raises DataError for a view that is none."""

    def write(found: re.Match[str]) -> str:
        if found[2] not in VIEWS:
            raise DataError(
                f"{name} asks for the list {found[2]!r}",
                f"one of {', '.join(VIEWS)}",
                "correct the comment papers:begin",
            )
        return block(found[2])

    return BLOCK.sub(write, text)


def write(root: Path) -> list[Path]:
    """Renew the lists of every page of `root`; returns the pages that changed."""
    changed = []
    for path in (root / page for page in PAGES):
        old = path.read_text(encoding="utf-8")
        new = renewed(old, str(path))
        if new != old:
            path.write_text(new, encoding="utf-8")
            changed.append(path)
    return changed


if __name__ == "__main__":
    written = write(Path.cwd())
    sys.stdout.write("".join(f"{path} written\n" for path in written) or "nothing changed\n")
