# SPDX-License-Identifier: Apache-2.0
"""`--mix a,b,c`: one of these mixings for each batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from crosspatch.errors import UsageError, near
from crosspatch.training.recipe import MIXERS

NONE = "none"
ALPHA = {"mixup": 0.4, "mixup-batch": 0.8}
"""Of the Beta distribution; 1 for the others."""


def resolve_mix(asked: str | Sequence[str]) -> dict[str, Any]:
    """mix, mix_prob and mix_alpha of a recipe: each batch is mixed, by each of these as often.

    asked: "none", names with commas between them, or names. Raises UsageError for unknown ones.
    """
    names = [part.strip() for part in asked.split(",")] if isinstance(asked, str) else list(asked)
    names = [] if names == [NONE] else names
    for name in names:
        if name not in MIXERS:
            raise UsageError(
                f"there is no mixing {name!r}",
                f"none, or some of {', '.join(MIXERS)}",
                f"--mix {near(name, MIXERS, 1) or 'mixup,cutmix'}",
            )
    return {
        "mix": tuple(names),
        "mix_prob": (1 / len(names),) * len(names) if names else (),
        "mix_alpha": tuple(ALPHA.get(name, 1.0) for name in names),
    }
