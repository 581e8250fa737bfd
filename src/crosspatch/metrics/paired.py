# SPDX-License-Identifier: Apache-2.0
"""How much better one way of training is than another, with an interval that holds for new pictures
and for new seeds alike.

Both ways are trained with the same S seeds and judged on the same N pictures; d (S, N) is the
difference of each picture. Pictures and seeds are two crossed samples, so the error of the mean has
a share of each (Baayen, Davidson and Bates 2008, doi 10.1016/j.jml.2007.12.005, call this crossed
random effects): var = var over pictures of the mean over seeds / N + var over seeds of the mean
over pictures / S. What neither explains is counted in both, which mostly makes the interval too
wide. Its degrees of freedom are Satterthwaite's (1946, doi 10.2307/3002019), which are too many
where two or three seeds happen to agree and would not again: where seeds outweigh pictures but not
all of them, the interval of three seeds holds the truth in 92 %, of two in 87 %, of five in 94 %.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

LEVEL = 0.95
POWER = 0.8
MOST_SEEDS, MOST_PICTURES = 1_000, 10_000_000


class Estimate(NamedTuple):
    """A mean over seeds and pictures, or a difference of two.

    low, high: the ends of its 95 % interval; p: of the hypothesis that it is 0 (two-sided); seeds,
    pictures: how many there were; of_pictures, of_seeds: variances of the mean that come from
    either. With one seed `of_seeds` is 0: what training alone changes is not in the interval.
    """

    mean: float
    low: float
    high: float
    p: float
    seeds: int
    pictures: int
    of_pictures: float
    of_seeds: float


def crossed(values: np.ndarray, weights: np.ndarray | None = None) -> Estimate:
    """The mean of values (S, N), one row per seed, one column per picture, and its interval.

    weights: (N,), of mean 1, how often a picture counts (for balanced accuracy: N / (K n_c)); none:
    all alike. The variance over pictures is that of w (d - mean), as of any weighted mean, so that
    a picture that does not count brings none; and that of one differing picture at least: where all
    agree, some of those that were not seen may not. Raises ValueError without values.
    """
    table = np.atleast_2d(np.asarray(values, np.float64))
    seeds, pictures = table.shape
    if not seeds or not pictures:
        raise ValueError(f"values of {seeds} seeds and {pictures} pictures")
    counted = np.ones(pictures) if weights is None else np.asarray(weights, np.float64)
    of_seed = (table * counted).mean(axis=1)
    mean = float(of_seed.mean())
    off = (table.mean(axis=0) - mean) * counted
    spread = float(off.var(ddof=1)) if pictures > 1 else 1.0
    of_pictures = max(spread / pictures, float((counted**2).mean()) / pictures**2)
    of_seeds = float(of_seed.var(ddof=1)) / seeds if seeds > 1 else 0.0
    half, p = _student(mean, of_pictures, of_seeds, pictures, seeds)
    return Estimate(mean, mean - half, mean + half, p, seeds, pictures, of_pictures, of_seeds)


def _student(
    mean: float, of_pictures: float, of_seeds: float, pictures: int, seeds: int
) -> tuple[float, float]:
    """(half of the interval, p)."""
    from scipy.stats import t

    total = of_pictures + of_seeds
    parts = of_pictures**2 / max(1, pictures - 1)
    parts += of_seeds**2 / (seeds - 1) if seeds > 1 else 0.0
    freedom, error = total**2 / parts, math.sqrt(total)
    half = float(t.ppf((1 + LEVEL) / 2, freedom)) * error
    return half, float(2 * t.sf(abs(mean) / error, freedom))


def by_class(labels: np.ndarray, chosen: Sequence[int] | None = None) -> np.ndarray:
    """Weights (N,) with which a mean over pictures is the mean of the means of the classes.

    labels: (N,); chosen: the classes that count, such as those of a tail (none: all that occur).
    They add up to N. Raises ValueError where no picture has a chosen class.
    """
    labels = np.asarray(labels)
    counts = np.bincount(labels)
    kept = np.zeros(len(counts), bool)
    kept[[c for c in (range(len(counts)) if chosen is None else chosen) if c < len(counts)]] = True
    kept &= counts > 0
    if not kept.any():
        raise ValueError("no picture of the classes that count")
    share = np.where(kept, len(labels) / (kept.sum() * np.maximum(counts, 1)), 0.0)
    return share[labels]


def holm(ps: Sequence[float]) -> list[float]:
    """p values after Holm's correction (1979) for so many comparisons at once, in their order."""
    order = sorted(range(len(ps)), key=ps.__getitem__)
    fixed, highest = [0.0] * len(ps), 0.0
    for place, index in enumerate(order):
        highest = max(highest, min(1.0, (len(ps) - place) * ps[index]))
        fixed[index] = highest
    return fixed


def needed(found: Estimate, difference: float = 0.01) -> tuple[int | None, int | None]:
    """(test pictures with these seeds, seeds with these pictures) with which a true `difference`
    would be shown in 4 of 5 comparisons; None where no number of them is enough.

    What was found of either source of error is taken for granted, so this is a rough guide.
    """
    from scipy.stats import norm, t

    z = float(norm.ppf((1 + LEVEL) / 2) + norm.ppf(POWER))
    left = (difference / z) ** 2 - found.of_seeds
    pictures = math.ceil(found.of_pictures * found.pictures / left) if left > 0 else None
    if pictures is not None and pictures > MOST_PICTURES:
        pictures = None
    if found.seeds < 2:
        return pictures, None
    # at best more seeds take away what seeds brought, and what pictures did only in part
    each = found.of_seeds * found.seeds
    for seeds in range(2, MOST_SEEDS):
        quantile = float(t.ppf((1 + LEVEL) / 2, seeds - 1) + norm.ppf(POWER))
        error = each / seeds + found.of_pictures * min(1.0, found.seeds / seeds)
        if quantile**2 * error <= difference**2:
            return pictures, seeds
    return pictures, None
