"""A classifier at every place of its map: what kinds of networks give one, and what it means."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import crosspatch as xp
from crosspatch.errors import UsageError
from crosspatch.models.class_map import class_map, map_size

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def model(name: str, **arguments) -> nn.Module:
    torch.manual_seed(0)
    made = xp.create_model(name, num_classes=7, **arguments).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return made


@pytest.mark.parametrize("name", ["resnet10t", "swin_tiny_patch4_window7_224"])
def test_the_mean_of_a_linear_head_behind_an_average_is_the_network_s_answer(name):
    size = {"img_size": 64} if "swin" in name else {}
    made = model(name, **size)
    pictures = torch.nn.functional.interpolate(IMAGES, (64, 64))
    with torch.no_grad():
        found = class_map(made, pictures)
        torch.testing.assert_close(found.mean((2, 3)), made(pictures), atol=1e-4, rtol=1e-4)
    assert found.shape == (2, 7, 2, 2)
    assert found.std((2, 3)).min() > 0


@pytest.mark.parametrize("name", ["convnext_atto", "mobilenetv3_small_050"])
def test_other_heads_are_asked_at_each_place(name):
    made = model(name)
    with torch.no_grad():
        found = class_map(made, torch.nn.functional.interpolate(IMAGES, (64, 64)))
        single = class_map(made, IMAGES)
        torch.testing.assert_close(single[:, :, 0, 0], made(IMAGES), atol=1e-4, rtol=1e-4)
    assert (found.shape, single.shape) == ((2, 7, 2, 2), (2, 7, 1, 1))


@pytest.mark.parametrize("arguments", [{}, {"dist_token": True}, {"global_pool": "avg"}])
def test_a_vit_s_head_reads_every_patch(arguments):
    made = model("vit_micro_32", **arguments)
    with torch.no_grad():
        found = class_map(made, IMAGES)
        tokens = made.norm(made.run(made.embed(IMAGES))[0].patches)[:, 11]
        own = made.head(made.fc_norm(tokens))
        if made.head_dist is not None:
            own = (own + made.head_dist(tokens)) / 2
        torch.testing.assert_close(found[:, :, 1, 3], own)
        if made.global_pool == "avg":  # behind the norm the head is no longer linear
            assert not torch.allclose(found.mean((2, 3)), made(IMAGES))
    assert found.shape == (2, 7, 8, 8)


def test_lvvit_and_crossvit():
    made = model("lvvit_micro_32")
    with torch.no_grad():
        expected = made.forward_dense(IMAGES).patches.transpose(1, 2).unflatten(2, (8, 8))
        assert torch.equal(class_map(made, IMAGES), expected)
        cross = model("crossvit_micro_32")
        fine = cross.run(cross.embed(IMAGES))[0][0]
        expected = cross.head[0](cross.norm[0](fine.patches))[:, 9]
        torch.testing.assert_close(class_map(cross, IMAGES)[:, :, 1, 1], expected)


def test_what_has_no_map_is_refused_with_the_reason():
    reduced, _ = xp.reduce(model("vit_micro_32"), "tome", r=2)
    for wrong, why in ((reduced, "tokens are reduced"), (nn.Flatten(), "no map"),
                       (model("xcit_nano_12_p16_224", img_size=32), "no map")):  # fmt: skip
        with pytest.raises(UsageError, match=why) as found:
            class_map(wrong, IMAGES)
        assert "--teacher" in found.value.do
    with pytest.raises(UsageError, match="does not take pictures of 24x24"):
        map_size(model("vit_micro_32"), (24, 24))
    assert map_size(model("resnet10t"), (96, 64)) == (3, 2)
