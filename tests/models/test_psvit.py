"""PSViT: the sizes of its presets, its poolings, its patterns."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import crosspatch as xp
from crosspatch.metrics.macs import count_macs
from crosspatch.models.psvit import Pooling1d, Pooling2d

PRESETS = [  # millions of parameters, billions of multiply-adds; with sharing and without
    ("psvit_tiny", (32.6, 1.26), (35.1, 1.37)),
    ("psvit_small", (104.3, 3.99), (112.6, 4.30)),
]


def micro(**arguments):
    torch.manual_seed(0)
    return xp.create_model("psvit_micro_32", num_classes=5, **arguments).eval()


def images(count: int = 2, size=(32, 32)):
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("name", "shared", "plain"), PRESETS)
def test_parameters_and_macs_of_the_table(name, shared, plain) -> None:
    for share, (parameters, gmacs) in ({}, shared), ({"share": ()}, plain):
        with torch.device("meta"):
            model = xp.create_model(name, **share)
        count = sum(p.numel() for p in model.parameters())
        assert count / 1e6 == pytest.approx(parameters, abs=0.05)
        assert count_macs(model, (3, 224, 224)) / 1e9 == pytest.approx(gmacs, abs=0.006)


def test_sharing_saves_what_the_formula_says() -> None:
    """Over three widths, to the unit."""
    found = []
    for share in (), (1, 3, 5, 7, 9, 11, 14, 16):
        with torch.device("meta"):
            model = xp.create_model("psvit_tiny", share=share)
        parameters = sum(p.numel() for p in model.parameters())
        found.append((parameters, count_macs(model, (3, 224, 224))))
    parts = [(2, 196, 160), (4, 49, 320), (2, 16, 640)]  # sharing blocks, tokens, width
    weights = sum(k * (2 * c * c + 2 * c) for k, _, c in parts)
    macs = sum(k * (2 * n * c * c + n * n * c) for k, n, c in parts)
    assert [a - b for a, b in zip(*found, strict=True)] == [weights, macs]


@pytest.mark.parametrize(
    ("form", "counts"), [("2d", [196, 49, 16]), ("1d", [1 + 196, 1 + 98, 1 + 49])]
)
def test_tokens_of_every_stage(form, counts) -> None:
    with torch.device("meta"):
        model = xp.create_model("psvit_tiny", form=form).eval()
        _, found = model.run(model.embed(torch.zeros(1, 3, 224, 224)), collect=(3, 12, 16))
    assert [found[i].tokens.shape[1] for i in (3, 12, 16)] == counts
    assert [found[i].tokens.shape[2] for i in (3, 12, 16)] == [160, 320, 640]
    assert [model.blocks[i].attn.num_heads for i in (3, 12, 16)] == [5, 10, 20]
    assert (model.cls_token is None) == (form == "2d")


def test_pooling_on_the_grid() -> None:
    """conv 3x3, max pool 3x3 of stride 2, LayerNorm; odd sides are rounded up."""
    model = micro(img_size=(28, 20))  # 7 x 5 patches
    pooling = model.reductions["1"]
    with torch.no_grad():
        state = model.embed(images(size=(28, 20)))
        after = pooling(state)
        image = state.tokens.transpose(1, 2).unflatten(2, (7, 5))
        y = F.max_pool2d(pooling.conv(image), 3, 2, 1)
        expected = F.layer_norm(
            y.flatten(2).transpose(1, 2), (96,), pooling.norm.weight, pooling.norm.bias, 1e-6
        )
    assert isinstance(pooling, Pooling2d)
    assert after.grid == (4, 3)
    torch.testing.assert_close(after.tokens, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="every patch of the grid"):
        pooling(model.embed(images(size=(28, 20)), keep=torch.arange(4).expand(2, -1)))


def test_pooling_of_the_sequence() -> None:
    """conv 3, max pool 3 of stride 2; the class token has a Linear of its own."""
    model = micro(form="1d", img_size=20)  # 25 patches
    pooling = model.reductions["1"]
    with torch.no_grad():
        state = model.embed(images(size=(20, 20)))
        after = pooling(state)
        y = F.max_pool1d(pooling.conv(state.tokens[:, 1:].transpose(1, 2)), 3, 2, 1)
        expected = torch.cat([pooling.token(state.tokens[:, :1]), y.transpose(1, 2)], dim=1)
    assert isinstance(pooling, Pooling1d)
    assert after.tokens.shape == (2, 1 + 13, 96)
    torch.testing.assert_close(after.tokens, expected)


@pytest.mark.parametrize("form", ["2d", "1d"])
def test_the_residual_averages_and_fills_up_with_zeros(form) -> None:
    model = micro(form=form, residual=True)
    pooling = model.reductions["1"]
    with torch.no_grad():
        state = model.embed(images())
        with_it = pooling(state).patches
        pooling.residual = False
        added = with_it - pooling(state).patches
        patches = state.patches.transpose(1, 2)
        if form == "2d":
            mean = F.avg_pool2d(
                patches.unflatten(2, (8, 8)), 3, 2, 1, count_include_pad=False
            ).flatten(2)
        else:
            mean = F.avg_pool1d(patches, 3, 2, 1, count_include_pad=False)
    assert (added[..., 64:] == 0).all()
    torch.testing.assert_close(added[..., :64], mean.transpose(1, 2), rtol=1e-4, atol=1e-5)


def test_a_sharing_block_given_its_own_attention_is_the_ordinary_block() -> None:
    plain = micro(share=())
    shared = micro(share=(1,))
    state = plain.state_dict()
    for part in ("weight", "bias"):  # the donor attends as the sharing block did, and adds nothing
        state[f"blocks.0.attn.qkv.{part}"] = state[f"blocks.1.attn.qkv.{part}"]
        for layer in ("attn.proj", "mlp.fc2"):
            state[f"blocks.0.{layer}.{part}"] = torch.zeros_like(state[f"blocks.0.{layer}.{part}"])
    plain.load_state_dict(state)
    for part in ("weight", "bias"):
        state[f"blocks.1.attn.qkv.{part}"] = state[f"blocks.1.attn.qkv.{part}"][2 * 64 :]
    xp.load_released(shared, state)
    with torch.no_grad():
        torch.testing.assert_close(shared(images()), plain(images()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"share": (0,)}, "block 0 shares its attention"),
        ({"share": (2,)}, "block 2 shares its attention right after a pooling"),
        ({"share": (3, 4, 5), "pool": (2,)}, "block 5 is the third in a row"),
        ({"share": (), "pool": (2, 3)}, "block 3 has a pooling before it, and so has block 2"),
        ({"share": (), "pool": (0,)}, "block 0 has a pooling before it"),
        ({"share": (6,)}, "share names block 6; there are blocks 0 to 5"),
        ({"form": "3d"}, "form '3d'; expected '2d' or '1d'"),
        ({"embed_dim": 40}, "width 40 and width_factor 1.5; expected a multiple of the head's 32"),
        ({"num_heads": 3}, "num_heads is not free"),
        ({"width_factor": 0.5}, "a factor of at least 1"),
    ],
)
def test_what_cannot_be_built(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        micro(**arguments)


@pytest.mark.parametrize("arguments", [{"form": "1d"}, {"residual": True}, {"reg_tokens": 2}])
def test_every_form_trains_all_it_has(arguments) -> None:
    model = micro(**arguments, attn_drop_rate=0.1, drop_path_rate=0.1).train()
    model(images()).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert model.eval()(images()).shape == (2, 5)


def test_other_sizes_where_they_are_asked_for() -> None:
    assert micro(dynamic_img_size=True)(images(size=(40, 24))).shape == (2, 5)


def test_a_network_with_grids_of_its_own_is_not_reduced() -> None:
    with pytest.raises(xp.errors.UsageError, match="stages have grids of their own"):
        xp.reduce(micro(), "tome", r=1)
