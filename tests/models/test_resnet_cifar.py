"""ResNet for CIFAR: DeiT-LT's teachers against the authors' numbers, its shortcuts, its layouts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import crosspatch as xp
from crosspatch.errors import UsageError
from crosspatch.metrics.macs import count_macs
from support import goldens

GOLDENS = ["teacher_resnet32_cifar", "teacher_resnet32_cifar_norm", "teacher_paco_resnet32"]


def teacher(golden, **arguments):
    torch.manual_seed(0)
    use_norm = golden.meta["build"].get("use_norm", False)
    return xp.create_model("resnet32_cifar", num_classes=10, use_norm=use_norm, **arguments).eval()


@pytest.mark.parametrize("name", GOLDENS)
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_teacher_computes_what_the_authors_code_computes(name, wrapped) -> None:
    golden = goldens.read(f"deit-lt/{name}")
    model, state = teacher(golden), golden.state_dict
    if wrapped:
        state = {"state_dict": {f"module.{key}": value for key, value in state.items()}}
    xp.load_released(model, state)
    with torch.no_grad():
        found = {
            "layer3": model.forward_features(golden.images),
            "logits": model(golden.images),
        }
    for key, expected in golden.outputs.items():
        assert goldens.relative_error(found[key], expected) < 1e-4
    if "paco" not in name:
        assert sum(p.numel() for p in model.parameters()) == golden.meta["params"]


def test_a_golden_notices_a_changed_weight() -> None:
    golden = goldens.read("deit-lt/teacher_resnet32_cifar")
    model, state = teacher(golden), golden.state_dict
    state["layer2.0.conv1.weight"] = -state["layer2.0.conv1.weight"]
    xp.load_released(model, state)
    with torch.no_grad():
        assert goldens.relative_error(model(golden.images), golden.outputs["logits"]) > 1e-2


def test_a_paco_file_without_its_classifier_is_refused() -> None:
    golden = goldens.read("deit-lt/teacher_paco_resnet32")
    state = {k: v for k, v in golden.state_dict.items() if not k.startswith("linear.")}
    with pytest.raises(ValueError, match=r"missing: linear\.weight"):
        xp.load_released(teacher(golden), state)


@pytest.mark.parametrize(
    ("depth", "parameters", "macs"),
    [(20, 0.270, 40.6), (32, 0.464, 68.9), (44, 0.659, 97.2), (56, 0.853, 125.5)],
)
def test_sizes(depth, parameters, macs) -> None:
    model = xp.create_model(f"resnet{depth}_cifar", num_classes=10)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(parameters, abs=6e-4)
    assert count_macs(model, (3, 32, 32)) / 1e6 == pytest.approx(macs, abs=0.06)
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    assert len(layers) == depth


def test_a_shortcut_takes_every_other_pixel_and_pads_a_quarter_on_each_side() -> None:
    block = xp.create_model("resnet20_cifar", num_classes=2).layer2[0]
    x = torch.randn(2, 16, 5, 6)
    found = block.shortcut(x)
    assert found.shape == (2, 32, 3, 3)
    assert torch.equal(found[:, 8:24], x[:, :, ::2, ::2])
    assert not found[:, :8].any()
    assert not found[:, 24:].any()


def test_a_cosine_head_does_not_see_lengths() -> None:
    model = xp.create_model("resnet_micro_32", num_classes=4, use_norm=True).eval()
    features = torch.randn(3, 64)
    logits = model.linear(features)
    assert torch.allclose(model.linear(7 * features), logits, atol=1e-6)
    unit = F.normalize(model.linear.weight, dim=0)
    assert torch.allclose(unit.norm(dim=0), torch.ones(4))
    assert logits.abs().max() <= 1 + 1e-6
    assert torch.allclose(logits[0, 1], features[0] @ unit[:, 1] / features[0].norm())


@pytest.mark.parametrize("depth", [2, 31, 33])
def test_other_depths_are_refused(depth) -> None:
    with pytest.raises(UsageError, match="6 n"):
        xp.create_model("resnet_micro_32", depth=depth)
    with pytest.raises(ValueError, match="'avg' alone"):
        xp.create_model("resnet_micro_32").reset_classifier(3, "max")
