# SPDX-License-Identifier: Apache-2.0
"""What this machine offers: cores, memory, accelerator."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from crosspatch.processor import usable_cores
from crosspatch.training import launch


@dataclass(frozen=True)
class Machine:
    """What is there for this process: cores: usable ones, after affinity and container quota;
    memory: bytes free now; device: "cpu" or "cuda"; gpu: its name or None; bf16: whether the GPU
    computes in it."""

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


def look() -> Machine:
    """Look at this machine, which the processes of a team share."""
    import psutil
    import torch

    mates = launch.local_world()
    memory = int(psutil.virtual_memory().available) // mates
    cores = max(1, usable_cores() // mates)
    if not torch.cuda.is_available():
        return Machine(cores, memory)
    return Machine(
        cores,
        memory,
        device="cuda",
        gpu=torch.cuda.get_device_name(),
        bf16=torch.cuda.is_bf16_supported(),
    )
