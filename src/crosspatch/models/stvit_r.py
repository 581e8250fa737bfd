# SPDX-License-Identifier: Apache-2.0
"""STViT-R on Swin: most of the third stage runs on a handful of semantic tokens and comes back.

"Making Vision Transformers Efficient from A Token Sparsification View", Chang, Wang, Lin, Wang,
Zhang, Shou, arXiv 2303.08685, CVPR 2023.

    stem: X = Hardswish(BN(conv3x3/2)), twice                        H/4 x W/4
    stages 1, 2, 4: Swin blocks, every second one shifted            `layers/windows.py`
    stage 3: dumbbell units of six blocks                            `stvit_r_units.py`
    merging of 2x2 tokens after stages 1, 2, 3;  logits = head(mean(LN X))

A unit makes 36 semantic tokens of the 196 of a 14x14 map, runs four blocks on them, and lets the
map read them: the backbone still delivers maps of every stage.

Departures: sizes that windows do not divide are padded and masked, where the authors'
classification code takes 14x14 maps alone; a semantic relative bias stands in blocks 3 and 4, whose
queries are their keys; `semantic_token2` and the bias tables are resized for other sizes. What the
sheet leaves open in the detection code: block 4 reads all semantic tokens, and these are not
masked where their cell of the map is padding (they have read what is near).

Expected (M parameters, GMACs at 224; Swin's own in brackets): tiny 28.32, 3.60
(4.5); small 49.63, 5.80 (8.7; the sheet has 5.83); base 87.81, 10.23 (15.4).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import crosspatch._torchvision  # noqa: F401

import torch
from timm.models import generate_default_cfgs
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from crosspatch.layers.first_weights import init_linear
from crosspatch.layers.patch_embed import pair
from crosspatch.layers.position import Table, resize_tables
from crosspatch.layers.stage import drop_rates, one_a_stage
from crosspatch.layers.windows import (
    PatchMerging,
    Size,
    SwinBlock,
    WindowAttention,
    counts,
    fit_bias_table,
    fitted,
    half,
)
from crosspatch.models.registry import register, settings, unwrapped
from crosspatch.models.stvit_r_stages import ConvEmbed, SemanticStage, SwinStage
from crosspatch.models.stvit_r_units import UNIT, SemanticAttention, SemanticSpec

BORDERS = ("shifted", "padded")
CLASSIFY = (10, None, None)  # tokens that blocks 1, 2 and 5 read around a window, itself included
DETECT = (14, 21, 27)
STRIDES = {2: (2, 1), 4: (2, 2)}  # of the stem's convolutions


class STViTR(nn.Module):
    """The network; argument names are Swin's and the authors' where they have one.

    img_size: the side or (H, W) that windows are laid out for; pictures of any size run.
    patch_size: 4, or 2 for small pictures. semantic_stage: the stage (0-based) of dumbbell units,
    whose depth is a multiple of 6. semantic_tokens: t, for t x t tokens in a window.
    neighbourhoods: the side of what blocks 1, 2 and 5 of a unit read, in tokens (semantic ones in
    block 5), None for everything. released: the defaults of the released weights, all switches off;
    False takes the authors' class default for new training (`use_global`), and padded borders.
    use_global, use_conv_pos, relative_pos, shortcut: the switches: centres G, position convolution,
    relative bias of semantic tokens, residual of block 1. layer_scale: first value, None for none.
    borders: "shifted" moves the neighbourhoods of block 1 inwards where the map is two windows high
    and wide (14x14), as the released weights know it; "padded" masks padding there as elsewhere.
    detection: the authors' detection code: neighbourhoods of 14, 21 and 27, the shortcut, windows
    never cut, Swin's padding seen, and maps each with a norm of its own (`norm0`, ...), the last of
    which stands for `norm` (the others learn from maps only).
    Raises ValueError for shapes that do not agree.
    """

    layers: nn.ModuleList

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int | tuple[int, int] = 7,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        semantic_stage: int = 2,
        semantic_tokens: int = 3,
        neighbourhoods: Sequence[int | None] | None = None,
        released: bool = True,
        use_global: bool | None = None,
        use_conv_pos: bool = False,
        relative_pos: bool = False,
        shortcut: bool | None = None,
        layer_scale: float | None = 1e-5,
        borders: str | None = None,
        detection: bool = False,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        borders = borders or ("shifted" if released and not detection else "padded")
        _check(patch_size, depths, num_heads, semantic_stage, borders, global_pool)
        norm = partial(nn.LayerNorm, eps=norm_eps)
        self.img_size, self.patch_size, self.detection = pair(img_size), patch_size, detection
        self.in_chans, self.num_classes, self.global_pool = in_chans, num_classes, global_pool
        self.embed_dim, self.grad_checkpointing = embed_dim, False
        widths = [embed_dim * 2**i for i in range(len(depths))]
        self.num_features = self.head_hidden_size = widths[-1]
        self.feature_info = [
            {"module": f"layers.{i}", "num_chs": width, "reduction": patch_size * 2**i}
            for i, width in enumerate(widths)
        ]

        common = {
            "mlp_ratio": mlp_ratio,
            "qkv_bias": qkv_bias,
            "attn_drop": attn_drop_rate,
            "proj_drop": proj_drop_rate,
            "norm": norm,
        }
        semantic = {
            "tokens": semantic_tokens,
            "append": not detection,
            "shortcut": detection if shortcut is None else shortcut,
            "use_conv_pos": use_conv_pos,
            "relative_pos": relative_pos,
            "layer_scale": layer_scale,
        }
        near = tuple(neighbourhoods or (DETECT if detection else CLASSIFY))
        kernel = near[0] if borders == "shifted" else None
        centres = not released if use_global is None else use_global
        rates = drop_rates(drop_path_rate, depths)

        self.patch_embed = ConvEmbed(in_chans, embed_dim, STRIDES[patch_size])
        stages = []
        for i, (mine, heads, width) in enumerate(zip(rates, num_heads, widths, strict=True)):
            size = counts(self.img_size, patch_size * 2**i)
            window = pair(window_size) if detection else fitted(window_size, size)
            swin = partial(
                SwinBlock, width, heads, window, size=size, mask_padding=not detection, **common
            )
            merging = PatchMerging(width, norm=norm) if i + 1 < len(depths) else None
            if i == semantic_stage:
                around = _margins(near, pair(window_size), semantic_tokens)
                spec = SemanticSpec(size, window, **around, kernel=kernel, **semantic, **common)
                stages.append(SemanticStage(swin, width, heads, spec, mine, merging, bool(centres)))
            else:
                shift = (window[0] // 2, window[1] // 2) if detection else half(window, size)
                stages.append(SwinStage(swin, shift, mine, merging))
        self.layers = nn.ModuleList(stages)
        if detection:
            for i, width in enumerate(widths):
                self.add_module(f"norm{i}", norm(width))
        self.norm = nn.Identity() if detection else norm(widths[-1])
        self.head_drop = nn.Dropout(drop_rate)
        self.head = _classifier(self.num_features, num_classes)
        self.apply(init_linear)

    # ------------------------------------------------------------------ timm's contract

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) to the normalised map of the last stage, (B, h, w, C)."""
        return self._normed(self._run(x, (), len(self.layers))[0])

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The map of `forward_features` to logits, or to the features before the classifier."""
        if self.global_pool == "avg":
            x = x.mean(dim=(1, 2))
        elif self.global_pool == "max":
            x = x.amax(dim=(1, 2))
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, in_chans, H, W). Logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head for `num_classes` (0: none), and another pooling if given."""
        if global_pool is not None:
            _check_pooling(global_pool)
            self.global_pool = global_pool
        self.num_classes = num_classes
        like = next(self.parameters())
        self.head = _classifier(self.num_features, num_classes).to(like)

    def no_weight_decay(self) -> set[str]:
        """Bias tables and global centres."""
        kinds = ("relative_position_bias_table", "semantic_token2")
        return {name for name, _ in self.named_parameters() if name.endswith(kinds)}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that sort parameters by depth, for layer-wise rates."""
        fine = [
            (r"^layers\.(\d+)\.semantic_token2", (1,)),
            (r"^layers\.(\d+)\.blocks\.(\d+)", None),
            (r"^layers\.(\d+)\.downsample", (99998,)),
            (r"^norm", (99999,)),
        ]
        return {"stem": r"^patch_embed", "blocks": r"^layers\.(\d+)" if coarse else fine}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass instead of keeping their activations."""
        self.grad_checkpointing = enable

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """The maps of the stages `indices` before merging, (B, C, h, w) or "NHWC", and the final
        map.

        norm: the last map normalised; with `detection` all are, always. Strides are
        `feature_info`'s; an odd side is rounded up. Raises ValueError for another format.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt {output_fmt!r}; expected NCHW or NHWC")
        wanted, deepest = feature_take_indices(len(self.layers), indices)
        depth = deepest + 1 if stop_early and intermediates_only else len(self.layers)
        x, collected = self._run(x, wanted, depth)
        maps = []
        for number in wanted:
            found = collected[number]
            if self.detection or (norm and number == len(self.layers) - 1):
                found = self._normed(found, number)
            maps.append(found.permute(0, 3, 1, 2).contiguous() if output_fmt == "NCHW" else found)
        return maps if intermediates_only else (self._normed(x), maps)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages that the maps `indices` do not need; returns the indices kept."""
        wanted, deepest = feature_take_indices(len(self.layers), indices)
        for number in range(deepest + 1, len(self.layers)):
            if self.detection:
                delattr(self, f"norm{number}")
        if prune_norm or deepest + 1 < len(self.layers):
            self.norm = nn.Identity()
        self.layers = self.layers[: deepest + 1]
        last: Any = self.layers[-1]
        last.downsample = None
        if prune_head:
            self.reset_classifier(0, "")
        return wanted

    # ------------------------------------------------------------------ details

    def _run(
        self, x: Tensor, collect: Sequence[int], depth: int
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """The map of the last of `depth` stages, and those of the stages in `collect`."""
        x, collected = self.patch_embed(x), {}
        stages: Any = self.layers[:depth]
        for number, stage in enumerate(stages):
            if number:
                x = stages[number - 1].downsample(x)
            x = stage(x, self.grad_checkpointing and torch.is_grad_enabled())
            if number in collect:
                collected[number] = x
        return x, collected

    def _normed(self, x: Tensor, number: int | None = None) -> Tensor:
        number = len(self.layers) - 1 if number is None else number
        return getattr(self, f"norm{number}")(x) if self.detection else self.norm(x)


def _margins(near: Sequence[int | None], window: Size, tokens: int) -> dict[str, Size | None]:
    """What blocks 1, 2 and 5 read beyond a window on each side: floor((k - w) / 2)."""
    if len(near) != 3 or near[0] is None:
        raise ValueError(f"neighbourhoods {near}; expected three, of which the first is a number")
    groups = (window, window, (tokens, tokens))
    margins = [
        None if k is None else (max(0, k - h) // 2, max(0, k - w) // 2)
        for k, (h, w) in zip(near, groups, strict=True)
    ]
    return dict(zip(("generate", "refine", "recover"), margins, strict=True))


def _classifier(dim: int, num_classes: int) -> nn.Module:
    if num_classes <= 0:
        return nn.Identity()
    head = nn.Linear(dim, num_classes)
    init_linear(head)
    return head


def _check(patch_size, depths, num_heads, semantic_stage, borders, global_pool) -> None:
    if patch_size not in STRIDES:
        raise ValueError(f"patch_size {patch_size}; the stem takes 2 or 4")
    one_a_stage(len(depths), num_heads=num_heads)
    if not 0 <= semantic_stage < len(depths) or depths[semantic_stage] % UNIT:
        raise ValueError(
            f"depths {tuple(depths)} with semantic_stage {semantic_stage}; expected a stage whose "
            f"depth is a multiple of {UNIT}, the blocks of a dumbbell unit"
        )
    if borders not in BORDERS:
        raise ValueError(f"borders {borders!r}; expected one of {', '.join(BORDERS)}")
    _check_pooling(global_pool)


def _check_pooling(global_pool: str) -> None:
    if global_pool not in ("", "avg", "max"):
        raise ValueError(f"global_pool {global_pool!r}; expected '', 'avg' or 'max'")


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: STViTR) -> dict[str, Tensor]:
    """A released state dict, made to fit `model`.

    Unwrapped (a detector's too, of which the backbone is taken), without the authors' buffers, bias
    tables and global centres resized where they belong to squares of another size.
    """
    state = unwrapped(state_dict)
    made = ("attn_mask", "relative_position_index")
    state = {name: value for name, value in state.items() if not name.endswith(made)}
    for name, module in model.named_modules():
        key = f"{name}.relative_position_bias_table"
        if isinstance(module, WindowAttention | SemanticAttention) and module.window is not None:
            state |= {key: fit_bias_table(state[key], module.window)} if key in state else {}
        if isinstance(module, SemanticStage):
            centres = {f"{name}.semantic_token2": Table(module.spec.grid, 0)}
            state = resize_tables(state, centres)
    return state


def _variant(width: int, heads: int, depth: int) -> dict[str, Any]:
    return {
        "embed_dim": width,
        "depths": (2, 2, depth, 2),
        "num_heads": tuple(heads * 2**i for i in range(4)),
    }


VARIANTS = {
    "stvit_r_swin_tiny": _variant(96, 3, 6),  # ours: Swin-T's shape, one unit
    "stvit_r_swin_small": _variant(96, 3, 18),
    "stvit_r_swin_base": _variant(128, 4, 18),
}
# Ours, for small pictures: 16 semantic tokens of 64, in the second of three stages.
SMALL = {
    "stvit_r_micro_32": {
        "img_size": 32,
        "patch_size": 2,
        "embed_dim": 32,
        "depths": (2, 6, 2),
        "num_heads": (1, 2, 4),
        "window_size": 4,
        "mlp_ratio": 2.0,
        "semantic_stage": 1,
        "semantic_tokens": 2,
        "neighbourhoods": (6, None, None),
        "released": False,
    }
}
default_cfgs = generate_default_cfgs(
    {
        name: settings(SMALL.get(name, {}).get("img_size", 224), "patch_embed.proj.0.c", "head")
        for name in (*VARIANTS, *SMALL)
    }
)
register(__name__, STViTR, VARIANTS, checkpoint_filter_fn, out_indices=(0, 1, 2, 3))
register(__name__, STViTR, SMALL, checkpoint_filter_fn, out_indices=(0, 1, 2))
