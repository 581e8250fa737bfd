# SPDX-License-Identifier: Apache-2.0
"""What half precision would blur."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def full_precision(x: Tensor) -> AbstractContextManager:
    """Without autocast on the device of `x`; no context at all where it is off, for export's sake.

    What is in half precision already is for the caller to convert.
    """
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()
