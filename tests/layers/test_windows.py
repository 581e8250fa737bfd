"""Windows of maps: cut and put back, masks against their definition, attention against loops and
timm's."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models import swin_transformer as timms

from crosspatch.layers.windows import (
    ACROSS,
    HIDDEN,
    PatchMerging,
    SwinBlock,
    WindowAttention,
    attend,
    counts,
    fitted,
    from_windows,
    half,
    hidden_surroundings,
    neighbourhoods,
    pad_to,
    relative_bias,
    relative_index,
    resize_bias_table,
    surroundings,
    to_windows,
    window_mask,
)

sides = st.tuples(st.integers(1, 17), st.integers(1, 17))
windows = st.tuples(st.integers(1, 6), st.integers(1, 6))


@settings(max_examples=40, deadline=None)
@given(sides, windows)
def test_maps_of_any_size_are_cut_and_put_back(size, window) -> None:
    x = torch.randn(2, *size, 3)
    cut = to_windows(pad_to(x, window), window)
    rows, columns = counts(size, window)
    assert cut.shape == (2, rows * columns, window[0] * window[1], 3)
    assert torch.equal(from_windows(cut, window, size), x)
    padded = pad_to(x, window)
    for row, column in product(range(rows), range(columns)):
        top, left = row * window[0], column * window[1]
        expected = padded[:, top : top + window[0], left : left + window[1]].flatten(1, 2)
        assert torch.equal(cut[:, row * columns + column], expected)


def test_windows_that_do_not_divide_a_map_are_refused() -> None:
    with pytest.raises(ValueError, match="4x3 do not divide a map of 8x8"):
        to_windows(torch.zeros(1, 8, 8, 2), (4, 3))


@settings(max_examples=30, deadline=None)
@given(sides, windows, st.tuples(st.integers(0, 4), st.integers(0, 4)))
def test_surroundings_are_what_is_near_and_the_rest_is_hidden(size, window, margin) -> None:
    x = torch.randn(1, *size, 2)
    near = surroundings(x, window, margin)
    mask = hidden_surroundings(size, window, margin)
    rows, columns = counts(size, window)
    for row, column in product(range(rows), range(columns)):
        top, left = row * window[0] - margin[0], column * window[1] - margin[1]
        found, number = [], row * columns + column
        for r, c in product(range(window[0] + 2 * margin[0]), range(window[1] + 2 * margin[1])):
            real = 0 <= top + r < size[0] and 0 <= left + c < size[1]
            found.append(x[0, top + r, left + c] if real else torch.zeros(2))
            hidden = 0.0 if mask is None else float(mask[number, 0, len(found) - 1])
            assert hidden == (0 if real else HIDDEN)
        assert torch.equal(near[0, number], torch.stack(found))


def test_overlapping_windows_are_torchs_unfold() -> None:
    x = torch.randn(2, 14, 14, 3)
    expected = F.unfold(x.permute(0, 3, 1, 2), 10, stride=4).unflatten(1, (3, 100))
    assert torch.equal(neighbourhoods(x, (10, 10), (4, 4)), expected.permute(0, 3, 2, 1))


@pytest.mark.parametrize(
    ("window", "size", "expected", "shift"),
    [
        (7, (56, 56), (7, 7), (3, 3)),
        (7, (7, 7), (7, 7), (0, 0)),
        (7, (7, 14), (7, 7), (0, 0)),  # the smaller side decides for both
        (7, (4, 14), (4, 4), (0, 0)),
        (8, (20, 9), (8, 8), (4, 4)),
        ((4, 8), (12, 6), (4, 6), (0, 0)),
        ((4, 8), (12, 16), (4, 8), (2, 4)),
    ],
)
def test_windows_follow_the_authors_rule(window, size, expected, shift) -> None:
    assert fitted(window, size) == expected
    assert half(expected, size) == shift


@settings(max_examples=30, deadline=None)
@given(sides, windows, st.booleans(), st.booleans())
def test_the_mask_parts_what_the_roll_has_joined_and_hides_padding(
    size, window, shifted, hides
) -> None:
    shift = (window[0] // 2, window[1] // 2) if shifted else (0, 0)
    mask = window_mask(size, window, shift, hides)
    rows, columns = (n * w for n, w in zip(counts(size, window), window, strict=True))
    place = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"))
    rolled = place.permute(1, 2, 0)[None].roll((-shift[0], -shift[1]), (1, 2))
    cut = to_windows(rolled, window)[0]  # where each token of a window has come from
    wrapped = cut < torch.tensor(shift)
    parted = (wrapped[:, :, None] != wrapped[:, None]).any(-1)
    padding = ((cut >= torch.tensor(size)).any(-1) & hides)[:, None]
    expected = ACROSS * parted + HIDDEN * padding
    assert torch.equal(torch.zeros_like(expected) if mask is None else mask, expected)


@pytest.mark.parametrize("window", [(3, 3), (2, 5), (1, 4)])
def test_a_bias_belongs_to_an_offset(window) -> None:
    table = torch.randn((2 * window[0] - 1) * (2 * window[1] - 1), 2)
    bias = relative_bias(table, relative_index(window))
    image = table.unflatten(0, (2 * window[0] - 1, 2 * window[1] - 1))
    tokens = list(product(range(window[0]), range(window[1])))
    for (q, (a, b)), (k, (c, d)) in product(enumerate(tokens), enumerate(tokens)):
        assert torch.equal(bias[:, q, k], image[a - c + window[0] - 1, b - d + window[1] - 1])
    theirs = timms.WindowAttention(8, 2, window_size=window)
    assert torch.equal(theirs.relative_position_index, relative_index(window))


def test_bias_tables_are_resized_head_by_head() -> None:
    table = torch.randn(13 * 13, 3)
    assert resize_bias_table(table, (7, 7), (7, 7)) is table
    got = resize_bias_table(table, (7, 7), (12, 4))
    image = table[:, 1].reshape(1, 1, 13, 13)
    expected = F.interpolate(image, (23, 7), mode="bicubic", align_corners=False).flatten()
    assert torch.allclose(got[:, 1], expected, atol=1e-6)
    assert got.shape == (23 * 7, 3)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("rows", [None, 1, 4])  # of the mask
def test_attention_in_windows_equals_its_loop(biased: bool, rows: int | None) -> None:
    q, k, v = torch.randn(2, 3, 4, 6), torch.randn(2, 3, 5, 6), torch.randn(2, 3, 5, 6)
    bias = torch.randn(2, 4, 5) if biased else None
    mask = torch.randn(3, rows, 5) if rows else None
    expected = torch.zeros(2, 3, 4, 6)
    for b, w, h in product(range(2), range(3), range(2)):
        part = slice(3 * h, 3 * h + 3)
        logits = q[b, w, :, part] @ k[b, w, :, part].T / math.sqrt(3)
        logits = logits + (bias[h] if biased else 0) + (mask[w] if mask is not None else 0)
        expected[b, w, :, part] = logits.softmax(-1) @ v[b, w, :, part]
    assert torch.allclose(attend(q, k, v, 2, bias, mask), expected, atol=1e-6)


@pytest.mark.parametrize("shift", [(0, 0), (2, 2), (1, 3)])
@pytest.mark.parametrize("window", [(4, 4), (2, 6)])
def test_a_block_computes_what_timms_does(window, shift) -> None:
    shift = (min(shift[0], window[0] - 1), shift[1])
    theirs = timms.SwinTransformerBlock(
        16, (8, 12), 2, window_size=window, shift_size=shift, dynamic_mask=True
    ).eval()
    theirs.shift_size = shift  # timm takes it back where a side is one window
    ours = SwinBlock(16, 2, window, shift, size=(8, 12)).eval()
    missing, unexpected = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert (missing, [n for n in unexpected if "index" not in n and "mask" not in n]) == ([], [])
    x = torch.randn(2, 8, 12, 16)
    with torch.no_grad():
        assert torch.allclose(ours(x), theirs(x), atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(sides, windows)
def test_padding_is_as_if_it_were_not_there(size, window) -> None:
    layer, x = WindowAttention(8, 2, window), torch.randn(1, *size, 8)
    layer.relative_position_bias_table.data.normal_()
    bias = relative_bias(layer.relative_position_bias_table, layer.index)
    expected = torch.zeros_like(x)
    with torch.no_grad():
        for top, left in product(range(0, size[0], window[0]), range(0, size[1], window[1])):
            part = x[:, top : top + window[0], left : left + window[1]]
            real = [r * window[1] + c for r in range(part.shape[1]) for c in range(part.shape[2])]
            q, k, v = layer.qkv(part.flatten(1, 2)[:, None]).chunk(3, dim=-1)
            y = layer.proj(attend(q, k, v, 2, bias[:, real][:, :, real]))
            part = y[:, 0].unflatten(1, part.shape[1:3])
            expected[:, top : top + window[0], left : left + window[1]] = part
        assert torch.allclose(layer(x), expected, atol=1e-5)


def test_padding_can_be_seen_as_the_authors_let_it_be() -> None:
    seen, hidden = (WindowAttention(8, 2, 4, mask_padding=m) for m in (False, True))
    seen.load_state_dict(hidden.state_dict())
    x = torch.randn(1, 6, 8, 8)
    with torch.no_grad():
        whole = F.pad(x, (0, 0, 0, 0, 0, 2))
        assert torch.allclose(seen(x), seen(whole)[:, :6], atol=1e-6)
        assert not torch.allclose(seen(x)[:, 4:], hidden(x)[:, 4:], atol=1e-4)
        assert torch.allclose(seen(x)[:, :4], hidden(x)[:, :4], atol=1e-6)


@pytest.mark.parametrize("size", [(8, 8), (7, 9), (3, 3), (8, 14)])
@pytest.mark.parametrize("shift", [0, 2])
def test_a_map_that_was_not_expected_gives_what_one_that_was_does(size, shift) -> None:
    expecting, other = (WindowAttention(8, 2, 4, shift, size=s) for s in (size, (12, 12)))
    other.load_state_dict(expecting.state_dict())
    x = torch.randn(1, *size, 8)
    with torch.no_grad():
        assert torch.equal(expecting(x), other(x))


def test_nothing_leaks_across_the_border_that_was_rolled_away() -> None:
    layer, x = WindowAttention(8, 2, 4, 2), torch.randn(1, 8, 8, 8)
    other = x.clone()
    other[:, 0, 0] += 10
    with torch.no_grad():
        changed = (layer(x) - layer(other)).abs().amax(-1)[0] > 0
    assert changed[:2, :2].all()  # the corner's own window, after the shift
    assert not changed[2:].any()
    assert not changed[:, 2:].any()


def test_the_state_of_attention_is_its_parameters() -> None:
    names = {"relative_position_bias_table", "qkv.weight", "qkv.bias", "proj.weight", "proj.bias"}
    assert set(WindowAttention(8, 2, 4, 2, size=(6, 6)).state_dict()) == names
    with pytest.raises(ValueError, match="8 must divide by 3 heads"):
        WindowAttention(8, 3, 4)


@pytest.mark.parametrize("size", [(4, 6), (5, 7), (1, 1)])
def test_merging_takes_four_tokens_columns_last(size) -> None:
    merging, x = PatchMerging(3, 5), torch.randn(2, *size, 3)
    y = merging(x)
    assert y.shape == (2, -(-size[0] // 2), -(-size[1] // 2), 5)
    padded = pad_to(x, (2, 2))
    cell = torch.cat([padded[:, 0, 0], padded[:, 1, 0], padded[:, 0, 1], padded[:, 1, 1]], dim=-1)
    expected = merging.reduction(F.layer_norm(cell, (12,)))
    assert torch.allclose(y[:, 0, 0], expected, atol=1e-6)
