# SPDX-License-Identifier: Apache-2.0
"""What is known of the bundles that a run's folder holds, kept in its report.json: {name of the
file: {to, precision, size, sha256, weights, difference, seen, …, verified}}.

A run that trains on writes its report anew, and with it forgets bundles of the older weights.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from crosspatch.deploy.export import Exported
from crosspatch.processor import processor
from crosspatch.report.page import write_page
from crosspatch.training.run import RunFolder

VERIFIED = ("pictures", "same_weights", "ok", "torch_milliseconds", "latency_threads")
ENGINE = (
    "engine", "precision", "agreed", "difference", "check", "milliseconds", "faster", "ok"
)  # fmt: skip


def note_machine(run: Path) -> bool:
    """Remember the processor that a run was trained on, which is this machine's."""
    keep(RunFolder(run).report_path, "processor", processor().describe())
    return True


def keep(path: Path, name: str, value: Any) -> dict[str, Any]:
    """Put one more value into a report.json, whole or not at all; returns the report. Others may do
    the same at this moment: each writes a whole file."""
    report = json.loads(path.read_text(encoding="utf-8")) | {name: value}
    text = json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False)
    write_page(path, text + "\n")
    return report


def note_export(run: Path, exported: Exported, to: str) -> bool:
    """Remember an export; False where the run's folder does not hold it, or has no report."""
    info = exported.info
    found = {
        "to": to,
        "precision": info.precision,
        "size": exported.size,
        "sha256": digest(exported.path),
        "weights": info.weights,
        "difference": exported.difference,
        "versions": dict(info.versions),
    }
    return _note(run, exported.path, found)


def note_verify(run: Path, bundle: Path, summary: dict[str, Any]) -> bool:
    """Remember what `deploy.verify.summary` says of a bundle; as `note_export`."""
    verified = {key: summary[key] for key in VERIFIED}
    verified["engines"] = [{key: one[key] for key in ENGINE} for one in summary["engines"]]
    verified["hardware"] = processor().describe()
    found = {key: summary[key] for key in ("precision", "size", "sha256", "weights")}
    return _note(run, bundle, found | {"to": summary["format"], "verified": verified})


def digest(path: Path) -> str:
    """sha256 of a bundle's files, as `deploy.bundle.read_bundle` gives it."""
    found = hashlib.sha256()
    for file in (path, path.with_suffix(".bin")) if path.suffix == ".xml" else (path,):
        with file.open("rb") as stream:
            for part in iter(lambda: stream.read(1 << 20), b""):
                found.update(part)
    return found.hexdigest()


def _note(run: Path, bundle: Path, found: dict[str, Any]) -> bool:
    folder = RunFolder(run.parent if run.name == "model" else run)
    if bundle.resolve().parent != folder.path.resolve() or not folder.report_path.is_file():
        return False
    report = json.loads(folder.report_path.read_text(encoding="utf-8"))
    bundles = report.get("bundles") or {}
    before = bundles.get(bundle.name, {})
    same = before.get("sha256") == found["sha256"]
    known = bundles | {bundle.name: (before if same else {}) | found}
    keep(folder.report_path, "bundles", known)
    return True
