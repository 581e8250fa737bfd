"""Any picture becomes the stored size, in each of the three ways, and nothing else is lost."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from crosspatch.data.preprocess import FITS, Preprocess
from crosspatch.errors import UsageError
from support.hostile import picture

sides = st.integers(1, 300)


@given(
    width=sides,
    height=sides,
    store=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    fit=st.sampled_from(FITS),
)
def test_every_picture_fits_every_frame(width, height, store, fit):
    preprocess = Preprocess(store, store, fit)
    stored = preprocess.fit_image(Image.new("RGB", (width, height), (10, 200, 30)))
    assert stored.shape == (*store, 3)
    assert stored.dtype == np.uint8
    if fit != "pad":
        np.testing.assert_array_equal(stored, np.broadcast_to((10, 200, 30), stored.shape))


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("size", [(1, 3000), (3000, 1), (1, 1)])
def test_extreme_proportions(fit, size):
    stored = Preprocess((32, 48), (32, 48), fit).fit_image(Image.new("RGB", size, "white"))
    assert stored.shape == (32, 48, 3)
    assert (stored.min(axis=2) > 200).any()


def test_crop_takes_the_middle_with_its_proportions():
    pixels = np.zeros((20, 60, 3), np.uint8)
    pixels[:, 20:40] = 255
    assert Preprocess((20, 20), (20, 20)).fit_image(Image.fromarray(pixels)).min() == 255
    assert Preprocess((10, 10), (10, 10)).fit_image(Image.fromarray(pixels)).min() > 200


def test_crop_equals_resizing_then_cutting():
    image = picture("rings", 1, (120, 200))
    ours = Preprocess((60, 60), (60, 60)).fit_image(image).astype(int)
    theirs = np.asarray(image.resize((100, 60), Image.Resampling.BICUBIC).crop((20, 0, 80, 60)))
    assert np.abs(ours - theirs).max() <= 2


def test_pad_keeps_all_and_fills_with_the_mean():
    preprocess = Preprocess((40, 40), (40, 40), "pad", mean=(0.2, 0.4, 0.6))
    stored = preprocess.fit_image(Image.new("RGB", (80, 40), "white"))
    np.testing.assert_array_equal(stored[0], np.broadcast_to((51, 102, 153), (40, 3)))
    np.testing.assert_array_equal(stored[10:30], 255)
    np.testing.assert_array_equal(stored[-1, 0], (51, 102, 153))


def test_squash_keeps_the_corners():
    pixels = np.zeros((10, 100, 3), np.uint8)
    pixels[:, 50:] = 255
    stored = Preprocess((20, 20), (20, 20), "squash").fit_image(Image.fromarray(pixels))
    assert stored[:, :9].max() < 20
    assert stored[:, 11:].min() > 235


def test_shrinking_is_antialiased():
    checks = np.indices((256, 256)).sum(0) % 2 * 255
    image = Image.fromarray(np.repeat(checks[..., None], 3, 2).astype(np.uint8))
    assert Preprocess((32, 32), (32, 32)).fit_image(image).std() < 10


def test_a_picture_of_the_stored_size_is_untouched():
    image = picture("discs", 1, (32, 48))
    for fit in FITS:
        np.testing.assert_array_equal(Preprocess((32, 48), (32, 48), fit).fit_image(image), image)


def test_centre_is_the_middle_for_arrays_and_tensors():
    preprocess = Preprocess((2, 3), (4, 6))
    stored = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(1, 4, 6, 3)
    np.testing.assert_array_equal(preprocess.centre(stored), stored[:, 1:3, 1:4])
    assert torch.equal(
        preprocess.centre(torch.from_numpy(stored)), torch.from_numpy(stored[:, 1:3, 1:4])
    )


@pytest.mark.parametrize(
    ("size", "fit", "side", "store"),
    [
        (224, "crop", 375, (256, 256)),
        (224, "crop", 255, (224, 224)),
        (224, "pad", 375, (224, 224)),
        (32, "crop", 32, (32, 32)),
        ((96, 128), "crop", 500, (110, 146)),
    ],
)
def test_large_pictures_are_stored_with_room(size, fit, side, store):
    assert Preprocess.for_pictures(size, fit, side).store == store


def test_the_choice_survives_json():
    preprocess = Preprocess((3, 4), (5, 6), "pad", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert Preprocess.from_dict(json.loads(json.dumps(preprocess.to_dict()))) == preprocess


@pytest.mark.parametrize(
    "change",
    [
        {"fit": "cut"},
        {"store": (31, 40)},
        {"size": (0, 8)},
        {"mean": (0.5,)},
        {"std": (0.1, 0.0, 0.1)},
    ],
)
def test_impossible_choices_are_refused(change):
    with pytest.raises(UsageError) as caught:
        dataclasses.replace(Preprocess((32, 32), (32, 32)), **change)
    assert str(next(iter(change.values()))) in caught.value.got


def test_unknown_entries_are_refused():
    with pytest.raises(UsageError, match="colour"):
        Preprocess.from_dict({**Preprocess((8, 8), (8, 8)).to_dict(), "colour": 1})
