# SPDX-License-Identifier: Apache-2.0
"""The two-layer perceptron of a transformer block."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from crosspatch.layers.linear import Linear


class Mlp(nn.Module):
    """Linear, activation, Linear, with timm's names `fc1` and `fc2`; (..., C) to (..., C)."""

    def __init__(
        self,
        dim: int,
        hidden: int,
        *,
        act: Callable[[], nn.Module] = nn.GELU,
        bias: bool = True,
        drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden, bias=bias)
        self.act = act()
        self.drop1 = nn.Dropout(drop)
        self.fc2 = Linear(hidden, dim, bias=bias)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop2(self.fc2(self.drop1(self.act(self.fc1(x)))))
