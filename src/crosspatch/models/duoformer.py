# SPDX-License-Identifier: Apache-2.0
"""DuoFormer: a transformer over the scales of every region of a CNN's maps, then over the regions.

"DuoFormer: Leveraging Hierarchical Representations by Local and Global Attention Vision
Transformer", Tang et al., arXiv 2506.12982 (first 2407.13920), MIDL 2025, PMLR 301.

    maps     of a ResNet, strides 4 8 16 32; the last `scales` of them by a 1x1 convolution to D
    region   r of the N of the last map: 1 + 4 + 16 + 64 cells, coarse to fine, one scale token
             before them (`duoformer_parts.py`): t (B, N, S, D), S = 6, 22 or 86
    t = t + table(S);  depth times  t = t + MHSA(LN t); t = t + MLP(LN t), inside each region
    z = [class; t[:, :, 0]] + positions;  depth times  z = Proj(MHSA(z)), no residual, no norm
    logits   head(z[class])

The published class cannot be built (its builder passes arguments that it lacks); this is what it
computes once those are dropped. Its norm `fc_norm` is evaluated and thrown away: "unused" keeps its
parameters so, "none" has none, "used" lets the head read the normalised token. `patch_residual`
makes pre-norm residual layers of the bare patch attention, which averages tokens. Both are ours
and off by default.

Departures: any size of picture runs, padded with zeros to the stride of the last map, positions
resized; ResNet-18 with 2 or 3 scales and with the channel token works (the authors' crashes); the
channel token takes any width; the trunk learns unless `freeze_backbone` (the authors' builder
freezes it; its batch norms follow the data either way). The older `MyModel` is left out.

Expected at 224, 10 classes (M parameters, GMACs), random token: r50 with 2 scales 139.3, 30.8; 3
scales 139.7, 98.1; 4 scales 140.0, 371.3; r18 125.2, 28.3; 125.3, 95.4; 125.4, 368.2. The channel
token adds 46.0 (r18 22.8) and 3.1 (1.2).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import crosspatch._torchvision  # noqa: F401

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from timm.models import generate_default_cfgs
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from crosspatch.layers.position import resize_table, square_grid
from crosspatch.layers.windows import Size, counts
from crosspatch.models.duoformer_parts import (
    EPS,
    STD,
    TRUNKS,
    ChannelToken,
    PatchBlock,
    RandomToken,
    ScaleBlock,
    regions,
    trunk,
)
from crosspatch.models.pyramid import Pyramid, run
from crosspatch.models.registry import register, settings, unwrapped

SCALE_TOKENS = ("random", "channel")
FC_NORMS = ("none", "unused", "used")
POOLS = ("token", "avg", "")


class DuoFormer(Pyramid):
    """The network.

    img_size: the side or (H, W) that positions are made for; pictures of any size run. backbone:
    "r18", "r50" or "small" (ours, for small pictures). scales: 2 to 4 of its maps, from the last.
    depth: of the scale attention and of the patch attention. scale_token: "random", learned, or
    "channel", made from all maps. freeze_backbone: no gradients for the trunk. fc_norm,
    patch_residual: see the head of this file. global_pool: "token" (the class token), "avg" over
    regions, or "" for all tokens. Raises ValueError for what is none of these.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        backbone: str = "r50",
        scales: int = 3,
        scale_token: str = "random",
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        freeze_backbone: bool = False,
        patch_residual: bool = False,
        fc_norm: str = "none",
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        _check(backbone, scales, scale_token, fc_norm)
        dim, self.scales = embed_dim, scales
        self.stem, stages, widths, strides = trunk(TRUNKS[backbone], in_chans)
        self.stages = nn.ModuleList(stages)
        self.projections = nn.ModuleList(nn.Conv2d(w, dim, 1) for w in widths[: -scales - 1 : -1])
        self.scale_token: nn.Module = (
            ChannelToken(widths, dim) if scale_token == "channel" else RandomToken(dim)
        )
        bag = 1 + sum(4**i for i in range(scales))
        self.grid = counts(img_size, strides[-1])
        self.pos_embed_for_scale = nn.Parameter(torch.zeros(1, 1, bag, dim))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid[0] * self.grid[1], dim))
        drop: Any = {"qkv_bias": qkv_bias, "attn_drop": attn_drop_rate, "proj_drop": proj_drop_rate}
        rates = torch.linspace(0, drop_path_rate, 2 * depth, device="cpu").tolist()
        self.scale_blocks = nn.Sequential(
            *(ScaleBlock(dim, num_heads, mlp_ratio, rate, **drop) for rate in rates[:depth])
        )
        self.patch_blocks = nn.Sequential(
            *(PatchBlock(dim, num_heads, patch_residual, rate, **drop) for rate in rates[depth:])
        )
        self.fc_norm = None if fc_norm == "none" else nn.LayerNorm(dim, eps=EPS)
        self.head_norm = fc_norm == "used"
        self.finish(
            [*widths, dim],
            [*strides, strides[-1]],
            img_size=img_size,
            in_chans=in_chans,
            num_classes=num_classes,
            drop_rate=drop_rate,
        )
        self._pool_by(global_pool)
        self.output_fmt = "NLC"
        self.feature_info[-1]["module"] = "patch_blocks"
        self.init_weights()
        if freeze_backbone:
            self.stem.requires_grad_(False)
            self.stages.requires_grad_(False)

    @classmethod
    def from_authors(
        cls,
        *,
        num_layers: int = 4,
        proj_dim: int | None = None,
        freeze_backbone: bool = True,
        patch_attn: bool = True,
        **build: Any,
    ) -> DuoFormer:
        """Built from the arguments of the authors' builder: `num_layers` are the scales, `proj_dim`
        is `embed_dim`; with its unused norm. Raises ValueError without patch attention."""
        dim = build.get("embed_dim", 768)
        if proj_dim not in (None, dim) or not patch_attn:
            raise ValueError(
                f"proj_dim {proj_dim}, patch_attn {patch_attn}; expected the embed_dim, {dim}, and "
                "a patch attention"
            )
        fixed = {"freeze_backbone": freeze_backbone, "fc_norm": "unused"}
        return cls(**{"scales": num_layers, **build, **fixed})

    def init_weights(self) -> None:
        """Tables and tokens 0.036, Linear 0.02, projections Kaiming normal with a bias near 0;
        the trunk as ResNet's."""
        with torch.no_grad():
            for table in (self.pos_embed_for_scale, self.cls_token, self.pos_embed):
                if not table.is_meta:
                    trunc_normal_(table, std=STD)
            for module in self.modules():
                if isinstance(module, nn.Linear) and not module.weight.is_meta:
                    trunc_normal_(module.weight, std=0.02)
                    if module.bias is not None:
                        nn.init.zeros_(module.bias)
            for module in self.projections:
                if isinstance(module, nn.Conv2d) and not module.weight.is_meta:
                    nn.init.kaiming_normal_(module.weight)
                    if module.bias is not None:
                        nn.init.normal_(module.bias, std=1e-6)

    def load_backbone(self, state_dict: Mapping[str, Tensor]) -> None:
        """Load a plain ResNet's weights (torchvision's or timm's names) into the trunk; its
        classifier is left away. Raises RuntimeError where they do not fit."""
        for part, names in (("stem", _STEM), ("stages", _STAGES)):
            mine = {}
            for name, value in state_dict.items():
                for theirs, ours in names.items():
                    if name.startswith(theirs):
                        mine[ours + name.removeprefix(theirs)] = value
            getattr(self, part).load_state_dict(mine)

    # ------------------------------------------------------------------ forward

    def maps(self, x: Tensor) -> list[Tensor]:
        """Pictures (B, in_chans, H, W) to the maps of all stages of the trunk, fine to coarse."""
        stride = self.feature_info[-1]["reduction"]
        down, right = (-side % stride for side in x.shape[2:])
        x = self.stem(F.pad(x, (0, right, 0, down)) if down or right else x)
        found = []
        for stage in self.stages:
            x = stage(x)
            found.append(x)
        return found

    def tokens(self, maps: Sequence[Tensor]) -> Tensor:
        """The bags of all regions, (B, N, S, D), from the maps of all stages."""
        grid = maps[-1].shape[2], maps[-1].shape[3]
        coarse_to_fine = maps[: -self.scales - 1 : -1]
        projected = zip(self.projections, coarse_to_fine, strict=True)
        bags = [regions(project(x), grid) for project, x in projected]
        token = self.scale_token(maps).expand(bags[0].shape[0], bags[0].shape[1], -1, -1)
        return torch.cat([token, *bags], dim=2)

    def scale_attention(self, tokens: Tensor) -> Tensor:
        """Bags (B, N, S, D) to the first token of each after the scale blocks, (B, N, D)."""
        count = tokens.shape[1]
        x = (tokens + self.pos_embed_for_scale).flatten(0, 1)
        for block in self.scale_blocks:
            x = run(block, x, self)
        return x[:, 0].unflatten(0, (-1, count))

    def patch_attention(self, x: Tensor, grid: Size) -> Tensor:
        """Regions (B, N, D) of a grid to the class token and them, (B, 1 + N, D)."""
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        x = x + resize_table(self.pos_embed, self.grid, grid, 1)
        for block in self.patch_blocks:
            x = run(block, x, self)
        return x

    def _transform(self, maps: Sequence[Tensor]) -> Tensor:
        grid = maps[-1].shape[2], maps[-1].shape[3]
        return self.patch_attention(self.scale_attention(self.tokens(maps)), grid)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) to the class token and the regions, (B, 1 + N, D)."""
        return self._transform(self.maps(x))

    def pool(self, x: Tensor) -> Tensor:
        """Tokens to features (B, D), or with '' to themselves."""
        if self.global_pool == "token":
            x = x[:, 0]
        elif self.global_pool == "avg":
            x = x[:, 1:].mean(dim=1)
        return self.fc_norm(x) if self.head_norm and self.fc_norm is not None else x

    # ------------------------------------------------------------------ timm's contract

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head for `num_classes` (0: none), and another pooling if given."""
        super().reset_classifier(num_classes)
        if global_pool is not None:
            self._pool_by(global_pool)

    def _pool_by(self, global_pool: str) -> None:
        if global_pool not in POOLS:
            raise ValueError(f"global_pool {global_pool!r}; expected token, avg or ''")
        self.global_pool = global_pool

    def no_weight_decay(self) -> set[str]:
        """Tables and tokens."""
        names = {"pos_embed_for_scale", "cls_token", "pos_embed", "scale_token.token"}
        return names & {name for name, _ in self.named_parameters()}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that sort parameters by depth, for layer-wise rates."""
        last = (99999,)
        fine = [
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^(?:projections|scale_token|pos_embed_for_scale)", (90,)),
            (r"^scale_blocks\.(\d+)", (100,)),
            (r"^(?:cls_token|pos_embed)", (110,)),
            (r"^patch_blocks\.(\d+)", (120,)),
            (r"^fc_norm", last),
        ]
        rough = [(r"^stages\.(\d+)", None), *((p, (n[0] if n else 0,)) for p, n in fine[1:])]
        return {"stem": r"^stem", "blocks": rough if coarse else fine}

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """The maps of the trunk's stages and, last, of the regions after the patch attention,
        (B, C, h, w) or "NHWC"; and the final tokens. `norm` has nothing to act on.

        As in timm: an int takes the last n, None all. Raises ValueError for another format.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt {output_fmt!r}; expected NCHW or NHWC")
        found, last = self.maps(x), len(self.stages)
        present = last + (self.patch_blocks is not None)
        wanted, deepest = feature_take_indices(present, indices)
        final = None
        if present > last and not (stop_early and intermediates_only and deepest < last):
            final = self._transform(found)
            grid = found[-1].shape[2], found[-1].shape[3]
            found.append(final[:, 1:].transpose(1, 2).unflatten(2, grid))
        maps = [found[number] for number in wanted]
        if output_fmt == "NHWC":
            maps = [one.permute(0, 2, 3, 1) for one in maps]
        return maps if intermediates_only else (final, maps)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the maps `indices` do not need: the head, and the transformer where only maps
        of the trunk are wanted; returns the indices kept."""
        wanted, deepest = feature_take_indices(len(self.stages) + 1, indices)
        if deepest < len(self.stages):
            self.stages = self.stages[: deepest + 1]
            for name in ("projections", "scale_token", "scale_blocks", "patch_blocks", "fc_norm"):
                setattr(self, name, None)
            for name in ("pos_embed_for_scale", "cls_token", "pos_embed"):
                self.register_parameter(name, None)
        if prune_norm:
            self.fc_norm = None
        if prune_head:
            self.reset_classifier(0)
        return wanted


_STEM = {"conv1.": "0.", "bn1.": "1."}
_STAGES = {f"layer{i + 1}.": f"{i}.blocks." for i in range(4)}
_AUTHORS = {
    "channel_token": "scale_token.token",
    "chann_proj_all.nConvs.": "scale_token.fuse.",
    "resnet_projector.0.": "stem.0.",
    "resnet_projector.1.": "stem.1.",
    **{f"resnet_projector.{i + 4}.": f"stages.{i}.blocks." for i in range(4)},
    **{f"projection.proj_heads{i}.": f"projections.{3 - i}." for i in range(4)},
    "vision_transformer.scaleBlocks.": "scale_blocks.",
    "vision_transformer.blocks.": "patch_blocks.",
    "vision_transformer.": "",
}


def _check(backbone: str, scales: int, scale_token: str, fc_norm: str) -> None:
    if backbone not in TRUNKS:
        raise ValueError(f"backbone {backbone!r}; expected one of {', '.join(TRUNKS)}")
    if not 2 <= scales <= 4:
        raise ValueError(f"{scales} scales; expected 2, 3 or 4")
    if scale_token not in SCALE_TOKENS:
        raise ValueError(f"scale_token {scale_token!r}; expected {' or '.join(SCALE_TOKENS)}")
    if fc_norm not in FC_NORMS:
        raise ValueError(f"fc_norm {fc_norm!r}; expected one of {', '.join(FC_NORMS)}")


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: DuoFormer) -> dict[str, Tensor]:
    """A released state dict under the model's names: bare or in {"model": …} or {"state_dict": …},
    positions resized; its unused norm is left away where the model has none."""
    named = unwrapped(state_dict)
    state = {_renamed(name): value for name, value in named.items() if "chann_proj" not in name}
    state |= _channel(named)
    if model.fc_norm is None:
        state = {name: value for name, value in state.items() if not name.startswith("fc_norm.")}
    table = state.get("pos_embed")
    if table is not None and table.shape[1] != model.pos_embed.shape[1]:
        old = square_grid(table.shape[1] - 1)
        state["pos_embed"] = resize_table(table, old, model.grid, 1)
    return state


def _renamed(name: str) -> str:
    for theirs, ours in _AUTHORS.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


def _channel(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The convolutions of the channel token: those of `chann_proj1` and 2 in the order of their
    names, with a bias of 0 where the file has none."""
    state = {_renamed(n): v for n, v in named.items() if n.startswith("chann_proj_all.")}
    for number in (0, 1):
        prefix = f"chann_proj{number + 1}."
        convs = sorted({n.rpartition(".")[0] for n in named if n.startswith(prefix)})
        for place, conv in enumerate(convs):
            weight = named[f"{conv}.weight"]
            ours = f"scale_token.shrink.{number}.{place}"
            state[f"{ours}.weight"] = weight
            state[f"{ours}.bias"] = named.get(f"{conv}.bias", torch.zeros_like(weight[:, 0, 0, 0]))
    return state


VARIANTS: dict[str, dict[str, Any]] = {
    f"duoformer_{backbone}_s{scales}_{token}": {
        "backbone": backbone, "scales": scales, "scale_token": token
    }
    for backbone in ("r18", "r50") for scales in (2, 3, 4) for token in SCALE_TOKENS
}  # fmt: skip
# ours, for small pictures: maps of 16x16, 8x8 and 4x4, 16 regions of 22 tokens
SMALL = {
    "duoformer_micro_32": {
        "img_size": 32, "backbone": "small", "embed_dim": 24, "depth": 1, "num_heads": 3,
        "mlp_ratio": 2.0, "scale_token": "channel", "patch_residual": True, "fc_norm": "used",
        "global_pool": "avg",
    }
}  # fmt: skip


default_cfgs = generate_default_cfgs(
    {name: settings(224, "stem.0", "head") for name in VARIANTS}
    | {name: settings(32, "stem.0", "head") for name in SMALL}
)
register(__name__, DuoFormer, VARIANTS | SMALL, checkpoint_filter_fn)
