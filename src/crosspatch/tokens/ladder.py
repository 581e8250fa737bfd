# SPDX-License-Identifier: Apache-2.0
"""Schedules of a method in order, from a little reduction to as much as it can: what a search for a
speed climbs.

Every method has one or more shapes of schedule, each with its own ladder. The first quarter of the
blocks is spared by the `late` shapes, as reducing there costs the most accuracy.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from crosspatch.errors import UsageError
from crosspatch.tokens.host import Host, branch_names, hosts_of

Options = dict[str, Any]
STEPS = 24  # rungs of a ladder, at most


def ladders(model: nn.Module, method: str) -> dict[str, list[Options]]:
    """By the name of a shape, options of `method` for `model`, ever stronger.

    On a CrossViT every branch climbs its own ladder at the same share. Raises UsageError for a
    method without a strength that could be chosen by speed.
    """
    if method not in _SHAPES:
        raise UsageError(
            f"no schedule of {method} can be picked by speed",
            f"one of {', '.join(_SHAPES)}",
            "take one of those, or reduce with options of your own",
        )
    hosts, names = hosts_of(model), branch_names(model)
    found: dict[str, list[Options]] = {}
    for shape, make in _SHAPES[method].items():
        shares = [(rung + 1) / STEPS for rung in range(STEPS)]
        rungs: list[Options] = []
        for share in shares:
            made = [make(host, share) for host in hosts]
            options = dict(zip(names, made, strict=True)) if names else made[0]
            if options not in rungs:
                rungs.append(options)
        found[shape] = rungs
    return found


def _spare(host: Host) -> list[bool]:
    """For each block whether a late schedule leaves it alone: the first quarter."""
    return [block < host.depth / 4 or not host.attends(block) for block in range(host.depth)]


def _merges(host: Host, share: float, weights: list[float]) -> list[int]:
    """Merges per block that take `share` of 95 % of the patches, shared out by `weights`, at most
    half of the patches that are left each."""
    total, left, found = share * 0.95 * host.patches, host.patches, []
    for weight in weights:
        found.append(min(round(total * weight / sum(weights)), left // 2))
        left -= found[-1]
    return found


def _even(host: Host, share: float) -> Options:
    return {"r": _merges(host, share, [float(host.attends(b)) for b in range(host.depth)])}


def _late(host: Host, share: float) -> Options:
    return {"r": _merges(host, share, [float(not spared) for spared in _spare(host)])}


def _falling(host: Host, share: float) -> Options:
    weights = [float(host.depth - b) if host.attends(b) else 0.0 for b in range(host.depth)]
    return {"r": _merges(host, share, weights)}


def _geometric(host: Host, share: float) -> Options:
    """The same share of what is left in every block, up to a half of it: the strongest."""
    left, found = host.patches, []
    for block in range(host.depth):
        found.append(int(0.5 * share * left) if host.attends(block) else 0)
        left -= found[-1]
    return {"r": found}


def _thirds(host: Host, share: float) -> Options:
    """MCTF-Fast: a fraction of the patches at three blocks, one, two and three quarters deep (in a
    short branch at as many as there are)."""
    blocks = sorted({max(1, round(host.depth * q / 4)) for q in (1, 2, 3)} & set(range(host.depth)))
    blocks = [b for b in blocks if host.attends(b)] or [0]
    return {"r": round(0.49 * share, 4), "blocks": blocks}


def _pairs(host: Host, share: float) -> Options:
    """MCTF in every block but the first, by the same share of what is left."""
    found = _geometric(host, share)["r"]
    return {"r": [0, *found[:-1]] if host.depth > 1 else found}


def _keep(host: Host, share: float) -> Options:
    return {"keep": round(max(1 - 0.95 * share, 1.01 / host.patches), 4)}


def _sharing(host: Host, share: float) -> Options:
    """Blocks that read the map of the one before, the deepest first, at most two in a row."""
    able = [b for b in range(1, host.depth) if b not in host.starts and (host.depth - b) % 3]
    wanted = round(share * len(able))
    return {"share": sorted(able[len(able) - wanted :])}


_SHAPES = {
    "tome": {"even": _even, "late": _late, "falling": _falling, "geometric": _geometric},
    "mctf": {"three blocks": _thirds, "every block": _pairs},
    "evovit": {"stages": _keep},
    "psvit": {"sharing": _sharing},
}
LADDERS = tuple(_SHAPES)
"""The methods that have schedules to choose from."""
