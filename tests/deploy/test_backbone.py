"""Weights that belong to no run: what they are taken for, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import crosspatch as xp
from crosspatch.data.augment import normalise
from crosspatch.deploy.backbone import backbone
from crosspatch.deploy.embedding import of_model
from crosspatch.errors import DataError, UsageError
from crosspatch.training.probe import features_of
from support.hub import empty_cache, refuse_network
from support.runs import write_run

MODEL = "vit_micro_32"


@pytest.fixture
def file(tmp_path):
    torch.manual_seed(3)
    model = xp.create_model(MODEL, num_classes=7).eval()
    save_file(model.state_dict(), tmp_path / "it's.safetensors")
    return tmp_path / "it's.safetensors", model


def test_a_file_gives_the_features_of_its_network_whatever_its_head(file):
    path, model = file
    found = backbone(str(path), MODEL)
    picture = np.random.default_rng(0).integers(0, 256, (40, 36, 3), np.uint8)
    embedder = of_model(found.trained, "it")
    pixels = torch.tensor(embedder.predictor.pixels(picture)[None])
    with torch.no_grad():
        wanted = features_of(model, normalise(pixels, found.trained.preprocess))
    np.testing.assert_allclose(embedder.embed([picture]), wanted, rtol=1e-4, atol=1e-5)
    assert found.trained.preprocess.size == (32, 32)
    assert found.flags.endswith(f"it'\"'\"'s.safetensors' --model {MODEL}")


def test_the_control_has_other_weights_and_leaves_draws_alone(file):
    found, state = backbone(str(file[0]), MODEL), torch.get_rng_state()
    control = found.untrained()
    again = found.untrained().module.state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in control.module.state_dict().items():
        assert torch.equal(value, again[name])
    name = "blocks.0.attn.qkv.weight"
    assert not torch.equal(again[name], found.trained.module.state_dict()[name])


def test_a_released_name_is_taken_from_the_cache_and_never_fetched(tmp_path, monkeypatch):
    refuse_network(monkeypatch)
    put = empty_cache(monkeypatch, tmp_path / "hub")
    name = "deit_tiny_patch16_224"
    with pytest.raises(UsageError, match="not on this machine") as refused:
        backbone(name)
    assert "hf download timm/deit_tiny_patch16_224" in refused.value.do
    torch.manual_seed(4)
    theirs = xp.create_model(name)
    put(name, theirs.state_dict())
    found = backbone(name)
    assert (found.model, found.trained.preprocess.size) == (name, (224, 224))
    state = found.trained.module.state_dict()
    assert torch.equal(state["blocks.3.mlp.fc1.weight"], theirs.blocks[3].mlp.fc1.weight)
    with pytest.raises(UsageError, match=f"is of {name}, and --model says {MODEL}"):
        backbone(name, MODEL)


def test_what_is_refused(file, tmp_path):
    path = str(file[0])
    with pytest.raises(UsageError, match="without --model"):
        backbone(path)
    with pytest.raises(UsageError, match="vit_mikro_32"):
        backbone(path, "vit_mikro_32")
    with pytest.raises(DataError, match="do not fit"):
        backbone(path, "swin_micro_32")
    write_run(tmp_path / "run")
    with pytest.raises(UsageError, match="is a run") as refused:
        backbone(str(tmp_path / "run"))
    assert refused.value.do == f"--run {tmp_path / 'run'}"
    (tmp_path / "old.pth").write_bytes(b"\x80\x02]q\x00.")
    with pytest.raises(DataError, match="pickle"):
        backbone(str(tmp_path / "old.pth"), MODEL)
    with pytest.raises(DataError, match="does not exist"):
        backbone(str(tmp_path / "none.safetensors"), MODEL)
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(file[0].read_bytes()[:5000])
    with pytest.raises(DataError, match="torn"):
        backbone(str(torn), MODEL)
