# SPDX-License-Identifier: Apache-2.0
"""What a search for a smaller, faster network measured, and what it chose: plain data, JSON there
and back. No torch."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from crosspatch.errors import DataError
from crosspatch.metrics.interval import wilson

SCHEMA = 1
FILE = "shrunk.json"


class Speed(NamedTuple):
    """How many times as fast as something else that was measured in the same turns: the median of
    the paired turns and its 95 % interval. Below 1: slower."""

    median: float
    low: float
    high: float


class Took(NamedTuple):
    """One picture at one number of threads.

    median, p90: seconds; turns: how many; base: the same turns' speed beside the run as it is in
    the base engine (`Shrunk.base`), which makes candidates of different turns comparable; original:
    beside the run as it is, in float, in the same engine; float_: beside the same network's float
    in the same engine, None for what is float itself.
    """

    median: float
    p90: float
    turns: int
    base: Speed
    original: Speed
    float_: Speed | None = None


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One candidate: a network, in an engine and a precision.

    kind: the part of the registry it came from (engines, tokens, finetuned …); engine: onnxruntime
    or openvino, "" where it was dropped before it ran in one; precision: fp32, bf16, int8-dynamic
    or int8-static, "" as well; method, options: of a reduction of tokens, else ""; latency: by
    threads, {} where it was dropped; size: bytes of the bundle; macs: multiply-adds of one picture;
    right of pictures: named rightly, of the validation pictures it was shown (fewer than all where
    it was dropped early); drop: share of pictures lost against the run as it is on the same ones
    (positive: worse), low, high: its 95 % interval; note: in words, what should be known; dropped:
    why it was given up early, else ""; inside: within the whole budget; trained: seconds of
    fine-tuning; run: the folder that holds its weights, "" for those of the run itself.
    """

    name: str
    kind: str
    engine: str = ""
    precision: str = ""
    method: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    latency: dict[int, Took] = field(default_factory=dict)
    size: int | None = None
    macs: int = 0
    right: int = 0
    pictures: int = 0
    drop: float = 0.0
    low: float = -1.0
    high: float = 1.0
    note: str = ""
    dropped: str = ""
    inside: bool = False
    on_front: bool = False
    chosen: bool = False
    trained: float = 0.0
    run: str = ""

    @property
    def key(self) -> str:
        """What tells it from all others of the search."""
        return f"{self.name} | {self.engine} {self.precision}".strip()

    @property
    def accuracy(self) -> float:
        """The share that is named rightly; 0 where it was shown nothing."""
        return self.right / self.pictures if self.pictures else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """95 % of the accuracy."""
        return wilson(self.right, self.pictures)

    @property
    def points(self) -> float:
        """The drop in percentage points, positive: worse."""
        return 100 * self.drop

    @property
    def floats(self) -> bool:
        """Whether it computes in fp32."""
        return self.precision == "fp32"

    def best(self, threads: int | None = None) -> tuple[int, Took]:
        """(threads, what it took) at `threads`, or None: where it is fastest. Raises KeyError where
        that was not measured."""
        if threads is not None:
            return threads, self.latency[threads]
        if not self.latency:
            raise KeyError(self.key)
        return min(self.latency.items(), key=lambda one: one[1].median)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """max_drop: points; latency: seconds of one picture, size: bytes, None: any; threads: at which
    latency is meant, None: at what serves a candidate best."""

    max_drop: float = 0.5
    latency: float | None = None
    size: int | None = None
    threads: int | None = None


@dataclass(frozen=True, kw_only=True)
class Shrunk:
    """Everything that a search came to.

    base: key of the candidate that is the run as it is (fp32, the first engine); machine:
    processor, cores, versions; rows: every candidate, in the order they were measured; chosen: its
    key, "" where nothing fits; nearest: the key of what came nearest then; test: {"pictures",
    "original", "chosen" (named rightly), "drop", "low", "high"} on the run's test pictures, {}
    where there were none or nothing was chosen; words: what a person should know, a sentence each;
    left: names of candidates for which there was no time; bundle: the file that was written, "" for
    none.
    """

    run: str
    machine: dict[str, Any]
    budget: Budget
    base: str
    rows: tuple[Measured, ...]
    chosen: str = ""
    nearest: str = ""
    test: dict[str, Any] = field(default_factory=dict)
    words: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    bundle: str = ""
    seconds: float = 0.0

    def row(self, key: str) -> Measured:
        """The candidate of that key. Raises KeyError."""
        for one in self.rows:
            if one.key == key:
                return one
        raise KeyError(key)

    @property
    def winner(self) -> Measured | None:
        """The chosen candidate."""
        return self.row(self.chosen) if self.chosen else None

    @property
    def original(self) -> Measured:
        """The run as it is."""
        return self.row(self.base)

    @property
    def front(self) -> list[Measured]:
        """Those that no other beats in accuracy, latency and size at once, the fastest first."""
        found = [one for one in self.rows if one.on_front]
        return sorted(found, key=lambda one: one.best(self.budget.threads)[1].median)

    def to_json(self) -> dict[str, Any]:
        """Plain values; the inverse of `from_json`."""
        plain = dataclasses.asdict(self) | {"schema": SCHEMA}
        plain["rows"] = [row_to_json(one) for one in self.rows]
        return plain

    @classmethod
    def from_json(cls, given: dict[str, Any]) -> Shrunk:
        """Raises DataError for what `to_json` did not write."""
        try:
            values = dict(given)
            if values.pop("schema") != SCHEMA:
                raise ValueError("another schema")
            values["budget"] = Budget(**values["budget"])
            values["rows"] = tuple(row_from_json(one) for one in values["rows"])
            return cls(**values)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(
                f"the figures of a search make no sense ({error})",
                f"what crosspatch shrink wrote, of schema {SCHEMA}",
                "run crosspatch shrink again",
            ) from error


def row_to_json(one: Measured) -> dict[str, Any]:
    """A candidate as plain values: threads become names, named tuples objects."""
    plain = {f.name: getattr(one, f.name) for f in dataclasses.fields(one)}
    plain["latency"] = {str(threads): _took(took) for threads, took in one.latency.items()}
    return plain


def _took(took: Took) -> dict[str, Any]:
    speeds = {name: getattr(took, name) for name in ("base", "original", "float_")}
    found = {name: None if one is None else one._asdict() for name, one in speeds.items()}
    return took._asdict() | found


def row_from_json(given: dict[str, Any]) -> Measured:
    """The inverse of `row_to_json`. Raises KeyError, TypeError and ValueError for anything else."""
    values = dict(given)
    values["latency"] = {int(n): _took_from(one) for n, one in values["latency"].items()}
    return Measured(**values)


def _took_from(given: dict[str, Any]) -> Took:
    values = dict(given)
    for name in ("base", "original", "float_"):
        if values[name] is not None or name != "float_":
            values[name] = Speed(**values[name])
    return Took(**values)


def dumps(shrunk: Shrunk) -> str:
    """The content of `shrunk.json`."""
    return json.dumps(shrunk.to_json(), indent=1, allow_nan=False) + "\n"
