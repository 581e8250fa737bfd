"""DeiT's distillation as an objective: with and without a token, its laws, its hosts."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import crosspatch as xp
from crosspatch.errors import DataError, UsageError
from crosspatch.mixing import OneOf, draws
from crosspatch.mixing.mixup import Mixup
from crosspatch.objectives import Given, Inputs
from crosspatch.objectives.distill import Distill, has_token
from crosspatch.objectives.supervised import Supervised
from crosspatch.objectives.teacher import Scale, Teacher
from crosspatch.tasks.classify import Classify
from support.reductions import pictures, tiny_crossvit, tiny_host

TASK = Classify("abcde")
LABELS = torch.tensor([0, 3, 1, 3, 4, 2])
RULES = {"smoothing": 0.1, "mixer": None, "weights": (), "deferred": 0.0}
SAME = Scale((0.5,) * 3, (0.5,) * 3)


def inputs(step: int = 0, count: int = 6, scale: float | None = None) -> Inputs:
    return Inputs(pictures(count), LABELS[:count], (0, step, 0), scale or 1 / count)


class Says(nn.Module):
    """Answers with the same logits for every picture, and keeps the pictures."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(torch.as_tensor(logits))

    def forward(self, x):
        self.seen = x
        return self.logits.expand(len(x), -1)


def teacher_of(module, **how) -> Teacher:
    size = tuple(pictures(1).shape[2:])
    return Teacher(module, size, SAME, SAME, "runs/t", **how)


def built(model, module, **options):
    return Distill.build(model, TASK, RULES, Given(options=options, teacher=teacher_of(module)))


@settings(max_examples=10, deadline=None)
@given(tau=st.floats(0.5, 8), seed=st.integers(0, 99))
def test_a_teacher_equal_to_the_student_teaches_nothing(tau, seed):
    torch.manual_seed(seed)
    student = tiny_host().eval()
    objective = built(student, copy.deepcopy(student), alpha=1.0, tau=tau)
    assert objective(inputs(), 0)["loss"].item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("kind", ["soft", "hard"])
@pytest.mark.parametrize("token", [True, False])
def test_without_the_teacher_s_part_the_base_loss_is_left(kind, token):
    model = tiny_host(dist_token=token).train()
    found = built(model, tiny_host().eval(), kind=kind, alpha=0.0)(inputs(), 0)["loss"]
    out = model(pictures(6))
    logits = out[0] if token else out
    wanted = TASK.loss(logits, TASK.targets(LABELS, None, 0.1)).mean()
    assert torch.allclose(found, wanted)


def test_soft_and_hard_are_the_papers_by_hand():
    model, says = tiny_host(dist_token=True).train(), Says([0.3, -1.0, 2.0, 0.0, 0.5])
    t = says.logits.detach()
    own, other = built(model, says).model(pictures(6))
    base = TASK.loss(own, TASK.targets(LABELS, None, 0.1)).mean()
    kl = F.kl_div(
        F.log_softmax(other / 3, -1), F.softmax(t / 3, -1).expand(6, -1), reduction="batchmean"
    )
    assert torch.allclose(built(model, says)(inputs(), 0)["loss"], 0.9 * base + 0.1 * 9 * kl)
    per_logit = built(model, says, per="logit")(inputs(), 0)["loss"]
    assert torch.allclose(per_logit, 0.9 * base + 0.1 * 9 * kl / 5)
    hard = built(model, says, kind="hard")(inputs(), 0)["loss"]
    taught = F.cross_entropy(other, torch.full((6,), 2))
    assert torch.allclose(hard, 0.5 * base + 0.5 * taught)


def test_in_evaluation_the_mean_of_both_heads_answers():
    objective = built(tiny_host(dist_token=True), tiny_host())
    model = objective.exported.eval()
    state, _ = model.run(model.embed(pictures(4)), pooled=True)
    own, other = model.pool(state)
    wanted = (model.head(own) + model.head_dist(other)) / 2
    assert torch.allclose(model(pictures(4)), wanted, atol=1e-6)


def test_the_teacher_sees_what_the_student_sees_and_learns_nothing():
    says = Says([0.0, 1.0, 0.0, 0.0, 0.0])
    rules = {**RULES, "mixer": OneOf([Mixup()], [1.0])}
    objective = Distill(tiny_host().train(), TASK, teacher=teacher_of(says), **rules)
    objective(inputs(3), 0)["loss"].backward()
    mixed, _ = objective.mixer(pictures(6), draws(0, 3, 0))
    assert torch.equal(says.seen, mixed)
    assert says.logits.grad is None
    assert not any("teacher" in name for name in objective.state_dict())


def test_classes_in_another_order_are_put_right():
    says = Says([0.0, 1.0, 2.0, 3.0, 4.0])
    found = teacher_of(says, order=(4, 3, 2, 1, 0)).logits(pictures(2))
    assert found[0].tolist() == [4, 3, 2, 1, 0]


def test_shares_of_a_batch_add_up():
    objective = built(tiny_host(dist_token=True).eval(), tiny_host())
    whole = objective(inputs(), 0)["loss"]
    parts = [
        Inputs(pictures(6)[rows], LABELS[rows], (0, 0, 0), 2 / 6)
        for rows in (slice(0, 2), slice(2, 6))
    ]
    assert torch.allclose(sum(objective(p, 0)["loss"] for p in parts) / 2, whole, atol=1e-6)


@pytest.mark.parametrize("host", ["crossvit", "reduced", "reduced and distilled", "cnn"])
def test_every_host(host):
    models = {
        "crossvit": lambda: tiny_crossvit(),
        "reduced": lambda: xp.reduce(tiny_host(), "tome", r=2)[0],
        "reduced and distilled": lambda: xp.reduce(tiny_host(dist_token=True), "tome", r=2)[0],
        "cnn": lambda: xp.create_model("resnet10t", num_classes=5),
    }
    model = models[host]().train()
    objective = built(model, tiny_host())
    assert objective.token == (host == "reduced and distilled")
    found = objective(inputs(), 0)
    found["loss"].backward()
    assert found["loss"].isfinite()
    assert all(p.grad is not None for p in objective.parameters())
    assert ("no distillation token" in objective.remarks[0]) != objective.token


def test_four_heads_are_two_pairs():
    class Four(Says):
        head_dist = nn.Linear(1, 1)

        def set_distilled_training(self, enable=True):
            self.on = enable

        def forward(self, x):
            one = self.logits.expand(len(x), -1)
            return (one, 2 * one, 3 * one, 4 * one)

    four, says = Four([0.1, 0.2, 0.3, 0.4, 0.5]), Says([0.0, 1.0, 0.0, 0.0, 0.0])
    assert has_token(four)
    objective = built(four, says)
    one = four.logits.expand(6, -1)
    targets = TASK.targets(LABELS, None, 0.1)
    wanted = [objective._loss(a * one, b * one, says.logits.expand(6, -1), targets)
              for a, b in ((1, 2), (3, 4))]  # fmt: skip
    assert torch.allclose(objective(inputs(), 0)["loss"], sum(wanted) / 2)


def test_a_teacher_that_diverged_is_named():
    with pytest.raises(DataError, match=r"runs/t answers with numbers that are not finite"):
        built(tiny_host(), Says([float("nan")] * 5))(inputs(), 0)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"kind": "warm"}, "kind = warm"),
        ({"alpha": 2}, "alpha = 2"),
        ({"alpha": "much"}, "alpha = much"),
        ({"tau": 0}, "tau = 0"),
        ({"per": "class"}, "per = class"),
        ({"beta": 1}, "no option 'beta'"),
        ({"kind": "hard", "tau": 2}, "tau = 2"),
    ],
)
def test_options_that_cannot_be_are_refused(options, match):
    with pytest.raises(UsageError, match=match) as found:
        built(tiny_host(), tiny_host(), **options)
    assert found.value.expected
    assert found.value.do


def test_a_teacher_of_other_classes_gives_no_answers():
    with pytest.raises(UsageError, match="other classes"):
        Distill(tiny_host(), TASK, teacher=teacher_of(tiny_host(), order=None))


def test_the_base_is_supervised():
    model = tiny_host().eval()
    plain = Supervised(model, TASK, smoothing=0.1)(inputs(), 0)["loss"]
    assert torch.allclose(built(model, tiny_host(), alpha=0.0)(inputs(), 0)["loss"], plain)
