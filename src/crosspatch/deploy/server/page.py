# SPDX-License-Identifier: Apache-2.0
"""The page at /: one HTML document that needs nothing but the server that it came from.

Its three parts lie in `page_files/`. What the server tells is shown as text and never as markup,
and `app.page_policy` allows the browser no script and no style but these two, by their hashes.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files

PARTS = {"style": "page.css", "script": "page.js"}


@cache
def page() -> bytes:
    """The document, UTF-8."""
    folder = files("crosspatch.deploy.server") / "page_files"
    text = (folder / "index.html").read_text(encoding="utf-8")
    for tag, name in PARTS.items():
        part = (folder / name).read_text(encoding="utf-8")
        text = text.replace(f"<{tag}>/* {name} */</{tag}>", f"<{tag}>\n{part}</{tag}>")
    return text.encode()
