# SPDX-License-Identifier: Apache-2.0
"""What of a set of tensors goes into a model with other classes or another size: the body as it is,
position tables resized, heads row by row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from crosspatch.errors import DataError
from crosspatch.layers.position import Table, resize_tables
from crosspatch.models.registry import adapted, classifiers, misfits

SHOWN = 3  # entries named of each kind of trouble


def head_entries(model: nn.Module) -> list[str]:
    """Names in the state dict of what the classifiers hold, weights before biases."""
    heads, state = classifiers(model), model.state_dict()
    named = [f"{head}.{kind}" for kind in ("weight", "bias") for head in heads]
    return [name for name in named if name in state]


def fill(
    model: nn.Module,
    state: Mapping[str, Tensor],
    *,
    where: str,
    rows: Sequence[int] | None = None,
    tables: Mapping[str, Table] | None = None,
) -> int | None:
    """Load `state` into `model`, whose classes may be others; returns the classes that its head
    has, None without one.

    rows: for each class of the model the row of the state's head that is taken, -1 for none: every
    head keeps its own fresh rows there (all of them where `rows` is empty). None: the state's head
    if it has as many classes, else none of it. tables: of the model that the state is of, where
    that is known (`position_tables`). where: what the state is called in errors. Raises DataError
    naming entries that are missing, unexpected, misshapen or not finite; the model is then
    unchanged.
    """
    own = model.state_dict()
    if tables is None or not hasattr(model, "position_tables"):
        given = adapted(model, state)
    else:
        given = resize_tables(state, model.position_tables(), tables)
    heads, classes = head_entries(model), None
    for name in heads:
        theirs = given.get(name)
        classes = classes if theirs is None else len(theirs)
        given[name] = _head(own[name], theirs, rows)
    found = misfits(model, given)
    if found:
        raise DataError(
            f"the weights of {where} do not fit {type(model).__name__}; {_told(found)}",
            "the tensors of the same architecture, all finite",
            "name the model that they belong to with --model, or take others",
        )
    model.load_state_dict(given, strict=True)
    return classes


def _head(mine: Tensor, theirs: Tensor | None, rows: Sequence[int] | None) -> Tensor:
    """One head's weight or bias: `mine`, with what is taken of `theirs`."""
    if theirs is None:
        return mine
    if rows is None:
        return theirs if theirs.shape == mine.shape else mine
    mixed = mine.clone()
    for place, row in enumerate(rows):
        if row >= 0:
            mixed[place] = theirs[row]
    return mixed


def _told(found: Mapping[str, list[str]]) -> str:
    """The first entries of every kind of trouble, and how many more there are."""
    said = []
    for kind, names in found.items():
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        said.append(f"{kind}: {', '.join(names[:SHOWN])}{more}")
    return "; ".join(said)
