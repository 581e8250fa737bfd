# SPDX-License-Identifier: Apache-2.0
"""A plain ViT of timm as our trunk: the same weights, the same numbers, or a refusal that says why.

Whatever timm's model holds must stand on an allow-list, module types and plain attributes alike, so
that a feature this trunk does not know can never be dropped silently; and one forward of both must
agree.
"""

from __future__ import annotations

from typing import Any

import crosspatch._torchvision  # noqa: F401

import timm.layers as tl
import torch
from timm.models import deit as timm_deit
from timm.models import vision_transformer as timm_vit
from torch import nn

from crosspatch.layers.block import BlockSpec
from crosspatch.layers.stage import StageSpec
from crosspatch.models.vit import VisionTransformer

ACTIVATIONS = {nn.GELU: "gelu", tl.GELUTanh: "gelu_tanh", tl.QuickGELU: "quick_gelu"}
PROBE_TOLERANCE = 1e-5

_MODEL = """attn_pool default_cfg distilled_training dynamic_img_size embed_dim feature_info
fix_init global_pool grad_checkpointing has_class_token head_hidden_size in_chans no_embed_class
num_classes num_features num_prefix_tokens num_reg_tokens pool_include_prefix pretrained_cfg
pretrained_model_args reg_token cls_token pos_embed weight_init_mode"""
_CONV = """dilation groups in_channels kernel_size out_channels output_padding padding padding_mode
stride transposed"""
_NORM = "elementwise_affine eps normalized_shape"

# module type -> names of its public attributes that are no parameter, buffer or module
KNOWN: dict[type, frozenset[str]] = {
    kind: frozenset(names.split()) | {"training"}
    for kind, names in {
        timm_vit.VisionTransformer: _MODEL,
        timm_deit.VisionTransformerDistilled: _MODEL,
        tl.PatchEmbed: "dynamic_img_pad flatten grid_size img_size num_patches output_fmt "
        "patch_size strict_img_size",
        timm_vit.Block: "",
        tl.Attention: "attn_dim fused_attn gate head_dim num_heads scale",
        tl.Mlp: "",
        tl.LayerNorm: _NORM,
        nn.LayerNorm: _NORM,
        tl.LayerScale: "init_values inplace",
        tl.DropPath: "drop_prob scale_by_keep",
        nn.GELU: "approximate",
        tl.GELUTanh: "",
        tl.QuickGELU: "",
        nn.Conv2d: _CONV,
        nn.Linear: "in_features out_features",
        nn.Dropout: "p inplace",
        nn.Identity: "",
        nn.Sequential: "",
    }.items()
}


class Unconvertible(ValueError):
    """timm's model has something that the trunk does not compute; the message names it."""


def from_timm(model: nn.Module) -> VisionTransformer:
    """Our trunk with the weights, stochastic depth and dropout of timm's `model`, which is
    untouched.

    Raises Unconvertible naming the module, attribute or value that is not known, or where one
    forward of random images differs by more than 1e-5.
    """
    _check_known(model)
    arguments = _arguments(model)
    ours = VisionTransformer(**arguments)
    ours.load_state_dict(model.state_dict(), strict=True)
    _carry_drop_paths(model, ours)
    for name in ("pretrained_cfg", "default_cfg"):
        setattr(ours, name, getattr(model, name, None))
    like = next(model.parameters())
    ours.to(like).train(model.training)
    ours.distilled_training = getattr(model, "distilled_training", False)
    ours.grad_checkpointing = model.grad_checkpointing
    _probe(model, ours, like)
    return ours


def _check_known(model: nn.Module) -> None:
    for name, module in model.named_modules():
        where = name or "the model"
        known = KNOWN.get(type(module))
        if known is None:
            raise Unconvertible(f"{where} is a {type(module).__name__}, which the trunk has not")
        unknown = {key for key in vars(module) if not key.startswith("_")} - known
        if unknown:
            raise Unconvertible(f"{where} has unknown attributes: {', '.join(sorted(unknown))}")
        if any(hooks for key, hooks in vars(module).items() if key.endswith("_hooks")):
            raise Unconvertible(f"{where} has hooks")


def _arguments(model: Any) -> dict[str, Any]:
    embed, first = model.patch_embed, model.blocks[0]
    _require(model.attn_pool is None, "attention pooling")
    _require(not model.pool_include_prefix, "pooling over prefix tokens")
    _require(not embed.dynamic_img_pad, "padding of the input")
    _require(isinstance(embed.norm, nn.Identity), "a norm in the patch embedding")
    _require(not hasattr(model, "patch_drop") or _is_identity(model.patch_drop), "patch dropout")
    distilled = getattr(model, "dist_token", None) is not None
    norms = [m for m in model.modules() if isinstance(m, nn.LayerNorm)]
    return {
        "img_size": embed.img_size,
        "patch_size": embed.patch_size,
        "in_chans": embed.proj.in_channels,
        "num_classes": model.num_classes,
        "global_pool": model.global_pool,
        "stages": (StageSpec(model.embed_dim, tuple(_spec(b) for b in model.blocks)),),
        "qkv_bias": first.attn.qkv.bias is not None,
        "qk_norm": not _is_identity(first.attn.q_norm),
        "proj_bias": first.attn.proj.bias is not None,
        "init_values": _one("LayerScale", {_layer_scale(b) for b in model.blocks}),
        "class_token": model.cls_token is not None,
        "dist_token": distilled,
        "reg_tokens": model.num_reg_tokens if not distilled else 0,
        "pos_embed": "learn" if model.pos_embed is not None else "none",
        "no_embed_class": model.no_embed_class,
        "pre_norm": not _is_identity(model.norm_pre),
        "final_norm": not (_is_identity(model.norm) and _is_identity(model.fc_norm)),
        "fc_norm": not _is_identity(model.fc_norm),
        "dynamic_img_size": model.dynamic_img_size,
        "drop_rate": model.head_drop.p,
        "pos_drop_rate": model.pos_drop.p,
        "proj_drop_rate": _one("dropout", {b.attn.proj_drop.p for b in model.blocks}),
        "attn_drop_rate": _one("attention dropout", {b.attn.attn_drop.p for b in model.blocks}),
        "norm_eps": _one("LayerNorm eps", {norm.eps for norm in norms}),
        "act_layer": ACTIVATIONS[_one("activation", {type(b.mlp.act) for b in model.blocks})],
    }


def _spec(block: Any) -> BlockSpec:
    attn = block.attn
    _require(attn.gate is None, "gated attention")
    _require(_is_identity(attn.norm), "a norm on the attention's output")
    _require(_is_identity(block.mlp.norm), "a norm inside the MLP")
    _require(getattr(block.mlp.act, "approximate", "none") == "none", "an approximate GELU")
    _require(abs(attn.scale - attn.head_dim**-0.5) < 1e-12, "another attention scale")
    return BlockSpec(attn.num_heads, attn.attn_dim, attn.attn_dim, block.mlp.fc1.out_features)


def _layer_scale(block: Any) -> float | None:
    return None if _is_identity(block.ls1) else 1.0  # the value itself comes with the weights


def _is_identity(module: nn.Module) -> bool:
    return isinstance(module, nn.Identity)


def _require(condition: bool, feature: str) -> None:
    if not condition:
        raise Unconvertible(f"the model has {feature}, which the trunk has not")


def _one(what: str, values: set) -> Any:
    if len(values) > 1:
        raise Unconvertible(f"the {what} differs between blocks: {sorted(map(str, values))}")
    return values.pop()


def _carry_drop_paths(theirs: Any, ours: Any) -> None:
    for source, target in zip(theirs.blocks, ours.blocks, strict=True):
        for name in ("drop_path1", "drop_path2"):
            rate = getattr(getattr(source, name), "drop_prob", 0.0)
            setattr(target, name, tl.DropPath(rate) if rate > 0 else nn.Identity())


def _probe(theirs: nn.Module, ours: VisionTransformer, like: torch.Tensor) -> None:
    if like.is_meta:
        return
    image = torch.linspace(-2, 2, ours.in_chans * ours.img_size[0] * ours.img_size[1])
    image = image.sin().reshape(1, ours.in_chans, *ours.img_size).to(like)
    states = [(m, m.training) for m in (theirs, ours)]
    with torch.no_grad():
        expected, got = (m.eval()(image) for m in (theirs, ours))
    for module, training in states:
        module.train(training)
    error = (got - expected).abs().max() / expected.abs().max().clamp(min=1e-12)
    tolerance = PROBE_TOLERANCE if like.dtype == torch.float32 else 0.05
    if not error <= tolerance:
        raise Unconvertible(f"one forward differs by {float(error):.1e} relative to timm's")
