"""SpectFormer: the authors' numbers, its counts, what the gate, the reading and MixToken do."""

from __future__ import annotations

import pytest
import torch

import crosspatch as xp
from crosspatch.errors import UsageError
from crosspatch.layers.box import Box
from crosspatch.metrics.macs import count_macs
from crosspatch.models import spectformer
from crosspatch.models.spectformer import (
    HierarchicalSpectFormer,
    SpectFormer,
    checkpoint_filter_fn,
)
from crosspatch.models.spectformer_blocks import SpectralGate
from support import goldens

MICROS = ("spectformer_micro_32", "spectformer_h_micro_32")


def gate(dim: int = 6, size=(8, 8)) -> SpectralGate:
    torch.manual_seed(0)
    made = SpectralGate(dim, size).eval()
    made.complex_weight.data.normal_()
    return made


def small(name: str, **changes):
    """With no weight at a value that would hide a mistake."""
    torch.manual_seed(0)
    model = xp.create_model(name, **{"num_classes": 5, **changes}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def of_authors(model: HierarchicalSpectFormer) -> dict[str, torch.Tensor]:
    """The state of a hierarchical model under the authors' names."""
    state = {}
    for name, value in model.state_dict().items():
        parts = name.split(".")
        if parts[0] == "stem":
            name = name.replace("stem", "patch_embed1")
        elif parts[0] == "norm_head":
            name = name.replace("norm_head", f"norm{len(model.stages)}")
        elif parts[0] == "stages":
            kind = {"downsample": "patch_embed", "blocks": "block", "norm": "norm"}[parts[2]]
            name = ".".join([f"{kind}{int(parts[1]) + 1}", *parts[3:]])
        name = name.replace(".dwconv.", ".dwconv.dwconv.")
        if ".qkv." in name:
            third = len(value) // 3
            state[name.replace("qkv", "q")] = value[:third]
            state[name.replace("qkv", "kv")] = value[third:]
        else:
            state[name] = value
    return state


# ---------------------------------------------------------------------- the authors' numbers


@pytest.mark.parametrize("name", ["spectformer_vanilla_micro_128", "spectformer_h_s_224_nodense"])
def test_it_computes_what_the_authors_code_computes(name) -> None:
    golden = goldens.read(f"spectformer/{name}")
    model = SpectFormer.from_authors(**golden.meta["build"]).eval()
    assert sum(p.numel() for p in model.parameters()) == golden.meta["params"]
    state = golden.state_dict
    xp.load_released(model, {"model": state})
    with torch.no_grad():
        features = model.forward_features(golden.images)
        logits = model.forward_head(features)
    assert goldens.relative_error(logits, golden.outputs["out"]) < 1e-4
    if "tokens" in golden.outputs:
        assert goldens.relative_error(features.flatten(1, 2), golden.outputs["tokens"]) < 1e-4
    changed = next(key for key in state if key.endswith("complex_weight"))
    xp.load_released(model, state | {changed: -state[changed]})
    with torch.no_grad():
        assert goldens.relative_error(model(golden.images), golden.outputs["out"]) > 1e-3


@pytest.mark.parametrize(
    ("name", "parameters", "gmacs"),
    [
        ("vanilla_t", 9.16, 1.84),  # the authors say 1.8
        ("vanilla_xs", 20.03, 3.99),
        ("vanilla_s", 32.45, 6.63),
        ("vanilla_b", 57.16, 11.56),  # the authors say 11.5
        ("h_s", 22.23, 4.07),
        ("h_b", 33.05, 6.61),
        ("h_l", 54.68, 13.2),
    ],
)
def test_sizes(name, parameters, gmacs) -> None:
    with torch.device("meta"):
        model = xp.create_model(f"spectformer_{name}")
    found = sum(p.numel() for p in model.parameters()) / 1e6
    assert found == pytest.approx(parameters, abs=5.1e-3)
    assert count_macs(model, (3, 224, 224)) / 1e9 == pytest.approx(gmacs, rel=2e-3)


def test_parameters_without_the_auxiliary_head() -> None:
    for size, parameters in (("s", 21.78), ("b", 32.54), ("l", 54.16)):
        with torch.device("meta"):
            model = xp.create_model(f"spectformer_h_{size}", aux_head=False)
        found = sum(p.numel() for p in model.parameters()) / 1e6
        assert found == pytest.approx(parameters, abs=5.1e-3)


@pytest.mark.parametrize("name", MICROS)
def test_the_small_ones_are_comparable(name) -> None:
    with torch.device("meta"):
        model = xp.create_model(name, num_classes=10)
    assert 10.8e6 < count_macs(model, (3, 32, 32)) < 13.1e6


# ---------------------------------------------------------------------- the gate


def test_a_gate_of_ones_changes_nothing() -> None:
    made, x = gate(), torch.randn(2, 8, 7, 6)
    with torch.no_grad():
        made.complex_weight[..., 0], made.complex_weight[..., 1] = 1.0, 0.0
        assert (made(x) - x).abs().max() < 1e-6 * x.abs().max()
        assert (made(x[:, :5]) - x[:, :5]).abs().max() < 1e-6 * x.abs().max()  # interpolated


def test_a_gate_commutes_with_cyclic_shifts() -> None:
    made, x = gate(size=(8, 6)), torch.randn(2, 8, 6, 6)
    with torch.no_grad():
        moved = made(x.roll((3, 2), dims=(1, 2)))
        expected = made(x).roll((3, 2), dims=(1, 2))
    assert goldens.relative_error(moved, expected) < 1e-6


def test_spectral_blocks_move_with_the_picture() -> None:
    model = small("spectformer_micro_32", img_size=48, depth=2, alpha=2)
    model.pos_embed.data.zero_()
    x = torch.randn(1, 3, 48, 48)
    with torch.no_grad():
        moved = model.forward_features(x.roll((8, 20), dims=(2, 3)))
        expected = model.forward_features(x).roll((2, 5), dims=(1, 2))
    assert goldens.relative_error(moved, expected) < 1e-5


@pytest.mark.parametrize("size", [(8, 8), (7, 5), (6, 9), (1, 3)])
def test_the_compiled_gate_is_the_same_without_complex_numbers(size) -> None:
    made, x = gate(size=(8, 8)), torch.randn(2, *size, 6)
    program = torch.export.export(made, (x,))
    assert "fft" not in str(program.graph)
    assert "complex" not in str(program.graph).replace("complex_weight", "")
    with torch.no_grad():
        assert goldens.relative_error(program.module()(x), made(x)) < 1e-6


def test_a_gate_learns_the_same_either_way() -> None:
    made, x = gate(), torch.randn(2, 8, 8, 6, requires_grad=True)
    found = {}
    for name, call in (("plain", made), ("compiled", torch.compile(made, backend="eager"))):
        (call(x) ** 2).mean().backward()
        found[name] = (x.grad, made.complex_weight.grad)
        x.grad = made.complex_weight.grad = None
    torch.compiler.reset()
    for one, other in zip(*found.values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


def test_a_gate_is_computed_in_full_precision() -> None:
    made, x = gate(), torch.randn(2, 8, 8, 6)
    with torch.no_grad():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(made(x), made(x).float())
            under = made(x)
        assert torch.equal(under, made(x))
        half = made.to(torch.bfloat16)(x.bfloat16())
    assert half.dtype == torch.bfloat16


def test_a_gate_has_two_parameters_for_each_frequency_and_channel() -> None:
    with torch.device("meta"):
        model = xp.create_model("spectformer_h_s", img_size=(256, 192))
    found = [tuple(m.complex_weight.shape) for m in model.modules() if isinstance(m, SpectralGate)]
    assert found == [(64, 25, 64, 2)] * 3 + [(32, 13, 128, 2)] * 4


# ---------------------------------------------------------------------- families


@pytest.mark.parametrize("alpha", [0, 2, 4])
def test_alpha_is_the_number_of_spectral_blocks(alpha) -> None:
    model = xp.create_model("spectformer_micro_32", alpha=alpha)
    assert [type(b).__name__ == "SpectralBlock" for b in model.blocks] == [
        n < alpha for n in range(4)
    ]
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 1000)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_any_number_of_first_stages_may_be_spectral(count) -> None:
    model = xp.create_model("spectformer_h_micro_32", spectral_stages=count)
    gates = [isinstance(stage.blocks[0].attn, SpectralGate) for stage in model.stages]
    assert gates == [n < count for n in range(3)]
    assert model(torch.randn(1, 3, 32, 32)).isfinite().all()


def test_the_answer_is_that_of_the_class_and_of_the_best_place() -> None:
    model, x = small("spectformer_h_micro_32"), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        dense = model.forward_dense(x)
        assert dense.patches.shape == (2, 16, 5)
        assert dense.box is None
        expected = dense.cls + 0.5 * dense.patches.amax(dim=1)
        torch.testing.assert_close(model(x), expected)
        torch.testing.assert_close(model.train()(x).shape, expected.shape)
    assert len(model.get_classifier()) == 2
    without = small("spectformer_h_micro_32", aux_head=False)
    assert isinstance(without.get_classifier(), torch.nn.Linear)
    with pytest.raises(ValueError, match="aux_head=True"):
        without.forward_dense(x)


def test_mixed_tokens_are_exchanged_and_their_logits_come_back() -> None:
    model, x = small("spectformer_h_micro_32"), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        whole = model.forward_dense(x, Box(0, 4, 0, 4, 0.0))
        plain = model.forward_dense(x)
        torch.testing.assert_close(whole.cls, plain.cls.flip(0))
        torch.testing.assert_close(whole.patches, plain.patches)
        box = Box(1, 3, 0, 2, 0.75)
        part = model.forward_dense(x, box)
        same = model.forward_dense(x[:1].expand(2, -1, -1, -1), box)
    assert part.box == box
    assert not torch.allclose(part.cls, plain.cls, atol=1e-3)
    torch.testing.assert_close(same.cls[:1], plain.cls[:1], rtol=1e-4, atol=1e-5)


def test_class_attention_leaves_the_other_tokens() -> None:
    model = small("spectformer_h_micro_32")
    x = torch.randn(2, 4, 4, 88)
    with torch.no_grad():
        tokens = model.read(x)
        torch.testing.assert_close(tokens[:, 1:], model.norm_head(x.flatten(1, 2)))


def test_without_class_attention_the_map_is_pooled() -> None:
    model = small("spectformer_h_micro_32", global_pool="avg")
    assert model.aux_head is None
    assert not [name for name, _ in model.named_parameters() if name.startswith("post_network")]
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    xp.load_released(model, of_authors(small("spectformer_h_micro_32")))
    with pytest.raises(ValueError, match="class attention"):
        model.reset_classifier(3, "token")
    model = small("spectformer_h_micro_32")
    model.reset_classifier(0, "")
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 4, 4, 88)
    model.prune_intermediate_layers([0])
    assert len(model.post_network) == 0


# ---------------------------------------------------------------------- layouts and sizes


def test_the_authors_layout_of_the_hierarchical_family() -> None:
    model = small("spectformer_h_micro_32")
    state = of_authors(model)
    other = xp.create_model("spectformer_h_micro_32", num_classes=5).eval()
    xp.load_released(other, {"state_dict": state})
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(x), other(x))
    del state["block3.1.attn.kv.weight"]
    with pytest.raises(ValueError, match=r"missing: stages\.2\.blocks\.1\.attn\.qkv\.weight"):
        xp.load_released(other, state)


@pytest.mark.parametrize("name", MICROS)
def test_filters_and_positions_fit_another_size_as_they_do_on_the_way(name) -> None:
    model = small(name)
    wide = small(name, img_size=(40, 50))
    flat = name == MICROS[0]
    xp.load_released(wide, model.state_dict() if flat else of_authors(model))
    x = torch.randn(1, 3, 40, 50)
    with torch.no_grad():
        torch.testing.assert_close(model(x), wide(x), rtol=1e-4, atol=1e-5)
    own = checkpoint_filter_fn(wide.state_dict(), wide)
    assert all(torch.equal(own[name], value) for name, value in wide.state_dict().items())


def test_the_authors_arguments() -> None:
    with torch.device("meta"):
        made = SpectFormer.from_authors(
            embed_dims=[16, 32], depths=[1, 1], num_heads=[1, 2], mlp_ratios=[4, 4],
            stem_hidden_dim=8, sr_ratios=[4, 2], num_stages=2, token_label=True, drop_rate=0.1,
        )  # fmt: skip
        assert isinstance(made, HierarchicalSpectFormer)
        assert made.stages[0].blocks[0].mlp.drop.p == 0.1
        assert made.drop_rate == 0
        large = SpectFormer.from_authors(fn="spectformer_l", token_label=False)
        assert sum(p.numel() for p in large.parameters()) / 1e6 == pytest.approx(54.16, abs=5e-3)
        with pytest.raises(ValueError, match="spectformer_b"):
            SpectFormer.from_authors(fn="spectformer_xl")
    assert set(spectformer.VANILLA) | set(spectformer.HIERARCHICAL) <= set(
        xp.list_models("spectformer*")
    )


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("spectformer_micro_32", {"alpha": 5}, "alpha 5"),
        ("spectformer_micro_32", {"num_heads": 3}, "divide by 3 heads"),
        ("spectformer_micro_32", {"global_pool": "token"}, "global_pool"),
        ("spectformer_h_micro_32", {"depths": (1, 1)}, "2 stages"),
        ("spectformer_h_micro_32", {"num_heads": (1, 2, 3)}, "divide by 3 heads"),
        ("spectformer_h_micro_32", {"spectral_stages": 4}, "spectral_stages 4"),
        ("spectformer_h_micro_32", {"patch_size": 8}, "patch_size 8"),
        ("spectformer_h_micro_32", {"global_pool": "mean"}, "'mean'"),
    ],
)
def test_impossible_shapes_are_refused(name, arguments, words) -> None:
    with pytest.raises(UsageError, match=words):
        xp.create_model(name, **arguments)
