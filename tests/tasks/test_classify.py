"""The classification task: targets, loss, figures, predictions."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from crosspatch.mixing import Mixing
from crosspatch.tasks.classify import PREDICTION_COLUMNS, Classify

TASK = Classify(["ant", "bee", "cat", "dog"])


def test_targets_are_smoothed_as_deit_says():
    soft = TASK.targets(torch.tensor([2, 0]), None, 0.1)
    assert soft[0].tolist() == pytest.approx([0.025, 0.025, 0.925, 0.025])
    assert soft.sum(1).tolist() == pytest.approx([1, 1])


def test_targets_are_mixed_by_lam():
    mixing = Mixing(torch.tensor([1, 0]), torch.tensor([0.75, 1.0]), None)
    soft = TASK.targets(torch.tensor([2, 0]), mixing, 0.0)
    assert soft[0].tolist() == pytest.approx([0.25, 0, 0.75, 0])
    assert soft[1].tolist() == pytest.approx([1, 0, 0, 0])


def test_loss_equals_torch_cross_entropy():
    logits, labels = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 0, 1])
    mine = TASK.loss(logits, TASK.targets(labels, None, 0.1))
    wanted = F.cross_entropy(logits, labels, label_smoothing=0.1, reduction="none")
    assert torch.allclose(mine, wanted, atol=1e-5)
    assert TASK.loss(logits.bfloat16(), TASK.targets(labels, None, 0)).dtype == torch.float32


def test_figures_are_json_even_without_pictures_of_a_class():
    probs = np.array([[0.7, 0.1, 0.1, 0.1], [0.6, 0.2, 0.1, 0.1], [0.1, 0.8, 0.05, 0.05]])
    figures = TASK.metrics(probs, np.array([0, 1, 1]))
    text = json.dumps(figures, allow_nan=False)
    assert json.loads(text) == figures
    assert figures["accuracy"] == pytest.approx(2 / 3)
    assert figures["low"] < 2 / 3 < figures["high"]
    assert figures["topk"] == {"k": 4, "accuracy": 1.0}
    ant, bee, cat, _ = figures["classes"]
    assert (ant["name"], ant["precision"], ant["recall"]) == ("ant", 0.5, 1.0)
    assert (bee["precision"], bee["recall"], bee["support"]) == (1.0, 0.5, 2)
    assert cat["precision"] is None
    assert cat["recall"] is None
    assert np.array(figures["confusion"]).sum() == 3


def test_figures_of_nothing():
    figures = TASK.metrics(np.zeros((0, 4)), np.zeros(0, np.int64))
    assert figures["images"] == 0
    assert figures["accuracy"] is None
    json.dumps(figures, allow_nan=False)


def test_top_k_is_clamped_to_the_classes():
    assert Classify("ab").metrics(np.array([[0.4, 0.6]]), np.array([0]))["topk"]["k"] == 2


def test_prediction_rows():
    rows = list(TASK.predictions(["a.png"], [3], np.array([[0.1, 0.6, 0.1, 0.2]]), "test"))
    assert tuple(rows[0]) == PREDICTION_COLUMNS
    assert rows[0]["label"] == "dog"
    assert rows[0]["prediction"] == "bee"
    assert rows[0]["correct"] == 0
    assert float(rows[0]["label_probability"]) == pytest.approx(0.2)
    with pytest.raises(ValueError, match="zip"):
        list(TASK.predictions(["a", "b"], [3], np.ones((1, 4)) / 4, "test"))
