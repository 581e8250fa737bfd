# SPDX-License-Identifier: Apache-2.0
"""`xp.tune`: the schedule of a token reduction that reaches a speed on this machine, and what it
costs.

Of every shape of schedule that a method has (`tokens.ladder`) the weakest is looked for that
reaches the speed, measured in turns with the model as it was; of those the one is taken that
validation pictures like best. What was not measured is not claimed.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from crosspatch.deploy.referee import make_judge
from crosspatch.errors import UsageError
from crosspatch.metrics.interval import paired, wilson
from crosspatch.metrics.latency import Timing, alternate, ratio
from crosspatch.tokens.ladder import Options, ladders
from crosspatch.tokens.reduce import Reduction, put, reduce
from crosspatch.training.package import load_model, model_folder, read_config, save_model

BATCHES = (1, 8)
TRIES = 6  # schedules that are timed for each shape

Progress = Callable[[str, int, int], None]


class Figures(NamedTuple):
    """macs: multiply-adds of one picture; latency: seconds of a call by batch; right: bool (N,),
    the pictures that are named rightly, None where no pictures were given."""

    macs: int
    latency: dict[int, Timing]
    right: np.ndarray | None


class Tried(NamedTuple):
    """A schedule that was timed: its shape, options, how many times as fast, and the share of the
    pictures that it names rightly (None: not judged)."""

    shape: str
    options: Options
    speed: float
    accuracy: float | None


@dataclass(frozen=True)
class Tuned:
    """What was chosen and what was measured.

    speed: how many times as fast as before, by batch, the median of paired turns; difference:
    95 % interval of the change of accuracy on the same pictures, None without pictures.
    """

    method: str
    options: Options
    target: float
    batch: int
    threads: int
    before: Figures
    after: Figures
    speed: dict[int, float]
    difference: tuple[float, float] | None
    tried: tuple[Tried, ...]
    module: nn.Module
    run: Path | None
    temperature: float | None

    def __str__(self) -> str:
        lines = [f"{self.method} {self.options}", f"{'':12}{'before':>22}{'after':>22}"]
        pair = (self.before, self.after)
        lines.append(f"{'GMACs':12}" + "".join(f"{one.macs / 1e9:22.3f}" for one in pair))
        for batch in self.before.latency:
            times = "".join(f"{1e3 * one.latency[batch].median:19.1f} ms" for one in pair)
            lines.append(f"{f'batch {batch}':12}{times}   {self.speed[batch]:.2f}x")
        if self.difference is None:
            lines.append("accuracy    not measured: no pictures were given")
        else:
            low, high = (100 * side for side in self.difference)
            lines.append(f"{'accuracy':12}{_share(self.before)}{_share(self.after)}"
                         f"   {low:+.1f} to {high:+.1f} points")  # fmt: skip
        lines.append(f"torch on {self.threads} threads of this machine, float32")
        return "\n".join(lines)

    def save(self, out: str | Path) -> Path:
        """A run folder with the reduced model in it, for eval, predict, export and `--weights`.

        Raises UsageError where the model did not come from a run (its classes are not known) and
        where something lies at `out` already.
        """
        out = Path(out)
        if self.run is None:
            raise UsageError(
                "a model that came from no run: its classes and preprocessing are not known",
                "the folder of a run in the place of the model",
                'xp.tune("runs/leaves", …).save(…)',
            )
        if out.exists():
            raise UsageError(f"{out} exists", "a new folder", "give another name")
        (out / "model").mkdir(parents=True)
        for name in ("classes.txt", "split.csv", "config.toml"):
            if (self.run / name).is_file():
                shutil.copy(self.run / name, out / name)
        config = read_config(model_folder(self.run))
        judged = 0 if self.after.right is None else len(self.after.right)
        config |= {
            "transforms": list(self.module.transforms),  # type: ignore[arg-type]
            "temperature": self.temperature or 1.0,
            "calibrated_on": judged if self.temperature else 0,
        }
        save_model(out / "model", self.module, config)
        report = json.dumps(self.report(), indent=1) + "\n"
        (out / "tuned.json").write_text(report, encoding="utf-8")
        return out

    def report(self) -> dict[str, Any]:
        """Everything measured, JSON-plain."""
        return {
            "method": self.method,
            "options": self.options,
            "target": self.target,
            "batch": self.batch,
            "threads": self.threads,
            "speed": {str(batch): round(value, 3) for batch, value in self.speed.items()},
            "before": _plain(self.before),
            "after": _plain(self.after),
            "difference": self.difference,
            "tried": [one._asdict() for one in self.tried],
        }


def tune(
    model: nn.Module | str | Path,
    method: str = "mctf",
    *,
    target: str | float = "1.5x",
    data: Any = None,
    batch: int = 1,
    seconds: float = 60.0,
    progress: Progress | None = None,
) -> tuple[nn.Module, Tuned]:
    """`model` reduced by `method` so that it is `target` times as fast here, and the figures.

    model: the folder of a run, or a network. data: for a run what `crosspatch eval` takes (its own
    validation pictures are used where it is the run's data, else all); for a network a pair of
    normalised pictures (N, C, H, W) and class indices (N,); None: nothing is said about accuracy,
    and the shape with the fewest multiply-adds is taken. target: "1.5x" or 1.5, at `batch` pictures
    a call. seconds: for all timings. progress: called with (what, done, all).
    Raises UsageError where no schedule reaches the target (with the fastest that was measured), for
    a method that has none to choose from and for a model that cannot be reduced.
    """
    wanted = _factor(target)
    run = Path(model) if isinstance(model, str | Path) else None
    trained = load_model(run) if run is not None else None
    base: Any = model if trained is None else trained.module
    base.eval()
    judge = None if data is None else make_judge(run, trained, data)
    search = _Search(base, method, wanted, batch, seconds, progress or (lambda *_: None))
    found = search.reaching()
    if judge is not None:
        found = [(one._replace(accuracy=float(judge(module).mean())), module, saved)
                 for one, module, saved in found]  # fmt: skip
    found.sort(key=lambda one: (-(one[0].accuracy or 0), one[2].macs))
    chosen, module, saved, (before, after, speed) = search.holding(found)
    right = [None if judge is None else judge(one) for one in (base, module)]
    named = {id(one.options): one for one, _, _ in found}
    return module, Tuned(
        method=method,
        options=chosen.options,
        target=wanted,
        batch=batch,
        threads=torch.get_num_threads(),
        before=Figures(saved.base, before, right[0]),
        after=Figures(saved.macs, after, right[1]),
        speed=speed,
        difference=_difference(*right),
        tried=tuple(named.get(id(one.options), one) for one in search.tried),
        module=module,
        run=run,
        temperature=judge.temperature(module) if judge is not None else None,
    )


class _Search:
    """Looks for schedules that make `base` `wanted` times as fast at `batch` pictures a call."""

    def __init__(
        self, base: Any, method: str, wanted: float, batch: int, seconds: float, tell: Progress
    ) -> None:
        self.base, self.method, self.wanted, self.batch = base, method, wanted, batch
        self.shapes = ladders(base, method)
        self.each = 0.6 * seconds / len(self.shapes) / TRIES
        self.rest, self.tell = 0.4 * seconds, tell
        self.tried: list[Tried] = []

    def reaching(self) -> list[tuple[Tried, nn.Module, Reduction]]:
        """Of each shape the weakest schedule that reaches the speed. Raises UsageError where none
        does, with the fastest that was measured."""
        found = []
        for place, (shape, rungs) in enumerate(self.shapes.items()):
            self.tell("looking for a schedule", place, len(self.shapes) + 1)
            best = self._climb(shape, rungs)
            if best is not None:
                found.append((best, *reduce(self.base, self.method, **best.options)))
        if found:
            return found
        fastest = max(self.tried, key=lambda one: one.speed)
        raise UsageError(
            f"no schedule of {self.method} was {self.wanted:g} times as fast here at batch "
            f"{self.batch}",
            f"at most {fastest.speed:.2f}x, which {fastest.options} reached",
            "ask for less, another method or a larger batch, or a model with more patches",
        )

    def _climb(self, shape: str, rungs: list[Options]) -> Tried | None:
        """The weakest schedule found that is fast enough, by halving: a stronger one is faster but
        for the noise of the clock."""
        best = self._timed(shape, rungs[-1])
        if best.speed < self.wanted:
            return None
        low, high = 0, len(rungs) - 1
        for _ in range(TRIES - 1):
            if low >= high:
                break
            middle = (low + high) // 2
            one = self._timed(shape, rungs[middle])
            if one.speed >= self.wanted:
                best, high = one, middle
            else:
                low = middle + 1
        return best

    def _timed(self, shape: str, options: Options) -> Tried:
        module = copy.deepcopy(self.base)
        put(module, self.method, options)
        times = self._alternate(module, self.batch, self.each)
        speed = ratio(times["before"], times["after"]).median
        self.tried.append(Tried(shape, options, speed, None))
        return self.tried[-1]

    def holding(
        self, found: list[tuple[Tried, nn.Module, Reduction]]
    ) -> tuple[Tried, nn.Module, Reduction, tuple[dict, dict, dict]]:
        """The first of `found`, or a stronger one of its shape, that is as fast as wanted when
        measured once more, with its latencies. Raises UsageError where none is."""
        self.tell("measuring", len(self.shapes), len(self.shapes) + 1)
        measured = []
        for one, module, saved in found:
            rungs = self.shapes[one.shape]
            at, last = rungs.index(one.options), len(rungs) - 1
            for rung in sorted({at, (at + last + 1) // 2, last}):
                if rung != at:
                    one = Tried(one.shape, rungs[rung], 0.0, None)
                    module, saved = reduce(self.base, self.method, **one.options)
                took = self.latencies(module)
                measured.append(took[2][self.batch])
                if measured[-1] >= self.wanted:
                    return one, module, saved, took
        raise UsageError(
            f"no schedule of {self.method} stayed {self.wanted:g} times as fast at batch "
            f"{self.batch} when it was measured again",
            f"at most {max(measured):.2f}x here, now",
            "ask for less, give more seconds, or try on a quiet machine",
        )

    def latencies(self, module: nn.Module) -> tuple[dict, dict, dict]:
        """(seconds before, after, how many times as fast) by batch."""
        batches = sorted({*BATCHES, self.batch})
        took = {n: self._alternate(module, n, self.rest / len(batches)) for n in batches}
        before, after = ({b: t[which] for b, t in took.items()} for which in ("before", "after"))
        return before, after, {b: ratio(before[b], after[b]).median for b in took}

    @torch.inference_mode()
    def _alternate(self, module: Any, batch: int, seconds: float) -> dict[str, Timing]:
        like, shape = next(module.parameters()), (batch, module.in_chans, *module.img_size)
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(like)
        calls = {"before": partial(self.base, x), "after": partial(module, x)}
        return alternate(calls, seconds=seconds, least=5, settle=0)


def _factor(target: str | float) -> float:
    text = str(target).strip().lower().removesuffix("x")
    if not re.fullmatch(r"\d+(\.\d+)?", text) or not 1 < float(text) < 100:
        raise UsageError(f"target {target!r}", "a factor above 1, such as 1.5x", 'target="1.5x"')
    return float(text)


def _difference(before: np.ndarray | None, after: np.ndarray | None) -> Any:
    if before is None or after is None:
        return None
    gained, lost = int((after & ~before).sum()), int((before & ~after).sum())
    return paired(gained, lost, len(before))


def _share(figures: Figures) -> str:
    if figures.right is None:
        return f"{'–':>22}"
    low, high = wilson(int(figures.right.sum()), len(figures.right))
    return f"{f'{100 * figures.right.mean():.1f} % ({100 * low:.1f}–{100 * high:.1f})':>22}"


def _plain(figures: Figures) -> dict[str, Any]:
    latency = {str(b): {"median": t.median, "low": t.low, "high": t.high, "turns": t.count}
               for b, t in figures.latency.items()}  # fmt: skip
    if figures.right is None:
        return {"macs": figures.macs, "latency": latency, "accuracy": None}
    k, n = int(figures.right.sum()), len(figures.right)
    low, high = wilson(k, n)
    accuracy = {"accuracy": k / n, "low": low, "high": high, "pictures": n}
    return {"macs": figures.macs, "latency": latency, "accuracy": accuracy}
