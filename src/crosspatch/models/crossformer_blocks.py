# SPDX-License-Identifier: Apache-2.0
"""CrossFormer's blocks: attention in groups of near or of distant tokens, and its position bias.

See `crossformer` for the paper. Maps are channels last, (B, H, W, C), and of any size: what a map
is cut into is decided at every call.
"""

from __future__ import annotations

from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import crosspatch._torchvision  # noqa: F401

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from crosspatch.layers.attention import check_heads
from crosspatch.layers.linear import Linear
from crosspatch.layers.maps import on_channels
from crosspatch.layers.mlp import Mlp
from crosspatch.layers.precision import full_precision
from crosspatch.layers.windows import Size, attend, relative_bias, relative_index

HIDDEN = -3e4  # on the logits of padding: half precision holds it, and its softmax is 0
PADDINGS = (0, 1)

# ---------------------------------------------------------------------- groups


class Cut(NamedTuple):
    """How a map of `size` falls into groups of group x group tokens, `interval` apart.

    before, after: (rows, columns) of padding at the top and left, at the bottom and right.
    """

    size: Size
    group: int
    interval: int
    before: Size
    after: Size

    @property
    def padded(self) -> bool:
        """Whether the groups hold more than the map."""
        return (*self.before, *self.after) != (0, 0, 0, 0)


class Grouping(NamedTuple):
    """The groups of a block. interval: 1 for near tokens (SDA), more for distant ones (LDA); None:
    as wide as the map is high, ceil(H / group). pad_type: 0 pads bottom and right, 1 all sides."""

    group: int
    interval: int | None
    pad_type: int = 0

    def of(self, size: Size) -> Cut:
        """The cut of a map. One that is no larger than a group on an axis has near groups alone, as
        large as its smaller side."""
        group = min(self.group, *size)
        interval = -(-size[0] // group) if self.interval is None else self.interval
        interval = 1 if min(size) <= self.group else interval
        spare = -size[0] % (group * interval), -size[1] % (group * interval)
        before = (spare[0] // 2, spare[1] // 2) if self.pad_type else (0, 0)
        after = spare[0] - before[0], spare[1] - before[1]
        return Cut(size, group, interval, before, after)


def to_groups(x: Tensor, cut: Cut, value: float = 0.0) -> Tensor:
    """(B, H, W, C) to (B, groups, group**2, C), padded with `value`.

    A region of (group * interval)**2 tokens gives interval**2 groups: one for every remainder of
    row and column.
    """
    (top, left), (down, right), g, i = cut.before, cut.after, cut.group, cut.interval
    if cut.padded:
        x = F.pad(x, (0, 0, left, right, top, down), value=value)
    rows, columns, c = x.shape[1] // (g * i), x.shape[2] // (g * i), x.shape[3]
    x = x.reshape(-1, rows, g, i, columns, g, i, c).permute(0, 1, 4, 3, 6, 2, 5, 7)
    return x.reshape(-1, rows * columns * i * i, g * g, c)


def from_groups(x: Tensor, cut: Cut) -> Tensor:
    """(B, groups, group**2, C) back to (B, H, W, C), without the padding."""
    (height, width), (top, left), g, i = cut.size, cut.before, cut.group, cut.interval
    rows = (top + height + cut.after[0]) // (g * i)
    columns, c = (left + width + cut.after[1]) // (g * i), x.shape[3]
    x = x.reshape(-1, rows, columns, i, i, g, g, c).permute(0, 1, 5, 3, 2, 6, 4, 7)
    x = x.reshape(-1, rows * g * i, columns * g * i, c)
    return x[:, top : top + height, left : left + width] if cut.padded else x


def group_mask(cut: Cut, device: torch.device | None = None) -> Tensor | None:
    """(groups, 1, keys) added to the logits: `HIDDEN` on padding; None where there is none."""
    if not cut.padded:
        return None
    real = torch.zeros(1, *cut.size, 1, device=device)
    return to_groups(real, cut, HIDDEN)[0].transpose(1, 2)


# ---------------------------------------------------------------------- the position bias


def offsets(group: int, device: torch.device | None = None) -> Tensor:
    """((2 group - 1)**2, 2): every (dy, dx) between two tokens of a group, rows before columns."""
    side = 2 * group - 1
    place = torch.arange(side * side, device=device)
    return torch.stack([place // side, place % side], dim=1) - (group - 1)


class DynamicPosBias(nn.Module):
    """A table of biases from a small network of the offset: ((2 group - 1)**2, heads), any group.

    Linear 2 -> dim, then three times LayerNorm, ReLU, Linear: to dim, to dim, to heads. Offsets are
    whole numbers as they are; autocast is off, as half precision would blur them.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.pos_proj = Linear(2, dim)
        widths = (dim, dim, heads)
        self.pos1, self.pos2, self.pos3 = (
            nn.Sequential(nn.LayerNorm(dim), nn.ReLU(), Linear(dim, width)) for width in widths
        )

    def forward(self, places: Tensor) -> Tensor:
        """places: (offsets, 2), of `offsets`."""
        with full_precision(places):
            return self.table(places)

    def table(self, places: Tensor) -> Tensor:
        """What `forward` gives, in the precision of the weights."""
        x = self.pos_proj(places.to(self.pos_proj.weight.dtype))
        return self.pos3(self.pos2(self.pos1(x)))


# ---------------------------------------------------------------------- attention and block

_KEPT: WeakKeyDictionary[nn.Module, tuple[tuple, Tensor, list]] = WeakKeyDictionary()
"""Of an attention: the state that its bias belongs to, the bias, and the weights, so that no other
takes their place in memory. Not on the module: copies and files of it know nothing of this."""


def _is_watched(module: nn.Module) -> bool:
    """Whether a pass must compute everything: it has gradients, or is traced or counted."""
    return (
        module.training
        or torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def _state(network: nn.Module, group: int) -> tuple | None:
    """What tells whether weights have changed; None where torch does not count changes."""
    weights = list(network.parameters())
    if any(weight.is_inference() for weight in weights):
        return None
    return group, *((id(weight), weight._version) for weight in weights)


class GroupAttention(nn.Module):
    """Multi-head self-attention within groups of tokens, near or distant.

    size: (H, W) of the maps to come: their indices and mask are then constants of the module (not
    in the state dict); other maps make theirs on the way. pos_dim: width of the position network.
    Raises ValueError where the width does not divide by the heads.
    """

    places: Tensor
    index: Tensor
    mask: Tensor | None

    def __init__(
        self,
        dim: int,
        heads: int,
        grouping: Grouping,
        *,
        size: Size,
        pos_dim: int,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        check_heads(dim, heads)
        self.num_heads, self.grouping, self.attn_drop = heads, grouping, attn_drop
        self.cut = grouping.of(size)
        self.register_buffer("places", offsets(self.cut.group), persistent=False)
        index = relative_index((self.cut.group, self.cut.group))
        self.register_buffer("index", index, persistent=False)
        self.register_buffer("mask", group_mask(self.cut), persistent=False)
        self.pos = DynamicPosBias(pos_dim, heads)
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, H, W, C), of any size. Returns the same shape."""
        cut = self.grouping.of((x.shape[1], x.shape[2]))
        mask = self.mask if cut == self.cut else group_mask(cut, x.device)
        q, k, v = self.qkv(to_groups(x, cut)).chunk(3, dim=-1)
        drop = self.attn_drop if self.training else 0.0
        y = attend(q, k, v, self.num_heads, self.bias(cut.group), mask, drop)
        return from_groups(self.proj_drop(self.proj(y)), cut)

    def bias(self, group: int) -> Tensor:
        """(heads, group**2, group**2), added to the logits of every group; kept between passes of
        an evaluation without gradients, while its weights stay as they are."""
        state = None if _is_watched(self) else _state(self.pos, group)
        if state is None:
            if not torch.compiler.is_compiling():
                _KEPT.pop(self, None)
            return self.fresh_bias(group)
        kept = _KEPT.get(self)
        if kept is None or kept[0] != state:
            _KEPT[self] = kept = state, self.fresh_bias(group), list(self.pos.parameters())
        return kept[1]

    def fresh_bias(self, group: int) -> Tensor:
        """The bias, computed."""
        if group == self.cut.group:
            return relative_bias(self.pos(self.places), self.index)
        device = self.places.device
        index = relative_index((group, group), device)
        return relative_bias(self.pos(offsets(group, device)), index)

    def _apply(self, *arguments: Any, **named: Any) -> GroupAttention:
        _KEPT.pop(self, None)
        return super()._apply(*arguments, **named)

    def extra_repr(self) -> str:
        return f"group={self.grouping.group}, interval={self.grouping.interval}"


class CrossFormerBlock(nn.Module):
    """Group attention and MLP, each added to a map (B, H, W, C) behind a norm of its own.

    acl: the amplitude cooling layer at the end, LN(depthwise 3x3), to which nothing is added.
    attention: further arguments of `GroupAttention`.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        grouping: Grouping,
        *,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        proj_drop: float = 0.0,
        acl: bool = False,
        **attention,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = GroupAttention(dim, heads, grouping, proj_drop=proj_drop, **attention)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.acl = acl
        if acl:
            self.ex_conv = nn.Conv2d(dim, dim, 3, 1, 1, groups=dim)
            self.ex_ln = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        return self.ex_ln(on_channels(self.ex_conv, x)) if self.acl else x
