"""One thread per test process, and torchvision's operators before anybody imports it."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import crosspatch._torchvision  # noqa: F401

import torch

torch.set_num_threads(1)
