"""The file of token labels, and how its maps are read where a token lies."""

from __future__ import annotations

import errno
import math
import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crosspatch.data import token_labels
from crosspatch.data.augment import AugmentConfig, augment, placement
from crosspatch.data.preprocess import Preprocess
from crosspatch.data.token_labels import (
    About,
    Draft,
    State,
    TokenLabels,
    aligned,
    dense,
    keys_hash,
    strongest,
)
from crosspatch.errors import DataError, UsageError
from support.tiny import Stripes

IDENTITY = torch.eye(3)[None, :2]
FLIP = torch.tensor([[[-1.0, 0, 0], [0, 1, 0]]])


def about(source, **changed) -> About:
    given = {"fingerprint": source.fingerprint(), "keys": keys_hash(source), "size": (8, 8),
             "classes": source.classes, "teacher": {"kind": "run", "where": "t"}, "fit": "crop",
             "grid": (2, 3), "top": len(source.classes)}  # fmt: skip
    return About(**{**given, **changed})


def written(path, source, **changed) -> tuple[TokenLabels, torch.Tensor]:
    told = about(source, **changed)
    logits = torch.randn(len(source), len(told.classes), *told.grid)
    draft = Draft(path, told, len(source))
    for rows in np.array_split(draft.todo, 5):
        draft.write(rows, *strongest(logits[rows], told.top), State.LABELLED)
    return draft.finish(), logits


# ---------------------------------------------------------------------- what is kept


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.data(), st.floats(1e-3, 1e3))
def test_what_is_kept_comes_back_within_half_a_step_of_16_bits(classes, data, scale):
    top = data.draw(st.integers(1, classes))
    logits = scale * torch.randn(2, classes, 3, 2)
    back = dense(*strongest(logits, top), classes)
    kept = back != 0
    bound = logits.abs() * 2.0**-11 + 2.0**-25
    assert bool(((back - logits).abs() <= bound)[kept].all())
    least = logits.topk(top, dim=1).values[:, -1:]
    assert bool((kept | (logits < least) | (logits.abs() < 2.0**-24)).all())
    assert bool((kept.sum(dim=1) <= top).all())


def test_with_all_classes_there_are_no_indices_and_without_them_the_rest_is_0():
    logits = torch.tensor([[[[3.0]], [[-2.0]], [[1.0]]]])
    values, indices = strongest(logits, 3)
    assert indices is None
    assert torch.equal(dense(values, None, 3), logits)
    values, indices = strongest(logits, 2)
    assert indices.flatten().tolist() == [0, 2]
    assert dense(values, indices, 3).flatten().tolist() == [3, 0, 1]


def test_what_16_bits_cannot_hold_is_refused():
    for wrong in (math.nan, math.inf, 1e5):
        with pytest.raises(DataError, match="not finite"):
            strongest(torch.full((1, 2, 1, 1), wrong), 2)


def test_classes_up_to_65535_are_named_exactly(tmp_path):
    source = Stripes(2, 2)
    draft = Draft(tmp_path / "l.st", about(source, top=1, grid=(1, 1)), len(source))
    logits = torch.zeros(4, 65_536, 1, 1)
    classes = torch.tensor([65_535, 2_049, 32_768, 0])
    logits[torch.arange(4), classes] = 5
    draft.write(np.arange(4), *strongest(logits, 1), State.LABELLED)
    file = draft.finish()
    kept = torch.from_numpy(file._parts["indices"][:].astype(np.int64)).flatten()
    assert kept.tolist() == classes.tolist()


# ---------------------------------------------------------------------- the file


@pytest.mark.parametrize("top", [2, 3])
def test_a_file_gives_back_the_maps_of_any_items(tmp_path, top):
    source = Stripes()
    file, logits = written(tmp_path / "a" / "l.st", source, top=top)
    items = torch.tensor([5, 0, 71, 5])
    expected = dense(*strongest(logits[items], top), 3)
    assert torch.equal(file.maps(items), expected)
    again = TokenLabels(file.path, file.sha256)
    assert torch.equal(again.maps(items), expected)
    assert again.about == about(source, top=top)
    assert list((tmp_path / "a").iterdir()) == [file.path]
    from safetensors.numpy import load_file

    assert load_file(file.path)["values"].shape == (72, 2, 3, top)


def test_what_was_written_before_a_kill_is_kept_and_nothing_is_overwritten(tmp_path):
    source, path = Stripes(4), tmp_path / "l.st"
    logits = torch.randn(12, 3, 2, 3)
    first = Draft(path, about(source), 12)
    first.write(np.arange(5), *strongest(logits[:5], 3), State.TAUGHT)
    first._parts["values"][5:] = 9  # written, and the states of these rows not yet
    del first
    assert not path.exists()
    other = Draft(path, about(source, fit="pad"), 12)
    assert len(other.todo) == 12
    second = Draft(path, about(source), 12)
    assert second.todo.tolist() == list(range(5, 12))
    second.write(second.todo, *strongest(logits[5:], 3), State.LABELLED)
    file = second.finish()
    assert torch.equal(file.maps(torch.arange(12)), logits.half().float())
    assert file.state.tolist() == [State.TAUGHT] * 5 + [State.LABELLED] * 7
    for draft in (lambda: Draft(path, about(source), 12), other.finish):
        with pytest.raises(UsageError, match="nothing is overwritten"):
            draft()


def test_two_that_write_the_same_leave_one_file(tmp_path):
    source, path, logits = Stripes(4), tmp_path / "l.st", torch.randn(12, 3, 2, 3)
    drafts = [Draft(path, about(source), 12) for _ in range(2)]
    for draft in drafts:
        draft.write(draft.todo, *strongest(logits[draft.todo], 3), State.LABELLED)
    file = drafts[0].finish()
    with pytest.raises(UsageError, match="nothing is overwritten"):
        drafts[1].finish()
    assert torch.equal(file.maps(torch.arange(12)), logits.half().float())


def test_a_disk_without_room_is_told_before_anything_is_labelled(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UsageError, match="No space left") as found:
        Draft(tmp_path / "l.st", about(Stripes(4)), 12)
    assert "room for 0.0 MB" in found.value.expected
    assert not [*tmp_path.iterdir()]


def test_a_file_is_hashed_once_by_whatever_name(tmp_path, monkeypatch):
    file, _ = written(tmp_path / "l.st", Stripes(4))
    misses = token_labels._hash.cache_info().misses
    monkeypatch.chdir(tmp_path)
    assert TokenLabels("l.st").sha256 == file.sha256
    assert token_labels._hash.cache_info().misses == misses


def test_torn_and_foreign_files_are_named(tmp_path):
    file, _ = written(tmp_path / "l.st", Stripes(4))
    whole = file.path.read_bytes()
    cases = {"torn": whole[:-3], "torn ": whole[:40], " torn": b"", "torn  ": b"x" * 99,
             "another version": whole.replace(b'"schema\\": 1', b'"schema\\": 9')}  # fmt: skip
    for why, text in cases.items():
        path = tmp_path / "other.st"
        path.write_bytes(text)
        with pytest.raises(DataError, match=rf"other\.st.*{why.strip()}"):
            TokenLabels(path)
    from safetensors.numpy import save_file

    save_file({"values": np.zeros(3)}, path)
    with pytest.raises(DataError, match="no token labels"):
        TokenLabels(path)
    with pytest.raises(DataError, match="missing"):
        TokenLabels(tmp_path / "none")
    with pytest.raises(DataError, match="no longer the labels"):
        TokenLabels(file.path, "0" * 64)


def test_labels_of_other_data_are_refused(tmp_path):
    source = Stripes(4)
    file, _ = written(tmp_path / "l.st", source)
    file.require(source, "crop", (9, 9))
    other = Stripes(4, noise=61)
    renamed = Stripes(4)
    renamed.items = tuple(type(item)(f"x{item.key}", item.label, None) for item in renamed.items)
    named = Stripes(4)
    named.classes = ("a", "b", "c")
    for wrong, match in ((other, "other contents"), (renamed, "other pictures"), (Stripes(3),
                         "other pictures"), (named, "of 3 classes, row0")):  # fmt: skip
        with pytest.raises(DataError, match=match):
            file.require(wrong, "crop", (8, 8))
    for fit, store in (("pad", (8, 8)), ("crop", (8, 10))):
        with pytest.raises(UsageError, match="crosspatch label … --fit"):
            file.require(source, fit, store)


def test_every_training_picture_needs_its_row_and_the_teacher_must_not_judge(tmp_path):
    source = Stripes(4)
    file, _ = written(tmp_path / "l.st", source)
    keys = [item.key for item in source.items]
    file.require_rows(np.arange(8), np.arange(8, 12), keys)
    file.state[[2, 3]] = State.UNREADABLE
    with pytest.raises(DataError, match=r"2 training pictures, the first row0/002"):
        file.require_rows(np.arange(8), np.arange(8, 12), keys)
    file.state[[2, 3, 9]] = State.TAUGHT
    with pytest.raises(UsageError, match="trained on 1 of the pictures"):
        file.require_rows(np.arange(8), np.arange(8, 12), keys)


# ---------------------------------------------------------------------- where a token lies


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 3))
def test_the_whole_picture_at_the_map_s_own_grid_is_the_map(rows, columns, classes):
    maps = torch.randn(2, classes, rows, columns)
    found = aligned(maps, IDENTITY.expand(2, -1, -1), (rows, columns))
    torch.testing.assert_close(found, maps, atol=1e-4, rtol=1e-4)
    whole = aligned(maps, IDENTITY.expand(2, -1, -1), (1, 1))
    torch.testing.assert_close(whole, maps.mean((2, 3), keepdim=True), atol=1e-4, rtol=1e-4)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 8))
def test_a_mirrored_picture_has_mirrored_labels(side, rows, columns):
    maps = torch.randn(1, 2, side, side)
    plain, mirrored = (aligned(maps, warp, (rows, columns)) for warp in (IDENTITY, FLIP))
    torch.testing.assert_close(mirrored, plain.flip(3), atol=1e-4, rtol=1e-4)


def test_a_turn_by_a_right_angle_turns_the_labels():
    maps = torch.randn(1, 2, 4, 4)
    turn = torch.tensor([[[0.0, -1, 0], [1, 0, 0]]])
    torch.testing.assert_close(
        aligned(maps, turn, (4, 4)), maps.rot90(-1, (2, 3)).flip(2, 3), atol=1e-5, rtol=1e-5
    )


def roi_align(maps: np.ndarray, box: tuple, size: int) -> np.ndarray:
    """RoIAlign's definition: box (x1, y1, x2, y2) as parts of the sides, less half a place."""
    _, height, width = maps.shape
    x1, y1, x2, y2 = (c * s - 0.5 for c, s in zip(box, (width, height) * 2, strict=True))
    wide, tall = (x2 - x1) / size, (y2 - y1) / size
    points = math.ceil(tall), math.ceil(wide)
    found = np.zeros((len(maps), size, size))

    def at(y, x):
        y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
        top, left = int(y), int(x)
        down, across = y - top, x - left
        low, right = min(top + 1, height - 1), min(left + 1, width - 1)
        upper = (1 - across) * maps[:, top, left] + across * maps[:, top, right]
        lower = (1 - across) * maps[:, low, left] + across * maps[:, low, right]
        return (1 - down) * upper + down * lower

    for row in range(size):
        for column in range(size):
            for i in range(points[0]):
                for j in range(points[1]):
                    y = y1 + tall * (row + (i + 0.5) / points[0])
                    x = x1 + wide * (column + (j + 0.5) / points[1])
                    found[:, row, column] += at(y, x) / (points[0] * points[1])
    return found


@pytest.mark.parametrize("box", [(0, 0, 1, 1), (0.1, 0.3, 0.9, 0.8), (0.5, 0, 1, 0.4)])
@pytest.mark.parametrize(("side", "size"), [(4, 4), (5, 8), (7, 14)])
def test_an_upright_crop_is_read_as_by_roi_align(box, side, size):
    maps = torch.randn(1, 3, side, side)
    x1, y1, x2, y2 = box
    warp = torch.tensor([[[x2 - x1, 0, x1 + x2 - 1], [0, y2 - y1, y1 + y2 - 1]]])
    expected = roi_align(maps[0].double().numpy(), box, size)
    found = aligned(maps, warp, (size, size))[0].double().numpy()
    assert np.abs(found - expected).max() < 1e-5


@pytest.mark.parametrize("config", [
    AugmentConfig(),
    AugmentConfig(flip=True, crop_scale=(0.3, 1.0), ratio=(0.7, 1.4), rotate=25, shear=12,
                  shift=0.1, pad=0.1),
])  # fmt: skip
@pytest.mark.parametrize("store", [(16, 16), (18, 20)])
def test_labels_lie_where_the_augmented_picture_shows_them(config, store):
    """A picture whose red and green say where a point of it lies: its map of labels says the
    same."""
    preprocess = Preprocess((16, 16), store, mean=(0, 0, 0), std=(1, 1, 1))
    down, across = (255 * (np.arange(side) + 0.5) / side for side in store)
    picture = np.zeros((*store, 3), np.float32)
    picture[..., 0], picture[..., 1] = across, down[:, None]
    stored = torch.from_numpy(np.rint(picture).astype(np.uint8)).expand(8, -1, -1, -1)
    how = {"epoch": 3, "seed": 1, "config": config, "preprocess": preprocess}
    positions = torch.arange(8)
    shown = augment(stored, positions, **how)[:, :2]
    maps = torch.from_numpy(picture / 255).permute(2, 0, 1)[None, :2].expand(8, -1, -1, -1)
    found = aligned(maps, placement(positions, **how), (4, 4))
    expected = torch.nn.functional.avg_pool2d(shown, 4)
    assert (found - expected).abs().max() < 0.02
    if config.warps:
        plain = aligned(maps, IDENTITY.expand(8, -1, -1), (4, 4))
        assert (plain - expected).abs().max() > 0.2


def test_a_grid_that_leaves_a_remainder_covers_its_part():
    maps = torch.arange(8.0).expand(1, 1, 8, 8)
    found = aligned(maps, IDENTITY, (1, 2), (1.0, 0.5))
    torch.testing.assert_close(found, torch.tensor([[[[0.5, 2.5]]]]), atol=0.3, rtol=0)
