# SPDX-License-Identifier: Apache-2.0
"""Figures of matplotlib as SVG that stands in a page and wears its colours, light or dark.

Draw with `COLOURS` and the ink that matplotlib takes by itself; `to_svg` turns both into the
page's own variables (`style.css`), so that one figure serves light, dark and paper.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from typing import Any

from markupsafe import Markup

INK, SOFT, RULE, PAPER = "#010101", "#010102", "#010103", "#010104"
COLOURS = tuple(f"#0102{i:02x}" for i in range(1, 7))
"""Six hues that colour-blind readers tell apart, after Okabe and Ito."""

LEAST = 0.7
"""Of its width, to which a narrow screen shrinks a figure; below, letters cannot be read."""

_VARIABLES = {INK: "ink", SOFT: "soft", RULE: "rule", PAPER: "paper"} | {
    colour: f"s{i}" for i, colour in enumerate(COLOURS, 1)
}
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "crosspatch",
    "text.parse_math": False,
    "font.size": 10,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.edgecolor": RULE,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": RULE,
    "grid.linewidth": 0.5,
    "text.color": INK,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
}


@contextmanager
def drawing(width: float = 7.0, height: float = 2.8, **subplots: Any) -> Iterator[tuple[Any, Any]]:
    """(figure, axes) in inches, as `matplotlib.pyplot.subplots` gives them, without a screen."""
    import matplotlib
    from matplotlib.figure import Figure

    style: Any = {**_STYLE, "axes.prop_cycle": matplotlib.cycler(color=COLOURS)}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, figure.subplots(**subplots)


def to_svg(figure: Any, said: str) -> Markup:
    """The figure for a page. said: what it shows, in a sentence, for readers who do not see it.

    Call it inside `drawing`. No two figures of a page share the names of their parts.
    """
    held = io.StringIO()
    figure.savefig(held, format="svg", metadata={"Date": None, "Creator": None})
    text = held.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    mine = "f" + hashlib.blake2b(f"{said}{text}".encode(), digest_size=5).hexdigest() + "-"
    text = re.sub(r'\bid="', f'id="{mine}', text)
    text = re.sub(r'(url\(|xlink:href="|href=")#', rf"\1#{mine}", text)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var(--{variable})")
    text = re.sub(r"font-family: [^;\"]*", "font-family: inherit", text)
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1; font-family: inherit", text)
    least = round(LEAST * 96 * figure.get_figwidth())
    own = f'role="img" aria-label="{escape(said)}" style="min-width: {least}px"'
    text = text.replace("<svg ", f"<svg {own} ", 1)
    return Markup(text)
