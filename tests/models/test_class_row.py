# SPDX-License-Identifier: Apache-2.0
"""The class token's attention beside the logits: the authors' numbers, and what the map shows."""

from __future__ import annotations

import pytest
import torch

import crosspatch as xp
from crosspatch.layers.tokens import TokenState, over_patches
from crosspatch.models.class_row import logits_and_class_rows, why_no_class_row
from support import goldens

TINY = {"num_classes": 5, "img_size": 32}


def batch(count: int = 3, side: int = 32) -> torch.Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0))


def test_logits_and_attention_are_mixpros():
    wanted = goldens.read("mixpro/deit_tiny_patch14_attn")
    model = xp.create_model("deit_tiny_patch16_224", num_classes=10, patch_size=14).eval()
    xp.load_released(model, wanted.state_dict)
    with torch.no_grad():
        logits, (row,) = logits_and_class_rows(model, wanted.images)
    assert goldens.relative_error(logits, wanted.outputs["logits"]) < 1e-5
    assert goldens.relative_error(row.attention, wanted.outputs["attn"]) < 1e-5
    assert row[1:] == ((16, 16), (224, 224))


class Spy:
    """Keeps the input of a block's attention."""

    def __init__(self, attn):
        self.attn, self.seen = attn, None
        attn.qkv.register_forward_pre_hook(lambda _, args: setattr(self, "seen", args[0]))

    def row(self, prefix: int) -> torch.Tensor:
        q, k = self.attn.qk(self.seen)
        return self.attn.map(q, k)[:, :, 0, prefix:].mean(dim=1)


@pytest.mark.parametrize(
    ("name", "more", "prefix"),
    [("vit_micro_32", {}, 1), ("vit_micro_32", {"dist_token": True, "reg_tokens": 2}, 4),
     ("lvvit_micro_32", {}, 1), ("vit_micro_32", {"qk_norm": True, "num_heads": 4}, 1)],
)  # fmt: skip
def test_the_row_is_that_of_the_map_and_the_logits_are_the_models(name, more, prefix):
    model = xp.create_model(name, **TINY, **more).eval()
    spy = Spy(model.blocks[-1].attn)
    model.blocks[-2].register_forward_hook(lambda *args: None)
    logits, (row,) = logits_and_class_rows(model, batch())
    model.forward_features(batch())  # the whole last block, whose projection the spy sees
    wanted = spy.row(prefix)
    assert row.attention.shape == (3, 64)
    assert row[1:] == ((8, 8), (32, 32))
    assert torch.allclose(row.attention, wanted, atol=1e-6)
    assert not row.attention.requires_grad
    assert logits.requires_grad
    assert torch.equal(logits, model(batch()))


@pytest.mark.parametrize("name", ["vit_micro_32", "lvvit_micro_32", "crossvit_micro_32"])
def test_training_is_the_same_with_and_without_the_row(name):
    """Dropout, drop path and gradients included; and with recomputed blocks too."""
    found = []
    for way in ("plain", "row", "recomputed"):
        torch.manual_seed(0)
        more = {} if name != "vit_micro_32" else {"proj_drop_rate": 0.1}
        model = xp.create_model(name, **TINY, drop_path_rate=0.2, attn_drop_rate=0.1, **more)
        model.train().set_grad_checkpointing(way == "recomputed")
        torch.manual_seed(1)
        logits = model(batch()) if way == "plain" else logits_and_class_rows(model, batch())[0]
        logits.logsumexp(dim=1).sum().backward()
        found.append((logits, *(p.grad for p in model.parameters() if p.grad is not None)))
    for other in found[1:]:
        assert len(other) == len(found[0])
        assert all(torch.allclose(x, y, atol=1e-5) for x, y in zip(found[0], other, strict=True))


def test_crossvit_has_a_row_over_every_branch():
    model = xp.create_model("crossvit_micro_32", **TINY).eval()
    logits, rows = logits_and_class_rows(model, batch())
    assert torch.equal(logits, model(batch()))
    assert [row.grid for row in rows] == [model.grids[1], model.grids[0]]
    for row in rows:
        assert row.attention.shape == (3, row.grid[0] * row.grid[1])
        assert row.extent == (32, 32)
        share = row.attention.sum(dim=1)  # the rest is the class token's own
        assert ((share > 0.5) & (share < 1)).all()
    attn = model.blocks[-1].fusion[0].attn
    x = torch.randn(2, 9, attn.wq.in_features)
    folded = attn.class_row(x)
    attn.folded = False
    assert torch.allclose(folded, attn.class_row(x), atol=1e-6)


@pytest.mark.parametrize("method", ["tome", "evovit", "patch-drop"])
def test_a_reduced_model_gives_its_row_over_the_full_grid(method):
    options = {"tome": {"r": 8}, "evovit": {"keep": 0.5}, "patch-drop": {}}[method]
    model, _ = xp.reduce(xp.create_model("vit_micro_32", **TINY), method, **options)
    for mode in (False, True):
        model.train(mode)
        torch.manual_seed(0)
        logits, (row,) = logits_and_class_rows(model, batch())
        torch.manual_seed(0)
        assert torch.equal(logits, model(batch()))
        assert row.attention.shape == (3, 64)
        assert (row.attention.sum(dim=1) < 1 + 1e-5).all()
        assert (row.attention.sum(dim=1) > 0.3).all()


def test_a_tokens_part_is_shared_by_its_patches():
    source = torch.tensor([[1, 1, 2, -1]])
    state = TokenState(torch.zeros(1, 3, 2), None, source, 1, (2, 2))
    shared = over_patches(state, torch.tensor([[0.1, 0.6, 0.3]]))
    assert torch.allclose(shared, torch.tensor([[0.3, 0.3, 0.3, 0.0]]))
    whole = over_patches(state._replace(source=None), torch.tensor([[0.1, 0.6, 0.3]]))
    assert torch.allclose(whole, torch.tensor([[0.6, 0.3]]))


def test_a_prefix_of_the_grid_is_what_the_row_covers():
    model = xp.create_model("vit_micro_32", num_classes=5, patch_size=8, stem="patch",
                            img_size=30).eval()  # fmt: skip
    _, (row,) = logits_and_class_rows(model, batch(side=30))
    assert row[1:] == ((3, 3), (24, 24))


@pytest.mark.parametrize(
    ("name", "more", "reason"),
    [("resnet18", {}, "no class token"), ("vit_micro_32", {"global_pool": "avg"}, "mean of its"),
     ("crossvit_micro_32", {"global_pool": "avg"}, "mean of its"),
     ("crossvit_micro_32", {"fusion": "none"}, "cross-attention")],
)  # fmt: skip
def test_others_say_why_not(name, more, reason):
    size = {} if name == "resnet18" else {"img_size": 32}
    model = xp.create_model(name, num_classes=5, **size, **more)
    assert reason in (why_no_class_row(model) or "")
    with pytest.raises(ValueError, match=reason):
        logits_and_class_rows(model, batch())


def test_a_replaced_or_shared_last_block_says_why_not():
    micro = xp.create_model("vit_micro_32", **TINY)
    mctf, _ = xp.reduce(micro, "mctf", r=4)
    assert "MCTF replaces" in (why_no_class_row(mctf) or "")
    psvit, _ = xp.reduce(micro, "psvit", share=[3])
    assert "earlier block" in (why_no_class_row(psvit) or "")
