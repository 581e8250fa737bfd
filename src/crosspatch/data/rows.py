# SPDX-License-Identifier: Apache-2.0
"""The rows of a table file, whatever its dialect: CSV, TSV, JSON, JSON lines or Parquet.

Text is UTF-8, UTF-16 where it begins with that mark, else Windows-1252, which is said. What a
column means, `tables` decides.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from crosspatch.errors import DataError, UsageError

_MARKS = ((b"\xef\xbb\xbf", "utf-8-sig"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"))


class Row(NamedTuple):
    """One row: where it stands in the table ("line 7"), and its values by column name."""

    place: str
    values: dict[str, Any]


def read_rows(path: Path, data: bytes | None = None) -> tuple[list[str], list[Row], list[str]]:
    """(column names, rows, remarks) of a table by the ending of its name; `data`: its bytes where
    it is no file of its own. Raises DataError where it cannot be read, UsageError where pyarrow is
    needed for it and missing."""
    ending = path.suffix.lower()
    data = path.read_bytes() if data is None else data
    if ending == ".parquet":
        names, rows = _parquet(path, data)
        return names, rows, []
    text, remarks = _text(path, data)
    if ending in (".jsonl", ".json"):
        names, rows = _objects(path, text)
    else:
        names, rows = _separated(path, text, "\t" if ending == ".tsv" else None)
    return names, rows, remarks


def _text(path: Path, data: bytes) -> tuple[str, list[str]]:
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), "utf-8")
    try:
        text, remarks = data.decode(encoding), []
    except UnicodeDecodeError as problem:
        if encoding != "utf-8":
            raise _broken(path, f"it is no {encoding}") from problem
        text = data.decode("cp1252", "replace")
        remarks = ["The table is not UTF-8: it was read as Windows-1252."]
    if "\0" in text:
        raise _broken(path, "it holds zero bytes")
    return text, remarks


def _separated(path: Path, text: str, separator: str | None) -> tuple[list[str], list[Row]]:
    separator = separator or max(",;\t", key=text.lstrip("\r\n").split("\n", 1)[0].count)
    reader = csv.reader(
        io.StringIO(text, newline=""), delimiter=separator, strict=True, skipinitialspace=True
    )
    rows: list[Row] = []
    names: list[str] = []
    try:
        for line in reader:
            if not any(value.strip() for value in line):
                continue
            if not names:
                names = _header(path, line)
            elif len(line) != len(names):
                what = f"line {reader.line_num} has {len(line)} values for {len(names)} columns"
                raise _broken(path, what)
            else:
                rows.append(Row(f"line {reader.line_num}", dict(zip(names, line, strict=True))))
    except csv.Error as problem:
        raise _broken(path, f"line {reader.line_num}: {problem}") from problem
    return names, rows


def _header(path: Path, line: list[str]) -> list[str]:
    names = [name.strip() for name in line]
    twice = [name for name, count in Counter(names).items() if name and count > 1]
    if twice:
        raise _broken(path, f"two columns are called {twice[0]!r}")
    return names


def _objects(path: Path, text: str) -> tuple[list[str], list[Row]]:
    rows = []
    for place, value in _values(path, text):
        if not isinstance(value, dict):
            raise _broken(path, f"{place} is no JSON object")
        rows.append(Row(place, value))
    return list(dict.fromkeys(name for row in rows for name in row.values)), rows


def _values(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    """The JSON values of a text and where each stands: a list's entries, or one on every line."""
    if text.lstrip().startswith("["):
        whole = _json(path, text, "it")
        yield from ((f"entry {number}", value) for number, value in enumerate(whole, 1))
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"line {number}", _json(path, line, f"line {number}")


def _json(path: Path, text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as problem:
        raise _broken(path, f"{place} is no JSON") from problem


def _parquet(path: Path, data: bytes) -> tuple[list[str], list[Row]]:
    try:
        from pyarrow import (  # pyright: ignore[reportMissingImports]
            ArrowException,
            BufferReader,
            parquet,
        )
    except ImportError as problem:
        raise UsageError(
            f"{path} is a Parquet table, and pyarrow is not installed",
            "Parquet is read by pyarrow; .csv and .jsonl need nothing",
            "pip install 'crosspatch[tables]'",
        ) from problem
    try:
        rows = parquet.ParquetFile(BufferReader(data)).read().to_pylist()
    except (ArrowException, OSError, ValueError) as problem:
        raise _broken(path, " ".join(str(problem).split())[:200]) from problem
    names = list(dict.fromkeys(name for row in rows for name in row))
    return names, [Row(f"row {number}", row) for number, row in enumerate(rows, 1)]


def _broken(path: Path, how: str) -> DataError:
    return DataError(
        f"cannot read the table {path}: {how}",
        "A table is CSV with a line of column names, JSON objects one a line, or Parquet",
        "Correct the table, or save it again as UTF-8 CSV",
    )
