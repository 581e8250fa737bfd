# SPDX-License-Identifier: Apache-2.0
"""ScaleKD's heads: the cross-attention projector and the two views in which maps are compared.

"ScaleKD: Strong Vision Transformers Could Be Excellent Teachers", arXiv 2411.06786, NeurIPS 2024.
A student's map x (B, Cs, h, w) becomes the tokens of a teacher's (B, H*W, Ct):

    k  = ReLU(BN(Conv3x3(x))) + P           q0 = ReLU(Conv1x1(query))
    a  = W softmax(5 (Wq q0)(Wk k)^T / sqrt(d)) Wv k
    z  = LN(a);   out = z + W2 ReLU(W1 z)

The attention has no residual, and that of the last layers starts from the normalised tokens. The
query is learned, or tokens from outside, which always come before a learned one. View B of a map is
the map less the spatial mean of every channel: a DCT-II whose first coefficient is 0, inverted.

    loss = alpha sum((s / |s| - t / |t|)^2) / B         |.| over channels, at every position

Departures: the authors fix the grids to 14x14 and 7x7 at 224 pixels; here positions and learned
queries are resized (bilinear) where a map is of another size. Names of parameters are the authors'.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import crosspatch._torchvision  # noqa: F401

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

HEADS = 8  # where none are given
FACTOR = 5.0  # of the attention's logits
ALPHAS = (0.08, 0.06)


class Attention(nn.Module):
    """Tokens q (B, M, Ct) ask tokens x (B, N, Cs): (B, M, Ct)."""

    def __init__(self, student: int, teacher: int, heads: int, factor: float) -> None:
        super().__init__()
        self.heads, self.factor = heads, factor
        self.q = nn.Linear(teacher, teacher)
        self.k = nn.Linear(student, teacher)
        self.v = nn.Linear(student, teacher)
        self.proj = nn.Linear(teacher, teacher)

    def forward(self, q: Tensor, x: Tensor) -> Tensor:
        q, k, v = (
            y.unflatten(2, (self.heads, -1)).transpose(1, 2)
            for y in (self.q(q), self.k(x), self.v(x))
        )
        scale = self.factor * q.shape[-1] ** -0.5
        found = F.scaled_dot_product_attention(q, k, v, scale=scale)
        return self.proj(found.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Linear, ReLU, Linear, and what came in."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Sequential(nn.Linear(dim, 4 * dim), nn.ReLU()), nn.Linear(4 * dim, dim)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class Projector(nn.Module):
    """The cross-attention projector.

    student_dims, teacher_dims: widths Cs and Ct; query_hw: the teacher's grid; pos_hw: the
    student's; pos_dims: width of the query (None: Ct); self_query: whether it is learned; num_heads
    divides Ct (None: `heads_for`). Raises ValueError where it does not.
    """

    def __init__(
        self,
        student_dims: int,
        teacher_dims: int,
        query_hw: tuple[int, int],
        pos_hw: tuple[int, int],
        pos_dims: int | None = None,
        self_query: bool = True,
        softmax_scale: float = FACTOR,
        num_heads: int | None = None,
    ) -> None:
        super().__init__()
        heads = num_heads or heads_for(teacher_dims)
        if teacher_dims % heads:
            raise ValueError(f"{heads} heads of a teacher's map of {teacher_dims} channels")
        width = pos_dims or teacher_dims
        self.query_hw = (query_hw[0], query_hw[1])
        self.proj_pos = nn.Sequential(nn.Conv2d(width, teacher_dims, 1), nn.ReLU())
        self.proj_student = nn.Sequential(
            nn.Conv2d(student_dims, student_dims, 3, padding=1),
            nn.BatchNorm2d(student_dims),
            nn.ReLU(),
        )
        self.pos_embed = nn.Parameter(torch.zeros(1, student_dims, *pos_hw))
        self.pos_attention = Attention(student_dims, teacher_dims, heads, softmax_scale)
        self.ffn = FeedForward(teacher_dims)
        self.norm = nn.LayerNorm(teacher_dims)
        self.query = nn.Embedding(math.prod(query_hw), width) if self_query else None
        trunc_normal_(self.pos_embed, std=0.02)

    def forward(
        self, x: Tensor, query: Tensor | None = None, grid: tuple[int, int] | None = None
    ) -> Tensor:
        """x: (B, Cs, h, w) -> (B, H*W, Ct). query: (B, H*W, Ct) tokens of the grid (H, W), or None
        for the learned ones. Raises ValueError where there are neither."""
        grid = grid or self.query_hw
        asked = self._query(x, query, grid)
        keys = self.proj_student(x) + _resized(self.pos_embed, tuple(x.shape[2:]))
        asked, keys = (y.flatten(2).transpose(1, 2) for y in (self.proj_pos(asked), keys))
        return self.ffn(self.norm(self.pos_attention(asked, keys)))

    def _query(self, x: Tensor, query: Tensor | None, grid: tuple[int, int]) -> Tensor:
        if query is not None:
            return query.transpose(1, 2).unflatten(2, grid)
        if self.query is None:
            raise ValueError("a projector without a query of its own needs one from outside")
        learned = self.query.weight.T.unflatten(1, self.query_hw)[None]
        return _resized(learned, grid).expand(len(x), -1, -1, -1)


class DualView(nn.Module):
    """A projector for each of two views: `projector_0` compares maps, `projector_1` maps less their
    means. Arguments are those of `Projector`, alpha and softmax_scale one for each view."""

    def __init__(
        self,
        student_dims: int,
        teacher_dims: int,
        query_hw: tuple[int, int],
        pos_hw: tuple[int, int],
        pos_dims: int | None = None,
        self_query: bool = True,
        softmax_scale: Sequence[float] = (FACTOR, FACTOR),
        num_heads: int | None = None,
        alpha: Sequence[float] = ALPHAS,
    ) -> None:
        super().__init__()
        shape = (student_dims, teacher_dims, query_hw, pos_hw, pos_dims, self_query)
        self.alpha = tuple(alpha)
        self.projector_0 = Projector(*shape, softmax_scale[0], num_heads)
        self.projector_1 = Projector(*shape, softmax_scale[1], num_heads)

    def forward(
        self, x: Tensor, teacher: Tensor, query: Tensor | Sequence[Tensor] | None = None
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """x (B, Cs, h, w), teacher's map (B, Ct, H, W), queries from outside (B, H*W, Ct), one for
        each view or one for both -> tokens (B, H*W, Ct) of both views, and their losses."""
        grid = (teacher.shape[2], teacher.shape[3])
        queries = (query, query) if query is None or isinstance(query, Tensor) else query
        spatial = self.projector_0(x, queries[0], grid)
        other = self.projector_1(x, queries[1], grid)
        losses = tuple(
            alpha * mimicry(as_grid(tokens, grid), teacher, centred=centred).mean()
            for alpha, tokens, centred in zip(
                self.alpha, (spatial, other), (False, True), strict=True
            )
        )
        return (spatial, other), (losses[0], losses[1])


def heads_for(width: int) -> int:
    """8, or the greatest number below that divides a width."""
    return next(n for n in range(HEADS, 0, -1) if width % n == 0)


def as_grid(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, H*W, C) -> (B, C, H, W)."""
    return tokens.transpose(1, 2).unflatten(2, grid)


def without_mean(x: Tensor) -> Tensor:
    """x (B, C, H, W) less the spatial mean of every channel: view B."""
    return x - x.mean(dim=(2, 3), keepdim=True)


def mimicry(student: Tensor, teacher: Tensor, *, centred: bool) -> Tensor:
    """How far two maps (B, C, H, W) are apart in direction, for each picture (B,), float32.

    centred: as view B, less their means.
    """
    pair = [x.float() for x in (student, teacher)]
    if centred:
        pair = [without_mean(x) for x in pair]
    s, t = (F.normalize(x, dim=1) for x in pair)
    return (s - t).square().sum(dim=(1, 2, 3))


def logit_mimicry(student: Tensor, teacher: Tensor, tau: float) -> Tensor:
    """tau^2 CE(softmax(teacher / tau), softmax(student / tau)) for each picture (B,), in nats."""
    wanted = F.softmax(teacher.float() / tau, dim=-1)
    return -(wanted * F.log_softmax(student.float() / tau, dim=-1)).sum(dim=-1) * tau**2


def dct(x: Tensor) -> Tensor:
    """DCT-II over the last two dimensions, any H and W; of each 2 sum x cos(pi k (2n + 1) / 2N)."""
    rows, columns = (_cosines(n, x) for n in x.shape[-2:])
    return rows @ x @ columns.transpose(0, 1)


def inverse_dct(x: Tensor) -> Tensor:
    """The inverse of `dct`, a scaled DCT-III."""
    rows, columns = (_scaled(n, x) for n in x.shape[-2:])
    return rows.transpose(0, 1) @ x @ columns


def _cosines(n: int, like: Tensor) -> Tensor:
    k = torch.arange(n, dtype=torch.float64)
    return (2 * torch.cos(torch.pi * k[:, None] * (k[None] + 0.5) / n)).to(like)


def _scaled(n: int, like: Tensor) -> Tensor:
    """Rows of `_cosines` so scaled that its transpose is the inverse: the first by 1 / 4n, the
    others by 1 / 2n."""
    rows = _cosines(n, like) / (2 * n)
    rows[0] /= 2
    return rows


def _resized(x: Tensor, size: Sequence[int]) -> Tensor:
    if tuple(x.shape[2:]) == tuple(size):
        return x
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=False)
