# SPDX-License-Identifier: Apache-2.0
"""What was measured on this machine and need not be measured again: small JSON files of answers.

They lie in `$CROSSPATCH_CACHE`, else in `crosspatch` under `$XDG_CACHE_HOME` or `~/.cache`, and may
be deleted at any time. A file that is damaged or cannot be written costs a measurement, never an
error.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

MOST = 500  # answers kept in a file, the newest


def folder() -> Path:
    """Where the files lie; it need not exist."""
    given = os.environ.get("CROSSPATCH_CACHE")
    if given:
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "crosspatch"


def remembered(
    file: str, key: str, make: Callable[[], Any], fits: Callable[[Any], bool] = lambda _: True
) -> Any:
    """The answer kept in `file` under `key`, if it `fits`, else what `make` gives now (plain JSON),
    kept."""
    path = folder() / file
    answers = _read(path)
    if key in answers and fits(answers[key]):
        return answers[key]
    answer = make()
    kept = {**_read(path), key: answer}  # another process may have written meanwhile
    _write(path, dict(list(kept.items())[-MOST:]))
    return answer


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(path: Path, answers: dict[str, Any]) -> None:
    draft = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, draft = tempfile.mkstemp(dir=path.parent, prefix=".writing-")
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            json.dump(answers, stream, indent=1)
        os.replace(draft, path)
    except OSError:
        if draft is not None and os.path.exists(draft):
            os.unlink(draft)
