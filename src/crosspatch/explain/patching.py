# SPDX-License-Identifier: Apache-2.0
"""Does a part matter? Parts of a pass exchanged for those of another picture's, or switched off.

"Does Circuit Analysis Interpretability Scale?", Lieberum et al., arXiv 2307.09458 (2023), section
3.2. Total effect: the part is exchanged and everything behind it is computed again. Direct effect:
only its own path into the logits changes, every other part and every held factor stays (`forward`),
so that it is the difference of two attributions. Recovery is

    (patched - corrupted) / (clean - corrupted)

1: nothing changed, 0: as bad as the corrupted picture. Later layers make up for what is missing
(self-repair): total effects say too little of a part's importance rather than too much.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from crosspatch.errors import UsageError
from crosspatch.explain.circuits import between
from crosspatch.explain.forward import HEADED, Part, Watch, explainable, logits

WAYS = ("resample", "mean", "zero")


class Record(Watch):
    """Keeps whatever a pass shows."""

    def __init__(self) -> None:
        self.writes: dict[Part, Tensor] = {}
        self.held: dict[Part, Tensor] = {}
        self.seen: dict[tuple[Part, str], Tensor] = {}
        self.logits = torch.empty(0)

    def write(self, part: Part, value: Tensor) -> Tensor:
        self.writes[part] = value.detach()
        return value

    def hold(self, part: Part, value: Tensor) -> Tensor:
        self.held[part] = value.detach()
        return value

    def look(self, part: Part, what: str, value: Tensor) -> Tensor:
        self.seen[part, what] = value.detach()
        return value

    @property
    def parts(self) -> tuple[Part, ...]:
        """Everything that was written, each head its own."""
        found: list[Part] = []
        for part, value in self.writes.items():
            headed = part.kind in HEADED
            heads = [part._replace(head=h) for h in range(value.shape[1])] if headed else [part]
            found += heads
        return tuple(found)


class Exchange(Watch):
    """Puts other values in the place of some parts. given: (part, or all its heads) to the value
    that takes its place; chosen: the parts that it takes the place of."""

    def __init__(self, given: dict[Part, Tensor], chosen: Iterable[Part]) -> None:
        self.given = given
        self.heads: dict[Part, list[int]] = {}
        for part in chosen:
            self.heads.setdefault(part.whole, []).append(part.head)

    def write(self, part: Part, value: Tensor) -> Tensor:
        heads = self.heads.get(part)
        if heads is None:
            return value
        other = self.given[part].to(value).expand_as(value)
        if -1 in heads:
            return other
        changed = value.clone()
        changed[:, heads] = other[:, heads]
        return changed


class Direct(Exchange):
    """The same in a pass in which everything else stays as it was recorded."""

    def __init__(self, kept: Record, given: dict[Part, Tensor], chosen: Iterable[Part]) -> None:
        super().__init__(given, chosen)
        self.kept = kept

    def write(self, part: Part, value: Tensor) -> Tensor:
        return super().write(part, self.kept.writes[part])

    def hold(self, part: Part, value: Tensor) -> Tensor:
        return self.kept.held[part]


class Effects(NamedTuple):
    """parts: P of them; clean, corrupted: (B,) of the metric; patched: (P, B); recovery: (P, B),
    not a number where clean and corrupted pictures do not differ."""

    parts: tuple[Part, ...]
    clean: np.ndarray
    corrupted: np.ndarray
    patched: np.ndarray

    @property
    def recovery(self) -> np.ndarray:
        whole = self.clean - self.corrupted
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(whole != 0, (self.patched - self.corrupted) / whole, np.nan)


@torch.no_grad()
def record(model: nn.Module, images: Tensor) -> Record:
    """What a pass over images (B, C, H, W) shows. Raises UsageError as `explainable` does."""
    kept = Record()
    ours = explainable(model).eval()
    kept.logits = logits(ours, images, kept)
    return kept


@torch.no_grad()
def patch(
    model: nn.Module,
    clean: Tensor,
    corrupted: Tensor,
    parts: Sequence[Part] | None = None,
    *,
    a: Tensor | int,
    b: Tensor | int | None = None,
    effect: str = "total",
    into: str = "clean",
) -> Effects:
    """Every part by itself exchanged between two pictures, and what logit a - logit b becomes.

    clean, corrupted: (B, C, H, W), pair by pair. parts: of `record(…).parts`; None for each that is
    not the same for every picture. effect: "total" or "direct". into: "clean": the corrupted part
    goes into the clean pass; "corrupted": the other way round. Raises UsageError for an unknown
    part or word, and as `explainable` does.
    """
    _one_of("effect", effect, ("total", "direct"))
    _one_of("into", into, ("clean", "corrupted"))
    ours = explainable(model).eval()
    kept, other = record(ours, clean), record(ours, corrupted)
    parts = tuple(p for p in kept.parts if not p.constant) if parts is None else tuple(parts)
    check_parts(parts, kept)
    along = between(kept.logits.shape[1], a, b)[0].to(kept.logits)
    metric = lambda found: (found * along).sum(dim=-1).cpu().double().numpy()
    base, source, images = (kept, other, clean) if into == "clean" else (other, kept, corrupted)
    patched = []
    for part in parts:
        watch = Exchange(source.writes, [part])
        if effect == "direct":
            watch = Direct(base, source.writes, [part])
        patched.append(metric(logits(ours, images, watch)))
    shape = (len(parts), len(clean))
    return Effects(
        parts, metric(kept.logits), metric(other.logits), np.asarray(patched).reshape(shape)
    )


@torch.no_grad()
def ablate(
    model: nn.Module,
    images: Tensor,
    parts: Sequence[Part],
    *,
    how: str = "resample",
    reference: Tensor | None = None,
    seed: int = 0,
) -> Tensor:
    """Logits (B, K) with `parts` switched off, all at once.

    how: "resample": they are what they are for another picture of `reference`, drawn by `seed` (the
    paper's choice); "mean": their mean over `reference`; "zero": nothing. reference: (R, C, H, W),
    None for `images` themselves. Raises UsageError for an unknown part or word, for a resampling
    of one picture by itself, and as `explainable` does.
    """
    _one_of("how", how, WAYS)
    ours = explainable(model).eval()
    kept = record(ours, images if reference is None else reference)
    check_parts(parts, kept)
    return logits(ours, images, Exchange(_switched(kept, len(images), how, seed, parts), parts))


def _switched(
    kept: Record, count: int, how: str, seed: int, parts: Sequence[Part]
) -> dict[Part, Tensor]:
    """What takes the place of each part, for `count` pictures."""
    total = len(kept.logits)
    if how == "resample" and total < 2:
        raise UsageError(
            "a resampling from one picture", "two or more to draw from", "how='zero', or reference="
        )
    draw = np.random.default_rng(seed)
    # nobody is given its own where the pictures are drawn from themselves
    shift = draw.integers(1, total, count) if total > 1 else np.zeros(count, int)
    places = torch.from_numpy((np.arange(count) + shift) % total)
    given = {}
    for part in {part.whole for part in parts}:
        value = kept.writes[part]
        if how == "zero":
            given[part] = torch.zeros_like(value[:1])
        elif how == "mean":
            given[part] = value.mean(dim=0, keepdim=True)
        else:
            given[part] = value[places.to(value.device)]
    return given


@torch.no_grad()
def importance(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    parts: Sequence[Part] | None = None,
    *,
    how: str = "resample",
    seed: int = 0,
) -> list[tuple[Part, float]]:
    """Parts by their mean total effect, the largest first: by how much the logit of the true class,
    less the mean of all, falls once the part is switched off (see `ablate`).

    labels: (B,) int64. parts: None for every head. An aid for pruning; heads that stand in for
    each other look unimportant one by one.
    """
    ours = explainable(model).eval()
    kept = record(ours, images)
    if parts is None:
        parts = [part for part in kept.parts if part.kind in HEADED]
    check_parts(parts, kept)
    _one_of("how", how, WAYS)
    given = _switched(kept, len(images), how, seed, parts)
    metric = lambda found: (found.gather(1, labels[:, None])[:, 0] - found.mean(dim=1)).mean()
    whole = metric(kept.logits)
    effects = [
        (part, float(whole - metric(logits(ours, images, Exchange(given, [part])))))
        for part in parts
    ]
    return sorted(effects, key=lambda row: -row[1])


def check_parts(parts: Iterable[Any], kept: Record) -> None:
    """Raises UsageError for a part that the network has not."""
    known = set(kept.parts) | set(kept.writes)
    for part in parts:
        if part not in known:
            raise UsageError(
                f"no part {part.name!r} in this network" if isinstance(part, Part) else repr(part),
                f"one of {', '.join(one.name for one in kept.parts[:6])} …",
                "take parts from record(model, images).parts",
            )


def _one_of(name: str, given: str, choices: Sequence[str]) -> None:
    if given not in choices:
        raise UsageError(
            f"{name}={given!r}", f"one of {', '.join(choices)}", f"{name}={choices[0]!r}"
        )
