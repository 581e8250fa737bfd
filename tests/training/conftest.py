"""Trainings of seconds: the tiny source, model and recipe of `support.tiny` as fixtures."""

from __future__ import annotations

import pytest
import torch

from crosspatch.data.prepare import prepare
from crosspatch.training import plan, session
from crosspatch.training.loop import fit
from crosspatch.training.objective import make_objective
from crosspatch.training.run import RunFolder
from support.timing import few_timed  # noqa: F401
from support.tiny import Stripes, TinyNet, tiny_recipe


@pytest.fixture(autouse=True)
def tiny_models(monkeypatch):
    """`build_model` and `load_model` make a TinyNet for the name "tiny"."""
    from crosspatch.training import package

    real = package._create

    def create(name, arguments):
        return TinyNet(**arguments) if name == "tiny" else real(name, arguments)

    monkeypatch.setattr(package, "_create", create)


@pytest.fixture
def source():
    return Stripes()


@pytest.fixture
def images(source):
    return prepare(source, tiny_recipe().preprocess).images


@pytest.fixture
def recipe():
    return tiny_recipe()


@pytest.fixture
def make_recipe():
    return tiny_recipe


@pytest.fixture
def train(images, recipe, tmp_path):
    """Trains `recipe` in folder `name`; every step is reported."""
    torch.set_num_threads(1)

    def call(name, reporter=None, resume=False, use=recipe, **how):
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        parts = images.subset(order[:58].numpy()), images.subset(order[58:].numpy())
        with RunFolder.create(tmp_path / name, resume=resume) as run:
            run.write_config({})
            how = {"report_seconds": 0.0, "facts": {"fingerprint": "f"}, **how}
            objective = make_objective(use, images.classes)
            return run, fit(use, objective, *parts, run, reporter, resume=resume, **how)

    return call


WHOLE = {}


@pytest.fixture
def whole_run(train):
    """The run "whole" of a kind, trained by the first test of this process that asks for it: read
    it, change nothing in it."""

    def call(kind, **how):
        if kind not in WHOLE:
            WHOLE[kind] = train("whole", **how)[0]
        return WHOLE[kind]

    return call


@pytest.fixture
def opened(monkeypatch, source):
    """`open_source` gives the tiny source, whatever is asked for; validations come every epoch."""
    monkeypatch.setattr(session, "open_source", lambda spec: source)
    # a busy machine would space them out
    monkeypatch.setattr(plan, "space_evaluations", lambda recipe, *_: recipe)
    return source
