"""MetaFormer: the authors' numbers, its mixers, the authors' head under timm's names."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F

import crosspatch as xp
from crosspatch.errors import UsageError
from crosspatch.metrics.macs import count_macs
from crosspatch.models.metaformer import MetaFormer, checkpoint_filter_fn
from crosspatch.models.metaformer_blocks import MIXERS, NORMS, make_mixer
from support import goldens

GOLDENS = ["poolformer_s12_96", "metaformer_id_s12_128", "metaformer_ppaa_s12_224"]


def tiny(**arguments) -> MetaFormer:
    """Four stages on 64 pixels, scales that can be seen."""
    torch.manual_seed(0)
    model = MetaFormer(
        **{
            "img_size": 64,
            "num_classes": 5,
            "depths": (1, 1, 2, 1),
            "embed_dims": (8, 16, 24, 32),
            "head_dim": 8,
            "layer_scale_init_value": 0.5,
            **arguments,
        }
    ).eval()
    for value in model.parameters():
        value.data.add_(0.1 * torch.randn_like(value))
    return model


# ---------------------------------------------------------------------- the authors' numbers


@pytest.mark.parametrize("name", GOLDENS)
def test_a_released_model_computes_what_the_authors_code_computes(name) -> None:
    golden = goldens.read(f"metaformer/{name}")
    model = MetaFormer.from_authors(**golden.meta["build"]).eval()
    xp.load_released(model, {"state_dict": golden.state_dict})
    with torch.no_grad():
        last = model.forward_intermediates(golden.images, indices=1, intermediates_only=True)[0]
        assert goldens.relative_error(last, golden.outputs["feat"]) < 1e-4
        assert goldens.relative_error(model(golden.images), golden.outputs["out"]) < 1e-4
    assert sum(p.numel() for p in model.parameters()) == golden.meta["params"]
    mine = [n for n in golden.state_dict if n.startswith("network.4.")]
    name = next(n for n in mine if n.endswith(("fc1.weight", "pos_embed")))
    xp.load_released(model, golden.state_dict | {name: -golden.state_dict[name]})
    with torch.no_grad():
        assert goldens.relative_error(model(golden.images), golden.outputs["out"]) > 1e-3


@pytest.mark.parametrize(
    ("name", "parameters", "macs"),
    [
        ("poolformer_s12", 11.92, 1.81),
        ("poolformer_s24", 21.39, 3.39),
        ("poolformer_s36", 30.86, 4.97),
        ("poolformer_m36", 56.17, 8.76),
        ("poolformer_m48", 73.47, 11.53),
        ("metaformer_id_s12", 11.92, 1.81),
        ("metaformer_pppa_s12", 14.04, 1.92),
        ("metaformer_ppaa_s12", 16.54, 2.55),
        ("metaformer_pppf_s12", 11.92, 1.82),
        ("metaformer_ppff_s12", 12.15, 1.89),
    ],
)
def test_sizes(name, parameters, macs) -> None:
    with torch.device("meta"):
        model = xp.create_model(name)
    assert type(model) is MetaFormer
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(parameters, abs=6e-3)
    assert count_macs(model, (3, 224, 224)) / 1e9 == pytest.approx(macs, abs=6e-3)


def test_work_grows_with_the_pixels() -> None:
    with torch.device("meta"):
        model = xp.create_model("poolformer_s12")
    for side, expected in ((64, 0.148), (128, 0.592), (224, 1.812)):
        assert count_macs(model, (3, side, side)) / 1e9 == pytest.approx(expected, abs=6e-4)


def test_poolformers_of_timm_are_ours_and_settings_name_what_is_there() -> None:
    for name in timm.list_models("poolformer_*"):
        with torch.device("meta"):
            model = xp.create_model(name)
        first = 1e-5 if name in ("poolformer_s12", "poolformer_s24") else 1e-6
        assert model.pretrained_cfg["first_conv"] == "stem"
        assert model.pretrained_cfg["classifier"] == "head"
        assert model.pretrained_cfg["crop_pct"] == (0.95 if "_m" in name else 0.9)
        with torch.device("cpu"):
            block = MetaFormer.from_authors(name, layers=(1,), embed_dims=(8,)).stages[0].blocks[0]
        assert block.ls1.gamma.unique().tolist() == pytest.approx([first])


def test_timms_file_has_the_authors_features_and_the_authors_head() -> None:
    torch.manual_seed(0)
    theirs = timm.create_model("poolformer_s12", num_classes=4).eval()
    for value in theirs.parameters():
        value.data.add_(0.05 * torch.randn_like(value))
    ours = xp.create_model("poolformer_s12", num_classes=4).eval()
    xp.load_released(ours, theirs.state_dict())
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        _, maps = ours.forward_intermediates(x)
        features = theirs.forward_features(x)
        torch.testing.assert_close(maps[-1], features, rtol=1e-4, atol=1e-5)
        norm, fc = theirs.head.norm, theirs.head.fc
        normed = F.group_norm(features, 1, norm.weight, norm.bias, 1e-5)
        torch.testing.assert_close(ours(x), fc(normed.mean(dim=(2, 3))), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(ours(x), theirs(x), rtol=1e-2)


# ---------------------------------------------------------------------- mixers


def test_pooling_has_no_weights_and_nothing_to_say_about_an_even_map() -> None:
    mixer = make_mixer("pooling", 8, size=(6, 5))
    assert not list(mixer.parameters())
    assert not mixer(torch.full((1, 8, 6, 5), 3.0)).any()
    x = torch.randn(1, 1, 4, 4)
    found = mixer(x)[0, 0]
    torch.testing.assert_close(found[0, 0], x[0, 0, :2, :2].mean() - x[0, 0, 0, 0])
    torch.testing.assert_close(found[2, 1], x[0, 0, 1:4, 0:3].mean() - x[0, 0, 2, 1])
    same = [sum(p.numel() for p in tiny(token_mixers=m).parameters())
            for m in ("pooling", "identity")]  # fmt: skip
    assert same[0] == same[1]


def test_attention_is_softmax_of_scaled_products_over_the_map() -> None:
    torch.manual_seed(0)
    mixer, x = make_mixer("attention", 16, size=(3, 4), head_dim=8), torch.randn(2, 16, 3, 4)
    assert mixer.qkv.bias is None
    tokens = x.flatten(2).transpose(1, 2)
    q, k, v = mixer.qkv(tokens).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
    found = ((q * 8**-0.5) @ k.transpose(-2, -1)).softmax(-1) @ v
    expected = mixer.proj(found.transpose(1, 2).flatten(2)).transpose(1, 2).unflatten(2, (3, 4))
    torch.testing.assert_close(mixer(x), expected, rtol=1e-4, atol=1e-5)


def test_matrices_over_pixels() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 2)
    mixer = make_mixer("spatial_fc", 3, size=(4, 2))
    expected = torch.einsum("nm,bcm->bcn", mixer.fc.weight, x.flatten(2)).unflatten(2, (4, 2))
    torch.testing.assert_close(mixer(x), expected)
    mixer = make_mixer("random", 3, size=(4, 2))
    assert not list(mixer.parameters())
    torch.testing.assert_close(mixer.matrix.sum(dim=1), torch.ones(8))
    torch.testing.assert_close(mixer(torch.ones_like(x)), torch.ones_like(x))
    assert (mixer.matrix.amax(dim=1) < mixer.matrix.amin(dim=1) * torch.e).all()
    weights = make_mixer("depthwise", 3, size=(4, 2)).weight
    assert weights.shape == (3, 1, 3, 3)


@pytest.mark.parametrize("mixer", MIXERS)
def test_every_mixer_learns_exports_and_keeps_its_weights(mixer) -> None:
    model, x = tiny(token_mixers=mixer), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), expected, rtol=1e-4, atol=1e-5)
    other = tiny(token_mixers=mixer)
    other.load_state_dict(model.state_dict())
    model.train()
    model(x).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    with torch.no_grad():
        assert torch.equal(other(x), expected)
        odd = torch.randn(1, 3, 71, 90)
        if mixer in ("spatial_fc", "random"):
            with pytest.raises(ValueError, match="img_size"):
                other(odd)
            fitting = tiny(token_mixers=mixer, img_size=(71, 90))
            assert fitting(odd).isfinite().all()
        else:
            assert other(odd).isfinite().all()


def test_norms_and_the_map_of_positions_follow_the_mixers() -> None:
    model = tiny(token_mixers=("pooling", "pooling", "attention", "attention"))
    kinds = {type(m).__name__ for n, m in model.named_modules() if "norm" in n.rpartition(".")[2]}
    assert "GroupNorm" not in kinds
    assert model.norm.eps == model.stages[0].blocks[0].norm1.eps == 1e-5
    names = [name for name in model.state_dict() if "pos_embed" in name]
    assert names == ["stages.2.downsample.pos.pos_embed"]
    assert model.no_weight_decay() == set(names)
    assert model.stages[2].downsample.pos.pos_embed.shape == (1, 24, 4, 4)
    whole = tiny(token_mixers="attention")
    assert whole.stages[0].downsample.pos.pos_embed.shape == (1, 8, 16, 16)
    assert not [n for n in tiny(token_mixers="attention", add_pos_emb=False).state_dict()
                if "pos_embed" in n]  # fmt: skip
    assert isinstance(tiny().norm, torch.nn.GroupNorm)
    assert tiny().norm.num_groups == 1


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("act", ["relu", "silu"])
def test_ablations_of_the_paper_can_be_built(norm, act) -> None:
    model = tiny(norm_layer=norm, act_layer=act, pool_size=5, layer_scale_init_value=None)
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 5)
    bare = tiny(norm_layer=norm, residual=False, mlp=False)
    assert bare(torch.randn(2, 3, 64, 64)).isfinite().all()
    assert not [name for name, _ in bare.named_parameters() if "mlp" in name or "ls2" in name]


def test_a_block_without_residuals_forgets_its_input() -> None:
    x = torch.full((1, 8, 6, 6), 2.0)
    kept = tiny(norm_layer="none", mlp=False).stages[0].blocks[0]
    lost = tiny(norm_layer="none", mlp=False, residual=False).stages[0].blocks[0]
    assert torch.equal(kept(x), x)
    assert not lost(x).any()


# ---------------------------------------------------------------------- layouts


def authors(model: MetaFormer) -> dict[str, torch.Tensor]:
    """The state of `model` under the authors' names."""
    places, place = {}, 0
    for number, stage in enumerate(model.stages):
        for part, _ in stage.downsample.named_children():
            places[f"stages.{number}.downsample.{part}."] = f"network.{place}."
            place += 1
        places[f"stages.{number}.blocks."] = f"network.{place}."
        places[f"stages.{number}.norm."] = f"norm{place}."
        place += 1
    state = {}
    for name, value in model.state_dict().items():
        for mine, theirs in places.items():
            if name.startswith(mine):
                rest = name.removeprefix(mine)
                middle = "proj." if ".downsample.proj." in mine else ""
                name = f"{theirs}{middle}{rest}"
        name = name.replace("ls1.gamma", "layer_scale_1").replace("ls2.gamma", "layer_scale_2")
        name = name.replace("stem.", "patch_embed.proj.")
        state[name] = value
    return state


@pytest.mark.parametrize(
    "mixers", ["pooling", "attention", ("pooling",) * 3 + ("attention",), "spatial_fc"]
)
def test_the_authors_numbering_is_read_wherever_positions_stand(mixers) -> None:
    model = tiny(token_mixers=mixers)
    other = tiny(token_mixers=mixers)
    for value in other.parameters():
        value.data.zero_()
    xp.load_released(other, {"model": authors(model)})
    assert all(torch.equal(other.state_dict()[n], v) for n, v in model.state_dict().items())
    own = checkpoint_filter_fn(model.state_dict(), model)
    assert list(own) == list(model.state_dict())


def test_positions_are_resized_where_the_picture_is_another() -> None:
    mixers = ("pooling", "pooling", "attention", "attention")
    model = tiny(token_mixers=mixers)
    other = tiny(token_mixers=mixers, img_size=(96, 64))
    xp.load_released(other, authors(model))
    x = torch.randn(1, 3, 96, 64)
    with torch.no_grad():
        torch.testing.assert_close(other(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mixers", ["pooling", ("pooling",) * 2 + ("attention",) * 2])
def test_the_form_for_dense_tasks_norms_every_map(mixers) -> None:
    model = tiny(token_mixers=mixers, fork_feat=True)
    plain = tiny(token_mixers=mixers, num_classes=0)
    state = authors(model)
    norms = sorted(name for name in state if name.startswith("norm") and "bias" in name)
    assert norms == [
        f"norm{i}.bias" for i in ((0, 2, 4, 6) if mixers == "pooling" else (0, 2, 5, 7))
    ]
    other = tiny(token_mixers=mixers, fork_feat=True)
    for value in other.parameters():
        value.data.zero_()
    detector = {f"backbone.{name}": value for name, value in state.items()}
    xp.load_released(other, {"state_dict": {**detector, "neck.weight": torch.ones(1)}})
    x = torch.randn(2, 3, 64, 80)
    same = {n: v for n, v in model.state_dict().items() if n in plain.state_dict()}
    plain.load_state_dict(same, strict=False)
    with torch.no_grad():
        last, maps = other.forward_intermediates(x)
        _, bare = plain.forward_intermediates(x)
        for stage, found, unnormed in zip(model.stages, maps, bare, strict=True):
            torch.testing.assert_close(found, stage.norm(unnormed), rtol=1e-4, atol=1e-5)
        assert torch.equal(last, maps[-1])
        assert torch.equal(model.forward_features(x), last)
    assert model.num_classes == 0
    assert model(x).shape == (2, 32)
    few = other.prune_intermediate_layers([0, 1])
    assert few == [0, 1]
    assert [m.shape[1] for m in other.forward_intermediates(x, intermediates_only=True)] == [8, 16]


def test_features_of_a_name_that_timm_has_too() -> None:
    features = xp.create_model("poolformer_s12", features_only=True, out_indices=(0, 3))
    maps = features(torch.randn(1, 3, 64, 64))
    assert [m.shape[1:] for m in maps] == [(64, 16, 16), (512, 2, 2)]
    assert features.feature_info.reduction() == [4, 32]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"token_mixers": "mixing"}, "expected one of pooling"),
        ({"token_mixers": ("pooling",)}, "token_mixers has 1 entries for 3 stages"),
        ({"norm_layer": "instance"}, "norm_layer 'instance'"),
        ({"act_layer": "tanh"}, "act_layer 'tanh'"),
        ({"embed_dims": (8, 16)}, "embed_dims has 2 entries"),
        ({"token_mixers": "attention"}, "head_dim=32"),
        ({"pool_size": 2}, "odd"),
        ({"img_size": 1, "in_pad": 0}, "img_size leaves"),
    ],
)
def test_impossible_shapes_are_refused(arguments, message) -> None:
    with pytest.raises(UsageError, match=message):
        xp.create_model("metaformer_micro_32", **arguments)
