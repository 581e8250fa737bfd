"""One short training on digits and a few pictures, shared by all journeys of all test processes."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from crosspatch.cli import pages
from crosspatch.cli.main import main
from crosspatch.deploy import export
from support.command import Answer
from support.once import once, shared
from support.processors import without_bf16  # noqa: F401
from support.timing import few_timed  # noqa: F401

Command = Callable[..., Answer]


@pytest.fixture
def crosspatch(capfd: pytest.CaptureFixture) -> Command:
    """Runs a command in this process: `crosspatch("train", "digits")`."""

    def run(*words: object) -> Answer:
        capfd.readouterr()
        code = main([str(word) for word in words])
        return Answer(code, *capfd.readouterr())

    return run


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Test processes share the cores, so a training in one takes one thread."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(autouse=True)
def few_pages(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page takes seconds: those marked `pages` write it at the end of a training, others not.
    Runs that are shared have theirs."""
    if not request.node.get_closest_marker("pages"):
        monkeypatch.setattr(pages, "told", lambda *_: None)


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A run on digits of one epoch: read it, change nothing in it."""

    def make(folder: Path) -> None:
        assert main(["train", "digits", "--epochs", "1", "--out", str(folder), "--json"]) == 0

    return once(shared(tmp_path_factory, worker_id) / "digits-run", make)


@pytest.fixture(scope="session")
def digits_bundle(
    digits_run: Path, tmp_path_factory: pytest.TempPathFactory, worker_id: str
) -> Path:
    """bundle.onnx in a copy of the run on digits, exported by the command; both to be read only."""

    def make(folder: Path) -> None:
        shutil.copytree(digits_run, folder)
        assert main(["export", str(folder), "--json"]) == 0

    return once(shared(tmp_path_factory, worker_id) / "digits-exported", make) / "bundle.onnx"


@pytest.fixture
def untraced(digits_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports of the run on digits take the graph of its bundle: tracing takes 16 seconds."""

    def copied(shipped: object, shop: Path, info: object) -> Path:
        return Path(shutil.copy(digits_bundle, shop / "whole.onnx"))

    monkeypatch.setattr(export, "_write_onnx", copied)


@pytest.fixture(scope="session")
def vit_run(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """As `digits_run`, of vit_micro_32: it is traced in half the time."""

    def make(folder: Path) -> None:
        words = ["--model", "vit_micro_32", "--epochs", "1", "--out", str(folder), "--json"]
        assert main(["train", "digits", *words]) == 0

    return once(shared(tmp_path_factory, worker_id) / "vit-run", make)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """Scans of the digits 0 to 4 as PNG files in one folder per class, twelve each."""
    from PIL import Image

    def make(folder: Path) -> None:
        from crosspatch.data.opening import open_source

        source = open_source("digits")
        for index, item in enumerate(source.items):
            kind, name = item.key.split("/")
            place = folder / kind
            place.mkdir(parents=True, exist_ok=True)
            if item.label < 5 and len(list(place.iterdir())) < 12:
                Image.fromarray(source.read(index)).save(place / f"{name}.png")
        for place in folder.iterdir():
            if not list(place.iterdir()):
                place.rmdir()

    return once(shared(tmp_path_factory, worker_id) / "pictures", make)
