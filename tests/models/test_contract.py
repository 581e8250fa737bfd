"""Registering is being tested: one small model of every family runs timm's whole contract."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import safetensors.torch
import timm
import torch
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from timm.utils import ModelEmaV3

import crosspatch as xp
from crosspatch.models import registry

MICRO = {
    "crossvit_micro_32": {},
    "crossvit_9_dagger_224": {"depth": ((1, 1, 0),) * 2, "embed_dim": (32, 64), "img_size": 64},
    "deit_tiny_patch16_224": {"depth": 2, "img_size": 32},
    "deit_tiny_distilled_patch16_224": {"depth": 2, "img_size": 32},
    "lvvit_micro_32": {"depth": 2},
    "evo_levit_micro_32": {},
    "stvit_r_micro_32": {"depths": (1, 6, 1)},
    "psvit_micro_32": {},
    "resnet_micro_32": {},
    "resformer_micro_32": {},
}
xp.list_models("crossvit*")  # registers them all
MICRO |= {name: {} for name in registry._ENTRIES if "_micro_" in name and name not in MICRO}

ONE_SIZE = "its positions are those of one grid; it is built anew for another size"
EXCEPTIONS = {
    (name, "sizes"): ONE_SIZE
    for name in (
        "deit_micro_distilled_32", "deit_tiny_distilled_patch16_224", "deit_tiny_patch16_224",
        "evo_levit_micro_32", "lvvit_micro_32", "psvit_micro_32", "vit_micro_32",
    )
}  # fmt: skip
UNDIVIDED = "padding breaks the law of circular shifts: sides are multiples of the network's unit"
EXCEPTIONS |= {
    (name, "sizes"): UNDIVIDED
    for name in ("polyswin_micro_32", "polytwins_micro_32", "polyvit_micro_32")
}
"""(model, check) -> why the model does not pass it. Checks: sizes, channels, fullgraph; two a model
at most."""


QUICK = ("vit_micro_32", "crossvit_micro_32", "swin_micro_32", "cct_micro_32")
"""One of each kind; the others are exported in the long tests."""


@pytest.fixture(params=MICRO)
def model(request):
    torch.manual_seed(0)
    return xp.create_model(request.param, num_classes=6, **MICRO[request.param])


def images(model, batch: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, *model.img_size, generator=generator)


def test_forward_is_head_of_features(model) -> None:
    model.eval()
    with torch.no_grad():
        features = model.forward_features(images(model))
        whole = model(images(model))
        torch.testing.assert_close(model.forward_head(features), whole, rtol=1e-5, atol=1e-6)
        flat = model.forward_head(features, pre_logits=True)
    assert flat.shape == (2, model.num_features)


def test_reset_classifier_and_no_classifier(model) -> None:
    model.eval()
    model.reset_classifier(11)
    assert model(images(model)).shape == (2, 11)
    assert model.num_classes == 11
    if "CrossViT" in type(model).__name__:
        assert [head.out_features for head in model.get_classifier()] == [11, 11]
        model.reset_classifier(0)
        assert model(images(model)).shape == (2, model.num_features)


def test_decay_and_layer_groups_cover_every_parameter(model) -> None:
    names = {name for name, _ in model.named_parameters()}
    assert model.no_weight_decay() <= names
    for groups in (
        param_groups_weight_decay(model, no_weight_decay_list=model.no_weight_decay()),
        param_groups_layer_decay(model, no_weight_decay_list=model.no_weight_decay()),
    ):
        assert sum(len(group["params"]) for group in groups) == len(names)


def test_gradient_checkpointing_gives_the_same_gradients(model) -> None:
    other = copy.deepcopy(model)
    other.set_grad_checkpointing(True)
    for m in (model, other):
        m.train()
        torch.manual_seed(0)
        m(images(m)).square().mean().backward()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-6)


def test_features_are_maps_of_the_promised_widths(request, model) -> None:
    name = request.node.callspec.params["model"]
    net = timm.create_model if not name.startswith("deit") else xp.create_model
    features = net(name, features_only=True, **MICRO[name], out_indices=(0, 1))
    maps = features(images(model))
    assert [m.shape[1] for m in maps] == features.feature_info.channels()
    for found, stride in zip(maps, features.feature_info.reduction(), strict=True):
        assert found.shape[2] == pytest.approx(images(model).shape[2] / stride)


def test_compiles_into_one_graph(request, model) -> None:
    if (request.node.callspec.params["model"], "fullgraph") in EXCEPTIONS:
        with pytest.raises(torch._dynamo.exc.Unsupported):
            torch.compile(model.eval(), fullgraph=True, backend="eager")(images(model))
        return
    model.eval()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.allclose(compiled(images(model)), model(images(model)), atol=1e-5)
    torch.compiler.reset()


@pytest.mark.parametrize(
    "model",
    [pytest.param(one, marks=[] if one in QUICK else pytest.mark.long) for one in MICRO],
    indirect=True,
)
def test_exports_with_a_dynamic_batch(model) -> None:
    model.eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (images(model, 3),), dynamic_shapes=({0: batch},))
    with torch.no_grad():
        for count in (1, 2, 7):
            x = images(model, count)
            assert torch.allclose(program.module()(x), model(x), atol=1e-5)


def test_bf16_autocast_and_an_average_copy(model) -> None:
    model.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(images(model)).float().square().mean()
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    average = ModelEmaV3(model, decay=0.5)
    average.update(model)


def test_every_parameter_learns_and_a_batch_of_one_is_its_row(model) -> None:
    model.train()
    out = model(images(model))
    torch.cat(out if isinstance(out, tuple) else (out,)).square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    model.eval()
    with torch.no_grad():
        x = images(model, 3)
        torch.testing.assert_close(model(x[1:2]), model(x)[1:2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 4])
def test_other_channels_and_no_classes(request, model, channels) -> None:
    name = request.node.callspec.params["model"]
    asked = {**MICRO[name], "in_chans": channels, "num_classes": 0}
    if (name, "channels") in EXCEPTIONS:
        with pytest.raises(ValueError, match="in_chans"):
            xp.create_model(name, **asked)
        return
    other = xp.create_model(name, **asked).eval()
    with torch.no_grad():
        out = other(torch.randn(2, channels, *other.img_size))
    assert out.shape == (2, other.num_features)
    assert out.isfinite().all()


def test_odd_and_oblong_sizes(request, model) -> None:
    name, (height, width) = request.node.callspec.params["model"], model.img_size
    size = (height + 5, width + 13)
    made = xp.create_model(name, num_classes=6, **{**MICRO[name], "img_size": size}).eval()
    with torch.no_grad():
        assert made(torch.randn(1, 3, *made.img_size)).isfinite().all()
    for model_size in (size, (height - 3, width + 8)):
        x = torch.randn(1, 3, *model_size)
        if (name, "sizes") in EXCEPTIONS:
            with pytest.raises(ValueError, match="img_size"):
                model.eval()(x)
            continue
        with torch.no_grad():
            assert model.eval()(x).isfinite().all()


def test_intermediates_are_those_of_the_whole_pass(model) -> None:
    model.eval()
    count = len(model.feature_info)
    with torch.no_grad():
        last, maps = model.forward_intermediates(images(model))
        few = model.forward_intermediates(
            images(model), indices=[0], stop_early=True, intermediates_only=True
        )
        whole = model.forward_features(images(model))
    assert len(few) == 1
    torch.testing.assert_close(few[0], maps[0])
    assert len(maps) == count
    for found, told in zip(maps, model.feature_info, strict=True):
        assert found.shape[:2] == (2, told["num_chs"])
    torch.testing.assert_close(last, whole)


def test_weights_come_back_from_a_file(request, model, tmp_path) -> None:
    name = request.node.callspec.params["model"]
    safetensors.torch.save_model(model.eval(), str(tmp_path / "w.safetensors"))
    other = xp.create_model(name, num_classes=6, **MICRO[name]).eval()
    safetensors.torch.load_model(other, str(tmp_path / "w.safetensors"))
    with torch.no_grad():
        assert torch.equal(other(images(model)), model(images(model)))


def test_no_model_is_an_exception_more_than_twice() -> None:
    names = [name for name, _ in EXCEPTIONS]
    assert all(names.count(name) <= 2 for name in names)
    assert set(names) <= set(MICRO)


def test_timms_entry_points_are_unchanged() -> None:
    """Names that timm has stay timm's after our models are imported."""
    script = (
        "import crosspatch._torchvision, timm\n"
        "from timm.models import _registry as r\n"
        "before = dict(r._model_entrypoints)\n"
        "import crosspatch.models\n"
        "after = r._model_entrypoints\n"
        "assert all(after[name] is entry for name, entry in before.items())\n"
        "added = sorted(set(after) - set(before))\n"
        "assert 'crossvit_15_dagger_384' in added and 'crossvit_micro_32' in added, added\n"
        "assert all(after[name].__module__.startswith('crosspatch.') for name in added)\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True, timeout=120)


def test_every_entry_of_ours_is_found_by_name() -> None:
    names = xp.list_models("*")
    assert set(registry._ENTRIES) <= set(names)
    assert xp.list_models("crossvit_9_dagger_224") == ["crossvit_9_dagger_224"]
    assert "resnet18" in names


def test_an_unknown_name_answers_with_near_ones() -> None:
    with pytest.raises(ValueError, match="crossvit_9_dagger_224") as caught:
        xp.create_model("crossvit_9_daggr_224")
    assert caught.value.exit_code == 2


def test_convolutional_networks_of_timm_take_a_size_too() -> None:
    model = xp.create_model("resnet18", num_classes=3, img_size=64)
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 3)


def test_refused_arguments_are_a_usage_error() -> None:
    with pytest.raises(ValueError, match="cannot be built so") as caught:
        xp.create_model("crossvit_9_224", num_heds=3)
    assert caught.value.exit_code == 2


def test_load_released_names_everything_that_is_wrong_and_changes_nothing() -> None:
    model = xp.create_model("crossvit_micro_32", num_classes=3)
    before = copy.deepcopy(model.state_dict())
    state = model.state_dict() | {"extra.weight": torch.zeros(2)}
    del state["norm.0.weight"]
    state["head.1.bias"] = torch.zeros(5)
    state["norm.1.bias"] = torch.full((96,), torch.nan)
    with pytest.raises(ValueError, match=r"missing: norm\.0\.weight") as caught:
        xp.load_released(model, state)
    text = str(caught.value)
    assert "unexpected: extra.weight" in text
    assert "head.1.bias is (5,), the model's is (3,)" in text
    assert "not finite: norm.1.bias" in text
    assert caught.value.exit_code == 3
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
