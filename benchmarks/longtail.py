"""What each way to train on uneven classes does to frequent and rare ones: DATA@lt:RATIO.

python benchmarks/longtail.py digits@lt:50 --epochs 60 --size 16 --batch 32 --csv out.csv
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from crosspatch.training.session import train_run
from hardware import append, facts

WAYS = {
    "plain": {"balance": "none"},
    "weights": {"balance": "weights"},
    "effective": {"balance": "effective"},
    "drw": {"balance": "drw"},
    "sampler": {"balance": "sampler"},
    "ldam": {"objective": "ldam"},
    "ldam, s = 30": {"objective": "ldam:scale=30"},
    "logit-adjust": {"objective": "logit-adjust"},
    "drw + sam": {"balance": "drw", "sam": 0.05},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data")
    parser.add_argument("--model", default="vit_micro_32")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--size", type=int, default=16)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", choices=WAYS, default=list(WAYS))
    parser.add_argument("--csv", type=Path)
    asked = parser.parse_args()
    shape = {key: getattr(asked, key) for key in ("model", "epochs", "size", "batch", "seed")}
    rows = []
    for name in asked.only:
        with tempfile.TemporaryDirectory() as folder:
            given = {**shape, "threads": 1, "precision": "fp32", **WAYS[name]}
            found = train_run(asked.data, Path(folder) / "run", given)
        test = found["test"]
        row = {"way": name, "data": asked.data, **shape, "accuracy": round(test["accuracy"], 4)}
        for group in test.get("groups", ()):
            keys = ("accuracy", "low", "high")
            row |= {f"{group['name']}_{key}": round(group[key], 4) for key in keys}
        rows.append({**row, "seconds": found["seconds"], **facts("torch", "timm")})
        print(rows[-1], flush=True)
    if asked.csv:
        append(asked.csv, rows)


if __name__ == "__main__":
    main()
