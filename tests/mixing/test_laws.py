# SPDX-License-Identifier: Apache-2.0
"""What holds for every mixing that can be named: labels sum to one, draws are the step's."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crosspatch.mixing import AREA, draws
from crosspatch.models.class_row import ClassRow
from crosspatch.objectives.supervised import attended_lam
from crosspatch.tasks.classify import Classify
from crosspatch.training.mix import MIXER_OF
from crosspatch.training.recipe import MIXERS


def test_every_name_has_a_mixer():
    assert tuple(MIXER_OF) == MIXERS


@pytest.mark.parametrize("name", MIXERS)
@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 7), st.integers(1, 12), st.integers(1, 12), st.integers(2, 6),
    st.floats(0, 0.9), st.integers(0, 10_000),
)  # fmt: skip
def test_soft_targets_sum_to_one(name, count, height, width, classes, smoothing, step):
    torch.manual_seed(step)
    images, labels = torch.rand(count, 3, height, width), torch.randint(classes, (count,))
    mixer, task = MIXER_OF[name](1.0), Classify([str(k) for k in range(classes)])
    mixed, mixing = mixer(images, draws(0, step))
    assert torch.equal(mixed, mixer(images, draws(0, step))[0])
    assert mixed.shape == images.shape
    soft = task.targets(labels, mixing, smoothing)
    if mixing.rule != AREA:
        row = ClassRow(torch.rand(count, height * width), (height, width), (height, width))
        logits = torch.randn(count, classes)
        lam = attended_lam(mixing, (row,), soft, logits)
        assert ((lam >= -1e-6) & (lam <= 1 + 1e-6)).all()
        soft = task.targets(labels, mixing._replace(lam=lam), smoothing)
    assert soft.dtype == torch.float32
    assert (soft >= -1e-6).all()
    assert torch.allclose(soft.sum(dim=1), torch.ones(count), atol=1e-5)
