# SPDX-License-Identifier: Apache-2.0
"""FMViT: channels of high and of low frequency, mixed; an independent reading of the paper.

"FMViT: A multiple-frequency mixing Vision Transformer", Alibaba, arXiv 2311.05707, 2023. The
authors' repository has been empty since August 2023 and only the abstract, a summary and a table of
results could be read. The four named parts and the published numbers are the paper's; what is
inside the parts, marked (o), is ours, and no claim about the authors' network.

    unit(x)  = sum of BN(conv1x1 in g groups of x), g = 1, 2, 4 (o), + BN(x) where widths agree (o)
               = W x + b once it is folded; the paper's gMLP, "convolutional multigroup
               reparameterization", which is not the gated MLP of arXiv 2105.08050
    mixer(x) = unit(ReLU(BN(grouped conv3x3 x)))                                              (o)
    MLP(x)   = unit(ReLU(unit(x))), 3 times the width in CFB, twice in FMB                    (o)
    CFB: x = embed x;  x = x + DropPath(mixer x);  x = x + DropPath(MLP(BN x))
    RLMHSA(x) = unit(softmax(q k^T / sqrt d) v), q = unit(x), k and v units of the mean of r x r
               cells of x; queries and keys of half the width of values                       (o)
    FMB: l = embed x, to a channels;   l = l + DropPath(RLMHSA(BN l))                low frequency
         h = BN(conv1x1 l), the rest;  h = h + DropPath(mixer h)                     high frequency
         y = channels of [l, h], shuffled in 4 groups;  y = y + DropPath(MLP(BN y))           (o)
    stem: four conv3x3-BN-ReLU, strides 2, 1, 1, 2 (o);   logits = head(mean(BN x))
    stages: CFB .. | CFB .. FMB | CFB .. FMB, every fifth and the last | CFB .. FMB           (o)

a is 0.75 of the width, rounded to heads; embed is the mean of 2x2 (stride 2), conv1x1 and BN;
groups of the 3x3 convolutions have the width of a head; r is 8, 4, 2, 1 by stage.

`fold_units` makes every unit one dense 1x1 convolution; `for_inference`, which `export` ships,
also takes every batch norm into the layer beside it. Both hold for evaluation mode and are exact.

Departures: everything marked (o), and that norms behind which a block adds begin at 0.1, as a sum
of unit norms would drown what it is added to. The widths and depths of the variants were fitted to
the paper's numbers of parameters and multiply-adds, so their agreement is no evidence. Odd maps are
rounded up.

Expected folded at 224 (M parameters, GMACs; in brackets with queries and keys of full width, to
which the widths were fitted; then the paper's numbers): T 1.93, 0.32 (2.00, 0.33; 2.0, 0.3); S
5.99, 0.76 (6.24, 0.78; 6.4, 0.8); M 12.02, 2.04 (12.40, 2.08; 12.8, 2.0); B 23.58, 4.05 (24.33,
4.12; 24.3, 4.2); L 34.60, 6.98 (35.52, 7.07; 35.3, 7.1). In training 1.6 times as many of both.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import crosspatch._torchvision  # noqa: F401

from timm.models import generate_default_cfgs
from torch import Tensor, nn

from crosspatch.layers.first_weights import init_weights
from crosspatch.layers.folding import fold_after, fold_before, is_batch_norm
from crosspatch.layers.stage import drop_rates
from crosspatch.models.fmvit_blocks import (
    ConvFusionBlock,
    FrequencyMixingBlock,
    MultigroupUnit,
    Spec,
    make_block,
)
from crosspatch.models.pyramid import Pyramid, Stage
from crosspatch.models.registry import register, settings, unwrapped

FIRST = 0.1  # weight of the norms behind which a block adds
LONG, EVERY = 2, 5  # the stage in which every fifth block mixes, not only the last


class FMViT(Pyramid):
    """The network; argument names are Next-ViT's where they have one.

    img_size: what it is described for, any size is taken. stem_chs, stem_strides: of the stem's
    convolutions (the last two have the same width). dims: widths of CFB by stage; mix_dims: of FMB,
    from the second stage on. sr_ratios: r. head_dim: width of a head's values; qk_ratio: that of
    queries and keys over it. mix_ratio: share of low frequency; shuffle: groups of the channel
    shuffle, 1 for none. mlp_ratios: of CFB and of FMB. groups, identity: branches of a unit, (1,)
    and False for plain ones. folded: the form that `fold_units` gives. Raises ValueError for shapes
    that do not agree.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        stem_chs: Sequence[int] = (64, 32, 64),
        stem_strides: Sequence[int] = (2, 1, 1, 2),
        depths: Sequence[int] = (3, 4, 10, 3),
        dims: Sequence[int] = (128, 224, 416, 800),
        mix_dims: Sequence[int] = (256, 512, 1024),
        strides: Sequence[int] = (1, 2, 2, 2),
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        head_dim: int = 32,
        qk_ratio: float = 0.5,
        mix_ratio: float = 0.75,
        shuffle: int = 4,
        mlp_ratios: tuple[float, float] = (3.0, 2.0),
        groups: Sequence[int] = (1, 2, 4),
        identity: bool = True,
        folded: bool = False,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        _check(stem_chs, stem_strides, depths, dims, mix_dims, strides, sr_ratios)
        shape = (head_dim, qk_ratio, mix_ratio, shuffle, mlp_ratios, tuple(groups), identity)
        spec = Spec(*shape, folded, attn_drop_rate, proj_drop_rate)
        self.stem = _stem(in_chans, stem_chs, stem_strides)
        rates = drop_rates(drop_path_rate, depths)
        stages, widths, width = [], [], stem_chs[-1]
        for i, plan in enumerate(_plan(depths, dims, mix_dims)):
            blocks = []
            for place, ((mixes, out), rate) in enumerate(zip(plan, rates[i], strict=True)):
                cells, step = sr_ratios[i] if mixes else None, 1 if place else strides[i]
                blocks.append(make_block(width, out, step, rate, spec, cells))
                width = out
            stages.append(Stage(None, blocks))
            widths.append(width)
        self.stages = nn.ModuleList(stages)
        self.norm = nn.BatchNorm2d(width)
        self.apply(init_weights)
        _quiet_branches(self)
        steps = list(itertools.accumulate(stem_strides, int.__mul__))[-1:] + list(strides)
        self.finish(
            widths,
            list(itertools.accumulate(steps, int.__mul__))[1:],
            img_size=img_size,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
        )

    def for_inference(self) -> FMViT:
        """A copy that computes the same with folded units and no batch norm: what is exported."""
        return fold_units(self, norms=True)


def _quiet_branches(model: nn.Module) -> None:
    """Let what blocks add begin small, as it does in Next-ViT: the norms of a unit would otherwise
    make it twice as large as what it is added to."""
    for name, module in model.named_modules():
        if isinstance(module, MultigroupUnit) and name.endswith(("projection", "attn.proj", "fc2")):
            norms: Any = [branch.bn for branch in module.branches or ()]
            for norm in norms:
                nn.init.constant_(norm.weight, FIRST)


class ConvNormRelu(nn.Module):
    """A 3x3 convolution, batch norm, ReLU."""

    def __init__(self, dim: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, out, 3, stride, 1, bias=False)
        self.norm = nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)).relu()


def _stem(in_chans: int, widths: Sequence[int], strides: Sequence[int]) -> nn.Sequential:
    outs = (*widths, widths[-1])
    shapes = zip((in_chans, *widths), outs, strides, strict=True)
    return nn.Sequential(*(ConvNormRelu(*shape) for shape in shapes))


def _plan(
    depths: Sequence[int], dims: Sequence[int], mix_dims: Sequence[int]
) -> Iterator[list[tuple[bool, int]]]:
    """By stage: (is it an FMB, width) of every block."""
    for i, (depth, width) in enumerate(zip(depths, dims, strict=True)):
        every = EVERY if i == LONG else depth
        ends = [i > 0 and (n % every == 0 or n == depth) for n in range(1, depth + 1)]
        yield [(True, mix_dims[i - 1]) if mixes else (False, width) for mixes in ends]


def _check(stem_chs, stem_strides, depths, dims, mix_dims, strides, sr_ratios) -> None:
    if len(stem_chs) != 3 or len(stem_strides) != 4:
        raise ValueError(
            f"stem_chs {tuple(stem_chs)}, stem_strides {tuple(stem_strides)}; expected three and "
            "four"
        )
    if not len(depths) == len(dims) == len(mix_dims) + 1 == len(strides) == len(sr_ratios):
        raise ValueError(
            f"depths has {len(depths)} entries, dims {len(dims)}, mix_dims {len(mix_dims)}, "
            f"strides {len(strides)}, sr_ratios {len(sr_ratios)}; expected one a stage in each, "
            "and in mix_dims none for the first"
        )
    if min(depths) < 1:
        raise ValueError(f"depths {tuple(depths)}; expected a block or more in every stage")


# ---------------------------------------------------------------------- for inference


def fold_units(model: FMViT, norms: bool = False) -> FMViT:
    """A copy of `model` for inference, in which every unit is one dense 1x1 convolution; it
    computes the same with the norms' running statistics.

    It is what `folded=True` builds, so it can be saved and built again. norms: takes the batch
    norms into the layers beside them as well, which leaves none.
    """
    made = copy.deepcopy(model).eval()
    for module in made.modules():
        if isinstance(module, MultigroupUnit):
            module.fold()
    if norms:
        _merge_norms(made)
    return made


def _merge_norms(model: FMViT) -> None:
    for module in list(model.modules()):
        if isinstance(module, ConvNormRelu):
            fold_after(module, "conv", "norm")
        elif isinstance(module, ConvFusionBlock | FrequencyMixingBlock):
            module.merge_norms()
    averages = model.global_pool == "avg"  # a maximum is not that of the scaled map
    if averages and isinstance(model.head, nn.Linear) and is_batch_norm(model.norm):
        fold_before(model.head, model.norm)
        model.norm = nn.Identity()


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: FMViT) -> dict[str, Tensor]:
    """A state dict, bare or in {"model": …} or {"state_dict": …}; nobody has released one, so names
    are ours. Weights with branches are folded for a model that has none."""
    state = dict(unwrapped(state_dict))
    for name, unit in model.named_modules():
        if isinstance(unit, MultigroupUnit) and unit.branches is None:
            _fold_state(state, f"{name}.")
    return state


def _fold_state(state: dict[str, Tensor], unit: str) -> None:
    """Put `weight` and `bias` in the place of the branches of a unit, where it has some."""
    mine = {name: value for name, value in state.items() if name.startswith(f"{unit}branches.")}
    convs = sorted(name for name in mine if name.endswith("conv.weight"))
    if not convs:
        return
    out, dim = state[convs[0]].shape[0], state[convs[0]].shape[1]
    groups = [dim // state[name].shape[1] for name in convs]
    identity = f"{unit}branches.{len(convs)}.bn.weight" in mine
    whole = MultigroupUnit(dim, out, groups, identity).to(state[convs[0]]).eval()
    whole.load_state_dict({name.removeprefix(unit): value for name, value in mine.items()})
    whole.fold()
    for name in mine:
        del state[name]
    state |= {unit + name: value for name, value in whole.state_dict().items()}


VARIANTS: dict[str, dict[str, Any]] = {
    "fmvit_t": {
        "stem_chs": (16, 16, 16), "depths": (2, 2, 5, 2), "dims": (32, 48, 96, 240),
        "mix_dims": (64, 128, 320), "head_dim": 16,
    },
    "fmvit_s": {
        "stem_chs": (32, 16, 32), "depths": (2, 2, 5, 2), "dims": (32, 80, 160, 448),
        "mix_dims": (112, 224, 608), "head_dim": 16,
    },
    "fmvit_m": {
        "stem_chs": (32, 16, 32), "depths": (2, 3, 10, 3), "dims": (64, 128, 224, 448),
        "mix_dims": (160, 320, 640),
    },
    "fmvit_b": {
        "depths": (3, 3, 10, 3), "dims": (80, 160, 320, 704), "mix_dims": (224, 448, 928),
        "head_dim": 16,
    },
    "fmvit_l": {},
}  # fmt: skip
# for small pictures: a stem that keeps every second pixel, heads of 8
SMALL = {
    "fmvit_micro_32": {
        "img_size": 32, "stem_chs": (16, 16, 16), "stem_strides": (2, 1, 1, 1),
        "depths": (1, 1, 3, 1), "dims": (32, 48, 64, 80), "mix_dims": (64, 80, 96), "head_dim": 8,
    }
}  # fmt: skip


def _settings(arguments: Mapping[str, Any]) -> Any:
    last = arguments.get("img_size", 224) // (16 if "stem_strides" in arguments else 32)
    return settings(arguments.get("img_size", 224), "stem.0.conv", "head", pool_size=(last, last))


default_cfgs = generate_default_cfgs(
    {name: _settings(arguments) for name, arguments in (VARIANTS | SMALL).items()}
)
register(__name__, FMViT, VARIANTS | SMALL, checkpoint_filter_fn, out_indices=(0, 1, 2, 3))
