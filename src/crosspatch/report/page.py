# SPDX-License-Identifier: Apache-2.0
"""Self-contained HTML pages out of `templates/`: whatever comes from outside is escaped.

A page is one file: style, figures and thumbnails lie in it, nothing is fetched, no script is
needed. `base.html` is the frame, `parts.html` holds the pieces, `style.css` the looks (light, dark,
paper, a phone's width).
"""

from __future__ import annotations

import base64
import functools
import io
import os
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

import crosspatch
from crosspatch.errors import UsageError

THUMB = 96
"""Longest side of a thumbnail, in pixels."""
_DRAFT = ".writing-"


def render(template: str, **values: Any) -> str:
    """A page of `templates/`, every value escaped that is not Markup. Raises jinja2's
    UndefinedError for a value that the template needs and does not get."""
    return _environment().get_template(template).render(**values)


def write_page(path: Path, html: str) -> None:
    """The page at `path`, whole or as it was. Raises UsageError where it cannot be written."""
    draft = path.with_name(f"{_DRAFT}{os.getpid()}-{path.name}")
    try:
        draft.write_text(html, encoding="utf-8", errors="replace")
        os.replace(draft, path)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise UsageError(
            f"{path} cannot be written: {error.strerror}",
            "a folder that can be written, and room on the disk",
            "choose another --out, or make room",
        ) from error


def thumbnail(image: Image.Image, side: int = THUMB) -> str:
    """A small copy as an address that stands in the page itself (`<img src=…>`)."""
    small = image.convert("RGB")
    small.thumbnail((side, side), Image.Resampling.BICUBIC)
    held = io.BytesIO()
    small.save(held, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(held.getvalue()).decode("ascii")


# ---------------------------------------------------------------------- what people read


def percent(share: float | None, digits: int = 1) -> str:
    """0.913 as "91.3 %"; a dash for none."""
    return "–" if share is None else f"{100 * share:.{digits}f} %"


def between(interval: Any, digits: int = 1) -> str:
    """(0.887, 0.935) as "88.7 to 93.5 %"."""
    low, high = interval
    return f"{100 * low:.{digits}f} to {100 * high:.{digits}f} %"


def count(number: float | None) -> str:
    """1234 as "1,234"."""
    return "–" if number is None else f"{number:,.0f}"


def size(number: float) -> str:
    """Bytes as "1.7 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000 or unit == "GB":
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return ""


@functools.cache
def _environment() -> Environment:
    made = Environment(
        loader=PackageLoader("crosspatch.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"percent": percent, "between": between, "count": count, "size": size}
    style, _, _ = made.loader.get_source(made, "style.css")  # type: ignore[union-attr]
    made.globals |= {"style": Markup(style), "version": crosspatch.__version__}
    return made
