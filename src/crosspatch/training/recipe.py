# SPDX-License-Identifier: Apache-2.0
"""The recipe: every resolved setting of a run, in one frozen object written to config.toml."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field, fields
from typing import Any

from crosspatch.data.augment import AugmentConfig
from crosspatch.data.preprocess import FITS, Preprocess
from crosspatch.errors import UsageError, near
from crosspatch.layers.linear import MODES
from crosspatch.tasks import TASKS
from crosspatch.tokens.spec import parse
from crosspatch.training.harmless import require_harmless

PRECISIONS = ("fp32", "bf16", "fp16")
MIXERS = (
    "mixup", "cutmix", "mixup-batch", "cutmix-batch", "resizemix", "resizemix-beta", "maskmix",
    "mixpro", "transmix",
)  # fmt: skip
SCHEDULES = ("cosine", "epochs")
OPTIMISERS = ("adamw-fused", "adamw-foreach", "sgd")
EFFECTIVES = ("effective", "drw")
BALANCES = ("none", "weights", *EFFECTIVES, "sampler", "auto")
Pair = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Every setting of one training. Raises UsageError for a value that cannot be trained with.

    task: one of `tasks.TASKS`, what the labels mean; model, model_args: entry point and its further
    arguments; size, store: height and width that the model takes and that pictures are kept in;
    batch: pictures per step; steps: of the whole run; steps_per_epoch; lr: peak rate; min_lr: last
    rate; warmup: steps of warm-up; schedule: how the rate runs between them, "cosine" step by step,
    "epochs" constant within each (`optim.rate`, `optim.epoch_rate`); decay: last parts of names of
    parameters that are decayed although the model says otherwise; repeats: how often in a row an
    epoch has each picture; ema: half-life of the weight average as a fraction of the run (0 = off);
    clip: largest gradient norm (0 = off); weights: what is taken instead of fresh ones (kind,
    where, path, sha256; empty: nothing), and head_rows: for each class the row of a run's head, -1
    for none (empty: none at all); freeze: steps at the start in which only the head learns;
    layer_decay: what the rate is multiplied with from a layer to the one below it; penalties: those
    that a linear probe tries, empty where the whole network is trained; reduce: the token reduction
    that is put on the model, as `tokens.spec.spell` writes it ("" = none); objective: what is
    learnt (`training.objective`), and objective_args: its options; teacher: the network that it
    learns from (as weights), and labels: the file of token labels (path, sha256), empty without;
    sizes: further input sizes that it trains at; sam: radius of sharpness-aware minimisation (0 =
    off); mix: names out of `MIXERS`;
    mix_prob: chance of each per batch; mix_alpha: of each Beta distribution; eval_every: epochs
    between validations; time_budget: seconds asked for, or None; threads: CPU threads (numbers
    differ between thread counts); devices: processes that train together, each with so many threads
    or a GPU; linear: whether large products go through oneDNN (`layers.linear`), "on" or "off" once
    a run has begun; workers: loader processes, used when the pictures do not fit into memory;
    balance: what is done about uneven classes (`training.balance`), not "auto" once a run has
    begun; class_weights: of the loss, by label (empty: all alike), and deferred: from which part of
    the run on; class_counts: training pictures by label; split_seed: of the split of the pictures,
    None for `seed`; stages: steps at which the run
    had ended before it was made longer.
    """

    name: str
    task: str = "classify"
    model: str
    model_args: dict[str, Any] = field(default_factory=dict)
    size: tuple[int, int]
    store: tuple[int, int]
    fit: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    batch: int
    steps: int
    steps_per_epoch: int
    lr: float
    min_lr: float
    weight_decay: float
    betas: Pair
    warmup: int
    schedule: str = "cosine"
    decay: tuple[str, ...] = ()
    repeats: int = 1
    ema: float
    smoothing: float
    drop_path: float
    clip: float
    weights: dict[str, str] = field(default_factory=dict)
    head_rows: tuple[int, ...] = ()
    freeze: int = 0
    layer_decay: float = 1.0
    penalties: tuple[float, ...] = ()
    reduce: str = ""
    objective: str = "supervised"
    objective_args: dict[str, Any] = field(default_factory=dict)
    teacher: dict[str, str] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)
    sizes: tuple[tuple[int, int], ...] = ()
    sam: float = 0.0
    mix: tuple[str, ...] = ()
    mix_prob: tuple[float, ...] = ()
    mix_alpha: tuple[float, ...] = ()
    augment: AugmentConfig
    device: str = "cpu"
    precision: str = "fp32"
    optimiser: str = "adamw-fused"
    compile: bool = False
    seed: int = 0
    workers: int = 0
    threads: int = 1
    devices: int = 1
    linear: str = "off"
    balance: str = "none"
    class_weights: tuple[float, ...] = ()
    deferred: float = 0.0
    class_counts: tuple[int, ...] = ()
    split_seed: int | None = None
    eval_every: int = 1
    eval_batch: int = 256
    time_budget: float | None = None
    stages: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        counts = ("batch", "steps", "steps_per_epoch", "repeats", "threads", "eval_every")
        for name in (*counts, "eval_batch", "devices"):
            _check(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        _check(min(*self.size, *self.store) >= 1, "size", self.size, "at least 1 pixel a side")
        _check(0 < self.lr < 10, "lr", self.lr, "between 0 and 10")
        _check(0 <= self.min_lr <= self.lr, "min_lr", self.min_lr, "between 0 and lr")
        _check(self.weight_decay >= 0, "weight_decay", self.weight_decay, "0 or more")
        _check(0 <= self.smoothing < 1, "smoothing", self.smoothing, "in [0, 1)")
        _check(0 <= self.drop_path < 1, "drop_path", self.drop_path, "in [0, 1)")
        _check(0 <= self.ema < 1, "ema", self.ema, "in [0, 1)")
        _check(isinstance(self.weights, dict), "weights", self.weights, "a table: kind, path, …")
        _check(self.freeze >= 0, "freeze", self.freeze, "0 or more")
        _check(0 < self.layer_decay <= 1, "layer_decay", self.layer_decay, "above 0 and at most 1")
        _check(0 <= self.sam < math.inf, "sam", self.sam, "0 or more")
        _check(0 <= self.deferred <= 1, "deferred", self.deferred, "in [0, 1]")
        _check(self.workers >= 0, "workers", self.workers, "0 or more")
        _check(self.task in TASKS, "task", self.task, f"one of {', '.join(TASKS)}")
        _check(self.fit in FITS, "fit", self.fit, f"one of {', '.join(FITS)}")
        _check(self.linear in MODES, "linear", self.linear, f"one of {', '.join(MODES)}")
        _check(self.balance in BALANCES, "balance", self.balance, f"one of {', '.join(BALANCES)}")
        _check(min(self.class_weights, default=1) > 0, "class_weights", "0 or less", "above 0")
        _check(self.precision in PRECISIONS, "precision", self.precision, "one of fp32, bf16, fp16")
        schedules = f"one of {', '.join(SCHEDULES)}"
        _check(self.schedule in SCHEDULES, "schedule", self.schedule, schedules)
        kinds = f"one of {', '.join(OPTIMISERS)}"
        _check(self.optimiser in OPTIMISERS, "optimiser", self.optimiser, kinds)
        halved = self.precision == "fp16" and self.device == "cpu"
        _check(not halved, "precision", "fp16 on a CPU", "fp32 or bf16 there")
        unknown = sorted(set(self.mix) - set(MIXERS))
        _check(not unknown, "mix", unknown, f"out of {', '.join(MIXERS)}")
        if self.reduce:
            parse(self.reduce)

    @property
    def epochs(self) -> int:
        """Epochs begun by the end of the run; the last may be a part."""
        return -(-self.steps // self.steps_per_epoch)

    @property
    def preprocess(self) -> Preprocess:
        """What is done to every picture, in training, evaluation and prediction alike."""
        return Preprocess(
            size=self.size, store=self.store, fit=self.fit, mean=self.mean, std=self.std
        )

    def evaluations(self) -> list[int]:
        """The steps after which validation is due: every `eval_every` epochs and at each end."""
        every = self.steps_per_epoch * self.eval_every
        return sorted({*range(every, self.steps, every), *self.stages, self.steps})

    def longer(self, steps: int) -> Recipe:
        """The recipe of a run that has ended and goes on to `steps`: see `optim.staged_rate`."""
        return dataclasses.replace(self, steps=steps, stages=(*self.stages, self.steps))

    def by(self, devices: int, threads: int | None = None) -> Recipe:
        """The recipe for another number of processes, which share the threads there were."""
        if devices == self.devices:
            return self
        threads = threads or max(1, self.threads * self.devices // devices)
        return dataclasses.replace(self, devices=devices, threads=threads)

    @property
    def shorter(self) -> Recipe | None:
        """What the recipe was before it was made longer, or None."""
        if not self.stages:
            return None
        *before, steps = self.stages
        return dataclasses.replace(self, steps=steps, stages=tuple(before))

    def to_dict(self) -> dict[str, Any]:
        """A dict for TOML and JSON: lists for tuples, and nothing for None."""
        return _plain(dataclasses.asdict(self))

    @classmethod
    def from_dict(cls, given: dict[str, Any]) -> Recipe:
        """The inverse of `to_dict`. Raises UsageError for unknown or missing settings."""
        _known(cls, given)
        made = {key: _tuples(value) for key, value in given.items()}
        augment = made.get("augment", {})
        if isinstance(augment, dict):
            _known(AugmentConfig, augment)
            made["augment"] = AugmentConfig(**{k: _tuples(v) for k, v in augment.items()})
        for name in ("model_args", "objective_args"):
            made[name] = given.get(name, {})
        require_harmless(made["model_args"], "the settings of the run")
        return cls(**made)


def _check(right: bool, name: str, got: Any, expected: str) -> None:
    if not right:
        raise UsageError(f"{name} = {got}", f"{name} is {expected}", f"change {name}")


def _known(kind: type, given: dict[str, Any]) -> None:
    known = {f.name: f for f in fields(kind)}
    for name in given:
        if name not in known:
            hint = near(name, known)
            raise UsageError(
                f"unknown setting {name!r}",
                f"a setting of {kind.__name__}{f', such as {hint}' if hint else ''}",
                f"remove {name} or correct its name",
            )
    optional = dataclasses.MISSING
    missing = [
        f.name
        for f in known.values()
        if f.name not in given and f.default is optional and f.default_factory is optional
    ]
    if missing:
        raise UsageError(
            f"settings are missing: {', '.join(missing)}",
            f"every setting of {kind.__name__}",
            "train anew with --overwrite, or put them back",
        )


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list | tuple) else value


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items() if v is not None}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value
