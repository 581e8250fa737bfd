# SPDX-License-Identifier: Apache-2.0
"""Near-ties of token selection: told apart from a graph that computes something else.

A model with reduced tokens chooses which of them stay. Where two score almost the same, a kernel
that sums in another order may choose the other one, and every probability of that picture moves.
That is no fault of the graph, and it is no secret either: such pictures are counted and said.

The rule: an answer is a near-tie's where torch itself, its pixels disturbed by no more than
rounding errors are worth (`NOISE`), gives that answer too, within the tolerance that holds without
a reduction. A graph with another schedule, or with any other fault, gives answers that no such
disturbance brings about. The check pictures whose answers a bundle carries are chosen so that they
hold no near-tie (`steady`): there everything is as strict as without a reduction.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from crosspatch.deploy.bundle import CANDIDATES, CHECKS, check_pictures

NOISE = (1e-6, 1e-5)
"""Deviations of what is added to normalised pixels; float32 sums of a layer are off by about the
first of them, a hundredth of a grey level is 2e-4."""
DRAWS = 16  # of each deviation
STILL = 5e-5  # a check picture's probabilities move less than this when it is disturbed

Network = Callable[[Tensor], Tensor]
"""Normalised pictures (B, 3, H, W) -> probabilities (B, K)."""


@torch.inference_mode()
def disturbed(network: Network, inputs: Tensor) -> np.ndarray:
    """(2 * DRAWS, K): the probabilities of one normalised picture (1, 3, H, W), disturbed anew in
    every row; always by the same draws."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for amount in NOISE:
        noise = torch.randn(DRAWS, *inputs.shape[1:], generator=generator)
        found.append(network(inputs + amount * noise.to(inputs)))
    return torch.cat(found).float().cpu().numpy()


def is_tie(network: Network, inputs: Tensor, found: np.ndarray, tolerance: float) -> bool:
    """Whether `found` (K,), which is not what the network gives to `inputs` (1, 3, H, W), is within
    `tolerance` of what it gives to them when they are disturbed."""
    far = np.abs(disturbed(network, inputs) - found).max(axis=1)
    return bool(far.min() <= tolerance)


def steady(
    network: Network, normalise: Callable[[Tensor], Tensor], size: tuple[int, int]
) -> tuple[int, ...]:
    """Numbers of the first CHECKS check pictures without a near-tie; where there are too few, of
    those that move least."""
    moved: dict[int, float] = {}
    pictures = torch.from_numpy(check_pictures(size, CANDIDATES))
    for number in range(CANDIDATES):
        inputs = normalise(pictures[number : number + 1])
        with torch.inference_mode():
            still = network(inputs).float().cpu().numpy()
        moved[number] = float(np.abs(disturbed(network, inputs) - still).max())
        found = [one for one, by in moved.items() if by < STILL]
        if len(found) == CHECKS:
            return tuple(found)
    return tuple(sorted(sorted(moved, key=moved.__getitem__)[:CHECKS]))
