# SPDX-License-Identifier: Apache-2.0
"""What an audit finds, and the commands that mend it, which a shell reads back as they are meant.

A command works where it is typed: paths are those the user gave, quoted. Files to take out stand in
a list beside the page, one path a line, so that the user may strike out what is to stay.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

KINDS = ("folder", "archive", "table", "built in")


class Finding(NamedTuple):
    """level: "good", "warn" (worth a look) or "bad" (needs a hand); kind: a short name that stays;
    title, text: for the reader; command: what mends it, or ""; items: dicts, of a picture {"path",
    "note"}, of several that belong together {"paths", "note"}."""

    level: str
    kind: str
    title: str
    text: str
    command: str
    items: list[dict[str, Any]]


class Place(NamedTuple):
    """Where the data are, for commands. spec: DATA as it was typed; kind: one of KINDS; beside:
    what the names of the page's lists begin with, such as `audit`."""

    spec: str
    kind: str
    beside: Path

    @property
    def data(self) -> str:
        """DATA for a shell, never taken for an option."""
        return quoted(self.spec)

    def path(self, key: str) -> str:
        """A path below DATA for a shell."""
        return quoted(f"{self.spec.rstrip('/')}/{key}")

    def list_of(self, kind: str) -> Path:
        """The list of files that belongs to a kind of finding."""
        return self.beside.with_name(f"{self.beside.name}-{kind}.txt")

    def table_of(self, kind: str) -> Path:
        """A table of pictures that is written beside the page."""
        return self.beside.with_name(f"{self.beside.name}-{kind}.csv")

    def take_out(self, kind: str) -> str:
        """Removes the files in the list of a kind. Of an archive: unpacks it first; of a table:
        trains on a table without them."""
        if self.kind == "folder":
            inside = f"(cd {self.data} && tr '\\n' '\\0' | xargs -0 rm --)"
            return f"{inside} < {quoted(self.list_of(kind))}"
        if self.kind == "table":
            return f"crosspatch train {quoted(self.table_of('kept'))}"
        return self.unpack()

    def unpack(self) -> str:
        """Unpacks an archive, so that its files can be moved, and looks again; "" of others."""
        if self.kind != "archive":
            return ""
        name = Path(self.spec).name
        stem = name[: name.lower().rfind(".tar")] if ".tar" in name.lower() else Path(name).stem
        to = quoted(stem or "unpacked")
        zipped = name.lower().endswith(".zip")
        how = f"unzip -q {self.data} -d {to}" if zipped else f"tar -xf {self.data} -C {to}"
        return f"mkdir {to} && {how} && crosspatch audit {to}"

    def again(self, below: str = "") -> str:
        """Looks again, at a folder below DATA where one is named."""
        where = self.path(below) if below else self.data
        return f"crosspatch audit {where} --overwrite"

    def train(self, *words: str) -> str:
        """Trains on DATA with further options."""
        return f"crosspatch train {self.data} {shlex.join(words)}".rstrip()

    def merge(self, moves: Sequence[tuple[str, str]], taken: Iterable[str]) -> str:
        """Folders below DATA renamed, (from, to) each; where the new name is among `taken`, what is
        in the one goes into the other, and nothing is written over."""
        if self.kind != "folder":
            return self.unpack()
        known, lines = set(taken), []
        for old, new in moves:
            here, there = self.path(old), self.path(new)
            if new in known:
                lines.append(f"mv -n -- {here}/* {there}/ && rmdir -- {here}")
            else:
                lines.append(f"mv -- {here} {there}")
                known.add(new)
        return "\n".join(lines)


def quoted(path: str | Path) -> str:
    """A path as a word of a shell, never taken for an option. What cannot be printed, such as a
    terminal's escape, stands as an octal number: a command is copied from a page."""
    text = str(path)
    text = f"./{text}" if text.startswith("-") else text
    if text.isprintable() or text.endswith("\n"):  # a shell drops line breaks at the end
        return shlex.quote(text)
    return f'"$(printf {shlex.quote("".join(map(_octal, text)))})"'


def _octal(sign: str) -> str:
    """A character of printf's format: itself, or the numbers of its bytes."""
    if sign.isprintable() and sign not in "\\'%":
        return sign
    how = "surrogateescape" if "\udc80" <= sign <= "\udcff" else "surrogatepass"  # as os.fsencode
    return "".join(f"\\{byte:03o}" for byte in sign.encode("utf-8", how))


def of_paths(paths: Iterable[str], note: str = "") -> list[dict[str, Any]]:
    """Items of single pictures."""
    return [{"path": path, "note": note} for path in paths]


def listed(names: Sequence[str], most: int = 5) -> str:
    """The first names, and how many more there are."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more:,} more" if more > 0 else "")


def several(number: int, one: str, many: str = "") -> str:
    """(1, "picture") as "1 picture"; (2, "class", "classes") as "2 classes"."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"
