"""Uneven classes: the weights of the paper, the order of the sampler, and what `auto` decides."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from crosspatch.data.loading import balanced_order, train_batches
from crosspatch.data.prepare import prepare
from crosspatch.errors import UsageError
from crosspatch.mixing import Mixing
from crosspatch.objectives import Inputs
from crosspatch.objectives.supervised import Supervised
from crosspatch.tasks.classify import Classify
from crosspatch.training.balance import (
    BETA,
    choose_balance,
    class_weights,
    effective,
    resolve_balance,
)
from support import goldens

counts = st.lists(st.integers(1, 50), min_size=1, max_size=6)


def uneven(numbers: list[int]) -> torch.Tensor:
    return torch.from_numpy(np.repeat(np.arange(len(numbers)), numbers))


def test_weights_are_the_effective_numbers_of_the_paper():
    given = np.array([1, 10, 1000, 100_000])
    wanted = np.array([(1 - BETA) / (1 - BETA**n) for n in given.tolist()])
    found = np.array(class_weights(given))
    np.testing.assert_allclose(found / found[0], wanted / wanted[0], rtol=1e-5)
    assert (found * given).sum() / given.sum() == pytest.approx(1, rel=1e-5)
    np.testing.assert_allclose(class_weights(np.array([7, 7, 7])), 1)
    few = np.array(class_weights(np.array([3, 30])))
    assert few[0] / few[1] == pytest.approx(10, rel=0.02)  # few pictures: the inverse frequency


def test_the_weighted_loss_is_that_of_torch():
    task, weights = Classify("abc"), torch.tensor([0.5, 1.0, 4.0])
    logits, labels = torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 1, 2])
    mine = task.loss(logits, task.targets(labels, None, 0.0, weights))
    torch.testing.assert_close(mine, F.cross_entropy(logits, labels, weights, reduction="none"))


def test_a_weight_is_that_of_the_picture_whatever_smoothing_and_mixing_do():
    """Smoothing must not pull pictures towards rare classes: each picture's loss is scaled, and
    that of a mixed one is the mixture of both weighted losses."""
    task, weights = Classify("abc"), torch.tensor([0.5, 1.0, 40.0])
    logits, labels = torch.randn(3, 3), torch.tensor([0, 1, 2])
    plain = task.loss(logits, task.targets(labels, None, 0.1))
    scaled = task.loss(logits, task.targets(labels, None, 0.1, weights))
    torch.testing.assert_close(scaled, plain * weights[labels])
    partner, lam = torch.tensor([2, 0, 1]), torch.tensor([0.3, 1.0, 0.8])
    mixed = task.loss(logits, task.targets(labels, Mixing(partner, lam, None), 0.1, weights))
    others = task.loss(logits, task.targets(labels[partner], None, 0.1, weights))
    torch.testing.assert_close(mixed, lam * scaled + (1 - lam) * others)


def test_the_objective_weighs_and_its_state_stays_what_it_was():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 2))
    inputs = Inputs(torch.randn(4, 3, 2, 2), torch.tensor([0, 1, 1, 1]), (0, 0, 0), 1 / 4)
    objective = Supervised(model, Classify("ab"), weights=(3.0, 1.0))
    wanted = F.cross_entropy(
        model(inputs.images), inputs.labels, torch.tensor([3.0, 1.0]), reduction="none"
    ).mean()
    torch.testing.assert_close(objective(inputs, 0)["loss"], wanted)
    plain = Supervised(model, Classify("ab"))
    assert objective.state_dict().keys() == plain.state_dict().keys()


@given(counts, st.integers(0, 4), st.integers(0, 4))
def test_every_class_has_its_share_of_an_epoch(numbers, epoch, seed):
    labels = uneven(numbers)
    order = balanced_order(labels, epoch, seed)
    assert len(order) == len(labels)
    shown = np.bincount(labels[order].numpy(), minlength=len(numbers))
    assert shown.max() - shown.min() <= 1
    assert torch.equal(order, balanced_order(labels, epoch, seed))


def test_pictures_of_a_class_come_in_rounds_over_the_epochs():
    labels = uneven([3, 21])
    seen = torch.cat([balanced_order(labels, epoch, 5) for epoch in range(7)])  # 12 places a class
    times = torch.bincount(seen, minlength=24)
    assert times[:3].tolist() == [28, 28, 28]
    assert times[3:].tolist() == [4] * 21
    assert not torch.equal(balanced_order(labels, 0, 5), balanced_order(labels, 0, 6))


def test_balanced_batches_start_anywhere_and_are_shared_out(source, make_recipe):
    images = prepare(source, make_recipe().preprocess).images
    part = images.subset([*range(24), 30, 31, 60])
    whole = list(train_batches(part, 4, epoch=1, seed=3, balanced=True))
    late = list(train_batches(part, 4, epoch=1, seed=3, start_batch=2, balanced=True))
    assert [one.index.tolist() for one in whole[2:]] == [one.index.tolist() for one in late]
    first, second = (
        list(train_batches(part, 4, epoch=1, seed=3, rank=rank, world=2, balanced=True))
        for rank in (0, 1)
    )
    for batch, one, other in zip(whole, first, second, strict=True):
        assert set(batch.index.tolist()) == {*one.index.tolist(), *other.index.tolist()}
    shown = torch.bincount(torch.cat([one.labels for one in whole]))
    assert shown.min() >= 6  # of 24 places, where the order without balance has 1 to 3


@pytest.mark.parametrize(
    ("asked", "numbers", "mode", "word"),
    [
        ("auto", [100, 11], "none", None),
        ("auto", [100, 10], "weights", "a has 10 times the training pictures of b"),
        ("auto", [1000, 10], "sampler", "a batch would hold 0.32 of the latter"),
        ("none", [1000, 10], "none", None),
        ("weights", [9, 9], "weights", "as asked"),
        ("sampler", [9, 8], "sampler", "as asked"),
    ],
)
def test_the_counts_decide_and_the_reason_is_said(asked, numbers, mode, word):
    found, weights, reasons = choose_balance(asked, np.array(numbers), "ab", 32)
    assert found == mode
    assert bool(weights) == (mode == "weights")
    assert (word is None and reasons == []) or word in reasons[0]


def test_an_unknown_balance_is_refused(make_recipe):
    with pytest.raises(UsageError, match="balance"):
        make_recipe(balance="melt")
    with pytest.raises(UsageError, match="class_weights"):
        make_recipe(class_weights=(1.0, 0.0))
    kept = make_recipe(balance="weights", class_weights=(0.5, 1.25, 3.0))
    assert type(kept).from_dict(kept.to_dict()) == kept


def test_a_linear_probe_weighs_every_picture_alike(make_recipe):
    probe = make_recipe(penalties=(1.0,), balance="auto")
    assert resolve_balance(probe, np.array([1, 99]), "ab", []).balance == "none"
    with pytest.raises(UsageError, match="alike"):
        resolve_balance(replace(probe, balance="weights"), np.array([1, 99]), "ab", [])


def test_effective_weights_are_those_of_the_golden():
    golden = goldens.arrays("deit-lt/loss_drw")
    found = effective(golden["counts_c10_if100"])
    np.testing.assert_allclose(found, golden["class_weights"], rtol=1e-6)


@given(st.lists(st.integers(1, 100_000), min_size=1, max_size=30))
def test_effective_weights_sum_to_the_classes_and_never_rise_with_the_pictures(numbers):
    found = np.array(effective(np.array(numbers)))
    assert found.sum() == pytest.approx(len(numbers), rel=1e-6)
    assert (np.diff(found[np.argsort(numbers, kind="stable")]) <= 1e-9).all()


@pytest.mark.parametrize(
    ("asked", "objective", "mode", "deferred"),
    [
        ("effective", "supervised", "effective", 0.0),
        ("drw", "supervised", "drw", 0.8),
        ("auto", "ldam", "drw", 0.8),
        ("auto", "logit-adjust", "none", 0.0),
        ("drw", "logit-adjust", "drw", 0.8),
        ("none", "ldam", "none", 0.0),
    ],
)
def test_weights_of_the_authors_from_the_start_or_late(
    make_recipe, asked, objective, mode, deferred
):
    reasons: list[str] = []
    before = make_recipe(balance=asked, objective=objective)
    recipe = resolve_balance(before, np.array([100, 9, 1]), "abc", reasons)
    assert (recipe.balance, recipe.deferred) == (mode, deferred)
    assert bool(recipe.class_weights) == (mode != "none")
    assert any("for 80% of the run" in one for one in reasons) == (mode == "drw")
    again = resolve_balance(recipe, np.array([100, 9, 1]), "abc", [])
    assert again == recipe


def test_the_late_part_may_be_said(make_recipe):
    before = make_recipe(balance="drw", deferred=0.9)
    assert resolve_balance(before, np.array([9, 1]), "ab", []).deferred == 0.9


def test_what_weights_cannot_do_is_refused(make_recipe):
    for asked in ("effective", "drw"):
        with pytest.raises(UsageError, match="b: a tail class without a training picture"):
            choose_balance(asked, np.array([9, 0]), "ab", 8)
        with pytest.raises(UsageError, match="several labels"):
            choose_balance(asked, np.array([9, 3]), "ab", 8, several=True)
    adjusted = make_recipe(balance="sampler", objective="logit-adjust")
    with pytest.raises(UsageError, match="sampler"):
        resolve_balance(adjusted, np.array([9, 3]), "ab", [])
