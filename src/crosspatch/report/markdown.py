# SPDX-License-Identifier: Apache-2.0
"""Text that stays text in a Markdown page, whatever stands in it.

Of a page's template every value goes through `text`, unless a filter has made it safe already
(`Markup`). CommonMark takes a backslash before any ASCII punctuation; `<`, `>` and `&` become
entities, so that a viewer that passes HTML through finds none.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from crosspatch.catalog import address
from crosspatch.errors import visible

SPECIAL = re.compile(r"[\\`*_\[\]|~$]")
ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
LINK = re.compile(r"(?<=\w)(://)|(?<=\bwww)\.|(?<=\w)@(?=\w)", re.IGNORECASE)
START = re.compile(r"^\s*(?:[-+=#]+|\d+[.)])(?=\s|$)")
"""What would begin a heading, a list or a rule."""


def text(value: Any) -> Markup:
    """Any value as plain text of a Markdown page or of a cell of its tables."""
    if isinstance(value, Markup):
        return value
    line = SPECIAL.sub(r"\\\g<0>", visible(str(value)))
    line = "".join(ENTITIES.get(letter, letter) for letter in line)
    line = LINK.sub(lambda found: "".join(f"&#{ord(c)};" for c in found[0]), line)
    return Markup(START.sub(lambda found: "&#8203;" + found[0], line))


def code(value: Any) -> Markup:
    """A command or a name in the type of code; as plain text where it holds marks of its own."""
    line = visible(str(value))
    return text(line) if not line or set(line) & set("`<>&|\\") else Markup(f"`{line}`")


def row(cells: Iterable[Any]) -> Markup:
    """A line of a table."""
    return Markup("| " + " | ".join(text(cell) for cell in cells) + " |")


def head(cells: Sequence[Any]) -> Markup:
    """The two lines that a table begins with; all columns but the first hold numbers."""
    rule = "|---|" + "---:|" * (len(cells) - 1)
    return Markup(f"{row(cells)}\n{rule}")


def arxiv(number: str) -> Markup:
    """A link to a paper of the catalog."""
    return Markup(f"[arXiv {text(number)}]({address(number)})")


@functools.cache
def environment() -> Environment:
    """Templates whose values are escaped for Markdown."""
    made = Environment(
        loader=PackageLoader("crosspatch.report"),
        autoescape=False,  # `finalize` escapes, for Markdown
        finalize=text,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"code": code, "row": row, "head": head, "arxiv": arxiv}
    return made


def render(template: str, **values: Any) -> str:
    """A page of `templates/`. Raises jinja2's UndefinedError for a value that is missing."""
    return environment().get_template(template).render(**values)
