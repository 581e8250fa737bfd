"""Pictures with the spectrum of photographs (amplitude 1 / frequency) and edges, of no class."""

from __future__ import annotations

import numpy as np


def pictures(count: int, classes: int, side: int = 32) -> tuple[list[np.ndarray], np.ndarray]:
    """uint8 (side, side, 3) each, and labels that say nothing about them."""
    rng = np.random.default_rng(0)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(side), np.fft.fftfreq(side)))
    frequency[0, 0] = 1 / side
    made = []
    for _ in range(count):
        noise = np.fft.fft2(rng.standard_normal((side, side, 3)), axes=(0, 1))
        smooth = np.fft.ifft2(noise / frequency[..., None], axes=(0, 1)).real
        top, left = rng.integers(0, side // 2, 2)
        smooth[top : top + side // 2, left : left + side // 3] += (
            smooth.std() * rng.standard_normal()
        )
        smooth = (smooth - smooth.min()) / np.ptp(smooth)
        made.append((smooth * rng.uniform(120, 255)).astype(np.uint8))
    return made, np.arange(count) % classes
