"""SReT: the authors' numbers, its counts, what slices, passes and shuffling do."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch

import crosspatch as xp
from crosspatch.errors import UsageError
from crosspatch.metrics.macs import count_macs
from crosspatch.models.sret import VARIANTS, SReT, checkpoint_filter_fn
from crosspatch.models.sret_blocks import (
    PERMUTATIONS,
    SlicedAttention,
    inverse,
    settled_order,
)
from support import goldens

GOLDENS = [
    "sret_t_64",
    "sret_t_64_unit_coef",
    "sret_t_64_noperm_unit_coef",
    "sret_t_noperm",
    "sret_t_wo_slice_unit_coef",
]


@lru_cache(maxsize=1)
def given(name: str) -> tuple[goldens.Golden, dict[str, torch.Tensor]]:
    """The golden and its state dict; what it says was kept as built is 1."""
    golden = goldens.read(f"sret/{name}")
    kept = tuple(golden.meta["keep_buffers"])
    return golden, {
        name: torch.ones_like(value) if kept and name.endswith(kept) else value
        for name, value in golden.state_dict.items()
    }


def small(**changes) -> SReT:
    """With no weight at a value that would hide a mistake."""
    torch.manual_seed(0)
    model = xp.create_model("sret_micro_32", num_classes=5, **changes).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def attention(permutation: str = "none") -> SlicedAttention:
    torch.manual_seed(0)
    options = {"permutation": permutation, "attn_drop": 0.0, "proj_drop": 0.0}
    return SlicedAttention(16, 2, **options).eval()


# ---------------------------------------------------------------------- the authors' numbers


@pytest.mark.parametrize("name", GOLDENS)
def test_it_computes_what_the_authors_code_computes(name) -> None:
    golden, state = given(name)
    model = SReT.from_authors(**golden.meta["build"]).eval()
    assert sum(p.numel() for p in model.parameters()) == golden.meta["params"]
    xp.load_released(model, {"model": state})
    with torch.no_grad():
        features = model.forward_features(golden.images)
        logits = model.forward_head(features)
    assert goldens.relative_error(logits, golden.outputs["out"]) < 1e-4
    assert goldens.relative_error(features.permute(0, 3, 1, 2), golden.outputs["feat"]) < 1e-4


@pytest.mark.parametrize(
    ("changed", "matters"),
    [
        ("transformers.1.blocks.2.attn.proj.bias", True),
        ("transformers.1.blocks.0.attn.proj.bias", False),  # the copy behind it counts
        ("transformers.0.blocks.3.mlp.fc1.bias", True),
        ("transformers.2.blocks.10.coefficient2.bias", True),
        ("pos_embed", True),
    ],
)
def test_a_golden_notices_a_changed_weight(changed, matters) -> None:
    golden, whole = given("sret_t_64_unit_coef")
    model = SReT.from_authors(**golden.meta["build"]).eval()
    state = whole | {changed: -whole[changed] - 1}
    xp.load_released(model, state)
    with torch.no_grad():
        error = goldens.relative_error(model(golden.images), golden.outputs["out"])
    assert (error > 1e-3) == matters


def test_a_file_with_one_copy_of_each_shared_block_is_enough() -> None:
    golden, whole = given("sret_t_64_unit_coef")
    model = SReT.from_authors(**golden.meta["build"], learned_coefficients=False).eval()
    first = [f"blocks.{j}." for j in (0, 4, 8, 12, 16)]  # passes of every block
    state = {n: v for n, v in whole.items() if not any(mark in n for mark in first)}
    xp.load_released(model, state)
    with torch.no_grad():
        assert goldens.relative_error(model(golden.images), golden.outputs["out"]) < 1e-4
    assert not any("coefficient" in name for name, _ in model.named_parameters())
    state["transformers.0.blocks.2.coefficient1.bias"] = torch.full((1,), 0.5)
    with pytest.raises(ValueError, match="coefficient1"):
        xp.load_released(model, state)


# ---------------------------------------------------------------------- counts

SIZES = {
    "sret_t": (4_755_979, 1.11),
    "sret_t_wo_slice": (4_755_979, 1.37),
    "sret_t_wo_slice_384": (4_853_259, 6.41),
    "sret_lt": (4_988_024, 1.16),
    "sret_lt_16_14_1": (4_988_024, 1.22),
    "sret_lt_wo_slice": (4_988_024, 1.42),
    "sret_s": (20_899_692, 4.17),
    "sret_s_wo_slice": (20_899_692, 4.67),
    "sret_s_wo_slice_384": (21_091_212, 18.5),
    "sret_s_wo_slice_512": (21_317_004, 42.8),
}


QUICK = ("sret_t", "sret_t_wo_slice", "sret_lt_16_14_1", "sret_s")


def test_parameters() -> None:
    assert set(SIZES) == set(VARIANTS)
    for name, (parameters, _) in SIZES.items():
        with torch.device("meta"):
            model = xp.create_model(name)
        assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.long) for n in SIZES]
)
def test_multiply_adds(name) -> None:
    with torch.device("meta"):
        model = xp.create_model(name)
    found = count_macs(model, (3, *model.img_size)) / 1e9
    assert found == pytest.approx(SIZES[name][1], rel=5e-3)


def test_the_small_one_is_comparable() -> None:
    with torch.device("meta"):
        model = xp.create_model("sret_micro_32", num_classes=10)
    assert 10.8e6 < count_macs(model, (3, 32, 32)) < 13.1e6


def test_sharing_saves_the_parameters_of_every_second_pass() -> None:
    with torch.device("meta"):
        shared = SReT()
        apart = SReT(recursive_num=(4, 10, 6))
    blocks = [
        sum(p.numel() for p in recursion.block.parameters())
        for stage in shared.stages
        for recursion in stage.blocks
    ]
    assert len(blocks) == 10
    difference = sum(p.numel() for p in apart.parameters()) - sum(
        p.numel() for p in shared.parameters()
    )
    assert difference == sum(blocks)


# ---------------------------------------------------------------------- slices, passes, shuffling


def test_slices_do_not_see_each_other() -> None:
    made, x = attention(), torch.randn(1, 12, 16)
    other = x.clone()
    other[:, 4:8] += 1
    with torch.no_grad():
        changed = (made.sliced(x, 3, False) - made.sliced(other, 3, False)).abs().amax(dim=2)[0]
        alone = made(x[:, 4:8])
        torch.testing.assert_close(made.sliced(x, 3, False)[:, 4:8], alone)
    assert changed[4:8].min() > 1e-4
    assert not changed[:4].any()
    assert not changed[8:].any()


@pytest.mark.parametrize(("tokens", "groups", "sizes"), [(10, 4, [3, 3, 3, 1]), (5, 4, [2, 2, 1])])
def test_groups_that_do_not_divide_leave_a_smaller_last_one(tokens, groups, sizes) -> None:
    made, x = attention(), torch.randn(2, tokens, 16)
    with torch.no_grad():
        expected = torch.cat([made(part) for part in x.split(sizes, dim=1)], dim=1)
        torch.testing.assert_close(made.sliced(x, groups, False), expected)


@pytest.mark.parametrize("permutation", PERMUTATIONS)
def test_shuffled_slices_are_put_back(permutation) -> None:
    made, x = attention(permutation), torch.randn(2, 12, 16)
    torch.manual_seed(5)
    with torch.no_grad():
        found = made.sliced(x, 2, True)
        torch.testing.assert_close(made.sliced(x, 1, True), made(x))
    orders = {"none": range(12), "train": settled_order(12)}
    torch.manual_seed(5)
    order = torch.tensor(list(orders.get(permutation, torch.randperm(12).tolist())))
    expected = torch.empty_like(x)
    with torch.no_grad():
        for half in order.chunk(2):
            expected[:, half] = made(x[:, half])
    torch.testing.assert_close(found, expected)


def test_the_settled_order_is_a_permutation_that_mixes() -> None:
    order = torch.tensor(settled_order(784))
    assert torch.equal(order.sort().values, torch.arange(784))
    assert torch.equal(order[inverse(order)], torch.arange(784))
    upper = (order[:392] < 392).float().mean()
    assert 0.4 < upper < 0.6


def test_only_the_authors_permutation_is_drawn_in_evaluation() -> None:
    x = torch.randn(1, 3, 32, 32)
    answers = {}
    for permutation in PERMUTATIONS:
        model = small(permutation=permutation)
        with torch.no_grad():
            answers[permutation] = model(x)
            again = model(x)
        assert torch.equal(answers[permutation], again) == (permutation != "random")
        if permutation == "train":
            assert not torch.equal(model.train()(x.expand(2, -1, -1, -1))[:1], again)
    assert not torch.allclose(answers["none"], answers["train"])


def test_the_authors_permutation_is_exported_as_the_settled_one() -> None:
    shape = {"base_dims": (8,), "num_heads": (1,), "depths": (2,), "recursive_num": (1,)}
    shape |= {"groups1": (4,), "groups2": (2,)}
    model, x = small(permutation="random", **shape), torch.randn(2, 3, 32, 32)
    program = torch.export.export(model, (x,))
    settled = small(permutation="train", **shape)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), settled(x), rtol=1e-4, atol=1e-5)


def test_passes_are_told_by_number_or_as_the_authors_by_place() -> None:
    shape = {"num_heads": (1,), "base_dims": (8,), "groups1": (4,), "groups2": (2,)}
    one = {**shape, "depths": (2,), "recursive_num": (2,)}
    three = {**shape, "depths": (6,), "recursive_num": (2,)}

    def groups(model: SReT) -> list[list[int]]:
        return [[g for g, _ in recursion.slices] for recursion in model.stages[0].blocks]

    with torch.device("meta"):
        assert groups(SReT(**one)) == [[4], [4]]
        assert groups(SReT(**three)) == [[4, 2, 2], [4, 2, 2]]
        authors = {("depth" if n == "depths" else n): v for n, v in one.items()}
        assert groups(SReT.from_authors(**authors)) == [[4], [2]]
        assert groups(SReT(**three, groups_by="place")) == [[4, 2, 4], [2, 4, 2]]
    with pytest.raises(ValueError, match="sret_lt_wo_slice"):
        SReT.from_authors(fn="SReT_XL")


def test_a_second_pass_is_the_same_block_again() -> None:
    model = small(groups1=(1, 1, 1), groups2=(1, 1, 1))
    recursion, x = model.stages[1].blocks[0], torch.randn(2, 8, 8, 40)
    first, second = recursion.projections
    with torch.no_grad():
        y = first(recursion.block(x.flatten(1, 2), 1, False))
        y = second(recursion.block(y, 1, False))
        torch.testing.assert_close(recursion(x), y.unflatten(1, (8, 8)))


def test_scalars_begin_at_one_and_neither_they_nor_positions_decay() -> None:
    model = xp.create_model("sret_micro_32")
    free = model.no_weight_decay()
    scalars = {n: p for n, p in model.named_parameters() if "coefficient" in n}
    assert len(scalars) == 4 * 4 + 8 * 2
    assert all(p.item() == 1 for p in scalars.values())
    assert free == {"stem.pos_embed", *scalars}
    rates = xp.create_model("sret_micro_32", drop_path_rate=0.8).stages[2].blocks
    found = [recursion.block.drop_path.drop_prob for recursion in rates]
    assert found == pytest.approx([0.8 * 4 / 8, 0.8 * 5 / 8])


# ---------------------------------------------------------------------- sizes


def test_positions_fit_another_size_as_they_do_on_the_way() -> None:
    model = small(groups1=(1, 1, 1), groups2=(1, 1, 1))
    wide = small(groups1=(1, 1, 1), groups2=(1, 1, 1), img_size=(40, 51))
    xp.load_released(wide, model.state_dict())
    x = torch.randn(1, 3, 40, 51)
    with torch.no_grad():
        torch.testing.assert_close(model(x), wide(x), rtol=1e-4, atol=1e-5)
    own = checkpoint_filter_fn(wide.state_dict(), wide)
    assert all(torch.equal(own[name], value) for name, value in wide.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"depths": (2, 2)}, "one a stage"),
        ({"depths": (2, 2, 3)}, "blocks divide the passes"),
        ({"num_heads": (2, 3, 6)}, "a multiple of the one before"),
        ({"groups1": (0, 1, 1)}, "1 or more"),
        ({"permutation": "always"}, "'always'"),
        ({"groups_by": "name"}, "'name'"),
        ({"stem_strides": (2, 2)}, "three convolutions"),
        ({"global_pool": "token"}, "global_pool"),
    ],
)
def test_impossible_shapes_are_refused(arguments, words) -> None:
    with pytest.raises(UsageError, match=words):
        xp.create_model("sret_micro_32", **arguments)
