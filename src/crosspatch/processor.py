# SPDX-License-Identifier: Apache-2.0
"""What this machine's processor is called and what it can do, for choices and beside figures."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from functools import cache
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")
FEATURES = {
    "avx2": "avx2",
    "avx512f": "avx512",
    "avx512_vnni": "vnni",
    "avx_vnni": "vnni",
    "avx512_bf16": "bf16",
    "amx_tile": "amx",
    "amx_int8": "amx-int8",
    "amx_bf16": "bf16",
    "asimddp": "dot-product",
    "i8mm": "i8mm",
    "bf16": "bf16",
}
"""What Linux calls an ability -> what we call it."""
FAST_INT8 = {"vnni", "amx-int8", "dot-product", "i8mm"}


@dataclass(frozen=True)
class Processor:
    """name: as the maker prints it; cores: usable ones; features: out of the values of FEATURES."""

    name: str
    cores: int
    features: tuple[str, ...]

    @property
    def fast_int8(self) -> bool:
        """Whether integer products have instructions of their own; else int8 saves size alone."""
        return bool(FAST_INT8 & set(self.features))

    def describe(self) -> str:
        """`AMD EPYC, 4 cores, avx2`."""
        cores = f"{self.cores} core{'s' if self.cores != 1 else ''}"
        return ", ".join([self.name, cores, *self.features])


@cache
def processor() -> Processor:
    """This machine's."""
    text = CPUINFO.read_text(errors="replace") if CPUINFO.is_file() else ""
    return read_cpuinfo(text, cores())


def read_cpuinfo(text: str, cores: int) -> Processor:
    """A processor from what Linux says of it; the platform's name where it says nothing."""
    entries: dict[str, str] = {}
    for line in text.splitlines():
        key, _, value = line.partition(":")
        entries.setdefault(key.strip().lower(), value.strip())
    flags = (entries.get("flags") or entries.get("features") or "").split()
    found = dict.fromkeys(FEATURES[flag] for flag in FEATURES if flag in flags)
    name = entries.get("model name") or platform.processor() or platform.machine() or "unknown"
    return Processor(name, cores, tuple(found))


def quota_cores(text: str) -> float | None:
    """Cores a container may use, from the content of cgroup's cpu.max; None if unlimited."""
    quota, _, period = text.strip().partition(" ")
    if quota == "max" or not quota.isdigit() or not period.isdigit() or int(period) == 0:
        return None
    return int(quota) / int(period)


def usable_cores() -> int:
    """Cores for the threads of this process: affinity, container quota and OMP_NUM_THREADS."""
    count = cores()
    quota = quota_cores(CGROUP_QUOTA.read_text()) if CGROUP_QUOTA.is_file() else None
    if quota is not None:
        count = min(count, max(1, int(quota + 0.5)))
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return min(count, int(asked)) if asked.isdigit() and int(asked) > 0 else count


def cores() -> int:
    """Cores that this process and its children may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
