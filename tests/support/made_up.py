"""What pages tell of, made up: runs of any number of classes, comparisons. Names are hostile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from crosspatch.deploy.shrink.choose import choose, marked, nearest
from crosspatch.deploy.shrink.result import Budget, Measured, Shrunk, Speed, Took
from crosspatch.metrics.interval import paired
from crosspatch.metrics.paired import crossed
from crosspatch.metrics.reliability import of_answers
from crosspatch.metrics.tails import with_groups
from crosspatch.report.story import Story
from crosspatch.tasks.classify import Classify
from crosspatch.tasks.multilabel import MultiLabel
from crosspatch.training.candidates import Candidate
from crosspatch.training.compared import Compared, Row, Run
from crosspatch.training.comparison import Plan

HOSTILE = ["<script>alert(1)</script>", "\"'&\x1b[31m\n\udc80", "x" * 300, "$\\frac{1}{2}$"]
CANDIDATES = ("base", "<script>alert(1)</script>", "worse")


def probabilities(count: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Answers of which three in four are right; class 0 is taken for class 1."""
    rng = np.random.default_rng(0)
    labels = np.arange(count) % classes
    logits = rng.standard_normal((count, classes))
    logits[np.arange(count), labels] += 3 * (np.arange(count) % 4 > 0)
    logits[labels == 0, 1] += 6
    probs = np.exp(logits)
    return probs / probs.sum(axis=1, keepdims=True), labels


def story(names: list[str], count: int = 240, **changed: Any) -> Story:
    """A run and its evidence; the first class has most training pictures, and is found least."""
    probs, labels = probabilities(count, len(names))
    task, counts = Classify(names), [400 // (1 + place) + 8 for place in range(len(names))]
    metrics = with_groups(task.metrics(probs, labels), counts)
    metrics["reliability"] = {"after": of_answers(probs, labels)}
    rows = list(task.predictions([f"<b>/{i}\n.jpg" for i in range(count)], labels, probs, "test"))
    change = {"accuracy": 0.3, "low": 0.2, "high": 0.4, "images": 50}
    cost = {"change": -0.4, "change_low": -0.5, "change_high": -0.3}
    laws = [{"name": name, "exponent": 0.3, "error": 0.05} for name in names]
    baseline = {"test": {"accuracy": 0.4, "low": 0.3, "high": 0.5, "images": count}}
    report = {
        "data": "leaves", "classes": names, "model": "<i>net</i>", "seconds": 12.0,
        "config": {"recipe": {"class_counts": counts}, "run": {"command": "train <script>"}},
        "baseline": {"features": "<u>plain</u>", "linear_probe": baseline},
        "evidence": {
            "robustness": [{"name": "clean", "said": "as they are", **change},
                           {"name": "dark", "said": "dark", **change, **cost}],
            "learning": {"train": 90, "test": 40, "sizes": [10, 20, 40, 80],
                         "errors": [0.5, 0.4, 0.3, 0.2], "classes": laws},
            "latency": {"median": 0.01, "low": 0.009, "high": 0.02, "count": 20,
                        "processor": "<cpu>"},
            "bytes": 1000, "left_out": {"neighbours": "<reason>"}, "seconds": 1.0,
        },
        "history": [{"epoch": e, "train_loss": 1 / e, "val_accuracy": 0.5} for e in (1, 2, 3)],
        "best": {"epoch": 2},
    }  # fmt: skip
    told = {"choosing": rows, "report": report, "remarks": ("<remark>",), **changed}
    return Story("leaves", "test", metrics, rows, **told)


def several(names: list[str], count: int = 60) -> Story:
    """Several labels to a picture."""
    rng = np.random.default_rng(0)
    probs = rng.random((count, len(names)))
    labels = (probs + 0.2 * rng.standard_normal(probs.shape) > 0.5).astype(np.float32)
    task = MultiLabel(names)
    metrics = task.metrics(probs, labels)
    metrics["reliability"] = {"after": of_answers(probs, labels)}
    rows = list(task.predictions([f"{i}.jpg" for i in range(count)], labels, probs, "test"))
    return Story("d", "test", metrics, rows)


def compared(out: Path, count: int = 3) -> Compared:
    """A comparison of `count` candidates with two seeds each."""
    rng, rows = np.random.default_rng(0), []
    candidates = tuple(
        Candidate(name, name, f"c{place}", {}) for place, name in enumerate(CANDIDATES[:count])
    )
    for place, candidate in enumerate(candidates):
        report = {"history": [{"step": s, "elapsed": 1.0 * s, "val_accuracy": 0.1 * s}
                              for s in (1, 2, 3)]}  # fmt: skip
        runs = tuple(
            Run(seed, out, (), (), rng.random(50) < 0.5 + 0.1 * place, report) for seed in (0, 1)
        )
        table = np.array([run.correct for run in runs], float)
        gap = None if place == 0 else crossed(table - 0.5)
        cost = {"seconds": 3.0, "ece": 0.1, "epochs": 2.0, "parameters": 1e6}
        verdict = ("the first", "better by 9.0 points", "worse by 2.0 points")[place]
        rows.append(Row(candidate, runs, crossed(table), gap, p=None if gap is None else 0.01,
                        verdict=verdict, cost=cost))  # fmt: skip
    plan = Plan("<b>data", {}, candidates, {}, (0, 1), 0, 2, None, None, command="crosspatch x")
    split = {"train": 100, "val": 20, "test": 50}
    return Compared(plan, out, tuple(rows), (0, 1), split, False, 1.0, {}, {}, (), {})


WAYS = [(engine, precision) for engine in ("onnxruntime", "openvino")
        for precision in ("fp32", "int8-dynamic", "int8-static")]  # fmt: skip
FASTER = {"fp32": 1.0, "int8-dynamic": 0.9, "int8-static": 1.5}
SMALLER = {"fp32": 1.0, "int8-dynamic": 0.28, "int8-static": 0.3}


def shrunk(count: int = 40, budget: Budget | None = None, **changed: Any) -> Shrunk:
    """A search that measured `count` candidates: networks with fewer tokens, each in six ways, and
    some that were given up. Dynamic int8 is slower than float."""
    rng, rows, pictures = np.random.default_rng(1), list[Measured](), 600
    budget = budget or Budget(max_drop=1.0, latency=0.0045)
    while len(rows) < count:
        network, (engine, precision) = len(rows) // len(WAYS), WAYS[len(rows) % len(WAYS)]
        share = 1 - 0.08 * network
        speed = FASTER[precision] * (1.2 if engine == "openvino" else 1.0) / share
        lost = network**2 + (0 if precision == "fp32" else int(rng.integers(2, 9)))
        rows.append(_candidate(network, engine, precision, speed, lost, pictures, share))
    for place in range(2 if count > 20 else 0):
        rows.append(
            Measured(name=f"{HOSTILE[0]} {place}", kind="tokens", method="evovit", macs=10**8,
                     options={"keep": 0.1}, right=90, pictures=200, drop=0.4, low=0.33, high=0.47,
                     dropped=f"{HOSTILE[1]} lost more than the budget after 200 pictures")
        )  # fmt: skip
    best = choose(rows, budget)
    near = None if best else nearest(rows, budget)
    test = {"pictures": 300, "original": 290, "chosen": 288, "drop": 0.0067, "low": -0.005,
            "high": 0.019} if best else {}  # fmt: skip
    told: dict[str, Any] = {
        "run": f"runs/{HOSTILE[0]}",
        "machine": {"processor": "<b>a processor</b>", "cores": 4, "onnxruntime": "1.23"},
        "words": ["int8-dynamic in onnxruntime is slower than float there", HOSTILE[1]],
        "left": [HOSTILE[0]] if count > 20 else [],
        "bundle": f"runs/{HOSTILE[0]}/bundle-small.onnx" if best else "",
        "seconds": 61.0,
    }
    return Shrunk(budget=budget, base=rows[0].key, chosen=best.key if best else "", test=test,
                  nearest=near.key if near else "",
                  rows=marked(rows, budget, best.key if best else ""),
                  **{**told, **changed})  # fmt: skip


def _candidate(
    network: int, engine: str, precision: str, speed: float, lost: int, pictures: int, share: float
) -> Measured:
    gained = min(lost, 3) if network or precision != "fp32" else 0
    low, high = paired(lost, gained, pictures) if network or precision != "fp32" else (0.0, 0.0)
    near = lambda value: Speed(value, 0.97 * value, 1.03 * value)
    own = None if precision == "fp32" else near(FASTER[precision])
    took = {
        threads: Took(0.0062 / speed * slow, 0.0071 / speed * slow, 40, near(speed), near(speed),
                      own)
        for threads, slow in ((1, 1.7), (4, 1.0))
    }  # fmt: skip
    made: dict[str, Any] = {"kind": "engines", "name": "as it is"} if not network else {
        "kind": "finetuned" if network == 3 else "tokens", "method": "mctf",
        "name": f"mctf {HOSTILE[0] if network == 2 else 'three blocks'} {share:.2f}",
        "options": {"r": network}, "trained": 20.0 * (network == 3),
    }  # fmt: skip
    return Measured(
        **made, engine=engine, precision=precision, latency=took, macs=int(9.4e8 * share),
        size=int(2.7e7 * SMALLER[precision]), right=570 - lost + gained, pictures=pictures,
        drop=(lost - gained) / pictures, low=low, high=high,
        note="its <scales> were found with 200 pictures" if precision == "int8-static" else "",
    )  # fmt: skip
