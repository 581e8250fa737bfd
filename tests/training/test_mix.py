# SPDX-License-Identifier: Apache-2.0
"""`--mix`: names, how often each is drawn, what is refused, and runs that are gone on with."""

from __future__ import annotations

import pytest
import torch

from crosspatch.errors import Interrupted, UsageError
from crosspatch.models.registry import create_model
from crosspatch.training import session, start
from crosspatch.training.mix import make_mixer, patch_of, resolve_mix
from crosspatch.training.objective import rehearse
from crosspatch.training.package import build_model
from crosspatch.training.recipe import MIXERS, Recipe
from crosspatch.training.run import RunFolder
from support.loops import Stop, halt, same

CLASSES = ("a", "b", "c")
MICRO = {"model": "vit_micro_32", "size": 16, "batch": 16, "lr": 1e-3, "epochs": 1, "threads": 1}


@pytest.mark.parametrize(
    ("asked", "shares"),
    [
        ("none", ()),
        ("mixpro", (1.0,)),
        ("maskmix,mixpro", (0.5, 0.5)),
        ("mixup-batch,cutmix-batch,mixpro", (0.25, 0.25, 0.5)),
        ("mixup,cutmix,resizemix", (1 / 3,) * 3),
        ("mixup,maskmix,mixpro", (0.5, 0.25, 0.25)),
    ],
)
def test_shares_of_the_batches(asked, shares):
    assert resolve_mix(asked)["mix_prob"] == pytest.approx(shares)


def test_unknown_names_have_near_ones():
    with pytest.raises(UsageError, match="no mixing 'resizmix'") as found:
        resolve_mix("mixup,resizmix")
    assert found.value.do == "--mix resizemix"


def mixing(make_recipe, *names, **changed) -> Recipe:
    count = len(names)
    how = {"mix": names, "mix_prob": (1 / count,) * count, "mix_alpha": (1.0,) * count}
    sizes = {"model": "vit_micro_32", "size": (32, 32), "store": (36, 36)}
    return make_recipe(**{**how, **sizes, **changed})


def test_every_mixing_is_made_for_a_model(make_recipe):
    model = create_model("vit_micro_32", num_classes=3, img_size=32)
    mixer = make_mixer(mixing(make_recipe, *MIXERS), model)
    assert mixer is not None
    cells = [one.cell for one in mixer.mixers if hasattr(one, "cell")]
    assert cells == [8, 8]
    kinds = {type(one).__name__ for one in mixer.mixers}
    assert {"ResizeMix", "MaskMix", "TransMix"} < kinds
    assert (
        make_mixer(mixing(make_recipe, "mixup", mix=(), mix_prob=(), mix_alpha=()), model) is None
    )


@pytest.mark.parametrize(
    ("name", "size", "patch"),
    [("vit_micro_32", 32, 4), ("crossvit_micro_32", 32, 8), ("crossvit_micro_32", 36, 1),
     ("crossvit_9_224", 224, 16), ("resnet18", 32, 1), ("swin_tiny_patch4_window7_224", 224, 4)],
)  # fmt: skip
def test_patches_of_models(name, size, patch):
    sized = {} if name == "resnet18" else {"img_size": size}
    if name == "crossvit_9_224":
        sized = {}
    with torch.device("meta"):
        model = create_model(name, num_classes=3, **sized)
    assert patch_of(model, (size, size)) == patch


@pytest.mark.parametrize(
    ("change", "reason", "do"),
    [
        ({"model": "resnet18"}, "no class token", "--mix maskmix"),
        ({"objective": "mctf", "reduce": "mctf:r=2"}, "replaces|labels of its own", "maskmix"),
        ({"objective": "distill"}, "labels of its own", "--mix maskmix"),
        ({"task": "multilabel"}, "several", "--mix maskmix"),
        ({"model_args": {"global_pool": "avg"}}, "mean of its patches", "--mix maskmix"),
    ],
)
def test_attention_that_is_not_there_is_refused(make_recipe, change, reason, do):
    recipe = mixing(make_recipe, "mixpro", **change)
    with pytest.raises(UsageError, match=reason) as found:
        rehearse(recipe, CLASSES)
    assert do in found.value.do
    other = mixing(make_recipe, "maskmix", **change)
    assert make_mixer(other, build_model(other, len(CLASSES))) is not None


def test_the_other_mixings_stay_in_what_is_to_be_typed(make_recipe):
    recipe = mixing(make_recipe, "mixup", "transmix", "cutmix", model="resnet18")
    with pytest.raises(UsageError, match="transmix") as found:
        rehearse(recipe, CLASSES)
    assert found.value.do == "--mix mixup,cutmix"


def trained(folder, reporter=None, **settings):
    return session.train_run("stripes", folder, {**MICRO, **settings}, reporter)


def test_refused_before_a_picture_is_read(opened, monkeypatch, tmp_path):
    monkeypatch.setattr(start, "read_pictures", lambda *_: pytest.fail("pictures were read"))
    with pytest.raises(UsageError, match="no class token"):
        trained(tmp_path / "r", model="resnet18", mix="mixpro")


@pytest.mark.parametrize("model", ["vit_micro_32", "crossvit_micro_32"])
def test_an_interrupted_run_ends_with_the_same_bits(opened, monkeypatch, tmp_path, model):
    from functools import partial

    monkeypatch.setattr(session, "fit", partial(session.fit, report_seconds=0.0))
    how = {"mix": "resizemix,mixpro,transmix", "model": model, "epochs": 3}
    whole = tmp_path / "whole"
    trained(whole, **how)
    recipe = Recipe.from_dict(RunFolder(whole).read_config()["recipe"])
    assert recipe.mix == ("resizemix", "mixpro", "transmix")
    assert recipe.mix_prob == pytest.approx((0.25, 0.5, 0.25))
    with pytest.raises(Interrupted):
        trained(tmp_path / "cut", Stop(at=4, error=halt()), **how)
    session.train_run("stripes", tmp_path / "cut", {}, resume=True)
    same(RunFolder(whole), RunFolder(tmp_path / "cut"))
