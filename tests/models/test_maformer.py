"""MAFormer, a reconstruction: its counts, what each stream sees, token layers of any size."""

from __future__ import annotations

import pytest
import torch

import crosspatch as xp
from crosspatch.errors import UsageError
from crosspatch.metrics.macs import count_macs, counted
from crosspatch.models.maformer import MAFormer, checkpoint_filter_fn
from crosspatch.models.maformer_blocks import (
    Fusion,
    Gld,
    MafBlock,
    PlainBlock,
    Spec,
    coarse,
    resize_fc,
    shrunk,
)


def spec(**changes) -> Spec:
    given = {
        "window": 4, "ratio": 0.5, "gld": "fc", "branches": "both", "mlp_ratio": 2.0,
        "qkv_bias": True, "attn_drop": 0.0, "proj_drop": 0.0,
    }  # fmt: skip
    return Spec(**{**given, **changes})


def block(size=(8, 8), **changes) -> MafBlock:
    torch.manual_seed(0)
    made = MafBlock(16, 2, spec(**changes), size, 0.0).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return made


def gld(size=(8, 6), ratio: float = 0.5, kind: str = "fc") -> Gld:
    torch.manual_seed(0)
    made = Gld(5, size, ratio, kind).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_()
    return made


# ---------------------------------------------------------------------- counts


@pytest.mark.parametrize(
    ("name", "parameters", "gmacs"),
    [("s", 29.35, 5.56), ("b", 55.80, 11.41), ("l", 109.32, 20.56)],
)
def test_sizes(name, parameters, gmacs) -> None:
    with torch.device("meta"):
        model = xp.create_model(f"maformer_{name}")
    found = sum(p.numel() for p in model.parameters()) / 1e6
    assert found == pytest.approx(parameters, abs=6e-3)
    assert count_macs(model, (3, 224, 224)) / 1e9 == pytest.approx(gmacs, abs=6e-3)
    first, dim = model.stages[0].blocks[0].gld, model.feature_info[0]["num_chs"]
    layer = 3136 * 1568 + 1568
    assert sum(p.numel() for p in first.fc.parameters()) == layer
    assert layer + first.pos.numel() == layer + 1568 * dim


def test_the_preset_for_small_pictures() -> None:
    model = xp.create_model("maformer_micro_32", num_classes=10)
    assert 10.8e6 < count_macs(model, (3, 32, 32)) < 13.1e6
    kinds = [[type(one) for one in stage.blocks] for stage in model.stages]
    assert kinds == [[MafBlock], [MafBlock], [PlainBlock] * 2]


@pytest.mark.parametrize("ratio", [0.25, 0.5, 1.0])
def test_the_parameters_of_a_token_layer_and_the_scores_of_the_fusion(ratio) -> None:
    made = Gld(12, (8, 8), ratio, "fc")
    fine, few = 64, int(64 * ratio)
    assert sum(p.numel() for p in made.fc.parameters()) == fine * few + few
    assert made.pos.numel() == few * 12
    with torch.device("meta"):
        fuse = Fusion(12, 2, spec())
        given = torch.zeros(1, fine, 12), torch.zeros(1, few, 12)
    linear = 2 * fine * 12 * 12 + few * 12 * 24
    assert counted(fuse, *given)[0] - linear == 2 * fine * few * 12  # q k^T and the sum of values


# ---------------------------------------------------------------------- structure


@torch.no_grad()
def test_a_block_is_global_and_its_local_stream_is_not() -> None:
    made, x = block(), torch.randn(1, 8, 8, 16)
    other = x.clone()
    other[:, 5, 2, 3] += 1  # not along all channels, which norms remove
    far = (made(x) - made(other)).abs().amax(dim=(0, 3)) > 0
    near = (made.local(x) - made.local(other)).abs().amax(dim=(0, 3)) > 0
    assert far.all()
    assert near.sum() == 16
    assert near[4:, :4].all()
    alone = block(branches="local")
    assert ((alone(x) - alone(other)).abs().amax(dim=(0, 3)) > 0).sum() == 16


@torch.no_grad()
def test_a_block_by_hand() -> None:
    made, x = block(), torch.randn(2, 8, 8, 16)
    local, maps = made.local, made.gld
    fine = x + local.attn(local.norm1(x))
    fine = (fine + local.mlp(local.norm2(fine))).flatten(1, 2)
    tokens = maps.norm(x).flatten(1, 2)
    few = maps.fc.weight @ tokens + maps.fc.bias[:, None] + maps.pos
    k, v = (few @ made.fuse.kv.weight.T + made.fuse.kv.bias).chunk(2, dim=2)
    q = made.fuse.q(made.fuse.norm(fine))
    heads = []
    for at in (slice(0, 8), slice(8, 16)):
        weights = (q[..., at] @ k[..., at].transpose(1, 2) / 8**0.5).softmax(2)
        heads.append(weights @ v[..., at])
    expected = fine + made.fuse.proj(torch.cat(heads, dim=2))
    torch.testing.assert_close(made(x).flatten(1, 2), expected, rtol=1e-4, atol=1e-4)


def test_streams_can_be_left_out() -> None:
    whole, near, far = (
        xp.create_model("maformer_micro_32", branches=one, num_classes=2)
        for one in ("both", "local", "global")
    )
    names = {name for name, _ in whole.named_parameters()}
    without = names - {name for name, _ in near.named_parameters()}
    assert without == {n for n in names if ".gld." in n or ".fuse." in n}
    without = names - {name for name, _ in far.named_parameters()}
    assert without == {n for n in names if ".local.attn." in n or ".local.norm1." in n}
    assert {n for n in names if n.endswith(".pos")} <= whole.no_weight_decay()
    for model in (near, far):
        assert model(torch.randn(2, 3, 32, 32)).shape == (2, 2)


# ---------------------------------------------------------------------- sizes


def test_grids() -> None:
    assert coarse((56, 56), 0.5) == (28, 56)
    assert coarse((3, 5), 0.1) == (1, 5)
    assert [shrunk((224, 225), stride) for stride in (4, 2, 1)] == [
        (56, 56),
        (112, 113),
        (224, 225),
    ]


@pytest.mark.parametrize("size", [(8, 6), (12, 9), (5, 7), (16, 6)])
@torch.no_grad()
def test_a_token_layer_on_another_size_is_as_if_its_weight_were_resized(size) -> None:
    made, x = gld(), torch.randn(2, *size, 5)
    other = gld(size)
    old, new = (made.size, made.coarse), (other.size, other.coarse)
    weight = resize_fc(made.fc.weight, old, new)
    assert weight.shape == other.fc.weight.shape
    small = weight @ made.norm(x).flatten(1, 2)
    bias = torch.nn.functional.interpolate(
        made.fc.bias.view(1, 1, *made.coarse), other.coarse, mode="bilinear"
    )
    pos = torch.nn.functional.interpolate(
        made.pos.transpose(1, 2).unflatten(2, made.coarse), other.coarse, mode="bilinear"
    )
    expected = small + bias.view(1, -1, 1) + pos.flatten(2).transpose(1, 2)
    torch.testing.assert_close(made(x), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_constant_map_has_the_same_summary_at_any_size() -> None:
    made = gld()
    with torch.no_grad():
        made.pos.zero_()
        made.fc.weight.fill_(0.1)
        made.fc.bias.zero_()
    token = torch.randn(5)
    near, far = made(token.expand(1, 8, 6, 5)), made(token.expand(1, 13, 11, 5))
    torch.testing.assert_close(near[0, 0], far[0, -1], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_pooled_tokens_are_means_of_rows() -> None:
    made, x = gld((8, 6), 0.5, "pool"), torch.randn(2, 8, 6, 5)
    normed = made.norm(x)
    expected = (normed[:, ::2] + normed[:, 1::2]) / 2
    torch.testing.assert_close(made(x), expected.flatten(1, 2) + made.pos)
    with torch.device("meta"):
        large = xp.create_model("maformer_s", img_size=384, gld="pool")
    assert sum(p.numel() for p in large.parameters()) < 30e6


@pytest.mark.parametrize("gld", ["fc", "pool"])
@torch.no_grad()
def test_weights_of_another_size_answer_as_they_do_on_the_way(gld) -> None:
    torch.manual_seed(0)
    arguments = {"num_classes": 3, "gld": gld}
    model = xp.create_model("maformer_micro_32", **arguments).eval()
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    wide = xp.create_model("maformer_micro_32", img_size=(40, 48), **arguments).eval()
    xp.load_released(wide, {"model": model.state_dict()})
    x = torch.randn(2, 3, 40, 48)
    torch.testing.assert_close(wide(x), model(x), rtol=1e-3, atol=1e-4)
    own = checkpoint_filter_fn(wide.state_dict(), wide)
    assert all(torch.equal(own[name], value) for name, value in wide.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_heads": (5, 4, 8)}, "divide by 5 heads"),
        ({"num_heads": (2, 4, 7)}, "divide by 7 heads"),
        ({"depths": (1, 1)}, "one a stage"),
        ({"gld_ratio": 0.0}, "gld_ratio 0.0"),
        ({"gld": "mean"}, "gld 'mean'"),
        ({"branches": "none"}, "branches 'none'"),
        ({"img_size": 3, "patch_size": 8}, "img_size"),
        ({"global_pool": "token"}, "global_pool"),
    ],
)
def test_impossible_shapes_are_refused(arguments, words) -> None:
    with pytest.raises(UsageError, match=words):
        xp.create_model("maformer_micro_32", **arguments)


def test_it_is_a_network_of_maps() -> None:
    with torch.device("meta"):
        model = xp.create_model("maformer_s")
    assert isinstance(model, MAFormer)
    assert [info["reduction"] for info in model.feature_info] == [4, 8, 16, 32]
    assert model.pretrained_cfg["pool_size"] == (7, 7)
