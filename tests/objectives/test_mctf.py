"""Token-reduction consistency: its equation by hand, stopped gradients, draws, hosts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import crosspatch as xp
from crosspatch.errors import UsageError
from crosspatch.mixing import OneOf, draws
from crosspatch.mixing.mixup import Mixup
from crosspatch.objectives import Inputs
from crosspatch.objectives.mctf import Consistency, classified, consistency, label_confidence
from crosspatch.objectives.supervised import Supervised
from crosspatch.tasks.classify import Classify
from crosspatch.tasks.multilabel import MultiLabel
from support.reductions import pictures, tiny_crossvit, tiny_host

TASK = Classify("abcde")
LABELS = torch.tensor([0, 3, 1, 3, 4, 2])


def inputs(step: int = 0, count: int = 6) -> Inputs:
    return Inputs(pictures(count), LABELS[:count], (0, step, 0), 1 / count)


def reduced(model=None, **options):
    return xp.reduce(model or tiny_host(), "mctf", **(options or {"r": 2}))[0]


def test_the_loss_is_the_papers():
    model = reduced()
    objective = Consistency(model, TASK, smoothing=0.1, teacher_r=1, confidence=0.3, weight=2.0)
    step = next(s for s in range(9) if draws(0, s, 0).integers(0, 2) == 1)
    found = objective(inputs(step), 0.5)
    teacher, _ = xp.reduce(tiny_host(), "mctf", r=1)
    features, logits = [], []
    for one in (model, teacher):
        state, _ = one.run(one.embed(pictures(6)))
        features.append(one.pool(state))
        logits.append(one(pictures(6)))
    apart = (features[0] - features[1]).square().mean(dim=1)
    sure = logits[0].softmax(-1)[torch.arange(6), LABELS] > 0.3
    assert 0 < sure.sum() < 6
    assert torch.allclose(found["parts"]["consistency"], apart[sure].mean())
    assert found["parts"]["confident"] == pytest.approx(sure.float().mean().item())
    labelled = sum(F.cross_entropy(y, LABELS, label_smoothing=0.1) for y in logits)
    assert torch.allclose(found["loss"], labelled + 2 * apart[sure].mean())


@pytest.mark.parametrize("options", [{"r": 0}, {"r": 0, "ahead": 2}])
def test_a_teacher_equal_to_the_student_is_consistent(options):
    model = reduced(**options)
    found = Consistency(model, TASK, teacher_r=0, confidence=0.0)(inputs(), 0)
    assert found["parts"] == {"consistency": 0, "confident": 1}
    wanted = Supervised(model, TASK)(inputs(), 0)["loss"]
    assert torch.allclose(found["loss"], 2 * wanted)


def test_nobody_confident_leaves_the_labels():
    model = reduced()
    found = Consistency(model, TASK, teacher_r=0, confidence=1.0)(inputs(), 0)
    alone = Supervised(model, TASK)(inputs(), 0)["loss"]
    full = Supervised(tiny_host(), TASK)(inputs(), 0)["loss"]
    assert found["parts"]["confident"] == 0
    assert torch.allclose(found["loss"], alone + full)


def test_the_teacher_is_not_moved_by_the_consistency():
    student, teacher = (torch.randn(4, 6, requires_grad=True) for _ in range(2))
    consistency([student], [teacher]).sum().backward()
    assert teacher.grad is None
    assert torch.allclose(student.grad, (student - teacher).detach() / 3)
    objective = Consistency(reduced(), TASK, weight=0.0)
    objective(inputs(), 0)["loss"].backward()
    assert all(p.grad is not None for p in objective.model.parameters())


def test_confidence_counts_a_mixed_in_label_once():
    _, mixing = Mixup()(pictures(6), draws(0, 0))
    logits, labels = torch.randn(6, 5), torch.tensor([0, 0, 0, 1, 1, 2])
    p, other = logits.softmax(-1), labels[mixing.partner]
    found = label_confidence(logits, labels, mixing)
    for row in range(6):
        named = {int(labels[row]), int(other[row])}
        assert found[row].item() == pytest.approx(sum(p[row, k].item() for k in named), rel=1e-5)
    assert torch.equal(label_confidence(logits, labels, None), p[torch.arange(6), labels])


def test_a_step_is_a_function_of_its_draw():
    objective = Consistency(reduced(), TASK, mixer=OneOf([Mixup()], [1.0]), teacher_r=2)
    first = objective(inputs(1), 0)["loss"]
    torch.rand(5)
    assert torch.equal(objective(inputs(1), 0)["loss"], first)
    assert not torch.equal(objective(inputs(2), 0)["loss"], first)


@pytest.mark.parametrize(
    ("options", "teacher_r", "values"),
    [
        ({"r": 16}, None, range(8)),
        ({"r": 16}, 3, range(4)),
        ({"r": [0, 1, 3, 2, 0, 0]}, None, range(2)),
        ({}, None, [n / 100 for n in range(16)]),
        ({"r": 0.5}, 0.05, [n / 100 for n in range(6)]),
        ({"r": 0.5}, 0, [0]),
    ],
)
def test_the_teacher_draws_from_zero_to_the_most(options, teacher_r, values):
    model, _ = xp.reduce(tiny_host(), "mctf", **options)
    objective = Consistency(model, TASK, teacher_r=teacher_r)
    drawn = [objective.draw(model.reducer, draws(0, step)) for step in range(300)]
    assert sorted(set(drawn)) == list(values)


def test_the_teacher_fuses_where_the_student_does():
    model = reduced(r=3, blocks=[2, 4], tau_info=5.0, pooling=3, proportional=False)
    objective = Consistency(model, TASK, teacher_r=1)
    drawn = [objective.teachers(draws(0, step))[0] for step in range(8)]
    assert {one.schedule for one in drawn} == {(0,) * 6, (0, 0, 1, 0, 1, 0)}
    assert all(one.criteria.tau_info == 5 and one.pooling == 3 for one in drawn)
    assert not any(one.proportional for one in drawn)


@pytest.mark.parametrize("host", ["crossvit", "one branch", "distilled", "average"])
def test_every_host(host):
    models = {
        "crossvit": lambda: reduced(tiny_crossvit(), r=4),
        "one branch": lambda: reduced(tiny_crossvit(), r=4, coarse=None),
        "distilled": lambda: reduced(tiny_host(dist_token=True)),
        "average": lambda: reduced(tiny_host(global_pool="avg")),
    }
    objective = Consistency(models[host]().train(), TASK, confidence=0.0, teacher_r=0)
    found = objective(inputs(), 0)
    assert found["parts"]["consistency"] > 0
    found["loss"].backward()
    model = objective.model.eval()
    reducers = list(getattr(model, "reducers", [getattr(model, "reducer", None)]))
    features, logits = classified(model, model.embed(pictures()), reducers)
    assert torch.allclose(logits, model(pictures()), atol=1e-5)
    assert len(features) == (1 if host == "average" else 2)


def test_what_cannot_be_is_refused():
    with pytest.raises(UsageError, match="without MCTF"):
        Consistency(tiny_host(), TASK)
    with pytest.raises(UsageError, match="several labels"):
        Consistency(reduced(), MultiLabel("abcde"))
    for wrong in ({"weight": -1}, {"confidence": 2}, {"teacher_r": -1}, {"teacher_r": 1.5}):
        with pytest.raises(ValueError, match="expected"):
            Consistency(reduced(), TASK, **wrong)


def test_an_lvvit_is_compared_in_its_class_token():
    """Its patches, fewer in the student than in the teacher, are pooled for the logits alone."""
    torch.manual_seed(0)
    model = reduced(xp.create_model("lvvit_micro_32", num_classes=5, depth=3), r=8)
    found = Consistency(model, TASK, teacher_r=1, confidence=0.0)(inputs(1), 0)
    found["loss"].backward()
    assert found["loss"].isfinite()
    assert model.aux_head.weight.grad.abs().sum() > 0
