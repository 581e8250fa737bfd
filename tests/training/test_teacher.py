"""`--teacher`: what can teach whom, told before a picture is read; runs that learn, stop, go on."""

from __future__ import annotations

import json
import shutil
import socket
from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

import crosspatch as xp
from crosspatch.data.longtail import parse_spec
from crosspatch.errors import DataError, Interrupted, UsageError
from crosspatch.training import session, start
from crosspatch.training.objective import make_objective, resolve_objective
from crosspatch.training.package import load_model
from crosspatch.training.released import HUB_FILE, Release, release_of
from crosspatch.training.run import RunFolder
from crosspatch.training.teacher import find_teacher, load_teacher
from support import runs
from support.loops import Stop, halt, same
from support.ranks import together
from support.runs import CLASSES, write_run
from support.tiny import Stripes, tiny_recipe

MICRO = {"model": "vit_micro_32", "size": 16, "batch": 16, "lr": 1e-3, "epochs": 1, "threads": 1}
RELEASED = "test_vit.r160_in1k"


@pytest.fixture(autouse=True)
def short_steps(monkeypatch):
    monkeypatch.setattr(session, "fit", partial(session.fit, report_seconds=0.0))

    def refuse(*_, **__):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def blind(monkeypatch):
    monkeypatch.setattr(start, "read_pictures", lambda *_: pytest.fail("pictures were read"))


@pytest.fixture
def released(tmp_path, monkeypatch):
    """A network of timm's in an otherwise empty cache of Hugging Face, with drawn weights."""
    from huggingface_hub import constants

    folder = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    release = release_of(RELEASED)
    place = folder / f"models--{release.repository.replace('/', '--')}"
    (place / "snapshots" / "abc").mkdir(parents=True)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("abc")
    torch.manual_seed(0)
    state = xp.create_model(release.model).state_dict()
    save_file(state, place / "snapshots" / "abc" / HUB_FILE)
    return release


@pytest.fixture
def taught(monkeypatch, tmp_path):
    """Writes a run of the stripes' classes, as if it had been trained."""
    monkeypatch.setattr(runs, "CLASSES", ("row0", "row1", "row2"))
    return lambda name="t", **changed: str(write_run(tmp_path / name, **changed))


def trained(folder, reporter=None, **settings):
    return session.train_run("stripes", folder, {**MICRO, **settings}, reporter)


def recipe_with(run, **changed):
    asked = {"objective": "distill", "model": "vit_micro_32", **changed}
    return tiny_recipe(teacher=find_teacher(str(run)), **asked)


def reasons(run):
    return " ".join(RunFolder(run).read_config()["why"]["reasons"])


@pytest.mark.parametrize("distill", ["soft", "hard", "scalekd"])
def test_a_run_learns_from_a_run_and_says_how(opened, taught, tmp_path, distill):
    teacher = taught()
    summary = trained(tmp_path / "s", teacher=teacher, distill=distill)
    assert summary["objective"] == ("scalekd" if distill == "scalekd" else "distill")
    said = reasons(tmp_path / "s")
    assert f"The teacher {teacher} (0." in said
    assert "M parameters, 32x32 pixels) takes" in said
    assert ("blocks.2 (64 x 4 x 4)" if distill == "scalekd" else f"Distilled ({distill})") in said
    kept = load_file(tmp_path / "s" / "model" / "model.safetensors")
    plain = xp.create_model("vit_micro_32", num_classes=3, img_size=16).state_dict()
    assert {k: v.shape for k, v in kept.items()} == {k: v.shape for k, v in plain.items()}


@pytest.mark.parametrize("objective", ["distill", "scalekd:heads=2/4"])
def test_an_interrupted_run_ends_with_the_same_bits(opened, taught, tmp_path, objective):
    how = {"teacher": taught(), "objective": objective, "epochs": 2, "mix": "mixup,cutmix"}
    trained(tmp_path / "whole", **how)
    with pytest.raises(Interrupted):
        trained(tmp_path / "parts", Stop(4, halt()), **how)
    session.train_run("stripes", tmp_path / "parts", {}, resume=True)
    same(*(RunFolder(tmp_path / name) for name in ("whole", "parts")))


@pytest.mark.long
@pytest.mark.parametrize("distill", ["hard", "scalekd"])
def test_a_reduced_student_in_bfloat16_learns(opened, taught, tmp_path, distill):
    teacher = taught(reduce="tome:r=2")
    how = {"objective": "distill:kind=hard" if distill == "hard" else "scalekd"}
    summary = trained(tmp_path / "s", teacher=teacher, reduce="tome:r=3",
                      precision="bf16", **how)  # fmt: skip
    assert summary["reduce"] == "tome:r=3"
    assert load_model(tmp_path / "s").reduction == "tome:r=3"
    said = reasons(tmp_path / "s")
    assert "reduced by tome) takes" in said
    assert ("its tokens are reduced on the way" in said) == (distill == "scalekd")


@pytest.mark.long
def test_two_processes_reach_the_losses_of_one(taught, tmp_path):
    teacher, rows = taught(), {}
    for world in (1, 2):
        where = "support.teacher_work:losses"
        rows[world] = together(world, where, tmp_path, teacher=teacher)[0]
    for name, one in rows[1].items():
        assert one == pytest.approx(rows[2][name], rel=1e-6), name


# ------------------------------------------------------------------ classes


def test_classes_in_another_order_are_matched_by_name(tmp_path):
    recipe = recipe_with(write_run(tmp_path / "t"))
    turned = tuple(reversed(CLASSES))
    images = torch.randn(2, 3, 8, 8)
    own = load_teacher(recipe, CLASSES).logits(images)
    assert torch.equal(load_teacher(recipe, turned).logits(images), own.flip(1))


@pytest.mark.parametrize(
    ("classes", "match"),
    [
        (("ash", "beech", "cedar"), "has also date"),
        ((*CLASSES, "elm"), "lacks elm"),
        (("ash", "beech", "cedar", "elm"), "lacks elm and has also date"),
    ],
)
def test_other_classes_are_named_and_give_features_alone(tmp_path, classes, match):
    recipe = recipe_with(write_run(tmp_path / "t"))
    with pytest.raises(UsageError, match=match) as found:
        load_teacher(recipe, classes)
    assert "--distill scalekd" in found.value.do
    assert not load_teacher(replace(recipe, objective="scalekd"), classes).agrees
    with pytest.raises(UsageError, match=match) as found:
        load_teacher(replace(recipe, objective="deit-lt"), classes)
    assert "scalekd" not in found.value.do


def test_a_teacher_of_several_labels_gives_features_alone(tmp_path):
    run = write_run(tmp_path / "t")
    path = run / "model" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"task": "multilabel", "thresholds": [0.5] * 4}))
    with pytest.raises(UsageError, match="several labels"):
        load_teacher(recipe_with(run), CLASSES)


# ------------------------------------------------------------------ released networks


def test_a_released_network_gives_features_and_no_answers(opened, released, blind, tmp_path):
    with pytest.raises(UsageError, match="classes it was released with") as found:
        trained(tmp_path / "s", teacher=RELEASED, distill="soft")
    assert "crosspatch train DATA --recipe finetune --model test_vit," in found.value.do
    recipe = recipe_with(RELEASED, objective="scalekd", size=(16, 16), store=(18, 18))
    assert recipe.teacher["kind"] == "released"
    teacher = load_teacher(recipe, ("a", "b"))
    assert (teacher.agrees, teacher.size, teacher.seen) == (False, (160, 160), (16, 16))
    objective = make_objective(recipe, ("a", "b"))
    assert "its classes are others" in " ".join(objective.remarks)
    wanted = xp.create_model("test_vit").eval()
    wanted.load_state_dict(load_file(recipe.teacher["path"]))
    images = torch.randn(1, 3, 160, 160)
    with torch.no_grad():
        assert torch.allclose(teacher.module(images), wanted(images), atol=1e-6)


def test_a_name_that_the_cache_lacks_is_asked_for(released, monkeypatch):
    def fetch(self, seconds):
        raise DataError(f"{self.name} could not be fetched (no network)", "a network", "--weights")

    monkeypatch.setattr(Release, "fetch", fetch)
    with pytest.raises(DataError, match="could not be fetched") as found:
        find_teacher("test_vit2.r160_in1k")
    assert "hf download" in found.value.do
    assert "--weights" not in found.value.do


# ------------------------------------------------------------------ what cannot teach


@pytest.mark.parametrize("distill", ["soft", "scalekd"])
def test_a_teacher_whose_answers_are_not_finite_is_named(opened, taught, blind, tmp_path, distill):
    run = taught()
    path = tmp_path / "t" / "model" / "model.safetensors"
    state = load_file(path)
    state["head.weight"] = torch.full_like(state["head.weight"], 3e38)
    save_file(state, path)
    with pytest.raises(DataError, match=r"the teacher .*t answers with numbers that are not finit"):
        trained(tmp_path / "s", teacher=run, objective="scalekd" if distill == "scalekd"
                else "distill")  # fmt: skip


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("model.onnx", "is a bundle"),
        ("w.safetensors", "is a file"),
        ("nowhere/at/all", "there is no run"),
        ("vit_micro_33", "neither a run nor a network"),
        ("vit_micro_32", "no released weights"),
        ("empty", "config.json"),
    ],
)
def test_what_is_no_teacher_is_said_before_a_picture_is_read(
    opened, blind, tmp_path, monkeypatch, name, match
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"")
    (tmp_path / "w.safetensors").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    with pytest.raises((UsageError, DataError), match=match) as found:
        trained(tmp_path / "s", teacher=name)
    assert found.value.expected
    assert found.value.do
    assert not (tmp_path / "s" / "config.toml").exists()


def test_nothing_is_said_to_be_near_where_nothing_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="neither a run") as found:
        find_teacher("§§§§")
    assert found.value.expected.endswith("or a released network")
    with pytest.raises(UsageError, match="neither a run") as found:
        find_teacher("resnet10tt")
    assert "; near: resnet10t" in found.value.expected


def test_a_kind_that_is_typed_twice_is_typed_alike():
    given = {"teacher": "t", "distill": "soft", "objective": "distill:kind=soft,tau=2"}
    assert resolve_objective(given) == ("distill", {"kind": "soft", "tau": 2})
    with pytest.raises(UsageError, match="--distill soft and distill:kind=hard"):
        resolve_objective({**given, "objective": "distill:kind=hard"})


def test_a_folder_with_a_bundle_is_a_bundle(tmp_path):
    (tmp_path / "b.onnx").write_bytes(b"")
    with pytest.raises(UsageError, match="is a bundle"):
        find_teacher(str(tmp_path))


def test_a_student_whose_maps_cannot_be_read_is_refused(opened, taught, blind, tmp_path):
    run = taught()
    with pytest.raises(UsageError, match="TinyNet names no maps"):
        trained(tmp_path / "s", model="tiny", teacher=str(run), distill="scalekd")
    with pytest.raises(UsageError, match="--recipe probe"):
        trained(tmp_path / "s", teacher=str(run), recipe="probe", lr=None, epochs=None, batch=None,
                model=None, size=None, weights=str(run))  # fmt: skip


def test_a_teacher_that_saw_the_judging_pictures_is_refused(opened, tmp_path):
    trained(tmp_path / "t", seed=5)
    with pytest.raises(UsageError, match="pictures that would judge it here") as found:
        trained(tmp_path / "s", teacher=str(tmp_path / "t"))
    assert "--seed 5" in found.value.do


@pytest.mark.parametrize(("theirs", "mine"), [("", "@lt:4"), ("@lt:4", ""), ("@lt:4", "@lt:2")])
def test_a_tail_of_the_same_pictures_is_no_other_data(opened, tmp_path, theirs, mine):
    opened.tail = parse_spec(f"stripes{theirs}")[1]
    session.train_run(f"stripes{theirs}", tmp_path / "t", {**MICRO, "seed": 5})
    opened.tail = parse_spec(f"stripes{mine}")[1]
    how = {**MICRO, "teacher": str(tmp_path / "t")}
    with pytest.raises(UsageError, match="pictures that would judge it here"):
        session.train_run(f"stripes{mine}", tmp_path / "s", how)


def test_a_teacher_that_changed_since_the_run_began_is_refused(opened, taught, tmp_path):
    how = {"teacher": taught(), "distill": "soft", "epochs": 2}
    with pytest.raises(Interrupted):
        trained(tmp_path / "s", Stop(2, halt()), **how)
    path = tmp_path / "t" / "model" / "model.safetensors"
    state = load_file(path)
    save_file({k: v + 1 if v.is_floating_point() else v for k, v in state.items()}, path)
    with pytest.raises(DataError, match="no longer the teacher"):
        session.train_run("stripes", tmp_path / "s", {}, resume=True)
    shutil.rmtree(tmp_path / "t")
    with pytest.raises(DataError, match="no longer the teacher"):
        session.train_run("stripes", tmp_path / "s", {}, resume=True)


def test_pictures_with_several_labels_are_refused_before_they_are_read(
    monkeypatch, blind, tmp_path
):
    class Several(Stripes):
        multi = True

    monkeypatch.setattr(session, "open_source", lambda spec: Several())
    run = write_run(tmp_path / "t")
    with pytest.raises(UsageError, match="several labels"):
        trained(tmp_path / "s", teacher=str(run))
