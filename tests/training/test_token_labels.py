"""Labels are written by a teacher and learnt from: whole runs, resumed ones, what is refused."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from crosspatch.data.decode import UnreadableImage
from crosspatch.data.split import read_split
from crosspatch.data.token_labels import State, TokenLabels
from crosspatch.errors import DataError, Interrupted, UsageError
from crosspatch.models.class_map import class_map
from crosspatch.objectives.token_labeling import TokenLabeling
from crosspatch.training import plan, session, start, token_labels
from crosspatch.training.objective import make_objective
from crosspatch.training.package import load_model
from crosspatch.training.recipe import Recipe
from crosspatch.training.run import RunFolder
from crosspatch.training.stepper import Stepper
from crosspatch.training.token_labels import Wish, label_pictures
from support.loops import Stop, halt, same
from support.tiny import Stripes

MICRO = {"model": "lvvit_micro_32", "size": 16, "batch": 16, "lr": 1e-3, "epochs": 1, "threads": 1}


@pytest.fixture(autouse=True)
def short_steps(monkeypatch):
    """Every step is told of, so that a reporter can stop a training anywhere."""
    monkeypatch.setattr(session, "fit", partial(session.fit, report_seconds=0.0))


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """Where the one teacher of these tests lies, once it was trained."""
    return tmp_path_factory.mktemp("shelf")


@pytest.fixture
def labelled(opened, monkeypatch, shelf, tmp_path):
    """(teacher's run, its labels of the tiny pictures, the summary)."""
    monkeypatch.setattr(token_labels, "open_source", lambda spec: opened)
    if not (shelf / "teacher").exists():
        trained(shelf / "teacher", objective="token-labeling", epochs=2)
    summary = label_pictures("stripes", str(shelf / "teacher"), tmp_path / "l.st")
    return shelf / "teacher", tmp_path / "l.st", summary


def trained(folder, reporter=None, **given):
    return session.train_run("stripes", folder, {**MICRO, **given}, reporter)


def test_labels_are_the_teacher_s_map_of_each_picture(labelled, opened):
    teacher, path, summary = labelled
    file, split = TokenLabels(path), RunFolder(teacher).path / "split.csv"
    model = load_model(teacher)
    shown = np.stack(
        [token_labels.load_picture(opened, item, model.preprocess) for item in (7, 40)]
    )
    with torch.no_grad():
        pictures = token_labels.normalise(torch.from_numpy(shown), model.preprocess)
        expected = class_map(model.module, pictures)
    torch.testing.assert_close(file.maps(torch.tensor([7, 40])), expected, atol=5e-3, rtol=5e-3)
    assert (summary["grid"], summary["top"], summary["images"]) == ([4, 4], 3, 72)
    assert summary["bytes"] == path.stat().st_size < 72 * 16 * 3 * 2 + 72 + 2_000
    trained_on = read_split(split, opened).train
    assert np.flatnonzero(file.state == State.TAUGHT).tolist() == sorted(trained_on.tolist())
    found = summary["agreement"]
    assert found["unseen_images"] == 72 - len(trained_on)
    maps = file.maps(torch.arange(72))
    right = maps.argmax(dim=1) == torch.from_numpy(opened.labels)[:, None, None]
    assert found["places"] == pytest.approx(float(right.float().mean()))


def test_a_student_learns_from_them_and_is_an_ordinary_run(labelled, tmp_path):
    _, path, _ = labelled
    summary = trained(tmp_path / "s", labels=str(path))
    assert summary["objective"] == "token-labeling"
    config = RunFolder(tmp_path / "s").read_config()
    recipe = Recipe.from_dict(config["recipe"])
    assert (recipe.mix, recipe.labels["path"]) == ((), str(path.resolve()))
    long = 70 * recipe.steps_per_epoch
    assert plan.with_steps(recipe, long).mix == ()
    assert plan.with_steps(replace(recipe, objective="supervised"), long).mix != ()
    assert "Pictures are not mixed" in " ".join(config["why"]["reasons"])
    assert load_model(tmp_path / "s").module.aux_head is not None
    plain = trained(tmp_path / "v", labels=str(path), model="vit_micro_32")
    assert plain["objective"] == "token-labeling"
    names = load_model(tmp_path / "v").module.state_dict()
    assert not [name for name in names if name.startswith("aux")]


@pytest.mark.parametrize("model", ["lvvit_micro_32", "vit_micro_32"])
def test_a_stopped_run_goes_on_with_the_same_bits(labelled, tmp_path, model):
    given = {"labels": str(labelled[1]), "epochs": 2, "model": model}
    trained(tmp_path / "whole", **given)
    with pytest.raises(Interrupted):
        trained(tmp_path / "stopped", Stop(4, halt()), **given)
    session.train_run("stripes", tmp_path / "stopped", {}, resume=True)
    same(RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "stopped"))


def test_an_objective_hears_which_pictures_and_where_they_lie(labelled, opened, monkeypatch):
    """The labels of a step are those of the pictures in it, wherever the split put them."""
    seen = []
    step, target = Stepper.step, TokenLabeling.target
    monkeypatch.setattr(Stepper, "step", lambda self, batch, *more: (
        seen.append([batch.items, batch.labels]), step(self, batch, *more))[1])  # fmt: skip
    monkeypatch.setattr(TokenLabeling, "target", lambda self, inputs: (
        seen[-1].append(inputs), target(self, inputs))[1])  # fmt: skip
    trained(labelled[1].parent / "s", labels=str(labelled[1]))
    for items, labels, inputs in seen:
        assert torch.equal(torch.from_numpy(opened.labels)[items], labels)
        assert inputs.items is items
        assert inputs.warp.shape == (len(items), 2, 3)


def test_labelling_goes_on_where_it_was_stopped(labelled, tmp_path):
    teacher, path, _ = labelled

    class Halt(Stop):
        def progress(self, what, done, total):
            if done >= 40:
                raise KeyboardInterrupt

    out = tmp_path / "again" / "l.st"
    with pytest.raises(Interrupted, match="is kept beside"):
        label_pictures("stripes", str(teacher), out, Wish(batch=20), reporter=Halt())
    assert not out.exists()
    told = Stop()
    label_pictures("stripes", str(teacher), out, Wish(batch=20), reporter=told)
    assert any("goes on: 40 pictures" in text for text in told.messages)
    items = torch.arange(72)
    torch.testing.assert_close(
        TokenLabels(out).maps(items), TokenLabels(path).maps(items), atol=5e-3, rtol=5e-3
    )
    with pytest.raises(UsageError, match="exists"):
        label_pictures("stripes", str(teacher), out)


def test_unreadable_pictures_have_no_labels(labelled, opened, monkeypatch, tmp_path):
    read, split = type(opened).read, RunFolder(labelled[0]).path / "split.csv"
    bad = int(read_split(split, opened).train[0])
    key = opened.items[bad].key

    def broken(self, index):
        if index == bad:
            raise UnreadableImage(key, "cut short")
        return read(self, index)

    monkeypatch.setattr(type(opened), "read", broken)
    told = label_pictures("stripes", str(labelled[0]), tmp_path / "m.st")
    assert (told["images"], told["skipped"]) == (71, [key])
    monkeypatch.setattr(type(opened), "read", read)
    with pytest.raises(DataError, match=f"no labels of 1 training pictures, the first {key}"):
        trained(tmp_path / "s", labels=str(tmp_path / "m.st"))


def test_what_cannot_be_is_refused_before_a_picture_is_read(
    labelled, opened, monkeypatch, tmp_path
):
    _, path, _ = labelled
    monkeypatch.setattr(start, "read_pictures", lambda *_: pytest.fail("pictures were read"))
    torn = tmp_path / "torn.st"
    torn.write_bytes(path.read_bytes()[:-5])
    cases = (
        ({"labels": str(path), "mix": "mixup"}, "--mix mixup with the objective token-labeling"),
        ({"labels": str(path), "fit": "pad"}, "by crop, and training brings them to .* by pad"),
        ({"labels": str(tmp_path / "none")}, "there is no file"),
        ({"labels": str(torn)}, "torn"),
        ({"labels": str(path), "recipe": "probe", "lr": None, "epochs": None}, "--recipe probe"),
        ({"labels": str(path), "sizes": "24"}, "two objectives at once"),
    )
    for given, match in cases:
        with pytest.raises((UsageError, DataError), match=match) as found:
            trained(tmp_path / "s", **given)
        assert found.value.do
    monkeypatch.setattr(session, "open_source", lambda spec: Stripes(noise=50))
    with pytest.raises(DataError, match="same names with other contents"):
        trained(tmp_path / "s", labels=str(path))


def test_a_split_in_which_the_teacher_would_judge_is_refused(labelled, tmp_path):
    with pytest.raises(UsageError, match="would"):
        trained(tmp_path / "s", labels=str(labelled[1]), seed=1)
    trained(tmp_path / "t", labels=str(labelled[1]), seed=1, split_seed=0)


def test_labels_that_change_during_a_run_stop_it(labelled, opened, tmp_path):
    _, path, _ = labelled
    with pytest.raises(Interrupted):
        trained(tmp_path / "s", Stop(2, halt()), labels=str(path))
    whole = path.read_bytes()
    path.write_bytes(whole[:-100] + bytes(100))
    with pytest.raises(DataError, match="no longer the labels"):
        session.train_run("stripes", tmp_path / "s", {}, resume=True)
    path.write_bytes(whole)
    session.train_run("stripes", tmp_path / "s", {}, resume=True)


def test_teachers_and_wishes_that_cannot_label(labelled, opened, monkeypatch, tmp_path):
    teacher, _, _ = labelled
    out = tmp_path / "x" / "l.st"
    cases = (
        (str(tmp_path / "no"), Wish(), "no"),
        (str(teacher), Wish(top=4), "--top 4 of 3 classes"),
        (str(teacher), Wish(size=(24, 24)), "does not take pictures of 24x24"),
    )
    for asked, wish, match in cases:
        with pytest.raises((UsageError, DataError), match=match):
            label_pictures("stripes", asked, out, wish)
    other = Stripes(4, 4)
    monkeypatch.setattr(token_labels, "open_source", lambda spec: other)
    with pytest.raises(UsageError, match="has other classes") as found:
        label_pictures("stripes", str(teacher), out)
    assert found.value.do == "train a teacher on these data first"  # label has no --distill
    several = Stripes()
    several.multi = True
    monkeypatch.setattr(token_labels, "open_source", lambda spec: several)
    with pytest.raises(UsageError, match="several labels"):
        label_pictures("stripes", str(teacher), out)
    monkeypatch.setattr(token_labels, "open_source", lambda spec: opened)

    def mad(model, images):
        return class_map(model, images) * np.inf

    monkeypatch.setattr(token_labels, "class_map", mad)
    with pytest.raises(DataError, match="not finite"):
        label_pictures("stripes", str(teacher), out)
    assert not out.exists()


def test_without_labels_lvvit_alone_repeats_the_picture_s(opened, make_recipe):
    recipe = make_recipe(model="lvvit_micro_32", size=(16, 16), objective="token-labeling", mix=(),
                         mix_prob=(), mix_alpha=())  # fmt: skip
    assert make_objective(recipe, opened.classes).store is None
    with pytest.raises(UsageError, match="without labels for a VisionTransformer"):
        make_objective(Recipe.from_dict({**recipe.to_dict(), "model": "vit_micro_32"}),
                       opened.classes)  # fmt: skip
