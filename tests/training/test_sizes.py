"""`--sizes`: resolved once, kept in the run and its model, resumed with the same bits."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from crosspatch.data.augment import augment, draws, shrunk
from crosspatch.deploy.loading import load
from crosspatch.errors import Interrupted, UsageError
from crosspatch.training import session, start
from crosspatch.training.objective import make_objective
from crosspatch.training.package import load_model, read_config
from crosspatch.training.run import RunFolder
from crosspatch.training.sizes import settle_sizes
from crosspatch.training.stepper import Stepper
from support.loops import Stop, halt, same

MICRO = {"model": "resformer_micro_32", "size": 16, "batch": 16, "lr": 1e-3, "epochs": 2,
         "threads": 1, "sizes": "8,12"}  # fmt: skip


@pytest.fixture(autouse=True)
def short_steps(monkeypatch):
    monkeypatch.setattr(session, "fit", partial(session.fit, report_seconds=0.0))


def trained(folder, reporter=None, **settings):
    return session.train_run("stripes", folder, {**MICRO, **settings}, reporter)


def test_a_stopped_run_goes_on_with_the_same_bits(opened, tmp_path):
    summary = trained(tmp_path / "whole")
    assert summary["objective"] == "resformer"
    with pytest.raises(Interrupted):
        trained(tmp_path / "stopped", Stop(3, halt()))
    session.train_run("stripes", tmp_path / "stopped", {}, resume=True)
    same(RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "stopped"))
    config = RunFolder(tmp_path / "whole").read_config()
    assert config["recipe"]["sizes"] == [[12, 12], [8, 8]]
    assert "at 16 pixels and again at 12, 8" in " ".join(config["why"]["reasons"])


@pytest.mark.parametrize("model", ["vit_micro_32", "resnet10t"])
def test_the_trained_model_takes_the_other_sizes_too(opened, tmp_path, model):
    trained(tmp_path / "r", model=model, epochs=1, sizes="8")
    arguments = read_config(tmp_path / "r" / "model")["model_args"]
    assert arguments.get("dynamic_img_size", False) is (model == "vit_micro_32")
    module = load_model(tmp_path / "r").module
    with torch.no_grad():
        for side in (8, 16, 24):
            assert module(torch.zeros(1, 3, side, side)).isfinite().all()
    predictor = load(tmp_path / "r", size=(8, 12))
    picture = opened.read(0)
    assert predictor.pixels(picture).shape == (8, 12, 3)
    assert predictor.predict(picture).probs.shape == (1, 3)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"sizes": "10"}, "multiples of 4 from 4 to 12"),
        ({"sizes": "16"}, "multiples of 4 from 4 to 12"),
        ({"sizes": "8,8"}, "each once"),
        ({"sizes": "20"}, "let --size be the largest"),
        ({"sizes": "2"}, "from 4"),
        ({"sizes": "8;4"}, "whole numbers"),
        ({"model": "crossvit_micro_32"}, "resizes everything to its branches' sizes"),
        ({"model": "evo_levit_micro_32", "size": 32, "sizes": "16"}, "for evo_levit_micro_32"),
        ({"objective": "supervised"}, "two objectives"),
        ({"reduce": "tome:r=1", "model": "vit_micro_32"}, "token reduction"),
        ({"sizes": None, "objective": "resformer"}, "--sizes 24,16"),
        ({"objective": "resformer:alpha=-1"}, "alpha"),
    ],
)
def test_what_cannot_be_is_refused_before_a_picture_is_read(
    opened, monkeypatch, tmp_path, change, match
):
    monkeypatch.setattr(start, "read_pictures", lambda *_: pytest.fail("pictures were read"))
    with pytest.raises(UsageError, match=match) as found:
        trained(tmp_path / "r", **change)
    assert found.value.do


def test_a_model_of_one_size_says_so(opened, tmp_path):
    trained(tmp_path / "r", model="vit_micro_32", epochs=1, sizes=None)
    with pytest.raises(UsageError, match="made for 16"):
        load(tmp_path / "r", size=(8, 8))
    with pytest.raises(UsageError, match="would not be seen"):
        load(tmp_path / "r", size=(18, 16))


def test_each_size_has_draws_of_its_own_and_they_depend_on_nothing_else(images, make_recipe):
    recipe = settle_sizes(
        make_recipe(model="resformer_micro_32", size=(16, 16), store=(18, 18),
                    sizes=((8, 8), (12, 12))), 3,
    )  # fmt: skip
    assert recipe.sizes == ((12, 12), (8, 8))
    stepper = Stepper(recipe, make_objective(recipe, images.classes))
    stored = torch.randint(0, 256, (4, 18, 18, 3), dtype=torch.uint8)
    from crosspatch.data.loading import Batch

    batch = Batch(stored, torch.zeros(4, dtype=torch.long), torch.arange(5, 9), torch.arange(4), 4)
    made = stepper._augmented(batch, 2)
    assert [tuple(one.shape[2:]) for one in made] == [(16, 16), (12, 12), (8, 8)]
    how = {"epoch": 2, "seed": recipe.seed, "config": recipe.augment,
           "preprocess": recipe.preprocess}  # fmt: skip
    for number, found in enumerate(made):
        whole = augment(stored, batch.positions, **how, stream=number)
        assert torch.equal(found, whole if number == 0 else shrunk(whole, found.shape[2:]))
    tables = [draws(batch.positions, seed=0, epoch=2, stream=number) for number in range(3)]
    assert not any((tables[a] == tables[b]).any() for a, b in ((0, 1), (1, 2)))
    bare = Stepper(
        replace(recipe, sizes=()), make_objective(replace(recipe, sizes=()), images.classes)
    )
    assert torch.equal(bare._augmented(batch, 2)[0], made[0])


def test_a_shrunk_picture_is_what_a_decoded_one_would_be():
    import numpy as np
    from PIL import Image

    smooth = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    large = Image.fromarray(smooth).resize((64, 64), Image.Resampling.BICUBIC)
    wanted = np.asarray(large.resize((24, 24), Image.Resampling.BICUBIC), np.float32)
    tensor = torch.from_numpy(np.array(large)).permute(2, 0, 1)[None].float()
    found = shrunk(tensor, (24, 24))[0].permute(1, 2, 0).clamp(0, 255).numpy()
    assert np.abs(found - wanted).max() < 1.5
