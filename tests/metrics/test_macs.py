"""MAC counting against figures worked out by hand."""

from __future__ import annotations

import torch
from torch import nn

from crosspatch.layers.attention import Attention
from crosspatch.metrics.macs import count_macs


def test_a_convolution_and_a_linear_layer_by_hand() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 64, 5))
    assert count_macs(net, (3, 16, 16)) == 8 * 64 * 27 + 8 * 64 * 5


def test_attention_by_hand_and_modes_are_kept() -> None:
    net = nn.Sequential(nn.Conv2d(1, 8, 1), nn.Flatten(2), nn.Linear(8, 8), Attention(8, 2))
    net[0].eval()
    assert net.training
    tokens = 8
    expected = 8 * 8 + tokens * 8 * 8 + tokens * 8 * 32 + 2 * tokens * tokens * 8
    assert count_macs(net, (1, 2, 4)) == expected
    assert net.training


def test_more_than_one_picture_is_never_counted() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    assert count_macs(net, (3, 2, 2)) == 24
    assert torch.is_grad_enabled()
