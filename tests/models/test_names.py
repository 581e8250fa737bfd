"""What timm's own tests ask of every name, on the meta device: shapes without numbers.

A name whose settings tell the size of its last map (`pool_size`) is a backbone of maps, unless a
class token stands before its patches, which no map can carry.
"""

from __future__ import annotations

import pytest
import torch

import crosspatch as xp
from crosspatch.models import registry
from crosspatch.models.pyramid import Pyramid

xp.list_models("crossvit*")  # registers them all


def built(name: str, **asked):
    with torch.device("meta"):
        return xp.create_model(name, **asked).eval()


def pictures(side: tuple[int, ...], batch: int = 1) -> torch.Tensor:
    return torch.zeros(batch, *side, device="meta")


def gives_maps(model) -> bool:
    return bool(model.default_cfg.get("pool_size")) and model.output_fmt != "NLC"


NAMES = [
    pytest.param(name, marks=[] if "_micro_" in name else pytest.mark.long)
    for name in registry._ENTRIES
]
"""The small ones in every run, those of the papers in the long tests."""


@pytest.mark.parametrize("name", NAMES)
def test_maps_heads_and_settings_agree(name: str) -> None:
    model = built(name)
    settings, state = model.default_cfg, model.state_dict()
    images = pictures(settings["input_size"])
    with torch.no_grad():
        assert model(images).shape == (1, model.num_classes)
    if not gives_maps(model):
        assert not isinstance(model, Pyramid) or model.output_fmt == "NLC"
        return
    side = tuple(settings["pool_size"])
    with torch.no_grad():
        last = model.forward_features(images)
        rows = (1, 2) if model.output_fmt == "NHWC" else (2, 3)
        assert tuple(last.shape[axis] for axis in rows) == side
        assert last.shape[3 if rows == (1, 2) else 1] == model.num_features
        flat = model.forward_head(last, pre_logits=True)
        assert flat.shape == (1, model.head_hidden_size)
        assert model(images).shape == (1, model.num_classes)
        model.reset_classifier(0)
        assert model(images).shape == (1, model.head_hidden_size)
        model.reset_classifier(0, "")
        assert tuple(model(images).shape[axis] for axis in rows) == side
        if isinstance(model, Pyramid):
            model.reset_classifier(7, "")
            assert model(images).shape[3 if rows == (1, 2) else 1] == 7
    for key in ("first_conv", "classifier"):
        named = settings[key] if isinstance(settings[key], tuple | list) else (settings[key],)
        assert all(f"{one}.weight" in state for one in named)


@pytest.mark.parametrize("name", NAMES)
def test_maps_of_every_stage_are_as_promised(name: str) -> None:
    if not gives_maps(built(name)):
        return
    with torch.device("meta"):
        features = xp.create_model(name, features_only=True)
    size = built(name).default_cfg["input_size"]
    with torch.no_grad():
        maps = features(pictures(size))
    assert [one.shape[1] for one in maps] == features.feature_info.channels()
    for found, stride in zip(maps, features.feature_info.reduction(), strict=True):
        assert tuple(found.shape[2:]) == tuple(-(-side // stride) for side in size[1:])
