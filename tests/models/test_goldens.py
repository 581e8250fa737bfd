"""Every public golden of CrossViT and DeiT, through the public interface, to 1e-4."""

from __future__ import annotations

import pytest
import torch

import crosspatch as xp
from crosspatch.layers.linear import switched
from crosspatch.models.crossvit import CrossViT
from support import goldens


@pytest.fixture(params=["off", "on"], autouse=True)
def products(request):
    """Large products through torch's own BLAS, and through oneDNN."""
    with switched(request.param):
        yield


NAMED = [
    "crossvit/crossvit_tiny_224",
    "crossvit/crossvit_9_224",
    "crossvit/crossvit_9_dagger_224",
    "deit/deit_tiny_patch16_224",
    "deit/deit_tiny_distilled_patch16_224",
]


@pytest.mark.parametrize("name", NAMED)
def test_a_named_variant_computes_what_the_authors_code_computes(name: str) -> None:
    golden = goldens.read(name)
    model = xp.create_model(golden.meta["variant"]).eval()
    assert sum(p.numel() for p in model.parameters()) == golden.meta["params"]
    xp.load_released(model, {"model": golden.state_dict})
    with torch.no_grad():
        assert goldens.relative_error(model(golden.images), golden.outputs["out"]) < 1e-4


def test_both_heads_of_the_distilled_deit() -> None:
    golden = goldens.read("deit/deit_tiny_distilled_patch16_224")
    model = xp.create_model("deit_tiny_distilled_patch16_224").eval()
    xp.load_released(model, golden.state_dict)
    model.set_distilled_training()
    model.train()  # neither dropout nor stochastic depth is on by default
    with torch.no_grad():
        first, second = model(golden.images)
    assert goldens.relative_error(first, golden.outputs["head"]) < 1e-4
    assert goldens.relative_error(second, golden.outputs["head_dist"]) < 1e-4


def test_the_t2t_stem_from_the_authors_own_arguments() -> None:
    golden = goldens.read("crossvit/crossvit_t2t_micro")
    model = CrossViT.from_authors(**golden.meta["build"]).eval()
    xp.load_released(model, golden.state_dict)
    with torch.no_grad():
        fine, coarse = model.forward_features(golden.images)
        assert goldens.relative_error(fine[:, 0], golden.outputs["cls0"]) < 1e-4
        assert goldens.relative_error(coarse[:, 0], golden.outputs["cls1"]) < 1e-4
        assert goldens.relative_error(model(golden.images), golden.outputs["out"]) < 1e-4


def test_a_golden_notices_a_changed_weight() -> None:
    golden = goldens.read("crossvit/crossvit_t2t_micro")
    model = CrossViT.from_authors(**golden.meta["build"]).eval()
    state = golden.state_dict
    state["blocks.1.fusion.0.attn.wq.weight"] = -state["blocks.1.fusion.0.attn.wq.weight"]
    xp.load_released(model, state)
    with torch.no_grad():
        assert goldens.relative_error(model(golden.images), golden.outputs["out"]) > 1e-4


def distilled(golden, size=(224, 224), **arguments):
    model = xp.create_model("deit_lt_tiny_distilled_patch16_224", num_classes=10, img_size=size,
                            **arguments)  # fmt: skip
    xp.load_released(model, {"model": golden.state_dict, "epoch": 3})
    model.set_distilled_training()
    return model.train()  # neither dropout nor stochastic depth is on by default


def test_the_student_of_deit_lt_and_its_two_heads() -> None:
    golden = goldens.read("deit-lt/deit_tiny_distilled_patch16_224")
    model = distilled(golden)
    assert sum(p.numel() for p in model.parameters()) == golden.meta["params"]
    with torch.no_grad():
        first, second = model(golden.images)
        mean = model.eval()(golden.images)
    for found, key in ((first, "cls"), (second, "dist"), (mean, "avg")):
        assert goldens.relative_error(found, golden.outputs[key]) < 1e-4


@pytest.mark.parametrize("size", [(96, 160), (160, 96), (256, 256)])
def test_positions_of_deit_lt_are_resized_by_a_scale_with_a_margin(size) -> None:
    """By the sheet: (h + 0.1) / 14, and the rows of the two tokens are kept."""
    golden = goldens.read("deit-lt/deit_tiny_distilled_patch16_224")
    table = golden.state_dict["pos_embed"]
    image = table[:, 2:].transpose(1, 2).unflatten(2, (14, 14))
    scale = [(side / 16 + 0.1) / 14 for side in size]
    image = torch.nn.functional.interpolate(image, scale_factor=scale, mode="bicubic")
    expected = torch.cat([table[:, :2], image.flatten(2).transpose(1, 2)], dim=1)
    fixed, moving = distilled(golden, size), distilled(golden, dynamic_img_size=True)
    assert torch.allclose(fixed.pos_embed, expected, atol=1e-6)
    x = torch.randn(1, 3, *size)
    with torch.no_grad():
        for one, other in zip(fixed(x), moving(x), strict=True):
            assert torch.allclose(one, other, atol=1e-5)
    plain = xp.create_model("deit_tiny_distilled_patch16_224", num_classes=10, img_size=size)
    xp.load_released(plain, golden.state_dict)
    assert not torch.allclose(plain.pos_embed, expected, atol=1e-3)
