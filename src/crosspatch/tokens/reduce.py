# SPDX-License-Identifier: Apache-2.0
"""`xp.reduce`: a model with fewer tokens in it, and what that saves, block by block.

A reduction is a transform: {"kind": "reduce", "method": slug, "options": {…}}. It stands in
`model.transforms` and in config.json, and `replay` makes it again.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import re
import reprlib
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from crosspatch.errors import CrosspatchError, DataError, UsageError, near
from crosspatch.layers.block import lenders, run_blocks
from crosspatch.layers.reducer import Reducer
from crosspatch.layers.tokens import TokenState
from crosspatch.metrics.macs import count_macs, counted
from crosspatch.tokens.host import (
    attach,
    branch_names,
    check_shared,
    converted,
    hosts_of,
    reducers_of,
)
from crosspatch.tokens.spec import METHODS, require_plain, spell
from crosspatch.tokens.walk import walk


class BlockCost(NamedTuple):
    """One block: of which branch ("" where there is one), its number there, the tokens that enter
    and leave it, and its multiply-adds for one picture."""

    branch: str
    block: int
    entering: int
    leaving: int
    macs: int


class Reduction(NamedTuple):
    """What a reduction is and saves. base, macs: multiply-adds of one picture before and after, in
    evaluation; blocks: every block of the reduced model."""

    method: str
    options: dict[str, Any]
    base: int
    macs: int
    blocks: tuple[BlockCost, ...]

    @property
    def saved(self) -> float:
        """The share of the multiply-adds that is gone."""
        return 1 - self.macs / self.base

    def __str__(self) -> str:
        lines = [f"{self.method}: {self.base / 1e9:.3f} to {self.macs / 1e9:.3f} GMACs "
                 f"({-100 * self.saved:+.1f} %)"]  # fmt: skip
        for one in self.blocks:
            where = f"{one.branch} " if one.branch else ""
            change = f"{one.entering} -> {one.leaving}" if one.leaving != one.entering else ""
            lines.append(
                f"  {where}block {one.block:2}  {change or one.entering!s:12}  "
                f"{one.macs / 1e6:8.1f} M"
            )
        return "\n".join(lines)


def reduce(model: nn.Module, method: str, **options: Any) -> tuple[nn.Module, Reduction]:
    """A copy of `model` with `method` in it, and what that saves; `model` is untouched.

    options: those of the method (`tokens/<method>.py`). On a CrossViT they hold for every branch;
    `fine={…}` or `coarse={…}` overrides them for one, `fine=None` leaves it as it is.
    Raises UsageError for an unknown method or option, a schedule that the model cannot have, a
    model that cannot be reduced or has been already, and what the method needs and the model lacks.
    """
    ours = _copy(model)
    base = _macs(ours)
    put(ours, method, options)
    return ours, Reduction(method, options, base, *_costs(ours))


def replay(model: nn.Module, transform: Mapping[str, Any]) -> None:
    """Do to `model` what a stored transform says. Raises DataError where it cannot be done."""
    given: Any = transform if isinstance(transform, Mapping) else {}
    method, options = given.get("method"), given.get("options", {})
    if given.get("kind") != "reduce" or not isinstance(method, str):
        shown = reprlib.repr(transform)
        raise DataError(f"the transform {shown}", "a reduction of tokens", "use a newer version")
    if not isinstance(options, dict) or not all(isinstance(key, str) for key in options):
        raise DataError(f"options {reprlib.repr(options)}", "names with values", "train again")
    try:
        put(model, method[:100], options)
    except CrosspatchError as error:
        raise DataError(error.got, error.expected, error.do) from error
    except Exception as error:  # a stranger's options: whatever they break is the file's fault
        raise DataError(
            f"the reduction {method[:100]} of {reprlib.repr(options)} cannot be made ({error})"[
                :400
            ],
            f"options that {method[:100]} can have on this model",
            "train again, or use a newer version",
        ) from error


def _copy(model: nn.Module) -> Any:
    ours = converted(model)
    hosts_of(ours)
    return copy.deepcopy(ours) if ours is model else ours


def put(model: Any, method: str, options: dict[str, Any]) -> None:
    """Put `method` on `model` itself and note it in `model.transforms`. Raises as `reduce` does."""
    hosts = hosts_of(model)
    if any(r is not None for r in reducers_of(model)):
        raise UsageError(
            "a model that is reduced already", "one without a reduction", "reduce the original"
        )
    require_plain(options)
    made = [
        None if mine is None else _built(method, host, mine)
        for host, mine in zip(hosts, _by_branch(model, method, options), strict=True)
    ]
    attach(model, made)
    done = {"kind": "reduce", "method": method, "options": options}
    model.transforms = (*getattr(model, "transforms", ()), done)


def method_class(method: str) -> type[Reducer]:
    """The `Reducer` of that name. Raises UsageError for an unknown one."""
    if method not in METHODS:
        raise UsageError(
            f"there is no token reduction {method!r}",
            f"one of {', '.join(METHODS)}",
            f"{near(method, METHODS, 1) or 'mctf'}",
        )
    module, name = METHODS[method].split(":")
    return getattr(importlib.import_module(f"crosspatch.tokens.{module}"), name)


def options_of(method: str) -> dict[str, Any]:
    """The options of a method with their defaults."""
    parameters = inspect.signature(method_class(method).__init__).parameters
    return {n: p.default for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY}


def _by_branch(
    model: nn.Module, method: str, options: dict[str, Any]
) -> list[dict[str, Any] | None]:
    names = branch_names(model)
    common = {key: value for key, value in options.items() if key not in names}
    known = options_of(method)
    found: list[dict[str, Any] | None] = []
    for name in names or ("",):
        own = options.get(name, {}) if name else {}
        if own is not None and not isinstance(own, Mapping):
            raise UsageError(f"{name} = {own!r}", "options of that branch, or None", f"{name}=None")
        found.append(None if own is None else {**common, **own})
    given = {key for one in found if one for key in one} | set(common)
    if unknown := sorted(given - set(known)):
        raise _no_option(method, unknown[0], known, names)
    return found


def check_options(method: str, options: Mapping[str, Any]) -> None:
    """Raises UsageError for an option that `method` has not, whatever the model will be."""
    known = options_of(method)
    for key, value in options.items():
        of_branch = re.fullmatch(r"fine|coarse|b\d+", key)
        for name in value or () if of_branch else (key,):
            if name not in known:
                raise _no_option(method, name, known, ("fine", "coarse"))


def _no_option(
    method: str, name: str, known: Mapping[str, Any], branches: tuple[str, ...]
) -> UsageError:
    return UsageError(
        f"{method} has no option {name[:100]!r}",
        f"{', '.join(known) or 'none'}" + (f"; or {', '.join(branches)}" if branches else ""),
        f"{near(name[:100], known, 1) or next(iter(known), 'nothing')}=…",
    )


def _built(method: str, host: Any, options: dict[str, Any]) -> Reducer:
    try:
        reducer = method_class(method)(host, **options)
        check_shared(host, reducer)
        return reducer
    except CrosspatchError:
        raise
    except (TypeError, ValueError, ArithmeticError) as error:
        shown = ", ".join(f"{key}={reprlib.repr(value)}" for key, value in options.items())
        raise UsageError(
            f"{method}({shown}) cannot be put on {host.name}: {error}",
            f"options of {method} that {host.depth} blocks and {host.patches} patches can have",
            f"other options; the defaults are {spell(method, options_of(method))}",
        ) from error


# ------------------------------------------------------------------ what it saves


def _macs(model: Any) -> int:
    return count_macs(_meta(model), (model.in_chans, *model.img_size))


def _meta(model: Any) -> Any:
    return copy.deepcopy(model).to("meta").eval()


def _costs(model: Any) -> tuple[int, tuple[BlockCost, ...]]:
    """(multiply-adds of the whole, of each block) in evaluation, counted on the meta device."""
    reduced, blocks = _meta(model), []
    pictures = torch.zeros(1, model.in_chans, *model.img_size, device="meta")
    with torch.no_grad():
        walk(reduced, pictures, partial(_cost, blocks))
    total = count_macs(reduced, (model.in_chans, *model.img_size))
    order = branch_names(model) or ("",)
    return total, tuple(sorted(blocks, key=lambda one: (order.index(one.branch), one.block)))


def _cost(
    costs: list[BlockCost], branch: str, blocks: Any, state: TokenState, first: int, reducer: Any
) -> TokenState:
    """The state after `blocks`; what each of them costs, with every token computed, is added to
    `costs`."""
    maps, shared = {}, lenders(blocks)
    for number, block in enumerate(blocks, first):
        entering = state.tokens.shape[1]
        where = {"first": number, "maps": maps, "shared": shared}
        macs, (state, _) = counted(run_blocks, [block], state, reducer=reducer, **where)
        costs.append(BlockCost(branch, number, entering, state.tokens.shape[1], macs))
    return state
