"""What each head of a distilled network says by itself."""

from __future__ import annotations

import pytest
import torch

import crosspatch as xp
from crosspatch.tasks.classify import Classify
from crosspatch.training.heads import EachHead, head_figures

SMALL = {"num_classes": 3, "img_size": 8, "depth": 1, "embed_dim": 16}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return xp.create_model("deit_micro_distilled_32", **SMALL).eval()


def test_the_mean_of_both_heads_is_what_the_model_says(model):
    x = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        first, second = EachHead(model, model.head_dist)(x).chunk(2, dim=1)
        assert torch.allclose((first + second) / 2, model(x), atol=1e-6)
        assert not torch.allclose(first, second, atol=1e-3)


def test_a_head_that_knows_a_class_is_told_from_one_that_does_not(model, images, make_recipe):
    labels = images.labels.numpy()
    with torch.no_grad():
        for head, named in ((model.head, 0), (model.head_dist, 2)):
            head.weight.zero_()
            head.bias.copy_(torch.eye(3)[named])
    task = Classify(images.classes)
    whole = {"accuracy": 0.5, "low": 0.4, "high": 0.6}
    recipe = make_recipe(class_counts=(1000, 10, 1))
    found = {one["name"]: one for one in head_figures(model, images, recipe, task, whole)}
    for name, kind in (("class", 0), ("distillation", 2)):
        assert found[name]["accuracy"] == pytest.approx((labels == kind).mean())
    shares = {name: [g["accuracy"] for g in found[name]["groups"]] for name in list(found)[:2]}
    assert shares == {"class": [1, 0, 0], "distillation": [0, 0, 1]}
    assert found["mean"] == {"name": "mean", **whole}


def test_a_model_of_one_head_has_nothing_to_say(images, make_recipe):
    plain = xp.create_model("vit_micro_32", **SMALL)
    assert head_figures(plain, images, make_recipe(), Classify(images.classes), {}) == []
