"""The Markdown of the docs: its fenced blocks, the commands in them, what they are marked with."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent.parent
DOCS = ROOT / "docs"
PAGES = (ROOT / "README.md", *sorted(DOCS.rglob("*.md")))
ANYTHING = "…"

_FENCE = re.compile(
    r"^(?:<!-- (?P<mark>[^\n]*) -->\n+)?```(?P<language>[^\n]*)\n(?P<text>.*?)^```$", re.M | re.S
)
_INDENTED = re.compile(r"(?:^    [^\n]*\n)+", re.M)
_COMMENT = re.compile(r"(?:^|\s)#.*")
_LEVELS = tuple(
    (re.compile(pattern), instead)
    for pattern, instead in (
        (r"\bsha256 \w+", "sha256 #"),
        (r"\b\d+m\d\ds\b|\b\d+h\d\dm\b|\b[\d.]+ (?:[µm]?s|h)\b", "# s"),
        (r"\b[\d.]+ [kMG]?B\b", "# B"),
        (r"[-+−]?\b\d[\d,.]*(?:e[-+]?\d+)?", "#"),
        (r"# times\b", "# time"),
    )
)
"""What differs from run to run, and what is compared instead."""


class Block(NamedTuple):
    """A fenced block. line: of its first line of text; mark: what the comment above it says."""

    page: Path
    line: int
    language: str
    mark: str
    text: str

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


class Command(NamedTuple):
    """A command in a block: its words after `crosspatch`, and the lines that it answers with."""

    where: str
    words: list[str]
    answer: list[str]


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(
            page,
            text.count("\n", 0, found.start("text")) + 1,
            found["language"].strip(),
            found["mark"] or "",
            found["text"],
        )
        for found in _FENCE.finditer(text)
    ]


def commands(block: Block) -> list[Command]:
    """The lines of a block that call crosspatch: those after `$ ` where there are such."""
    prompt = "$ " if re.search(r"^\$ ", block.text, re.M) else ""
    found: list[Command] = []
    lines = iter(enumerate(block.text.splitlines(), block.line))
    for number, line in lines:
        words = line.removeprefix(prompt) if prompt else line.strip()
        if line.startswith(prompt) and re.match(r"crosspatch [a-z]", words):
            while words.endswith("\\"):
                words = words[:-1] + next(lines)[1].strip()
            where = f"{block.page.relative_to(ROOT)}:{number}"
            found.append(Command(where, shlex.split(_COMMENT.sub("", words))[1:], []))
        elif found:
            found[-1].answer.append(line)
    return found


def typed(page: Path) -> list[Command]:
    """Every command of a page, in its fenced and in its indented blocks; not those that a page
    shows being refused."""
    text = page.read_text(encoding="utf-8")
    indented = [
        Block(page, text.count("\n", 0, found.start()) + 1, "", "", found[0])
        for found in _INDENTED.finditer(text)
    ]
    fenced = [b for b in blocks(page) if b.language != "python" and "exit 2" not in b.mark]
    return [command for block in (*fenced, *indented) for command in commands(block)]


def inline(page: Path) -> list[str]:
    """The texts in `backticks` of a page, outside of its blocks."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    return [one.replace("\\|", "|") for one in re.findall(r"`([^`\n]+)`", text)]


def levelled(line: str) -> str:
    """A line without what differs from run to run: numbers, units, widths of columns."""
    for pattern, instead in _LEVELS:
        line = pattern.sub(instead, line)
    return " ".join(line.split())


def agrees(expected: list[str], found: list[str]) -> bool:
    """Whether what was printed is what a page shows, up to numbers; a line of … is any lines, … at
    the end of a line whatever follows in it."""
    wanted = "\n".join(map(levelled, expected)).strip().split("\n")
    pattern = "".join(
        r"(?:[^\n]*\n)*?" if line == ANYTHING else _exactly(line) + r"\n" for line in wanted
    )
    given = "\n".join(map(levelled, found)).strip() + "\n"
    return re.fullmatch(pattern, given) is not None


def _exactly(line: str) -> str:
    start = line.removesuffix(ANYTHING)
    return re.escape(start) + (r"[^\n]*" if start != line else "")
