# SPDX-License-Identifier: Apache-2.0
"""`--teacher RUN|NAME`: which network a run learns from, and whether it can teach it.

The teacher is found and asked for one grey picture before any picture is read; the recipe keeps its
path and hash, so that a run that is gone on with learns from the very same. What is learnt of its
answers needs the student's classes, by name and in any order; features need none.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import crosspatch._torchvision  # noqa: F401

import torch
from torch import nn

from crosspatch.data.tensors import read_tensors
from crosspatch.errors import DataError, UsageError, near
from crosspatch.objectives.teacher import Scale, Teacher
from crosspatch.training.package import (
    WEIGHTS,
    file_hash,
    load_model,
    model_folder,
    transforms_of,
)
from crosspatch.training.pictures import Pictures
from crosspatch.training.recipe import Recipe
from crosspatch.training.released import PATIENT, Release, names, release_of
from crosspatch.training.weights import Found, refuse_seen

BUNDLES = (".onnx", ".xml", ".pt2")
FEATURES = ("scalekd",)
"""Objectives that learn from any teacher; the others need its answers."""
TIMED = 3


class _Trained(NamedTuple):
    """classes: (), where they have no names."""

    module: nn.Module
    size: tuple[int, int]
    scale: Scale
    classes: tuple[str, ...]
    task: str


def find_teacher(asked: str) -> dict[str, str]:
    """What a recipe keeps of the teacher that was asked for: a run, or a released network by timm's
    name, which is fetched where the cache lacks it.

    Raises UsageError or DataError for one that is not there or cannot be read.
    """
    path = Path(asked).expanduser()
    if path.suffix.lower() in BUNDLES or _is_bundle(path):
        raise UsageError(
            f"{asked} is a bundle, which only answers",
            "the run that it was exported from: a teacher is asked by torch, on any device",
            "name that run",
        )
    if path.is_file():
        raise UsageError(
            f"{asked} is a file: it names neither network nor classes",
            "the folder of a run, or a released network by timm's name",
            "train it on these data first: crosspatch train DATA --weights FILE",
        )
    if not path.is_dir():
        return _released(asked, path)
    folder = model_folder(path)
    load_model(folder)
    record = {"kind": "run", "where": asked, "path": str(folder.resolve())}
    return record | {"sha256": file_hash(folder / WEIGHTS)}


def _is_bundle(path: Path) -> bool:
    return (
        path.is_dir()
        and not (model_folder(path) / WEIGHTS).is_file()
        and any(one.suffix in BUNDLES for one in path.iterdir())
    )


def _released(asked: str, path: Path) -> dict[str, str]:
    if len(path.parts) > 1 or asked.startswith("."):
        raise UsageError(
            f"there is no run {asked}", "the folder of a trained run", "correct --teacher"
        )
    try:
        release = release_of(asked)
    except UsageError as error:
        raise UsageError(
            f"{asked} is neither a run nor a network of timm's",
            f"the folder of a trained run, or a released network{_near(asked)}",
            "correct --teacher",
        ) from error
    if release is None:
        raise UsageError(
            f"{asked} has no released weights in safetensors",
            f"a name of timm.list_pretrained(){_near(asked)}",
            "name another --teacher",
        )
    try:
        file = release.cached() or release.fetch(PATIENT)
    except DataError as error:
        raise DataError(
            error.got, error.expected, f"where there is a network: {release.command}"
        ) from error
    record = {"kind": "released", "where": release.name, "path": str(file.resolve())}
    return record | {"sha256": file_hash(file)}


def _near(asked: str) -> str:
    found = near(asked, names())
    return f"; near: {found}" if found else ""


def load_teacher(recipe: Recipe, classes: tuple[str, ...]) -> Teacher:
    """The teacher of a recipe, for a student of these classes, with its own token reduction if it
    has one.

    Raises DataError where its file is no longer the one that the run was begun with, or its answer
    to a grey picture is not finite; UsageError where its classes are others and its answers are to
    be learnt.
    """
    record = recipe.teacher
    path = Path(record["path"])
    file = path if record["kind"] == "released" else path / WEIGHTS
    if not file.is_file() or file_hash(file) != record["sha256"]:
        raise DataError(
            f"{file} is no longer the teacher the run was begun with",
            f"the file whose sha256 is {record['sha256'][:16]}…",
            "put it back, or train anew with --overwrite",
        )
    trained = _load_released(record, file) if record["kind"] == "released" else _load_run(path)
    teacher = Teacher(
        trained.module,
        trained.size,
        trained.scale,
        Scale(recipe.mean, recipe.std),
        record["where"],
        seen=recipe.size,
        order=_order(trained, recipe, classes),
    )
    with torch.no_grad():
        teacher.require_finite(teacher.module(torch.zeros(1, 3, *trained.size)))
    return teacher


def _load_run(folder: Path) -> _Trained:
    found = load_model(folder)
    scale = Scale(tuple(found.preprocess.mean), tuple(found.preprocess.std))
    return _Trained(found.module, found.preprocess.size, scale, found.classes, found.task)


def _load_released(record: dict[str, str], file: Path) -> _Trained:
    import timm

    from crosspatch.models.registry import create_model, load_released

    release = release_of(record["where"])
    if release is None:
        raise DataError(
            f"this timm has no network {record['where']}",
            "the version that the run was begun with",
            "install it again",
        )
    settings: Any = timm.get_pretrained_cfg(release.name)
    module = create_model(release.model, num_classes=settings.num_classes)
    size = _size_of(module, release)
    load_released(module, read_tensors(file))
    return _Trained(module, size, Scale(release.mean, release.std), (), "classify")


def _size_of(module: nn.Module, release: Release) -> tuple[int, int]:
    own = getattr(module, "img_size", None)
    return own if isinstance(own, tuple) else release.size


def _order(trained: _Trained, recipe: Recipe, classes: tuple[str, ...]) -> tuple[int, ...] | None:
    """The teacher's column for each of `classes`: see `Teacher`."""
    if trained.task == "classify" and trained.classes == classes:
        return ()
    if trained.task == "classify" and sorted(trained.classes) == sorted(classes):
        return tuple(trained.classes.index(name) for name in classes)
    if recipe.objective not in FEATURES:
        raise _other_classes(trained, recipe, classes)
    return None


def _other_classes(trained: _Trained, recipe: Recipe, classes: tuple[str, ...]) -> UsageError:
    where = recipe.teacher["where"]
    learns = recipe.objective == "distill"  # `crosspatch label` has no --distill
    features = ", or --distill scalekd: it learns features" if learns else ""
    if not trained.classes:
        name = where.partition(".")[0]
        return UsageError(
            f"the teacher {where} answers with the classes it was released with",
            f"a teacher of these {len(classes)} classes: {_some(classes)}",
            f"train it on these data first: crosspatch train DATA --recipe finetune --model {name}"
            + features,
        )
    if trained.task != "classify":
        return UsageError(
            f"the teacher {where} was trained on pictures with several labels",
            "a teacher of one class to a picture",
            f"train a teacher on these data first{features}",
        )
    missing = [name for name in classes if name not in trained.classes]
    further = [name for name in trained.classes if name not in classes]
    lists = [f"{word} {_some(those)}" for word, those in (("lacks", missing), ("has also", further))
             if those]  # fmt: skip
    return UsageError(
        f"the teacher {where} has other classes: it {' and '.join(lists)}",
        f"a teacher of the same classes, in any order: {_some(classes)}",
        f"train a teacher on these data first{features}",
    )


def _some(classes: Any) -> str:
    more = f" and {len(classes) - 5} more" if len(classes) > 5 else ""
    return ", ".join(list(classes)[:5]) + more


def refuse_taught(record: dict[str, str], pictures: Pictures) -> None:
    """Raises UsageError where the teacher was trained on pictures that would validate or test its
    student here."""
    if record.get("kind") == "run":
        refuse_seen(Found("run", record["where"], Path(record["path"]), record["sha256"]), pictures)


def describe_cost(teacher: Teacher, recipe: Recipe, per_step: float) -> str:
    """A sentence about what the teacher's pass over one batch takes of a step of `per_step`
    seconds, the median of 3 after one to warm up."""
    count = max(1, recipe.batch // recipe.devices)
    device = torch.device(recipe.device)
    images = torch.zeros(count, 3, *recipe.size, device=device)
    module, seconds = teacher.moved(device), []
    with torch.no_grad(), _autocast(recipe, device):
        for _ in range(1 + TIMED):
            began = time.perf_counter()
            module(teacher.view(images))
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - began)
    own = statistics.median(seconds[1:])
    millions = sum(p.numel() for p in teacher.module.parameters()) / 1e6
    by = transforms_of(teacher.module)
    reduced = f", reduced by {by[0].get('method')}" if by else ""
    height, width = teacher.size
    return (
        f"The teacher {teacher.where} ({millions:.1f} M parameters, {height}x{width} pixels"
        f"{reduced}) takes {1e3 * own:.0f} of the {1e3 * per_step:.0f} ms of a step."
    )


def _autocast(recipe: Recipe, device: torch.device) -> Any:
    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16}
    kind = kinds.get(recipe.precision)
    return torch.autocast(device.type, dtype=kind or torch.bfloat16, enabled=kind is not None)
