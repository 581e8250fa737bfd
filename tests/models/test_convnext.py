"""ConvNeXt: the authors' numbers, counts, gammas, layers of rates, stems for small pictures."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from timm.models import convnext as timms
from timm.models._manipulate import group_parameters

import crosspatch as xp
from crosspatch.errors import UsageError
from crosspatch.metrics.macs import count_macs
from crosspatch.models.convnext import ConvNeXt, ConvNeXtIsotropic, fold_gamma
from support import goldens

SIZES = {  # parameters, GMACs at 224
    "convnext_tiny": (28_589_128, 4.46),
    "convnext_small": (50_223_688, 8.68),
    "convnext_base": (88_591_464, 15.35),
    "convnext_large": (197_767_336, 34.36),
    "convnext_xlarge": (350_196_968, 60.92),
    "convnext_isotropic_small": (22_308_712, 4.29),
    "convnext_isotropic_base": (87_083_752, 16.90),
    "convnext_isotropic_large": (305_942_504, 59.70),
}
SMALL = {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32), "img_size": 32, "num_classes": 4}
FLAT = {"depth": 3, "dim": 16, "patch_size": 4, "img_size": 32, "num_classes": 4}


def answer(model, x):
    with torch.no_grad():
        return model.eval()(x)


def network(kind: str, **more):
    torch.manual_seed(0)
    return ConvNeXt(**SMALL, **more) if kind == "stages" else ConvNeXtIsotropic(**FLAT, **more)


@pytest.mark.parametrize(
    "name", ["convnext_tiny", "convnext_custom_64", "convnext_isotropic_small"]
)
def test_it_computes_what_the_authors_code_computes(name) -> None:
    golden = goldens.read(f"convnext/{name}")
    kind = ConvNeXtIsotropic if "isotropic" in name else ConvNeXt
    model = kind.from_authors(**golden.meta["build"])
    assert sum(p.numel() for p in model.parameters()) == golden.meta["params"]
    xp.load_released(model, {"model": golden.state_dict})
    found = answer(model, golden.images)
    assert goldens.relative_error(found, golden.outputs["out"]) < 1e-4
    if name != "convnext_custom_64":
        named = xp.load_released(xp.create_model(name), golden.state_dict)
        assert torch.equal(answer(named, golden.images), found)


def test_a_golden_notices_a_changed_weight() -> None:
    golden = goldens.read("convnext/convnext_custom_64")
    model, state = ConvNeXt.from_authors(**golden.meta["build"]), golden.state_dict
    state["stages.2.4.gamma"] = -state["stages.2.4.gamma"]
    xp.load_released(model, state)
    assert goldens.relative_error(answer(model, golden.images), golden.outputs["out"]) > 1e-3


@pytest.mark.parametrize("name", SIZES)
def test_sizes(name) -> None:
    parameters, giga = SIZES[name]
    with torch.device("meta"):
        model = xp.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert count_macs(model, (3, 224, 224)) / 1e9 == pytest.approx(giga, abs=0.006)


def test_cost_grows_with_pixels() -> None:
    with torch.device("meta"):
        model = xp.create_model("convnext_tiny")
    ratio = count_macs(model, (3, 448, 448)) / count_macs(model, (3, 224, 224))
    assert ratio == pytest.approx(3.9995, abs=1e-3)


@pytest.mark.parametrize("kind", ["stages", "flat"])
def test_before_training_blocks_do_next_to_nothing(kind) -> None:
    model = network(kind, ls_init_value=1e-6)
    block = model.stages[-1].blocks[0]
    x = torch.randn(2, block.gamma.shape[0], 7, 7)
    assert goldens.relative_error(answer(block, x), x) < 1e-5
    assert network(kind, ls_init_value=0).stages[-1].blocks[0].gamma is None


@pytest.mark.parametrize("kind", ["stages", "flat"])
@pytest.mark.parametrize("more", [{}, {"conv_mlp": True}])
def test_gammas_fold_exactly(kind, more) -> None:
    if kind == "flat" and more:
        return
    model = network(kind, ls_init_value=0.5, **more).double()
    for name, parameter in model.named_parameters():
        if name.endswith("gamma"):
            torch.nn.init.normal_(parameter)
    before, x = copy.deepcopy(model.state_dict()), torch.randn(2, 3, 40, 36).double()
    folded = fold_gamma(model)
    assert not any(name.endswith("gamma") for name in folded.state_dict())
    torch.testing.assert_close(answer(folded, x), answer(model, x), rtol=1e-12, atol=1e-12)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    again = network(kind, ls_init_value=None, **more).double()
    again.load_state_dict(folded.state_dict())
    assert torch.equal(answer(again, x), answer(folded, x))


def test_rates_follow_the_authors_layers() -> None:
    with torch.device("meta"):
        model = xp.create_model("convnext_small")
    layers = group_parameters(model, model.group_matcher(), reverse=True)
    expected = {
        "stem.0.weight": 0,
        "stages.0.blocks.2.gamma": 1,
        "stages.1.downsample.1.weight": 2,
        "stages.1.blocks.0.norm.bias": 2,
        "stages.2.downsample.0.weight": 3,
        "stages.3.downsample.1.bias": 12,
        "stages.3.blocks.1.mlp.fc1.weight": 12,
        "head.norm.weight": 13,
        "head.fc.bias": 13,
    } | {f"stages.2.blocks.{i}.gamma": 3 + i // 3 for i in range(27)}
    assert {name: layers[name] for name in expected} == expected
    assert set(layers.values()) == set(range(14))


def test_layers_of_a_shallow_network() -> None:
    model = network("stages")
    layers = group_parameters(model, model.group_matcher(), reverse=True)
    assert layers["stages.2.blocks.1.gamma"] == 3
    assert layers["stages.3.blocks.0.gamma"] == 4
    assert layers["head.fc.weight"] == 5


@pytest.mark.parametrize(("patch", "kernel"), [(1, 3), (2, None), (2, 3), (4, 7), (4, None)])
def test_stems_for_small_pictures(patch, kernel) -> None:
    model = network("stages", patch_size=patch, stem_kernel=kernel)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        _, maps = model.eval().forward_intermediates(x)
    for found, told in zip(maps, model.feature_info, strict=True):
        assert found.shape[2] == 32 // told["reduction"]
    assert maps[0].shape[2] == 32 // patch


def test_kernels_of_three() -> None:
    model = network("stages", kernel_sizes=3)
    assert model.stages[1].blocks[0].conv_dw.kernel_size == (3, 3)


def test_a_classifier_that_begins_small() -> None:
    for kind in ("stages", "flat"):
        one, little = network(kind), network(kind, head_init_scale=0.001)
        first, second = (m.get_classifier().weight.std().item() for m in (one, little))
        assert second / first == pytest.approx(0.001, rel=0.3)


def test_maps_with_norms_of_their_own() -> None:
    model = network("stages", stage_norms=True).eval()
    state = model.state_dict()
    theirs = {
        f"norm{i}.{k}": v
        for i, n in enumerate(model.stage_norms)
        for k, v in n.state_dict().items()
    }
    rest = {name: value for name, value in state.items() if not name.startswith("stage_norms")}
    xp.load_released(model, rest | theirs)
    with torch.no_grad():
        maps = model.forward_intermediates(torch.randn(2, 3, 64, 64), intermediates_only=True)
        nhwc = model.forward_intermediates(
            torch.randn(2, 3, 64, 64), [1], output_fmt="NHWC", intermediates_only=True
        )
    assert nhwc[0].shape == (2, 8, 8, 16)
    assert [m.shape[1] for m in maps] == [8, 16, 24, 32]
    for one in maps:
        torch.testing.assert_close(one.mean(1), torch.zeros_like(one[:, 0]), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="expected NCHW or NHWC"):
        model.forward_intermediates(torch.randn(1, 3, 64, 64), output_fmt="NLC")
    model.prune_intermediate_layers([0, 1])
    assert len(model.stage_norms) == 2


def test_weights_of_timm_load_and_timms_network_is_as_it_was() -> None:
    build = {key: SMALL[key] for key in ("depths", "dims", "num_classes")}
    other = timms.ConvNeXt(**build).eval()
    model = xp.load_released(network("stages"), other.state_dict())
    x = torch.randn(2, 3, 50, 70)
    torch.testing.assert_close(answer(model, x), answer(other, x), rtol=1e-4, atol=1e-6)
    assert type(timm.create_model("convnext_tiny", depths=(1, 1, 1, 1))) is timms.ConvNeXt


def test_impossible_shapes_are_refused() -> None:
    for arguments, words in (
        ({"patch_size": 3}, "expected one of"),
        ({"patch_size": 4, "stem_kernel": 2}, "skip pixels"),
        ({"depths": (1, 1)}, "four of each"),
        ({"img_size": 8}, "at least 16"),
    ):
        with pytest.raises(UsageError, match=words):
            xp.create_model("convnext_micro_32", **arguments)
    with pytest.raises(UsageError, match="at least 1"):
        xp.create_model("convnext_isotropic_micro_32", depth=0)
