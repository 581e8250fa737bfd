"""`compare`: equal runs, refused before anything trains, killed and resumed to the same bits."""

from __future__ import annotations

import csv
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from crosspatch.errors import DataError, Interrupted, UsageError
from crosspatch.training import compare as room
from crosspatch.training import compare_report, judge, session
from crosspatch.training.compare import Asked, compare
from crosspatch.training.reporter import Silent
from crosspatch.training.run import RunFolder
from crosspatch.training.session import train_run
from support.kills import before_call, in_step, killed

COMMON = {"model": "vit_micro_32", "size": 16, "batch": 16, "threads": 1}
ASKED = Asked("base,mixup+lr=0.004,tome:r=2", 2, None, 1, COMMON)
NAMES = ("base", "mixup+lr=0.004", "tome:r=2")
TIMED = ("seconds", "images_per_second", "created", "command", "memory", "versions", "curve")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setattr(session, "fit", partial(session.fit, report_seconds=0.0))
        yield


def stripes(folder: Path, classes: int = 3, count: int = 40) -> Path:
    """Noisy pictures of 16 pixels, told apart by the rows that are bright."""
    rng = np.random.default_rng(0)
    for kind in range(classes):
        (folder / f"row{kind}").mkdir(parents=True)
        for place in range(count):
            picture = rng.integers(0, 120, (16, 16, 3)).astype(np.uint8)
            picture[5 * kind : 5 * kind + 2] += 60
            Image.fromarray(picture).save(folder / f"row{kind}" / f"{place:03d}.png")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return str(stripes(tmp_path_factory.mktemp("pictures") / "stripes"))


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A comparison that was not interrupted: (its folder, what came out)."""
    out = tmp_path_factory.mktemp("whole") / "c"
    return out, compare(data, out, ASKED)


def told(out: Path) -> dict:
    """compare.json without times."""

    def plain(given):
        if isinstance(given, dict):
            return {k: plain(v) for k, v in given.items() if k not in TIMED}
        return [plain(v) for v in given] if isinstance(given, list) else given

    return plain(json.loads((out / "compare.json").read_text()))


def test_what_is_written(whole, data):
    out, found = whole
    names = {"compare.json", "compare.md", "compare.png", "results.csv"}
    assert {one.name for one in out.iterdir() if one.is_file()} == names
    assert [row.name for row in found.rows] == list(NAMES)
    with (out / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["candidate"], row["seed"]) for row in rows] == [
        (name, seed) for name in NAMES for seed in "01"
    ]
    page = (out / "compare.md").read_text()
    assert all(f"**{name}**: " in page for name in NAMES[1:])
    kept = json.loads((out / "compare.json").read_text())
    assert kept["plan"]["epochs"] == 1
    assert kept["results"]["candidates"][1]["difference"]["low"] < 1


def test_all_runs_have_one_split_one_budget_and_other_seeds(whole):
    _, found = whole
    folders = [run.folder for row in found.rows for run in row.runs]
    assert len(folders) == 6
    splits = {(one / "split.csv").read_text() for one in folders}
    assert len(splits) == 1
    recipes = [RunFolder(one).read_config()["recipe"] for one in folders]
    assert {recipe["steps"] for recipe in recipes} == {recipes[0]["steps"]}
    assert [recipe["seed"] for recipe in recipes] == [0, 1] * 3
    assert {recipe["threads"] for recipe in recipes} == {1}
    assert recipes[2]["mix"] == ["mixup"]
    assert recipes[4]["reduce"] == "tome:r=2"
    orders = [(one / "config.toml").stat().st_mtime_ns for one in folders]
    assert orders[0] < orders[2] < orders[4] < orders[1] < orders[3] < orders[5]


def test_figures_are_those_of_the_runs(whole):
    _, found = whole
    base, mixed = found.rows[:2]
    accuracies = [run.report["test"]["accuracy"] for run in base.runs]
    assert base.accuracy.mean == pytest.approx(np.mean(accuracies))
    gaps = [b.correct.mean() - a.correct.mean() for a, b in zip(base.runs, mixed.runs, strict=True)]
    assert mixed.difference.mean == pytest.approx(np.mean(gaps))
    assert base.difference is None
    assert found.rows[2].cost["macs"] < base.cost["macs"]


@pytest.mark.long
def test_a_run_is_what_train_would_have_made(whole, data, tmp_path):
    _, found = whole
    config = RunFolder(found.rows[1].runs[1].folder).read_config()
    train_run(data, tmp_path / "r", config["asked"])
    assert same_runs(tmp_path / "r", found.rows[1].runs[1].folder)


def same_runs(one: Path, other: Path) -> bool:
    files = ("model/model.safetensors", "predictions.csv")
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in files)


KILLS = {
    "in a step": in_step(2, "update"),
    "while the first run is judged": before_call(judge, "predict_probabilities", 2),
    "between two runs": before_call(room, "train_run", 3),
    "before the page": before_call(room, "write_compared"),
}


@pytest.mark.long
@pytest.mark.parametrize("when", KILLS)
def test_killed_and_typed_again_it_ends_the_same(whole, data, tmp_path, when):
    out = tmp_path / "c"
    assert killed(KILLS[when], lambda: compare(data, out, ASKED))
    compare(data, out, ASKED)
    assert told(out) == told(whole[0])
    for row in whole[1].rows:
        for run in row.runs:
            assert same_runs(out / run.folder.relative_to(whole[0]), run.folder)


class Stop(Silent):
    """Stops in step 3 of run number `at`."""

    def __init__(self, at):
        self.at, self.number = at, 0

    def begins(self, name, seed, number, total, seconds):
        self.number = number

    def step(self, done, total, loss, images_per_second):
        if self.number == self.at and done >= 3:
            raise Interrupted("stop", "x", "y")


@pytest.mark.long
def test_interrupted_and_resumed_it_ends_the_same(whole, data, tmp_path):
    out = tmp_path / "c"
    with pytest.raises(Interrupted):
        compare(data, out, ASKED, Stop(5))
    part = json.loads((out / "compare.json").read_text())
    assert part["results"]["seeds"] == [0]  # all candidates have ended with the first seed
    compare(data, out, Asked(""), resume=True)
    assert told(out) == told(whole[0])
    for row in whole[1].rows:
        for run in row.runs:
            assert same_runs(out / run.folder.relative_to(whole[0]), run.folder)


@pytest.mark.long
def test_more_seeds_are_added_to_one_that_has_ended(whole, data, tmp_path, monkeypatch):
    import shutil

    out = tmp_path / "c"
    shutil.copytree(whole[0], out)
    trained = []
    real = room.train_run
    monkeypatch.setattr(
        room, "train_run", lambda *a, **k: trained.append(a[1].name) or real(*a, **k)
    )
    found = compare(data, out, Asked("", 3), resume=True)
    assert trained == ["seed-2"] * 3
    assert found.seeds == (0, 1, 2)
    with pytest.raises(UsageError, match="another comparison: --seeds 3"):
        compare(data, out, ASKED)


OTHER = {
    "--try": (Asked("base,cutmix", 2, None, 1, COMMON), "--try base,mixup"),
    "--epochs": (ASKED._replace(epochs=2), "--epochs 1"),
    "--time": (ASKED._replace(epochs=None, time=60.0), "--epochs 1"),
    "--model": (ASKED._replace(common={**COMMON, "batch": 8}), "batch 16"),
    "--seed": (ASKED._replace(common={**COMMON, "seed": 4}), "--seed 0"),
}


@pytest.mark.parametrize("what", OTHER)
def test_another_comparison_is_not_mixed_in(whole, data, what):
    asked, got = OTHER[what]
    with pytest.raises(UsageError, match="holds another comparison") as raised:
        compare(data, whole[0], asked)
    assert got in raised.value.got


IMPOSSIBLE = {
    "a reduction of too much": ("base,tome:r=40", "tome:r=40"),
    "a reduction without such an option": ("base,tome:keep=3", "tome:keep=3"),
    "a missing teacher": ("base,distill:no/such/run", "distill:run"),
    "an objective without its labels": ("base,token-labeling", "token-labeling"),
    "two objectives": ("base,ldam+labels:x", "ldam+labels:x"),
    "a rate beyond all": ("base,lr=100", "lr=100"),
}


@pytest.mark.parametrize("what", IMPOSSIBLE)
def test_the_impossible_is_refused_before_anything_trains(data, tmp_path, monkeypatch, what):
    text, name = IMPOSSIBLE[what]
    monkeypatch.setattr(room, "train_run", lambda *a, **k: pytest.fail("trained"))
    with pytest.raises((UsageError, DataError), match="the candidate") as raised:
        compare(data, tmp_path / "c", ASKED._replace(tries=text))
    assert name in raised.value.got
    assert not (tmp_path / "c").exists()


def test_a_teacher_that_saw_the_judges_is_refused(data, tmp_path):
    train_run(data, tmp_path / "t", {**COMMON, "epochs": 1, "seed": 7})
    asked = ASKED._replace(tries=f"base,distill:{tmp_path / 't'}")
    with pytest.raises(UsageError, match="of the pictures that would judge it here"):
        compare(data, tmp_path / "c", asked)


def test_no_time_for_so_many_runs(data, tmp_path):
    asked = ASKED._replace(epochs=None, time=0.5)
    with pytest.raises(UsageError, match="left for training") as raised:
        compare(data, tmp_path / "c", asked)
    assert "6 runs share it" in raised.value.do
    assert not (tmp_path / "c").exists()


@pytest.mark.long
def test_equal_times(data, tmp_path):
    found = compare(data, tmp_path / "c", Asked("base,mixup", 1, 12.0, None, COMMON))
    each = found.plan.each
    assert 0 < each < 6
    for row in found.rows:
        assert row.runs[0].report["config"]["recipe"]["time_budget"] == each
    assert any("One seed" in text for text in found.remarks)


def test_threads_and_validations_of_a_candidate_are_its_own(data, tmp_path):
    tries = "base,threads=2+eval_every=2"
    common = {**COMMON, "eval_every": 1}
    found = compare(data, tmp_path / "c", Asked(tries, 1, None, 2, common))
    recipes = [row.runs[0].report["config"]["recipe"] for row in found.rows]
    assert [(one["threads"], one["eval_every"]) for one in recipes] == [(1, 1), (2, 2)]


def test_odd_names_are_drawn(whole, tmp_path, recwarn):
    from dataclasses import replace

    found = whole[1]
    odd = "写真 $x^$ <b>"
    rows = [replace(row, candidate=replace(row.candidate, name=f"{odd} {row.name}"))
            for row in found.rows]  # fmt: skip
    plan = replace(found.plan, data=f"pictures/{odd}", command="crosspatch compare 'a b' --try x,y")
    odd_one = replace(found, rows=tuple(rows), plan=plan)
    compare_report.write_compared(odd_one, tmp_path, lambda results: None)
    assert (tmp_path / "compare.png").read_bytes()[1:4] == b"PNG"
    assert "crosspatch compare 'a b' --try x,y" in (tmp_path / "compare.md").read_text()
    assert not [one for one in recwarn if "Glyph" in str(one.message)]


@pytest.mark.long
def test_a_teacher_that_a_run_trains_is_counted(data, tmp_path):
    asked = Asked("base,deit-lt", 1, None, 1, {**COMMON, "model": "deit_micro_distilled_32"})
    found = compare(data, tmp_path / "c", asked)
    run = found.rows[1].runs[0]
    teacher = json.loads((run.folder / "teacher" / "report.json").read_text())
    assert run.seconds == pytest.approx(teacher["seconds"] + run.report["seconds"])
    assert found.rows[1].cost["seconds"] == run.seconds
    assert run.curve[0][1] > teacher["seconds"]
    assert found.rows[0].runs[0].taught == 0


def test_pictures_are_read_once(data, tmp_path, monkeypatch):
    from crosspatch.training import pictures

    real, calls = pictures.prepare, []
    monkeypatch.setattr(pictures, "prepare", lambda *a, **k: calls.append(1) or real(*a, **k))
    compare(data, tmp_path / "c", ASKED._replace(seeds=1, tries="base,mixup"))
    assert len(calls) == 1


def test_folders_that_are_taken(data, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("x")
    with pytest.raises(UsageError, match=r"other files, such as letter\.txt"):
        compare(data, tmp_path / "full", ASKED)
    with pytest.raises(UsageError, match="is a file"):
        compare(data, tmp_path / "full" / "letter.txt", ASKED)
    with pytest.raises(UsageError, match="holds no comparison"):
        compare(data, tmp_path / "none", ASKED, resume=True)
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "compare.json").write_text('{"schema": 1, "plan": ')
    with pytest.raises(DataError, match="cannot be read"):
        compare(data, tmp_path / "torn", ASKED)


def test_more_seeds_of_other_pictures_leave_what_is_there(whole, data, tmp_path):
    import shutil

    moved, out = tmp_path / "stripes", tmp_path / "c"
    shutil.copytree(data, moved)
    shutil.copytree(whole[0], out)
    plan = json.loads((out / "compare.json").read_text())
    plan["plan"]["data"] = str(moved)
    (out / "compare.json").write_text(json.dumps(plan))
    (moved / "row0" / "000.png").unlink()
    before = {one: one.read_bytes() for one in out.rglob("*") if one.is_file()}
    with pytest.raises(DataError, match="no longer those"):
        compare(str(moved), out, Asked("", 3), resume=True)
    assert {one: one.read_bytes() for one in out.rglob("*") if one.is_file()} == before


def test_no_test_pictures(tmp_path):
    few = stripes(tmp_path / "few", classes=2, count=1)
    with pytest.raises(DataError, match="no picture to test"):
        compare(str(few), tmp_path / "c", ASKED)


@pytest.mark.long
def test_a_run_that_fails_is_told_and_the_rest_is_compared(data, tmp_path, monkeypatch):
    from crosspatch.training.guard import NotFinite

    real = room.train_run

    def failing(spec, folder, *rest, **how):
        if "mixup" in str(folder):
            raise UsageError("the loss was NaN", "x", "y") from NotFinite(1, "loss", 0.0, None)
        return real(spec, folder, *rest, **how)

    monkeypatch.setattr(room, "train_run", failing)
    found = compare(data, tmp_path / "c", ASKED._replace(seeds=1))
    assert "the loss was NaN" in found.rows[1].verdict
    assert found.rows[2].difference is not None
    assert found.failed == {"mixup-lr=0.004/seed-0": "the loss was NaN"}


@pytest.mark.long
def test_what_is_stopped_after_a_failure_is_compared_as_far_as_it_went(data, tmp_path, monkeypatch):
    from crosspatch.training.guard import NotFinite

    real = room.train_run

    def failing(spec, folder, *rest, **how):
        if "mixup" in str(folder):
            raise UsageError("the loss was NaN", "x", "y") from NotFinite(1, "loss", 0.0, None)
        if folder.name == "seed-1":
            raise Interrupted("stop", "x", "y")
        return real(spec, folder, *rest, **how)

    monkeypatch.setattr(room, "train_run", failing)
    with pytest.raises(Interrupted):
        compare(data, tmp_path / "c", ASKED)
    part = json.loads((tmp_path / "c" / "compare.json").read_text())
    assert part["results"]["seeds"] == [0]
    assert "the loss was NaN" in part["results"]["candidates"][1]["verdict"]
