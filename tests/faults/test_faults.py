"""Every fault once; `make faults` plays them as often as the table says."""

from __future__ import annotations

import os

import pytest

from faults.cases import CASES, NOTHING, Case, Stage


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield Stage(tmp_path_factory.mktemp("faults"), patch.setattr)


@pytest.mark.long
@pytest.mark.parametrize("one", CASES, ids=lambda one: one.do.__name__)
def test_nothing_is_lost(stage: Stage, one: Case) -> None:
    draw = int(os.environ.get("FAULTS_NUMBER", "0"))
    found = one.do(stage, draw % one.times)
    stage.clear()
    assert found.lost == NOTHING, found
