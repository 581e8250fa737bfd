# SPDX-License-Identifier: Apache-2.0
"""The processes that train one run together, and what they tell each other.

All of them do the same, step by step; the first one (rank 0) alone decides what could differ,
writes the run's folder and talks to the user. A process alone is a team of one, and everything here
then answers at once. Values travel as JSON and tensors as their bytes: nothing is pickled. Every
function but `size`, `rank` and `first` is called by all processes in the same order, or they wait
for each other: `patience()` seconds long, then the training ends. Where a process ends, the others
notice at their next word with it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from crosspatch.errors import UsageError
from crosspatch.training import launch

PATIENCE = 1800.0
LAUNCHED = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What every launcher tells a process besides WORLD_SIZE."""
_LOST = (
    "gloo",
    "nccl",
    "connection",
    "timed out",
    "socket",
)  # in what torch says of a lost process


def size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process among them, from 0."""
    return dist.get_rank() if size() > 1 else 0


def first() -> bool:
    """Whether this process decides, writes and talks."""
    return rank() == 0


def patience() -> float:
    """Seconds that processes wait for each other ($CROSSPATCH_PATIENCE)."""
    return float(os.environ.get("CROSSPATCH_PATIENCE", PATIENCE))


@contextmanager
def joined(devices: int | None = None) -> Iterator[None]:
    """Joins the processes that were launched with this one, for as long as a training takes.

    devices: how many the user asked for, or None. Raises UsageError when another number was
    launched or a GPU is missing, PeerLost when one of them ends before the others.
    """
    launched = launch.world()
    if devices not in (None, launched):
        raise UsageError(
            f"{devices} processes were asked for, and {launched} launched",
            "`crosspatch train --devices N`, which launches them itself, or torchrun",
            "use one of the two, or leave the number away",
        )
    if launched == 1:
        yield
        return
    try:
        _connect()
        yield
    except RuntimeError as error:
        if not any(word in str(error).lower() for word in _LOST):
            raise
        raise launch.PeerLost(
            f"another process of this training has ended or does not answer ({_brief(error)})",
            "all of them at work; what was saved last is whole",
            "see what ended it, then continue with --resume",
        ) from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _connect() -> None:
    missing = [name for name in LAUNCHED if name not in os.environ]
    if missing:
        raise UsageError(
            f"WORLD_SIZE is {launch.world()} here, and {', '.join(missing)} not set",
            "all the variables that a launcher sets, or none",
            "unset WORLD_SIZE and use --devices, or start with torchrun",
        )
    gpus, local = torch.cuda.device_count(), launch.local_rank()
    if gpus and local >= gpus:
        raise UsageError(
            f"{launch.local_world()} processes on a machine of {gpus} GPUs",
            "one process for each GPU",
            f"--devices {gpus}",
        )
    if gpus:
        torch.cuda.set_device(local)
    wait = timedelta(seconds=patience())
    store, number, count = next(iter(dist.rendezvous("env://", timeout=wait)))
    backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
    dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=wait)


def _brief(error: RuntimeError) -> str:
    """The first sentence of what torch says, without the file and line of its source."""
    said = str(error).strip().partition("\n")[0].rpartition(".cc:")[2]
    return said.partition("] ")[2].partition(". ")[0][:120] or type(error).__name__


def either(*flags: bool) -> tuple[bool, ...]:
    """For each flag whether it is set in any process."""
    if size() == 1:
        return flags
    votes = torch.tensor(flags, dtype=torch.int32)
    dist.all_reduce(votes, dist.ReduceOp.MAX)
    return tuple(bool(vote) for vote in votes.tolist())


def mean(value: Tensor) -> Tensor:
    """The mean of a tensor over the processes, on its device."""
    if size() == 1:
        return value
    total = value.clone()
    dist.all_reduce(total)
    return total / size()


def gather(value: Any) -> list[Any]:
    """What each process has to say, by rank; `value` is what JSON can hold."""
    if size() == 1:
        return [value]
    mine = _packed(value)
    lengths = torch.zeros(size(), dtype=torch.int64)
    lengths[rank()] = len(mine)
    dist.all_reduce(lengths)
    parts = [torch.zeros(int(length), dtype=torch.uint8) for length in lengths]
    parts[rank()] = mine
    for number, part in enumerate(parts):
        dist.broadcast(part, number)
    return [_unpacked(part) for part in parts]


def share(value: Any = None) -> Any:
    """What the first process says, to all; `value` is what JSON can hold."""
    if size() == 1:
        return value
    packed = _packed(value)
    length = torch.tensor(len(packed))
    dist.broadcast(length, 0)
    part = packed if first() else torch.zeros(int(length), dtype=torch.uint8)
    dist.broadcast(part, 0)
    return _unpacked(part)


def share_state(
    state: tuple[dict[str, Tensor], dict[str, Any]] | None,
) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The first process's (tensors on the CPU, what JSON can hold), to all, or its None."""
    if size() == 1:
        return state
    shapes = {n: [str(t.dtype)[6:], list(t.shape)] for n, t in state[0].items()} if state else {}
    told = share([shapes, state[1]] if state else None)
    if told is None:
        return None
    tensors = state[0] if state and first() else {}
    for name, (kind, shape) in told[0].items():
        if not first():
            tensors[name] = torch.empty(shape, dtype=getattr(torch, kind))
        dist.broadcast(tensors[name], 0)
    return tensors, told[1]


def share_weights(module: torch.nn.Module) -> None:
    """Give the module, of which each process has one, the first one's weights and buffers."""
    found = share_state(({n: t.cpu() for n, t in module.state_dict().items()}, {}))
    if found is not None and not first():
        module.load_state_dict(found[0])


def interleaved(rows: Tensor, total: int) -> Tensor:
    """(total, K) out of the rows that each process has: the first has rows 0, W, 2 W … of all, the
    second 1, W + 1 …, for W processes."""
    if size() == 1:
        return rows
    most = -(-total // size())
    padded = torch.cat([rows, rows.new_zeros(most - len(rows), rows.shape[1])])
    parts = [torch.empty_like(padded) for _ in range(size())]
    dist.all_gather(parts, padded)
    return torch.stack(parts, dim=1).flatten(0, 1)[:total]


def _packed(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _unpacked(part: Tensor) -> Any:
    return json.loads(part.numpy().tobytes())
