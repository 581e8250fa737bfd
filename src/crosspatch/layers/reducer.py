# SPDX-License-Identifier: Apache-2.0
"""The seam of token reduction: what a reducer may do at each place of a block.

Nothing is stored on a module while it runs; whatever a reducer hands on stands in
`TokenState.carry`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from crosspatch.layers.tokens import TokenState


class AttentionStats(NamedTuple):
    """What an attention layer shows to a reducer that asked for it; the rest is None.

    keys: (B, heads, N, d). class_row: (B, heads, N), attention of the first token. full_map:
    (B, heads, N, N).
    """

    keys: Tensor | None = None
    class_row: Tensor | None = None
    full_map: Tensor | None = None


class Reducer(nn.Module):
    """Hooks over an explicit state, every one of them optional. Called in this order:

    `instead` (of the whole block), `before_attention`, `bias`, `between` (softmax and values, only
    where the full map is wanted), `after_attention`, `after_block`; `pool` once after the last
    block, `decide` once on the logits. A block for which `active` is false takes the untouched
    path. A subclass resolves its schedule when it is built.
    """

    needs: frozenset[str] = frozenset()
    counts: tuple[int, ...] = ()
    """Tokens (prefix included) that enter each block, then those that leave the last."""

    def active(self, block: int) -> bool:
        """Whether the hooks run at this block (0-based over the whole sequence of blocks)."""
        return True

    def wants(self, block: int) -> frozenset[str]:
        """What the attention of this block must show: out of "keys", "class_row", "full_map" (the
        map that is used, which `between` may change) and "map" (beside the fused kernel, without a
        gradient)."""
        return self.needs

    def prefix_only(self, block: int) -> bool:
        """Whether this block, if it is the last and only prefix tokens are read after it, may
        compute those alone, with `bias` and without any other hook and `pool`."""
        return False

    def rebuild(self, blocks: list[Any]) -> None:
        """Called once, when it is put on (a copy of) a host: may change the shapes of its
        blocks."""

    def instead(self, module: Any, state: TokenState, block: int) -> TokenState | None:
        """The block's output, computed in another way than by its own forward; None: its own."""
        return None

    def before_attention(self, state: TokenState, block: int) -> TokenState:
        """Called with the block's input."""
        return state

    def bias(self, state: TokenState, block: int) -> Tensor | None:
        """(B, N) added to every attention logit of a key, such as the log of its size, or None."""
        return state.sizes.log() if state.sizes is not None else None

    def between(
        self, state: TokenState, attention: Tensor, block: int
    ) -> tuple[TokenState, Tensor]:
        """Between softmax and values, where "full_map" is wanted: the state whose tokens give the
        values and take the residual (B, N', C), and the map for it (B, heads, N', N')."""
        return state, attention

    def after_attention(self, state: TokenState, block: int, stats: AttentionStats) -> TokenState:
        """Called between the attention's residual and the MLP."""
        return state

    def after_block(self, state: TokenState, block: int) -> TokenState:
        """Called with the block's output."""
        return state

    def pool(self, state: TokenState) -> TokenState:
        """Called once after the last block, before the final norm."""
        return state

    def decide(self, state: TokenState, logits: Tensor) -> Tensor:
        """The logits (B, K) that are returned, from the host's own and the final state."""
        return logits

    def losses(self, state: TokenState) -> dict[str, Tensor]:
        """Named losses of the reducer's own, for training."""
        return {}
