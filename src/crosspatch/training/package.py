# SPDX-License-Identifier: Apache-2.0
"""`model/`: config.json and model.safetensors, in the layout of timm's `local-dir:`.

config.json holds architecture, arguments, class names, the whole preprocessing and the ordered list
of transforms (reduced, pruned, quantised ...) that rebuild the module; reading it replays them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from crosspatch.data import jsons
from crosspatch.data.preprocess import Preprocess
from crosspatch.data.tensors import read_header, read_tensors
from crosspatch.errors import DataError
from crosspatch.tasks import make_task
from crosspatch.tokens.spec import parse, spelt
from crosspatch.training.harmless import require_harmless
from crosspatch.training.recipe import Recipe
from crosspatch.training.state import flush_folder, write_aside

if TYPE_CHECKING:
    from torch import nn

CONFIG, WEIGHTS = "config.json", "model.safetensors"
SCHEMAS = {"classify": 1, "multilabel": 2}
"""Of config.json by task: a reader of schema 1 would take the sigmoids of the latter for a
softmax."""
LARGEST_CONFIG = 1 << 20  # bytes
LARGEST = 8192  # pixels a side that pictures may be asked in
KINDS = {"architecture": str, "model_args": dict, "class_names": list, "preprocessing": dict,
         "transforms": list}  # fmt: skip
"""What config.json must hold."""


def build_model(recipe: Recipe, classes: int, *, training: bool = True) -> nn.Module:
    """The module that `recipe` names, seeded by it; with `recipe.weights` filled with those, and
    with `recipe.reduce` in it.

    Raises UsageError for an unknown model or a reduction that it cannot have, DataError where the
    weights cannot be read, do not fit or are no longer those of the recipe.
    """
    import torch

    torch.manual_seed(recipe.seed)
    module = _create(recipe.model, _arguments(recipe, classes, training=training))
    if recipe.weights:
        take_weights(module, recipe)
    _reduce(module, recipe)
    return module


def _reduce(module: nn.Module, recipe: Recipe) -> None:
    """Put the recipe's reduction on `module`, unless it is there already."""
    if recipe.reduce and not transforms_of(module):
        from crosspatch.tokens.reduce import put

        put(module, *parse(recipe.reduce))


def transforms_of(module: nn.Module) -> list[dict[str, Any]]:
    """What was done to a module since its constructor, in order, as config.json holds it."""
    return [dict(one) for one in getattr(module, "transforms", ())]


def take_weights(module: nn.Module, recipe: Recipe) -> int | None:
    """Fill `module` with the weights that the recipe begins with, heads as far as `head_rows` says;
    returns the classes of their head. Where those are of a reduced run, `module` is reduced first:
    a reduction may have weights of its own. Raises DataError (see `build_model`)."""
    from crosspatch.training.transfer import fill

    source, path = recipe.weights, Path(recipe.weights["path"])
    tensors = path / WEIGHTS if source["kind"] == "run" else path
    if not tensors.is_file() or file_hash(tensors) != source["sha256"]:
        raise DataError(
            f"{tensors} is no longer what the run was begun with ({source['where']})",
            f"the file whose sha256 is {source['sha256'][:16]}…",
            "put it back, or train anew with --overwrite",
        )
    if source["kind"] == "run":
        theirs: Any = load_model(path).module
        if transforms_of(theirs):
            _reduce(module, recipe)
        tables = theirs.position_tables() if hasattr(theirs, "position_tables") else None
        how = {"rows": recipe.head_rows, "tables": tables}
        return fill(module, theirs.state_dict(), where=source["where"], **how)
    return fill(module, read_tensors(tensors), where=source["where"])


def file_hash(path: Path) -> str:
    """sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _arguments(recipe: Recipe, classes: int, *, training: bool) -> dict[str, Any]:
    given: dict[str, Any] = {"num_classes": classes, "img_size": list(recipe.size)}
    if training and recipe.drop_path:
        given["drop_path_rate"] = recipe.drop_path
    return {**given, **recipe.model_args}


def _create(name: str, arguments: dict[str, Any]) -> nn.Module:
    from crosspatch.models.registry import create_model

    size = arguments.get("img_size")
    sized = {"img_size": tuple(size)} if isinstance(size, list) else {}
    return create_model(name, **{**arguments, **sized})


def model_config(recipe: Recipe, classes: tuple[str, ...]) -> dict[str, Any]:
    """The content of config.json; thresholds are 0.5 until validation has set them."""
    arguments = _arguments(recipe, len(classes), training=False)
    return {
        "schema": SCHEMAS[recipe.task],
        "task": recipe.task,
        "architecture": recipe.model,
        "num_classes": len(classes),
        "class_names": list(classes),
        "label_names": list(classes),
        "model_args": arguments,
        "preprocessing": recipe.preprocess.to_dict(),
        "transforms": [_transform(recipe.reduce)] if recipe.reduce else [],
        "temperature": 1.0,
        "calibrated_on": 0,
        "class_counts": list(recipe.class_counts),
        "thresholds": list(make_task(recipe.task, classes).thresholds),
        "pretrained_cfg": {
            "input_size": [3, *recipe.size],
            "interpolation": "bicubic",
            "mean": list(recipe.mean),
            "std": list(recipe.std),
            "crop_pct": recipe.size[0] / recipe.store[0],
            "num_classes": len(classes),
        },
    }


def _transform(reduction: str) -> dict[str, Any]:
    method, options = parse(reduction)
    return {"kind": "reduce", "method": method, "options": options}


def save_model(folder: Path, module: nn.Module, config: dict[str, Any]) -> None:
    """Write config.json, with the module's own transforms, and model.safetensors, each aside first
    and renamed when whole."""
    config = config | {"transforms": transforms_of(module)}
    aside = write_aside(folder / WEIGHTS, module.state_dict(), {"format": "pt"})
    _write_config(folder, config)
    os.replace(aside, folder / WEIGHTS)
    flush_folder(folder)


def class_counts(run: str | Path) -> tuple[int, ...]:
    """The training pictures of each class of a run, () where it does not say."""
    folder = model_folder(run)
    told = read_config(folder).get("class_counts") if (folder / CONFIG).is_file() else None
    right = isinstance(told, list) and all(isinstance(n, int) and n >= 0 for n in told)
    return tuple(told) if told and right else ()


def save_calibration(
    folder: Path, temperature: float, pictures: int, thresholds: Sequence[float] = ()
) -> None:
    """Note in config.json what logits are divided by, on how many validation pictures that was
    fitted, and the thresholds (K,) that were, of a task that has some."""
    found = {"temperature": temperature, "calibrated_on": pictures, "thresholds": list(thresholds)}
    _write_config(folder, read_config(folder) | found)
    flush_folder(folder)


def _write_config(folder: Path, config: dict[str, Any]) -> None:
    draft = folder / f".writing-{CONFIG}"
    draft.write_text(json.dumps(config, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(draft, folder / CONFIG)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json, checked. Raises DataError naming the file when it is not one of ours."""
    path = folder / CONFIG
    advice = "give the folder of a run that has finished an epoch"
    if not path.is_file():
        raise DataError(f"{path} does not exist", "the folder of a trained model", advice)
    try:
        config = jsons.parse(jsons.read_text(path, LARGEST_CONFIG))
        missing = [key for key in KINDS if key not in config]
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path} is not JSON ({error})", "a model's config.json", advice) from error
    if missing:
        raise DataError(f"{path} lacks {', '.join(missing)}", "a model's config.json", advice)
    wrong = [key for key, kind in KINDS.items() if not isinstance(config[key], kind)]
    if wrong:
        raise DataError(
            f"{path}: {wrong[0]} is a {type(config[wrong[0]]).__name__}",
            f"a {KINDS[wrong[0]].__name__}",
            advice,
        )
    try:
        jsons.class_names(config["class_names"])
    except ValueError as error:
        raise DataError(f"{path}: {error}", "the names of classes", advice) from error
    return config


class Trained(NamedTuple):
    """A trained model: its module in evaluation mode (normalised (B, 3, H, W) -> logits (B, K)),
    with whatever reduction it has,
    class names, preprocessing, what its logits are divided by for calibrated probabilities, on how
    many validation pictures that was fitted (0: it was not), the task, and its thresholds (K,), ()
    where it has none."""

    module: nn.Module
    classes: tuple[str, ...]
    preprocess: Preprocess
    temperature: float
    calibrated_on: int
    task: str = "classify"
    thresholds: tuple[float, ...] = ()

    @property
    def reduction(self) -> str:
        """The token reduction in it, as `tokens.spec.spell` writes it; "" without one."""
        return spelt(transforms_of(self.module))


def model_folder(run: str | Path) -> Path:
    """`model/` of a run folder, or the folder itself where it is that already."""
    folder = Path(run)
    return folder / "model" if (folder / "model").is_dir() else folder


def load_model(run: str | Path) -> Trained:
    """The trained model of a run folder (or of its `model/`).

    Raises DataError when files are missing, damaged or do not fit each other, and when a weight is
    not finite. Nothing is allocated before the network and its weights were found to fit.
    """
    folder = model_folder(run)
    path, told = folder / WEIGHTS, _described(folder)
    module = _rebuilt(folder)
    module.load_state_dict(read_tensors(path, "the weights of a trained model"))
    return Trained(module.eval(), *told)


def load_untrained(run: str | Path, seed: int = 0) -> Trained:
    """The same network with weights as they are before any training: a control. The draws of the
    process are left as they were. Raises DataError for damaged files."""
    import torch

    folder = model_folder(run)
    told = _described(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = _rebuilt(folder)
    return Trained(module.eval(), told[0], told[1], 1.0, 0, *told[4:])


def _rebuilt(folder: Path) -> nn.Module:
    """The network of config.json, with first weights. Raises DataError where it cannot be built, or
    where the file of weights holds others."""
    from crosspatch.training.outline import built, require_fitting

    config, path = read_config(folder), folder / CONFIG
    require_harmless(config["model_args"], path)
    header = read_header(folder / WEIGHTS, "the weights of a trained model")

    def build() -> nn.Module:
        module = _create(config["architecture"], config["model_args"])
        _replay(module, config["transforms"], path)
        return module

    require_fitting(build, header.tensors, path, folder / WEIGHTS)
    return built(build, path)


def _described(folder: Path) -> tuple[Any, ...]:
    """What config.json says beside the network: the further fields of `Trained`. Raises DataError
    for what makes no sense."""
    config, path = read_config(folder), folder / CONFIG
    try:
        preprocess = Preprocess.from_dict(config["preprocessing"])
        temperature = float(config.get("temperature", 1.0))
        pictures, given = int(config.get("calibrated_on", 0)), config["model_args"]
        thresholds = tuple(float(one) for one in config.get("thresholds", ()))
        if not 0 < temperature < float("inf"):
            raise ValueError(f"temperature {temperature}")
        if max(preprocess.store) > LARGEST:
            raise ValueError(f"pictures of {preprocess.store} pixels")
        if given.get("num_classes", len(config["class_names"])) != len(config["class_names"]):
            raise ValueError(f"{given['num_classes']} classes with other names")
        size = given.get("img_size")
        if isinstance(size, list) and tuple(size) != preprocess.size:
            raise ValueError(f"a network for {size}, pictures of {preprocess.size} pixels")
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise DataError(
            f"{path} makes no sense ({error})", "a model's config.json", "train again"
        ) from error
    names = jsons.class_names(config["class_names"])
    return names, preprocess, temperature, pictures, *_task(config, path, thresholds)


def _replay(module: nn.Module, transforms: list[Any], path: Path) -> None:
    """Do to `module` what `path`, its config.json, lists. Raises DataError naming that file."""
    from crosspatch.tokens.reduce import replay

    for transform in transforms:
        try:
            replay(module, transform)
        except DataError as error:
            raise DataError(f"{path}: {error.got}", error.expected, error.do) from error


def _task(
    config: dict[str, Any], path: Path, thresholds: tuple[float, ...]
) -> tuple[str, tuple[float, ...]]:
    """(task, thresholds) of a model; DataError where this version knows no such thing."""
    name = config.get("task", "classify")
    needed = len(config["class_names"]) if name == "multilabel" else 0
    known = isinstance(name, str) and name in SCHEMAS
    if not known or len(thresholds) != needed or not all(0 <= one <= 1 for one in thresholds):
        raise DataError(
            f"{path} has the task {jsons.shown(name)} with {len(thresholds)} thresholds",
            f"one of {', '.join(SCHEMAS)}; multilabel has a threshold for each class",
            "use a newer version of crosspatch, or train again",
        )
    return name, thresholds
