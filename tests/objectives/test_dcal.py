"""DCAL's objective: three branches, learnt weights, partners, and what is refused."""

from __future__ import annotations

import pytest
import torch

import crosspatch as xp
from crosspatch.errors import UsageError
from crosspatch.mixing import OneOf, draws
from crosspatch.mixing.cutmix import Cutmix
from crosspatch.objectives import Inputs
from crosspatch.objectives.dcal import NAMES, DualCross, branches
from crosspatch.objectives.supervised import Supervised
from crosspatch.tasks.classify import Classify
from crosspatch.tasks.multilabel import MultiLabel
from crosspatch.tokens.dcal import pair
from crosspatch.tokens.reduce import replay
from support.reductions import pictures, tiny_crossvit, tiny_host

TASK = Classify("abcde")


def crossed(host=None, **options):
    model = tiny_host() if host is None else host
    replay(model, {"kind": "reduce", "method": "dcal", "options": options})
    return model


def inputs(count=3, scale=None, step=0):
    labels = torch.arange(count) % 5
    return Inputs(pictures(count), labels, (0, step, 0), 1 / count if scale is None else scale)


@pytest.mark.parametrize("host", [tiny_host, tiny_crossvit])
def test_the_loss_is_that_of_three_branches(host):
    objective = DualCross(crossed(host(), feature="mean"), TASK, smoothing=0.1, weights=[1.0] * 5)
    with torch.no_grad():
        objective.loss_weights.copy_(torch.tensor([0.5, -1.0, 2.0]))
    given = inputs()
    found = objective(given, 0.5)
    logits = branches(objective.model, given.images, pair(3, draws(0, 0, 0)))
    cross = torch.nn.functional.cross_entropy
    losses = [cross(x, given.labels, label_smoothing=0.1).item() for x in logits]
    weights = objective.loss_weights.tolist()
    wanted = sum(torch.tensor(-w).exp() * x + w for w, x in zip(weights, losses, strict=True)) / 2
    assert found["loss"].item() == pytest.approx(wanted.item(), rel=1e-5)
    assert [x.item() for x in found["parts"].values()] == pytest.approx(losses, rel=1e-5)
    assert tuple(found["parts"]) == NAMES
    assert len({round(x, 4) for x in losses}) == 3


@pytest.mark.parametrize("host", [tiny_host, tiny_crossvit])
def test_branches_are_those_that_are_deployed(host):
    model, images = crossed(host()), pictures()
    with torch.no_grad():
        sa, glca, pwca = branches(model, images, torch.arange(3))
        torch.testing.assert_close(sa, host()(images))
        torch.testing.assert_close(pwca, sa, rtol=1e-4, atol=1e-5)
        only = crossed(host(), branch="glca")
        only.load_state_dict(model.state_dict())
        torch.testing.assert_close(only(images), glca)


def test_everything_learns_and_the_weights_know_which_way():
    objective = DualCross(crossed(feature="mean"), TASK).train()
    found = objective(inputs(), 0)
    found["loss"].backward()
    assert all(p.grad is not None for p in objective.parameters())
    parts = torch.stack(list(found["parts"].values()))
    torch.testing.assert_close(objective.loss_weights.grad, (1 - parts) / 2)


def test_to_be_deployed_as_sa_alone_it_learns_all_the_same():
    objective = DualCross(crossed(branch="sa"), TASK).train()
    objective(inputs(), 0)["loss"].backward()
    assert all(p.grad is not None for p in objective.model.reducer.parameters())
    objective.eval()
    with torch.no_grad():
        assert torch.equal(objective.exported(pictures()), tiny_host()(pictures()))


def test_shares_of_a_batch_count_the_weights_once():
    """Where every loss is 0 the loss is half the sum of w, however the batch is divided."""
    objective = DualCross(crossed(), TASK)
    with torch.no_grad():
        objective.loss_weights.fill_(3.0)
    losses = []
    for count in (2, 5):  # of a batch of 7, in two processes
        found = objective(inputs(count, 2 / 7), 0)
        learnt = (-objective.loss_weights).exp() @ torch.stack(list(found["parts"].values()))
        losses.append(found["loss"].item() - learnt.item() / 2)
    assert sum(losses) / 2 == pytest.approx(9 / 2, rel=1e-5)


@pytest.mark.parametrize("count", [1, 5])
def test_odd_batches(count):
    objective = DualCross(crossed(), TASK)
    found = objective(inputs(count), 0)["parts"]
    assert all(value.isfinite() for value in found.values())
    assert (count > 1) == bool((found["pwca"] - found["sa"]).abs() > 1e-4)


def test_partners_follow_the_draw_and_nothing_else():
    objective = DualCross(crossed(), TASK)
    first = objective(inputs(5, step=1), 0)["loss"]
    torch.rand(5)
    assert torch.equal(objective(inputs(5, step=1), 0)["loss"], first)
    assert not torch.equal(objective(inputs(5, step=2), 0)["loss"], first)


def test_the_weights_of_the_losses_are_not_decayed():
    objective = DualCross(crossed(), TASK)
    plain = Supervised(objective.model, TASK).no_decay()
    assert objective.no_decay() == plain | {"loss_weights"}
    assert objective.no_decay() <= dict(objective.named_parameters()).keys()
    assert objective.exported is objective.model is objective.averaged


def test_several_classes_to_a_picture():
    task = MultiLabel("abcde")
    objective = DualCross(crossed(multilabel=True), task)
    labels = torch.eye(5)[:3] + torch.eye(5)[1:4]
    found = objective(Inputs(pictures(), labels, (0, 0, 0), 1 / 3), 0)
    assert found["loss"].isfinite()
    with pytest.raises(UsageError, match="multilabel=yes"):
        DualCross(crossed(), task)
    with pytest.raises(UsageError, match="multilabel=no"):
        DualCross(crossed(multilabel=True), TASK)


def test_what_cannot_be_trained_is_refused():
    with pytest.raises(UsageError, match="batch mixing together with DCAL"):
        DualCross(crossed(), TASK, mixer=OneOf([Cutmix()], [1.0]))
    for model in (tiny_host(), tiny_crossvit(), xp.reduce(tiny_host(), "tome", r=2)[0]):
        with pytest.raises(UsageError, match="--reduce dcal"):
            DualCross(model, TASK)
    DualCross(crossed(tiny_crossvit(), fine=None), TASK)(inputs(), 0)["loss"].backward()
