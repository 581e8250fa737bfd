# SPDX-License-Identifier: Apache-2.0
"""Features of pictures that nothing was learnt for: what any network has to beat.

"Revisiting pre-trained remote sensing model benchmarks: resizing and normalization matters", Corley
et al., arXiv 2305.13456, section 3.3: image statistics; random convolutional features (MOSAIKS,
Rolf et al., arXiv 2010.08168); and those whose filters are whitened patches of the pictures (ZCA).
Departure: N filters give 2N features, as in the paper; N is smaller by default, and filters are
drawn by numpy, so that they are the same on every machine.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

FILTERS = 128  # each gives two features
KERNEL = 3  # pixels
BIAS = -1.0
RIDGE = 1e-3  # added to the variances when patches are whitened
AT_ONCE = 1 << 24  # numbers in the maps of a batch


def image_statistics(pictures: Tensor) -> Tensor:
    """Pictures (B, C, H, W) -> (B, 4C) float32: of every channel the mean, then every deviation
    (unbiased; 0 for a single pixel), greatest and least value."""
    flat = pictures.float().flatten(2)
    deviation = flat.std(dim=2) if flat.shape[2] > 1 else torch.zeros_like(flat[:, :, 0])
    return torch.cat([flat.mean(2), deviation, flat.amax(2), flat.amin(2)], dim=1)


def random_filters(count: int = FILTERS, channels: int = 3, seed: int = 0) -> Tensor:
    """(count, channels, 3, 3) float32 of the standard normal distribution."""
    drawn = np.random.default_rng(seed).standard_normal((count, channels, KERNEL, KERNEL))
    return torch.from_numpy(drawn.astype(np.float32))


def patch_filters(pictures: Tensor, count: int = FILTERS, seed: int = 0) -> Tensor:
    """(count, C, 3, 3): random patches of pictures (B, C, H, W), whitened (`whiten`).

    Raises ValueError for pictures smaller than a patch, or none.
    """
    number, _, height, width = pictures.shape
    if not number or min(height, width) < KERNEL:
        raise ValueError(f"patches of {KERNEL} pixels from pictures {tuple(pictures.shape)}")
    places = np.random.default_rng(seed).integers(
        0, (number, height - KERNEL + 1, width - KERNEL + 1), (count, 3)
    )
    cut = [pictures[n, :, y : y + KERNEL, x : x + KERNEL] for n, y, x in places.tolist()]
    return whiten(torch.stack(cut))


def whiten(patches: Tensor) -> Tensor:
    """Patches (N, C, h, w), each less its mean and divided by its norm, then whitened twice by ZCA:
    P G G with G = V (E + 0.001)^(-1/2) V^T of their second moments V E V^T. Float32."""
    flat = patches.double().flatten(1)
    flat = flat - flat.mean(dim=1, keepdim=True)
    norm = flat.norm(dim=1, keepdim=True)
    flat = flat / torch.where(norm > 1e-8, norm, torch.ones_like(norm))
    values, vectors = torch.linalg.eigh(flat.T @ flat / len(flat))
    twice = vectors / (values + RIDGE) @ vectors.T
    return (flat @ twice).float().reshape(patches.shape)


def random_features(pictures: Tensor, filters: Tensor | None = None) -> Tensor:
    """Pictures (B, C, H, W) -> (B, 2N) float32: the spatial means of relu(z) and of relu(-z), where
    z = pictures * filters - 1 without padding.

    filters: (N, C, 3, 3), None for `random_filters`; pictures should be normalised, so that their
    values are about as large as 1. Smaller ones than a filter are enlarged to it.
    """
    pictures = pictures.float()
    filters = random_filters(channels=pictures.shape[1]) if filters is None else filters
    height, width = (max(KERNEL, side) for side in pictures.shape[2:])
    if (height, width) != tuple(pictures.shape[2:]):
        pictures = F.interpolate(pictures, (height, width))
    bias = pictures.new_full((len(filters),), BIAS)
    step = max(1, AT_ONCE // (len(filters) * height * width))
    found = [pictures.new_zeros(0, 2 * len(filters))]
    for part in pictures.split(step):
        maps = F.conv2d(part, filters, bias)
        up, mean = maps.relu().mean((2, 3)), maps.mean((2, 3))
        found.append(torch.cat([up, up - mean], dim=1))  # relu(-z) = relu(z) - z
    return torch.cat(found)
