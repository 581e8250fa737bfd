# SPDX-License-Identifier: Apache-2.0
"""What a look at data and a model finds, in the form in which the audit shows it."""

from __future__ import annotations

from typing import Any, NamedTuple


class Finding(NamedTuple):
    """level: "good", "warn" (worth a look) or "bad" (needs a hand); kind: a short name that stays;
    title, text: for the reader; command: what mends it, or ""; items: dicts, of a picture {"path",
    "note"}."""

    level: str
    kind: str
    title: str
    text: str
    command: str
    items: list[dict[str, Any]]
