# SPDX-License-Identifier: Apache-2.0
"""Features of pictures that nothing was learnt for: what any network has to beat.

"Revisiting pre-trained remote sensing model benchmarks: resizing and normalization matters", Corley
et al., arXiv 2305.13456, section 3.3: image statistics; random convolutional features (MOSAIKS,
Rolf et al., arXiv 2010.08168); and those whose filters are whitened patches of the pictures (ZCA).
Departure: there are fewer filters by default, and numpy draws them, so that they are the same on
every machine.

`patch_features` are the last kind made stronger, as in "An Analysis of Single-Layer Networks in
Unsupervised Feature Learning", Coates, Ng, Lee, 2011: patches of 6x6, each picture brought to the
same contrast, means over the four quarters.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

FILTERS = 128  # each gives two features
KERNEL = 3  # pixels
BIAS = -1.0
PATCH = 6  # pixels of the patches of `patch_features`
PLAIN = 0.4  # is added to a picture's deviation, so that a plain one is not all noise
RIDGE = 1e-3  # added to the variances when patches are whitened
AT_ONCE = 1 << 19  # numbers in the maps of a batch: larger ones fall out of the cache, 4 x slower


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


def patch_filters(
    pictures: Tensor, count: int = FILTERS, seed: int = 0, kernel: int = KERNEL
) -> Tensor:
    """(count, C, kernel, kernel): random patches of pictures (B, C, H, W), whitened (`whiten`).

    Raises ValueError for pictures smaller than a patch, or none.
    """
    number, _, height, width = pictures.shape
    if not number or min(height, width) < kernel:
        raise ValueError(f"patches of {kernel} pixels from pictures {tuple(pictures.shape)}")
    places = np.random.default_rng(seed).integers(
        0, (number, height - kernel + 1, width - kernel + 1), (count, 3)
    )
    cut = [pictures[n, :, y : y + kernel, x : x + kernel] for n, y, x in places.tolist()]
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
    return _responses(_at_least(pictures, KERNEL), filters, 1)


def learn_patches(pictures: Tensor, count: int = FILTERS, seed: int = 0) -> Tensor:
    """Filters (count, C, 6, 6) for `patch_features`, cut from normalised pictures (B, C, H, W):
    whitened patches whose responses to those pictures have deviation 1."""
    seen = _contrasted(_at_least(pictures, PATCH + 2))
    filters = patch_filters(seen, count, seed, PATCH)
    spread = F.conv2d(seen[: max(1, AT_ONCE // filters[0].numel() // 100)], filters).std((0, 2, 3))
    return filters / torch.where(spread > 1e-6, spread, torch.ones_like(spread)).view(-1, 1, 1, 1)


def patch_features(pictures: Tensor, filters: Tensor, *, mirror: bool = False) -> Tensor:
    """Normalised pictures (B, C, H, W) -> (B, 8N) float32: the means over each quarter of the
    picture of relu(z) and of relu(-z), z = pictures * filters - 1, filters of `learn_patches`.

    mirror: the mean of these for a picture and its mirror image, at twice the cost.
    """
    seen = _contrasted(_at_least(pictures, PATCH + 2))
    found = _responses(seen, filters, 2)
    return (found + _responses(seen.flip(3), filters, 2)) / 2 if mirror else found


def _at_least(pictures: Tensor, side: int) -> Tensor:
    """The pictures, enlarged where they are smaller than `side`."""
    height, width = (max(side, own) for own in pictures.shape[2:])
    same = (height, width) == tuple(pictures.shape[2:])
    return pictures.float() if same else F.interpolate(pictures.float(), (height, width))


def _contrasted(pictures: Tensor) -> Tensor:
    """Each picture less its mean, divided by its deviation."""
    mean = pictures.mean((1, 2, 3), keepdim=True)
    return (pictures - mean) / (pictures.std((1, 2, 3), keepdim=True) + PLAIN)


def _responses(pictures: Tensor, filters: Tensor, grid: int) -> Tensor:
    """(B, 2 N grid^2): means over `grid` x `grid` parts of relu(z), then of relu(-z)."""
    bias = pictures.new_full((len(filters),), BIAS)
    height, width = pictures.shape[2:]
    found = [pictures.new_zeros(0, 2 * len(filters) * grid**2)]
    for part in pictures.split(max(1, AT_ONCE // (len(filters) * height * width))):
        maps = F.conv2d(part, filters, bias)
        mean = F.adaptive_avg_pool2d(maps, grid)
        up = F.adaptive_avg_pool2d(maps.relu_(), grid)
        found.append(torch.cat([up, up - mean], dim=1).flatten(1))  # relu(-z) = relu(z) - z
    return torch.cat(found)
