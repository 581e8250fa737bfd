# SPDX-License-Identifier: Apache-2.0
"""Intervals for shares."""

from __future__ import annotations

import math

Z95 = 1.959963984540054


def wilson(k: float, n: float, z: float = Z95) -> tuple[float, float]:
    """Wilson score interval of the share k of n (Wilson 1927); 95 % by default.

    Returns (low, high) as fractions in [0, 1]; n = 0 gives (0, 1): nothing is known.
    Raises ValueError unless 0 <= k <= n.
    """
    if not 0 <= k <= n:
        raise ValueError(f"k must lie in 0..n, got k={k}, n={n}")
    if n == 0:
        return 0.0, 1.0
    share, z2 = k / n, z * z
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = z / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def paired(gained: int, lost: int, n: int, z: float = Z95) -> tuple[float, float]:
    """Interval of the difference of two shares measured on the same n pictures; 95 % by default.

    gained, lost: pictures that only the second, only the first got right. The Wald interval with
    half a picture added to each of the four cells (Agresti and Min 2005, Statistics in Medicine
    24:729). Returns (low, high), positive where the second is better; n = 0 gives (-1, 1). Raises
    ValueError unless 0 <= gained, 0 <= lost and gained + lost <= n.
    """
    if gained < 0 or lost < 0 or gained + lost > n:
        raise ValueError(f"gained {gained} and lost {lost} of {n}")
    if n == 0:
        return -1.0, 1.0
    total = n + 2
    shift = (gained - lost) / total
    half = z * math.sqrt((gained + lost + 1) - (gained - lost) ** 2 / total) / total
    return max(-1.0, shift - half), min(1.0, shift + half)
