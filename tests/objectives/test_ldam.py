"""Margins that grow with rarity, and logits without the frequency of their class."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from crosspatch.errors import UsageError
from crosspatch.mixing import OneOf
from crosspatch.mixing.mixup import Mixup
from crosspatch.objectives import Given, Inputs
from crosspatch.objectives.ldam import Ldam, ldam_loss, margins
from crosspatch.objectives.logit_adjust import LogitAdjust, adjustment
from crosspatch.objectives.supervised import Supervised
from crosspatch.tasks.classify import Classify

COUNTS = (5000, 645, 50)


def model():
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 3))


def batch(size=6):
    drawn = torch.Generator().manual_seed(0)
    images = torch.randn(size, 3, 2, 2, generator=drawn)
    return Inputs(images, torch.arange(size) % 3, (0, 5, 0), 1 / size)


def ldam(net, counts=COUNTS, options=None, **rules):
    return Ldam.build(net, Classify("abc"), rules, Given({"scale": 1, **(options or {})}, counts))


@given(st.lists(st.integers(1, 10_000), min_size=1, max_size=20), st.floats(0.01, 5))
def test_margins_are_inverse_fourth_roots_and_the_rarest_has_the_most(counts, most):
    found = margins(torch.tensor(counts), most)
    assert float(found.max()) == pytest.approx(most, rel=1e-5)
    products = found.double() * torch.tensor(counts).double() ** 0.25
    assert torch.allclose(products, products[0].expand_as(products), rtol=1e-5)


def test_the_margin_is_taken_from_the_logit_of_the_label_and_scaled():
    logits, labels = torch.tensor([[2.0, 0.5, -1.0], [0.0, 1.0, 0.3]]), torch.tensor([0, 2])
    wide = margins(torch.tensor(COUNTS))
    found = ldam_loss(logits, labels, F.one_hot(labels, 3).float(), wide, 30.0)
    for row, (z, y) in enumerate(zip(logits.tolist(), labels.tolist(), strict=True)):
        own = math.exp(30 * (z[y] - float(wide[y])))
        rest = sum(math.exp(30 * one) for at, one in enumerate(z) if at != y)
        assert float(found[row]) == pytest.approx(-math.log(own / (own + rest)), rel=1e-4, abs=1e-6)


def test_a_margin_near_nothing_is_the_usual_loss():
    net = model()
    plain = Supervised(net, Classify("abc"), smoothing=0.1)(batch(), 0.5)["loss"]
    found = ldam(net, options={"margin": 1e-9}, smoothing=0.1)(batch(), 0.5)["loss"]
    torch.testing.assert_close(found, plain)
    assert ldam(net)(batch(), 0.5)["loss"] > Supervised(net, Classify("abc"))(batch(), 0.5)["loss"]


def test_a_mixed_picture_has_the_margin_of_either_label():
    net, inputs = model(), batch()
    mixed = ldam(net, mixer=OneOf([Mixup(0.4)], (1.0,)), smoothing=0.1)
    found = mixed(inputs, 0.0)["loss"]
    images, mixing = mixed.mix(inputs)
    logits, labels = net(images), inputs.labels
    wide = margins(torch.tensor(COUNTS))
    parts = []
    for own in (labels, labels[mixing.partner]):
        raised = logits - F.one_hot(own, 3) * wide[own][:, None]
        parts.append(F.cross_entropy(raised, own, reduction="none", label_smoothing=0.1))
    wanted = (mixing.lam * parts[0] + (1 - mixing.lam) * parts[1]).mean()
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("kind", [Supervised, Ldam, LogitAdjust])
def test_weights_come_late_and_divide_by_their_sum(kind):
    """torch's weighted mean, and nothing before its time."""
    net, inputs, weights = model(), batch(5), (0.25, 0.75, 2.0)
    given_ = Given({"scale": 1} if kind is Ldam else {}, COUNTS)
    build = lambda **rules: kind.build(net, Classify("abc"), rules, given_)
    plain, late = build(), build(weights=weights, deferred=0.8)
    late.weighted_mean = True
    assert torch.equal(plain(inputs, 0.79)["loss"], late(inputs, 0.79)["loss"])
    logits = net(inputs.images)
    if kind is Ldam:
        logits = logits - F.one_hot(inputs.labels, 3) * margins(torch.tensor(COUNTS))
    if kind is LogitAdjust:
        logits = logits + adjustment(torch.tensor(COUNTS))
    wanted = F.cross_entropy(logits, inputs.labels, torch.tensor(weights))
    torch.testing.assert_close(late(inputs, 0.8)["loss"], wanted)


def test_the_scale_is_thirty_unless_it_is_said():
    build = lambda options: Ldam.build(model(), Classify("abc"), {}, Given(options, COUNTS))
    assert build({}).scale == 30.0
    assert build({"scale": 16}).scale == 16.0


def test_adjusted_logits_are_shifted_by_the_share_of_their_class():
    counts = torch.tensor(COUNTS)
    found = adjustment(counts, 2.0)
    torch.testing.assert_close(found, 2 * (counts / counts.sum()).log())
    net, inputs = model(), batch()
    task = Classify("abc")
    mine = LogitAdjust.build(net, task, {}, Given({"tau": 2}, COUNTS))(inputs, 0.0)["loss"]
    torch.testing.assert_close(mine, F.cross_entropy(net(inputs.images) + found, inputs.labels))
    even = LogitAdjust.build(net, task, {}, Given({}, (7, 7, 7)))(inputs, 0.0)["loss"]
    torch.testing.assert_close(even, F.cross_entropy(net(inputs.images), inputs.labels))


def test_nothing_of_it_is_kept_in_the_state():
    net = model()
    plain = Supervised(net, Classify("abc")).state_dict().keys()
    assert ldam(net).state_dict().keys() == plain
    kept = LogitAdjust.build(net, Classify("abc"), {}, Given({}, COUNTS)).state_dict()
    assert kept.keys() == plain


@pytest.mark.parametrize(
    ("kind", "options", "counts", "word"),
    [
        (Ldam, {"margin": 0}, COUNTS, "margin above 0"),
        (Ldam, {"margin": -1}, COUNTS, "margin above 0"),
        (Ldam, {"margin": "wide"}, COUNTS, "margin above 0"),
        (Ldam, {"scale": 0}, COUNTS, "scale above 0"),
        (Ldam, {"scale": math.nan}, COUNTS, "scale above 0"),
        (Ldam, {"scale": True}, COUNTS, "scale above 0"),
        (Ldam, {"margins": 0.5}, COUNTS, "options of ldam"),
        (Ldam, {}, (), "training pictures of each class"),
        (Ldam, {}, (5, 0, 3), "b: a tail class without a training picture"),
        (LogitAdjust, {"tau": 0}, COUNTS, "tau above 0"),
        (LogitAdjust, {"tau": 11}, COUNTS, "tau above 0"),
        (LogitAdjust, {"margin": 1}, COUNTS, "options of logit-adjust"),
        (LogitAdjust, {}, (5, 3), "training pictures of each class"),
        (LogitAdjust, {}, (0, 5, 3), "a: a tail class without a training picture"),
    ],
)
def test_what_it_cannot_work_with_is_refused(kind, options, counts, word):
    with pytest.raises(UsageError) as error:
        kind.build(model(), Classify("abc"), {}, Given(options, counts))
    said = f"{error.value.got} {error.value.expected} {error.value.do}"
    assert word in said
