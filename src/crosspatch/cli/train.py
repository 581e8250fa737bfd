# SPDX-License-Identifier: Apache-2.0
"""`crosspatch train DATA`: chooses, says why, trains, reports."""

from __future__ import annotations

import re
import signal
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Group, Parameter

from crosspatch.cli import pages, words
from crosspatch.cli.options import (
    DATA,
    MULTI,
    TOKENS,
    Columns,
    Output,
    at_least,
    positive,
    reading_of,
    seconds,
    side,
    typed,
)
from crosspatch.errors import Interrupted, UsageError
from crosspatch.training import launch
from crosspatch.training.signals import handled

if TYPE_CHECKING:
    from crosspatch.cli.screen import Screen

_ENDINGS = r"\.(zip|tar|tgz|txz|tbz2?|tar\.\w+|csv|tsv|jsonl?|parquet)$"
_FOLDER = Group("The run folder", sort_key=10)
_BUDGET = Group("How long", sort_key=20)
_CHOICES = Group("Choices it makes for you", sort_key=30)
_LEARNT = Group("What is learnt", sort_key=35)


@Parameter(name="*", group=_FOLDER)
@dataclass(frozen=True, kw_only=True)
class Folder:
    """Where the run is kept."""

    out: Annotated[Path | None, Parameter(metavar="DIR", show_default="runs/DATA-1, -2, …")] = None
    """The run folder."""

    resume: bool = False
    """Go on with an interrupted run (the newest of DATA, or --out)."""

    overwrite: bool = False
    """Delete the run that --out holds and start again."""

    force: Annotated[bool, Parameter(negative=())] = False
    """Go on although pictures or settings are no longer those it was begun with."""


@Parameter(name="*", group=_BUDGET)
@dataclass(frozen=True, kw_only=True)
class Budget:
    """How long it may train."""

    time: Annotated[float | None, Parameter(converter=seconds, metavar="10m")] = None
    """Fit the whole run into this time: 90s, 10m, 1.5h."""

    epochs: Annotated[int | None, at_least(1, "--epochs 10")] = None
    """Times that every picture is seen. With --resume, a run that has ended goes on to so many."""


@Parameter(name="*", group=_CHOICES)
@dataclass(frozen=True, kw_only=True)
class Choices:
    """What the plan decides when it is not said."""

    model: Annotated[str | None, Parameter(metavar="NAME")] = None
    """The architecture, as crosspatch.list_models() or timm names it."""

    size: Annotated[
        int | tuple[int, int] | None, Parameter(converter=side, n_tokens=1, metavar="N|HxW")
    ] = None
    """Side of the pictures that the model sees, in pixels."""

    fit: Literal["crop", "pad", "squash"] | None = None
    """How a picture becomes a square, in training and ever after."""

    batch: Annotated[int | None, at_least(1, "--batch 128")] = None
    """Pictures per step."""

    lr: Annotated[float | None, Parameter(converter=positive)] = None
    """Peak learning rate."""

    recipe: Annotated[str | None, Parameter(metavar="NAME", show_default="small")] = None
    """The set of defaults: small, finetune (with weights), deit (large sets), cnn, deit-lt,
    probe."""

    weights: Annotated[
        str | None,
        Parameter(metavar="auto|none|FILE|RUN|NAME", show_default="none; finetune: auto"),
    ] = None
    """What it begins with: a run, a .safetensors file, a released checkpoint by timm's name."""

    reduce: Annotated[str | None, Parameter(metavar="METHOD:OPTION=VALUE,…")] = None
    """Fewer tokens from block to block, in training and ever after, such as tome:r=8."""

    precision: Literal["fp32", "bf16", "fp16"] | None = None
    """Number format of the computation."""

    flip: bool | None = None
    """Mirror training pictures (left alone: yes, but not for digits)."""

    linear: Literal["auto", "on", "off"] | None = None
    """Matrix products through oneDNN (auto: where that is faster here; noted in the run)."""

    balance: Annotated[
        Literal["none", "weights", "effective", "drw", "sampler", "auto"] | None,
        Parameter(show_default="auto"),
    ] = None
    """What is done about uneven classes (auto: nothing until one has 10 times another's)."""

    devices: Annotated[
        int | None, at_least(1, "--devices 2"), Parameter(metavar="N", show_default="1")
    ] = None
    """Processes that train together: one for each GPU, or sharing the CPU's cores."""

    compile: Annotated[bool | None, Parameter(negative=())] = None
    """Use torch.compile: slow to start, faster after."""

    workers: Annotated[int | None, at_least(0, "--workers 2")] = None
    """Processes that read pictures."""

    seed: Annotated[int | None, at_least(0, "--seed 0"), Parameter(show_default="0")] = None
    """Number that every random choice follows from."""


@Parameter(name="*", group=_LEARNT)
@dataclass(frozen=True, kw_only=True)
class Learnt:
    """What is learnt from the pictures."""

    objective: Annotated[
        str | None, Parameter(metavar="NAME:OPTION=VALUE,…", show_default="auto")
    ] = None
    """ldam, logit-adjust, deit-lt … (auto: what --reduce, --teacher, --labels or --sizes asks for,
    else the labels alone: supervised)."""

    mix: Annotated[str | None, Parameter(metavar="NAME,NAME,…|none")] = None
    """How pictures are mixed, one of these for each batch: mixup, cutmix, resizemix,
    maskmix, mixpro …"""

    teacher: Annotated[str | None, Parameter(metavar="RUN|NAME")] = None
    """A trained network to learn from: a run, or a checkpoint by timm's name."""

    distill: Annotated[
        Literal["soft", "hard", "scalekd"] | None, Parameter(show_default="soft")
    ] = None
    """What is taken from the teacher: probabilities, answers, or features."""

    labels: Annotated[Path | None, Parameter(metavar="FILE")] = None
    """A teacher's labels of every patch, which crosspatch label wrote."""

    sizes: Annotated[str | None, Parameter(metavar="N,N,…")] = None
    """Further sizes to train at, in pixels, so that the model can be used at any of them."""

    sam: Annotated[float | None, Parameter(converter=positive, metavar="RADIUS")] = None
    """Look for flat minima, such as 0.05 (each step takes twice as long)."""


def train(
    data: Annotated[str, Parameter(help=DATA)],
    /,
    *,
    folder: Folder | None = None,
    budget: Budget | None = None,
    choices: Choices | None = None,
    learnt: Learnt | None = None,
    columns: Columns | None = None,
    group: Annotated[str | None, Parameter(group=_CHOICES, metavar="folder|PATTERN|COLUMN")] = None,
    multi_label: Annotated[bool, Parameter(group=_CHOICES, help=MULTI)] = False,
    output: Output | None = None,
) -> int:
    """Train a classifier on a folder of pictures.

    Parameters
    ----------
    group
        Pictures that stay in one split: by folder, a regular expression on paths, or a column.
    """
    folder, output = folder or Folder(), output or Output()
    if folder.resume and folder.overwrite:
        raise UsageError(
            "--resume and --overwrite together",
            "one goes on with the run, the other deletes it",
            "leave one of them out",
        )
    out = folder.out or default_out(data, folder.resume)
    overrides = typed(budget or Budget()) | typed(choices or Choices()) | typed(learnt or Learnt())
    count = overrides.get("devices") or _begun_with(out, folder.resume)
    if count > 1 and launch.world() == 1:
        return launch.launch([*TOKENS.get(), *([] if folder.out else ["--out", str(out)])], count)
    reading = reading_of(columns, group, multi_label)

    from crosspatch.cli.screen import Screen, print_json

    with Screen(stderr=output.json) as screen, launch.one_voice():
        from crosspatch.models.registry import create_model, list_models
        from crosspatch.training.session import train_run

        model = overrides.get("model")
        if model and not list_models(model.split(".")[0]):
            create_model(model)  # refuses the name, before any picture is read
        with resumable(words.command("crosspatch", "train", data, "--out", out, "--resume"), out):
            summary = train_run(
                data, out, overrides, screen, folder.resume, folder.overwrite, reading, folder.force
            )
        if launch.rank() == 0:
            from crosspatch.cli.card import renew
            from crosspatch.report.shipped import note_machine

            summary["report"] = _page(screen, out, data)
            summary["card"] = renew(screen, out, lambda: note_machine(out))
    if output.json and launch.rank() == 0:
        print_json(summary)
    return 0


def _page(screen: Screen, out: Path, data: str) -> str | None:
    """The path of report.html, written now; None where it cannot be."""

    def write() -> Path:
        from crosspatch.report.run import write_report

        return write_report(out, progress=screen.progress)

    page = out / "report.html"
    again = words.command("crosspatch", "eval", out, data, "--report", page)
    return pages.told(screen, out, write, again)


def _begun_with(out: Path, resume: bool) -> int:
    """The processes that a run was begun with, where it is to go on."""
    path = out / "config.toml"
    if not resume or not path.is_file():
        return 1
    try:
        return int(tomllib.loads(path.read_text(encoding="utf-8"))["recipe"].get("devices", 1))
    except (KeyError, ValueError):  # a damaged file is named where it is needed
        return 1


@contextmanager
def resumable(do: str, out: Path, sign: str = "config.toml") -> Iterator[None]:
    """However what goes into `out` is stopped: `do` is what continues it, once it was begun, which
    the file `sign` shows.

    The steps save when a signal comes; outside of them SIGTERM ends the command as Ctrl-C does.
    """
    name = "Ctrl-C"

    def end(number: int, frame: object) -> None:
        nonlocal name
        name = "SIGTERM"
        raise KeyboardInterrupt

    with handled(end, signal.SIGTERM):
        try:
            yield
        except Interrupted as stop:
            raise Interrupted(stop.got, stop.expected, do) from stop
        except KeyboardInterrupt as stop:
            if not any((out / file).is_file() for file in (sign, "waiting.toml")):
                raise
            raise Interrupted(f"stopped by {name}", f"{out} holds what was done", do) from stop


def default_out(data: str, resume: bool, base: Path = Path("runs")) -> Path:
    """`runs/DATA-N` with the next N, or with `resume` the newest; raises UsageError without any."""
    path = Path(data)
    name = path.name or path.resolve().name
    name = re.sub(_ENDINGS, "", name, flags=re.IGNORECASE) or "run"
    name = re.sub(r"[^\w.-]+", "-", name).strip("-.") or "run"
    taken = {}
    for found in base.iterdir() if base.is_dir() else ():
        stem, _, number = found.name.rpartition("-")
        if stem == name and number.isdecimal() and not _unused(found):
            taken[int(number)] = found
    if not resume:
        return base / f"{name}-{max(taken, default=0) + 1}"
    if not taken:
        raise UsageError(
            f"no run of {data} in {base}/",
            "--resume goes on with a run that was begun",
            "leave --resume out, or name the run with --out DIR",
        )
    return taken[max(taken)]


def _unused(folder: Path) -> bool:
    """Whether a folder was made for a run that never began (its command was refused)."""
    return folder.is_dir() and all(entry.name == ".lock" for entry in folder.iterdir())
