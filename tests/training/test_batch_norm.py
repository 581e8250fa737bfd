"""Norms over all processes: with one process they are the norms they were made of."""

from __future__ import annotations

import copy

import crosspatch._torchvision  # noqa: F401

import pytest
import torch
import torch.distributed as dist
from timm.layers import BatchNormAct2d
from torch import nn

from crosspatch.training.batch_norm import SharedBatchNorm, share_norms


@pytest.fixture
def alone(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("make", [nn.BatchNorm2d, BatchNormAct2d])
def test_in_one_process_nothing_changes(alone, make):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 5, 1), make(5))
    nn.init.normal_(plain[1].weight)
    shared = share_norms(copy.deepcopy(plain))
    assert isinstance(shared[1], SharedBatchNorm)
    for _ in range(3):
        x = torch.randn(4, 3, 6, 6)
        torch.testing.assert_close(shared(x), plain(x))
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(shared.get_buffer(name), buffer)
    torch.testing.assert_close(shared.eval()(x), plain.eval()(x))
