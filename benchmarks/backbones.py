"""Backbones beside each other: parameters, multiply-adds and milliseconds, and what they learn.

    python benchmarks/backbones.py speed [--threads 2] [--seconds 12] [--only NAME …]
    python benchmarks/backbones.py learn --data FOLDER --out FOLDER [--epochs 5] [--seeds 3]
           [--threads 1] [--time 2h]
    python benchmarks/backbones.py page | remember

speed: one variant of each paper beside the timm network whose multiply-adds are nearest, at batch
1 and 8, in one process and in alternation; rows go into results/backbones.csv. learn: the small
presets, whose multiply-adds are alike, by `crosspatch compare` with one recipe, against the preset
that `train` takes; FOLDER holds train/CLASS/ and test/CLASS/ of pictures of 32 pixels. page: writes
docs/backbones.md from both; remember: the papers' entries in the catalog.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import shlex
import shutil
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import crosspatch._torchvision

import matplotlib as mpl
import timm
import torch
from matplotlib.figure import Figure

import crosspatch as xp
from crosspatch import catalog
from crosspatch.catalog import tables
from crosspatch.cli.compare import Whole
from crosspatch.cli.compare import _print as show
from crosspatch.cli.screen import Screen
from crosspatch.metrics.latency import alternate, ratio
from crosspatch.metrics.macs import count_macs
from crosspatch.training.compare import Asked, compare
from hardware import RESULTS, append, facts, milliseconds

PAGE = Path(__file__).parent.parent / "docs" / "backbones.md"
CHART = PAGE.parent / "figures" / "backbones.png"
OURS = (
    "crossvit_small_240", "swin_tiny_patch4_window7_224", "convnext_tiny", "nextvit_small",
    "cct_14_7x2_224", "cvt_13", "dhvt_small_imagenet_patch16", "crossformer_small", "cat_small",
    "smt_s", "hornet_tiny_7x7", "poolformer_s24", "fcaformer_l2", "duoformer_r18_s4_channel",
    "sret_t", "spectformer_h_s", "dwnet_tiny", "astroformer_0", "medvitv2_tiny",
    "polytwins_svt_small", "tic_small", "maformer_s", "fmvit_m", "s2aformer_m", "ascan_t",
)  # fmt: skip
PEERS = (
    "deit_tiny_patch16_224", "deit_small_patch16_224", "resnet18", "resnet34", "resnet50",
    "convnext_nano", "convnext_tiny", "swin_tiny_patch4_window7_224", "poolformer_s24",
    "regnety_016", "regnety_032", "crossvit_small_240", "pvt_v2_b2", "levit_256",
    "xcit_tiny_12_p16_224",
)  # fmt: skip
BASE = "crossvit_micro_32"
SMALL = (
    "vit_micro_32", "swin_micro_32", "convnext_micro_32", "nextvit_micro_32", "cct_micro_32",
    "cvt_micro_32", "dhvt_micro_32", "crossformer_micro_32", "cat_micro_32", "smt_micro_32",
    "hornet_micro_32", "metaformer_micro_32", "fcaformer_micro_32", "duoformer_micro_32",
    "sret_micro_32", "spectformer_micro_32", "dwnet_micro_32", "astroformer_micro_32",
    "medvitv2_micro_32", "polytwins_micro_32", "tic_micro_32", "maformer_micro_32",
    "fmvit_micro_32", "s2aformer_micro_32", "ascan_micro_32",
)  # fmt: skip
SLUGS = {"polytwins": "shift-equivariant"}
"""Presets whose paper has another name."""
SIDE = 224


def counted(name: str, make: Any) -> int:
    """Multiply-adds at the network's own size, without its numbers."""
    with torch.device("meta"):
        model = make(name)
    side = model.default_cfg["input_size"][1]
    return count_macs(model, (3, side, side))


def nearest(macs: int) -> tuple[str, int]:
    """timm's network of the most similar multiply-adds."""
    found = {name: counted(name, timm.create_model) for name in PEERS}
    name = min(found, key=lambda one: abs(math.log(found[one] / macs)))
    return name, found[name]


def forward(model: torch.nn.Module, x: torch.Tensor) -> None:
    with torch.inference_mode():
        model(x)


def speed(asked: argparse.Namespace) -> None:
    torch.set_num_threads(asked.threads)
    for name in asked.only or OURS:
        macs = counted(name, xp.create_model)
        peer, theirs = nearest(macs)
        models = {
            name: xp.create_model(name).eval(),
            peer + " (timm)": timm.create_model(peer).eval(),
        }
        for batch in (1, 8):
            calls = {}
            for who, model in models.items():
                side = model.default_cfg["input_size"][1]
                calls[who] = partial(forward, model, torch.randn(batch, 3, side, side))
            times = alternate(calls, seconds=asked.seconds, least=7, settle=0)
            first, second = calls
            row = {
                "backbone": name,
                "parameters": sum(p.numel() for p in models[first].parameters()),
                "gmacs": round(macs / 1e9, 3),
                "peer": peer,
                "peer_gmacs": round(theirs / 1e9, 3),
                "batch": batch,
                "threads": asked.threads,
                **milliseconds(times[first]),
                "peer_median_ms": milliseconds(times[second])["median_ms"],
                "times_peer": round(ratio(times[first], times[second]).median, 3),
                "turns": times[first].count,
                **facts("torch", "timm"),
            }
            append(RESULTS / "backbones.csv", [row])
            print(*list(row.values())[:12], flush=True)


def short(name: str) -> str:
    return name.removesuffix("_micro_32")


def learn(asked: argparse.Namespace) -> None:
    names = [BASE, *(asked.only or SMALL)]
    tries = ",".join(f"{short(name)}=model={name}" for name in names)
    common = {"size": 32, "threads": asked.threads}
    typed = Asked(tries, asked.seeds, asked.time, None if asked.time else asked.epochs, common)
    with Screen() as screen:
        found = compare(str(asked.data), asked.out, typed, Whole(screen))
        show(screen, found)
    kept = RESULTS / f"backbones-{asked.name or ('time' if asked.time else 'learn')}"
    for name, end in (("compare.png", "png"), ("results.csv", "csv")):
        shutil.copy(asked.out / name, kept.with_suffix(f".{end}"))
    text = (asked.out / "compare.md").read_text().replace("compare.png", f"{kept.name}.png")
    before, fence, _ = text.partition("\n```\n")
    text = before.replace(str(asked.data), "cifar10") + f"{fence}{_typed(asked)}{fence}"
    kept.with_suffix(".md").write_text(text)
    about = {"results": found.results(), "command": _typed(asked)}
    kept.with_suffix(".json").write_text(json.dumps(about, indent=1, default=str) + "\n")


def _typed(asked: argparse.Namespace) -> str:
    """The command without this machine's paths."""
    words = [
        "python",
        "benchmarks/backbones.py",
        "learn",
        "--data",
        "cifar10",
        "--out",
        "backbones",
    ]
    words += ["--only", *asked.only] if asked.only else []
    words += ["--name", asked.name] if asked.name else []
    for name in ("time" if asked.time else "epochs", "seeds", "threads"):
        words += [f"--{name}", f"{getattr(asked, name):g}"]
    return shlex.join(words)


def page(asked: argparse.Namespace) -> None:
    """docs/backbones.md, of what was measured."""
    del asked
    lines = [
        "# Backbones", "",
        "Every name of `xp.list_models()` follows one contract: timm's, with maps of every stage, "
        "any number of channels and classes, weights in the authors' layout (`xp.load_released`), "
        "ONNX, any size of pictures but where a file says otherwise. Take the one whose paper asks "
        "your question, with `--model NAME`; a small preset of each is called `…_micro_32`. This "
        "page is written by `python benchmarks/backbones.py page`.", "",
        *_papers(), "",
    ]  # fmt: skip
    for kept, alike in _kept():
        lines += _small(kept, alike)
    lines += _large() if (RESULTS / "backbones.csv").is_file() else []
    PAGE.write_text("\n".join(lines))


def remember(asked: argparse.Namespace) -> None:
    """The catalog, of what the small presets learnt in equal epochs and in equal minutes."""
    del asked
    for kept, alike in _kept():
        how = " in equal minutes" if alike == "minutes" else ""
        about = json.loads(kept.with_suffix(".json").read_text())
        base, *others = about["results"]["candidates"]
        for one in others:
            slug = SLUGS.get(one["name"], one["name"])
            catalog.record(slug, [_outcome(one, base, how, about)])


def _kept() -> Iterator[tuple[Path, str]]:
    """What was measured, without its ending, and what was alike."""
    for name, alike in (("learn", "epochs"), ("time*", "minutes")):
        for found in sorted(RESULTS.glob(f"backbones-{name}.json"), key=lambda path: path.stem):
            yield found.with_suffix(""), alike


def _outcome(one: dict, base: dict, how: str, about: dict) -> catalog.Measured:
    model, found, day = one["settings"]["model"], one["difference"], facts()
    shares = [f"{100 * each['accuracy']['mean']:.1f} %" for each in (one, base)]
    seeds = len(about["results"]["seeds"])
    return catalog.Measured(
        claim=f"With the multiply-adds of {BASE}, {model} learns 8,500 small pictures as well"
        f"{how}.",
        figure=f"{100 * found['mean']:+.1f} points of test accuracy against {BASE}",
        interval=tuple(round(100 * found[end], 2) for end in ("low", "high")),
        hardware=day["machine"],
        command=about["command"],
        date=day["date"],
        verdict=f"{one['verdict']} ({seeds} seeds, {one['epochs']:.3g} epochs, {shares[0]} "
        f"against {shares[1]}); no claim of the paper",
    )


def _papers() -> list[str]:
    """A line for each paper that brings a network."""
    return [tables.block("backbones"), "", "What differs from the authors' code stands in "
            "`catalog/SLUG.toml`; `crosspatch papers SLUG` shows it."]  # fmt: skip


def _small(kept: Path, alike: str) -> list[str]:
    which = ", second comparison" if kept.name.endswith("second") else ""
    about = json.loads(kept.with_suffix(".json").read_text())
    text = kept.with_suffix(".md").read_text()
    head, rule, base, *rows = [line for line in text.splitlines() if line.startswith("|")]
    table = [head, rule, base, *sorted(rows, key=_points, reverse=True)]
    told = [line for line in text.splitlines() if line.startswith("- ")]
    better = [line for line in told if line.startswith("- **") and ": better by" in line]
    named = "".join(f" {line[2:]}" for line in better)
    verdict = f"Better than the default of `train`:{named}" if better else (
        f"None is shown to be better than `{BASE}`, the default of `train` for pictures of this "
        "size, where so many are tried."
    )  # fmt: skip
    return [
        f"## What small presets learn in equal {alike}{which}", "", *_chart(about, alike),
        f"CIFAR-10, networks of about the multiply-adds of `{BASE}`; one recipe, the same {alike} "
        "for each, paired differences. Seconds were taken beside other jobs.", "",
        verdict, "", *table, "", *told, "", f"`{about['command']}`", "",
    ]  # fmt: skip


def _points(row: str) -> float:
    """The difference that a row of the table tells."""
    return float(row.split("|")[3].split("(")[0])


def _chart(about: dict, alike: str) -> list[str]:
    """Drawn where the epochs are equal: every candidate's difference, the best first."""
    if alike != "epochs":
        return []
    others = about["results"]["candidates"][1:]
    others = sorted(others, key=lambda one: one["difference"]["mean"])
    with mpl.rc_context({"axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(7, 1 + 0.26 * len(others)), layout="constrained")
        axes = figure.subplots()
        for place, one in enumerate(others):
            low, mean, high = (100 * one["difference"][key] for key in ("low", "mean", "high"))
            shown = one["p_holm"] < 0.05
            colour = ("#0072b2" if mean > 0 else "#d55e00") if shown else "#666666"
            axes.plot([low, high], [place, place], color=colour, linewidth=2)
            axes.plot(mean, place, "o", color=colour)
        axes.axvline(0, color="black", linestyle="--", linewidth=1)
        told = [f"{one['settings']['model']}  {100 * one['accuracy']['mean']:.1f} %"
                for one in others]  # fmt: skip
        axes.set_yticks(range(len(others)), told, fontsize=9)
        axes.set_ylim(-0.6, len(others) - 0.4)
        axes.grid(axis="x", linewidth=0.5, alpha=0.5)
        share = 100 * about["results"]["candidates"][0]["accuracy"]["mean"]
        below = f"points of test accuracy against {BASE} ({share:.1f} %), 95 % intervals"
        figure.supxlabel(below, fontsize=9)
        figure.savefig(CHART, dpi=110)
    told = "grey: no difference shown; blue better, orange worse, where so many are tried"
    return [f"![What small presets learn, beside {BASE}; {told}](figures/{CHART.name})", ""]


def _large() -> list[str]:
    with (RESULTS / "backbones.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    lines = [
        "## Time on a CPU", "",
        "Beside the timm network whose multiply-adds are nearest, alternating in one process; "
        "`times` is how long ours takes as a multiple of the other.", "",
        "| backbone | M parameters | GMACs | batch | ms (5 % to 95 %) | peer | its GMACs | its ms "
        "| times |",
        "|---|---:|---:|---:|---:|---|---:|---:|---:|",
    ]  # fmt: skip
    for row in rows:
        lines.append(
            f"| {row['backbone']} | {int(row['parameters']) / 1e6:.2f} | {row['gmacs']} | "
            f"{row['batch']} | {row['median_ms']} ({row['low_ms']} to {row['high_ms']}) | "
            f"{row['peer']} | {row['peer_gmacs']} | {row['peer_median_ms']} | {row['times_peer']} |"
        )
    last = rows[-1]
    told = f"{last['threads']} threads, {last['machine']}, torch {last['torch']}, {last['date']}."
    return [*lines, "", told, "", "`python benchmarks/backbones.py speed`", ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    verbs = parser.add_subparsers(required=True)
    for verb in (speed, learn, page, remember):
        one = verbs.add_parser(verb.__name__)
        one.set_defaults(verb=verb)
        one.add_argument("--threads", type=int, default=2 if verb is speed else 1)
        one.add_argument("--only", nargs="+")
        one.add_argument("--seconds", type=float, default=12)
        one.add_argument("--data", type=Path, required=verb is learn)
        one.add_argument("--out", type=Path, required=verb is learn)
        one.add_argument("--epochs", type=int, default=5)
        one.add_argument("--seeds", type=int, default=3)
        one.add_argument("--time", type=float, help="seconds for all")
        one.add_argument("--name", help="of the results, where those before are to stay")
    asked = parser.parse_args()
    asked.verb(asked)


if __name__ == "__main__":
    sys.exit(main())
