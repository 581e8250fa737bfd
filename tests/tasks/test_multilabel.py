"""The multi-label task: targets, loss, figures, thresholds, predictions."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from crosspatch.mixing import Mixing
from crosspatch.tasks import activate, make_task
from crosspatch.tasks.classify import Classify
from crosspatch.tasks.multilabel import PREDICTION_COLUMNS, MultiLabel

TASK = MultiLabel(["ant", "bee", "cat"])
LABELS = torch.tensor([[1.0, 0, 1], [0, 0, 0], [0, 1, 0]])


def test_the_loss_is_torchs_binary_cross_entropy_summed_over_the_classes():
    logits = torch.randn(3, 3)
    mine = TASK.loss(logits, TASK.targets(LABELS, None, 0.0))
    wanted = F.binary_cross_entropy_with_logits(logits, LABELS, reduction="none").sum(1)
    assert torch.allclose(mine, wanted, atol=1e-6)
    weights = torch.tensor([1.0, 4.0, 0.5])
    mine = TASK.loss(logits, TASK.targets(LABELS, None, 0.0, weights))
    wanted = F.binary_cross_entropy_with_logits(
        logits, LABELS, reduction="none", pos_weight=weights
    ).sum(1)
    assert torch.allclose(mine, wanted, atol=1e-6)
    assert TASK.loss(logits.bfloat16(), TASK.targets(LABELS, None, 0.0)).dtype == torch.float32


def test_a_gradient_is_probability_minus_target_as_that_of_classify():
    logits = torch.randn(3, 3, requires_grad=True)
    TASK.loss(logits, TASK.targets(LABELS, None, 0.0)).sum().backward()
    assert torch.allclose(logits.grad, torch.sigmoid(logits) - LABELS, atol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 5, 40])
def test_smoothing_gives_away_as_much_as_that_of_classify(count):
    labels = torch.zeros(1, count)
    labels[0, 0] = 1
    soft = MultiLabel(map(str, range(count))).targets(labels, None, 0.1)[0]
    given = (soft[:, 0] - labels[0]).abs()
    assert torch.allclose(given, torch.full((count,), 0.1 / max(2, count)))
    assert torch.allclose(soft.sum(1), torch.ones(count))
    if count > 1:
        assert float(given.sum()) == pytest.approx(0.1)


def test_targets_are_mixed_by_each_pictures_lam():
    mixing = Mixing(torch.tensor([2, 0, 1]), torch.tensor([0.75, 1.0, 0.5]), None)
    there = TASK.targets(LABELS, mixing, 0.0)[..., 0]
    assert there.tolist() == [[0.75, 0.25, 0.75], [0, 0, 0], [0, 0.5, 0]]


def test_certainty_survives_the_temperature():
    probs = TASK.probabilities(torch.tensor([[20.0, -20.0, 0.0]])).numpy()
    warm = TASK.calibrated(probs, 2.0)
    wanted = torch.sigmoid(torch.tensor([10.0, -10.0, 0.0])).numpy()
    np.testing.assert_allclose(warm[0], wanted, rtol=1e-5)


def test_figures_are_json_even_without_pictures_of_a_class():
    probs = np.array([[0.9, 0.2, 0.1], [0.7, 0.6, 0.1], [0.2, 0.1, 0.3], [0.8, 0.1, 0.2]])
    labels = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 0], [1, 0, 0]], np.float32)
    figures = TASK.metrics(probs, labels)
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures
    assert (figures["images"], figures["labels"], figures["accuracy"]) == (4, 3, 0.75)
    assert figures["map"] == pytest.approx(1.0)
    assert figures["hamming"] == pytest.approx(1 / 12)
    ant, bee, cat = figures["classes"]
    assert (ant["precision"], ant["recall"], ant["ap"]) == (pytest.approx(2 / 3), 1.0, 1.0)
    assert (bee["support"], bee["threshold"]) == (1, 0.5)
    assert (cat["ap"], cat["recall"], cat["precision"]) == (None, None, None)
    assert (cat["recall_low"], cat["recall_high"]) == (0.0, 1.0)
    brief = TASK.brief(probs, labels)
    assert brief["val_map"] == figures["map"]
    assert (brief["val_accuracy"], brief["val_loss"]) == (0.75, figures["nll"])
    assert (brief["val_low"], brief["val_high"]) == (figures["low"], figures["high"])


def test_figures_of_nothing():
    figures = TASK.metrics(np.zeros((0, 3)), np.zeros((0, 3)))
    assert (figures["images"], figures["map"], figures["accuracy"]) == (0, None, None)
    json.dumps(figures, allow_nan=False)
    assert TASK.brief(np.full((2, 3), 0.1), np.zeros((2, 3)))["val_map"] is None


def test_thresholds_decide_and_are_set_on_validation():
    task = MultiLabel("abc", [0.2, 0.5, 0.9])
    said = task.said(np.array([[0.2, 0.49, 0.95], [0.1, 0.5, 0.8]]))
    assert said.tolist() == [[True, False, True], [False, True, False]]
    probs, labels = np.array([[0.1, 0.9], [0.3, 0.2]]), np.array([[0, 0], [1, 0]])
    assert MultiLabel("ab").with_thresholds(probs, labels).thresholds == pytest.approx((0.2, 0.5))
    assert Classify("ab").with_thresholds(probs, labels).thresholds == ()


def test_prediction_rows():
    task = MultiLabel(["ant", "bee", "cat"], [0.5, 0.3, 0.5])
    probs = np.array([[0.9, 0.4, 0.1], [0.1, 0.1, 0.2]])
    rows = list(task.predictions(["a", "b"], LABELS[:2].numpy(), probs, "test"))
    assert tuple(rows[0]) == PREDICTION_COLUMNS
    assert list(rows[0].values()) == [
        "a", "test", "ant|cat", "ant|bee", 0, "0.900000|0.400000", "cat", "bee"
    ]  # fmt: skip
    assert list(rows[1].values()) == ["b", "test", "", "", 1, "", "", ""]
    with pytest.raises(ValueError, match="zip"):
        list(task.predictions(["a"], LABELS.numpy(), probs, "test"))


def test_both_tasks_offer_the_same():
    several, one = make_task("multilabel", "ab"), make_task("classify", "ab")
    offered = lambda task: {name for name in dir(task) if not name.startswith("_")}
    assert offered(several) - offered(one) == {"said"}
    assert offered(one) <= offered(several)
    logits, labels = torch.tensor([[1.0, -2.0]]), {several: torch.ones(1, 2), one: torch.ones(1)}
    for task, name in ((several, "multilabel"), (one, "classify")):
        probs = activate(logits, name)
        assert torch.allclose(task.probabilities(logits).float(), probs)
        assert task.brief(probs, labels[task].long()).keys() == {
            "val_loss", "val_accuracy", "val_low", "val_high", "val_map",
        }  # fmt: skip
