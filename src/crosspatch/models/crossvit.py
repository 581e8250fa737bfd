# SPDX-License-Identifier: Apache-2.0
"""CrossViT: two branches on patches of two sizes that talk only through their class tokens.

"CrossViT: Cross-Attention Multi-Scale Vision Transformer for Image Classification", Chen, Fan,
Panda, arXiv 2103.14899, ICCV 2021. Branch i asks branch j = i + 1 (mod K); for every multi-scale
encoder:

    x_i  = blocks_i(x_i)                                  pre-norm transformer blocks, all branches
    c    = Linear(GELU(LN(class_i)))                      into the width of branch j
    y    = c + DropPath(Attention(query = LN(z)[0], keys = values = LN(z))),   z = [c; patches_j]
    x_i  = [Linear(GELU(LN(y))); patches_i]               back into the width of branch i
    logits = mean over branches of head_i(LN(x_i)[0])

Departures from the authors' code, whose numbers this gives: patch counts are (i // p)^2 (theirs is
i // p * i // p); each branch is resized per side (theirs looks at the height only); the resize is
two constant products; only the class query is projected in the fusion; and positions and class
tokens are not decayed in new training (`authors_decay = True` restores the slip of their skip
list).

Expected (M parameters, GMACs at the native sizes): tiny 7.01, 1.56; small 26.86, 5.62; base 105.03,
21.19; 9 8.55, 1.84; 15 27.53, 5.79; 18 43.27, 9.03; dagger 9 8.78, 1.98; 15 28.21, 6.11; 18 44.27,
9.47; at 384 15 28.50, 21.40; 18 44.61, 32.41.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

import crosspatch._torchvision  # noqa: F401

import torch
from timm.layers import trunc_normal_
from timm.models import generate_default_cfgs
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from crosspatch.layers.block import BlockOptions
from crosspatch.layers.first_weights import init_linear
from crosspatch.layers.patch_embed import ConvStem, PatchEmbed, pair
from crosspatch.layers.position import Table, resize_tables
from crosspatch.layers.resize import FixedResize
from crosspatch.layers.stage import drop_rates
from crosspatch.layers.tokens import TokenState, as_map, mean_patch, select_patches
from crosspatch.models.crossvit_fusion import FUSIONS, States
from crosspatch.models.crossvit_stems import DaggerStem, T2TStem
from crosspatch.models.registry import register, settings

RELEASE = "https://github.com/IBM/CrossViT/releases/download/weights-0.1"
FINE = 15 / 14  # the authors' fine branch sees 240 pixels where the coarse one sees 224


class CrossViT(nn.Module):
    """The network, with K >= 2 branches from fine to coarse patches.

    img_size: None for the authors' `branch_sizes`, with any input resized to them; or a side or (H,
    W): per side each branch takes the multiple of its patch nearest to that times its entry of
    `scales`. depth: per encoder the blocks of each branch and of the fusion. stem: "patch",
    "dagger", "t2t", or "conv" (small pictures). fusion: "cross", "class_token", "all" or "none".
    authors_decay: decay positions and class tokens, as the authors' training did by a slip.
    Raises ValueError for shapes that do not agree.
    """

    blocks: nn.ModuleList
    resize: nn.ModuleList
    norm: nn.ModuleList
    head: nn.ModuleList

    def __init__(
        self,
        img_size: int | tuple[int, int] | None = None,
        patch_size: Sequence[int] = (12, 16),
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: Sequence[int] = (192, 384),
        depth: Sequence[Sequence[int]] = ((1, 4, 0),) * 3,
        num_heads: Sequence[int] = (6, 6),
        mlp_ratio: Sequence[float] = (4.0, 4.0),
        qkv_bias: bool = True,
        stem: str = "patch",
        fusion: str = "cross",
        branch_sizes: Sequence[int | tuple[int, int]] | None = None,
        scales: Sequence[float] | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_eps: float = 1e-6,
        authors_decay: bool = False,
        global_pool: str = "token",
    ) -> None:
        super().__init__()
        count = len(embed_dim)
        mlp_ratio = tuple(mlp_ratio)[:count]  # the authors list one more, for an MLP never built
        _check_shapes(count, patch_size, num_heads, mlp_ratio, depth, fusion)
        _check_pooling(global_pool)
        self.num_classes, self.in_chans, self.global_pool = num_classes, in_chans, global_pool
        self.embed_dim, self.patch_size = tuple(embed_dim), tuple(patch_size)
        self.num_features = self.head_hidden_size = sum(embed_dim)
        self.authors_decay, self.grad_checkpointing = authors_decay, False
        self.img_size, self.branch_sizes = _sizes(img_size, branch_sizes, patch_size, scales)
        sides = zip(self.branch_sizes, patch_size, strict=True)
        self.grids = tuple((h // p, w // p) for (h, w), p in sides)

        self.resize = nn.ModuleList(FixedResize(s, self.img_size) for s in self.branch_sizes)
        branches = list(zip(embed_dim, patch_size, self.grids, strict=True))
        self.patch_embed = nn.ModuleList(_stem(stem, in_chans, d, p) for d, p, _ in branches)
        self.cls_token = nn.ParameterList(torch.zeros(1, 1, d) for d in embed_dim)
        self.pos_embed = nn.ParameterList(torch.zeros(1, 1 + h * w, d) for d, _, (h, w) in branches)
        self.pos_drop = nn.Dropout(drop_rate)

        options = BlockOptions(
            qkv_bias=qkv_bias,
            norm=partial(nn.LayerNorm, eps=norm_eps),
            attn_drop=attn_drop_rate,
            proj_drop=drop_rate,
        )
        rates = _drop_paths(depth, drop_path_rate)
        shape = (tuple(embed_dim), tuple(num_heads), mlp_ratio)
        self.blocks = nn.ModuleList(
            FUSIONS[fusion](*shape, tuple(d), options, r) for d, r in zip(depth, rates, strict=True)
        )
        nothing: Any = [None] * count
        self.reducers: Any = nn.ModuleList(nothing)  # one Reducer a branch, or None
        self.feature_info = self._feature_info()
        self.norm = nn.ModuleList(options.norm(d) for d in embed_dim)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = self._heads(num_classes)
        self.init_weights()

    @classmethod
    def from_authors(
        cls,
        *,
        img_size: Sequence[int],
        multi_conv: bool = False,
        hybrid_backbone=None,
        **build: Any,
    ) -> CrossViT:
        """Built from the arguments of the authors' constructor (`img_size` lists one per
        branch)."""
        stem = hybrid_backbone or ("dagger" if multi_conv else "patch")
        return cls(branch_sizes=tuple(img_size), stem=stem, **build)

    def init_weights(self) -> None:
        """Truncated normal of 0.02 for Linear layers, class tokens and positions."""
        for parameter in (*self.cls_token, *self.pos_embed):
            if not parameter.is_meta:
                trunc_normal_(parameter, std=0.02)
        self.apply(init_linear)

    # ------------------------------------------------------------------ the four parts

    def embed(self, x: Tensor, keep: Sequence[Tensor | None] | None = None) -> States:
        """Images (B, C, H, W) of any size to one state per branch.

        keep: per branch (B, M) int64, the patches to go on with, or None for all.
        """
        states = []
        for i, grid in enumerate(self.grids):
            tokens = self.patch_embed[i](self.resize[i](x))
            token = self.cls_token[i].expand(x.shape[0], -1, -1)
            tokens = self.pos_drop(torch.cat([token, tokens], dim=1) + self.pos_embed[i])
            state = TokenState(tokens, None, None, 1, grid)
            kept = keep[i] if keep is not None else None
            if kept is not None:
                state = select_patches(state, kept)
            states.append(state)
        return states

    def run(
        self,
        states: States,
        collect: Collection[int] = (),
        *,
        reducers: Any = "own",
        attended: list[Tensor] | None = None,
    ) -> tuple[States, dict[int, States]]:
        """All encoders over the states; the states after the encoders in `collect`, by number.

        reducers: one per branch (or None), in the place of the model's own. attended: it is given
        what the class token of each branch attends to in the last fusion (`CrossEncoder.fuse`).
        """
        hooks = self.reducers if isinstance(reducers, str) else reducers
        collected: dict[int, States] = {}
        first = [0] * len(states)
        encoders: Any = self.blocks
        for number, encoder in enumerate(encoders):
            shown = attended if number == len(encoders) - 1 else None
            states = encoder(states, first, hooks, self.grad_checkpointing, shown)
            first = [n + len(b) for n, b in zip(first, encoder.blocks, strict=True)]
            if number in collect:
                collected[number] = states
        rows = zip(hooks, states, strict=True)
        return [r.pool(s) if r is not None else s for r, s in rows], collected

    def pool(self, states: States) -> list[Tensor]:
        """The final states to the normalised class token (B, D_i) of every branch, or to the mean
        of its patches where `global_pool` is "avg"."""
        rows = list(zip(self.norm, states, strict=True))
        if self.global_pool == "avg":
            return [mean_patch(norm(state.tokens), 1, state.sizes) for norm, state in rows]
        return [norm(state.tokens[:, 0]) for norm, state in rows]

    def classify(self, pooled: Sequence[Tensor], states: States | None = None) -> Tensor:
        """Features of `pool` to logits (B, K), the mean over the branches; side by side without a
        head. Of `states`, the final ones, a reducer may make something of a branch's logits."""
        logits = [h(self.head_drop(x)) for h, x in zip(self.head, pooled, strict=True)]
        if states is not None:
            rows = zip(self.reducers, states, logits, strict=True)
            logits = [r.decide(s, y) if r is not None else y for r, s, y in rows]
        if self.num_classes <= 0:
            return torch.cat(logits, dim=-1)
        return torch.stack(logits).mean(dim=0)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, in_chans, H, W). Logits (B, num_classes), the mean over the branches."""
        states, _ = self.run(self.embed(x))
        return self.classify(self.pool(states), states)

    # ------------------------------------------------------------------ timm's contract

    def forward_features(self, x: Tensor) -> list[Tensor]:
        """(B, C, H, W) to normalised tokens (B, 1 + N_i, D_i) of every branch."""
        states, _ = self.run(self.embed(x))
        return [norm(s.tokens) for norm, s in zip(self.norm, states, strict=True)]

    def forward_head(self, features: Sequence[Tensor], pre_logits: bool = False) -> Tensor:
        """Tokens of `forward_features` to logits, or to the class tokens side by side (B, sum
        D_i)."""
        mean = self.global_pool == "avg"
        pooled = [mean_patch(x, 1, None) if mean else x[:, 0] for x in features]
        if pre_logits:
            return torch.cat([self.head_drop(x) for x in pooled], dim=-1)
        return self.classify(pooled)

    def get_classifier(self) -> nn.ModuleList:
        """The heads, one per branch."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """New heads for `num_classes` (0: none) in every branch; pooling "token" or "avg"."""
        if global_pool is not None:
            _check_pooling(global_pool)
            self.global_pool = global_pool
        self.num_classes = num_classes
        self.head = self._heads(num_classes).to(next(self.parameters()))

    def no_weight_decay(self) -> set[str]:
        """Positions and class tokens; nothing where `authors_decay`."""
        if self.authors_decay:
            return set()
        return {
            f"{kind}.{i}" for kind in ("pos_embed", "cls_token") for i in range(len(self.grids))
        }

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that sort parameters by depth, one encoder a group."""
        return {
            "stem": r"^cls_token|pos_embed|patch_embed",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    def position_tables(self) -> dict[str, Table]:
        """Grids of the learned positions of every branch, by the names of the tables."""
        return {f"pos_embed.{i}": Table(grid, 1) for i, grid in enumerate(self.grids)}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass instead of keeping their activations."""
        self.grad_checkpointing = enable

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Maps (B, D_i, h_i, w_i) after every encoder, all of the finest branch first, then the
        next.

        Their strides, fractions of the input's pixels, stand in `feature_info`.
        """
        wanted, _ = feature_take_indices(len(self.feature_info), indices)
        places = [(self.feature_info[i]["branch"], self.feature_info[i]["encoder"]) for i in wanted]
        states, collected = self.run(self.embed(x), collect={encoder for _, encoder in places})
        maps = []
        for branch, encoder in places:
            state = collected[encoder][branch]
            if norm:
                state = state._replace(tokens=self.norm[branch](state.tokens))
            maps.append(as_map(state, output_fmt, return_prefix_tokens))
        if intermediates_only:
            return maps
        return [n(s.tokens) for n, s in zip(self.norm, states, strict=True)], maps

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the encoders that the maps `indices` do not need; returns the indices that name them
        now."""
        wanted, _ = feature_take_indices(len(self.feature_info), indices)
        old = [self.feature_info[i] for i in wanted]
        self.blocks = self.blocks[: 1 + max(info["encoder"] for info in old)]
        self.feature_info = self._feature_info()
        if prune_norm:
            self.norm = nn.ModuleList(nn.Identity() for _ in self.embed_dim)
        if prune_head:
            self.reset_classifier(0)
        places = [(info["branch"], info["encoder"]) for info in self.feature_info]
        return [places.index((info["branch"], info["encoder"])) for info in old]

    # ------------------------------------------------------------------ details

    def _heads(self, num_classes: int) -> nn.ModuleList:
        if num_classes <= 0:
            return nn.ModuleList(nn.Identity() for _ in self.embed_dim)
        return nn.ModuleList(nn.Linear(d, num_classes) for d in self.embed_dim).apply(init_linear)

    def _feature_info(self) -> list[dict[str, Any]]:
        strides = [self.img_size[0] / rows for rows, _ in self.grids]
        return [
            {
                "module": f"blocks.{encoder}.blocks.{branch}",
                "num_chs": self.embed_dim[branch],
                "reduction": strides[branch],
                "branch": branch,
                "encoder": encoder,
            }
            for branch in sorted(range(len(strides)), key=strides.__getitem__)
            for encoder in range(len(self.blocks))
        ]


def _check_shapes(count, patch_size, num_heads, mlp_ratio, depth, fusion) -> None:
    if count < 2:
        raise ValueError(f"{count} branch; CrossViT needs at least two (a ViT has one)")
    lengths = {"patch_size": patch_size, "num_heads": num_heads, "mlp_ratio": mlp_ratio}
    for name, values in lengths.items():
        if len(values) != count:
            raise ValueError(f"{name} has {len(values)} entries for {count} branches")
    for number, depths in enumerate(depth):
        if len(depths) != count + 1:
            raise ValueError(
                f"depth of encoder {number} has {len(depths)} entries; expected {count + 1}, one "
                "per branch and one for the fusion"
            )
    if fusion not in FUSIONS:
        raise ValueError(f"fusion {fusion!r}; expected one of {', '.join(FUSIONS)}")


def _check_pooling(global_pool: str) -> None:
    if global_pool not in ("token", "avg", ""):
        raise ValueError(f"global_pool {global_pool!r}; expected 'token' or 'avg'")


def _sizes(img_size, branch_sizes, patch_size, scales) -> tuple[tuple[int, int], tuple]:
    """The input that is expected, and the size of every branch."""
    if scales is None:
        scales = (FINE,) * (len(patch_size) - 1) + (1.0,)
    if img_size is None:
        fixed = branch_sizes or [round(224 * scale) for scale in scales]
        sizes = tuple(pair(size) for size in fixed)
        for size, patch in zip(sizes, patch_size, strict=True):
            if size[0] % patch or size[1] % patch:
                raise ValueError(
                    f"a branch of {size[0]}x{size[1]} is not made of patches of {patch}"
                )
        return max(sizes), sizes
    size = pair(img_size)
    rows = zip(patch_size, scales, strict=True)
    sizes = tuple(
        tuple(_nearest_multiple(side * scale, patch) for side in size) for patch, scale in rows
    )
    return size, sizes


def _nearest_multiple(length: float, patch: int) -> int:
    return max(1, int(length / patch + 0.5)) * patch


def _drop_paths(depth: Sequence[Sequence[int]], rate: float) -> list[list[float]]:
    """Linear over the longest branch and the fusion of every encoder."""
    counts = [max(1, max(d[:-1]) + d[-1]) for d in depth]
    return drop_rates(rate, counts)


def _stem(kind: str, in_chans: int, dim: int, patch_size: int) -> nn.Module:
    stems = {"patch": PatchEmbed, "dagger": DaggerStem, "t2t": T2TStem, "conv": ConvStem}
    if kind not in stems:
        raise ValueError(f"stem {kind!r}; expected one of {', '.join(stems)}")
    return stems[kind](in_chans, dim, patch_size)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: CrossViT) -> dict[str, Tensor]:
    """A released state dict, made to fit `model`: unwrapped, timm's names mended, positions
    resized."""
    state = {}
    for name, value in state_dict.get("model", state_dict).items():
        for kind in ("pos_embed", "cls_token"):
            name = name.replace(f"{kind}_", f"{kind}.")
        state[name] = value
    return resize_tables(state, model.position_tables())


def _variant(width: int, heads: int, blocks: int, ratio: float, **more: Any) -> dict[str, Any]:
    """A model of the paper: three encoders of one fine block and `blocks` coarse ones of twice the
    width."""
    return {
        "embed_dim": (width, 2 * width),
        "num_heads": (heads, heads),
        "depth": ((1, blocks, 0),) * 3,
        "mlp_ratio": (ratio, ratio),
        "branch_sizes": (240, 224),
        **more,
    }


DAGGER_384 = {"stem": "dagger", "branch_sizes": (408, 384)}
VARIANTS = {
    "crossvit_tiny_224": _variant(96, 3, 4, 4),
    "crossvit_small_224": _variant(192, 6, 4, 4),
    "crossvit_base_224": _variant(384, 12, 4, 4),
    "crossvit_9_224": _variant(128, 4, 3, 3),
    "crossvit_15_224": _variant(192, 6, 5, 3),
    "crossvit_18_224": _variant(224, 7, 6, 3),
    "crossvit_9_dagger_224": _variant(128, 4, 3, 3, stem="dagger"),
    "crossvit_15_dagger_224": _variant(192, 6, 5, 3, stem="dagger"),
    "crossvit_18_dagger_224": _variant(224, 7, 6, 3, stem="dagger"),
    "crossvit_15_dagger_384": _variant(192, 6, 5, 3, **DAGGER_384),
    "crossvit_18_dagger_384": _variant(224, 7, 6, 3, **DAGGER_384),
}


def _timm_name(name: str) -> str:
    """timm names the same weights after the size that goes in."""
    return name.replace("_224", "_240").replace("_384", "_408")


TIMM_NAMES = {_timm_name(name): arguments for name, arguments in VARIANTS.items()}


def _small(side: int, patches: tuple[int, int], width: int, depth: tuple) -> dict[str, Any]:
    """Ours, for small pictures: convolutional stem, both branches see the picture as it is."""
    return {
        "img_size": side,
        "patch_size": patches,
        "scales": (1.0, 1.0),
        "stem": "conv",
        "embed_dim": (width, 2 * width),
        "num_heads": (max(1, width // 32), max(1, width // 16)),
        "depth": depth,
        "mlp_ratio": (2.0, 2.0),
    }


SMALL = {
    "crossvit_micro_32": _small(32, (4, 8), 48, ((1, 1, 0),) * 2),
    "crossvit_mini_32": _small(32, (4, 8), 96, ((1, 3, 0),) * 3),
    "crossvit_mini_64": _small(64, (8, 16), 96, ((1, 3, 0),) * 3),
    "crossvit_mini_96": _small(96, (8, 16), 96, ((1, 3, 0),) * 3),
}


def _settings(name: str) -> Any:
    """Where the weights of a variant lie and how pictures are prepared for it."""
    arguments = VARIANTS.get(name) or SMALL[name]
    side = arguments["img_size"] if name in SMALL else arguments["branch_sizes"][0]
    first = ".proj" if arguments.get("stem", "patch") == "patch" else ".proj.0"
    more: dict[str, Any] = {}
    if name in VARIANTS:
        more["url"] = f"{RELEASE}/{name}.pth"
        more["hf_hub_id"] = f"timm/{_timm_name(name)}.in1k"
        more["license"] = "apache-2.0"
    if side == 240:
        more["crop_pct"] = 0.875
    branches = range(2)
    return settings(
        side,
        tuple(f"patch_embed.{i}{first}" for i in branches),
        tuple(f"head.{i}" for i in branches),
        **more,
    )


default_cfgs = generate_default_cfgs({name: _settings(name) for name in (*VARIANTS, *SMALL)})
LAST_MAPS = (2, 5)  # after the last of three encoders: the fine branch's map and the coarse one's
register(__name__, CrossViT, VARIANTS, checkpoint_filter_fn, out_indices=LAST_MAPS)
register(
    __name__,
    CrossViT,
    TIMM_NAMES,
    checkpoint_filter_fn,
    out_indices=LAST_MAPS,
    overlay={"fixed_input_size": False},
)
register(__name__, CrossViT, SMALL, checkpoint_filter_fn, out_indices=(-1,))
