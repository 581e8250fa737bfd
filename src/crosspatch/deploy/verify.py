# SPDX-License-Identifier: Apache-2.0
"""A bundle against the torch model that it was made of, on the user's own pictures.

Every engine that this machine has answers the same pixels as the reference: the model of a run in
torch, fp32, on the processor. What is asked of them: in fp32 no probability may differ by more than
TOLERANCE, and no picture may get another class (of several labels: another set of them) unless the
reference itself was undecided; int8 must give the same to AGREEMENT of the pictures; bf16, which
nobody gets unasked, is reported and not judged. Where tokens are reduced, two that score almost the
same may change places with the engine: pictures beyond TOLERANCE whose answer the reference gives
as well, once such near-ties fall otherwise (`deploy.ties`), are counted and said, and not held
against the engine; of all others no more than UNEXPLAINED may be. Without a run there are the
answers of torch to two check pictures, which every bundle carries, and the engines are compared
with the first of them. This module imports torch only where a run is at hand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from crosspatch.data.labels import SEPARATOR
from crosspatch.deploy.bundle import Bundle, check_pictures
from crosspatch.deploy.engines import TOLERANCE, Engine, Setting, available, open_engine
from crosspatch.deploy.loading import MANY, weights_hash
from crosspatch.deploy.predictor import Failure, Picture, Predictor, decide
from crosspatch.errors import CrosspatchError, DataError, UsageError
from crosspatch.metrics.latency import Timing, alternate, ratio
from crosspatch.processor import usable_cores

if TYPE_CHECKING:
    from crosspatch.deploy.torch_engine import TorchEngine

AGREEMENT = 0.97
"""Least share of pictures to which int8 must give the class that the reference gives."""
UNEXPLAINED = 0.01
"""Largest share of pictures of a model with reduced tokens that may differ by more than TOLERANCE
without being a near-tie by the reference's own answers; none of them may change its class."""
EXAMINED = 32
"""Pictures that the reference is asked about, at most; the rest counts as unexplained."""
SECONDS = 2.0  # how long latencies are measured
THREADS = 1
"""Latencies are those of one thread: on a machine that is busy with other things, several threads
that wait for each other measure the other things."""


class Comparison(NamedTuple):
    """agreed: pictures with the same class, or the same labels; difference: largest of a
    probability, 0 for none; changed: places of pictures with others although the reference was
    decided."""

    agreed: int
    difference: float
    changed: list[int]


@dataclass
class EngineReport:
    """What one engine did. Fields are None where nothing was there to compare with.

    check: largest difference on the embedded check pictures; milliseconds: median of one picture on
    one thread; faster: how many times as fast as torch, turn by turn; selection: of a model with
    reduced tokens in fp32, the pictures that differ by more than TOLERANCE, those of them that are
    near-ties, and the largest difference; problems: empty when all is well.
    """

    engine: str
    precision: str
    check: float | None = None
    compared_with: str | None = None
    agreed: int | None = None
    difference: float | None = None
    changed: list[dict[str, Any]] = field(default_factory=list)
    milliseconds: float | None = None
    faster: float | None = None
    selection: dict[str, Any] | None = None
    problems: list[str] = field(default_factory=list)


@dataclass
class Report:
    """What is known of a bundle. pictures: those compared; problems: of the bundle as a whole."""

    bundle: Bundle
    run: Path | None
    same_weights: bool | None
    pictures: int
    failures: list[Failure]
    engines: list[EngineReport]
    torch_milliseconds: float | None
    problems: list[str]

    @property
    def ok(self) -> bool:
        """Whether nothing was found."""
        return not self.problems and not any(one.problems for one in self.engines)


def verify(
    bundle: Bundle,
    pictures: Sequence[Picture] = (),
    *,
    run: Path | None = None,
    names: Sequence[str] = (),
    engines: Sequence[tuple[str, str]] | None = None,
    progress: Callable[[int, int], None] | None = None,
    seconds: float | None = None,
) -> Report:
    """Compares a bundle with the model of `run` (None: with what it carries) on `pictures`.

    names: what pictures are called in the report; engines: (engine, precision) pairs, None for all
    that can be had; seconds: how long latencies are measured, None for SECONDS. Raises DataError
    when an engine gives what is no number or none can load the bundle, UsageError when none is
    installed.
    """
    problems, reference = [], None
    if run is not None:
        reference, problems = _reference(bundle, run)
    opened, reports = _open(bundle, engines)
    for engine, report in zip(opened, reports, strict=False):
        _check(bundle, engine, report, reference)
    sides = [*([reference] if reference else []), *opened]
    together = _several(bundle, sides)
    answers = together.predict(pictures, batch=MANY, progress=progress)
    probs = np.split(answers.probs, len(sides), axis=1)
    called = [str(names[place] if names else place) for place in answers.ok]
    _judge(
        bundle,
        reference,
        probs,
        reports,
        called,
        lambda place: together.pixels(pictures[answers.ok[place]]),
    )
    seconds = SECONDS if seconds is None else seconds
    took = _latencies(bundle, reference, opened, reports, seconds)
    return Report(
        bundle,
        run,
        weights_hash(run) == bundle.info.weights if run is not None else None,
        len(answers.ok),
        answers.failures,
        reports,
        took,
        problems,
    )


def compare(
    reference: np.ndarray, found: np.ndarray, thresholds: Sequence[float] = ()
) -> Comparison:
    """Two sets of probabilities (M, K) of the same pictures; thresholds: (K,) of several labels to
    a picture, else ()."""
    if not len(reference):
        return Comparison(0, 0.0, [])
    other = decide(reference, thresholds) != decide(found, thresholds)
    if len(thresholds):  # decided where a label that changed was not near its threshold
        clear = (other & (np.abs(reference - np.asarray(thresholds)) >= TOLERANCE)).any(axis=1)
    else:
        best = np.sort(reference, axis=1)
        margin = best[:, -1] - best[:, -2] if best.shape[1] > 1 else np.ones(len(best))
        clear = margin >= 2 * TOLERANCE
    same = ~other.any(axis=1)
    changed = np.flatnonzero(~same & clear)
    return Comparison(int(same.sum()), float(np.abs(reference - found).max()), changed.tolist())


def _reference(bundle: Bundle, run: Path) -> tuple[TorchEngine | None, list[str]]:
    """The run's model in torch, None where it answers another question, and what is wrong."""
    from crosspatch.deploy.torch_engine import TorchEngine
    from crosspatch.training.package import load_model

    trained, info = load_model(run), bundle.info
    problems = []
    if weights_hash(run) != info.weights:
        problems.append(f"it was made of other weights than those in {run}")
    if trained.temperature != info.temperature:
        problems.append(
            f"its temperature is {info.temperature:.4g}, that of {run} {trained.temperature:.4g}"
        )
    if trained.reduction != info.reduction:
        problems.append(
            f"its reduction of tokens is {info.reduction or 'none'}, that of {run} "
            f"{trained.reduction or 'none'}"
        )
    other = [
        what
        for what, differs in (
            ("kinds of answer", trained.task != info.task),
            ("classes", trained.classes != info.classes),
            ("preprocessing", trained.preprocess != info.preprocess),
        )
        if differs
    ]
    if trained.thresholds != info.thresholds and not other:
        problems.append(f"its thresholds are other than those of {run}")
    if other:
        problems.append(f"its {' and '.join(other)} are other than those of {run}")
        return None, problems
    return TorchEngine(trained, device="cpu"), problems


def _open(
    bundle: Bundle, wanted: Sequence[tuple[str, str]] | None
) -> tuple[list[Engine], list[EngineReport]]:
    """Every engine that loads the bundle, and reports in the same order, failures last."""
    kinds = available(bundle) if wanted is None else wanted
    if not kinds:
        raise UsageError(
            f"no engine for {bundle.path}",
            "onnxruntime or openvino, installed",
            "pip install 'crosspatch[onnx]'",
        )
    opened, reports, failed, errors = [], [], [], []
    for name, precision in kinds:
        setting = Setting(name, precision, usable_cores())
        try:
            opened.append(open_engine(bundle, *setting))
            reports.append(EngineReport(name, precision))
        except CrosspatchError as error:
            failed.append(EngineReport(name, precision, problems=[error.got]))
            errors.append(error)
    if not opened:
        raise errors[0]
    return opened, reports + failed


def _check(
    bundle: Bundle, engine: Engine, report: EngineReport, reference: TorchEngine | None
) -> None:
    """The two pictures whose answers the bundle carries: chosen without near-ties, so that none is
    forgiven unless the reference shows it."""
    if not bundle.info.check:
        _finite(engine, check_pictures(bundle.info.preprocess.size, 1))
        return
    pictures = bundle.info.check_pictures
    found = _finite(engine, pictures)
    far = np.abs(found - np.asarray(bundle.info.check)).max(axis=1)
    report.check = float(far.max())
    off = np.flatnonzero(far > TOLERANCE) if report.precision == "fp32" else []
    if reference is not None and reference.reduction:
        off = [i for i in off if not reference.is_tie(pictures[i], found[i], TOLERANCE)]
    if len(off):
        report.problems.append(
            f"its answers to the check pictures in the bundle are off by {report.check:.2g}"
        )


def _finite(engine: Engine, images: np.ndarray) -> np.ndarray:
    found = engine.run(images)
    if not np.isfinite(found).all():
        raise DataError(
            f"{engine.setting.engine} gave probabilities that are not numbers (NaN or infinite)",
            "finite numbers for every picture",
            "export the run again; where torch gives them too, train with a lower rate (--lr)",
        )
    return found


class _Several:
    """Several engines as one, their probabilities side by side: pictures are decoded once."""

    def __init__(self, engines: Sequence[Engine]) -> None:
        self.engines, self.setting = engines, engines[0].setting

    def run(self, images: np.ndarray) -> np.ndarray:
        return np.concatenate([_finite(engine, images) for engine in self.engines], axis=1)


def _several(bundle: Bundle, engines: Sequence[Engine]) -> Predictor:
    classes = bundle.info.classes * len(engines)
    return Predictor(_Several(engines), classes, bundle.info.preprocess)


def _judge(
    bundle: Bundle,
    reference: TorchEngine | None,
    probs: Sequence[np.ndarray],
    reports: Sequence[EngineReport],
    names: Sequence[str],
    pixels: Callable[[int], np.ndarray],
) -> None:
    """Compares every engine with the first of `probs` and notes what is too far off; pixels: gives
    the engine's input of a picture."""
    truth, found = probs[0], probs[1:]
    first = reports[0]
    against = f"{first.engine} {first.precision}" if reference is None else "torch fp32"
    compared = reports[1 : 1 + len(found)] if reference is None else reports[: len(found)]
    for report, mine in zip(compared, found if len(truth) else [], strict=False):
        result = compare(truth, mine, bundle.info.thresholds)
        report.compared_with = against
        report.agreed, report.difference = result.agreed, result.difference
        ties = None
        if report.precision == "fp32" and _reduced(bundle, reference):
            ties = _select(reference, truth, mine, report, pixels)
        report.changed = [
            {
                "picture": names[place],
                "reference": _named(bundle, truth[place]),
                "engine": _named(bundle, mine[place]),
                **({} if ties is None else {"near_tie": place in ties}),
            }
            for place in result.changed
        ]
        report.problems += _findings(report, len(truth), meant(bundle))


def _reduced(bundle: Bundle, reference: TorchEngine | None) -> bool:
    """Whether there is a selection of tokens: where a run is at hand, by its word."""
    return bool(bundle.info.reduction if reference is None else reference.reduction)


def _select(
    reference: TorchEngine | None,
    truth: np.ndarray,
    mine: np.ndarray,
    report: EngineReport,
    pixels: Callable[[int], np.ndarray],
) -> set[int]:
    """Notes the pictures beyond TOLERANCE; gives the places of those that are near-ties by what
    the reference answers when its pixels are disturbed by rounding errors."""
    far = np.abs(truth - mine).max(axis=1)
    off = np.flatnonzero(far > TOLERANCE).tolist()
    ties = set[int]()
    if reference is not None:
        ties = {i for i in off[:EXAMINED] if reference.is_tie(pixels(i), mine[i], TOLERANCE)}
    report.selection = {
        "pictures": len(off),
        "near_ties": len(ties) if reference is not None else None,
        "difference": float(far[off].max()) if off else 0.0,
    }
    return ties


def meant(bundle: Bundle) -> str:
    """What a picture gets from a bundle, in words: the class, or the labels."""
    return "labels" if bundle.info.thresholds else "class"


def _named(bundle: Bundle, probs: np.ndarray) -> str:
    """What probabilities (K,) say."""
    said = decide(probs[None], bundle.info.thresholds)[0]
    return SEPARATOR.join(bundle.info.classes[k] for k in np.flatnonzero(said)) or "none"


def _findings(report: EngineReport, pictures: int, what: str = "class") -> list[str]:
    if report.agreed is None or report.difference is None:
        return []
    found, other = [], "another class" if what == "class" else f"other {what}"
    if report.precision == "int8" and report.agreed < AGREEMENT * pictures:
        found.append(
            f"only {report.agreed:,} of {pictures:,} pictures get the {what} that "
            f"{report.compared_with} gives, {AGREEMENT:.0%} are asked for"
        )
    changed = [row for row in report.changed if not row.get("near_tie")]
    if report.precision == "fp32" and changed:
        found.append(
            f"{len(changed):,} of {pictures:,} pictures get {other} than "
            f"{report.compared_with} gives"
        )
    if report.selection is not None:
        left = report.selection["pictures"] - (report.selection["near_ties"] or 0)
        if left > UNEXPLAINED * pictures:
            why = "that no near-tie of two tokens explains"
            if report.selection["near_ties"] is None:
                why = "near-ties of two tokens or a wrong graph: only a run (--against) tells"
            found.append(
                f"{left:,} of {pictures:,} pictures get probabilities that are off by up to "
                f"{report.selection['difference']:.2g}, {why}; {UNEXPLAINED:.0%} are allowed"
            )
    elif report.precision == "fp32" and report.difference > TOLERANCE:
        found.append(f"a probability is off by {report.difference:.2g}, {TOLERANCE:g} is allowed")
    return found


def _latencies(
    bundle: Bundle,
    reference: Engine | None,
    opened: Sequence[Engine],
    reports: Sequence[EngineReport],
    seconds: float,
) -> float | None:
    """Notes the median time of one picture, in turns; gives that of torch in ms, or None."""
    picture = check_pictures(bundle.info.preprocess.size, 1)
    calls: dict[str, Callable[[], object]] = {}
    for place, engine in enumerate(opened):
        if engine.setting.threads != THREADS:
            engine = open_engine(bundle, *engine.setting._replace(threads=THREADS))
        calls[str(place)] = lambda engine=engine: engine.run(picture)
    if reference is None:
        times = alternate(calls, seconds=seconds, least=3)
    else:
        times = _beside_torch(calls | {"torch": lambda: reference.run(picture)}, seconds)
    for place, report in enumerate(reports[: len(opened)]):
        report.milliseconds = times[str(place)].median * 1e3
        if reference is not None:
            report.faster = ratio(times["torch"], times[str(place)]).median
    return times["torch"].median * 1e3 if reference is not None else None


def _beside_torch(calls: dict[str, Callable[[], object]], seconds: float) -> dict[str, Timing]:
    """Times calls of which one is torch's, with torch on THREADS for that long."""
    from crosspatch.deploy.torch_engine import torch_threads

    with torch_threads(THREADS):
        return alternate(calls, seconds=seconds, least=3)


def summary(report: Report) -> dict[str, Any]:
    """The whole report as plain JSON."""
    bundle = report.bundle
    info = replace(bundle.info, check=())
    return {
        "bundle": str(bundle.path),
        "ok": report.ok,
        "format": bundle.format,
        "precision": info.precision,
        "size": bundle.size,
        "sha256": bundle.hash,
        "weights": info.weights,
        "architecture": info.architecture,
        "task": info.task,
        "classes": list(info.classes),
        "run": str(report.run) if report.run is not None else None,
        "same_weights": report.same_weights,
        "pictures": report.pictures,
        "reduction": info.reduction,
        "tolerance": {"fp32": TOLERANCE, "int8_agreement": AGREEMENT, "unexplained": UNEXPLAINED},
        "latency_threads": THREADS,
        "torch_milliseconds": report.torch_milliseconds,
        "engines": [vars(one) | {"ok": not one.problems} for one in report.engines],
        "problems": report.problems,
    }
