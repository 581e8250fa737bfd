"""Engines and precisions at batch 1 and 8, beside what a user of timm would export.

    python benchmarks/engines.py [--threads 1 2] [--seconds 25] [--out FILE]

"naive" is timm's model of the same network through torch.onnx.export as it stands: normalised
floats in, logits out, its bicubic resize a Resize node. Ours takes uint8 and gives probabilities,
so normalisation and softmax are inside our times and not inside the naive ones.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import crosspatch._torchvision  # noqa: F401

import numpy as np
import onnxruntime
import timm
import torch
from forward import NETWORKS

from crosspatch.deploy.bundle import Bundle, check_pictures
from crosspatch.deploy.engines import available, open_engine, precision_of
from crosspatch.deploy.peak import peaks
from crosspatch.deploy.subject import ORDER, prepare
from crosspatch.layers.linear import switched
from crosspatch.metrics.latency import alternate, ratio
from hardware import RESULTS, append, facts, milliseconds


def naive(model: torch.nn.Module, side: int, path: Path) -> Path:
    """timm's network as the exporter makes it, for batches of any size."""
    example = torch.randn(2, 3, side, side)
    shapes = {"x": {0: torch.export.Dim("batch")}}
    program = torch.onnx.export(
        model.eval(), (example,), dynamo=True, dynamic_shapes=shapes, verbose=False
    )
    program.save(path, external_data=False)
    return path


def session(path: Path, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def eager(model: torch.nn.Module, x: torch.Tensor) -> None:
    with switched("off"), torch.inference_mode():
        model(x)


def calls_of(
    theirs: torch.nn.Module, plain: Path, bundles: list[Bundle], batch: int, threads: int, side: int
) -> dict[str, Callable[[], object]]:
    x = torch.randn(batch, 3, side, side)
    floats = session(plain, threads)
    given = {floats.get_inputs()[0].name: x.numpy()}
    calls: dict[str, Callable[[], object]] = {
        "timm torch fp32": partial(eager, theirs.eval(), x),
        "timm naive onnxruntime fp32": partial(floats.run, None, given),
    }
    pictures = np.ascontiguousarray(check_pictures((side, side), batch))
    for bundle in bundles:
        for engine, precision in available(bundle):
            opened = open_engine(bundle, engine, precision, threads)
            calls[f"crosspatch {engine} {precision}"] = partial(opened.run, pictures)
    return calls


def compared(
    network: str, plain: Path, bundles: list[Bundle], batch: int, threads: int, seconds: float
) -> list[dict]:
    _, name, side = NETWORKS[network]
    theirs = timm.create_model(name)
    top = peaks(threads)["fp32"]
    calls = calls_of(theirs, plain, bundles, batch, threads, side)
    times = alternate(calls | {"peak": top.product.call}, seconds=seconds, least=7)
    rate = top.product.operations / times["peak"].median
    macs = bundles[0].info.macs
    sizes = {precision_of(one.info): one.size for one in bundles}
    return [
        {
            "network": network,
            "batch": batch,
            "threads": threads,
            "who": who,
            **milliseconds(times[who]),
            "times_timm_torch": round(ratio(times["timm torch fp32"], times[who]).median, 3),
            "times_timm_naive": round(
                ratio(times["timm naive onnxruntime fp32"], times[who]).median, 3
            ),
            "fp32_peak_gflops": round(rate / 1e9, 1),
            "share_of_fp32_peak": round(2 * batch * macs / times[who].median / rate, 3),
            "megabytes": round(sizes.get(who.split()[-1], plain.stat().st_size) / 1e6, 1),
            "turns": times[who].count,
            **facts("torch", "timm", "onnxruntime", "openvino"),
        }
        for who in calls
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument(
        "--networks",
        nargs="+",
        choices=NETWORKS,
        default=["crossvit_tiny", "crossvit_small", "deit_small"],
    )
    parser.add_argument("--seconds", type=float, default=25)
    parser.add_argument("--out", type=Path, default=RESULTS / "engines.csv")
    asked = parser.parse_args()
    for network in asked.networks:
        ours, theirs, side = NETWORKS[network]
        with tempfile.TemporaryDirectory() as place:
            plain = naive(timm.create_model(theirs), side, Path(place) / "naive.onnx")
            subject = prepare(ours, Path(place) / "ours.onnx", ORDER, [])
            bundles = list(subject.bundles)
            for threads in asked.threads:
                torch.set_num_threads(threads)
                for batch in asked.batches:
                    rows = compared(network, plain, bundles, batch, threads, asked.seconds)
                    append(asked.out, rows)
                    for row in rows:
                        print(*list(row.values())[:13], flush=True)


if __name__ == "__main__":
    main()
