# SPDX-License-Identifier: Apache-2.0
"""What a processor is called and can do, and how many of its cores are ours."""

from __future__ import annotations

import pytest

from crosspatch import processor as module
from crosspatch.processor import Processor, processor, quota_cores, read_cpuinfo, usable_cores

SERVER = """processor : 0
model name\t: AMD EPYC 9B45
flags\t\t: fpu avx2 avx512f avx512_vnni avx512_bf16

processor : 1
model name\t: another
flags\t\t: fpu
"""
ARM = "processor : 0\nFeatures : fp asimd asimddp i8mm bf16\n"


def test_what_linux_says_of_a_processor() -> None:
    found = read_cpuinfo(SERVER, 2)
    assert found == Processor("AMD EPYC 9B45", 2, ("avx2", "avx512", "vnni", "bf16"))
    assert found.fast_int8
    assert found.describe() == "AMD EPYC 9B45, 2 cores, avx2, avx512, vnni, bf16"
    arm = read_cpuinfo(ARM, 1)
    assert arm.features == ("dot-product", "i8mm", "bf16")
    assert ", 1 core, " in arm.describe()


def test_a_processor_of_which_nothing_is_known_has_a_name_and_no_fast_int8() -> None:
    found = read_cpuinfo("", 3)
    assert found.name
    assert found.features == ()
    assert not found.fast_int8
    assert not read_cpuinfo("model name: x\nflags: avx2 sse", 1).fast_int8


def test_this_one() -> None:
    assert processor() is processor()
    assert 1 <= usable_cores() <= processor().cores


@pytest.mark.parametrize(
    ("text", "cores"),
    [("max 100000\n", None), ("200000 100000\n", 2.0), ("50000 100000", 0.5), ("odd", None)],
)
def test_container_quota(text, cores):
    assert quota_cores(text) == cores


def test_cores_obey_the_quota_and_the_environment(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(module, "cores", lambda: 8)
    monkeypatch.setattr(module, "CGROUP_QUOTA", tmp_path / "cpu.max")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert usable_cores() == 8
    for text, cores in (("max 100000", 8), ("250000 100000", 3), ("10000 100000", 1), ("?", 8)):
        (tmp_path / "cpu.max").write_text(text)
        assert usable_cores() == cores
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert usable_cores() == 2
