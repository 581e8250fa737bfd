"""Evaluation: every picture once, in order, without touching the model."""

from __future__ import annotations

import pytest
import torch

from crosspatch.data.augment import normalise
from crosspatch.tasks.classify import Classify
from crosspatch.training.evaluation import predict_probabilities
from crosspatch.training.package import build_model
from crosspatch.training.signals import Stopped


@pytest.fixture
def model(recipe):
    return build_model(recipe, 3).train()


def test_probabilities_equal_one_big_batch(model, images):
    state = {k: v.clone() for k, v in model.state_dict().items()}
    found = predict_probabilities(model, images, 7)
    assert model.training
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    model.eval()
    with torch.no_grad():
        pixels = normalise(images.images(torch.arange(len(images))), images.preprocess)
        wanted = model(pixels).softmax(-1)
    assert found.shape == (72, 3)
    assert torch.allclose(found, wanted, atol=1e-5)
    assert torch.allclose(found.sum(1), torch.ones(72), atol=1e-5)


def test_progress_and_stop(model, images):
    told = []
    predict_probabilities(model, images, 32, progress=lambda *at: told.append(at))
    assert told == [(32, 72), (64, 72), (72, 72)]
    with pytest.raises(Stopped):
        predict_probabilities(model, images, 32, stop=lambda: True)
    assert model.training


def test_bf16_is_close(model, images):
    exact = predict_probabilities(model, images, 32)
    half = predict_probabilities(model, images, 32, precision="bf16")
    assert half.dtype == torch.float32
    assert torch.allclose(exact, half, atol=0.05)
    assert not torch.equal(exact, half)


def test_figures_and_nothing_to_evaluate(model, images):
    probs = predict_probabilities(model, images, 32).numpy()
    figures = Classify(images.classes).metrics(probs, images.labels.numpy())
    assert figures["images"] == len(probs) == 72
    hits = (probs.argmax(1) == images.labels.numpy()).mean()
    assert figures["accuracy"] == pytest.approx(float(hits))
    with pytest.raises(ValueError, match="no picture"):
        predict_probabilities(model, images.subset([]))
