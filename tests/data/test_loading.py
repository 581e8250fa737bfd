"""Batches depend on (n, seed, epoch) alone: not on workers, processes or where one starts."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from crosspatch.data.decode import UnreadableImage
from crosspatch.data.loading import (
    epoch_order,
    eval_batches,
    repeated,
    steps_per_epoch,
    train_batches,
)
from crosspatch.data.opening import open_source
from crosspatch.data.prepare import prepare
from crosspatch.data.preprocess import Preprocess
from crosspatch.errors import UsageError
from support import goldens, hostile

PREPROCESS = Preprocess((16, 16), (16, 16))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    hostile.write_folder(folder, 7)
    return folder


@pytest.fixture(scope="module")
def images(root):
    return prepare(open_source(root), PREPROCESS).images


@pytest.fixture(scope="module")
def uncached(root):
    return prepare(open_source(root), PREPROCESS, memory_fraction=0).images


def same(one, other):
    return len(one) == len(other) and all(
        all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(x, y, strict=True))
        for x, y in zip(one, other, strict=True)
    )


@given(st.integers(0, 300), st.integers(0, 50), st.integers(0, 50))
def test_the_order_is_a_permutation_and_reproducible(n, epoch, seed):
    order = epoch_order(n, epoch, seed)
    assert torch.equal(order.sort().values, torch.arange(n))
    assert torch.equal(order, epoch_order(n, epoch, seed))


def test_epochs_and_seeds_differ():
    orders = [epoch_order(100, epoch, seed) for epoch in range(3) for seed in range(3)]
    assert len({tuple(order.tolist()) for order in orders}) == 9


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("epoch", [0, 1])
def test_the_repeated_order_is_the_authors(world, epoch):
    """Their permutation is torch's, seeded by the epoch, and cut to a multiple of 256."""
    drawn = torch.randperm(1000, generator=torch.Generator().manual_seed(epoch))
    kept = repeated(drawn, 3)[:768]
    for rank in range(world):
        wanted = goldens.arrays("deit/recipe")[f"ra_w{world}_r{rank}_e{epoch}"]
        assert kept[rank::world].tolist() == wanted.tolist()


@given(st.integers(1, 60), st.integers(1, 5))
def test_repeats_follow_each_other_and_fill_the_epoch(n, repeats):
    order = epoch_order(n, 0, 0)
    found = repeated(order, repeats)
    assert found.tolist() == [int(order[place // repeats]) for place in range(n)]
    assert torch.equal(repeated(order, 1), order)


@given(start=st.integers(0, 5), world=st.integers(1, 3))
def test_repeated_batches_begin_anywhere_and_are_shared_out(images, start, world):
    how = {"epoch": 1, "seed": 1, "repeats": 3}
    whole = list(train_batches(images, 4, **how))
    assert torch.equal(torch.cat([b.index for b in whole]), repeated(epoch_order(21, 1, 1), 3)[:20])
    assert torch.equal(torch.cat([b.positions for b in whole]), torch.arange(20))
    assert same(whole[start:], list(train_batches(images, 4, start_batch=start, **how)))
    shares = [list(train_batches(images, 4, rank=r, world=world, **how)) for r in range(world)]
    for batch, *parts in zip(whole, *shares, strict=True):
        together = torch.cat([part.positions for part in parts])
        assert torch.equal(together.sort().values, batch.positions)


def test_training_batches_are_whole_and_disjoint(images):
    batches = list(train_batches(images, 4, epoch=2, seed=5))
    assert [len(batch.labels) for batch in batches] == [4] * 5
    assert torch.equal(torch.cat([b.positions for b in batches]), torch.arange(20))
    assert torch.equal(torch.cat([b.index for b in batches]), epoch_order(21, 2, 5)[:20])
    for batch in batches:
        assert batch.n_global == 4
        assert torch.equal(batch.images, images.images(batch.index))
        assert torch.equal(batch.labels, images.labels[batch.index])


def test_a_set_smaller_than_a_batch_is_one_batch(images):
    (batch,) = train_batches(images, 100, epoch=0, seed=0)
    assert (len(batch.labels), batch.n_global) == (21, 21)


@given(start=st.integers(0, 5))
def test_starting_in_the_middle_changes_nothing(images, start):
    whole = list(train_batches(images, 4, epoch=1, seed=1))
    assert same(whole[start:], list(train_batches(images, 4, epoch=1, seed=1, start_batch=start)))


@given(size=st.integers(3, 25), world=st.integers(1, 3))
def test_processes_share_out_the_same_batches(images, size, world):
    alone = list(train_batches(images, size, epoch=0, seed=0))
    shares = [
        list(train_batches(images, size, epoch=0, seed=0, rank=rank, world=world))
        for rank in range(world)
    ]
    assert {len(share) for share in shares} == {len(alone)} == {steps_per_epoch(21, size, world)}
    for batch, *parts in zip(alone, *shares, strict=True):
        assert {part.n_global for part in parts} == {batch.n_global}
        together = torch.cat([part.positions for part in parts])
        assert torch.equal(together.sort().values, batch.positions)


@given(size=st.integers(1, 25), world=st.integers(1, 3))
def test_evaluation_sees_everything_once(images, size, world):
    batches = [
        b for rank in range(world) for b in eval_batches(images, size, rank=rank, world=world)
    ]
    assert torch.equal(torch.cat([b.index for b in batches]).sort().values, torch.arange(21))
    assert all(len(batch.index) for batch in batches)
    if world == 1:
        assert torch.equal(torch.cat([b.index for b in batches]), torch.arange(21))


@pytest.mark.parametrize("workers", [0, 2])
def test_neither_buffer_nor_workers_change_a_batch(images, uncached, workers):
    torch.manual_seed(0)
    expected = list(train_batches(images, 4, epoch=3, seed=3))
    assert same(expected, list(train_batches(uncached, 4, epoch=3, seed=3, workers=workers)))
    assert same(list(eval_batches(images, 8)), list(eval_batches(uncached, 8, workers=workers)))
    drawn = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(torch.rand(1), drawn)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_lost_in_a_worker_is_told_whole(tmp_path, workers):
    files = hostile.write_folder(tmp_path, 2)
    images = prepare(open_source(tmp_path), PREPROCESS, memory_fraction=0).images
    files[3].write_bytes(b"")
    with pytest.raises(UnreadableImage, match="empty"):
        list(eval_batches(images, 4, workers=workers))


@pytest.mark.parametrize(("n", "batch", "world"), [(10, 1, 2), (0, 4, 1), (10, 0, 1)])
def test_impossible_batches_are_refused(n, batch, world):
    with pytest.raises(UsageError):
        steps_per_epoch(n, batch, world)
