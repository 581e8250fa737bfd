"""What a reduction did to a picture, drawn: the panels say what the states say."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

import crosspatch as xp
from crosspatch.data.preprocess import Preprocess
from crosspatch.errors import UsageError
from crosspatch.explain.tokens import DARK, LINE, draw, overlay, reductions, summary
from crosspatch.tokens.host import reducers_of
from support.reductions import tiny_crossvit, tiny_host

SEEN = Preprocess(size=(32, 32), store=(36, 36), fit="crop", mean=(0.5,) * 3, std=(0.25,) * 3)
PIXELS = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)


def test_panels_are_the_blocks_that_reduce():
    model, _ = xp.reduce(tiny_host(), "tome", r=[0, 2, 0, 3, 0, 1])
    panels = reductions(model, PIXELS, SEEN)
    assert [(p.block, p.entering, p.leaving) for p in panels] == [
        (1, 17, 15), (3, 15, 12), (5, 12, 11),
    ]  # fmt: skip
    for panel in panels:
        assert panel.source.shape == (4, 4)
        assert len(np.unique(panel.source)) == panel.leaving - 1
    assert summary(panels) == "17 to 11 tokens in 3 blocks"


def test_both_branches_of_a_crossvit():
    model, _ = xp.reduce(tiny_crossvit(), "tome", r=2, fine={"r": 5})
    panels = reductions(model, PIXELS, SEEN)
    assert [(p.branch, p.block) for p in panels] == [
        *(("fine", i) for i in range(2)), *(("coarse", i) for i in range(4)),
    ]  # fmt: skip
    counts = [reducer.counts for reducer in reducers_of(model)]
    assert [p.leaving for p in panels] == [*counts[0][1:], *counts[1][1:]]
    assert summary(panels) == "fine 65 to 55 tokens in 2 blocks, coarse 17 to 9 tokens in 4 blocks"
    sheet = draw(PIXELS, panels)
    assert sheet.width > 5 * 224  # a row per branch: the coarse one has the picture and 4 panels
    assert sheet.height > 2 * 224


def test_merged_patches_wear_their_mean_and_what_is_left_out_is_dark():
    pixels = np.full((32, 32, 3), 100, np.uint8)
    pixels[:, 16:] = 200
    source = np.array([[1, 2], [1, -1]])
    shown = overlay(pixels, source).astype(int)
    assert (shown[4, 24] == 200).all()  # a token of its own, as in the picture
    assert (shown[24, 28] == round(200 * DARK)).all()
    assert (shown[4, 4] == 100).all()  # the mean of equal patches
    assert (shown[4, 15] == LINE).all()  # where merged patches end
    assert (shown[15, 4] == shown[16, 4]).all()  # no line inside of a token
    source = np.array([[1, 1], [3, 4]])
    assert 100 < overlay(pixels, source)[4, 4, 0] < 150 < overlay(pixels, source)[4, 28, 0] < 200


def test_a_model_without_a_reduction_is_refused():
    with pytest.raises(UsageError, match="without a reduction"):
        reductions(tiny_host(), PIXELS, SEEN)
    untouched, _ = xp.reduce(tiny_host(), "tome", r=0)
    with pytest.raises(UsageError, match="leaves every token"):
        reductions(untouched, PIXELS, SEEN)


def test_a_small_picture_is_enlarged_without_blur():
    model, _ = xp.reduce(tiny_host(), "tome", r=2)
    sheet = draw(PIXELS, reductions(model, PIXELS, SEEN))
    first = np.asarray(sheet.crop((10, 32, 10 + 224, 32 + 224)).resize((32, 32), Image.NEAREST))
    assert (first == PIXELS).all()
