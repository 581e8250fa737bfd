# SPDX-License-Identifier: Apache-2.0
"""One training step, and everything that a step changes.

No random draw depends on what happened before: augmentation is drawn from (seed, epoch, position),
dropout, drop path and mixing from (seed, step, rank), the rate is a function of the step. So a step
is a function of the tensors in `tensors()` and of its number.
"""

from __future__ import annotations

import inspect
import logging
import math
import random
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from crosspatch.data.augment import augment, placement, shrunk
from crosspatch.data.loading import Batch
from crosspatch.errors import UsageError
from crosspatch.layers import linear
from crosspatch.objectives import Inputs, Objective
from crosspatch.training import launch, team
from crosspatch.training.batch_norm import share_norms
from crosspatch.training.guard import Cut, NotFinite, Watch, factor, spoilt
from crosspatch.training.optim import (
    FOREACH,
    SGD,
    Ema,
    HeadFirst,
    epoch_rate,
    layer_scales,
    make_optimiser,
    set_rate,
    staged_rate,
)
from crosspatch.training.recipe import Recipe
from crosspatch.training.sam import sharpness_aware

FABRIC_PRECISION: dict[str, Any] = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}


def make_fabric(recipe: Recipe) -> Any:
    """Lightning Fabric for the recipe's device and precision, and for the processes of the team.

    Raises UsageError when the recipe's device is absent.
    """
    from lightning_fabric import Fabric
    from lightning_fabric.strategies import DDPStrategy

    if recipe.device == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            "the run was planned for a GPU, and this machine shows none",
            "the machine on which it was begun",
            "continue there, or train anew with --overwrite",
        )
    # it announces bf16 on stderr, which the first screen has said already
    logging.getLogger("lightning_fabric.utilities.rank_zero").setLevel(logging.WARNING)
    accelerator = "cuda" if recipe.device == "cuda" else "cpu"
    precision = FABRIC_PRECISION[recipe.precision]
    if team.size() == 1:
        return Fabric(accelerator=accelerator, devices=1, precision=precision)
    fabric = Fabric(
        accelerator=accelerator,
        devices=launch.local_world(),
        num_nodes=launch.machines(),
        # a reduction may hold weights that an objective does not use
        strategy=DDPStrategy(**_own_buffers(), find_unused_parameters=bool(recipe.reduce)),
        precision=precision,
    )
    fabric.launch()
    return fabric


def _own_buffers() -> dict[str, Any]:
    """DDP's option to leave buffers alone, by its name in this torch: `share_norms` keeps them the
    same in all processes."""
    known = inspect.signature(nn.parallel.DistributedDataParallel).parameters
    return {
        "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False
    }


def seed_step(seed: int, step: int, rank: int, device: torch.device) -> None:
    """Seed the generators of torch, NumPy and Python for one step: a pure function of (seed, step,
    rank)."""
    words = np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)
    value = int(words[0] >> np.uint64(1))
    torch.default_generator.manual_seed(value)
    random.seed(value)
    np.random.seed(value % 2**32)  # noqa: NPY002 - who draws from the global state gets the same
    if device.type == "cuda":
        torch.cuda.manual_seed(value)


class Stepper:
    """Objective, optimiser and moving average of a run, on their device.

    `step(batch, epoch, step)` trains on one batch; `loss_sum` and `loss_count` gather the loss
    since `reset_loss`, on the device, so that nothing waits for it. `cuts`: from which steps on the
    rate is lower than planned, and how many times (`training.guard`).
    """

    def __init__(self, recipe: Recipe, objective: Objective) -> None:
        if not isinstance(objective, nn.Module):
            raise TypeError("an objective is a torch module")
        torch.set_num_threads(recipe.threads)
        linear.use(recipe.linear)
        self.recipe = recipe
        self.fabric = make_fabric(recipe)
        self.device: torch.device = self.fabric.device
        self.objective = objective.to(self.device)
        if team.size() > 1:
            share_norms(self.objective)
        self.preprocess = recipe.preprocess
        self.ema: Ema | None = None
        if recipe.ema > 0:
            self.ema = Ema(objective.averaged, steps=recipe.steps, half_life=recipe.ema)
        if recipe.compile:
            objective.exported.compile()
        free = {
            name for name in objective.no_decay() if name.rpartition(".")[2] not in recipe.decay
        }
        self.optimiser = make_optimiser(
            objective,
            free,
            lr=recipe.lr,
            weight_decay=recipe.weight_decay,
            betas=recipe.betas,
            kind=FOREACH if _needs_foreach(recipe) else recipe.optimiser,
            scales=_scales(objective, recipe.layer_decay),
        )
        self.head_first = HeadFirst(objective.exported, recipe.freeze)
        self._wrapped, self._driver = self.fabric.setup(self.objective, self.optimiser)
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        self.loss_count = 0
        self.watch, self.cuts = Watch(), list[Cut]()

    @property
    def reads_each_step(self) -> bool:
        """Whether a look at the loss of every step costs nothing; a GPU would be waited for."""
        return self.device.type == "cpu"

    @property
    def evaluated(self) -> nn.Module:
        """The module that is validated and shipped: the average, where there is one."""
        return self.ema.module if self.ema is not None else self.objective.exported

    def lr(self, step: int) -> float:
        """The rate of a step, from 0."""
        r, per = self.recipe, self.recipe.steps_per_epoch
        if r.schedule == "epochs":
            length = {"epochs": r.steps / per, "warmup": r.warmup / per}
            planned = epoch_rate(step // per, **length, peak=r.lr, floor=r.min_lr)
        else:
            planned = staged_rate(
                step, stages=r.stages, steps=r.steps, warmup=r.warmup, peak=r.lr, floor=r.min_lr
            )
        return planned * factor(self.cuts, step)

    def step(self, batch: Batch, epoch: int, step: int) -> None:
        """Train on one batch of uint8 pictures; `step` counts from 0 over the whole run."""
        r, rank = self.recipe, self.fabric.global_rank
        seed_step(r.seed, step, rank, self.device)
        set_rate(self.optimiser, self.lr(step))
        images, *views = self._augmented(batch, epoch)
        labels = batch.labels.to(self.device, non_blocking=True)
        inputs = Inputs(
            images,
            labels,
            (r.seed, step, rank),
            self.fabric.world_size / batch.n_global,
            batch.index,
            self._warp(batch, epoch),
            tuple(views),
            batch.items,
        )
        self.head_first.before(step)
        loss = self._backward(inputs, step, batch.index)
        if r.sam > 0:
            again = partial(self._backward, inputs, step, batch.index)
            sharpness_aware(self.objective, r.sam, again)
        if r.clip > 0:
            norm = self.fabric.clip_gradients(
                self._wrapped, self._driver, max_norm=r.clip, error_if_nonfinite=False
            )
            if norm is not None and r.precision != "fp16":  # there the loss scaler expects them
                self.watch.note(step, "gradient", norm, batch.index)
        self._driver.step()
        self._driver.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update(step)
        self.loss_sum += team.mean(loss.detach())
        self.loss_count += 1

    def _backward(self, inputs: Inputs, step: int, index: Tensor) -> Tensor:
        """The loss of one pass, whose gradients lie in the parameters; index: its pictures. Each
        pass of a sharpness-aware step draws the same."""
        r, rank = self.recipe, self.fabric.global_rank
        if r.sam > 0:
            seed_step(r.seed, step, rank, self.device)
        loss = self._wrapped(inputs, step / r.steps)["loss"]
        self.watch.note(step, "loss", loss, index)
        self.fabric.backward(loss)
        self.head_first.after(step)
        return loss

    def _draws(self, epoch: int) -> dict[str, Any]:
        """What the augmentation of an epoch is drawn by."""
        r = self.recipe
        return {
            "epoch": epoch, "seed": r.seed, "config": r.augment, "preprocess": self.preprocess
        }  # fmt: skip

    def _augmented(self, batch: Batch, epoch: int) -> list[Tensor]:
        """The pictures at the recipe's size and at each further one, each time with draws of their
        own."""
        stored = batch.images.to(self.device, non_blocking=True)
        how = self._draws(epoch)
        made = [augment(stored, batch.positions, **how)]
        for number, size in enumerate(self.recipe.sizes, 1):
            made.append(shrunk(augment(stored, batch.positions, **how, stream=number), size))
        return made

    def _warp(self, batch: Batch, epoch: int) -> Tensor | None:
        """Where the augmented pictures lie in the stored ones, if the objective asks for it."""
        if not getattr(self.objective, "reads_warp", False):
            return None
        return placement(batch.positions, **self._draws(epoch)).to(self.device)

    def mean_loss(self, step: int) -> float:
        """Mean loss since `reset_loss`, in nats, after `step` steps (waits for the device).

        Raises NotFinite when it, or a figure since the last call, is not finite.
        """
        self.watch.check()
        if not self.loss_count:
            return math.nan
        mean = float(self.loss_sum) / self.loss_count
        if not math.isfinite(mean):
            raise NotFinite(step - 1, "loss", mean, self.watch.last)
        return mean

    def check_weights(self, step: int) -> None:
        """Raises NotFinite when a weight, or the average of one, is not finite after `step` steps:
        such a state is never saved."""
        averaged = self.ema.module.named_parameters() if self.ema is not None else ()
        if spoilt([*self.objective.named_parameters(), *averaged]) is not None:
            raise NotFinite(step - 1, "weights", math.nan, self.watch.last)

    def reset_loss(self) -> None:
        """Begin to gather the loss anew."""
        self.loss_sum.zero_()
        self.loss_count = 0

    def tensors(self) -> dict[str, Tensor]:
        """Everything that steps change, by name."""
        found = {f"objective/{k}": v for k, v in self.objective.state_dict().items()}
        if self.ema is not None:
            found |= {f"ema/{k}": v for k, v in self.ema.module.state_dict().items()}
        for group in self.optimiser.param_groups:
            for name, parameter in zip(group["names"], group["params"], strict=True):
                for key, value in self.optimiser.state.get(parameter, {}).items():
                    found[f"optimiser/{key}/{name}"] = torch.as_tensor(value)
        found["loss_sum"] = self.loss_sum
        found["random/torch"] = torch.get_rng_state()
        if self.device.type == "cuda":
            found["random/cuda"] = torch.cuda.get_rng_state(self.device)
        return found

    def numbers(self) -> dict[str, Any]:
        """What steps change and JSON holds."""
        return {
            "loss_count": self.loss_count,
            "cuts": [list(cut) for cut in self.cuts],
            "random": _random_states(),
            "scaler": self.fabric.strategy.precision.state_dict(),
            "groups": [
                {k: v for k, v in group.items() if k not in ("params", "names")}
                for group in self.optimiser.param_groups
            ],
        }

    def restore(self, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        """Put back what `tensors` and `numbers` gave. Raises UsageError when it does not fit."""
        try:
            self.objective.load_state_dict(_part(tensors, "objective/"))
            if self.ema is not None:
                self.ema.module.load_state_dict(_part(tensors, "ema/"))
        except RuntimeError as error:
            raise UsageError(
                f"the saved state does not fit the model: {error}",
                "the state of this run",
                "train anew with --overwrite",
            ) from error
        self._restore_optimiser(tensors)
        self.loss_sum.copy_(tensors["loss_sum"])
        self.loss_count = int(numbers["loss_count"])
        self.cuts = [(int(start), float(times)) for start, times in numbers.get("cuts", ())]
        self.watch = Watch()
        self.optimiser.zero_grad(set_to_none=True)
        if numbers["scaler"]:
            self.fabric.strategy.precision.load_state_dict(numbers["scaler"])
        _restore_random(numbers.get("random"))
        torch.set_rng_state(tensors["random/torch"])
        if self.device.type == "cuda" and "random/cuda" in tensors:
            torch.cuda.set_rng_state(tensors["random/cuda"], self.device)

    def _restore_optimiser(self, tensors: dict[str, Tensor]) -> None:
        found: dict[str, dict[str, Tensor]] = {}
        for place, value in _part(tensors, "optimiser/").items():
            key, name = place.split("/", 1)
            found.setdefault(name, {})[key] = value
        on_cpu = {"step"} if self.device.type == "cpu" else set()
        for group in self.optimiser.param_groups:
            for name, parameter in zip(group["names"], group["params"], strict=True):
                self.optimiser.state[parameter] = {
                    key: value.clone() if key in on_cpu else value.to(self.device, copy=True)
                    for key, value in found.get(name, {}).items()
                }


def _needs_foreach(recipe: Recipe) -> bool:
    return recipe.precision == "fp16" and recipe.optimiser != SGD


def _random_states() -> dict[str, Any]:
    """Python's and NumPy's global states, as JSON holds them. No step depends on them."""
    version, words, gauss = random.getstate()
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002 - the state that others draw from
    return {
        "python": [version, list(words), gauss],
        "numpy": [kind, np.asarray(keys).tolist(), *rest],
    }


def _restore_random(states: dict[str, Any] | None) -> None:
    if states is None:  # a state of an older version
        return
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, np.array(keys, np.uint32), *rest))  # noqa: NPY002 - as above


def _scales(objective: Any, decay: float) -> dict[str, float]:
    """`layer_scales` of the exported model, under the objective's names; none for a decay of 1."""
    if decay == 1:
        return {}
    model = objective.exported
    scales = layer_scales(model, decay)
    own = {id(parameter): scales[name] for name, parameter in model.named_parameters()}
    return {name: own[id(p)] for name, p in objective.named_parameters() if id(p) in own}


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
