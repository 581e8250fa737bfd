"""Exchanged parts: all of them give the other picture's logits, one directly its own share."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from crosspatch.errors import UsageError
from crosspatch.explain import ablate, dla, head_svd, importance, patch, record
from crosspatch.explain.forward import Part, logits
from crosspatch.explain.patching import Direct, Exchange
from support.explainable import MODELS, crossvit, pictures, trunk

SOME = [
    "vit avg", "vit max", "vit of uneven blocks", "deit distilled", "lvvit", "resformer",
    "crossvit", "crossvit all", "crossvit class_token", "crossvit deep fusion",
]  # fmt: skip


@pytest.mark.parametrize("name", SOME)
def test_all_parts_of_the_other_picture_give_its_logits_exactly(name: str) -> None:
    model, clean, other = MODELS[name](), pictures(), pictures(seed=2)
    kept = record(model, other)
    with torch.no_grad():
        for parts in (kept.parts, list(kept.writes)):
            found = logits(model, clean, Exchange(kept.writes, parts))
            assert torch.equal(found, kept.logits)
            none = logits(model, clean, Exchange(kept.writes, []))
            assert torch.equal(none, record(model, clean).logits)


@pytest.mark.parametrize("name", SOME)
def test_direct_effects_are_differences_of_attributions(name: str) -> None:
    model, clean, other = MODELS[name]().double(), pictures().double(), pictures(seed=2).double()
    parts = [part for part in record(model, clean).parts if not part.constant]
    found = patch(model, clean, other, parts, a=0, b=1, effect="direct")
    mine = dla(model, clean, 0, 1)
    slopes, theirs = mine.slopes, record(model, other).writes
    own = record(model, clean).writes
    for i, part in enumerate(parts):
        change = slopes[part.whole][0] * (theirs[part.whole] - own[part.whole])
        change = change[:, part.head] if part.head >= 0 else change
        expected = change.flatten(1).sum(dim=1).numpy()
        assert found.patched[i] - found.clean == pytest.approx(expected, abs=1e-9)


def test_what_is_held_stays_in_a_direct_pass() -> None:
    model, clean, other = crossvit(), pictures(), pictures(seed=2)
    base, source = record(model, clean), record(model, other)

    class Seen(Direct):
        def hold(self, part: Part, value: torch.Tensor) -> torch.Tensor:
            changed.append(not torch.equal(value, self.kept.held[part]))
            return super().hold(part, value)

    changed: list[bool] = []
    part = Part("fine", "head", 0)
    with torch.no_grad():
        logits(model, clean, Seen(base, source.writes, [part]))
    assert any(changed)  # it would be another value, were it not held


def test_recovery_is_one_for_the_clean_picture_and_zero_for_the_corrupted_one() -> None:
    model, clean, other = crossvit(), pictures(), pictures(seed=2)
    found = patch(model, clean, other, a=0, b=1)
    assert found.recovery.shape == (len(found.parts), 3)
    same = patch(model, clean, clean, found.parts[:1], a=0, b=1)
    assert np.isnan(same.recovery).all()
    assert (same.patched == same.clean).all()
    back = patch(model, clean, other, found.parts[:3], a=0, b=1, into="corrupted")
    assert (back.clean == found.clean).all()
    assert not np.allclose(back.patched, found.patched[:3])


@pytest.mark.parametrize("name", ["vit", "crossvit"])
def test_ablations_differ_and_a_mean_over_one_picture_changes_nothing(name: str) -> None:
    model, images = MODELS[name](), pictures(4)
    kept = record(model, images)
    heads = [part for part in kept.parts if part.kind == "head"]
    found = {how: ablate(model, images, heads[:2], how=how) for how in ("resample", "mean", "zero")}
    for one in found.values():
        assert not torch.allclose(one, kept.logits)
    assert not torch.allclose(found["mean"], found["zero"])
    alone = ablate(model, images[:1], heads, how="mean", reference=images[:1])
    assert alone == pytest.approx(kept.logits[:1].numpy(), abs=1e-5)
    again = ablate(model, images, heads[:2], how="resample")
    assert torch.equal(again, found["resample"])


def test_nobody_is_given_its_own_by_resampling() -> None:
    model, images = trunk(), pictures(2)
    kept = record(model, images)
    found = ablate(model, images, kept.parts, how="resample")
    assert torch.equal(found, kept.logits.flip(0))


def test_a_head_that_writes_nothing_has_no_effect_and_ranks_last() -> None:
    model = trunk()
    width = model.blocks[1].attn.value_width // 3
    with torch.no_grad():
        model.blocks[1].attn.proj.weight[:, :width] = 0
    images, labels = pictures(6), torch.tensor([0, 1, 2, 3, 4, 0])
    ranked = dict(importance(model, images, labels))
    assert ranked[Part("", "head", 1, 0)] == 0
    assert sum(value != 0 for value in ranked.values()) == 8
    values = list(ranked.values())
    assert values == sorted(values, reverse=True)


@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_a_head_on_all_its_directions_is_the_head_and_on_none_it_is_not(which: str) -> None:
    model, images = trunk(), pictures(4)
    labels = record(model, images).logits.argmax(dim=1)
    whole = head_svd(model, images, 1, 2, which, rank=8, labels=labels)
    assert whole.accuracy == whole.before == whole.same == 1
    assert whole.change < 1e-5
    assert whole.kept == pytest.approx(1)
    none = head_svd(model, images, 1, 2, which, rank=0)
    assert none.change > 1e-4
    assert none.accuracy is None
    assert (np.diff(whole.spread) <= 0).all()


def test_a_fusion_has_heads_too() -> None:
    found = head_svd(crossvit(), pictures(), 1, 0, "v", rank=2, branch="fine", kind="fusion head")
    assert 0 < found.kept < 1


@pytest.mark.parametrize(
    "call",
    [
        lambda m, x: patch(m, x, x, [Part("", "head", 9, 0)], a=0),
        lambda m, x: patch(m, x, x, a=0, effect="both"),
        lambda m, x: patch(m, x, x, a=0, into="neither"),
        lambda m, x: ablate(m, x, [Part("", "head", 0, 7)]),
        lambda m, x: ablate(m, x, [Part("", "mlp", 0)], how="noise"),
        lambda m, x: ablate(m, x[:1], [Part("", "mlp", 0)]),
        lambda m, x: head_svd(m, x, 0, 0, "o"),
        lambda m, x: head_svd(m, x, 0, 3),
        lambda m, x: head_svd(m, x, 0, -1),
        lambda m, x: head_svd(m, x, 0, 0, rank=9),
    ],
)
def test_what_is_not_there_is_refused_in_three_parts(call) -> None:
    with pytest.raises(UsageError) as caught:
        call(trunk(), pictures())
    assert caught.value.expected
    assert caught.value.do
