# SPDX-License-Identifier: Apache-2.0
"""How fast errors fall with more pictures: a power law for each class, error = a n^-b.

Errors of classifiers fall so over a wide range of sizes (Hestness et al., arXiv 1712.00409; Cortes
et al., NIPS 1993). The exponents of single classes are seen through few test pictures, so each is
drawn towards the mean of all, by as much as chance explains their spread (DerSimonian and Laird
1986, doi 10.1016/0197-2456(86)90046-2).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from crosspatch.metrics.interval import Z95


class Law(NamedTuple):
    """The exponent b of error = a n^-b, and its standard error."""

    exponent: float
    error: float

    def remaining(self, factor: float) -> tuple[float, float, float]:
        """(expected, least, most) share of the errors that is left with `factor` times the
        pictures; the ends are of 95 %. More pictures are never taken to harm."""
        ends = [self.exponent + shift * Z95 * self.error for shift in (0, 1, -1)]
        left, least, most = (factor ** -max(0.0, b) for b in ends)
        return left, least, most


def fit(sizes: Sequence[float], wrong: Sequence[float], images: int) -> Law:
    """sizes: (S,) training pictures; wrong: (S,) of `images` test pictures named wrongly after
    each. Weighted least squares of log error on log size; half an error is added, so that none
    is no certainty. The standard error is what the number of test pictures and the misfit leave.
    Raises ValueError for fewer than two different sizes and without test pictures."""
    x = np.log(np.asarray(sizes, np.float64))
    if images < 1 or len(np.unique(x)) < 2:
        raise ValueError(f"{images} test pictures, sizes {list(sizes)}")
    share = (np.asarray(wrong, np.float64) + 0.5) / (images + 1)
    weight = images * share / np.maximum(1 - share, 1 / (images + 1))  # 1 / variance of its log
    y, centre = np.log(share), np.average(x, weights=weight)
    spread = float((weight * (x - centre) ** 2).sum())
    slope = float((weight * (x - centre) * y).sum()) / spread
    off = y - np.average(y, weights=weight) - slope * (x - centre)
    misfit = float((weight * off**2).sum()) / max(1, len(x) - 2)
    return Law(-slope, math.sqrt(max(1.0, misfit) / spread))


def shrunk(laws: Sequence[Law]) -> list[Law]:
    """Each law drawn towards the mean of all. None: an empty list."""
    if len(laws) < 2:
        return list(laws)
    b, var = np.array([law.exponent for law in laws]), np.array([law.error**2 for law in laws])
    w = 1 / var
    mean = float((w * b).sum() / w.sum())
    chance = w.sum() - (w**2).sum() / w.sum()
    between = max(0.0, float(((w * (b - mean) ** 2).sum() - (len(b) - 1)) / chance))
    weight = 1 / (var + between)
    mean, of_mean = float((weight * b).sum() / weight.sum()), 1 / float(weight.sum())
    own = between / (between + var)  # how much a class says of itself
    drawn = own * b + (1 - own) * mean
    error = np.sqrt(own * var + (1 - own) ** 2 * of_mean)
    return [Law(float(one), float(off)) for one, off in zip(drawn, error, strict=True)]
