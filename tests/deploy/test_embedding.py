"""Pictures as vectors: what the classifier reads, in order, with what cannot be read left NaN."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import crosspatch as xp
from crosspatch.data.augment import normalise
from crosspatch.data.preprocess import Preprocess
from crosspatch.deploy.embedding import PATCHES, PLAIN, embedder, of_model, patches_of
from crosspatch.errors import DataError, UsageError
from crosspatch.training.package import Trained
from crosspatch.training.probe import features_of

RNG = np.random.default_rng(0)
PICTURES = [RNG.integers(0, 256, (20 + i, 30, 3), np.uint8) for i in range(5)]


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    model = xp.create_model("vit_micro_32", num_classes=3).eval()
    return Trained(model, ("a", "b", "c"), Preprocess.for_pictures(32), 1.0, 0)


def test_features_are_those_the_classifier_reads(trained):
    one = of_model(trained, "it")
    found = one.embed(PICTURES)
    assert (one.name, found.shape, found.dtype) == ("it", (5, one.dim), np.float32)
    pixels = np.stack([one.predictor.pixels(picture) for picture in PICTURES])
    with torch.no_grad():
        wanted = features_of(trained.module, normalise(torch.tensor(pixels), trained.preprocess))
    np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-4, atol=1e-5)


def test_what_cannot_be_read_is_a_row_of_nan(trained):
    told = []
    given = [PICTURES[0], b"no picture", PICTURES[1]]
    found = of_model(trained, "it").embed(given, progress=lambda *done: told.append(done))
    assert np.isnan(found[1]).all()
    assert np.isfinite(found[[0, 2]]).all()
    assert told[-1] == (3, 3)
    assert of_model(trained, "it").embed([]).shape == (0, found.shape[1])


def test_without_a_network():
    one = embedder(None)
    assert (one.name, one.embed(PICTURES).shape) == (PLAIN, (5, one.dim))
    np.testing.assert_array_equal(one.embed(PICTURES), embedder(None).embed(PICTURES))
    cut = patches_of([*PICTURES, b"torn"])
    assert cut.dim == 8 * PATCHES
    assert np.isnan(cut.embed([*PICTURES, b"torn"])).any(axis=1).tolist() == [False] * 5 + [True]
    with pytest.raises(UsageError, match="no picture that can be read"):
        patches_of([b"torn"])


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"config\.json"):
        embedder(tmp_path)
    (tmp_path / "bundle.onnx").write_bytes(b"x")
    with pytest.raises((DataError, UsageError)):
        embedder(tmp_path / "bundle.onnx")
