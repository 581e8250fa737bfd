# SPDX-License-Identifier: Apache-2.0
"""Arguments of a network that stand in a file are data: values within limits, and no word that
makes timm's builder open or fetch anything. This module does not import torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from crosspatch.data import jsons
from crosspatch.errors import DataError

GREATEST = 1 << 17  # of a whole number among the arguments
LONGEST = 10_000  # values in the arguments, lists within lists counted
OUTSIDE = ("pretrained", "checkpoint", "cache", "features", "feature_", "model_cfg", "kwargs_",
           "scriptable", "exportable", "no_jit")  # fmt: skip
"""What the names of arguments begin with that tell timm's builder to fetch or open other files, or
to build another thing than a classifier."""

AGAIN = "train again, or give the folder of a run that crosspatch wrote"


def require_harmless(arguments: Mapping[str, Any], where: object) -> None:
    """Raises DataError for arguments that no run of ours has: those that make timm's builder open
    or fetch files, and values beyond any use. where: the file that they stand in."""
    wrong = next(_strange(arguments), None)
    if wrong is not None:
        raise DataError(
            f"{where}: model_args hold {wrong}",
            f"numbers up to {GREATEST:,}, words and short lists for the network's constructor",
            AGAIN,
        )


def _strange(arguments: Mapping[str, Any]) -> Iterator[str]:
    for name, value in arguments.items():
        if not name.isidentifier() or len(name) > jsons.SHOWN:
            yield jsons.shown(name)
        elif name.startswith(OUTSIDE):
            yield f"{name}, which is about other files"
        for count, one in enumerate(_leaves(value)):
            if count > LONGEST:
                yield f"{name} with more than {LONGEST:,} values"
                break
            if isinstance(one, str) and len(one) > jsons.SHOWN:
                yield f"{name} with a word of {len(one):,} letters"
            elif isinstance(one, int | float) and not abs(one) <= GREATEST:
                yield f"{name} = {jsons.shown(one)}"


def _leaves(value: Any) -> Iterator[Any]:
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, Mapping):
            yield from one
            waiting += one.values()
        elif isinstance(one, list | tuple):
            yield None
            waiting += one
        else:
            yield one
