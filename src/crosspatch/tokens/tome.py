# SPDX-License-Identifier: Apache-2.0
"""ToMe: in every block the r most similar pairs of tokens become one token each.

"Token Merging: Your ViT But Faster", Bolya, Fu, Dai, Zhang, Feichtenhofer, Hoffman, arXiv
2210.09461, ICLR 2023. Between attention and MLP of a block (section 3, bipartite soft matching):

    A, B = every other patch;  k = mean over heads of the attention's keys, normalised
    each a in A draws an edge to the b in B with the largest k_a . k_b
    the r a's with the strongest edges join their b: x_b = (s_b x_b + sum s_a x_a) / (s_b + sum s_a)
    proportional attention: softmax(q k^T / sqrt d + log s)                                  (eq. 1)

Written from the published description. Departures: prefix tokens (class, distillation, registers)
never take part, where the authors protect the class token inside the matching (the same pairs);
what stays keeps the order of A, then of B; in the last block of a network that reads the class
token alone nothing is merged, as nothing would see it. No parameters are added.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from crosspatch.layers.reducer import AttentionStats, Reducer
from crosspatch.layers.tokens import Merge, TokenState, apply_merge, counts_of, order
from crosspatch.tokens.host import Host, per_block


class ToMe(Reducer):
    """Merges `r` patches per block (an int for all, or one per block; at most half of those that
    are left). proportional: attention weighs every key by the number of patches it stands for."""

    def __init__(
        self, host: Host, *, r: int | Sequence[int] = 13, proportional: bool = True
    ) -> None:
        super().__init__()
        asked = per_block(r, host, "r")
        self.schedule = _resolved(asked, host, exact=not isinstance(r, int))
        self.counts = counts_of(self.schedule, host.tokens, host.n_prefix, host.depth)
        self.proportional = proportional
        merging = [block for block, count in enumerate(self.schedule) if count]
        self.first = min(merging, default=host.depth)

    def active(self, block: int) -> bool:
        return self.schedule[block] > 0 or (self.proportional and block > self.first)

    def wants(self, block: int) -> frozenset[str]:
        return frozenset({"keys"} if self.schedule[block] else ())

    def prefix_only(self, block: int) -> bool:
        return True

    def bias(self, state: TokenState, block: int) -> Tensor | None:
        return super().bias(state, block) if self.proportional else None

    def after_attention(self, state: TokenState, block: int, stats: AttentionStats) -> TokenState:
        r = self.schedule[block]
        if not r or stats.keys is None:
            return state
        with torch.no_grad():
            merge = matched(stats.keys.mean(dim=1), r, state.n_prefix)
        return apply_merge(state, merge)


def matched(metric: Tensor, r: int, n_prefix: int) -> Merge:
    """Bipartite soft matching of tokens with features metric (B, N, d): r of the odd patches join
    the even patch that is most like them."""
    patches = F.normalize(metric[:, n_prefix:].float(), dim=-1)
    b, a = patches[:, 0::2], patches[:, 1::2]
    best, partner = (a @ b.transpose(1, 2)).max(dim=-1)
    rank = order(best)
    at = n_prefix + 1 + 2 * rank
    moved, stays = at[:, :r], at[:, r:].sort(dim=-1).values
    slots = torch.arange(metric.shape[1] - r, device=metric.device).expand(metric.shape[0], -1)
    keep = torch.cat([slots[:, :n_prefix], stays, n_prefix + 2 * slots[:, : b.shape[1]]], dim=1)
    return Merge(keep, moved, partner.gather(1, rank[:, :r]) + n_prefix + stays.shape[1])


def _resolved(asked: tuple[float, ...], host: Host, *, exact: bool) -> tuple[int, ...]:
    """Merges per block: as asked, or at most half of the patches; ValueError where `exact` and
    more is asked than that, or where one number for all blocks exceeds the patches there are."""
    left, schedule = host.patches, []
    for block, one in enumerate(asked):
        most = left // 2
        if one != int(one) or one > (most if exact else host.patches):
            raise ValueError(
                f"r = {one} at block {block}; expected a whole number from 0 to "
                f"{most if exact else host.patches}: {left} patches are left there"
            )
        schedule.append(min(int(one), most))
        left -= schedule[-1]
    return tuple(schedule)
