# SPDX-License-Identifier: Apache-2.0
"""Optimiser, learning rate and the moving average of the weights."""

from __future__ import annotations

import copy
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence

import crosspatch._torchvision  # noqa: F401

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from crosspatch.errors import UsageError
from crosspatch.models.registry import classifiers

FUSED = "adamw-fused"
FOREACH = "adamw-foreach"
SGD = "sgd"
WARMUP_FROM = 1e-6  # DeiT's rate at the start of the warm-up
AGAIN = 0.5  # of the peak rate, in a stage that was added to a run that had ended
EMA_START = 10  # the average follows faster at first: decay <= (1 + t) / (EMA_START + t)


def rate(step: int, *, steps: int, warmup: int, peak: float, floor: float) -> float:
    """Learning rate of step 0..steps-1: linear warm-up over `warmup` steps, then half a cosine.

    A pure function of the step, so that resuming needs no scheduler. The first step has
    peak / (warmup + 1), step `warmup` has the peak, the last step ends next to `floor`.
    """
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, steps - warmup)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def epoch_rate(
    epoch: int,
    *,
    epochs: float,
    warmup: float,
    peak: float,
    floor: float,
    start: float = WARMUP_FROM,
) -> float:
    """DeiT's learning rate of epoch 0..epochs-1, constant within the epoch (arXiv 2012.12877, the
    authors' code): linear warm-up from `start` over `warmup` epochs, then half a cosine to `floor`.

    Their scheduler is stepped after an epoch with that epoch's number, so that epoch e has the rate
    of time e - 1 and epochs 0 and 1 both have `start`; the cosine is counted from epoch 0.
    """
    time = max(0, epoch - 1)
    if time < warmup:
        start = min(start, peak)
        return start + time * (peak - start) / warmup
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, time / epochs)))


def staged_rate(
    step: int, *, stages: Sequence[int], steps: int, warmup: int, peak: float, floor: float
) -> float:
    """`rate` for a run that was made longer: each stage has a warm-up and half a cosine of its own.

    stages: the steps at which earlier stages ended. A later stage rises to `AGAIN` times the peak
    only, as the weights are good already, in at most a tenth of its steps.
    """
    place, ends = bisect_right(stages, step), [0, *stages, steps]
    start, length = ends[place], ends[place + 1] - ends[place]
    if place:
        peak, warmup = max(floor, AGAIN * peak), min(warmup, length // 10)
    return rate(step - start, steps=length, warmup=warmup, peak=peak, floor=floor)


def ema_decay(step: int, *, steps: int, half_life: float) -> float:
    """Decay of the average at step 0..steps-1; `half_life` is a fraction of the whole run.

    A fixed decay would average over all of a short run and over nothing of a long one.
    """
    if half_life <= 0:
        return 0.0
    scaled = 0.5 ** (1 / max(1.0, half_life * steps))
    return min(scaled, (1 + step) / (EMA_START + step))


def split_decay(
    module: nn.Module, no_decay: set[str]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Trainable parameters by name: (decayed, undecayed). Vectors, scalars, biases and the named
    ones are not decayed."""
    decayed, undecayed = {}, {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        free = parameter.ndim <= 1 or name.endswith(".bias") or name in no_decay
        (undecayed if free else decayed)[name] = parameter
    return decayed, undecayed


def layer_scales(model: nn.Module, decay: float) -> dict[str, float]:
    """What the rate of each parameter is multiplied with: 1 in the head, `decay` times that in the
    layer below it, and so on down to the embeddings (BEiT, arXiv 2106.08254, section 3.2; ULMFiT,
    arXiv 1801.06146, section 3.2).

    Layers are what the model's `group_matcher` says (timm's contract). Raises UsageError for a
    model without one.
    """
    from timm.models import group_parameters

    if not hasattr(model, "group_matcher"):
        raise UsageError(
            f"layer_decay = {decay:g} for {type(model).__name__}, which names no layers",
            "a model with timm's group_matcher",
            "set layer_decay to 1, or take another --model",
        )
    matcher = model.group_matcher()  # type: ignore[operator]
    depth = group_parameters(model, matcher, reverse=True)
    last = max(depth.values())
    return {name: decay ** (last - layer) for name, layer in depth.items()}


def make_optimiser(
    module: nn.Module,
    no_decay: set[str],
    *,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    kind: str = FUSED,
    scales: Mapping[str, float] | None = None,
) -> torch.optim.Optimizer:
    """AdamW, or SGD with momentum, over `module`'s parameters. Each group carries its parameters'
    names ("names") and, with `scales` by name, what its rate is multiplied with ("scale").

    kind: `FUSED` is 2 to 3 times faster on a CPU than `FOREACH`; their bits differ, so the choice
    is part of the run. The loss scaling of fp16 needs `FOREACH`. `SGD` has the first of `betas` as
    its momentum.
    """
    decayed, undecayed = split_decay(module, no_decay)
    groups = [
        {"params": list(some.values()), "weight_decay": decay, "names": list(some), "scale": scale}
        for part, decay in ((decayed, weight_decay), (undecayed, 0.0))
        for scale, some in _by_scale(part, scales or {})
    ]
    if kind == SGD:
        return torch.optim.SGD(groups, lr=lr, momentum=betas[0], foreach=True)
    how = {"fused": True} if kind == FUSED else {"foreach": True}
    return torch.optim.AdamW(groups, lr=lr, betas=betas, **how)


def _by_scale(
    part: Mapping[str, Tensor], scales: Mapping[str, float]
) -> list[tuple[float, dict[str, Tensor]]]:
    """The parameters grouped by their scale, lowest first; 1 where none is given."""
    groups: dict[float, dict[str, Tensor]] = {}
    for name, parameter in part.items():
        groups.setdefault(scales.get(name, 1.0), {})[name] = parameter
    return sorted(groups.items(), key=lambda pair: pair[0])


def set_rate(optimiser: torch.optim.Optimizer, value: float) -> None:
    """Give every group this rate, times its scale."""
    for group in optimiser.param_groups:
        group["lr"] = value * group.get("scale", 1.0)


class HeadFirst:
    """The first `steps` steps of a run, in which only the classifiers of `model` learn.

    A pure function of the step: running averages of normalisations stand still, and gradients of
    everything else are taken away before the optimiser sees them. Raises UsageError for a model
    without classifiers.
    """

    def __init__(self, model: nn.Module, steps: int) -> None:
        self.steps = steps
        heads = classifiers(model) if steps else {}
        if steps and not heads:
            raise UsageError(
                f"freeze = {steps} for {type(model).__name__}, which names no classifier",
                "a model with timm's get_classifier",
                "set freeze to 0, or take another --model",
            )
        kept = {id(p) for head in heads.values() for p in head.parameters()}
        self.body = [p for p in model.parameters() if id(p) not in kept]
        self.norms = [m for m in model.modules() if isinstance(m, _NormBase)]

    def before(self, step: int) -> None:
        """Ahead of the forward pass of a step."""
        if self.steps:
            for norm in self.norms:
                norm.train(step >= self.steps)

    def after(self, step: int) -> None:
        """Between the backward pass and whatever reads gradients."""
        if step < self.steps:
            for parameter in self.body:
                parameter.grad = None


class Ema:
    """An exponential moving average of a module's parameters and buffers.

    module: the averaged copy, in eval mode, without gradients. Whole-number buffers are copied.
    """

    def __init__(self, source: nn.Module, *, steps: int, half_life: float) -> None:
        self.module = copy.deepcopy(source).eval().requires_grad_(False)
        self.steps, self.half_life = steps, half_life
        self._rebind(source)

    def _rebind(self, source: nn.Module) -> None:
        mine, theirs = self.module.state_dict(), source.state_dict()
        smooth = [name for name, value in theirs.items() if value.is_floating_point()]
        self._mine = [mine[name] for name in smooth]
        self._theirs = [theirs[name] for name in smooth]
        self._copied = [(mine[n], v) for n, v in theirs.items() if not v.is_floating_point()]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the source after the optimiser's step number `step` (from 0)."""
        weight = 1 - ema_decay(step, steps=self.steps, half_life=self.half_life)
        torch._foreach_lerp_(self._mine, self._theirs, weight)
        for mine, theirs in self._copied:
            mine.copy_(theirs)
