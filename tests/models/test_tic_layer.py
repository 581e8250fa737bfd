"""MSA-Conv: the authors' numbers, and the layer by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import crosspatch as xp
from crosspatch.models.tic_layer import MSAConv, neighbourhood_attention
from support import goldens

ODD = st.sampled_from([1, 3, 5])


def layer(*shape, **arguments) -> MSAConv:
    torch.manual_seed(0)
    return MSAConv(*shape, **arguments).eval()


def unfolded(made: MSAConv, x: torch.Tensor) -> torch.Tensor:
    """o by the formula of the paper: all neighbours beside each other."""
    (height, width), heads = x.shape[2:], made.heads
    margin = [d * (k - 1) // 2 for k, d in zip(made.kernel, made.dilation, strict=True)]
    q, k, v = made.qkv_conv(x).chunk(3, dim=1)
    shape = (x.shape[0], heads, x.shape[1] // heads, -1, height * width)
    k, v = (F.unfold(y, made.kernel, made.dilation, margin).reshape(shape) for y in (k, v))
    logits = (q.reshape(shape) * k).sum(2, keepdim=True) / shape[2] ** 0.5
    return (logits.softmax(3) * v).sum(3).reshape(x.shape) + x


@pytest.mark.parametrize("name", ["msa_conv_k3", "msa_conv_k3_d2"])
def test_the_layer_computes_what_the_authors_code_computes(name) -> None:
    golden = goldens.read(f"tic/{name}")
    made = MSAConv.from_authors(**golden.meta["build"]).eval()
    xp.load_released(made, golden.state_dict)
    with torch.no_grad():
        found = made(golden.images)
        assert goldens.relative_error(found, golden.outputs["out"]) < 1e-5
        made.qkv_conv.bias.data.add_(0.1)
        assert goldens.relative_error(made(golden.images), golden.outputs["out"]) > 1e-3
    assert sum(p.numel() for p in made.parameters()) == golden.meta["params"]


def test_the_authors_names_and_defaults() -> None:
    made = MSAConv.from_authors(
        input_channel=12, output_channel=20, kernel_size=5, stride=2, padding=2, bias=True
    )
    assert list(made.state_dict()) == [
        "qkv_conv.weight", "qkv_conv.bias", "mlp.weight", "mlp.bias"
    ]  # fmt: skip
    assert made(torch.randn(1, 12, 20, 28)).shape == (1, 20, 10, 14)
    theirs = MSAConv.from_authors(input_channel=4, output_channel=4, kernel_size=5)
    assert theirs(torch.randn(1, 4, 9, 9)).shape == (1, 4, 7, 7)  # their padding is 1 for every one
    assert theirs.attn_drop == 0.1
    assert layer(4, 4, 5)(torch.randn(1, 4, 9, 9)).shape == (1, 4, 9, 9)


@settings(deadline=None, max_examples=20)
@given(ODD, ODD, st.integers(1, 3), st.integers(1, 3), st.sampled_from([1, 2, 4, 8]))
def test_taps_are_the_unfolded_formula(rows, columns, down, right, heads) -> None:
    made = layer(8, 6, (rows, columns), dilation=(down, right), heads=heads).double()
    x = torch.randn(2, 8, 7, 6, dtype=torch.float64, requires_grad=True)
    told = torch.randn(2, 8, 7, 6, dtype=torch.float64)
    (mine,) = torch.autograd.grad(made.attend(x), x, told)
    (theirs,) = torch.autograd.grad(unfolded(made, x), x, told)
    torch.testing.assert_close(made.attend(x), unfolded(made, x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


def test_what_lies_outside_stays_in_the_softmax() -> None:
    q = k = torch.zeros(1, 3, 3, 4)
    v = torch.ones(1, 3, 3, 4)
    found = neighbourhood_attention(q[:, :, :, None], k, v, (3, 3))[0, :, :, 0, 0]
    expected = torch.tensor([[4.0, 6.0, 4.0], [6.0, 9.0, 6.0], [4.0, 6.0, 4.0]]) / 9
    torch.testing.assert_close(found, expected)


def test_a_kernel_of_one_gives_the_values() -> None:
    made, x = layer(8, 8, 1), torch.randn(2, 8, 5, 7)
    with torch.no_grad():
        v = made.qkv_conv(x).chunk(3, dim=1)[2]
        torch.testing.assert_close(made.attend(x), v + x)
        torch.testing.assert_close(made(x), made.mlp(v + x).relu())


def test_one_layer_takes_any_size_and_a_shift_inside_is_a_shift() -> None:
    made = layer(6, 5, 5, dilation=2)
    with torch.no_grad():
        for size in ((21, 17), (20, 28), (1, 1)):
            assert made(torch.randn(1, 6, *size)).shape == (1, 5, *size)
        x = torch.randn(1, 6, 40, 44)
        a, b = made(x), made(x.roll((3, -2), (2, 3)))
    far = 4 + 2 + 3  # of the dilated window, of the convolution, of the shift
    inner = (..., slice(far, -far), slice(far, -far))
    assert (a.roll((3, -2), (2, 3)) - b)[inner].abs().max() < 1e-6
    assert (a.roll((3, -2), (2, 3)) - b).abs().max() > 1e-2


def test_the_depth_wise_form_has_a_softmax_a_channel() -> None:
    made, x = layer(4, 4, heads=4), torch.randn(1, 4, 6, 6)
    other = x.clone()
    with torch.no_grad():
        made.qkv_conv.weight.zero_()
        made.qkv_conv.weight[range(12), [0, 1, 2, 3] * 3] = 1  # q = k = v = x
        other[:, 2] += 1
        changed = (made.attend(x) - made.attend(other)).abs().amax(dim=(0, 2, 3)) > 0
    assert changed.tolist() == [False, False, True, False]


def test_low_precision_is_raised_within() -> None:
    made, x = layer(8, 8), torch.randn(1, 8, 6, 6)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert made(x).isfinite().all()
    half = layer(8, 8).bfloat16()
    with torch.no_grad():
        assert half(x.bfloat16()).dtype == torch.bfloat16
        torch.testing.assert_close(half(x.bfloat16()).float(), made(x), atol=0.1, rtol=0.1)


def test_dropout_is_of_training_alone() -> None:
    made, x = layer(8, 8, attn_drop=0.5), torch.randn(1, 8, 6, 6)
    with torch.no_grad():
        assert torch.equal(made(x), made(x))
        made.train()
        assert not torch.equal(made(x), made(x))


def test_impossible_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="odd sides"):
        MSAConv(8, 8, 4)
    with pytest.raises(ValueError, match="divide by 3 heads"):
        MSAConv(8, 8, heads=3)
