"""`--objective deit-lt` in one command: a teacher, then its student; stopped, resumed, refused."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import tomli_w

from crosspatch.data.split import read_split
from crosspatch.errors import DataError, Interrupted, UsageError
from crosspatch.training import session
from crosspatch.training.package import load_model
from crosspatch.training.run import RunFolder
from crosspatch.training.taught import lesson_of
from support.kills import in_step, killed
from support.loops import Stop, halt, same
from support.tiny import Stripes

GIVEN = {"objective": "deit-lt", "epochs": 2, "threads": 1}
SMALL = {"model": "deit_micro_distilled_32", "model_args": {"depth": 1, "embed_dim": 16}}


class Uneven(Stripes):
    """Many of the first class, few of the last."""

    def __init__(self, counts=(120, 24, 8)) -> None:
        super().__init__(max(counts), len(counts))
        most = max(counts)
        kept = [c * most + i for c, n in enumerate(counts) for i in range(n)]
        self.items = tuple(self.items[place] for place in kept)
        self._pictures = self._pictures[kept]


@pytest.fixture
def source():
    return Uneven()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Every step is told of, and the teacher is the smallest there is."""
    from crosspatch.training.recipes import cnn

    monkeypatch.setattr(session, "fit", partial(session.fit, report_seconds=0.0))
    monkeypatch.setattr(cnn, "SMALL_PRESET", "resnet_micro_32")


def trained(folder, reporter=None, resume=False, **settings):
    given = {} if resume else {**GIVEN, **SMALL, **settings}
    return session.train_run("stripes", folder, given, reporter, resume=resume)


class Listening(Stop):
    """Remembers plans, and stops at a step of the teacher or of the student."""

    def __init__(self, role=None, at=None):
        super().__init__(at, halt() if at else None)
        self.role, self.roles, self.finished = role, [], []

    def plan(self, info):
        self.roles.append(info.get("role", "student"))

    def step(self, done, total, loss, images_per_second):
        self.steps.append((self.roles[-1], done))
        if self.roles[-1] == self.role and done == self.at:
            raise self.error

    def done(self, summary):
        self.finished.append(summary["out"])


def test_one_command_trains_a_teacher_and_its_student(opened, tmp_path):
    heard, out = Listening(), tmp_path / "r"
    summary = trained(out, heard)
    assert heard.roles == ["teacher", "student"]
    assert heard.finished == [str(out)]
    assert any("First its teacher" in text for text in heard.messages)
    assert any("The teacher is trained" in text for text in heard.messages)
    assert summary["objective"] == "deit-lt"
    student, teacher = RunFolder(out).read_config(), RunFolder(out / "teacher").read_config()
    assert student["recipe"]["teacher"]["path"] == str((out / "teacher" / "model").resolve())
    recipe = teacher["recipe"]
    assert (recipe["name"], recipe["objective"], recipe["sam"]) == ("cnn", "ldam", 0.05)
    assert (recipe["optimiser"], recipe["balance"]) == ("sgd", "drw")
    assert student["recipe"]["balance"] == "none"
    assert student["recipe"]["mix"] == ["mixup-batch", "cutmix-batch"]
    for part in ("train", "val", "test"):
        one, two = (getattr(read_split(run / "split.csv", opened), part)
                    for run in (out, out / "teacher"))  # fmt: skip
        assert np.array_equal(one, two)
    assert not (out / "waiting.toml").exists()
    assert load_model(out).module.head_dist is not None
    for split in ("val", "test"):
        heads = {one["name"]: one for one in summary[split]["heads"]}
        assert list(heads) == ["class", "distillation", "mean"]
        assert heads["mean"]["accuracy"] == summary[split]["accuracy"]
        assert [g["name"] for g in heads["class"]["groups"]] == ["head", "middle", "tail"]


@pytest.mark.parametrize(("role", "at"), [("teacher", 3), ("student", 3)])
def test_a_stopped_run_goes_on_with_the_right_one(opened, tmp_path, role, at):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    trained(whole)
    with pytest.raises(Interrupted):
        trained(cut, Listening(role, at))
    assert RunFolder(cut).unfinished
    assert RunFolder(cut).waiting == (role == "teacher")
    heard = Listening()
    trained(cut, heard, resume=True)
    assert heard.roles == ["teacher", "student"][role == "student" :]
    assert heard.steps[0] == (role, at + 1)
    for part in ("", "teacher"):
        same(RunFolder(whole / part), RunFolder(cut / part))


@pytest.mark.long
def test_a_killed_teacher_is_gone_on_with(opened, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    trained(whole)
    assert killed(in_step(4, "after"), lambda: trained(cut))
    assert RunFolder(cut).waiting
    trained(cut, resume=True)
    for part in ("", "teacher"):
        same(RunFolder(whole / part), RunFolder(cut / part))


def test_a_teacher_of_other_pictures_is_not_gone_on_with(opened, tmp_path):
    with pytest.raises(Interrupted):
        trained(tmp_path / "r", Listening("student", 1))
    config = tmp_path / "r" / "config.toml"
    (tmp_path / "r" / "waiting.toml").write_text(
        tomli_w.dumps({"asked": {**GIVEN, **SMALL}, "reading": {}, "data": "stripes"})
    )
    config.unlink()
    opened.items = tuple(replace(item, key=f"new/{item.key}") for item in opened.items)
    with pytest.raises(DataError, match="was trained on other pictures"):
        trained(tmp_path / "r", resume=True)


def test_the_same_command_goes_on_and_another_one_is_refused(opened, tmp_path):
    with pytest.raises(Interrupted):
        trained(tmp_path / "r", Listening("teacher", 2))
    before = (tmp_path / "r" / "waiting.toml").read_bytes()
    with pytest.raises(UsageError, match=r"begun with other settings: --epochs 3 \(was 2\)"):
        trained(tmp_path / "r", epochs=3)
    assert (tmp_path / "r" / "waiting.toml").read_bytes() == before
    heard = Listening()
    trained(tmp_path / "r", heard)
    assert heard.steps[0] == ("teacher", 3)


def test_a_given_teacher_is_used_and_not_trained(opened, tmp_path):
    own = {"objective": "supervised", "recipe": "cnn", "model": "resnet_micro_32", "size": 16}
    session.train_run("stripes", tmp_path / "t", {**GIVEN, **own})
    heard = Listening()
    trained(tmp_path / "r", heard, teacher=str(tmp_path / "t"))
    assert heard.roles == ["student"]
    assert not (tmp_path / "r" / "teacher").exists()
    with pytest.raises(UsageError, match="that would judge it here"):
        trained(tmp_path / "s", teacher=str(tmp_path / "t"), seed=5)
    assert not (tmp_path / "s").exists()


def test_a_teacher_of_other_classes_or_without_numbers_is_refused(opened, monkeypatch, tmp_path):
    from safetensors.torch import load_file, save_file

    own = {"objective": "supervised", "recipe": "cnn", "model": "resnet_micro_32", "size": 16}
    session.train_run("stripes", tmp_path / "t", {**GIVEN, **own, "epochs": 1})
    path = tmp_path / "t" / "model" / "model.safetensors"
    whole = load_file(path)
    for times, said in ((2e38, "answers with numbers"), (float("nan"), "holds weights")):
        head = (whole["linear.weight"].sign() + 0.5) * times
        save_file({**whole, "linear.weight": head}, path)
        with pytest.raises(DataError, match=f"{said} that are not finite"):
            trained(tmp_path / "r", teacher=str(tmp_path / "t"))
        assert not (tmp_path / "r").exists()
    save_file(whole, path)
    config = json.loads((tmp_path / "t" / "model" / "config.json").read_text())
    config["class_names"] = ["x", "y", "z"]
    (tmp_path / "t" / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="other classes"):
        trained(tmp_path / "r", teacher=str(tmp_path / "t"))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"model": "crossvit_micro_32", "model_args": {}}, "no distillation token"),
        ({"model": "resnet_micro_32", "model_args": {}}, "no distillation token"),
        ({"balance": "weights"}, "weighs rare classes itself"),
        ({"objective": "deit-lt:drw=2"}, "from which part"),
        ({"objective": "deit-lt:beta=2"}, "from which part"),
    ],
)
def test_what_cannot_work_is_refused_before_the_teacher_is_trained(
    opened, tmp_path, settings, said
):
    heard = Listening()
    with pytest.raises(UsageError, match=said):
        trained(tmp_path / "r", heard, **settings)
    assert heard.roles == []
    assert not (tmp_path / "r").exists()


def test_without_a_model_a_distilled_one_is_planned(opened, tmp_path, make_recipe):
    summary = session.train_run("stripes", tmp_path / "r", {**GIVEN, "epochs": 1})
    assert (summary["model"], summary["size"]) == ("deit_micro_distilled_32", [16, 16])
    config = RunFolder(tmp_path / "r" / "teacher").read_config()
    assert config["recipe"]["model"] == "resnet_micro_32"


def test_a_teacher_has_a_third_of_the_time_and_its_students_shape(make_recipe):
    student = make_recipe(size=(96, 160), seed=7, split_seed=3, objective="deit-lt")
    lesson = lesson_of({"time": 90.0, "lr": 3e-3, "flip": False}, student, 50)
    assert lesson["time"] == pytest.approx(30)
    assert (lesson["size"], lesson["seed"], lesson["split_seed"]) == ((50, 83), 7, 3)
    assert lesson["flip"] is False
    assert "lr" not in lesson
    assert lesson_of({}, make_recipe(size=(32, 32)), 300)["size"] == (32, 32)
