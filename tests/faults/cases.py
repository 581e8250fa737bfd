"""All cases, in the order of the table. A room of further ones is imported here."""

from __future__ import annotations

from faults import files, kills, world  # noqa: F401 - each adds its cases
from faults.stage import CASES, NOTHING, Case, Stage

__all__ = ["CASES", "NOTHING", "Case", "Stage"]
