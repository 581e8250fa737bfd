"""The layer by least squares is scikit-learn's; what is left out is really left out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge

from crosspatch.metrics.ridge import fit_layers, left_out, one_hot


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 99), st.integers(4, 30), st.integers(1, 40), st.sampled_from([0.01, 0.3]))
def test_layer_and_left_out_are_those_of_plain_fits(seed, count, width, penalty):
    rng = np.random.default_rng(seed)
    features = rng.normal(1, 3, (count, width))
    targets = one_hot(rng.integers(0, 3, count), 3)
    deviation = features.std(axis=0)
    scaled = (features - features.mean(axis=0)) / np.where(deviation > 1e-6, deviation, 1)
    plain = Ridge(alpha=penalty * count)
    layer = fit_layers(features, targets, (penalty,))[0]
    np.testing.assert_allclose(
        layer(features), plain.fit(scaled, targets).predict(scaled), atol=2e-4
    )
    said = left_out(features, targets, (penalty,))[0]
    for place in range(3):
        rest = np.arange(count) != place
        wanted = plain.fit(scaled[rest], targets[rest]).predict(scaled[place : place + 1])
        np.testing.assert_allclose(said[place], wanted[0], atol=2e-3)


def test_plain_features_say_how_often_each_class_comes():
    targets = one_hot(np.array([0, 0, 1]), 2)
    layer = fit_layers(np.ones((3, 4)), targets, (0.1,))[0]
    np.testing.assert_allclose(layer(np.ones((1, 4))), [[2 / 3, 1 / 3]], rtol=1e-5)
    np.testing.assert_allclose(left_out(np.ones((3, 4)), targets, (0.1,))[0][2], [1, 0], atol=1e-5)


def test_what_does_not_fit_is_refused():
    for bad in (lambda: fit_layers(np.ones((0, 2)), np.ones((0, 2))),
                lambda: fit_layers(np.ones((3, 2)), np.ones((2, 2))),
                lambda: left_out(np.ones((1, 2)), np.ones((1, 2)))):  # fmt: skip
        with pytest.raises(ValueError, match=r"features|left out"):
            bad()
