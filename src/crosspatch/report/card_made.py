# SPDX-License-Identifier: Apache-2.0
"""How a model was made and shipped, for its card: training, speed, compression, licences."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from crosspatch.deploy.loading import weights_hash
from crosspatch.report.page import count, percent, size

NOT_MEASURED = "not measured"
WATTS = 10.0
"""Assumed for each core that computes; no meter was read."""
OWN = "Apache-2.0"
Line = tuple[str, str, bool]
"""(label, value, whether the value is code)."""


def training(report: dict[str, Any]) -> list[Line]:
    """Command, settings, versions, hardware, time and an estimate of the energy."""
    config = report["config"]
    recipe, run = config.get("recipe") or {}, config.get("run") or {}
    versions = config.get("versions") or {}
    weights = recipe.get("weights") or {}
    told: list[Line] = [
        ("command", str(run.get("command") or "not known"), True),
        ("seed", f"{recipe.get('seed', 'not known')}", False),
        ("begun", str(run.get("created") or "not known"), False),
        ("length", f"{count(report.get('epochs'))} epochs, {count(report.get('steps'))} steps of "
         f"{recipe.get('batch', '?')} pictures", False),
        ("recipe", f"{recipe.get('name', '?')}, objective {report.get('objective') or '?'}, "
         f"mixing {', '.join(recipe.get('mix') or ()) or 'none'}, balance "
         f"{recipe.get('balance', '?')}", False),
        ("began with", str(weights.get("where") or "fresh weights"), bool(weights.get("where"))),
        ("versions", ", ".join(f"{k} {v}" for k, v in versions.items()) or "not known", False),
        ("hardware", hardware(report), False),
        ("time", f"{report['seconds']:,.0f} s" if report.get("seconds") else NOT_MEASURED, False),
        ("energy", energy(report), False),
    ]  # fmt: skip
    teacher = recipe.get("teacher") or {}
    if teacher:
        told.append(("teacher", str(teacher.get("where") or "not known"), True))
    return told


def hardware(report: dict[str, Any]) -> str:
    """What the training ran on, as far as it was noted."""
    config = report["config"]
    found, recipe = config.get("machine") or {}, config.get("recipe") or {}
    if not found:
        return str(report.get("processor") or "not known")
    memory = f", {found['memory'] / 1e9:.0f} GB free memory" if found.get("memory") else ""
    name = f" of {report['processor']}" if report.get("processor") else ""
    device = recipe.get("device", found.get("device", "cpu"))
    return (
        f"{device}, {found.get('cores', '?')} cores{name}{memory}, {recipe.get('precision', '?')}"
    )


def energy(report: dict[str, Any]) -> str:
    """Time x cores x an assumed power, on a CPU; nothing is guessed of a GPU."""
    recipe = report["config"].get("recipe") or {}
    versions = report["config"].get("versions") or {}
    threads = recipe.get("threads") or versions.get("threads")
    if not report.get("seconds") or not threads or recipe.get("device", "cpu") != "cpu":
        return NOT_MEASURED
    cores = int(threads) * int(recipe.get("devices") or 1)
    hours = report["seconds"] * cores * WATTS / 3600
    return (
        f"about {hours:.2g} Wh, if each of {cores} computing cores drew {WATTS:g} W throughout: an "
        "assumption, no meter was read, and the rest of the machine is not counted"
    )


def speed(report: dict[str, Any], evidence: dict[str, Any]) -> list[list[str]]:
    """[what runs it, one picture on one thread, hardware]."""
    rows = []
    found = evidence.get("latency")
    if found:
        low, high = 1000 * found["low"], 1000 * found["high"]
        took = f"{1000 * found['median']:.3g} ms ({low:.3g} to {high:.3g})"
        rows.append(["torch, decoded picture", took, found.get("hardware") or hardware(report)])
    for name, one in bundles(report):
        verified = one.get("verified") or {}
        machine = verified.get("hardware", "not known")
        if verified.get("torch_milliseconds"):
            rows.append(["torch fp32", f"{verified['torch_milliseconds']:.3g} ms", machine])
        for engine in verified.get("engines") or ():
            took = engine.get("milliseconds")
            if took:
                title = f"{engine['engine']} {engine['precision']} ({name})"
                rows.append([title, f"{took:.3g} ms", machine])
    return rows


def bundles(report: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The exported files that are known, by name."""
    return sorted((report.get("bundles") or {}).items())


def steps(report: dict[str, Any]) -> list[list[str]]:
    """[step, size of the file, what it cost in accuracy]."""
    rows = []
    if report.get("reduce"):
        rows.append([f"tokens reduced by {report['reduce']}", "–", _reduced(report)])
    for name, one in bundles(report):
        rows.append([f"{name}: {one['to']}, {one['precision']}", size(one["size"]), _cost(one)])
    return rows


def _reduced(report: dict[str, Any]) -> str:
    """The accuracy of the run that it began with, beside its own."""
    weights = (report["config"].get("recipe") or {}).get("weights") or {}
    own = report.get("test") or {}
    try:
        before = json.loads((Path(weights["path"]).parent / "report.json").read_text("utf-8"))
        parent = before["test"]
        if weights.get("kind") != "run" or not parent or before.get("reduce") == report["reduce"]:
            return NOT_MEASURED
        key = "map" if "map" in own else "accuracy"
        return (
            f"{percent(own[key])} here, {percent(parent[key])} in the run that it began with (each "
            "on its own test pictures, unpaired)"
        )
    except (OSError, ValueError, KeyError, TypeError):
        return NOT_MEASURED


def _cost(one: dict[str, Any]) -> str:
    """What a bundle can have cost: no more than the pictures whose class it changed."""
    verified = one.get("verified") or {}
    judged = [e["agreed"] for e in verified.get("engines") or () if e.get("agreed") is not None]
    if not judged or not verified.get("pictures") or not verified.get("same_weights"):
        return NOT_MEASURED
    changed, all_ = verified["pictures"] - min(judged), verified["pictures"]
    if not changed:
        return f"nothing on {all_:,} pictures: every answer is the same"
    return f"at most {100 * changed / all_:.2f} points: {changed:,} of {all_:,} answers changed"


def parity(report: dict[str, Any]) -> list[str]:
    """What `export` and `verify` found, a line for each file and engine."""
    lines = []
    for name, one in bundles(report):
        if one.get("difference") is not None:
            found = f"at most {one['difference']:.1e} from torch in a probability"
            lines.append(f"{name}, when it was exported: {found} on pictures by a formula")
        verified = one.get("verified")
        if not verified:
            lines.append(f"{name}, on real pictures: {NOT_MEASURED} (crosspatch verify does it)")
            continue
        for engine in verified["engines"]:
            lines.append(
                f"{name}, {engine['engine']} {engine['precision']}: {_agreed(verified, engine)}"
            )
    return lines


def _agreed(verified: dict[str, Any], engine: dict[str, Any]) -> str:
    ok = "ok" if engine["ok"] else "MISMATCH"
    if engine.get("agreed") is None or not verified.get("same_weights"):
        check = engine.get("check")
        said = NOT_MEASURED if check is None else f"at most {check:.1e} apart on its check pictures"
        return f"{said}, {ok}"
    far = f"at most {engine['difference']:.1e} apart" if engine["difference"] is not None else ""
    return f"{engine['agreed']:,} of {verified['pictures']:,} answers as torch's, {far}, {ok}"


def licences(report: dict[str, Any]) -> list[str]:
    """Of the code, of these weights, of those that it began with."""
    weights = (report["config"].get("recipe") or {}).get("weights") or {}
    base = {
        "": "base weights: none, it was trained from fresh ones",
        "run": f"base weights: those of {weights.get('where')}, see the card there",
        "released": f"base weights: {weights.get('where')}, under the licence of whoever released "
        "them, which is not known here: look it up before you pass the model on",
    }
    unknown = f"base weights: {weights.get('where')}, of a licence that is not known here"
    return [
        f"code: {OWN} (crosspatch)",
        "these weights: no licence was stated; whoever trained them decides, within the rights to "
        "the pictures and to the base weights",
        base.get(str(weights.get("kind") or ""), unknown),
        "pictures: not known",
    ]


def again(report: dict[str, Any]) -> list[tuple[str, bool]]:
    """Lines that lead to the same model, and whether each is code."""
    config = report["config"]
    versions = config.get("versions") or {}
    pins = [
        f"{name}=={versions[name]}"
        for name in ("crosspatch", "torch", "timm")
        if versions.get(name)
    ]
    lines = [(shlex.join(["pip", "install", *pins]), True)] if pins else []
    command = (config.get("run") or {}).get("command")
    lines.append((str(command), True) if command else ("the command is not known", False))
    lines.append(
        (
            "the same seed, versions and processor give the same numbers on a CPU; config.toml "
            "holds every setting, split.csv which picture was where, and the fingerprint tells "
            "other data",
            False,
        )
    )
    return lines


def hashes(folder: Path, report: dict[str, Any]) -> list[tuple[str, str]]:
    """sha256 of the weights and of the exported files; a file of other weights says so."""
    own = weights_hash(folder)
    found = [("model/model.safetensors, sha256", own or "not known")]
    for name, one in bundles(report):
        other = "" if one.get("weights") in (own, "") else ", made of OTHER weights"
        found.append((f"{name}{other}, sha256", one["sha256"]))
    return found
