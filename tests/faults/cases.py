"""All cases, in the order of the table. A room of further ones is added to `ROOMS`."""

from __future__ import annotations

from faults import files, kills, team, world
from faults import stage as stages
from faults.stage import NOTHING, Case, Stage

__all__ = ["CASES", "NOTHING", "Case", "Stage"]

ROOMS = (kills, files, world, team)
CASES = [one for room in ROOMS for one in stages.CASES if one.do.__module__ == room.__name__]
