# SPDX-License-Identifier: Apache-2.0
"""`crosspatch VERB …`: finds the verb, and turns every way to fail into a text and an exit code.

    0 ok · 1 finding · 2 wrong usage · 3 data error · 4 interrupted, can be continued · 5 internal

Verbs are imported when they are called, so `crosspatch --help` never waits for torch. An error is
three parts: what we got, what we expect, what to type. With `--json` it is an object on stdout too.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
import tempfile
import traceback
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cyclopts import App, CycloptsError, Parameter
from cyclopts.exceptions import (
    MissingArgumentError,
    RepeatArgumentError,
    UnknownCommandError,
    UnknownOptionError,
    UnusedCliTokensError,
)

import crosspatch
from crosspatch.cli.options import TOKENS
from crosspatch.errors import CrosspatchError, Interrupted, UsageError, near, visible

VERBS = {
    "audit": ("crosspatch.cli.audit:audit", "Look at pictures before a training."),
    "train": ("crosspatch.cli.train:train", "Train a classifier on a folder of pictures."),
    "eval": ("crosspatch.cli.eval:evaluate", "Measure a trained run on labelled pictures."),
    "predict": ("crosspatch.cli.predict:predict", "Name the class of pictures."),
    "export": ("crosspatch.cli.export:export", "Write a run as one file for other programs."),
    "verify": ("crosspatch.cli.verify:verify", "Compare a bundle with the model it was made of."),
    "serve": ("crosspatch.cli.serve:serve", "Answer pictures over HTTP, with a page to try it."),
    "label": ("crosspatch.cli.label:label", "Let a teacher label every patch of the pictures."),
    "shrink": ("crosspatch.cli.shrink:shrink", "Make a run as small and fast as a budget asks."),
    "bench": ("crosspatch.cli.bench:bench", "Measure how fast every engine runs a model here."),
    "compare": ("crosspatch.cli.compare:compare", "Find out which way to train is better."),
    "papers": ("crosspatch.cli.papers:papers", "Look up the papers behind all this."),
}
DATA_VERBS = {
    "longtail": (
        "crosspatch.cli.data_longtail:longtail",
        "Write pictures with a long tail: fewer from class to class.",
    ),
    "unlearnable": (
        "crosspatch.cli.data_unlearnable:unlearnable",
        "Write copies that are hard to learn from (an experiment).",
    ),
}
ROOMS = {"data": ("Make other data sets out of one.", DATA_VERBS)}
"""Verbs that hold verbs: `crosspatch data longtail …`."""


def _app(name: str, text: str, verbs: Mapping[str, tuple[str, str]], **further: Any) -> App:
    """An application whose verbs are imported when they are called."""
    made = App(
        name=name,
        help=text,
        help_format="plaintext",
        result_action="return_value",
        exit_on_error=False,
        print_error=False,
        suppress_keyboard_interrupt=False,
        default_parameter=Parameter(
            negative_iterable=(), negative_bool=(), show_default=lambda value: value or None
        ),
        **further,
    )
    for place, (verb, (where, text)) in enumerate(verbs.items()):
        made.command(where, name=verb, help=text, sort_key=place)
    return made


app = _app(
    "crosspatch",
    "Train vision transformers on your own pictures.",
    VERBS,
    version=crosspatch.__version__,
    help_epilogue="Start with: crosspatch train PHOTOS      (one folder per class in PHOTOS)",
)
for _place, (_room, (_help, _verbs)) in enumerate(ROOMS.items(), len(VERBS)):
    app.command(_app(_room, _help, _verbs, version_flags=(), sort_key=_place))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code and never raises what a user can cause."""
    tokens = list(sys.argv[1:] if argv is None else argv)
    TOKENS.set(tuple(tokens))
    if argv is None and not sys.warnoptions and "--debug" not in tokens:
        warnings.simplefilter("ignore")  # other packages' advice to programmers
    try:
        result = app.help_print(tokens[:-1]) if _asks_for_help(tokens) else app(tokens)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except BrokenPipeError:  # the reader of our output has seen enough (`crosspatch … | head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (Exception, KeyboardInterrupt) as error:
        failure = _three_parts(error, tokens)
        if "--debug" in tokens:
            traceback.print_exc()
    _tell(failure, as_json="--json" in tokens)
    return failure.exit_code


def _asks_for_help(tokens: list[str]) -> bool:
    """Whether it is `VERB --help` and nothing else, which needs no parsing of options: printed at
    once it takes a third less time."""
    match tokens:
        case [verb, "--help" | "-h"]:
            return verb in VERBS
        case [room, verb, "--help" | "-h"]:
            return room in ROOMS and verb in ROOMS[room][1]
    return False


def _three_parts(error: BaseException, tokens: list[str]) -> CrosspatchError:
    match error:
        case CrosspatchError():
            return error
        case CycloptsError():
            return _wrong_usage(error, tokens)
        case KeyboardInterrupt():
            return Interrupted("stopped by Ctrl-C", "nothing was left half done", "run it again")
        case _:
            return _internal(tokens, f"a fault in crosspatch: {type(error).__name__}: {error}")


def _tell(failure: CrosspatchError, as_json: bool) -> None:
    """Three lines on stderr: they are wrapped by the terminal only, so that a path stays whole."""
    from rich.console import Console
    from rich.text import Text

    if as_json:
        parts = {"got": failure.got, "expected": failure.expected, "do": failure.do}
        print(json.dumps({"error": parts | {"exit_code": failure.exit_code}}))
    mild = isinstance(failure, Interrupted)
    console = Console(stderr=True, soft_wrap=True, markup=False, highlight=False)
    console.print(Text("note      " if mild else "error     ", "yellow" if mild else "red"), end="")
    console.print(Text(visible(failure.got)))
    console.print(Text("          " + visible(failure.expected)))
    console.print(Text("try       ", "green"), end="")
    console.print(Text(visible(failure.do)))


def _wrong_usage(error: CycloptsError, tokens: list[str]) -> UsageError:
    """The parser's complaint in three parts, with names that are near."""
    error.verbose = False
    verb, known = _place_of(tokens)
    manual = f"crosspatch {verb} --help".replace("  ", " ")
    match error:
        case UnknownCommandError():
            wrong = (error.unused_tokens or [""])[0]
            hit = near(wrong, known, count=1)
            known = f"the verbs are {', '.join(known)}"
            if wrong.startswith("-"):
                known = f"options follow a verb, and {known}"
                return UsageError(f"no verb before {wrong}", known, manual)
            if hit:
                return UsageError(f"unknown verb {wrong!r}", known, _retyped(tokens, wrong, hit))
            return UsageError(f"unknown verb {wrong!r}", known, manual)
        case UnknownOptionError():
            wrong = (error.token.keyword or error.token.value).split("=")[0]
            names = [name for argument in error.argument_collection for name in argument.names]
            hit = near(wrong, [name for name in names if name.startswith("--")])
            expected = f"the nearest options are {hit}" if hit else "there is nothing like it"
            return UsageError(f"{verb} has no option {wrong}", expected, manual)
        case MissingArgumentError() if error.argument is not None:
            name = error.keyword or error.argument.name
            example = f"type a value after {name}" if name.startswith("-") else f"type a {name}"
            return UsageError(f"{name} is missing", f"{verb} needs it", f"{example}; see {manual}")
        case UnusedCliTokensError():
            extra = shlex.join(error.unused_tokens or [])
            expected = "names with spaces stand in quotes, and options begin with --"
            return UsageError(f"too many arguments: {extra}", expected, manual)
        case RepeatArgumentError():
            return UsageError(str(error).rstrip("."), "each option stands once", manual)
    cause = error.__cause__
    if isinstance(cause, UsageError):
        return cause
    got, _, choices = str(error).partition(". Choose from: ")
    expected = f"the choices are {choices}".rstrip(".") if choices else "another kind of value"
    return UsageError(got.rstrip("."), expected, manual)


def _place_of(tokens: list[str]) -> tuple[str, list[str]]:
    """(the verb of a command, "" without one; the verbs that there are in its place)."""
    first, second = [*tokens, "", ""][:2]
    if first not in ROOMS:
        return first if first in VERBS else "", [*VERBS, *ROOMS]
    inner = ROOMS[first][1]
    return f"{first} {second}" if second in inner else first, [*inner]


def _retyped(tokens: list[str], wrong: str, right: str) -> str:
    return shlex.join(["crosspatch", *(right if token == wrong else token for token in tokens)])


def _internal(tokens: list[str], got: str) -> CrosspatchError:
    """Writes what a bug report needs (command, versions, traceback) to a file and names it."""
    loaded = {name: sys.modules[name] for name in ("torch", "timm", "numpy") if name in sys.modules}
    versions = [f"{name} {getattr(module, '__version__', '?')}" for name, module in loaded.items()]
    lines = [
        f"command: {shlex.join(['crosspatch', *tokens])}",
        f"crosspatch {crosspatch.__version__}, python {platform.python_version()}",
        ", ".join([platform.platform(), *versions]),
        traceback.format_exc(),
    ]
    try:
        handle, name = tempfile.mkstemp(prefix="crosspatch-error-", suffix=".txt")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write("\n".join(lines))
        do = f"report it and attach {Path(name)}, or see it now by adding --debug"
    except OSError:
        do = "see where it happened by adding --debug"
    return CrosspatchError(got[:500], "this should not happen, whatever was typed", do)
