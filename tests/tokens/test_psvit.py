"""Attention sharing and token pooling on trained networks; patterns as genomes."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest
import torch
import torch.nn.functional as F

import crosspatch as xp
from crosspatch.errors import UsageError
from crosspatch.layers.block import BlockSpec
from crosspatch.layers.stage import StageSpec
from crosspatch.layers.tokens import recover
from crosspatch.metrics.macs import count_macs, counted
from crosspatch.models.psvit import check_pattern
from crosspatch.tokens.host import attach, hosts_of
from crosspatch.tokens.psvit import Genome, PoolAndShare, mutate, sample, valid
from crosspatch.tokens.reduce import replay
from support.reductions import pictures, tiny_crossvit, tiny_host


def put(model, **options):
    """The reducer on the model itself, without a report."""
    attach(model, [PoolAndShare(hosts_of(model)[0], **options)])
    return model


def by_hand(model, x, donor: int, block: int):
    """The output of `block` for tokens x with the map that `donor` makes of its own input."""
    mine = model.blocks[block]
    own = model.blocks[donor]
    q, k = own.attn.qk(own.norm1(x[donor]))
    v = mine.attn.values(mine.norm1(x[block]))
    y = mine.attn.merge_heads(own.attn.map(q, k) @ v)
    return mine.add_mlp(mine.add_attention(x[block], y))


@pytest.mark.parametrize("host", [{}, {"qk_norm": True, "init_values": 0.3}, {"qkv_bias": False}])
def test_a_sharing_block_reads_the_closest_map_of_its_own_values(host) -> None:
    model, _ = xp.reduce(tiny_host(**host), "psvit", share=[1, 2, 4])
    with torch.no_grad():
        state = model.embed(pictures())
        _, found = model.run(state, collect=range(6))
        x = [state.tokens, *(found[i].tokens for i in range(6))]
        for block, donor in ((1, 0), (2, 0), (4, 3)):
            expected = by_hand(model, x, donor, block)
            torch.testing.assert_close(x[block + 1], expected, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(x[4], model.blocks[3](x[3]), rtol=1e-5, atol=1e-4)


def test_a_block_given_its_own_attention_is_the_ordinary_block() -> None:
    """Where the donor makes, for the sharing block's input, the map that block itself made."""
    host = tiny_host(depth=2)
    first, second = host.blocks
    with torch.no_grad():  # the first block hands its input on and attends as the second does
        for layer in (first.attn.proj, first.mlp.fc2):
            layer.weight.zero_()
            layer.bias.zero_()
        first.attn.qkv.load_state_dict(second.attn.qkv.state_dict())
        expected = host(pictures())
        model, _ = xp.reduce(host, "psvit", share=[1])
        torch.testing.assert_close(model(pictures()), expected, rtol=1e-5, atol=1e-5)
    assert model.blocks[1].attn.qkv.weight.shape == (24, 24)
    assert torch.equal(model.blocks[1].attn.qkv.weight, second.attn.qkv.weight[48:])


@pytest.mark.parametrize("share", [(1,), (1, 3, 5), (1, 2, 4, 5, 7, 8, 10)])
def test_what_sharing_saves_to_the_unit(share) -> None:
    n, c = 197, 192
    found = []
    for given in ((), share):
        with torch.device("meta"):
            model = put(xp.create_model("deit_tiny_patch16_224").eval(), share=given)
            images = torch.zeros(1, 3, 224, 224)
        macs, _ = counted(lambda m=model, x=images: m.run(m.embed(x)))
        found.append((sum(p.numel() for p in model.parameters()), macs))
    saved = [a - b for a, b in zip(*found, strict=True)]
    assert saved == [len(share) * (2 * c * c + 2 * c), len(share) * (2 * n * c * c + n * n * c)]


def test_a_last_block_that_shares_computes_what_is_read_and_nothing_else() -> None:
    model, _ = xp.reduce(tiny_host(), "psvit")
    assert list(model.reducer.donors) == [1, 3, 5]
    with torch.no_grad():
        full = model.forward_head(model.forward_features(pictures()))
        torch.testing.assert_close(model(pictures()), full, rtol=1e-5, atol=1e-5)
    every, _ = counted(lambda: model.forward_features(pictures(1)))
    n, c, classes = 17, 24, 5
    spared = (n - 1) * (c * c + n * c + 8 * c * c)  # proj, map times values, MLP
    assert count_macs(model, (3, 32, 32)) == every - spared + c * classes


def test_dropout_is_applied_once_where_the_map_is_made() -> None:
    """Blocks that share see the very map that the donor used: with values, projections and MLPs
    that hand the map on, both add the same."""
    model = put(tiny_host(depth=3, attn_drop_rate=0.5), share=[1, 2]).train()
    with torch.no_grad():
        for block in model.blocks:
            block.mlp = None
            block.norm1 = torch.nn.Identity()
        state = model.embed(pictures())
        for block in model.blocks[1:]:
            v = block.attn.qkv
            v.weight.zero_()
            v.bias.copy_(torch.ones(24))  # every value 1: the output is the row sum of the map
            block.attn.proj.weight.copy_(torch.eye(24))
            block.attn.proj.bias.zero_()
        _, found = model.run(state, collect=range(3))
    once = found[1].tokens - found[0].tokens
    again = found[2].tokens - found[1].tokens
    torch.testing.assert_close(once, again, rtol=1e-4, atol=1e-4)
    assert (once - 1).abs().max() > 0.05  # rows do not sum to 1: some of them were dropped


def test_pooling_takes_the_greatest_of_nine_and_source_follows() -> None:
    host = tiny_host(img_size=56, reg_tokens=1)  # 7 x 7 patches
    model, report = xp.reduce(host, "psvit", share=[], pool=[1, 3])
    assert model.reducer.counts == (51, 51, 18, 18, 6, 6, 6)
    assert [one.leaving for one in report.blocks] == [51, 18, 18, 6, 6, 6]
    with torch.no_grad():
        state = host.embed(pictures(side=56))
        x = host.blocks[0](state.tokens)
        pooled = F.max_pool2d(x[:, 2:].transpose(1, 2).unflatten(2, (7, 7)), 3, 2, 1)
        x = host.blocks[1](torch.cat([x[:, :2], pooled.flatten(2).transpose(1, 2)], dim=1))
        final, found = model.run(state, collect={1})
        torch.testing.assert_close(found[1].tokens, x, rtol=1e-4, atol=1e-4)
        maps = model.forward_intermediates(
            pictures(side=56), indices=[1, 5], intermediates_only=True
        )
    assert found[1].source[0].reshape(7, 7)[2:4, 3:6].tolist() == [[7, 8, 8]] * 2
    assert final.source[0].reshape(7, 7)[0].tolist() == [2, 2, 2, 2, 3, 3, 3]
    assert final.source[0].reshape(7, 7)[:, 0].tolist() == [2, 2, 2, 2, 4, 4, 4]
    assert final.sizes is None
    assert [tuple(m.shape) for m in maps] == [(3, 24, 7, 7)] * 2
    assert recover(final).shape == (3, 49, 24)


def test_a_donor_may_have_a_pooling_before_it() -> None:
    model, _ = xp.reduce(tiny_host(), "psvit", share=[1, 3, 4], pool=[2])
    assert model.reducer.donors == {1: 0, 3: 2, 4: 2}
    with torch.no_grad():
        state = model.embed(pictures())
        _, found = model.run(state, collect=range(6))
        pooled = model.reducer.before_attention(found[1], 2)
        x = {2: pooled.tokens, 3: found[2].tokens, 4: found[3].tokens}
        for block in (3, 4):
            expected = by_hand(model, x, 2, block)
            torch.testing.assert_close(found[block].tokens, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": [0]}, "block 0 shares its attention; no block before it"),
        ({"share": [3], "pool": [3]}, "block 3 shares its attention right after a pooling"),
        ({"share": [1, 2, 3]}, "block 3 is the third in a row"),
        ({"share": [6]}, "share names block 6; the model has blocks 0 to 5"),
        ({"share": [1, 1]}, "share names a block twice"),
        ({"pool": [0]}, "block 0 has a pooling before it"),
        ({"pool": [2, 3]}, "block 3 has a pooling before it, and so has block 2"),
        ({"pool": [1, 3, 5]}, "block 5 has a pooling before it, and there is but one patch"),
    ],
)
def test_what_is_outside_the_compact_set_is_refused(options, message) -> None:
    with pytest.raises(UsageError, match=message):
        xp.reduce(tiny_host(), "psvit", **options)
    with pytest.raises(ValueError, match=message):
        PoolAndShare(hosts_of(tiny_host())[0], **options)


def test_more_than_three_poolings_are_refused() -> None:
    with pytest.raises(UsageError, match="block 7 has the pooling number 4 before it"):
        xp.reduce(tiny_host(depth=8, img_size=128), "psvit", pool=[1, 3, 5, 7])


def test_a_subset_of_the_patches_cannot_be_pooled() -> None:
    model = put(tiny_host(), pool=2)
    with pytest.raises(ValueError, match="every patch of the grid"):
        model.run(model.embed(pictures(), keep=torch.arange(9).expand(3, -1)))


def uneven(*specs: BlockSpec):
    return tiny_host(stages=(StageSpec(24, specs),))


def test_maps_stay_among_equal_heads_and_inside_a_stage() -> None:
    two, three = (BlockSpec.uniform(24, heads, 4.0) for heads in (2, 3))
    with pytest.raises(UsageError, match="block 1 would share the map of block 0: it has 3 heads"):
        xp.reduce(uneven(two, three), "psvit", share=[1])
    assert put(uneven(two, three, three)).reducer.donors == {2: 1}
    none = BlockSpec(0, 0, 0, 48)
    assert put(uneven(three, none, three), share=[2]).reducer.donors == {2: 0}
    wider = tiny_host(stages=(StageSpec(24, (three, three)), StageSpec(48, (three, three))))
    with pytest.raises(UsageError, match="block 2 shares its attention, and no block before it"):
        xp.reduce(wider, "psvit", share=[2])
    assert put(wider).reducer.donors == {1: 0, 3: 2}


def test_weights_load_again_into_a_replayed_network() -> None:
    model, _ = xp.reduce(tiny_host(), "psvit", share=[1, 4], pool=[3])
    again = tiny_host()
    with pytest.raises(xp.errors.DataError, match=r"blocks\.1\.attn\.qkv\.weight is \(24, 24\)"):
        xp.load_released(again, model.state_dict())
    for transform in model.transforms:
        replay(again, transform)
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()
        xp.load_released(again, model.state_dict())
        assert torch.equal(again(pictures()), model(pictures()))


def test_maps_stay_inside_an_encoder_of_a_crossvit() -> None:
    """Two encoders, each with one block in the fine and two in the coarse branch."""
    host = tiny_crossvit()
    with pytest.raises(UsageError, match="block 2 shares its attention, and no block before it"):
        xp.reduce(host, "psvit", share=[2], fine=None)
    model, report = xp.reduce(host, "psvit")
    assert [r.donors for r in model.reducers] == [{}, {1: 0, 3: 2}]
    assert report.macs < report.base
    assert model(pictures()).isfinite().all()


def test_a_network_that_shares_is_not_reduced_between_donor_and_sharer() -> None:
    own, shares = BlockSpec.uniform(24, 3, 4.0), BlockSpec(3, 0, 24, 96, shares=1)
    host = uneven(own, own, shares, own)
    with pytest.raises(UsageError, match="block 2 shares the attention map of block 1"):
        xp.reduce(host, "tome", r=1)
    model, _ = xp.reduce(host, "tome", r=[0, 0, 0, 2])
    assert model(pictures()).isfinite().all()
    assert put(uneven(own, own, shares, own)).reducer.donors == {1: 0}
    with pytest.raises(UsageError, match="block 3 is the third in a row"):
        xp.reduce(host, "psvit", share=[1, 3])


# ------------------------------------------------------------------ genomes


def holds(genome: Genome) -> bool:
    """The compact set, written another way."""
    pool, share = genome
    text = "".join("p" if p else "s" if s else "." for p, s in zip(pool, share, strict=True))
    both = any(p and s for p, s in zip(pool, share, strict=True))
    return (
        not both
        and text[0] == "."
        and "sss" not in text
        and "pp" not in text
        and text.count("p") <= 3
    )


def test_ten_thousand_random_genomes_and_their_mutants_are_in_the_compact_set() -> None:
    random = Random(0)
    seen = Counter()
    for number in range(10_000):
        depth = random.randint(1, 20)
        genome = sample(depth, random)
        assert len(genome.pool) == len(genome.share) == depth
        assert holds(genome)
        check_pattern(**genome.options, depth=depth)
        seen[sum(genome.pool)] += 1
        if number % 10 == 0:
            assert holds(mutate(genome, random))
    assert set(seen) == {0, 1, 2, 3}


def test_every_genome_is_drawn_as_often() -> None:
    random, depth = Random(1), 4
    bits = [[bool(n >> i & 1) for i in range(depth)] for n in range(2**depth)]
    every = {g for p in bits for s in bits if holds(g := Genome(tuple(p), tuple(s)))}
    assert all(valid(genome) for genome in every)
    drawn = Counter(sample(depth, random) for _ in range(200 * len(every)))
    assert set(drawn) == every
    assert 140 < min(drawn.values()) < max(drawn.values()) < 260


def test_a_template_keeps_its_number_of_poolings() -> None:
    random = Random(2)
    for _ in range(300):
        genome = sample(12, random, pools=2)
        assert sum(genome.pool) == 2
        assert sum(mutate(genome, random, pools=2).pool) == 2
    with pytest.raises(ValueError, match="no pattern of 2 blocks has 2 poolings"):
        sample(2, random, pools=2)
    with pytest.raises(ValueError, match="no pattern of 1 blocks has 1 poolings"):
        sample(1, random, pools=1)


def test_mutation_flips_genes_as_often_as_asked() -> None:
    random = Random(3)
    genome = sample(12, random)
    assert mutate(genome, random, rate=0.0) == genome
    flips = 0
    for _ in range(500):
        found = mutate(genome, random, rate=0.02)
        flips += sum(a != b for a, b in zip(sum(genome, ()), sum(found, ()), strict=True))
    assert 0.005 < flips / 500 / 24 < 0.03  # of 0.02, less what would leave the set


def test_a_genome_is_a_pattern_for_both() -> None:
    genome = sample(6, Random(5), pools=1)
    reduced, _ = xp.reduce(tiny_host(), "psvit", **genome.options)
    assert [bool(r) for r in map(reduced.reducer.active, range(6))] == list(genome.pool)
    built = xp.create_model("psvit_micro_32", num_classes=5, **genome.options)
    assert [b.spec.shares is not None for b in built.blocks] == list(genome.share)
