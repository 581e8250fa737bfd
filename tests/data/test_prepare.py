"""Everything is decoded once: the good is kept and shared, the bad is listed, memory is
respected."""

import csv
import os

import numpy as np
import pytest
import torch

from crosspatch.data import prepare as module
from crosspatch.data.decode import UnreadableImage
from crosspatch.data.opening import open_source
from crosspatch.data.prepare import free_memory, load_picture, prepare, survey, write_skipped
from crosspatch.data.preprocess import Preprocess
from crosspatch.errors import DataError
from support import hostile

PREPROCESS = Preprocess((32, 32), (36, 36))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "mixed"
    good, bad = hostile.write_hostile_folder(root, per_class=4)
    return root, good, bad


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("memory_fraction", [0.4, 0.0])
def test_the_good_is_kept_and_the_bad_is_listed(mixed, workers, memory_fraction):
    root, good, bad = mixed
    source = open_source(root)
    prepared = prepare(source, PREPROCESS, workers=workers, memory_fraction=memory_fraction)
    images = prepared.images
    assert images.cached == (memory_fraction > 0)
    assert sorted(images.keys) == sorted(path.relative_to(root).as_posix() for path in good)
    assert images.keys == [source.items[index].key for index in prepared.kept]
    reasons = {one.path: one.reason for one in prepared.skipped}
    assert sorted(reasons) == sorted(path.relative_to(root).as_posix() for path in bad)
    assert all(hint in reasons[path.relative_to(root).as_posix()] for path, hint in bad.items())
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(1))
    for picture, at in zip(images.images(order), order.tolist(), strict=True):
        expected = load_picture(source, int(prepared.kept[at]), PREPROCESS)
        np.testing.assert_array_equal(picture.numpy(), expected)
        assert images.labels[at] == source.items[prepared.kept[at]].label


def test_a_subset_shares_the_buffer(mixed):
    images = prepare(open_source(mixed[0]), PREPROCESS).images
    part = images.subset(np.array([7, 2, 5])).subset([2, 0])
    assert part.buffer.data_ptr() == images.buffer.data_ptr()
    assert part.keys == [images.keys[5], images.keys[7]]
    assert torch.equal(part.labels, images.labels[[5, 7]])
    everything = torch.tensor([0, 1])
    assert torch.equal(part.images(everything), images.images(torch.tensor([5, 7])))
    assert part.images(everything[:0]).shape == (0, 36, 36, 3)


def test_an_empty_batch_has_its_shape_without_a_buffer(mixed):
    images = prepare(open_source(mixed[0]), PREPROCESS, memory_fraction=0).images
    assert images.images(torch.empty(0, dtype=torch.int64)).shape == (0, 36, 36, 3)


def test_progress_counts_every_file(mixed, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", 10)
    source, seen = open_source(mixed[0]), []
    prepare(source, PREPROCESS, workers=2, progress=lambda *pair: seen.append(pair))
    assert seen[-1] == (len(source), len(source))
    assert seen == sorted(seen)


def test_the_message_states_what_is_needed(mixed):
    source = open_source("digits")
    message = prepare(source, Preprocess((32, 32), (32, 32))).message
    assert message == "5.5 MB for 1,797 pictures held in memory"
    assert "does not fit" in prepare(source, PREPROCESS, memory_fraction=0).message


def test_nothing_readable_is_an_error(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.jpg").write_bytes(b"")
    source = open_source(tmp_path)
    for step in (survey, lambda s: prepare(s, PREPROCESS)):
        with pytest.raises(DataError, match="none of the 2 pictures"):
            step(source)


def test_a_killed_worker_is_told(mixed, monkeypatch):
    monkeypatch.setattr(module, "fingerprint", lambda *_: os._exit(9))
    with pytest.raises(DataError, match="was killed"):
        prepare(open_source(mixed[0]), PREPROCESS, workers=2)


def test_an_error_of_ours_is_not_taken_for_a_bad_file(mixed, monkeypatch):
    monkeypatch.setattr(Preprocess, "fit_image", lambda *_: 1 / 0)
    for workers in (1, 2):
        with pytest.raises(ZeroDivisionError):
            prepare(open_source(mixed[0]), PREPROCESS, workers=workers)


def test_a_picture_that_is_lost_later_is_told(tmp_path):
    files = hostile.write_folder(tmp_path, 2)
    images = prepare(open_source(tmp_path), PREPROCESS, memory_fraction=0).images
    files[0].unlink()
    with pytest.raises(UnreadableImage, match=r"discs/0000\.jpg"):
        images.images(torch.arange(2))


def test_the_survey_reads_headers(mixed):
    found = survey(open_source(mixed[0]))
    assert found.looked_at == found.total == len(mixed[1]) + len(mixed[2])
    assert 0 < found.unreadable <= len(mixed[2])
    assert (found.least_side, found.greatest_side) == (1, 96)
    assert found.aspect >= 1
    assert survey(open_source("digits"), limit=10).looked_at == 10
    assert survey(open_source("digits")).median_side == 8


def test_the_list_of_skipped_files(tmp_path):
    write_skipped(tmp_path / "s.csv", [module.Skipped('a,"b\n.jpg', "cut short")])
    with open(tmp_path / "s.csv", newline="") as file:
        assert list(csv.reader(file)) == [["path", "reason"], ['a,"b\n.jpg', "cut short"]]


def test_free_memory_is_plausible():
    assert 1e7 < free_memory() < 1e14
