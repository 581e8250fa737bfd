# SPDX-License-Identifier: Apache-2.0
"""`--try base,resizemix,tome:r=8+mixup`: what is to be compared, from words to settings.

A candidate is words joined by `+`, and candidates stand between commas. A word is

    base                  nothing else than what holds for all
    mixup, resizemix …    a mixing; several are drawn from, one for each batch
    tome:r=8              a token reduction, as --reduce takes it
    ldam:margin=0.5       an objective, as --objective takes it
    distill:RUN           an objective and its teacher; so soft:, hard:, scalekd:, deit-lt:
    labels:FILE           token labels
    deit_tiny_patch16_224 a model
    deit                  a recipe, also written recipe=deit
    lr=0.001              any setting of `training.plan`; / stands between entries of a list

`NAME=` before the first word names the candidate. What follows a comma and is of the form
key=value belongs to the options before it (`evovit:keep=0.5,starts=4/8`), unless it is a setting.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import PurePath
from typing import Any

from crosspatch.data.augment import AugmentConfig
from crosspatch.errors import UsageError, near
from crosspatch.tokens import spec
from crosspatch.training import plan as plans
from crosspatch.training.objective import DISTILS, GIVES, OBJECTIVES
from crosspatch.training.recipe import MIXERS, Recipe
from crosspatch.training.recipes import RECIPES

BASE = "base"
FORM = "candidates with commas between them, each of words joined by +, such as base,mixup+ldam"
EXAMPLE = "--try base,mixup,tome:r=8"
LONGEST = 48  # letters of a folder's name
TAKEN = {"compare.json", "compare.md", "compare.png", "results.csv"}  # beside those folders
FIXED = {
    "seed": "--seeds", "split_seed": "--seed", "epochs": "--epochs", "steps": "--epochs",
    "time": "--time", "time_budget": "--time",
}  # fmt: skip
"""What is the same for all candidates, and how it is said."""
NEVER = ("name", "task", "stages", "device", "devices", "class_counts", "class_weights",
         "head_rows", "objective_args", "steps_per_epoch", "store", "mean", "std", "mix_prob",
         "mix_alpha", "penalties", "decay")  # fmt: skip
"""Fields of a recipe that no word can set."""
RAW = ("model", "recipe", "weights", "teacher", "labels", "reduce", "objective", "fit", "balance",
       "precision", "linear", "distill", "size")  # fmt: skip
"""Settings whose value is taken as it is typed."""
LISTS = ("mix", "sizes")
BRANCHED = {"augment": {one.name for one in fields(AugmentConfig)}, "model_args": None}
"""Settings with settings of their own, after a dot, and those there are (None: any)."""
GIVEN = ("labels", "teacher", "weights")
"""Words with a file, a run or a network after a colon."""
_SETTING = re.compile(r"[A-Za-z_][\w.]*=.*", re.DOTALL)
_NUMBERS = {"int": int, "float": (int, float), "bool": bool}


@dataclass(frozen=True)
class Candidate:
    """name: as tables show it; text: as it was typed; folder: of its runs; settings: overrides of
    `training.plan` that are its own."""

    name: str
    text: str
    folder: str
    settings: dict[str, Any] = field(default_factory=dict)


def parse_candidates(text: str, common: Mapping[str, Any] | None = None) -> list[Candidate]:
    """The candidates of `text`, in their order; common: settings that hold for all, which a
    candidate's own replace.

    Raises UsageError for an unknown or ambiguous word, two values for one setting, a candidate that
    is there twice, and fewer than two.
    """
    found: list[Candidate] = []
    for part in _split(text):
        label, settings = _read(part)
        merged = {**(common or {}), **settings}
        for other in found:
            if {**(common or {}), **other.settings} == merged:
                raise UsageError(
                    f"{part} and {other.text} are the same candidate",
                    "each candidate once: seeds repeat it",
                    "leave one of them away",
                )
        found.append(_named(part, label, settings, found))
    if len(found) < 2:
        raise UsageError(
            f"--try {text}: {'one candidate' if found else 'no candidate'}",
            f"two or more, the first of which the others are compared with; {FORM}",
            EXAMPLE,
        )
    return found


def _split(text: str) -> list[str]:
    parts: list[str] = []
    for piece in text.split(","):
        last = parts[-1].rpartition("+")[2] if parts else ""
        name = piece.strip().partition("=")[0].partition(".")[0]
        if _SETTING.fullmatch(piece.strip()) and _has_options(last) and name not in _known():
            parts[-1] += f",{piece.strip()}"
        else:
            parts.append(piece.strip())
    if not all(parts):
        raise UsageError(f"--try {text!r}: an empty candidate", FORM, EXAMPLE)
    return parts


def _has_options(word: str) -> bool:
    """Whether a word is `NAME:option=value…`, with or without the name of a candidate before it."""
    name, colon, rest = word.partition(":")
    label, equals, _ = name.partition("=")
    named = not equals or (label not in _known() and name.count("=") == 1)
    return bool(colon) and named and bool(_SETTING.fullmatch(rest))


def _read(text: str) -> tuple[str, dict[str, Any]]:
    """(label, settings) of a candidate."""
    label, rest = "", text
    head, equals, tail = text.partition("=")
    if equals and re.fullmatch(r"[\w.-]+", head) and head.partition(".")[0] not in _known():
        if not tail or not _meanings(tail.partition("+")[0]):
            raise _unknown(head, text)
        label, rest = head, tail
    settings: dict[str, Any] = {}
    for word in rest.split("+"):
        for key, value in _word(word.strip(), text).items():
            _join(settings, key, value, text)
    return label, settings


def _join(settings: dict[str, Any], key: str, value: Any, text: str) -> None:
    """One more setting. Raises UsageError where it has another value already."""
    before = settings.get(key)
    if key == "mix" and before and "none" not in (before, value):
        if value in before.split(","):
            raise UsageError(f"{value} twice in {text!r}", "each word once", "leave one away")
        settings[key] = f"{before},{value}"
    elif key in BRANCHED and before and not set(before) & set(value):
        settings[key] = {**before, **value}
    elif before is not None and before != value:
        raise UsageError(
            f"{text!r} sets {key} to {before} and to {value}",
            "one value for each setting",
            "make two candidates of it, with a comma between them",
        )
    else:
        settings[key] = value


def _word(word: str, text: str) -> dict[str, Any]:
    """The settings that a word means. Raises UsageError for none and for several meanings."""
    if word == BASE:
        return {}
    if _SETTING.fullmatch(word) and ":" not in word.partition("=")[0]:
        return _setting(word, text)
    found = _meanings(word)
    if not found:
        raise _unknown(word, text)
    if len(found) > 1:
        ways = [f"{key}={value[key]}" for key, value in found.items()]
        raise UsageError(
            f"{word!r} in {text!r} may mean {' or '.join(found)}", "one meaning", " or ".join(ways)
        )
    return next(iter(found.values()))


def _meanings(word: str) -> dict[str, dict[str, Any]]:
    """What a word that is no key=value may set, by kind; a reduction brings its own objective."""
    name, colon, rest = word.partition(":")
    if word == BASE or _SETTING.fullmatch(word):
        return {"setting": {}}
    if name in spec.METHODS:
        return {"reduce": {"reduce": word}}
    found: dict[str, dict[str, Any]] = {}
    if name in MIXERS and not colon:
        found["mix"] = {"mix": name}
    if name in OBJECTIVES or name in ("distill", *DISTILS):
        found["objective"] = _objective(name, rest, word)
    if name in GIVEN and rest:
        found[name] = {name: rest}
    if name in RECIPES and not colon and not found:  # an objective brings its own recipe
        found["recipe"] = {"recipe": name}
    if not colon and not found and _is_model(name):
        found["model"] = {"model": name}
    return found


def _objective(name: str, rest: str, word: str) -> dict[str, Any]:
    """An objective with its options, its teacher, or its labels."""
    kind = {"distill": "soft"}.get(name, name)
    if rest and not _SETTING.fullmatch(rest):
        if kind in DISTILS:
            return {"distill": kind, "teacher": rest}
        for key, names in GIVES.items():
            if name in names:
                return {"objective": name, key: rest}
        raise UsageError(
            f"{word!r} gives {name} {rest!r}", "options of the form option=value", FORM
        )
    if name in OBJECTIVES and (rest or name != "distill"):
        return {"objective": word}
    return {"distill": kind}


def _setting(word: str, text: str) -> dict[str, Any]:
    """`key=value` of a setting of `training.plan`."""
    key, _, value = word.partition("=")
    top, value = key.partition(".")[0], value.strip()
    if top in FIXED or top in NEVER:
        how = f"say {FIXED[top]} for all" if top in FIXED else "leave it away"
        raise UsageError(
            f"{word!r} in {text!r}: {top} is not a candidate's own",
            "what is the same for all candidates, or follows from the pictures",
            how,
        )
    if top not in _known():
        raise _unknown(top, text)
    if not value:
        raise UsageError(f"{word!r} in {text!r}", "a value after =", EXAMPLE)
    if top in LISTS:
        return {top: value.replace("/", ",")}
    if top == "size":
        sides = re.fullmatch(r"(\d{1,5})(?:x(\d{1,5}))?", value)
        if not sides:
            raise UsageError(f"{word!r} in {text!r}", "pixels: size=32 or size=24x32", "size=32")
        pair = tuple(int(side) for side in sides.groups() if side)
        return {top: pair[0] if len(pair) == 1 else pair}
    if top in RAW:
        return {top: value}
    made = spec.parse_options(word, text, FORM, EXAMPLE)
    if top in BRANCHED:
        _require_branches(top, made[top], text)
    else:
        _require_kind(top, made[top], text)
    return made


def _require_branches(key: str, value: Any, text: str) -> None:
    """Raises UsageError for a setting that has settings of its own, without them or with others."""
    known = BRANCHED[key]
    if isinstance(value, dict) and (known is None or set(value) <= known):
        return
    wrong = min(set(value) - (known or set())) if isinstance(value, dict) else ""
    close = near(wrong, known or (), 2) if wrong else ", ".join(sorted(known or ())[:3])
    raise UsageError(
        f"{f'{key}.{wrong}' if wrong else f'{key}={value}'} in {text!r}",
        f"{key}.NAME=value{f', such as {close}' if close else ''}",
        EXAMPLE,
    )


def _require_kind(key: str, value: Any, text: str) -> None:
    """Raises UsageError where a number, yes or no is needed and something else was typed."""
    kind = {one.name: str(one.type) for one in fields(Recipe)}.get(key, "bool")
    wanted = _NUMBERS.get(kind)
    if kind == "Pair" and not _is_pair(value):
        raise UsageError(f"{key}={value} in {text!r}", f"{key} is two numbers", f"{key}=0.9/0.95")
    if isinstance(value, dict):
        raise UsageError(f"{key}.… in {text!r}", f"{key}=value", EXAMPLE)
    if kind == "float | None" or wanted is None:
        return
    right = isinstance(value, wanted) and (kind == "bool") == isinstance(value, bool)
    if not right:
        shown = {"int": "a whole number", "float": "a number", "bool": "yes or no"}[kind]
        raise UsageError(f"{key}={value} in {text!r}", f"{key} is {shown}", EXAMPLE)


def _is_pair(value: Any) -> bool:
    numbers = isinstance(value, list | tuple) and [isinstance(one, int | float) for one in value]
    return numbers == [True, True]


def _known() -> set[str]:
    return {*plans.TYPED, *(one.name for one in fields(Recipe))}


def _is_model(name: str) -> bool:
    from crosspatch.models.registry import list_models

    return bool(re.fullmatch(r"[\w.-]+", name)) and bool(list_models(name.partition(".")[0]))


def _unknown(word: str, text: str) -> UsageError:
    from crosspatch.models.registry import list_models

    name = word.partition(":")[0]
    if name in GIVEN:
        what = "FILE" if name == "labels" else "RUN"
        return UsageError(f"{word!r} in {text!r}", f"{name}:{what}", f"--try {BASE},{name}:{what}")
    ours = [BASE, *MIXERS, *OBJECTIVES, *DISTILS, *spec.METHODS, *RECIPES]
    close = near(name, {*ours, *_known()} - {*NEVER, *FIXED}, 2)
    models = near(name, list_models(), 2)
    hits = ", ".join(filter(None, (close, models)))
    inside = "" if word == text else f" in {text!r}"
    return UsageError(
        f"{word!r}{inside} is nothing that can be tried",
        f"a mixing, an objective, a reduction, a recipe, a model, or key=value; near it: "
        f"{hits or 'nothing'}",
        f"--try {BASE},{near(name, ours, 1) or 'mixup'}",
    )


def _named(text: str, label: str, settings: dict[str, Any], others: list[Candidate]) -> Candidate:
    """A candidate with a name and a folder that no other has."""
    rest = text.removeprefix(f"{label}=") if label else text
    short = "+".join(_short(word) for word in rest.split("+"))
    taken = {one.name for one in others}
    name = label or (rest if short in taken else short)
    if name in taken:
        raise UsageError(
            f"two candidates are named {name}", "another name for each", "name them: NAME=…"
        )
    folder = re.sub(r"[^\w.=-]+", "-", name).strip("-.")[:LONGEST] or "candidate"
    used = {one.folder.casefold() for one in others} | TAKEN
    free = (f"{folder}-{number}" for number in itertools.count(len(others) + 1))
    folder = next(one for one in itertools.chain([folder], free) if one.casefold() not in used)
    return Candidate(name, text, folder, settings)


def _short(word: str) -> str:
    """A word whose path, if it has one, is its last part."""
    name, colon, rest = word.partition(":")
    if not colon or "=" in rest or "/" not in rest:
        return word
    return f"{name}:{PurePath(rest).name}"
