# SPDX-License-Identifier: Apache-2.0
"""A network that a file describes is built without memory first, and compared with its weights.

`config.json` may come from a stranger: a width of ten million or a million blocks must not be
allocated to find out that they do not fit. On the meta device tensors have shapes alone; there the
network is made within limits that follow from the header of the weights, and only one whose every
entry has the shape of the file's is built in earnest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from crosspatch.data.tensors import Entry
from crosspatch.errors import DataError
from crosspatch.training.harmless import AGAIN

CALLS, EACH = 2000, 20  # calls of torch in building: at all, and for each tensor of the weights
ROOM, TIMES = 16 << 20, 32  # values of one tensor on the way: at all, and for each of the weights
SHOWN = 3


class TooMuch(Exception):
    """A network outgrows the limits."""


class _Limits(TorchDispatchMode):
    """Counts calls and sizes of what they give."""

    def __init__(self, calls: int, values: int) -> None:
        super().__init__()
        self.calls, self.values = calls, values

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls -= 1
        if self.calls < 0:
            raise TooMuch("it has far more parts than the weights")
        given = func(*args, **(kwargs or {}))
        if isinstance(given, torch.Tensor) and given.numel() > self.values:
            raise TooMuch(f"a tensor of {given.numel():,} values is asked for")
        return given


def require_fitting(
    build: Callable[[], nn.Module], tensors: Mapping[str, Entry], config: object, weights: object
) -> None:
    """Builds a network without memory. Raises DataError where that cannot be done, or where its
    entries are not those of `tensors`, the header of its weights.

    config, weights: the files that describe it and that hold them.
    """
    total = sum(math.prod(one.shape) for one in tensors.values())
    limits = _Limits(CALLS + EACH * len(tensors), ROOM + TIMES * total)
    with torch.random.fork_rng(devices=[]):
        module = built(lambda: _outlined(build, limits), config)
    expected = {name: tuple(one.shape) for name, one in module.state_dict().items()}
    problems = {
        "missing": [name for name in expected if name not in tensors],
        "unexpected": [name for name in tensors if name not in expected],
        "misshapen": [
            f"{name} is {tensors[name].shape}, the model's is {shape}"
            for name, shape in expected.items()
            if name in tensors and tensors[name].shape != shape
        ],
    }
    told = "; ".join(f"{kind}: {_few(names)}" for kind, names in problems.items() if names)
    if told:
        raise DataError(
            f"{weights} does not fit the network of {config}: {told}",
            "weights and config.json of one run",
            AGAIN,
        )


def built(build: Callable[[], nn.Module], config: object) -> nn.Module:
    """What `build` gives. Raises DataError naming the file `config` for whatever goes wrong in it:
    the errors of constructors that were given nonsense have no common base."""
    try:
        return build()
    except Exception as error:
        why = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise DataError(
            f"{config} describes a network that cannot be built ({why})",
            "the architecture and the arguments of a run, as this version knows them",
            AGAIN,
        ) from error


def _outlined(build: Callable[[], nn.Module], limits: _Limits) -> nn.Module:
    with torch.device("meta"), limits:
        return build()


def _few(names: list[str]) -> str:
    said = ", ".join(name[:200] for name in names[:SHOWN])
    return f"{said} and {len(names) - SHOWN} more" if len(names) > SHOWN else said
