"""TiC: what its two mechanisms do, its cost, any size."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import crosspatch as xp
from crosspatch.errors import UsageError
from crosspatch.metrics.macs import count_macs
from crosspatch.models.tic import TapAttention, attention_macs, cells, checkpoint_filter_fn, cyclic
from crosspatch.models.tic_layer import MSAConv


class Products(TorchDispatchMode):
    """Counts the elements of products of two tensors."""

    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.mul.Tensor and isinstance(args[1], torch.Tensor):
            self.total += out.numel()
        return out


def attention(**arguments) -> TapAttention:
    torch.manual_seed(0)
    return TapAttention(16, 2, **{"kernel_size": 3, **arguments}).eval()


def small(**arguments):
    torch.manual_seed(0)
    return xp.create_model("tic_micro_32", num_classes=4, **arguments).eval()


@pytest.mark.parametrize(
    ("name", "parameters", "macs", "taps"),
    [
        ("tic_small", 12.746, 1823.3, 93.4),
        ("tic_base", 28.261, None, 140.1),
        ("tic_micro_32", 0.3642, 10.852, 0.498),
    ],
)
def test_sizes(name, parameters, macs, taps) -> None:
    with torch.device("meta"):
        model = xp.create_model(name)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(parameters, rel=1e-3)
    if macs is not None:
        assert count_macs(model, (3, *model.img_size)) / 1e6 == pytest.approx(macs, rel=1e-3)
    assert attention_macs(model, model.img_size) / 1e6 == pytest.approx(taps, rel=1e-3)


def test_the_cost_of_taps_is_linear_in_the_pixels() -> None:
    made, found = attention(kernel_size=5), []
    for side in (8, 16):
        with torch.no_grad(), Products() as products:
            made(torch.randn(1, side, side + 4, 16))
        assert products.total == 2 * side * (side + 4) * 25 * 16
    for side in (32, 64):
        model = small()
        with torch.no_grad(), Products() as products:
            model(torch.randn(1, 3, side, side))
        assert products.total == attention_macs(model, (side, side))
        found.append(products.total)
    assert found[1] == 4 * found[0]


def test_pooled_keys_are_means_of_cells_around_the_pixels_own() -> None:
    made, x = attention(pools=True, kernel_size=1), torch.randn(2, 5, 6, 16)
    with torch.no_grad():
        value = made.qkv(cells(x)).chunk(3, dim=-1)[2]  # one tap: its own cell
        spread = value.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, :5, :6]
        torch.testing.assert_close(made(x), made.proj(spread))
    assert cells(x).shape == (2, 3, 3, 16)
    torch.testing.assert_close(cells(x)[:, 1, 2], x[:, 2:4, 4:6].mean(dim=(1, 2)))
    torch.testing.assert_close(cells(x)[:, 2, 0], x[:, 4, :2].mean(dim=1))


@pytest.mark.parametrize(("pools", "reach"), [(False, 1), (True, 2)])
def test_pooling_doubles_the_reach(pools, reach) -> None:
    made, x = attention(pools=pools), torch.zeros(1, 12, 12, 16)
    other = x.clone()
    other[0, 6, 6] += torch.randn(16)
    with torch.no_grad():
        changed = (made(x) - made(other)).abs().amax(dim=(0, 3)) > 0
    rows = changed.any(dim=1).nonzero().flatten().tolist()
    assert rows == list(range(6 - reach, 8 + reach if pools else 7 + reach))


def test_the_cyclic_shift_brings_each_group_from_another_side() -> None:
    x = torch.randn(1, 6, 8, 8)
    found = cyclic(x)
    assert torch.equal(found[:, 0, :, :2], x[:, 3, :, :2])
    assert torch.equal(found[:, 5, :, 2:4], x[:, 2, :, 2:4])
    assert torch.equal(found[:, :, 0, 4:6], x[:, :, 4, 4:6])
    assert torch.equal(found[:, :, 7, 6:], x[:, :, 3, 6:])
    odd = torch.randn(1, 5, 5, 8)
    assert not torch.equal(cyclic(odd)[..., :2], odd[..., :2].roll(2, 1))
    with pytest.raises(ValueError, match="four groups"):
        TapAttention(6, 1, 3, shifts=True)


def test_odd_blocks_have_the_mechanisms_and_options_take_them_away() -> None:
    for arguments in ({}, {"cyclic_shift": False}, {"inter_pool": False}):
        far = [arguments.get(name, True) for name in ("cyclic_shift", "inter_pool")]
        for stage in small(**arguments).stages:
            found = [[block.attn.shifts, block.attn.pools] for block in stage.blocks]
            assert found == [[False, False], far]


def test_the_weights_know_no_size() -> None:
    model = small()
    other = small(img_size=(48, 40))
    xp.load_released(other, {"model": model.state_dict()})
    with torch.no_grad():
        for size in ((48, 40), (33, 50), (3, 5)):
            x = torch.randn(1, 3, *size)
            assert torch.equal(model(x), other(x))
    assert checkpoint_filter_fn(model.state_dict(), model).keys() == model.state_dict().keys()


def test_without_the_mechanisms_a_shift_inside_is_a_shift() -> None:
    model = small(cyclic_shift=False, inter_pool=False, depths=(2,), embed_dims=(32,))
    x = torch.randn(1, 3, 48, 48)
    with torch.no_grad():
        a, b = (model.forward_features(y) for y in (x, x.roll((4, 2), (2, 3))))
    inner = (..., slice(5, -5), slice(5, -5), slice(None))
    assert (a.roll((2, 1), (1, 2)) - b)[inner].abs().max() < 1e-6


def test_the_layer_is_offered_beside_the_network() -> None:
    from crosspatch.models import tic

    assert tic.MSAConv is MSAConv


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"depths": (1, 1)}, "one a stage"),
        ({"head_dim": 7}, "heads of 7"),
        ({"kernel_size": 4}, "odd sides"),
        ({"global_pool": "token"}, "global_pool"),
    ],
)
def test_impossible_shapes_are_refused(arguments, words) -> None:
    with pytest.raises(UsageError, match=words):
        xp.create_model("tic_micro_32", **arguments)
