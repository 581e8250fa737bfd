# SPDX-License-Identifier: Apache-2.0
"""A run becomes as small and as fast as a budget asks: candidates are built, judged and timed on
this machine, and the best inside the budget is written as a bundle.

result      what was measured and chosen, as plain data
candidates  the register of what is tried
judge       the pictures that say what a candidate costs
build       a network as bundles in the working folder
timing      how long bundles take, in turns with the run as it is
choose      the front, the budget and the choice
state       what is kept on disk, and the lock
search      candidates in turn
words       what it came to, in sentences
"""

from __future__ import annotations

import json
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from crosspatch.deploy.bench import hardware
from crosspatch.deploy.loading import weights_hash
from crosspatch.deploy.place import check_place
from crosspatch.deploy.shrink import choose, finetune, words
from crosspatch.deploy.shrink.build import Network, written
from crosspatch.deploy.shrink.candidates import AS_IT_IS, Context
from crosspatch.deploy.shrink.judge import pictures, required
from crosspatch.deploy.shrink.result import FILE, Budget, Measured, Shrunk, dumps
from crosspatch.deploy.shrink.search import Report, Search, right_in
from crosspatch.deploy.shrink.state import State, entered, workplace
from crosspatch.errors import DataError, Interrupted, UsageError
from crosspatch.metrics.interval import paired, wilson
from crosspatch.metrics.macs import count_macs
from crosspatch.processor import usable_cores
from crosspatch.training.package import load_model, model_folder, read_config, save_model
from crosspatch.training.state import TEMPORARY, flush_file, flush_folder

BUNDLE = "bundle-small.onnx"
CHOSEN = "chosen"


class _Silent:
    def message(self, text: str) -> None: ...

    def progress(self, what: str, done: int, total: int) -> None: ...


def shrink(
    run: str | Path,
    *,
    max_drop: float = 0.5,
    latency: float | None = None,
    size: int | None = None,
    threads: int | None = None,
    data: str | None = None,
    out: str | Path | None = None,
    seconds: float | None = None,
    resume: bool = False,
    report: Report | None = None,
    finetuning: float | None = None,
    reporter: Any = None,
) -> Shrunk:
    """Look for the best candidate inside a budget, and write it as a bundle.

    max_drop: points of accuracy that may be lost, on the run's validation pictures; latency:
    seconds of one picture at `threads` (None: at what serves each candidate best); size: bytes;
    data: where the run's pictures are now; out: the bundle (None: RUN/bundle-small.onnx); seconds:
    of the search (None: by the size of the network); resume: go on with what was measured before;
    finetuning: seconds, beside those of the search, in which networks with fewer tokens learn on
    (None: none); reporter: of those trainings (`training.reporter`).
    Raises UsageError for what cannot be asked here, DataError for a run or pictures that cannot be
    read, Interrupted where Ctrl-C ended it: what was measured is kept.
    """
    began, run = time.monotonic(), _run_folder(Path(run))
    budget = Budget(max_drop=max_drop, latency=latency, size=size, threads=threads)
    counts = _threads(threads)
    path = Path(out) if out is not None else run / BUNDLE
    check_place(path, "onnx")
    trained = load_model(run)
    shown = required(run, pictures(run, trained, "val", data))
    report = report or _Silent()
    with workplace(run) as folder:
        identity = {
            "weights": weights_hash(run),
            "pictures": shown.digest(),
            "machine": json.dumps(hardware(), sort_keys=True),
            "threads": list(counts),
        }
        state = entered(folder, identity, resume)
        _prepared(folder, state, budget)
        macs = count_macs(trained.module, (3, *trained.preprocess.size))
        further = {"finetune": finetuning, "reporter": reporter}
        context = Context(run, trained, macs, budget, folder, data, further=further)
        try:
            search = Search(context, shown, state, report, threads=counts, seconds=seconds)
            search.run()
            found = _concluded(search, path, began)
        except KeyboardInterrupt as error:
            kept = f"{len(state.rows)} candidates are kept in {folder}"
            raise Interrupted(
                "stopped by Ctrl-C", kept, f"crosspatch shrink {run} --resume"
            ) from error
        _tidy(folder)
    return found


def _run_folder(run: Path) -> Path:
    if not run.is_dir():
        kind = "is a file" if run.exists() else "does not exist"
        raise UsageError(
            f"{run} {kind}",
            "the folder of a trained run: a bundle cannot be made smaller any more",
            "name the folder that crosspatch train wrote",
        )
    folder = model_folder(run)
    read_config(folder)
    home = folder.parent if folder.name == "model" and (folder.parent / "model") == folder else run
    if not (home / "model").is_dir() or not (home / "split.csv").is_file():
        raise DataError(
            f"{home} holds a model alone",
            "the whole folder of a run: its split.csv says which pictures judge",
            "name the folder that crosspatch train wrote",
        )
    return home


def _threads(asked: int | None) -> tuple[int, ...]:
    cores = usable_cores()
    if asked is not None and not 1 <= asked <= cores:
        raise UsageError(
            f"--threads {asked}", f"this process may use 1 to {cores}", f"--threads {cores}"
        )
    return tuple(sorted({1, cores, asked or 1}))


def _prepared(folder: Path, state: State, budget: Budget) -> None:
    """Take away what a search begun anew must not find, and of one that goes on what another
    budget gave up too early."""
    if not state.rows:
        for old in folder.glob("*.onnx"):
            old.unlink()
        return
    most = budget.max_drop / 100
    again = {one.name for one in state.rows if one.dropped and one.drop <= most + 0.01}
    again |= {one.name for one in state.rows if one.dropped and one.low <= most}
    state.rows = [one for one in state.rows if one.name not in again]
    state.finished = False


def _concluded(search: Search, path: Path, began: float) -> Shrunk:
    """The choice, its test, its bundle, and everything in words."""
    context, state = search.context, search.state
    budget, rows = context.budget, search.rows()
    best = choose.choose(rows, budget)
    base = next(one for one in rows if one.key == search.base)
    near = None if best is not None else choose.nearest(rows, budget)
    told, tested = [], {}
    if best is None:
        told += words.nothing_words(near, budget)
    else:
        told += words.chosen_words(best, base, budget, search.state.count)
        tested = _tested(search, best)
        told += _test_words(tested)
        _export(search, best, path, tested)
    told += words.int8_words(rows, budget)
    if search.state.count < search.all:
        told.append(f"{search.state.count:,} of {search.all:,} validation pictures judged")
    told += [*context.remarks, *words.left_words(search.left, search.seconds)]
    found = Shrunk(
        run=str(context.run),
        machine=hardware(),
        budget=budget,
        base=search.base,
        rows=choose.marked(rows, budget, best.key if best else ""),
        chosen=best.key if best else "",
        nearest=near.key if near else "",
        test=tested,
        words=told,
        left=search.left,
        bundle=str(path) if best else "",
        seconds=time.monotonic() - began,
    )
    _write(context.run / FILE if best is None else path.with_name(FILE), dumps(found))
    state.save(context.folder)
    return found


def _tested(search: Search, best: Measured) -> dict[str, Any]:
    """The chosen one and the run as it is on the test pictures, {} where there are none. Asked once
    for each chosen one, whatever is resumed."""
    state, context = search.state, search.context
    if best.key in state.tested:
        return state.tested[best.key]
    shown = pictures(context.run, context.trained, "test", context.data)
    if not len(shown):
        return {}
    bundle, first = search.bundle_of(best), search.clock.ways[0]
    assert bundle is not None
    after = right_in(search.engine_of(best, bundle), shown, best.precision)
    engine = search.clock.original(first, max(search.threads))
    before = right_in(engine, shown, "fp32")
    low, high = paired(int((before & ~after).sum()), int((after & ~before).sum()), len(shown))
    state.tested[best.key] = {
        "pictures": len(shown),
        "original": int(before.sum()),
        "chosen": int(after.sum()),
        "drop": float(before.mean() - after.mean()),
        "low": low,
        "high": high,
    }
    state.save(context.folder)
    return state.tested[best.key]


def _test_words(tested: dict[str, Any]) -> list[str]:
    if not tested:
        return ["the run kept no test pictures, so the figures of validation are all there is"]
    n = tested["pictures"]
    spans = [100 * side for side in wilson(tested["chosen"], n)]
    return [
        f"on {n:,} test pictures, looked at once: {100 * tested['chosen'] / n:.1f} % "
        f"({spans[0]:.1f}–{spans[1]:.1f}), the run as it is {100 * tested['original'] / n:.1f} %"
    ]


def _export(search: Search, best: Measured, path: Path, tested: dict[str, Any]) -> None:
    """Write the bundle, and before it the model that verify compares it with."""
    network, bundle = search.network_of(best), search.bundle_of(best)
    assert network is not None
    assert bundle is not None
    if best.name != AS_IT_IS and not best.run:
        _write_model(search, network)
    n, k = (tested["pictures"], tested["chosen"]) if tested else (best.pictures, best.right)
    low, high = wilson(k, n)
    accuracy = {"split": "test" if tested else "val", "images": n, "accuracy": k / n}
    written(bundle, path, accuracy | {"low": low, "high": high})


def _write_model(search: Search, network: Network) -> None:
    """RUN/shrink/chosen: the reduced model as a run folder, which eval, predict and export read and
    verify compares the bundle with."""
    folder, run = search.context.folder, search.context.run
    draft, trained = folder / f"{TEMPORARY}{os.getpid()}-{CHOSEN}", network.trained
    shutil.rmtree(draft, ignore_errors=True)
    (draft / "model").mkdir(parents=True)
    for name in ("classes.txt", "split.csv", "config.toml"):
        with suppress(FileNotFoundError):
            shutil.copy(run / name, draft / name)
    config = read_config(model_folder(run)) | {
        "temperature": trained.temperature,
        "calibrated_on": trained.calibrated_on,
    }
    save_model(draft / "model", trained.module, config)
    shutil.rmtree(folder / CHOSEN, ignore_errors=True)
    os.replace(draft, folder / CHOSEN)
    flush_folder(folder)


def _write(path: Path, text: str) -> None:
    aside = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
    aside.write_text(text, encoding="utf-8")
    flush_file(aside)
    os.replace(aside, path)
    flush_folder(path.parent)


def _tidy(folder: Path) -> None:
    """The bundles of candidates are not kept: they can be made again."""
    for old in folder.glob("*.onnx"):
        old.unlink(missing_ok=True)
    for old in folder.glob(f"{TEMPORARY}*"):
        if old.is_dir():
            shutil.rmtree(old, ignore_errors=True)


__all__ = ["Budget", "Measured", "Shrunk", "finetune", "shrink"]
