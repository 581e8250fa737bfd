# SPDX-License-Identifier: Apache-2.0
"""Released checkpoints by timm's names: what they are for, where they lie in the cache of Hugging
Face, and their download, which only happens for who asked."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import crosspatch._torchvision  # noqa: F401

from crosspatch.data.preprocess import IMAGENET_MEAN, IMAGENET_STD
from crosspatch.errors import DataError, UsageError, near

HUB_FILE = "model.safetensors"
QUICK, PATIENT = 4.0, 15.0  # seconds to wait for an answer: unasked, and asked by name


@dataclass(frozen=True)
class Release:
    """A released checkpoint: timm's name with its tag, the model, the repository, how pictures are
    prepared for it (size is height and width in pixels)."""

    name: str
    model: str
    repository: str
    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def command(self) -> str:
        """What fetches it into the cache."""
        return f"hf download {self.repository} {HUB_FILE}"

    def cached(self) -> Path | None:
        """Its file in the cache of Hugging Face, None where it is not there. No network."""
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(self.repository, HUB_FILE)
        return Path(found) if isinstance(found, str) else None

    def fetch(self, seconds: float) -> Path:
        """Download it into that cache, after an answer within `seconds`.

        Raises DataError with the reason where there is none, or the download breaks off.
        """
        from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
        from huggingface_hub.utils import disable_progress_bars

        _answer(lambda: get_hf_file_metadata(hf_hub_url(self.repository, HUB_FILE)), seconds, self)
        disable_progress_bars()
        return Path(_answer(lambda: hf_hub_download(self.repository, HUB_FILE), None, self))


def _answer(ask: Any, seconds: float | None, release: Release) -> Any:
    """What `ask` gives, in a thread of its own: name look-ups know no time limit."""
    found: dict[str, Any] = {"error": f"no answer within {seconds} s"}

    def work() -> None:
        try:
            found["answer"] = ask()
        except Exception as error:  # of whichever network library the hub uses; said below
            found["error"] = str(error).strip().splitlines()[0] if str(error) else repr(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if "answer" in found:
        return found["answer"]
    raise DataError(
        f"{release.name} could not be fetched from huggingface.co/{release.repository} "
        f"({found['error']})",
        "a network, or the file in the cache of Hugging Face",
        f"where there is a network: {release.command}; or --weights FILE with a copy",
    )


def release_of(name: str) -> Release | None:
    """The release that timm's name means, with or without tag; None where a known model has none in
    safetensors. Raises UsageError with near names for an unknown model or tag."""
    import timm

    from crosspatch.models.registry import list_models

    model, _, tag = name.partition(".")
    known = list_models(_literal(model))
    try:
        settings = timm.get_pretrained_cfg(name) if known else None
    except RuntimeError:
        settings = None  # a tag that timm does not know
    if not known or (tag and settings is None):
        what = "there is no model or path" if not known else f"{model} has no checkpoint"
        raise UsageError(
            f"{what} {name!r}",
            f"a file, a run, or a released checkpoint; near: {near(name, names())}",
            "correct --weights",
        )
    if settings is None or not settings.hf_hub_id or settings.hf_hub_filename:
        return None
    return Release(
        name=model if not settings.tag else f"{model}.{settings.tag}",
        model=model,
        repository=settings.hf_hub_id.partition("@")[0],
        size=_size(model, settings.input_size),
        mean=tuple(settings.mean or IMAGENET_MEAN),
        std=tuple(settings.std or IMAGENET_STD),
    )


def names() -> list[str]:
    """Every name of a released checkpoint, with its tag."""
    import timm

    return timm.list_pretrained()


def _size(model: str, input_size: tuple[int, ...]) -> tuple[int, int]:
    """The input for which the positions are those that were trained. timm feeds CrossViT the size
    of its fine branch; here the coarse branch has the size of the input."""
    from crosspatch.models.crossvit import TIMM_NAMES, VARIANTS

    known = VARIANTS.get(model) or TIMM_NAMES.get(model)
    if known is None:
        return input_size[1], input_size[2]
    side = known["branch_sizes"][-1]
    return side, side


def _literal(name: str) -> str:
    """A pattern of `list_models` that means this name alone."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)
