"""Evo-ViT: goldens, a plain reference of its own, the middle of a stage, the authors' models."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import crosspatch as xp
from crosspatch.errors import DataError
from crosspatch.layers.linear import switched
from crosspatch.layers.stage import StageSpec
from crosspatch.metrics.macs import count_macs
from crosspatch.models.vit import VisionTransformer
from crosspatch.tokens.evovit import VARIANTS, EvoDeiT, EvoViT
from crosspatch.tokens.host import attach, hosts_of
from support import goldens
from support.reductions import pictures, tiny_crossvit, tiny_host

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 6, "num_heads": 3}


def reduced(host=(), **options):
    """As `xp.reduce` makes it, without the count of multiply-adds, which takes longer."""
    model = tiny_host(**dict(host))
    attach(model, [EvoViT(hosts_of(model)[0], **options)])
    return model


# ------------------------------------------------------------------ goldens and figures


@pytest.mark.parametrize("product", ["off", "on"])
@pytest.mark.parametrize("kind", ["layer", "stage"])
def test_the_authors_numbers(kind, product):
    golden = goldens.read(f"evovit/evo_deit_tiny_patch16_224_{kind}")
    stagewise = golden.meta["build"]["stage_wise_prune"]
    model = xp.create_model("evo_deit_tiny_patch16_224", stagewise=stagewise).eval()
    assert sum(p.numel() for p in model.parameters()) == golden.meta["params"]
    xp.load_released(model, {"model": golden.state_dict})
    with torch.no_grad(), switched(product):
        assert goldens.relative_error(model(golden.images), golden.outputs["out"]) < 1e-4
        other = model.run(model.embed(golden.images), reducer=model.reducer.layerwise())[0]
        logits = model.classify(model.pool(other))
    same = goldens.relative_error(logits, golden.outputs["out"])
    assert same > 1e-4 if stagewise else same < 1e-4


@pytest.mark.parametrize(
    ("size", "parameters", "full", "evolved"),
    [("tiny", 5.72, 1.25, 0.82), ("small", 22.05, 4.60, 3.03), ("base", 86.57, 17.56, 11.66)],
)
def test_parameters_and_multiply_adds(size, parameters, full, evolved):
    with torch.device("meta"):
        name = f"evo_deit_{size}_patch16_224"
        model = xp.create_model(name, second_head=False)
        plain = xp.create_model(name, second_head=False, keep=1)
        layers = xp.create_model(name, second_head=False, stagewise=False)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(parameters, abs=0.005)
    macs = [count_macs(m, (3, 224, 224)) / 1e9 for m in (plain, model, layers)]
    assert macs == pytest.approx([full, evolved, evolved], abs=0.005)
    assert model.reducer.counts == (197,) * 5 + (99,) * 3 + (197,) + (99,) * 3 + (197,)
    assert layers.reducer.counts == (197,) * 13


def test_every_patch_kept_is_deit_with_mean_pooling():
    model = EvoDeiT(**TINY, num_classes=5, keep=1).eval()
    deit = VisionTransformer(**TINY, num_classes=5, global_pool="avg").eval()
    deit.load_state_dict({n: v for n, v in model.state_dict().items() if "reducer" not in n})
    with torch.no_grad():
        assert torch.equal(model(pictures()), deit(pictures()))
    assert not any(model.reducer.active(block) for block in range(6))


# ------------------------------------------------------------------ against a plain reference


def reference(model, images, ratios, weights, marks, *, fast, normalise):
    """One picture at a time, every map in full, as the paper says it."""
    outputs = []
    for tokens in model.embed(images).tokens:
        x, scores, at = tokens, None, torch.arange(len(tokens) - 1)
        dropped = start = None
        for block, module in enumerate(model.blocks):
            last = block + 1 == len(ratios) or block + 1 in marks
            if ratios[block] < 1 and block in marks:
                rank = sorted(range(len(scores)), key=lambda j: -scores[j].item())
                count = int(len(scores) * ratios[block])
                at, dropped = torch.tensor(rank[:count]), torch.tensor(rank[count:])
                start, whole = None, x
                x = torch.cat([whole[:1], whole[1:][at]])
                if fast == "representative":
                    share = scores[dropped] / scores[dropped].sum()
                    start = (share[:, None] * whole[1:][dropped]).sum(0, keepdim=True)
                    x = torch.cat([x, start])
            q, k = module.attn.qk(module.norm1(x)[None])
            row = module.attn.map(q, k)[0, :, 0].sum(0)[1 : 1 + len(at)]
            if normalise and scores is not None:
                row = row * (len(x) - 1) / len(scores)
            scores = torch.zeros(len(tokens) - 1) if scores is None else scores.clone()
            t = 1.0 if block == 0 else weights[block]
            scores[at] = (1 - t) * scores[at] + t * row
            x = module(x[None])[0]
            if ratios[block] < 1 and last:
                patches = whole[1:].clone()
                if start is not None:
                    patches[dropped] = patches[dropped] + x[-1] - start[0]
                patches[at] = x[1 : 1 + len(at)]
                x, at = torch.cat([x[:1], patches]), torch.arange(len(tokens) - 1)
        outputs.append(x)
    return torch.stack(outputs)


@pytest.mark.parametrize("fast", ["copy", "representative"])
@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize(
    ("options", "ratios", "weights", "marks"),
    [
        ({}, [1, 1, 0.5, 0.5, 0.5, 0.5], [1, 1, 0.5, 0.5, 0.5, 0.5], (2, 4)),
        ({"stagewise": False}, [1, 1] + [0.5] * 4, [1, 1] + [0.5] * 4, range(6)),
        ({"starts": 3, "keep": 0.4}, [1] * 3 + [0.4] * 3, [1] * 3 + [0.5] * 3, (3,)),
        (
            {"keep": [1, 0.8, 0.8, 1, 0.3, 0.6], "tradeoff": [0.3, 0.4, 0.2, 0, 1, 0.7]},
            [1, 0.8, 0.8, 1, 0.3, 0.6],
            [0.3, 0.4, 0.2, 0, 1, 0.7],
            range(1, 6),
        ),
    ],
)
def test_it_computes_what_the_paper_says(fast, normalise, options, ratios, weights, marks):
    if "tradeoff" in options:
        options = {**options, "starts": [1, 2, 3, 4, 5]}
    model = reduced(**options, fast=fast, normalise=normalise)
    with torch.no_grad():
        wanted = reference(
            model, pictures(), ratios, weights, marks, fast=fast, normalise=normalise
        )
        got = model.run(model.embed(pictures()))[0].tokens
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
        logits = model.classify(model.norm(wanted)[:, 0])
        torch.testing.assert_close(model(pictures()), logits, rtol=1e-4, atol=1e-4)


def test_normalised_scores_select_other_patches():
    plain, weighed = reduced(), reduced(normalise=True)
    with torch.no_grad():
        assert not torch.equal(plain(pictures()), weighed(pictures()))


# ------------------------------------------------------------------ laws of its own


OPTIONS = st.fixed_dictionaries(
    {
        "keep": st.floats(0.07, 0.99),
        "starts": st.sets(st.integers(1, 5), min_size=1).map(sorted),
        "stagewise": st.booleans(),
        "fast": st.sampled_from(["copy", "representative"]),
        "normalise": st.booleans(),
        "tradeoff": st.floats(0, 1),
    }
)


@settings(max_examples=15, deadline=None)
@given(options=OPTIONS, seed=st.integers(0, 9))
def test_any_schedule_keeps_its_counts_and_ends_with_the_full_grid(options, seed):
    model = reduced({"global_pool": "avg"}, **options)
    with torch.no_grad():
        state, collected = model.run(model.embed(pictures(2, seed=seed)), collect=range(6))
    shapes = [state.tokens.shape[1] for _, state in sorted(collected.items())]
    assert (17, *shapes) == model.reducer.counts
    assert state.tokens.shape == (2, 17, 24)
    assert state.source is None
    assert state.tokens.isfinite().all()


@settings(max_examples=10, deadline=None)
@given(options=OPTIONS, seed=st.integers(0, 9))
def test_shuffled_patches_change_nothing(options, seed):
    model = reduced({"global_pool": "avg"}, **options)
    index = torch.randperm(16, generator=torch.Generator().manual_seed(seed)) + 1
    index = torch.cat([torch.arange(1), index])
    with torch.no_grad():
        state = model.embed(pictures(2))
        final = model.run(state)[0].tokens
        shuffled = model.run(state._replace(tokens=state.tokens[:, index]))[0].tokens
    torch.testing.assert_close(shuffled, final[:, index], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("host", [{}, {"reg_tokens": 3}, {"dist_token": True}])
def test_the_middle_of_a_stage(host):
    """What does not run is bit-identical to what it was, named by nobody, and scored no more."""
    model = reduced(host, keep=0.3)
    n = model.num_prefix_tokens
    with torch.no_grad():
        _, after = model.run(model.embed(pictures()), collect=range(6))
    before, inside, ended = after[1], after[2], after[3]
    assert inside.tokens.shape[1] == n + 4
    kept = inside.source >= 0
    assert (kept.sum(dim=1) == 4).all()
    for picture in range(3):
        rest = ~kept[picture]
        old, new = before.patches[picture], ended.patches[picture]
        assert torch.equal(inside.carry.whole[picture], before.tokens[picture])
        assert torch.equal(new[rest], old[rest])
        assert not torch.equal(new[~rest], old[~rest])
        was, scores = (s.carry.scores[picture, n:] for s in (before, ended))
        assert torch.equal(scores[rest], was[rest])
        least, most = was[~rest].min(), was[rest].max()
        assert least >= most
        where = inside.source[picture][kept[picture]]
        assert sorted(where.tolist()) == list(range(n, n + 4))
        values = torch.gather(was, 0, kept[picture].nonzero()[:, 0])
        assert (values.sort(descending=True).indices == (where - n).argsort()).all()
    assert ended.source is None
    assert ended.carry.whole is None


def test_the_representative_gives_all_the_others_the_same():
    model = reduced(fast="representative")
    with torch.no_grad():
        _, after = model.run(model.embed(pictures()), collect=range(6))
    change = after[3].patches - after[1].patches
    for picture, source in enumerate(after[2].source):
        rest = change[picture][source < 0]
        torch.testing.assert_close(rest, rest[:1].expand_as(rest), rtol=1e-4, atol=1e-5)
        assert rest.abs().max() > 1e-3
    assert model.reducer.counts == (17, 17, 17, 10, 17, 10, 17)


def test_scores_carry_a_gradient_to_the_representative():
    model = reduced(fast="representative")
    state = model.embed(pictures())
    carry = type(model.run(state)[0].carry)(torch.rand(3, 17, requires_grad=True))
    begun = model.reducer.before_attention(state._replace(carry=carry), 2)
    assert torch.autograd.grad(begun.tokens[:, -1].sum(), carry.scores)[0].abs().max() > 0


def test_patches_that_nobody_attends_to_have_a_mean_too():
    model = reduced(fast="representative")
    state = model.embed(pictures())
    carry = type(model.run(state)[0].carry)(torch.zeros(3, 17))
    begun = model.reducer.before_attention(state._replace(carry=carry), 2)
    torch.testing.assert_close(begun.tokens[:, -1], state.tokens[:, 9:].mean(dim=1))
    assert begun.source is not None
    assert (begun.source[:, :8] == torch.arange(1, 9)).all()  # of equal scores the first stay


def test_a_class_token_that_is_read_alone_is_computed_alone():
    for options in ({}, {"starts": 5}, {"fast": "representative"}, {"stagewise": False}):
        model = reduced(**options)
        with torch.no_grad():
            short, _ = model.run(model.embed(pictures()), pooled=True)
            whole, _ = model.run(model.embed(pictures()))
            torch.testing.assert_close(model.pool(short), model.pool(whole), rtol=1e-4, atol=1e-5)
        alone = 5 not in model.reducer.stages.begins
        assert short.tokens.shape[1] == (1 if alone else 17)


def test_patches_left_out_at_the_beginning():
    """Masked pre-training goes on with a subset: half of that is kept."""
    model = reduced()
    keep = torch.stack([torch.randperm(16)[:10] for _ in range(3)])
    with torch.no_grad():
        state = model.embed(pictures(), keep)
        final, after = model.run(state, collect=range(6))
    assert [s.tokens.shape[1] for _, s in sorted(after.items())] == [11, 11, 6, 11, 6, 11]
    assert torch.equal(final.full_source, state.full_source)
    assert ((after[2].full_source >= 0).sum(dim=1) == 5).all()


def test_a_network_cut_in_the_middle_of_a_stage_is_whole_at_its_end():
    model = reduced()
    model.prune_intermediate_layers([2], prune_head=False)
    with torch.no_grad():
        assert model.forward_features(pictures()).shape == (3, 17, 24)


# ------------------------------------------------------------------ hosts and schedules


def test_stages_end_with_the_encoders_of_a_crossvit():
    fine, coarse = (EvoViT(host) for host in hosts_of(tiny_crossvit()))
    assert (fine.stages.begins, fine.stages.ends) == ({1: 0.5}, {1})
    assert (coarse.stages.begins, coarse.stages.ends) == ({2: 0.5}, {3})
    early = EvoViT(hosts_of(tiny_crossvit())[1], starts=1)
    assert (early.stages.begins, early.stages.ends) == ({1: 0.5, 2: 0.5}, {1, 3})
    with torch.device("meta"):
        small = xp.create_model("crossvit_small_224")
    coarse = EvoViT(hosts_of(small)[1])
    assert (coarse.stages.begins, coarse.stages.ends) == ({4: 0.5, 8: 0.5}, {7, 11})


def test_no_patch_is_missing_where_branches_meet():
    model = tiny_crossvit()
    attach(model, [EvoViT(host) for host in hosts_of(model)])
    encoders, seen = model.blocks, []
    for encoder in encoders:
        encoder.fuse = lambda states, f=encoder.fuse: (seen.append(states), f(states))[1]
    with torch.no_grad():
        model(pictures())
    assert [[s.tokens.shape[1] for s in states] for states in seen] == [[65, 17]] * 2


def test_stages_of_several_widths():
    one = tiny_host().stages[0].blocks
    stages = (StageSpec(24, one[:3]), StageSpec(48, one[3:]))
    model = reduced({"stages": stages}, starts=2)
    assert model.reducer.stages.ends == {2, 5}
    with torch.no_grad():
        assert model(pictures()).shape == (3, 5)


def test_shared_attention_stands_before_the_first_stage():
    one = tiny_host().stages[0].blocks[0]
    blocks = (one, replace(one, shares=0), *[one] * 4)
    early = reduced({"stages": (StageSpec(24, blocks),)}, starts=4)
    with torch.no_grad():
        assert early(pictures()).shape == (3, 5)
    late = tiny_host(stages=(StageSpec(24, (*[one] * 4, replace(one, shares=3), one)),))
    with pytest.raises(ValueError, match="block 4 shares the attention of block 3"):
        EvoViT(hosts_of(late)[0])


def test_the_default_starts_follow_the_depth():
    found = {}
    for depth in (1, 2, 3, 4, 8, 12, 24):
        host = hosts_of(VisionTransformer(**{**TINY, "depth": depth}))[0]
        found[depth] = list(EvoViT(host).stages.begins)
    assert found == {1: [], 2: [1], 3: [1, 2], 4: [1, 2], 8: [2, 5], 12: [4, 8], 24: [8, 16]}


def test_what_cannot_be_is_refused():
    (host,) = hosts_of(tiny_host())
    for options, told in (
        ({"keep": 0}, "keep = 0 at block"),
        ({"keep": 1.5}, "keep = 1.5"),
        ({"keep": float("nan")}, "keep = nan"),
        ({"keep": 0.05}, "none of 16 patches"),
        ({"keep": [1, 0.5]}, "2 entries; the model has 6 blocks"),
        ({"keep": [0.5] * 6}, "expected 1 up to the first"),
        ({"starts": 0}, "blocks from 1 to 5"),
        ({"starts": [2, 6]}, "block 6"),
        ({"starts": [2, 2]}, "twice"),
        ({"starts": []}, "blocks from 1 to 5"),
        ({"fast": "slow"}, "copy, representative"),
        ({"tradeoff": -0.5}, "tradeoff = -0.5"),
        ({"tradeoff": [0.5]}, "1 entries"),
    ):
        with pytest.raises(ValueError, match=told):
            EvoViT(host, **options)
    with pytest.raises(ValueError, match="class token"):
        EvoViT(hosts_of(tiny_host(class_token=False, global_pool="avg"))[0])
    for options in ({"keep": 1.5}, {"keep": "half"}, {"starts": "four"}, {"kep": 0.5}):
        with pytest.raises(ValueError, match=r"ke?ep|starts") as caught:
            xp.reduce(tiny_host(), "evovit", **options)
        assert caught.value.exit_code == 2


# ------------------------------------------------------------------ the authors' models


def test_names_build_at_any_size_and_load_the_authors_layout():
    golden = goldens.read("evovit/evo_deit_tiny_patch16_224_stage")
    wide = {"num_classes": 1000, "img_size": (64, 96)}
    model = xp.create_model("evo_deit_tiny_patch16_224", **wide).eval()
    xp.load_released(model, golden.state_dict)
    assert model.pos_embed.shape == (1, 25, 192)
    assert model(torch.zeros(2, 3, 64, 96)).shape == (2, 1000)
    given = golden.state_dict
    q, k, v = model.blocks[3].attn.qkv.weight.chunk(3)
    assert torch.equal(torch.cat([q, k]), given["qks.3.qk.weight"])
    assert torch.equal(v, given["vs.3.v.weight"])
    assert torch.equal(model.reducer.head_cls.weight, given["head_cls.weight"])
    bare = xp.create_model("evo_deit_tiny_patch16_224", **wide, second_head=False)
    xp.load_released(bare, golden.state_dict)
    with torch.device("meta"):
        large = xp.create_model("evo_deit_base_patch16_384")
    assert large.reducer.counts[4:6] == (577, 289)
    assert set(VARIANTS) <= set(xp.list_models("evo_deit*"))


def test_a_torn_file_of_the_authors_names_what_is_missing():
    golden = goldens.read("evovit/evo_deit_tiny_patch16_224_stage")
    model = xp.create_model("evo_deit_tiny_patch16_224")
    state = golden.state_dict
    del state["vs.2.v.weight"]
    with pytest.raises(DataError, match=r"missing: blocks\.2\.attn\.qkv\.weight.*qks\.2"):
        xp.load_released(model, state)
    state = golden.state_dict | {"vs.2.v.weight": torch.zeros(3)}
    with pytest.raises(DataError, match=r"blocks\.2\.attn\.qkv\.weight"):
        xp.load_released(model, state)


def test_a_model_of_that_name_is_whole_without_a_transform():
    torch.manual_seed(0)
    small = {"img_size": 32, "depth": 6, "num_classes": 4}
    model = xp.create_model("evo_deit_tiny_patch16_224", **small).eval()
    assert getattr(model, "transforms", ()) == ()
    again = xp.create_model("evo_deit_tiny_patch16_224", **small).eval()
    again.load_state_dict(model.state_dict())
    xp.load_released(again, model.state_dict())
    with torch.no_grad():
        assert torch.equal(again(pictures()), model(pictures()))
        assert torch.equal(copy.deepcopy(model)(pictures()), model(pictures()))
    with pytest.raises(ValueError, match="reduced already"):
        xp.reduce(model, "evovit")
    model.reset_classifier(7)
    assert [one.out_features for one in model.get_classifier()] == [7, 7]
    model.reset_classifier(0)
    assert model(pictures()).shape == (3, 192)


def test_a_reduced_vit_keeps_its_own_head():
    plain = tiny_host()
    model, _ = xp.reduce(plain, "evovit", second_head=True)
    assert model.global_pool == "token"
    assert torch.equal(model.head.weight, plain.head.weight)
    assert model.reducer.head_cls.out_features == 5
    with torch.no_grad():
        state, _ = model.run(model.embed(pictures()))
        assert model.reducer.second(state).shape == (3, 5)
    assert reduced().reducer.second(state) is None
