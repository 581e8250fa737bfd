# SPDX-License-Identifier: Apache-2.0
"""An export that is killed at any moment leaves the old bundle, the new one or none."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from crosspatch.deploy.bundle import read_bundle
from crosspatch.deploy.engines import available, open_engine
from support.runs import write_run

EXPORT = "import sys; from crosspatch.deploy.export import export; export(*sys.argv[1:])"
KILLS = 8


def start(run: Path, to: str) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", EXPORT, str(run), to], env=environment)


@pytest.mark.long
@pytest.mark.parametrize(("to", "name"), [("onnx", "bundle.onnx"), ("openvino", "bundle.xml")])
def test_kills_leave_no_half_of_a_bundle(tmp_path, to: str, name: str) -> None:
    run = write_run(tmp_path / "run")
    began = time.perf_counter()
    assert start(run, to).wait() == 0
    whole, first = time.perf_counter() - began, read_bundle(run / name).info.weights
    write_run(tmp_path / "other", seed=1)
    (tmp_path / "other" / "model").rename(tmp_path / "model")
    (run / "model").rename(tmp_path / "old")
    (tmp_path / "model").rename(run / "model")
    for number in range(KILLS):
        process = start(run, to)
        # the last third of the time is where files are written
        time.sleep(whole * (0.6 + 0.5 * number / KILLS))
        process.kill()
        process.wait()
        if not (run / name).exists():
            assert to == "openvino"  # its graph is taken away before other weights come
            continue
        bundle = read_bundle(run / name)
        for engine, precision in available(bundle):
            open_engine(bundle, engine, precision).run(np.zeros((1, 32, 32, 3), np.uint8))
    assert start(run, to).wait() == 0
    assert read_bundle(run / name).info.weights != first
