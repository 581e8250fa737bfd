"""One short training on digits and a few pictures, shared by all journeys of all test processes."""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from crosspatch.cli.main import main
from support.command import Answer

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


def once(folder: Path, make: Callable[[Path], None]) -> Path:
    """`folder`, made by the first of the test processes that needs it."""
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            aside = folder.with_suffix(".making")
            make(aside)
            aside.rename(folder)
    return folder


def shared(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A folder that all processes of this test run share."""
    base = tmp_path_factory.getbasetemp()
    return base if worker_id == "master" else base.parent


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A run on digits of one epoch: read it, change nothing in it."""

    def make(folder: Path) -> None:
        assert main(["train", "digits", "--epochs", "1", "--out", str(folder), "--json"]) == 0

    return once(shared(tmp_path_factory, worker_id) / "digits-run", make)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """Scans of the digits 0 to 4 as PNG files in one folder per class, twelve each."""
    from PIL import Image

    def make(folder: Path) -> None:
        from crosspatch.data.sources import open_source

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
