"""Eager forward passes and training steps beside timm's same networks, in float32 on the CPU.

    python benchmarks/forward.py [--threads 1 2] [--seconds 20] [--out FILE]

One process, turns in alternation: timm, ours with torch's own products, ours through oneDNN, and
the fastest plain product of matrices that was found in the same run, which is the floor: no network
can be faster than its multiply-adds at that rate.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import crosspatch._torchvision

import timm
import torch
import torch.nn.functional as F

import crosspatch as xp
from crosspatch.deploy.peak import peaks
from crosspatch.layers.linear import switched
from crosspatch.metrics.latency import alternate, ratio
from crosspatch.metrics.macs import count_macs
from hardware import RESULTS, append, facts, milliseconds

NETWORKS = {  # ours, timm's, side
    "crossvit_tiny": ("crossvit_tiny_224", "crossvit_tiny_240", 240),
    "crossvit_small": ("crossvit_small_224", "crossvit_small_240", 240),
    "crossvit_9_dagger": ("crossvit_9_dagger_224", "crossvit_9_dagger_240", 240),
    "deit_small": ("deit_small_patch16_224", "deit_small_patch16_224", 224),
}
STEPPED = ("crossvit_9_dagger", "deit_small")
PASSES = {"forward": 1, "step": 3}  # a backward pass costs two forward ones


def forward(model: torch.nn.Module, x: torch.Tensor, mode: str) -> None:
    with switched(mode), torch.inference_mode():
        model(x)


def step(
    model: torch.nn.Module, optimiser: torch.optim.Optimizer, x: torch.Tensor, mode: str
) -> None:
    """Forward, loss, backward and AdamW, as a training does them."""
    labels = torch.arange(len(x)) % 10
    with switched(mode):
        F.cross_entropy(model(x), labels).backward()
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)


def call(kind: str, model: torch.nn.Module, x: torch.Tensor, mode: str) -> Callable[[], None]:
    model.train(kind == "step")
    if kind == "forward":
        return partial(forward, model, x, mode)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    return partial(step, model, optimiser, x, mode)


def compared(kind: str, network: str, batch: int, threads: int, seconds: float) -> list[dict]:
    """Rows: timm's, and ours with each kind of product."""
    ours, theirs, side = NETWORKS[network]
    x = torch.randn(batch, 3, side, side)
    mine, other = xp.create_model(ours), timm.create_model(theirs)
    macs = {"timm": count_macs(other, (3, side, side))}
    macs |= dict.fromkeys(("crosspatch off", "crosspatch on"), count_macs(mine, (3, side, side)))
    calls = {
        "timm": call(kind, other, x, "off"),
        "crosspatch off": call(kind, mine, x, "off"),
        "crosspatch on": call(kind, mine, x, "on"),
    }
    top = peaks(threads)["fp32"]
    times = alternate(calls | {"peak": top.product.call}, seconds=seconds, least=7, settle=0)
    rate = top.product.operations / times["peak"].median
    return [
        {
            "what": kind,
            "network": network,
            "batch": batch,
            "threads": threads,
            "who": name,
            **milliseconds(times[name]),
            "times_timm": round(ratio(times["timm"], times[name]).median, 3),
            "gmacs": round(macs[name] / 1e9, 3),
            "peak_gflops": round(rate / 1e9, 1),
            "share_of_peak": round(
                2 * PASSES[kind] * batch * macs[name] / times[name].median / rate, 3
            ),
            "turns": times[name].count,
            **facts("torch", "timm"),
        }
        for name in calls
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--kinds", nargs="+", choices=PASSES, default=list(PASSES))
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--out", type=Path, default=RESULTS / "forward.csv")
    asked = parser.parse_args()
    work = [("forward", name, batch) for name in asked.networks for batch in (1, 8)]
    work += [("step", name, 8) for name in STEPPED if name in asked.networks]
    for threads in asked.threads:
        torch.set_num_threads(threads)
        for kind, network, batch in work:
            if kind not in asked.kinds:
                continue
            rows = compared(kind, network, batch, threads, asked.seconds)
            append(asked.out, rows)
            for row in rows:
                print(*list(row.values())[:13], flush=True)


if __name__ == "__main__":
    main()
