"""One thread per test process, no cache of the user, torchvision operators before its import."""

import gc
import os
import tempfile

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("CROSSPATCH_LINEAR", "off")  # the same bits wherever the tests run
os.environ["CROSSPATCH_CACHE"] = os.path.join(tempfile.gettempdir(), f"crosspatch-{os.getpid()}")

import crosspatch._torchvision  # noqa: F401

import torch

torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """What is imported by now stays to the end: the collector need not go through it again."""
    gc.collect()
    gc.freeze()
