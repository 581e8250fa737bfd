# SPDX-License-Identifier: Apache-2.0
"""Batch normalisation over the pictures of all processes.

A batch that several processes share has one mean and one variance, as it has in one process (Ioffe
and Szegedy 2015, arXiv 1502.03167, over the whole batch). torch's own SyncBatchNorm needs a GPU.
"""

from __future__ import annotations

from typing import Any

import crosspatch._torchvision  # noqa: F401

import torch
import torch.distributed as dist
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

_KINDS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, BatchNormAct2d)


class _Total(torch.autograd.Function):
    """The sum over the processes; so is its gradient."""

    @staticmethod
    def forward(ctx: object, value: Tensor) -> Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total)
        return total


class SharedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """What nn.BatchNormNd does, with the statistics of all processes while it trains; then what
    timm's norm with an activation has behind it (its children).

    x: (B, C, ...); B may differ between processes.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"expected (B, C, ...), got {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        found = self._normalised(input) if self.training else super().forward(input)
        for behind in self.children():
            found = behind(found)
        return found

    def _normalised(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        axes = [0, *range(2, input.ndim)]
        shape = [1, -1, *[1] * (input.ndim - 2)]
        values = input.to(torch.promote_types(input.dtype, torch.float32))
        size = values.new_tensor([values.numel() / values.shape[1]])
        totals = _Total.apply(torch.cat([values.sum(axes), size]))
        mean, count = totals[:-1] / totals[-1], totals[-1].detach()
        centred = values - mean.view(shape)
        variance = _Total.apply(centred.square().sum(axes)) / count
        self._follow(mean.detach(), variance.detach(), count)
        found = centred * torch.rsqrt(variance + self.eps).view(shape)
        if self.affine:
            found = torch.addcmul(self.bias.view(shape), found, self.weight.view(shape))
        return found.to(input.dtype)

    @torch.no_grad()
    def _follow(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        """Move the running statistics; the variance of a sample is unbiased there."""
        if self.running_mean is None or self.running_var is None:
            return
        self.num_batches_tracked.add_(1)  # type: ignore[union-attr]
        share = self.momentum if self.momentum is not None else 1 / self.num_batches_tracked
        self.running_mean.lerp_(mean, float(share))
        self.running_var.lerp_(variance * count / (count - 1).clamp(min=1), float(share))


def share_norms(module: nn.Module) -> nn.Module:
    """The module with every batch normalisation over all processes, its weights and names kept."""
    for name, child in module.named_children():
        setattr(module, name, share_norms(child))
    if type(module) not in _KINDS:
        return module
    norm: Any = SharedBatchNorm(1)
    norm.__dict__ |= {key: value for key, value in vars(module).items() if key != "forward"}
    return norm
