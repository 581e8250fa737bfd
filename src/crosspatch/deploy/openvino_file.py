# SPDX-License-Identifier: Apache-2.0
"""OpenVINO's pair of files as data: what may stand in the .xml, before OpenVINO sees it.

The .xml holds the graph, the .bin its constants. What is refused: document types and entities
(bombs, and files from elsewhere), tags that no bundle has (bodies of loops and branches among
them), layers of other types or of extensions, constants that do not lie in the .bin or are not as
large as their shape says, layers in a circle, weights that are no numbers. This module does not
import torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from xml.parsers import expat

import numpy as np

from crosspatch.data import jsons
from crosspatch.deploy.limits import LAYERS, Refused, read_whole

LARGEST = 128 << 20  # bytes of the .xml: 20 MB in a network of 12,000 layers
ELEMENTS = 4_000_000
DEEPEST = 16
LONGEST = 8 << 20  # letters of an attribute: the description of a bundle is one
BYTES = {"f64": 8, "f32": 4, "f16": 2, "bf16": 2, "i64": 8, "i32": 4, "i16": 2, "i8": 1, "u64": 8,
         "u32": 4, "u16": 2, "u8": 1, "boolean": 1}  # fmt: skip
FLOATS = {"f64": np.float64, "f32": np.float32, "f16": np.float16}
INSIDE = {
    "": {"net"},
    "net": {"layers", "edges", "rt_info", "meta_data"},
    "layers": {"layer"},
    "layer": {"data", "input", "output", "rt_info"},
    "input": {"port"},
    "output": {"port"},
    "port": {"dim", "rt_info"},
    "edges": {"edge"},
}
"""What may stand in a tag; in those of notes (rt_info, meta_data) anything may."""
NOTES = ("rt_info", "meta_data")
VERSION = re.compile(r"opset\d{1,2}")


class _Reader:
    """Takes an .xml apart: `layers` by id with their constants, `edges`, and `notes`: the values
    that stand directly in the graph's rt_info."""

    def __init__(self) -> None:
        self.path: list[str] = []
        self.elements = 0
        self.layers: dict[str, str] = {}
        self.constants: list[tuple[str, dict[str, str]]] = []
        self.edges: list[tuple[str, str]] = []
        self.notes: dict[str, str] = {}
        self.parser = expat.ParserCreate()
        self.parser.StartElementHandler = self.start
        self.parser.EndElementHandler = lambda name: self.path.pop()
        self.parser.StartDoctypeDeclHandler = self.doctype
        self.parser.EntityDeclHandler = self.doctype
        self.parser.ProcessingInstructionHandler = self.doctype

    def doctype(self, *given: Any) -> None:
        raise Refused("it declares entities or a document type, which no bundle does")

    def start(self, name: str, given: dict[str, str]) -> None:
        """One element with its attributes."""
        self.elements += 1
        if self.elements > ELEMENTS or len(self.path) > DEEPEST:
            raise Refused("it has too many elements, or they are nested too deeply")
        if any(len(value) > LONGEST for value in given.values()):
            raise Refused("it holds a text that is longer than 8 MB")
        above = self.path[-1] if self.path else ""
        noted = any(one in NOTES for one in self.path)
        if not noted and name not in INSIDE.get(above, ()):
            raise Refused(f"it has {jsons.shown(name)} in {jsons.shown(above or 'its root')}")
        if self.path == ["net", "rt_info"] and "value" in given:
            if name in self.notes and name != "info":
                raise Refused("its notes say the same thing twice")
            self.notes[name] = given["value"]
        elif not noted:
            self.graph(name, given)
        self.path.append(name)

    def graph(self, name: str, given: dict[str, str]) -> None:
        """What belongs to the graph itself."""
        if name == "layer":
            kind, version = given.get("type", ""), given.get("version", "")
            if kind not in LAYERS or not VERSION.fullmatch(version):
                told = jsons.shown(f"{version}.{kind}")
                raise Refused(f"it asks for the layer {told}, which no bundle needs")
            number = given.get("id", "")
            if number in self.layers:
                raise Refused(f"two layers have the number {jsons.shown(number)}")
            self.layers[number] = kind
            self.last = given
        elif name == "data" and self.last.get("type") == "Const":
            self.constants.append((self.last.get("name", ""), given))
        elif name == "edge":
            self.edges.append((given.get("from-layer", ""), given.get("to-layer", "")))


def openvino_notes(path: Path, weights: Path) -> dict[str, str]:
    """What the notes (rt_info) of an .xml say, by name, where it may be run with `weights`, its
    .bin. Raises Refused with the reason for any other pair of files."""
    reader = _Reader()
    try:
        reader.parser.Parse(read_whole(path, LARGEST), True)
    except (expat.ExpatError, ValueError, LookupError) as error:
        if isinstance(error, Refused):
            raise
        raise Refused(f"it cannot be read as XML: {error}") from error
    _require_order(reader)
    with _opened(weights) as stored:
        for name, given in reader.constants:
            _require_constant(jsons.shown(name), given, stored)
    return reader.notes


@contextmanager
def _opened(path: Path) -> Iterator[np.ndarray]:
    """The bytes of a file, as they lie on the disk."""
    try:
        if not path.is_file():
            raise Refused(f"{path.name} is no regular file")
        yield np.memmap(path, np.uint8, "r") if path.stat().st_size else np.empty(0, np.uint8)
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        raise Refused(f"{path.name} cannot be read: {why}") from error


def _require_constant(name: str, given: dict[str, str], stored: np.ndarray) -> None:
    """Raises Refused unless a constant lies in the .bin as it is said to, and holds numbers."""
    kind = given.get("element_type", "")
    if kind not in BYTES:
        raise Refused(f"the constant {name} has the type {jsons.shown(kind)}")
    shape = [_number(name, one) for one in given.get("shape", "").split(",") if one.strip()]
    begin, size = (_number(name, given.get(key, "")) for key in ("offset", "size"))
    if size != math.prod(shape) * BYTES[kind]:
        raise Refused(f"the constant {name} takes {size:,} bytes, its shape does not")
    if begin + size > len(stored):
        raise Refused(f"the constant {name} lies beyond the end of the .bin")
    if kind in FLOATS:
        values = np.frombuffer(stored[begin : begin + size].tobytes(), FLOATS[kind])
        if np.isnan(values).any() or (values.size > 1 and not np.isfinite(values).all()):
            raise Refused(f"the constant {name} holds values that are not finite")


def _number(name: str, text: str) -> int:
    text = text.strip()
    if not re.fullmatch(r"\d{1,15}", text, re.ASCII):
        raise Refused(f"the constant {name} has {jsons.shown(text)} for a number")
    return int(text)


def _require_order(reader: _Reader) -> None:
    """Raises Refused where the graph runs in a circle, or its edges lead nowhere."""
    after: dict[str, list[str]] = {number: [] for number in reader.layers}
    waits = dict.fromkeys(reader.layers, 0)
    for begin, end in reader.edges:
        if begin not in waits or end not in waits:
            raise Refused("its edges name layers that are not there")
        after[begin].append(end)
        waits[end] += 1
    ready, done = [number for number, count in waits.items() if not count], 0
    while ready:
        done += 1
        for number in after[ready.pop()]:
            waits[number] -= 1
            if not waits[number]:
                ready.append(number)
    if done < len(waits):
        raise Refused("its layers run in a circle")
