"""Learning curves of classes: what is hard falls slower, and what has no picture has no law."""

import numpy as np
import pytest

from crosspatch.explain.collect import SIDE, fixed_features, learning


def drawn(count: int, seed: int, noise: float) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 4
    centres = np.random.default_rng(9).standard_normal((4, 40))
    features = centres[labels] + noise * rng.standard_normal((count, 40))
    return features.astype(np.float32), labels


def test_errors_fall_with_more_pictures() -> None:
    found = learning(drawn(800, 0, 3.0), drawn(400, 1, 3.0), ("a", "b", "c", "d"))
    assert found is not None
    assert found["sizes"] == [100, 200, 400, 800]
    assert (found["train"], found["test"]) == (800, 400)
    assert found["errors"][0] > found["errors"][-1] > 0
    assert [one["name"] for one in found["classes"]] == ["a", "b", "c", "d"]
    assert np.mean([one["exponent"] for one in found["classes"]]) > 0.05
    assert found == learning(drawn(800, 0, 3.0), drawn(400, 1, 3.0), ("a", "b", "c", "d"))


def test_classes_without_pictures_have_no_law() -> None:
    features, labels = drawn(200, 0, 1.0)
    kept = labels != 2
    told = learning((features[kept], labels[kept]), drawn(80, 1, 1.0), ("a", "b", "c", "d"))
    assert told is not None
    assert [one["name"] for one in told["classes"]] == ["a", "b", "d"]
    assert learning((features[:4], labels[:4]), drawn(80, 1, 1.0), ("a", "b", "c", "d")) is None


def test_features_tell_stripes_by_their_direction_and_pictures_by_their_colour() -> None:
    grid = np.zeros((3, SIDE, SIDE, 3), np.uint8)
    grid[0, ::4] = grid[1, :, ::4] = 255
    grid[2, ..., 0] = 255
    found = fixed_features(grid)
    assert found.shape == (3, 176)
    edges, colour = found[:, :128].reshape(3, 16, 8), found[:, 128:].reshape(3, 16, 3)
    assert edges[0].sum(axis=0).argmax() == 4  # brightness changes downwards
    assert edges[1].sum(axis=0).argmax() == 0
    assert edges[2].max() == 0
    assert colour[2].mean(axis=0) == pytest.approx([1, 0, 0])
    assert fixed_features(grid[:0]).shape == (0, 176)
