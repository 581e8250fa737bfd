# SPDX-License-Identifier: Apache-2.0
"""DeiT's distillation losses, as functions of logits.

"Training data-efficient image transformers & distillation through attention", Touvron et al., arXiv
2012.12877, section 4, as the authors' code computes them. z is the class token's logits,
z' the distillation token's, t the teacher's, y the soft (smoothed, mixed) targets:

    hard   (1 - a) CE(z, y) + a CE(z', argmax t)
    soft   (1 - a) CE(z, y) + a T^2 / (B K) sum KL(softmax(t / T) || softmax(z' / T))

The teacher sees the same augmented and mixed images; its label is neither smoothed nor mixed. The
soft loss is divided by the number of logits, B K, as in the authors' code, so that its gradient is
K times weaker than with the usual mean over the batch: `per="picture"` gives the latter.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

PER = ("logit", "picture")


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """logits and soft targets (B, K) -> their mean cross-entropy, a scalar in nats."""
    return -(targets * F.log_softmax(logits.float(), dim=-1)).sum(dim=-1).mean()


def hard_distillation(
    logits: Tensor, logits_dist: Tensor, teacher: Tensor, targets: Tensor, *, alpha: float = 0.5
) -> Tensor:
    """Hard-label distillation, a scalar in nats; every argument (B, K). alpha: the teacher's part.

    Raises ValueError for an alpha outside of [0, 1].
    """
    _check_alpha(alpha)
    taught = F.cross_entropy(logits_dist.float(), teacher.argmax(dim=-1))
    return (1 - alpha) * soft_cross_entropy(logits, targets) + alpha * taught


def soft_distillation(
    logits: Tensor,
    logits_dist: Tensor,
    teacher: Tensor,
    targets: Tensor,
    *,
    alpha: float = 0.1,
    tau: float = 3.0,
    per: str = "logit",
) -> Tensor:
    """Soft distillation at temperature `tau`, a scalar in nats; every argument (B, K).

    alpha: the teacher's part; per: what the divergence is averaged over, one of `PER`. Raises
    ValueError for an alpha outside of [0, 1], a tau that is not above 0 and an unknown `per`.
    """
    _check_alpha(alpha)
    if tau <= 0 or per not in PER:
        raise ValueError(f"tau is above 0 and per one of {PER}, got {tau} and {per!r}")
    student = F.log_softmax(logits_dist.float() / tau, dim=-1)
    wanted = F.log_softmax(teacher.float() / tau, dim=-1)
    divergence = F.kl_div(student, wanted, reduction="sum", log_target=True)
    shared = student.numel() if per == "logit" else len(student)
    taught = divergence * tau**2 / shared
    return (1 - alpha) * soft_cross_entropy(logits, targets) + alpha * taught


def _check_alpha(alpha: float) -> None:
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is in [0, 1], got {alpha}")
