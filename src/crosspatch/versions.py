# SPDX-License-Identifier: Apache-2.0
"""Which versions of other packages are installed, beside figures and in the files we write."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version


def installed(names: Iterable[str]) -> dict[str, str | None]:
    """The version of each package, None for one that is not installed. Nothing is imported."""
    return {name: _version(name) for name in names}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
