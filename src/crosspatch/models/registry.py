# SPDX-License-Identifier: Apache-2.0
"""Names and how they become models: our table first, then timm.

A name that timm has is never overwritten there; only names that it lacks are registered with it, so
`timm.create_model("crossvit_15_dagger_384")` works once `crosspatch.models` is imported.
"""

from __future__ import annotations

import fnmatch
import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

import crosspatch._torchvision  # noqa: F401

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, is_model, register_model
from timm.models import vision_transformer as timm_vit
from torch import Tensor, nn

from crosspatch.errors import DataError, UsageError, near
from crosspatch.models.from_timm import Unconvertible, from_timm


def settings(side: int, first_conv: str | tuple, classifier: str | tuple, **more: Any) -> Any:
    """timm's settings of a variant: how pictures are prepared for it, and in `more` its weights."""
    return {
        "num_classes": 1000,
        "input_size": (3, side, side),
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": first_conv,
        "classifier": classifier,
        **more,
    }


_ENTRIES: dict[str, Callable[..., nn.Module]] = {}


def register(
    module: str,
    model: type[nn.Module],
    variants: Mapping[str, Mapping[str, Any]],
    filter_fn: Callable[..., dict[str, Tensor]],
    *,
    out_indices: int | tuple[int, ...] = (0, 1, 2, 3, 4),
    overlay: Mapping[str, Any] | None = None,
) -> None:
    """Enter `variants` (name to constructor arguments) of `model`, defined in the module of that
    name.

    out_indices: what `features_only=True` gives by default. overlay: changes to timm's own settings
    of a name that timm has too. The module may hold `default_cfgs` for names that timm lacks.
    """
    for name, arguments in variants.items():
        entry = _entry(name, model, dict(arguments), filter_fn, out_indices, overlay)
        entry.__module__ = module
        _ENTRIES[name] = entry
        if not is_model(name):
            register_model(entry)


def _entry(name, model, arguments, filter_fn, out_indices, overlay) -> Callable[..., nn.Module]:
    def entry(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        if overlay:
            asked = kwargs.get("pretrained_cfg_overlay") or {}
            kwargs["pretrained_cfg_overlay"] = {**overlay, **asked}
        return build_model_with_cfg(
            model,
            name,
            pretrained,
            pretrained_filter_fn=filter_fn,
            feature_cfg={"feature_cls": "getter", "out_indices": out_indices},
            **{**arguments, **kwargs},
        )

    entry.__name__ = entry.__qualname__ = name
    entry.__doc__ = f"{name}: {model.__name__} with {arguments}."
    return entry


def list_models(pattern: str = "*") -> list[str]:
    """Names that `create_model` takes and that match `pattern` (as file names do): ours and
    timm's."""
    _import_models()
    names = set(_ENTRIES) | set(timm.list_models())
    return sorted(fnmatch.filter(names, pattern))


def create_model(
    name: str,
    *,
    pretrained: bool = False,
    num_classes: int | None = None,
    img_size: int | tuple[int, int] | None = None,
    in_chans: int = 3,
    **arguments: Any,
) -> nn.Module:
    """The model `name`, following timm's contract: ours, else timm's.

    A plain ViT of timm comes as our trunk with the same numbers. `num_classes` and `img_size`
    default to the model's own; `arguments` go to its constructor. Raises UsageError for an unknown
    name, with the nearest ones, and for arguments that the model refuses.
    """
    _import_models()
    arguments |= {"pretrained": pretrained, "in_chans": in_chans}
    if num_classes is not None:
        arguments["num_classes"] = num_classes
    if img_size is not None:
        arguments["img_size"] = img_size
    if name not in _ENTRIES and not is_model(name):
        raise UsageError(
            f"there is no model {name!r}",
            f"a name from list_models(); near this one: {near(name, list_models()) or 'none'}",
            "give one of those names; xp.list_models() in Python gives all",
        )
    try:
        model = _ENTRIES[name](**arguments) if name in _ENTRIES else _from_timm(name, arguments)
    except (TypeError, ValueError, AssertionError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(
            f"{name} cannot be built so: {error}",
            "arguments that its constructor takes",
            f"see help(type(xp.create_model({name!r})))",
        ) from error
    return model


def _from_timm(name: str, arguments: dict[str, Any]) -> nn.Module:
    try:
        model = timm.create_model(name, **arguments)
    except TypeError as error:
        if "img_size" not in str(error):
            raise
        del arguments["img_size"]  # a convolutional network takes any size, and no word about it
        model = timm.create_model(name, **arguments)
    if not isinstance(model, timm_vit.VisionTransformer):
        return model
    try:
        return from_timm(model)
    except Unconvertible:  # a relative of the ViT that the trunk does not compute: timm's own it is
        return model


def classifiers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that give logits, by name: one, or several whose logits the model averages
    or adds.

    Empty for a model without timm's `get_classifier`.
    """
    found: Any = model.get_classifier() if hasattr(model, "get_classifier") else ()
    heads = list(found) if isinstance(found, nn.ModuleList | tuple) else [found]
    return {name: one for name, one in model.named_modules() if any(one is h for h in heads)}


def misfits(model: nn.Module, given: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """What keeps `given` from being the state of `model`: entries by kind of trouble, empty where
    it fits."""
    expected = model.state_dict()
    common = [name for name in expected if name in given]
    shapes = {
        n: (tuple(given[n].shape), tuple(expected[n].shape))
        for n in common
        if given[n].shape != expected[n].shape
    }
    problems = {
        "missing": [name for name in expected if name not in given],
        "unexpected": [name for name in given if name not in expected],
        "misshapen": [f"{n} is {a}, the model's is {b}" for n, (a, b) in shapes.items()],
        "not finite": [
            name
            for name in common
            if given[name].is_floating_point() and not torch.isfinite(given[name]).all()
        ],
    }
    return {kind: names for kind, names in problems.items() if names}


def unwrapped(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a released file: out of {"model": …} or {"state_dict": …}, without the
    `module.` of a parallel training; of a detector those of its backbone."""
    state = state_dict.get("model", state_dict.get("state_dict", state_dict))
    state = {name.removeprefix("module."): value for name, value in state.items()}
    inside = "backbone."
    if any(name.startswith(inside) for name in state):
        return {n.removeprefix(inside): v for n, v in state.items() if n.startswith(inside)}
    return state


def adapted(model: nn.Module, state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """A released state dict under the model's names, positions resized: what the module of the
    model makes of it (`checkpoint_filter_fn`), else its tensors as they are."""
    adapt = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    return adapt(state_dict, model) if adapt else dict(state_dict.get("model", state_dict))


def load_released(model: nn.Module, state_dict: Mapping[str, Any]) -> nn.Module:
    """Load weights in the layout their authors released; returns `model`.

    Position tables are resized to the model's. Raises DataError naming every entry that is missing,
    unexpected, misshapen or not finite; the model is then unchanged.
    """
    given = adapted(model, state_dict)
    found = [f"{kind}: {', '.join(names)}" for kind, names in misfits(model, given).items()]
    if found:
        raise DataError(
            f"the weights do not fit {type(model).__name__}; {'; '.join(found)}",
            "one finite entry of the right shape for each of the model's",
            "build the variant that the file belongs to, with its number of classes",
        )
    model.load_state_dict(given, strict=True)
    return model


def _import_models() -> None:
    """Models register when `crosspatch.models` is imported, those that are a host with a reducer in
    it when the reducer's file is."""
    importlib.import_module("crosspatch.models")
    importlib.import_module("crosspatch.tokens.evovit")
