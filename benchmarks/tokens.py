"""Reduced networks beside what they were, beside timm's, and beside the patch that everyone knows.

    python benchmarks/tokens.py [--threads 1 2] [--batches 1 8] [--networks deit_small …]
                                [--seconds 40] [--linear auto|on|off] [--out FILE]

One process, turns in alternation, eager float32 on the CPU, random weights: timm's network, ours,
ours with each reduction, and a patch of timm's network written here from its description (ToMe,
arXiv 2210.09461: every block's forward is replaced by one that computes the attention map itself,
matches the keys, and merges by scattering, with r = 13). For timm's CrossViT there is no such
patch: it has no class token of its own and its blocks lie inside of encoders. `untouched` is ours
with a reduction that asks for nothing, which shows what the machinery costs.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any

import crosspatch._torchvision

import timm
import torch

import crosspatch as xp
from crosspatch.layers.linear import switched, use
from crosspatch.metrics.latency import alternate, ratio
from crosspatch.metrics.macs import count_macs
from hardware import RESULTS, append, facts, milliseconds

NETWORKS = {  # ours, timm's, side
    "deit_small": ("deit_small_patch16_224", "deit_small_patch16_224", 224),
    "crossvit_small": ("crossvit_small_224", "crossvit_small_240", 240),
    "crossvit_9": ("crossvit_9_224", "crossvit_9_240", 240),
}
REDUCTIONS = {
    "untouched": ("tome", {"r": 0}),
    "tome r=13": ("tome", {"r": 13}),
    "mctf r=16": ("mctf", {"r": 16}),
    "mctf": ("mctf", {}),
    "evovit": ("evovit", {}),
    "stvit": ("stvit", {}),
    "psvit": ("psvit", {}),
}
PATCHED = "timm, patched r=13"


def patched(model: Any, r: int) -> Any:
    """timm's ViT with the published patch: merging between attention and MLP of every block."""
    sizes: dict[str, torch.Tensor | None] = {"now": None}

    def begin(module: Any, inputs: Any) -> None:
        sizes["now"] = None

    model.register_forward_pre_hook(begin)
    for block in model.blocks:
        block.forward = MethodType(partial(_patched_block, sizes=sizes, r=r), block)
    return model


def _patched_block(block: Any, x: torch.Tensor, sizes: dict, r: int) -> torch.Tensor:
    attn, (b, n, c) = block.attn, x.shape
    heads = attn.num_heads
    q, k, v = attn.qkv(block.norm1(x)).reshape(b, n, 3, heads, c // heads).permute(2, 0, 3, 1, 4)
    logits = (q * attn.scale) @ k.transpose(-2, -1)
    if sizes["now"] is not None:
        logits = logits + sizes["now"].log()[:, None, None, :, 0]
    y = (logits.softmax(dim=-1) @ v).transpose(1, 2).reshape(b, n, c)
    x = x + attn.proj(y)
    x = _merged_by_scattering(x, k.mean(dim=1), sizes, min(r, (n - 1) // 2))
    return x + block.mlp(block.norm2(x))


def _merged_by_scattering(x: torch.Tensor, metric: torch.Tensor, sizes: dict, r: int):
    if r <= 0:
        return x
    metric = metric / metric.norm(dim=-1, keepdim=True)
    scores = metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)
    scores[:, 0] = -torch.inf
    best, partner = scores.max(dim=-1)
    ranked = best.argsort(dim=-1, descending=True)
    moved, stays = ranked[:, :r], ranked[:, r:].sort(dim=-1).values
    target = partner.gather(1, moved)
    size = torch.ones_like(x[..., :1]) if sizes["now"] is None else sizes["now"]

    def merge(values: torch.Tensor) -> torch.Tensor:
        a, b = values[:, ::2], values[:, 1::2]
        width = (-1, -1, values.shape[-1])
        source = a.gather(1, moved[..., None].expand(width))
        b = b.scatter_reduce(1, target[..., None].expand(width), source, "sum")
        return torch.cat([a.gather(1, stays[..., None].expand(width)), b], dim=1)

    x, sizes["now"] = merge(x * size), merge(size)
    return x / sizes["now"]


def subjects(network: str, wanted: list[str]) -> dict[str, torch.nn.Module]:
    """Everything that is timed, by name."""
    ours, theirs, side = NETWORKS[network]
    mine = xp.create_model(ours).eval()
    found = {"timm": timm.create_model(theirs).eval(), "crosspatch": mine}
    if network.startswith("deit"):
        found[PATCHED] = patched(timm.create_model(theirs).eval(), 13)
        found[PATCHED].load_state_dict(mine.state_dict())
    found |= {name: xp.reduce(mine, *REDUCTIONS[name][:1], **REDUCTIONS[name][1])[0]
              for name in wanted}  # fmt: skip
    if PATCHED in found and "tome r=13" in found:
        _check(found[PATCHED], found["tome r=13"], side)
    return found


@torch.no_grad()
def _check(theirs: torch.nn.Module, ours: torch.nn.Module, side: int) -> None:
    """The patch written here and our ToMe give the same logits."""
    x = torch.randn(4, 3, side, side)
    error = float((theirs(x) - ours(x)).abs().max() / ours(x).abs().max())
    print(f"greatest difference of the patch's logits from ours: {error:.1e} relative")


def run(model: torch.nn.Module, x: torch.Tensor, mode: str) -> None:
    with switched(mode), torch.inference_mode():
        model(x)


def compared(network: str, batch: int, threads: int, asked: argparse.Namespace) -> list[dict]:
    side = NETWORKS[network][2]
    x = torch.randn(batch, 3, side, side)
    found = subjects(network, asked.reductions)
    mode = "on" if use(asked.linear) else "off"
    calls = {name: partial(run, model, x, "off" if name.startswith("timm") else mode)
             for name, model in found.items()}  # fmt: skip
    times = alternate(calls, seconds=asked.seconds, least=7, settle=0)
    return [
        {
            "network": network,
            "who": name,
            "batch": batch,
            "threads": threads,
            "linear": mode,
            **milliseconds(times[name]),
            "times_unreduced": round(ratio(times["crosspatch"], times[name]).median, 3),
            "times_timm": round(ratio(times["timm"], times[name]).median, 3),
            "gmacs": round(count_macs(model, (3, side, side)) / 1e9, 3),
            "turns": times[name].count,
            **facts("torch", "timm"),
        }
        for name, model in found.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--reductions", nargs="+", choices=REDUCTIONS, default=list(REDUCTIONS))
    parser.add_argument("--linear", choices=("auto", "on", "off"), default="auto")
    parser.add_argument("--seconds", type=float, default=40)
    parser.add_argument("--out", type=Path, default=RESULTS / "tokens.csv")
    asked = parser.parse_args()
    for threads in asked.threads:
        torch.set_num_threads(threads)
        for network in asked.networks:
            for batch in asked.batches:
                rows = compared(network, batch, threads, asked)
                append(asked.out, rows)
                for row in rows:
                    print(*list(row.values())[:11], flush=True)


if __name__ == "__main__":
    main()
