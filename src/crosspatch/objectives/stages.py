# SPDX-License-Identifier: Apache-2.0
"""What a network makes of a picture on its way: the maps of its last two stages beside its logits,
in one pass, and its last stage as a function of the map before it.

Read through timm's contract (`feature_info`, `forward_intermediates`, `forward_head`); of our own
networks through `embed`, `run`, `pool` and `classify`, which a token reduction goes through as
well. A plain ViT has four stages of a quarter of its blocks; of a CrossViT the widest branch is
read. Whatever is read is compared with one plain forward before it is believed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from crosspatch.errors import UsageError
from crosspatch.layers.block import run_blocks
from crosspatch.layers.tokens import TokenState, as_map
from crosspatch.models.crossvit import CrossViT
from crosspatch.models.vit import VisionTransformer

CLOSE = 1e-4  # relative; more is another computation, not another order of sums


class Read(NamedTuple):
    """logits: (B, K); low, high: (B, C, h, w) maps after the last stage but one and after the last,
    the latter normalised where the network does so; state: what its last stage went on from."""

    logits: Tensor
    low: Tensor
    high: Tensor
    state: Any = None


Perceive = Callable[[Tensor, Read], Tensor]
"""A map (B, C, h, w) in the place of `low`, and what was read of the same pictures, to `high`."""


class Reader:
    """Reads `model`, which it does not own, at two places of its `feature_info`.

    size: (H, W) of the pictures, normalised (B, 3, H, W); asked: the two places, or nothing for the
    last two stages. who: as errors name it; of: how its places are typed. Raises UsageError for a
    model whose maps cannot be read, and for places that it does not have.
    """

    def __init__(
        self,
        model: nn.Module,
        size: tuple[int, int],
        asked: Sequence[int] = (),
        *,
        who: str = "the student",
        of: str = "student",
    ) -> None:
        self.info = _info(model, who)
        self.places = _places(self.info, asked, who, of)
        self.who, self.size = who, size
        self.prefixed = _keeps_prefix(model)
        self.perceive, self.why_not = None, ""
        self.shapes = self._probe(model)

    def __call__(self, model: nn.Module, images: Tensor) -> Read:
        """Logits and maps of images (B, 3, H, W)."""
        if isinstance(model, CrossViT):
            return self._crossvit(model, images)
        if isinstance(model, VisionTransformer):
            return self._vit(model, images)
        contract: Any = model
        how = {"return_prefix_tokens": True} if self.prefixed else {}
        final, maps = contract.forward_intermediates(images, indices=list(self.places), **how)
        low, prefix = maps[0] if self.prefixed else (maps[0], None)
        last = maps[1][0] if self.prefixed else maps[1]
        return Read(contract.forward_head(final), low, _final_map(final, last), prefix)

    @property
    def text(self) -> str:
        """Where it reads, for people."""
        low, high = (str(self.info[place].get("module", place)) for place in self.places)
        (c, h, w), (d, i, j) = self.shapes
        return f"{low} ({c} x {h} x {w}) and {high} ({d} x {i} x {j})"

    # ------------------------------------------------------------------ our networks

    def _vit(self, model: VisionTransformer, images: Tensor) -> Read:
        low, high = self.places
        whole = high == len(model.blocks) - 1
        state, found = model.run(model.embed(images), collect={low, high})
        logits = model.classify(model.pool(state))
        if model.reducer is not None:
            logits = model.reducer.decide(state, logits)
        last = found[high]
        last = last._replace(tokens=model.norm(last.tokens)) if whole else last
        return Read(logits, *(as_map(s, "NCHW", False) for s in (found[low], last)), found[low])

    def _crossvit(self, model: CrossViT, images: Tensor) -> Read:
        branch = self.info[self.places[0]]["branch"]
        low, high = (self.info[place]["encoder"] for place in self.places)
        states, found = model.run(model.embed(images), collect={low, high})
        logits = model.classify(model.pool(states), states)
        last = found[high][branch]
        if high == len(model.blocks) - 1:
            last = last._replace(tokens=model.norm[branch](last.tokens))
        maps = (as_map(s, "NCHW", False) for s in (found[low][branch], last))
        return Read(logits, *maps, found[low])

    # ------------------------------------------------------------------ what is believed

    @torch.no_grad()
    def _probe(self, model: nn.Module) -> tuple[tuple[int, ...], tuple[int, ...]]:
        training = model.training
        like = next(model.parameters())
        images = probe_images(self.size).to(like)
        try:
            plain = model.eval()(images)
            read = self(model, images)
            self.perceive, self.why_not = self._last_stage(model, read)
        except Exception as error:  # whatever a network raises that does not keep the contract
            raise _unreadable(self.who, f"{type(error).__name__}: {error}") from error
        finally:
            model.train(training)
        if not _near(read.logits, plain) or read.low.ndim != 4 or read.high.ndim != 4:
            raise _unreadable(self.who, "what is read beside its maps is not its answer")
        return tuple(read.low.shape[1:]), tuple(read.high.shape[1:])

    def _last_stage(self, model: nn.Module, read: Read) -> tuple[Perceive | None, str]:
        """The last stage as a function, where it repeats what was read; else None and why."""
        if any(getattr(model, "transforms", ())):
            return None, "its tokens are reduced on the way"
        for candidate in _candidates(model, self.info, self.places):
            try:
                found = candidate(read.low, read)
            except Exception:  # a module of another interface; the next may do
                continue
            if found.shape == read.high.shape and _near(found, read.high):
                return candidate, ""
        return None, "its last stage does not stand for itself"


def probe_images(size: tuple[int, int]) -> Tensor:
    """Two pictures (2, 3, H, W) of waves, always the same."""
    return torch.linspace(-2, 40, 6 * size[0] * size[1]).sin().view(2, 3, *size)


def _near(found: Any, wanted: Any) -> bool:
    if not isinstance(found, Tensor) or not isinstance(wanted, Tensor):
        return False
    if found.shape != wanted.shape:
        return False
    apart = (found - wanted).norm() / wanted.norm().clamp(min=1e-12)
    return bool(apart < CLOSE)


def _final_map(final: Any, last: Tensor) -> Tensor:
    """The final features in the shape of the last map, or that map where they have another."""
    if not isinstance(final, Tensor):
        return last
    b, c, h, w = last.shape
    if final.ndim == 3 and final.shape[2] == c and final.shape[1] >= h * w:
        return final[:, final.shape[1] - h * w :].transpose(1, 2).unflatten(2, (h, w))
    if final.shape == last.shape:
        return final
    return final.permute(0, 3, 1, 2) if final.shape == (b, h, w, c) else last


# ---------------------------------------------------------------------- where is read


def _info(model: nn.Module, who: str) -> list[dict[str, Any]]:
    known: Any = getattr(model, "feature_info", None)
    if hasattr(known, "get_dicts"):
        known = known.get_dicts()
    if not known or not hasattr(model, "forward_intermediates"):
        raise _unreadable(who, f"{type(model).__name__} names no maps")
    return list(known)


def _keeps_prefix(model: Any) -> bool:
    """Whether a network of timm's gives its class tokens beside its maps."""
    if not getattr(model, "num_prefix_tokens", 0):
        return False
    return "return_prefix_tokens" in inspect.signature(model.forward_intermediates).parameters


def _places(info: list[dict[str, Any]], asked: Sequence[int], who: str, of: str) -> tuple[int, int]:
    if asked:
        return _asked_places(info, asked, who, of)
    widest = max(info, key=lambda one: one["num_chs"])
    own = [i for i, one in enumerate(info) if _branch(one) == _branch(widest)]
    ends = [
        i for i, following in zip(own, [*own[1:], None], strict=True)
        if following is None or info[i]["reduction"] != info[following]["reduction"]
    ]  # fmt: skip
    if len(ends) > 1:
        return ends[-2], ends[-1]
    if len(own) < 2:
        raise _unreadable(who, "it has one stage")
    return own[min(-(-3 * len(own) // 4), len(own) - 1) - 1], own[-1]


def _asked_places(
    info: list[dict[str, Any]], asked: Sequence[int], who: str, of: str
) -> tuple[int, int]:
    fits = len(asked) == 2 and all(type(p) is int and 0 <= p < len(info) for p in asked)
    if fits and asked[0] < asked[1] and _branch(info[asked[0]]) == _branch(info[asked[1]]):
        return asked[0], asked[1]
    raise UsageError(
        f"{of} = {'/'.join(map(str, asked))}",
        f"two places of {who}, in order, out of 0 to {len(info) - 1}",
        f"{of}={'/'.join(map(str, _places(info, (), who, of)))}, which is read without it",
    )


def _branch(one: dict[str, Any]) -> Any:
    return one.get("branch")


def _unreadable(who: str, why: str) -> UsageError:
    return UsageError(
        f"the feature maps of {who} cannot be read ({why[:200]})",
        "a network that gives two maps by timm's forward_intermediates, as ViT, CrossViT, Swin, "
        "ConvNeXt, ResNet do",
        "take another --model or --teacher, or --distill soft, which reads answers only",
    )


# ---------------------------------------------------------------------- the last stage alone


def _candidates(model: Any, info: list[dict[str, Any]], places: tuple[int, int]) -> list[Perceive]:
    if isinstance(model, CrossViT):
        return [_encoders_after(model, info[places[0]])]
    if isinstance(model, VisionTransformer):
        return [_blocks_after(model, places[0])]
    try:
        before, chain = _modules(model, *(str(info[place]["module"]) for place in places))
    except (AttributeError, KeyError, ValueError):
        return []
    merge = getattr(before, "downsample", None)  # of Swin as its authors wrote it
    heads = [[], *([one] for one in (merge,) if isinstance(one, nn.Module))]
    norms = [getattr(model, name, None) for name in ("norm", "norm_pre", "final_conv")]
    tails = [[], *([norm] for norm in norms if isinstance(norm, nn.Module))]
    return [
        _chained([*head, *chain, *tail], layout)
        for head in heads
        for tail in tails
        for layout in LAYOUTS
    ]


def _modules(model: nn.Module, low: str, high: str) -> tuple[nn.Module, list[nn.Module]]:
    """The module that ends at `low`, and those that follow it up to the one named `high`."""
    (parent, _, first), (other, _, last) = low.rpartition("."), high.rpartition(".")
    if parent != other or not (first.isdigit() and last.isdigit()):
        return model.get_submodule(low), [model.get_submodule(high)]
    numbers = range(int(first) + 1, int(last) + 1)
    return model.get_submodule(low), [model.get_submodule(f"{parent}.{n}") for n in numbers]


LAYOUTS = ("NCHW", "NHWC", "NLC")


def _chained(chain: Sequence[nn.Module], layout: str) -> Perceive:
    """Modules one after the other, in the layout of their tensors; prefix tokens are the network's
    own."""

    def perceive(low: Tensor, read: Read) -> Tensor:
        if layout == "NLC":
            x = low.flatten(2).transpose(1, 2)
            x = x if read.state is None else torch.cat([read.state.to(x.dtype), x], dim=1)
        else:
            x = low if layout == "NCHW" else low.permute(0, 2, 3, 1)
        for module in chain:
            x = module(x)
        if layout == "NLC":
            grid = tuple(read.high.shape[2:])
            return x[:, x.shape[1] - grid[0] * grid[1] :].transpose(1, 2).unflatten(2, grid)
        return x if layout == "NCHW" else x.permute(0, 3, 1, 2)

    return perceive


def _blocks_after(model: VisionTransformer, place: int) -> Perceive:
    """The blocks after `place`, with the prefix tokens that the network itself had there."""

    def perceive(low: Tensor, read: Read) -> Tensor:
        state, first = _with_patches(read.state, low), 0
        for stage, spec in enumerate(model.stages):
            behind = first + len(spec.blocks)
            if first > place and str(stage) in model.reductions:
                state = model.reductions[str(stage)](state)
            if behind > place + 1:
                start = max(first, place + 1)
                blocks: Any = model.blocks[start:behind]
                state, _ = run_blocks(blocks, state, first=start)
            first = behind
        return as_map(state._replace(tokens=model.norm(state.tokens)), "NCHW", False)

    return perceive


def _encoders_after(model: CrossViT, info: dict[str, Any]) -> Perceive:
    """The encoders after the one that `info` tells of; the other branches are the network's own."""
    number, branch = info["encoder"], info["branch"]

    def perceive(low: Tensor, read: Read) -> Tensor:
        states = [_with_patches(s, low) if i == branch else s for i, s in enumerate(read.state)]
        encoders: Any = model.blocks
        for encoder in encoders[number + 1 :]:
            states = encoder(states, [0] * len(states), [None] * len(states), False)
        last = states[branch]
        last = last._replace(tokens=model.norm[branch](last.tokens))
        return as_map(last, "NCHW", False)

    return perceive


def _with_patches(state: TokenState, low: Tensor) -> TokenState:
    prefix = state.tokens[:, : state.n_prefix].to(low.dtype)
    return state._replace(tokens=torch.cat([prefix, low.flatten(2).transpose(1, 2)], dim=1))
