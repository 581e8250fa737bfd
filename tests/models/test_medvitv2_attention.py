"""Neighbourhood attention: its windows by hand, tiles that change nothing, any size."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from crosspatch.models.medvitv2_attention import NeighbourhoodAttention, cut, neighbours


def attention(kernel: int = 3, dilation: int = 1, **more) -> NeighbourhoodAttention:
    torch.manual_seed(0)
    made = NeighbourhoodAttention(16, 2, kernel, dilation, **more).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return made


def by_hand(made: NeighbourhoodAttention, x: Tensor) -> Tensor:
    """One query after another, as the equation has it."""
    kernel, step = made.kernel_size, made.dilation
    height, width = x.shape[1:3]
    q, k, v = made.qkv(x).unflatten(3, (3, made.num_heads, -1)).unbind(3)
    out = torch.zeros_like(x)

    def seen(place: int, length: int) -> list[int]:
        members = list(range(place % step, length, step))
        size, mine = min(kernel, len(members)), members.index(place)
        first = max(0, min(mine - kernel // 2, len(members) - size))
        return members[first : first + size]

    for row in range(height):
        for column in range(width):
            logits, values = [], []
            for r in seen(row, height):
                for c in seen(column, width):
                    place = (r - row) // step + kernel - 1, (c - column) // step + kernel - 1
                    score = (q[:, row, column] * k[:, r, c]).sum(-1) * q.shape[-1] ** -0.5
                    logits.append(score + made.rpb[:, place[0], place[1]])
                    values.append(v[:, r, c])
            weights = torch.stack(logits).softmax(0)[..., None]
            out[:, row, column] = (weights * torch.stack(values)).sum(0).flatten(1)
    return made.proj(out)


@pytest.mark.parametrize(
    ("kernel", "dilation", "size"),
    [
        (3, 1, (5, 6)),
        (3, 2, (7, 5)),
        (5, 1, (3, 9)),
        (3, 3, (2, 7)),
        (1, 1, (3, 3)),
        (7, 2, (9, 8)),
    ],
)
@torch.no_grad()
def test_it_is_the_equation(kernel, dilation, size) -> None:
    made = attention(kernel, dilation)
    x = torch.randn(2, *size, 16)
    expected = by_hand(made, x)
    torch.testing.assert_close(made(x), expected, rtol=1e-4, atol=1e-5)
    for tile in (1, 3, 8):
        other = attention(kernel, dilation, tile=tile, size=size)
        torch.testing.assert_close(other(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tile", [1, 2, 4])
@pytest.mark.parametrize(("length", "dilation"), [(1, 1), (5, 1), (14, 1), (13, 2), (3, 4)])
def test_every_place_has_one_query_and_its_own_window(length, dilation, tile) -> None:
    axis = cut(length, 7, dilation, tile)
    assert [axis.queries[back] for back in axis.back] == list(range(length))
    assert axis.span <= 7 + axis.side - 1
    for place, back in enumerate(axis.back):
        number, query = divmod(back, axis.side)
        keys = axis.keys[number * axis.span : (number + 1) * axis.span]
        rows = axis.offsets[axis.which[number]][query]
        found = [key for key, row in zip(keys, rows, strict=True) if row >= 0]
        members = range(place % dilation, length, dilation)
        window = neighbours(members.index(place), len(members), 7)
        assert found == [members[i] for i in window]


def test_windows_are_moved_inwards_and_cut() -> None:
    assert list(neighbours(0, 9, 3)) == [0, 1, 2]
    assert list(neighbours(4, 9, 3)) == [3, 4, 5]
    assert list(neighbours(8, 9, 3)) == [6, 7, 8]
    assert list(neighbours(1, 2, 7)) == [0, 1]


@torch.no_grad()
def test_a_change_reaches_its_neighbours_only() -> None:
    made, x = attention(3, 2), torch.randn(1, 13, 13, 16)
    other = x.clone()
    other[:, 6, 6, 0] += 1
    changed = (made(x) - made(other)).abs().amax(dim=(0, 3)) > 1e-7
    expected = torch.zeros(13, 13, dtype=torch.bool)
    expected[4:9:2, 4:9:2] = True
    assert torch.equal(changed, expected)


def test_the_table_learns_and_what_is_hidden_does_not_spoil_it() -> None:
    made = attention(3, tile=4).train()
    made(torch.randn(2, 5, 5, 16)).square().sum().backward()
    assert all(value.grad.isfinite().all() for value in made.parameters())
    assert (made.rpb.grad != 0).all()


@pytest.mark.parametrize("arguments", [(16, 3, 3), (16, 2, 4), (16, 2, 3, 0), (16, 0, 3)])
def test_impossible_shapes_are_refused(arguments) -> None:
    with pytest.raises(ValueError, match=r"expected an odd|divide by"):
        NeighbourhoodAttention(*arguments)
