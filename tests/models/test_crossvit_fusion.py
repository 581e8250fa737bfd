"""Attention by the class token alone, against attention by all."""

from __future__ import annotations

import pytest
import torch

from crosspatch.layers.attention import Attention
from crosspatch.models.crossvit_fusion import CrossAttention


@pytest.mark.parametrize("biased", [False, True])
def test_cross_attention_is_the_first_row_of_attention(biased: bool) -> None:
    cross, full = CrossAttention(12, 3), Attention(12, 3)
    weights = torch.cat([cross.wq.weight, cross.wk.weight, cross.wv.weight])
    biases = torch.cat([cross.wq.bias, cross.wk.bias, cross.wv.bias])
    full.qkv.weight.data, full.qkv.bias.data = weights, biases
    full.proj = cross.proj
    x, bias = torch.randn(2, 7, 12), torch.randn(2, 7) if biased else None
    with torch.no_grad():
        assert torch.allclose(cross(x, bias), full(x, bias)[:, :1], atol=1e-6)
        q, k = full.qk(x)
        assert torch.allclose(cross.class_row(x, bias), full.class_row(q, k, bias), atol=1e-6)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("qkv_bias", [False, True])
def test_a_folded_query_gathers_what_keys_and_values_give(biased, qkv_bias, monkeypatch) -> None:
    layer = CrossAttention(24, 3, qkv_bias=qkv_bias)
    x = torch.randn(2, 11, 24, generator=torch.Generator().manual_seed(5)).requires_grad_()
    bias = torch.rand(2, 11) if biased else None
    found = []
    for folded in (True, False):
        monkeypatch.setattr(CrossAttention, "folded", folded)
        y = layer(x, bias)
        found.append([y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_a_folded_query_drops_attention_as_often(monkeypatch) -> None:
    """The mean over many masks is the undropped answer, biases included."""
    layer = CrossAttention(12, 2, attn_drop=0.3)
    with torch.no_grad():
        layer.wv.bias.normal_()
    x = torch.randn(1, 7, 12).expand(20_000, -1, -1)
    torch.manual_seed(0)
    with torch.no_grad():
        torch.testing.assert_close(
            layer.train()(x).mean(dim=0), layer.eval()(x[:1])[0], rtol=0.02, atol=0.02
        )
