# SPDX-License-Identifier: Apache-2.0
"""PatchDropout: in training, every picture goes on with a random subset of its patches.

"PatchDropout: Economizing Vision Transformers Using Patch Dropout", Liu, Matsoukas, Strand,
Azizpour, Smith, arXiv 2208.07220, WACV 2023. After positions have been added, and in training only,

    z = [prefix; E patches + positions]  ->  [prefix; K of the N patches],  K = max(1, int(N (1 -
    rate)))

drawn anew for every picture, each subset of K equally likely; evaluation sees all patches. Written
from the published description. Departures: `block` may name a later block to drop at the beginning
of; prefix tokens (class, distillation, registers) always stay. No parameters are added.

Expected in training at rate 0.5 (GMACs, of a DeiT-S at 224): 2.27 of 4.60.
"""

from __future__ import annotations

import torch

from crosspatch.layers.reducer import Reducer
from crosspatch.layers.tokens import TokenState, order, select_patches
from crosspatch.tokens.host import Host, check_blocks


class PatchDrop(Reducer):
    """Drops the share `rate` in [0, 1) of the patches before block `block`, in training only.

    Draws from torch's generator, as dropout does; on a CrossViT every branch draws for itself. A
    dropped patch has no token any more: its `source` is -1. `counts` are those of training. Raises
    ValueError for a rate or a block that is not there.
    """

    def __init__(self, host: Host, *, rate: float = 0.5, block: int = 0) -> None:
        super().__init__()
        if not 0 <= rate < 1:
            raise ValueError(f"rate = {rate}; expected from 0 to below 1")
        self.rate = rate
        (self.block,) = check_blocks([block], host, "block")
        for number, spec in enumerate(host.specs):
            shares = spec.shares if spec is not None else None
            if shares is not None and shares <= block <= number:
                raise ValueError(
                    f"block = {block} stands between block {shares} and block {number}, which "
                    "shares its attention; expected one before or after both"
                )
        left = host.n_prefix + kept(host.patches, rate)
        self.counts = tuple(host.tokens if b <= block else left for b in range(host.depth + 1))

    def active(self, block: int) -> bool:
        return self.training and self.rate > 0 and block == self.block

    def before_attention(self, state: TokenState, block: int) -> TokenState:
        b, n = state.tokens.shape[:2]
        noise = torch.rand(b, n - state.n_prefix, device=state.tokens.device)
        chosen = order(noise)[:, : kept(n - state.n_prefix, self.rate)]
        return select_patches(state, chosen.sort(dim=-1).values)


def kept(patches: int, rate: float) -> int:
    """How many of so many patches stay."""
    return max(1, int(patches * (1 - rate)))
