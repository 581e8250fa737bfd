"""A server for each test process, of a model that answers with the mean colour of a picture."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from crosspatch.data.decode import FORMATS
from crosspatch.deploy.bundle import read_bundle
from crosspatch.deploy.engines import open_engine
from crosspatch.deploy.predictor import Predictor
from hostile.process import Server
from hostile.talk import Reply
from support.bundles import write_bundle
from support.hostile import picture, saved

SLOW = "1.2"
"""Seconds in which a request must have come, of the server under test; 8 of a user's."""
PLACES = "32"
"""Of its queue."""


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("hostile") / "bundle.onnx")


@contextmanager
def started(bundle: Path, formats: str, log: str = "log.jsonl") -> Iterator[Server]:
    """A server with one engine thread and two decoders, whose clients must be quick."""
    program, log = ("-m", "hostile.quick", SLOW, PLACES, formats), bundle.with_name(log)
    with Server(bundle, log, *OPTIONS, program=program) as running:
        for _ in range(5):
            assert running.ask(GOOD).status == 200
        running.idle = running.memory()
        yield running
        processes = running.processes()
        assert running.stop() == 0, running.log.read_text()[-2000:]
        assert not [one for one in processes if Path(f"/proc/{one}").exists()]


@pytest.fixture(scope="session")
def server(bundle: Path) -> Iterator[Server]:
    """A server that reads the formats that the command reads."""
    with started(bundle, "JPEG,PNG,WebP,BMP") as running:
        yield running


@pytest.fixture(scope="module")
def open_server(bundle: Path) -> Iterator[Server]:
    """A server that reads every format that there is a reader for."""
    with started(bundle, ",".join(FORMATS), "open.jsonl") as running:
        yield running


@pytest.fixture(scope="session")
def answer(bundle: Path) -> Callable[[bytes], np.ndarray]:
    """What `crosspatch predict` says of a picture: (3,) probabilities, classes in their order."""
    opened = read_bundle(bundle)
    predictor = Predictor(open_engine(opened), opened.info.classes, opened.info.preprocess)
    return lambda data: predictor.predict(data).probs[0]


GOOD = saved(picture("discs", 11), "PNG")
OPTIONS: tuple[str, ...] = ("--engine", "onnxruntime", "--threads", "1", "--workers", "2")


def probabilities(reply: Reply, classes: tuple[str, ...] = ("red", "green", "blue")) -> np.ndarray:
    """The probabilities in an answer, in the order of the classes."""
    said = {one["class"]: one["probability"] for one in reply.json()["predictions"]}
    return np.array([said[name] for name in classes])
