# SPDX-License-Identifier: Apache-2.0
"""What this machine offers: cores, memory, accelerator."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")


@dataclass(frozen=True)
class Machine:
    """cores: usable ones, after affinity and container quota; memory: bytes free now;
    device: "cpu" or "cuda"; gpu: its name or None; bf16: whether the GPU computes in it."""

    cores: int
    memory: int
    device: str = "cpu"
    gpu: str | None = None
    bf16: bool = False

    def to_dict(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value is not None}

    def describe(self) -> str:
        """Half a sentence for the first screen."""
        cores = f"{self.cores} CPU core{'s' if self.cores != 1 else ''}"
        return f"{self.gpu} and {cores}" if self.gpu else f"{cores}, no GPU"


def quota_cores(text: str) -> float | None:
    """Cores a container may use, from the content of cgroup's cpu.max; None if unlimited."""
    quota, _, period = text.strip().partition(" ")
    if quota == "max" or not quota.isdigit() or not period.isdigit() or int(period) == 0:
        return None
    return int(quota) / int(period)


def usable_cores() -> int:
    """Cores this process may use at once: affinity, container quota and OMP_NUM_THREADS."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    quota = quota_cores(CGROUP_QUOTA.read_text()) if CGROUP_QUOTA.is_file() else None
    if quota is not None:
        cores = min(cores, max(1, int(quota + 0.5)))
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return min(cores, int(asked)) if asked.isdigit() and int(asked) > 0 else cores


def look() -> Machine:
    """Look at this machine."""
    import psutil
    import torch

    memory = int(psutil.virtual_memory().available)
    if not torch.cuda.is_available():
        return Machine(usable_cores(), memory)
    return Machine(
        usable_cores(),
        memory,
        device="cuda",
        gpu=torch.cuda.get_device_name(),
        bf16=torch.cuda.is_bf16_supported(),
    )
