"""timm's plain ViTs as our trunk: equal numbers, or a refusal by name."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer as Theirs
from torch import nn

import crosspatch as xp
from crosspatch.models.from_timm import Unconvertible, from_timm
from crosspatch.models.vit import VisionTransformer


def small(**arguments) -> nn.Module:
    torch.manual_seed(1)
    return Theirs(
        **{
            "img_size": 32,
            "patch_size": 8,
            "num_classes": 5,
            "embed_dim": 24,
            "depth": 2,
            "num_heads": 2,
            **arguments,
        }
    ).eval()


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"init_values": 0.1, "qk_norm": True},
        {"reg_tokens": 4, "no_embed_class": True},
        {"class_token": False, "global_pool": "avg"},
        {"pre_norm": True, "act_layer": "quick_gelu"},
        {"dynamic_img_size": True, "pos_embed": "none"},
        {"fc_norm": True, "qkv_bias": False, "proj_bias": False},
        {"drop_path_rate": 0.3, "drop_rate": 0.1, "pos_drop_rate": 0.2, "attn_drop_rate": 0.1},
        {"norm_layer": "layernorm", "act_layer": "gelu_tanh"},
    ],
)
def test_equal_numbers(arguments) -> None:
    theirs = small(**arguments)
    for parameter in theirs.parameters():
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    ours, image = from_timm(theirs), torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(ours(image), theirs(image), atol=1e-6)
    rates = [getattr(b.drop_path1, "drop_prob", 0) for b in ours.blocks]
    assert rates == [getattr(b.drop_path1, "drop_prob", 0) for b in theirs.blocks]
    dropouts = [m.p for m in ours.modules() if isinstance(m, nn.Dropout)]
    assert max(dropouts) == max(m.p for m in theirs.modules() if isinstance(m, nn.Dropout))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"global_pool": "map"}, "attn_pool is a AttentionPoolLatent"),
        ({"norm_layer": "rmsnorm"}, "RmsNorm"),
        ({"scale_attn_norm": True}, "a norm on the attention's output"),
        ({"pool_include_prefix": True, "global_pool": "avg"}, "pooling over prefix tokens"),
        ({"patch_drop_rate": 0.5}, "PatchDropout"),
    ],
)
def test_what_the_trunk_has_not_is_refused_by_name(arguments, reason) -> None:
    with pytest.raises(Unconvertible, match=reason):
        from_timm(small(**arguments))


def test_unknown_attributes_hooks_and_changed_forwards_are_refused() -> None:
    model = small()
    model.blocks[0].gain = 2.0
    with pytest.raises(Unconvertible, match=r"blocks\.0 has unknown attributes: gain"):
        from_timm(model)
    model = small()
    model.blocks[1].register_forward_hook(lambda module, args, out: out)
    with pytest.raises(Unconvertible, match=r"blocks\.1 has hooks"):
        from_timm(model)
    model = small()
    model.blocks[1].attn.scale = 0.5
    with pytest.raises(Unconvertible, match="another attention scale"):
        from_timm(model)


def test_the_probe_catches_what_the_lists_do_not() -> None:
    model = small()
    model.blocks[0].mlp.act.approximate = "none"
    model.blocks[0].norm1.eps = model.blocks[0].norm2.eps = 1e-6
    type_forward = timm.layers.Mlp.forward
    try:
        timm.layers.Mlp.forward = lambda self, x: 2 * type_forward(self, x)
        with pytest.raises(Unconvertible, match="one forward differs"):
            from_timm(model)
    finally:
        timm.layers.Mlp.forward = type_forward


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit3_small_patch16_224"])
def test_create_model_gives_the_trunk_for_plain_vits_of_timm(name: str) -> None:
    model = xp.create_model(name, num_classes=4, img_size=32)
    assert type(model) is VisionTransformer
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 4)


def test_create_model_gives_timms_own_for_relatives() -> None:
    model = xp.create_model("vit_base_patch16_siglip_224", img_size=32)
    assert type(model) is Theirs
