"""Pictures that judge: right is right, and what is given up early is given up for good reason."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crosspatch.deploy.shrink.judge import FIRST, Pictures, judged
from crosspatch.deploy.shrink.result import Measured
from crosspatch.metrics.interval import paired

COUNT, CLASSES = 400, 5
ROW = Measured(name="x", kind="tokens")


def shown(labels: np.ndarray | None = None) -> Pictures:
    numbers = np.arange(COUNT)
    images = np.zeros((COUNT, 2, 2, 3), np.uint8)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = numbers % 256, numbers // 256
    return Pictures(images, numbers % CLASSES if labels is None else labels)


def answers(pictures: Pictures, right: np.ndarray):
    """A network that names rightly what `right` (N,) says."""

    def run(images: np.ndarray) -> np.ndarray:
        numbers = images[:, 0, 0, 0].astype(int) + 256 * images[:, 0, 0, 1].astype(int)
        said = np.where(right[numbers], pictures.labels[numbers], (numbers + 1) % CLASSES)
        return np.eye(CLASSES, dtype=np.float32)[said]

    return run


masks = st.builds(
    lambda seed, share: np.random.default_rng(seed).random(COUNT) < share,
    st.integers(0, 99),
    st.sampled_from([0.5, 0.9, 0.97, 1.0]),
)


@given(masks, masks, st.sampled_from([1, 16, 64]), st.sampled_from([0.0, 0.02, 1.0]))
def test_figures_are_those_of_the_pictures_it_was_shown(before, after, batch, most):
    pictures = shown()
    row, right = judged(ROW, pictures, answers(pictures, after), before, most, batch)
    n = row.pictures
    assert (right == after[:n]).all()
    assert row.right == after[:n].sum()
    assert row.drop == pytest.approx(before[:n].mean() - after[:n].mean())
    gained, lost = (before & ~after)[:n].sum(), (after & ~before)[:n].sum()
    assert (row.low, row.high) == paired(int(gained), int(lost), n)
    assert bool(row.dropped) == (n < COUNT)
    if row.dropped:
        assert n >= FIRST
        assert row.low > most
        assert str(n) in row.dropped


def test_what_gets_nothing_right_is_given_up_early():
    pictures, nothing = shown(), np.zeros(COUNT, bool)
    row, _ = judged(ROW, pictures, answers(pictures, nothing), ~nothing, 0.005, 16)
    assert row.pictures < COUNT / 2
    assert row.right == 0


def test_answers_that_are_no_numbers_are_wrong():
    pictures = shown().first(8)
    probs = np.full((8, CLASSES), np.nan, np.float32)
    assert not pictures.right(probs).any()


def test_of_several_labels_all_must_be_said():
    labels = np.array([[1, 0], [1, 1], [0, 0]], np.float32)
    pictures = Pictures(np.zeros((3, 2, 2, 3), np.uint8), labels, (0.5, 0.2))
    probs = np.array([[0.9, 0.1], [0.9, 0.1], [0.4, 0.1]], np.float32)
    assert pictures.right(probs).tolist() == [True, False, True]


def test_a_part_is_always_the_same_and_the_digest_sees_every_change():
    pictures = shown()
    part = pictures.first(50)
    assert len(part) == 50
    assert part.digest() == shown().first(50).digest() != pictures.digest()
    assert pictures.first(COUNT + 1) is pictures
    other = pictures.images.copy()
    other[7, 1, 1, 2] = 9
    assert Pictures(other, pictures.labels).digest() != pictures.digest()
    assert Pictures(pictures.images, pictures.labels[::-1]).digest() != pictures.digest()
