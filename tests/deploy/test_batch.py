"""Very many pictures: the table of an undisturbed run, whoever was killed, when and how often."""

from __future__ import annotations

import csv
import errno
import os
import shutil
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from crosspatch.cli.predict import find
from crosspatch.data.preprocess import Preprocess
from crosspatch.deploy import batch, engines, loading, parts
from crosspatch.deploy.batch import predict_many
from crosspatch.deploy.engines import Setting
from crosspatch.deploy.parts import Part, Parts
from crosspatch.deploy.predictor import Predictor
from crosspatch.errors import DataError, Interrupted, UsageError
from support.bundles import CLASSES, write_bundle
from support.hostile import BAD
from support.kills import Hook, before_call, die, killed
from support.runs import write_run

PART = 16
STRANGE = ("two\nlines.png", "a\u202egnp.b.png", 'quo"te,d.png', "=cmd().png", " .png", "ж.png")


class Mixing:
    """An engine that answers a picture with an eye on its batch, as dynamic int8 does."""

    setting = Setting("onnxruntime", "int8", 1)

    def run(self, images: np.ndarray) -> np.ndarray:
        means = images.mean(axis=(1, 2)) + 1
        shares = means / means.sum(axis=1, keepdims=True) + means.mean()
        return (shares / shares.sum(axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """100 pictures, among them unreadable ones and strange names, and one part of broken ones."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    names = [f"{place:03d}.png" for place in range(70)] + list(STRANGE)
    for name in names:
        pixels = rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    for place, (make, _) in enumerate(BAD.values()):
        (folder / f"0{3 * place:02d}-bad.png").write_bytes(make())
    for place in range(PART + 4):
        (folder / f"070-{place:02d}.png").write_bytes(b"broken")
    return folder


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("bundle") / "b.onnx")


@pytest.fixture(scope="module")
def files(folder: Path) -> list[str]:
    return find([str(folder)])[0]


@pytest.fixture
def mixing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is opened answers as `Mixing` does."""
    told = Predictor(Mixing(), CLASSES, Preprocess((24, 32), (24, 32)))
    monkeypatch.setattr(batch, "load", lambda *_, **how: told)
    monkeypatch.setattr(batch, "_forks", lambda: True)  # it is inherited, and no engine is opened


def work(run: Path, files: list[str], table: Path, **how):
    usual = {"part": PART, "workers": 1, "engine": "onnxruntime", "topk": 2}
    return predict_many(run, files, [("gone.png", "no such file")], table, **(usual | how))


def left(table: Path) -> list[str]:
    """What lies beside the table."""
    return sorted(name for name in os.listdir(table.parent) if name != table.name)


def test_the_table_is_that_of_the_predictor(bundle, files, tmp_path) -> None:
    answers = loading.load(bundle, engine="onnxruntime", threads=1).predict(files)
    told = work(bundle, files, tmp_path / "out.csv")
    with (tmp_path / "out.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    good, bad = rows[: told.answered], rows[told.answered :]
    assert told.answered == len(answers.ok) == 76
    assert told.unreadable == len(bad) == len(answers.failures) + 1
    assert [row["path"] for row in good] == [files[place] for place in answers.ok]
    for row, top in zip(good, filter(None, answers.top(2)), strict=True):
        assert [row["class_1"], row["class_2"], row["error"]] == [top[0][0], top[1][0], ""]
        assert float(row["probability_1"]) == pytest.approx(top[0][1], abs=1e-6)
    reasons = [("gone.png", "no such file"), *((files[i], why) for i, why in answers.failures)]
    assert [(row["path"], row["error"]) for row in bad] == reasons
    assert told.first == reasons[:20]
    assert {Path(row["path"]).name for row in good} >= set(STRANGE)
    assert left(tmp_path / "out.csv") == []


@pytest.mark.parametrize("workers", [2, 3])
def test_the_number_of_processes_makes_no_difference(
    mixing, bundle, files, tmp_path, workers
) -> None:
    work(bundle, files, tmp_path / "one.csv")
    told = work(bundle, files, tmp_path / "more.csv", workers=workers)
    assert told.workers == workers
    assert (tmp_path / "more.csv").read_bytes() == (tmp_path / "one.csv").read_bytes()


def test_the_engine_of_mixed_answers_would_show_other_batches(
    mixing, bundle, files, tmp_path
) -> None:
    """Else the tests beside this one could not fail."""
    work(bundle, files, tmp_path / "a.csv")
    work(bundle, files, tmp_path / "b.csv", part=24)
    assert (tmp_path / "a.csv").read_bytes() != (tmp_path / "b.csv").read_bytes()


def after_call(room, name: str, count: int) -> Hook:
    """Kill right behind call number `count` of `room.name`."""

    def hook() -> None:
        real, calls = getattr(room, name), []

        def counted(*given, **how):
            answer = real(*given, **how)
            calls.append(1)
            if len(calls) == count:
                die()
            return answer

        setattr(room, name, counted)

    return hook


PLACES = [
    (os, "fsync"),
    (os, "replace"),
    (os, "listdir"),
    (Path, "unlink"),
    (Path, "rmdir"),
    (Path, "open"),
    (Predictor, "forward"),
    (Parts, "begin"),
    (Parts, "add"),
    (Parts, "join"),
]


KILLS = st.lists(
    st.tuples(st.sampled_from(PLACES), st.booleans(), st.integers(1, 14)), min_size=1, max_size=3
)
SHARED = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


@settings(max_examples=12, **SHARED)
@given(KILLS, st.sampled_from([1, 1, 2]))
def test_a_table_after_kills_is_that_of_a_run_without(
    mixing, bundle, files, tmp_path_factory, kills, workers
) -> None:
    """A SIGKILL before or behind any call that touches the disk, up to three in a row."""
    kill_and_go_on(bundle, files, tmp_path_factory.mktemp("kills"), kills, workers)


@pytest.mark.long
@settings(max_examples=200, **SHARED)
@given(KILLS, st.sampled_from([1, 1, 2]))
def test_a_table_after_many_kills(mixing, bundle, files, tmp_path_factory, kills, workers) -> None:
    kill_and_go_on(bundle, files, tmp_path_factory.mktemp("kills"), kills, workers)


def kill_and_go_on(bundle: Path, files: list[str], home: Path, kills: list, workers: int) -> None:
    work(bundle, files, home / "whole.csv")
    (home / "work").mkdir()
    table = home / "work" / "out.csv"
    table.write_text("the table of last week")

    def attempt() -> None:
        try:
            work(bundle, files, table, workers=workers)
        except DataError:  # one of its processes was killed
            die()

    for (room, name), before, count in kills:
        hook = (before_call if before else after_call)(room, name, count)
        died = killed(hook, attempt)
        content = table.read_bytes()
        assert content in (b"the table of last week", (home / "whole.csv").read_bytes())
        assert died or content != b"the table of last week"
    told = work(bundle, files, table, workers=workers)
    assert told.answered == 76
    assert table.read_bytes() == (home / "whole.csv").read_bytes()
    assert left(table) == []
    shutil.rmtree(home)


def test_what_is_done_is_not_done_again(mixing, bundle, files, tmp_path, monkeypatch) -> None:
    table = tmp_path / "out.csv"
    assert killed(after_call(Parts, "add", 4), lambda: work(bundle, files, table))
    seen, asked = [], []
    run = Mixing.run
    monkeypatch.setattr(Mixing, "run", lambda self, images: asked.append(1) or run(self, images))
    told = work(bundle, files, table, progress=lambda *at: seen.append(at))
    assert told.kept == 4 * PART
    assert seen[0] == (4 * PART, len(files), 4 * PART)
    assert seen[-1] == (len(files), len(files), 4 * PART)
    assert len(asked) < len(files) / PART - 3


def stop_at(monkeypatch, count: int, error: BaseException) -> None:
    """The part `count` ends in `error`, before it is written."""
    real, calls = Parts.add, []

    def add(self, number, part):
        calls.append(1)
        if len(calls) == count:
            raise error
        real(self, number, part)

    monkeypatch.setattr(Parts, "add", add)


@pytest.mark.parametrize("workers", [1, 2])
def test_ctrl_c_keeps_what_is_done_and_names_the_command(
    mixing, bundle, files, tmp_path, monkeypatch, workers
) -> None:
    work(bundle, files, tmp_path / "whole.csv")
    table = tmp_path / "out.csv"
    with monkeypatch.context() as patch:
        stop_at(patch, 3, KeyboardInterrupt())
        with pytest.raises(Interrupted) as told:
            work(bundle, files, table, again="crosspatch go on", workers=workers)
    assert told.value.do == "crosspatch go on"
    assert f" of {len(files)} pictures done" in told.value.got
    assert work(bundle, files, table).kept in (2 * PART, PART + len(files) % PART)
    assert table.read_bytes() == (tmp_path / "whole.csv").read_bytes()


@pytest.mark.parametrize("place", ["part", "join", "state"])
def test_a_full_disk_is_told_and_nothing_is_lost(
    mixing, bundle, files, tmp_path, monkeypatch, place
) -> None:
    work(bundle, files, tmp_path / "whole.csv")
    table = tmp_path / "out.csv"
    real, calls = os.fsync, []
    full = {"state": 1, "part": 3, "join": 2 + -(-len(files) // PART)}[place]

    def fsync(handle):
        calls.append(1)
        if len(calls) >= full:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(UsageError, match="cannot be written: No space left") as told:
            work(bundle, files, table)
    assert "make room" in told.value.do
    assert not table.exists()
    assert not [name for name in left(table) if "tmp" in name]
    done = {"state": 0, "part": PART, "join": len(files)}[place]
    assert work(bundle, files, table).kept == done
    assert table.read_bytes() == (tmp_path / "whole.csv").read_bytes()


def begun(bundle: Path, files: list[str], table: Path) -> None:
    """Two parts are done."""
    assert killed(after_call(Parts, "add", 2), lambda: work(bundle, files, table))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("options", r"--topk \(2 → 1\)"),
        ("engine", r"--engine \(onnxruntime → auto\)"),
        ("fewer", r"the number of pictures \(\d+ → \d+\)"),
        ("touched", "names, sizes or times of pictures"),
        ("model", "the model"),
    ],
)
def test_other_pictures_models_and_options_are_told(
    mixing, bundle, files, tmp_path, change, says
) -> None:
    table, how = tmp_path / "out.csv", {}
    begun(bundle, files, table)
    other, mine = files, bundle
    status = os.stat(files[0])
    match change:
        case "options":
            how = {"topk": 1}
        case "engine":
            how = {"engine": "auto"}
        case "fewer":
            other = files[1:]
        case "touched":
            os.utime(files[0], ns=(status.st_atime_ns, status.st_mtime_ns + 1))
        case "model":
            mine = write_bundle(tmp_path / "other.onnx", scale=2.0)
    try:
        with pytest.raises(UsageError, match=says) as told:
            work(mine, other, table, **how)
        assert "--overwrite" in told.value.do
    finally:
        os.utime(files[0], ns=(status.st_atime_ns, status.st_mtime_ns))
    assert work(bundle, files, table).kept == 2 * PART  # nothing was lost by asking
    begun(bundle, files, table)
    assert work(mine, other, table, overwrite=True, **how).kept == 0
    assert left(table) in ([], ["other.onnx"])


def test_a_second_process_is_told(mixing, bundle, files, tmp_path) -> None:
    table = tmp_path / "out.csv"
    begun(bundle, files, table)
    with Parts(table):
        child = os.fork()
        if child == 0:
            with suppress(UsageError):
                work(bundle, files, table)
                os._exit(0)
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert work(bundle, files, table).kept == 2 * PART


def test_a_folder_removed_while_its_lock_is_taken_is_made_anew(tmp_path, monkeypatch) -> None:
    real, calls = parts._locked, []

    def locked(handle):
        calls.append(1)
        if len(calls) == 1:  # the one before has just ended
            shutil.rmtree(tmp_path / "out.csv.parts")
        return real(handle)

    monkeypatch.setattr(parts, "_locked", locked)
    with Parts(tmp_path / "out.csv") as made:
        made.begin({})
        assert (made.folder / "lock").exists()
    assert len(calls) == 2


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "text"])
def test_a_damaged_part_is_made_anew(mixing, bundle, files, tmp_path, damage) -> None:
    work(bundle, files, tmp_path / "whole.csv")
    table = tmp_path / "out.csv"
    begun(bundle, files, table)
    path = tmp_path / "out.csv.parts" / "000001.part"
    data = path.read_bytes()
    flipped = data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]
    path.write_bytes({"cut": data[:-5], "flipped": flipped, "empty": b"", "text": b"[]"}[damage])
    assert work(bundle, files, table).kept == PART
    assert table.read_bytes() == (tmp_path / "whole.csv").read_bytes()


def test_files_of_somebody_else_are_not_touched(mixing, bundle, files, tmp_path) -> None:
    (tmp_path / "out.csv.parts").mkdir()
    (tmp_path / "out.csv.parts" / "thesis.txt").write_text("years")
    with pytest.raises(UsageError, match=r"thesis\.txt, which is none of our files"):
        work(bundle, files, tmp_path / "out.csv", overwrite=True)
    assert (tmp_path / "out.csv.parts" / "thesis.txt").read_text() == "years"


def test_a_worker_that_is_killed_costs_its_part_only(
    mixing, bundle, files, tmp_path, monkeypatch
) -> None:
    run, calls = Mixing.run, []

    def dying(self, images):
        calls.append(1)
        while len(calls) == 3:
            if list((tmp_path / "out.csv.parts").glob("*.part")):
                die()
        return run(self, images)

    with monkeypatch.context() as patch:
        patch.setattr(Mixing, "run", dying)
        with pytest.raises(DataError, match="was killed"):
            work(bundle, files, tmp_path / "out.csv", workers=2)
    assert work(bundle, files, tmp_path / "out.csv").kept >= PART


def test_a_broken_model_leaves_nothing_behind(files, tmp_path) -> None:
    broken = write_bundle(tmp_path / "nan.onnx", scale=3e38)
    for workers in (1, 2):
        with pytest.raises(DataError, match="not numbers"):
            work(broken, files, tmp_path / "out.csv", workers=workers)
    assert left(tmp_path / "out.csv") == ["nan.onnx"]


def test_a_picture_that_vanishes_meanwhile_is_a_row(bundle, folder, tmp_path) -> None:
    home = tmp_path / "pictures"
    shutil.copytree(folder, home)
    files = find([str(home)])[0]

    def progress(done: int, total: int, kept: int) -> None:
        if done == 0:
            (home / "069.png").unlink()

    told = work(bundle, files, tmp_path / "out.csv", progress=progress)
    assert told.answered == 75
    text = (tmp_path / "out.csv").read_text(encoding="utf-8")
    assert f"{home}/069.png,,,,,no such file or directory" in text


def test_undecodable_names_are_given_back_as_they_were(bundle, folder, tmp_path) -> None:
    name = os.fsdecode(bytes(tmp_path) + b"/\xff\xfe.png")
    shutil.copy(folder / "000.png", name)
    work(bundle, [name] * 3, tmp_path / "out.csv")
    assert (tmp_path / "out.csv").read_bytes().count(b"/\xff\xfe.png,") == 3


def test_a_run_is_answered_by_torch_with_the_same_parts(folder, files, tmp_path) -> None:
    run = write_run(tmp_path / "run")
    told = work(run, files, tmp_path / "whole.csv", engine="auto", workers=None)
    assert told.setting.engine == "torch"
    assert told.workers == 1
    (tmp_path / "w").mkdir()
    table = tmp_path / "w" / "out.csv"
    hook = after_call(Parts, "add", 3)
    assert killed(hook, lambda: work(run, files, table, engine="auto"))
    assert work(run, files, table, engine="auto").kept == 3 * PART
    assert table.read_bytes() == (tmp_path / "whole.csv").read_bytes()


@settings(max_examples=30, **SHARED)
@given(
    st.lists(
        st.tuples(st.binary(max_size=40), st.binary(max_size=40), st.text(max_size=9)),
        max_size=5,
    )
)
def test_parts_give_back_what_was_put_in(tmp_path_factory, made) -> None:
    table = tmp_path_factory.mktemp("parts") / "out.csv"
    with Parts(table) as mine:
        mine.begin({"what": 1})
        for number, (good, bad, name) in enumerate(made):
            mine.add(number, Part(1, 1, [(name, "why")], good, bad))
    with Parts(table) as again:
        assert again.kept() == ({"what": 1} if made else None)
        again.resume()
        assert [one.first[0][0] for one in again.done.values()] == [name for *_, name in made]
        again.join(b"head", [b"between"])
    expected = b"head" + b"".join(good for good, *_ in made) + b"between"
    assert table.read_bytes() == expected + b"".join(bad for _, bad, _ in made)
    assert left(table) == []


def test_nothing_is_opened_before_the_processes_are_forked(
    bundle, files, tmp_path, monkeypatch
) -> None:
    """Threads and locks of an engine would be copied half-way."""
    monkeypatch.setenv("CROSSPATCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(engines, "_opened", [])
    work(bundle, files, tmp_path / "out.csv", workers=2, engine="auto")
    assert not engines.opened()  # here: the lists of the other processes are theirs


def test_where_an_engine_was_opened_before_the_processes_begin_anew(
    bundle, files, tmp_path, monkeypatch
) -> None:
    monkeypatch.setenv("CROSSPATCH_CACHE", str(tmp_path / "cache"))
    for engine in ("openvino", "onnxruntime"):
        loading.load(bundle, engine=engine, threads=2).predict(files[:3])
    assert engines.opened()
    told = work(bundle, files, tmp_path / "two.csv", workers=2, engine="auto")
    assert told.workers == 2
    work(bundle, files, tmp_path / "one.csv", engine=told.setting.engine)
    assert (tmp_path / "two.csv").read_bytes() == (tmp_path / "one.csv").read_bytes()


def test_there_are_no_more_processes_than_parts(bundle, files, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(batch, "usable_cores", lambda: 64)
    assert work(bundle, files[:20], tmp_path / "out.csv", workers=None).workers == 2
