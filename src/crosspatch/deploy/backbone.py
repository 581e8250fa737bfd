# SPDX-License-Identifier: Apache-2.0
"""Weights as eyes for pictures: those of a run, of a file, or of a released checkpoint that lies in
the cache. Nothing is fetched; of their head nothing is asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from crosspatch.data.findings import quoted
from crosspatch.data.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocess
from crosspatch.data.tensors import read_tensors
from crosspatch.deploy.loading import folder_of
from crosspatch.errors import UsageError
from crosspatch.models.registry import create_model
from crosspatch.training.package import (
    Trained,
    load_model,
    load_untrained,
    model_folder,
    read_config,
)
from crosspatch.training.released import release_of
from crosspatch.training.transfer import fill
from crosspatch.training.weights import find_local

CLASSES = 2  # of a head that nobody reads
SEEN = ("size", "mean", "std")


@dataclass(frozen=True)
class Backbone:
    """name: how the weights were asked for; model: the architecture; trained: it with them;
    untrained: the same network with weights as they are before any training, a control; flags: what
    `train` takes to begin with these weights."""

    name: str
    model: str
    trained: Trained
    untrained: Callable[[], Trained]
    flags: str


def of_run(run: str | Path) -> Backbone:
    """The eyes of a run: its folder, or a bundle that lies in it. Raises as `folder_of` and
    `load_model` do."""
    home = folder_of(run)
    model = str(read_config(model_folder(home))["architecture"])
    control = partial(load_untrained, home)
    return Backbone(str(run), model, load_model(home), control, f"--weights {quoted(home)}")


def backbone(asked: str, model: str | None = None) -> Backbone:
    """The backbone of the file or the released checkpoint `asked`; model: the architecture, which a
    file does not tell.

    Raises UsageError for a run's folder, for weights that are not on this machine and where the
    model is missing or another, DataError for files that are damaged, are no safetensors or do not
    fit.
    """
    found = find_local(asked)
    if found.kind == "run":
        raise UsageError(f"--weights {asked} is a run", "a file, or a name", f"--run {asked}")
    named = found.shape.get("model")
    if named is None and model is None:
        raise UsageError(
            f"--weights {asked} without --model", "the name of the network that it is of",
            f"--weights {asked} --model vit_small_patch16_224",
        )  # fmt: skip
    if model is not None and named not in (None, model):
        raise UsageError(
            f"--weights {asked} is of {named}, and --model says {model}",
            "weights of that model",
            "leave --model away",
        )
    name = str(named or model)
    module, preprocess = _described(name, found.shape or _released(name))
    fill(module, read_tensors(Path(found.path)), where=asked)
    trained = Trained(module.eval(), (), preprocess, 1.0, 0)
    control = partial(_untrained, name, preprocess)
    return Backbone(asked, name, trained, control, f"--weights {quoted(asked)} --model {name}")


def _untrained(model: str, preprocess: Preprocess, seed: int = 0) -> Trained:
    """New weights, of `model` at its size. The draws of the process are left as they were."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = create_model(model, num_classes=CLASSES, img_size=preprocess.size)
    return Trained(module.eval(), (), preprocess, 1.0, 0)


def _released(name: str) -> dict[str, Any]:
    """How its released weights see pictures; {} where there are none, or no such network."""
    try:
        release = release_of(name)
    except UsageError:  # creating it says what is wrong
        return {}
    return {} if release is None else {key: getattr(release, key) for key in SEEN}


def _described(name: str, shape: dict[str, Any]) -> tuple[nn.Module, Preprocess]:
    """A network, and how it sees pictures: as `shape` says, else as it is described."""
    sized = {"img_size": shape["size"]} if "size" in shape else {}
    module = create_model(name, num_classes=CLASSES, **sized)
    own: Any = getattr(module, "default_cfg", None) or {}
    size = shape.get("size") or tuple(own.get("input_size", (3, 224, 224))[1:])
    mean, std = (
        tuple(shape.get(key) or own.get(key) or usual)
        for key, usual in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD))
    )
    return module, Preprocess.for_pictures(size, mean=mean, std=std)
