"""DeiT-LT: the loss and weights of the authors, the two parts of a run, what is refused."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import crosspatch as xp
from crosspatch.errors import DataError, UsageError
from crosspatch.mixing import OneOf
from crosspatch.mixing.deit import BatchMixup
from crosspatch.objectives import Given, Inputs
from crosspatch.objectives.deit_lt import DeitLT, deit_lt_loss
from crosspatch.objectives.teacher import Scale, Teacher
from crosspatch.objectives.uneven import effective_weights
from crosspatch.tasks.classify import Classify
from crosspatch.tasks.multilabel import MultiLabel
from support import goldens
from support.reductions import pictures

TASK = Classify("abcde")
LABELS = torch.tensor([0, 3, 1, 3, 4, 2])
COUNTS = (500, 200, 80, 30, 10)
PLAIN = Scale((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


class Mean(nn.Module):
    """A teacher that names the class by the mean of the picture, and remembers what it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 5))
        self.seen = []

    def forward(self, x):
        self.seen.append(x)
        return -(10 * x.mean(dim=(1, 2, 3))[:, None] - self.weight).abs()


def teacher(own=PLAIN, size=(8, 8)):
    return Teacher(Mean(), size, own, PLAIN, "a teacher")


def student(**arguments):
    torch.manual_seed(0)
    return xp.create_model(
        "deit_micro_distilled_32", num_classes=5, depth=1, embed_dim=16, **arguments
    ).train()


def objective(**how):
    how = {"teacher": teacher(), "counts": COUNTS, **how}
    return DeitLT(student(), TASK, **how)


def inputs(step: int = 0) -> Inputs:
    return Inputs(pictures(6), LABELS, (0, step, 0), 1 / 6)


def test_the_loss_is_the_authors_before_and_after_the_deferred_point():
    golden = {key: torch.from_numpy(v) for key, v in goldens.arrays("deit-lt/loss_drw").items()}
    logits = golden["cls"], golden["dist"], golden["teacher"]
    weights = effective_weights(golden["counts_c10_if100"].tolist())
    assert torch.allclose(weights, golden["class_weights"], rtol=1e-12)
    before = deit_lt_loss(*logits, golden["soft"])
    after = deit_lt_loss(*logits, golden["labels"], weights=weights)
    for found, expected in ((before, "before_drw"), (after, "after_drw")):
        assert torch.allclose(torch.stack(found).float(), golden[expected], rtol=1e-6)
    weighted = deit_lt_loss(*logits, golden["labels"], weights=weights, weighted_base=True)
    expected = F.cross_entropy(golden["cls"], golden["labels"], weight=weights.float())
    assert float(weighted.base) == pytest.approx(float(expected) / 2, rel=1e-6)
    assert float(weighted.distill) == pytest.approx(float(after.distill))


@given(st.lists(st.integers(1, 100_000), min_size=1, max_size=50))
def test_weights_sum_to_the_number_of_classes_and_favour_the_rare(counts):
    weights = effective_weights(counts)
    assert float(weights.sum()) == pytest.approx(len(counts))
    order = sorted(range(len(counts)), key=counts.__getitem__)
    assert all(weights[a] >= weights[b] - 1e-12 for a, b in itertools.pairwise(order))


@given(st.sampled_from(["hard", "soft"]), st.floats(0, 1), st.integers(0, 9))
def test_the_parts_make_the_whole_whatever_the_options(kind, alpha, seed):
    drawn = torch.Generator().manual_seed(seed)
    logits, dist, taught = (torch.randn(4, 5, generator=drawn) for _ in range(3))
    weights = effective_weights(COUNTS)
    found = deit_lt_loss(logits, dist, taught, LABELS[:4], alpha=alpha, weights=weights, kind=kind)
    assert float(found.total) == pytest.approx(float(found.base + found.distill), abs=1e-6)
    if kind == "soft":
        own = deit_lt_loss(logits, taught, taught, LABELS[:4], alpha=alpha, kind=kind)
        assert float(own.distill) == pytest.approx(0, abs=1e-6)


def test_up_to_the_deferred_point_pictures_are_mixed_and_labels_smoothed():
    one = objective(mixer=OneOf([BatchMixup()], [1.0]), smoothing=0.1, drw=0.5)
    found = one(inputs(), 0.49)
    images, targets = one.blended(inputs())
    assert torch.equal(one.teacher.module.seen[-1], one.teacher.view(images))
    first, second = one.model(images)
    named = one.teacher.logits(images).argmax(1)
    expected = F.cross_entropy(first, targets) / 2 + F.cross_entropy(second, named) / 2
    assert torch.allclose(found["loss"], expected)
    assert torch.allclose(found["parts"]["class"] + found["parts"]["distillation"], expected)
    assert not torch.equal(images, inputs().images)


@pytest.mark.parametrize("weighted_base", [False, True])
def test_from_the_deferred_point_on_rare_answers_weigh_more(weighted_base):
    one = objective(
        mixer=OneOf([BatchMixup()], [1.0]), smoothing=0.1, drw=0.5, weighted_base=weighted_base
    )
    found = one(inputs(), 0.5)["loss"]
    assert torch.equal(one.teacher.module.seen[-1], one.teacher.view(inputs().images))
    first, second = one.model(inputs().images)
    named = one.teacher.logits(inputs().images).argmax(1)
    assert len(named.unique()) > 1
    weights = effective_weights(COUNTS).float()
    base = F.cross_entropy(first, LABELS, weight=weights if weighted_base else None)
    expected = base / 2 + F.cross_entropy(second, named, weight=weights) / 2
    assert torch.allclose(found, expected)
    assert not torch.allclose(found, one(inputs(), 0.49)["loss"])


def test_the_teacher_sees_the_students_picture_as_it_normalises_and_in_its_size():
    own = Scale((0.4, 0.5, 0.6), (0.2, 0.2, 0.2))
    one = objective(teacher=teacher(own, (5, 7)))
    one(inputs(), 0.0)
    seen = one.teacher.module.seen[-1]
    assert seen.shape == (6, 3, 5, 7)
    raw = inputs().images * 0.25 + 0.5
    mine = (raw - torch.tensor(own.mean)[:, None, None]) / 0.2
    assert torch.allclose(seen, F.interpolate(mine, (5, 7), mode="bicubic"), atol=1e-6)


def test_a_teacher_that_answers_nothing_finite_is_named():
    bad = teacher()
    bad.module.weight.data.fill_(math.inf)
    with pytest.raises(DataError, match="a teacher answers with numbers that are not finite"):
        objective(teacher=bad)(inputs(), 0)


def test_what_is_shipped_gives_the_mean_and_both_heads_learn():
    one = objective()
    one(inputs(), 0.95)["loss"].backward()
    assert all(p.grad is not None for p in one.model.parameters())
    assert not any(p.requires_grad for p in one.teacher.module.parameters())
    assert not any("teacher" in name for name in one.state_dict())
    first, second = one.model(inputs().images)
    mean = one.exported.eval()(inputs().images)
    one.model.train()
    assert mean.shape == (6, 5)
    assert first.shape == second.shape == mean.shape


def build(options, model=None, task=TASK, counts=COUNTS, taught=True):
    given = Given(options, counts, teacher() if taught else None)
    rules = {"smoothing": 0.1, "mixer": None, "weights": (), "deferred": 0.0}
    return DeitLT.build(student() if model is None else model, task, rules, given)


def test_options_are_read_and_wrong_ones_named():
    one = build({"drw": 0.8, "alpha": 0.3, "weighted_base": True, "kind": "soft", "tau": 2})
    assert (one.drw, one.alpha, one.weighted_base, one.kind, one.tau) == (0.8, 0.3, True, "soft", 2)
    wrong = ({"drw": 1.5}, {"drw": True}, {"alpha": -1}, {"kind": "medium"}, {"tau": 0},
             {"weighted_base": 1}, {"beta": 0.9})  # fmt: skip
    for options in wrong:
        with pytest.raises(UsageError, match="drw: from which part"):
            build(options)


def test_what_cannot_be_is_refused():
    with pytest.raises(UsageError, match="no distillation token"):
        build({}, model=xp.create_model("crossvit_micro_32", num_classes=5))
    with pytest.raises(UsageError, match="no distillation token"):
        build({}, model=xp.create_model("vit_micro_32", num_classes=5))
    with pytest.raises(UsageError, match="several labels"):
        build({}, task=MultiLabel("abcde"))
    with pytest.raises(UsageError, match="without a teacher"):
        build({}, taught=False)
    with pytest.raises(UsageError, match="e: a tail class without a training picture"):
        build({}, counts=(9, 9, 9, 9, 0))
    with pytest.raises(ValueError, match="every class needs"):
        effective_weights([3, 0])
    for wrong in ({"alpha": 2}, {"kind": "x"}, {"kind": "soft", "tau": 0}):
        with pytest.raises(ValueError, match=r"is in|one of|above 0"):
            deit_lt_loss(*torch.randn(3, 2, 5), LABELS[:2], **wrong)
