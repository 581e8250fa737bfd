"""DuoFormer: the authors' numbers, its counts, regions and scale tokens, what is ours."""

from __future__ import annotations

import pytest
import timm
import torch

import crosspatch as xp
from crosspatch.errors import UsageError
from crosspatch.metrics.macs import count_macs, counted
from crosspatch.models.duoformer import DuoFormer
from crosspatch.models.duoformer_parts import regions
from support import goldens

GOLDENS = ["duoformer_r18_s4_random", "duoformer_r50_s3_random"]


def micro(**arguments) -> DuoFormer:
    torch.manual_seed(0)
    published = {"scale_token": "random", "global_pool": "token", "embed_dim": 48, "depth": 2}
    return xp.create_model("duoformer_micro_32", num_classes=3, **published | arguments).eval()


# ---------------------------------------------------------------------- the authors' numbers


@pytest.mark.parametrize("name", GOLDENS)
def test_it_computes_what_the_authors_code_computes(name) -> None:
    golden = goldens.read(f"duoformer/{name}")
    model = DuoFormer.from_authors(**golden.meta["build"]).eval()
    assert sum(p.numel() for p in model.parameters()) == golden.meta["params"]
    xp.load_released(model, {"state_dict": golden.state_dict})
    with torch.no_grad():
        tokens = model.tokens(model.maps(golden.images))
        first = model.scale_attention(tokens)
        found = {"tokens": tokens[:, ::8, :, ::4], "region": first, "out": model(golden.images)}
    for key, expected in golden.outputs.items():
        assert goldens.relative_error(found[key], expected) < 1e-4


def test_a_named_variant_computes_it_without_the_unused_norm() -> None:
    golden = goldens.read("duoformer/duoformer_r18_s4_random")
    shape = {"embed_dim": 96, "depth": 2, "num_heads": 3, "num_classes": 10}
    model = xp.create_model("duoformer_r18_s4_random", **shape).eval()
    state = golden.state_dict
    xp.load_released(model, state)
    with torch.no_grad():
        assert goldens.relative_error(model(golden.images), golden.outputs["out"]) < 1e-4
        state["vision_transformer.pos_embed_for_scale"] *= -1
        xp.load_released(model, state)
        assert goldens.relative_error(model(golden.images), golden.outputs["out"]) > 1e-3


def test_the_unused_norm_changes_nothing_and_the_used_one_does() -> None:
    x = torch.randn(2, 3, 32, 32)
    for kind, same in (("unused", True), ("used", False)):
        model = micro(fc_norm=kind)
        with torch.no_grad():
            before = model(x)
            model.fc_norm.weight.mul_(-3)
            assert torch.equal(before, model(x)) == same


def test_the_authors_arguments() -> None:
    build = {"embed_dim": 32, "depth": 1, "num_heads": 2, "backbone": "small", "num_layers": 2}
    model = DuoFormer.from_authors(**build, num_classes=4)
    trained = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert not trained & {"stem", "stages"}
    assert model.scales == 2
    assert model.patch_blocks[0].norm is None
    with pytest.raises(ValueError, match="proj_dim 48"):
        DuoFormer.from_authors(**build, proj_dim=48)


# ---------------------------------------------------------------------- counts


@pytest.mark.parametrize(
    ("name", "millions", "gmacs"),
    [
        ("r18_s2_random", 125.22, 28.34), ("r18_s2_channel", 148.01, 29.51),
        ("r18_s3_random", 125.33, 95.41), ("r18_s3_channel", 148.13, 96.58),
        ("r18_s4_random", 125.43, 368.16), ("r18_s4_channel", 148.22, 369.33),
        ("r50_s2_random", 139.32, 30.78), ("r50_s2_channel", 185.34, 33.90),
        ("r50_s3_random", 139.7, 98.1), ("r50_s3_channel", 185.7, 101.2),
        ("r50_s4_random", 139.98, 371.3), ("r50_s4_channel", 185.99, 374.42),
    ],
)  # fmt: skip
def test_sizes(name, millions, gmacs) -> None:
    with torch.device("meta"):
        model = xp.create_model(f"duoformer_{name}", num_classes=10)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)
    assert count_macs(model, (3, 224, 224)) / 1e9 == pytest.approx(gmacs, abs=0.05)
    bag = {"s2": 6, "s3": 22, "s4": 86}[name.split("_")[1]]
    assert model.pos_embed_for_scale.shape == (1, 1, bag, 768)
    assert model.pos_embed.shape == (1, 50, 768)


# ---------------------------------------------------------------------- regions and scale tokens


@pytest.mark.parametrize("k", [1, 2, 4, 8])
def test_the_cells_of_a_region(k) -> None:
    h, w = 3, 5
    rows, columns = torch.arange(h * k), torch.arange(w * k)
    x = torch.stack(torch.meshgrid(rows, columns, indexing="ij"))[None].float()
    found = regions(x, (h, w))
    assert found.shape == (1, h * w, k * k, 2)
    place = [(r, c) for r in range(k) for c in range(k)]
    if k == 2:
        place = [(0, 0), (1, 0), (0, 1), (1, 1)]
    expected = torch.tensor([[2 * k + r, 3 * k + c] for r, c in place]).float()
    assert torch.equal(found[0, 2 * w + 3], expected)


def test_scale_attention_stays_inside_a_region() -> None:
    model = micro(scales=4)
    maps = [torch.randn(1, c, s, s) for c, s in ((16, 32), (24, 16), (32, 8), (48, 4))]
    other = [x.clone() for x in maps]
    for x in other:  # region (1, 2) of the 4x4 grid, in every map
        k = x.shape[2] // 4
        x[:, :, k : 2 * k, 2 * k : 3 * k] += 1
    with torch.no_grad():
        a, b = (model.scale_attention(model.tokens(m)) for m in (maps, other))
    changed = (a - b).abs().amax(dim=(0, 2)) > 0
    assert changed.nonzero().flatten().tolist() == [6]


def test_attention_inside_regions_has_fewer_scores() -> None:
    with torch.device("meta"):
        model = DuoFormer(backbone="small", img_size=56, embed_dim=48, depth=1, num_heads=3)
        attention = model.scale_blocks[0].attn
        scores = [
            counted(attention, torch.zeros(rows, tokens, 48))[0] - 49 * 22 * 4 * 48**2
            for rows, tokens in ((49, 22), (1, 49 * 22))
        ]
    assert scores[1] == 49 * scores[0]


def test_the_channel_token_reads_all_maps_whatever_the_scales() -> None:
    model = micro(scale_token="channel", scales=2)
    maps = [torch.randn(2, c, s, s) for c, s in ((16, 32), (24, 16), (32, 8), (48, 4))]
    with torch.no_grad():
        before = model.tokens(maps)
        assert before.shape == (2, 16, 6, 48)
        for x in maps[:2]:
            x[:] = -3 * x
            after = model.tokens(maps)
            assert not torch.allclose(after[:, :, 0], before[:, :, 0])
            assert torch.equal(after[:, :, 1:], before[:, :, 1:])
            before = after


def test_a_channel_token_loads_from_the_authors_names() -> None:
    model = micro(scale_token="channel", fc_norm="unused", patch_residual=False)
    theirs = {}
    for name, value in model.state_dict().items():
        part = name.split(".")
        if name.startswith("scale_token.shrink"):
            leaf = f"conv{int(part[3]) + 1}.{part[4]}"
            if leaf.endswith("bias"):
                continue
            name = f"chann_proj{int(part[2]) + 1}.{leaf}"
        elif name.startswith("scale_token.fuse"):
            name = name.replace("scale_token.fuse", "chann_proj_all.nConvs")
        theirs[name] = value.clone()
    other = micro(scale_token="channel", fc_norm="unused", patch_residual=False)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1)
    xp.load_released(other, theirs)
    assert not other.scale_token.shrink[0][1].bias.any()
    for shrink in model.scale_token.shrink:
        for conv in shrink:
            torch.nn.init.zeros_(conv.bias)
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(other(x), model(x))


# ---------------------------------------------------------------------- sizes, trunk, features


def test_positions_fit_another_size_as_they_do_on_the_way() -> None:
    model, wide = micro(), micro(img_size=(40, 56))
    xp.load_released(wide, model.state_dict())
    x = torch.randn(1, 3, 40, 56)
    with torch.no_grad():
        torch.testing.assert_close(model(x), wide(x))
        padded = x[:, :, :37]
        exact = torch.nn.functional.pad(padded, (0, 0, 0, 3))
        torch.testing.assert_close(wide(padded), wide(exact))


def test_a_plain_resnet_is_the_trunk() -> None:
    resnet = timm.create_model("resnet18", num_classes=5).eval()
    shape = {"embed_dim": 24, "depth": 1, "num_heads": 2, "num_classes": 2}
    model = xp.create_model("duoformer_r18_s2_random", **shape).eval()
    model.load_backbone(resnet.state_dict())
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model.maps(x)[-1], resnet.forward_features(x))


def test_features_and_what_they_leave() -> None:
    model, x = micro(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        final, maps = model.forward_intermediates(x)
    assert [m.shape[2] for m in maps] == [32, 16, 8, 4, 4]
    assert torch.equal(maps[-1].flatten(2), final[:, 1:].transpose(1, 2))
    assert model.prune_intermediate_layers([0, 1]) == [0, 1]
    assert len(model.stages) == 2
    assert not [n for n, _ in model.named_parameters() if not n.startswith(("stem", "stages"))]
    found = model.forward_intermediates(x, [0, 1], intermediates_only=True)
    torch.testing.assert_close(found[1], maps[1])


def test_a_variant_as_published_learns_with_every_parameter() -> None:
    model = micro(patch_residual=False, fc_norm="none").train()
    model(torch.randn(2, 3, 32, 32)).square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("pool", ["avg", ""])
def test_other_pooling(pool) -> None:
    model = micro()
    model.reset_classifier(0, pool)
    with torch.no_grad():
        found = model(torch.randn(2, 3, 32, 32))
    assert found.shape == ((2, 48) if pool else (2, 17, 48))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"scales": 5}, "2, 3 or 4"),
        ({"backbone": "r34"}, "r18, r50"),
        ({"scale_token": "mean"}, "random or channel"),
        ({"fc_norm": "yes"}, "unused"),
        ({"global_pool": "max"}, "token, avg"),
        ({"num_heads": 5}, "5 heads"),
    ],
)
def test_what_there_is_not_is_refused(arguments, words) -> None:
    with pytest.raises(UsageError, match=words):
        xp.create_model("duoformer_micro_32", **arguments)
