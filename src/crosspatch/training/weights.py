# SPDX-License-Identifier: Apache-2.0
"""`--weights auto|none|FILE|RUN|NAME`: where a training takes its first weights from.

`find` looks before any picture is read; `match_heads` says which rows of a run's head are taken
over, class by class by name; `refuse_seen` keeps pictures that trained a run from judging it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from crosspatch.data.longtail import Tail, parse_spec
from crosspatch.data.preprocess import Preprocess
from crosspatch.data.sources import Source
from crosspatch.data.split import read_split
from crosspatch.data.tensors import ENDING, read_header
from crosspatch.errors import DataError, UsageError, near, option
from crosspatch.tokens import spec
from crosspatch.tokens.reduce import options_of
from crosspatch.training.harmless import require_harmless
from crosspatch.training.package import CONFIG, file_hash, model_folder, read_config
from crosspatch.training.package import WEIGHTS as TENSORS
from crosspatch.training.pictures import Pictures
from crosspatch.training.released import PATIENT, QUICK, Release, names, release_of
from crosspatch.training.run import RunFolder

NONE, AUTO = "none", "auto"
PICKLED = (".pth", ".pt", ".bin", ".ckpt", ".pkl", ".tar")
DO = "fetch it again, or correct --weights"


@dataclass(frozen=True)
class Found:
    """Weights to begin with.

    kind: "run", "file" or "released"; where: as they were asked for; path: the run's `model/` or
    the file; sha256: of the file of tensors; shape: settings of the recipe that follow from them
    (model, model_args, size, store, fit, mean, std, and reduce of a reduced run; of a file few);
    classes: those of a run.
    """

    kind: str
    where: str
    path: Path
    sha256: str
    shape: dict[str, Any] = field(default_factory=dict)
    classes: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()

    @property
    def record(self) -> dict[str, str]:
        """What the recipe keeps of them."""
        path = str(self.path.resolve())
        return {"kind": self.kind, "where": self.where, "path": path, "sha256": self.sha256}


def find(
    asked: str,
    model: str,
    typed: Mapping[str, Any],
    reasons: list[str],
    tell: Callable[[str], None],
) -> Found | None:
    """What --weights `asked` means; None: from scratch, and why stands in `reasons`.

    model: the one that is planned or asked for; typed: what the user typed; tell: hears the command
    that would fetch weights, in one piece. The network is asked
    for a NAME that the cache lacks, and for auto, shortly. Raises UsageError or DataError for
    weights that are not there, cannot be read, or are of another model than --model.
    """
    if asked == NONE:
        return None
    if asked == AUTO:
        return _auto(model, reasons, tell)
    path = Path(asked).expanduser()
    found = _of_path(asked, path) if path.exists() else _of_name(asked, path, PATIENT)
    named = found.shape.get("model")
    if named and typed.get("model") not in (None, named):
        raise UsageError(
            f"--weights {asked} is of {named}, and --model says {typed['model']}",
            "weights of the model that is trained",
            "leave --model away, or name other weights",
        )
    _refuse_further(found, typed)
    return found


def find_local(asked: str) -> Found:
    """What --weights `asked` means where nothing is fetched: a run, a file, or a released
    checkpoint that lies in the cache. Raises UsageError or DataError for anything else."""
    path = Path(asked).expanduser()
    return _of_path(asked, path) if path.exists() else _of_name(asked, path, None)


def _refuse_further(found: Found, typed: Mapping[str, Any]) -> None:
    """Raises UsageError where the run is of a reduced model and another reduction is asked for."""
    its, asked = found.shape.get("reduce"), typed.get("reduce")
    if not its or not asked:
        return
    if not spec.same(its, asked, options_of(spec.parse(its)[0])):
        raise UsageError(
            f"--reduce {asked}, and {found.where} is reduced by {its} already",
            "one reduction of tokens in a model",
            "leave --reduce away: that of the run is kept; or begin with an unreduced run",
        )


def _auto(model: str, reasons: list[str], tell: Callable[[str], None]) -> Found | None:
    release = release_of(model)
    if release is None:
        reasons.append(
            f"No released weights of {model}: trained from scratch. --recipe finetune takes a "
            "model that has some."
        )
        return None
    path = release.cached()
    if path is None:
        try:
            path = release.fetch(QUICK)
        except DataError as error:
            reasons.append(f"Trained from scratch: {error.got}.")
            tell(f"With a network this fetches weights: {release.command}")
            return None
    return _of_release(release, path)


def _of_name(asked: str, path: Path, patience: float | None) -> Found:
    """A released checkpoint; patience: seconds to wait for a network, None to ask for none."""
    if path.suffix.lower() in (ENDING, *PICKLED) or len(path.parts) > 1 or asked.startswith("."):
        beside = {one.name for one in path.parent.iterdir()} if path.parent.is_dir() else set()
        hits = near(path.name, beside)
        raise DataError(
            f"{asked} does not exist",
            f"a file, or the folder of a run{f'; near it are {hits}' if hits else ''}",
            "correct --weights",
        )
    release = release_of(asked)
    if release is None:
        raise UsageError(
            f"{asked} has no released weights in safetensors",
            f"a name of timm.list_pretrained(); near: {near(asked, names())}",
            "name another, or leave --weights away",
        )
    return _of_release(release, release.cached() or _fetched(release, patience))


def _fetched(release: Release, patience: float | None) -> Path:
    if patience is None:
        raise UsageError(
            f"the weights {release.name} are not on this machine",
            "a file, or a released checkpoint in the cache of Hugging Face",
            f"fetch them with: {release.command}",
        )
    return release.fetch(patience)


def _of_release(release: Release, path: Path) -> Found:
    shape = {key: getattr(release, key) for key in ("model", "size", "mean", "std")}
    said = f"{release.model} with the released weights {release.name}."
    return Found("released", release.name, path, file_hash(path), shape, reasons=(said,))


def _of_path(asked: str, path: Path) -> Found:
    found = _of_run(asked, path) if path.is_dir() else _of_file(asked, path)
    if not _is_name(asked):
        return found
    also = f"{asked} is taken from here, where it exists; timm has a checkpoint of that name."
    return Found(**{**_fields(found), "reasons": (*found.reasons, also)})


def _fields(found: Found) -> dict[str, Any]:
    return {one.name: getattr(found, one.name) for one in fields(found)}


def _is_name(asked: str) -> bool:
    try:
        return release_of(asked) is not None
    except UsageError:
        return False


def _of_run(asked: str, path: Path) -> Found:
    folder = model_folder(path)
    config, tensors = read_config(folder), folder / TENSORS
    if not tensors.is_file():
        raise DataError(
            f"{tensors} does not exist", "the weights of a trained model", "train again"
        )
    fixed = ("num_classes", "img_size")
    require_harmless(config["model_args"], folder / CONFIG)
    arguments = {k: v for k, v in config["model_args"].items() if k not in fixed}
    preprocess = Preprocess.from_dict(config["preprocessing"])
    shape = {one.name: getattr(preprocess, one.name) for one in fields(preprocess)}
    shape |= {"model": config["architecture"], "model_args": arguments}
    reduced = _reduction_of(config["transforms"], folder)
    shape |= {"reduce": reduced} if reduced else {}
    by = f" reduced by {reduced}," if reduced else ""
    said = f"{config['architecture']}{by} with the weights of {asked}, as asked."
    names = tuple(config["class_names"])
    return Found("run", asked, folder, file_hash(tensors), shape, names, (said,))


def _reduction_of(transforms: Any, folder: Path) -> str:
    """The reduction of a run as a recipe holds it. Raises DataError for what no recipe can hold."""
    try:
        text = spec.spelt(transforms)
        if not text or spec.parse(text) == (transforms[0]["method"], transforms[0]["options"]):
            return text
    except (UsageError, AttributeError, KeyError, TypeError, RecursionError):
        text = "nonsense"
    raise DataError(
        f"{folder / CONFIG} lists transforms that cannot be repeated in another run ({text[:100]})",
        "one reduction of tokens by a method of this version",
        "name another run, or use a newer version",
    )


def _of_file(asked: str, path: Path) -> Found:
    """Weights of a file: what it is, its content decides, not its name."""
    read_header(path, "a .safetensors file, the folder of a run, or a released checkpoint", DO)
    return Found("file", asked, path, file_hash(path), reasons=(f"Weights of {asked}, as asked.",))


def match_heads(theirs: Sequence[str], ours: Sequence[str]) -> tuple[tuple[int, ...], str]:
    """(for each of our classes the row of their head, -1 for none; a sentence about it).

    Names are compared exactly; those that differ in case or a little are said, and not taken.
    """
    where = {name: row for row, name in enumerate(theirs)}
    rows = tuple(where.get(name, -1) for name in ours)
    fresh = [name for name, row in zip(ours, rows, strict=True) if row < 0]
    taken = len(ours) - len(fresh)
    said = f"Rows of the head, by class name: {taken} of {len(ours)} taken over"
    said += f", {len(fresh)} fresh." if fresh else "."
    folded = {name.casefold().strip(): name for name in theirs}
    alike = [f"{name} (there: {folded[name.casefold().strip()]})"
             for name in fresh if name.casefold().strip() in folded]  # fmt: skip
    if alike:
        said += f" Alike, but not the same: {', '.join(alike[:5])}."
    return (rows if taken else ()), said


def refuse_seen(found: Found, pictures: Pictures) -> None:
    """Raises UsageError where the run that gives the weights, or one that it began with, was
    trained on pictures that would validate or test them here."""
    for run in _lineage(found.path):
        judging = np.concatenate([pictures.split.val, pictures.split.test])
        seen = int(np.isin(judging, trained_on(run, pictures.source)).sum())
        if seen:
            config = run.read_config()
            how = {"seed": _seed_of_split(config["recipe"]), **config.get("reading", {})}
            flags = " ".join(option(key, value) for key, value in how.items())
            raise UsageError(
                f"{run.path} was trained on {seen:,} of the pictures that would judge it here",
                "the split of that run, for the same pictures",
                f"add {flags}",
            )


def trained_on(run: RunFolder, source: Source) -> np.ndarray:
    """The items of `source`, int64, that trained a run: none where the run's data are others. Data
    and their long tails (`data.longtail`) are the same."""
    about = run.read_config().get("run", {})
    for tail in (source.tail, _tail_of(about.get("data", ""))):
        same = copy.copy(source)
        same.tail = tail
        if about.get("fingerprint") == same.fingerprint():
            return read_split(run.path / "split.csv", same).train
    return np.empty(0, np.int64)


def _tail_of(spec: str) -> Tail | None:
    try:
        return parse_spec(spec)[1]
    except UsageError:  # a folder that had such a name and is gone
        return None


def _seed_of_split(recipe: Mapping[str, Any]) -> int:
    divided = recipe.get("split_seed")
    return recipe["seed"] if divided is None else divided


def _lineage(path: Path) -> Iterator[RunFolder]:
    """The run whose folder or `model/` this is, the run it began with, and so on, as far as they
    can be found."""
    seen: set[Path] = set()
    while True:
        folder = path.parent if path.name == "model" else path
        run = RunFolder(folder)
        if not run.config_path.is_file() or folder.resolve() in seen:
            return
        seen.add(folder.resolve())
        yield run
        before = run.read_config().get("recipe", {}).get("weights") or {}
        if not isinstance(before, dict) or before.get("kind") != "run":
            return
        path = Path(before["path"])
