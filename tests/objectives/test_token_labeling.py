"""Token labelling: its targets and loss, MixToken, the models that it trains."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import crosspatch as xp
from crosspatch.data.token_labels import About, Draft, State, strongest
from crosspatch.errors import UsageError
from crosspatch.layers.block import BlockSpec
from crosspatch.layers.box import Box, box
from crosspatch.layers.stage import StageSpec
from crosspatch.mixing import OneOf, draws
from crosspatch.mixing.mixtoken import draw
from crosspatch.mixing.mixup import Mixup
from crosspatch.objectives import Given, Inputs
from crosspatch.objectives.token_labeling import (
    Setting,
    TokenLabeling,
    class_target,
    dense_forward,
    token_label_loss,
    token_label_losses,
    token_label_target,
)
from crosspatch.tasks.classify import Classify
from crosspatch.tasks.multilabel import MultiLabel

CLASSES = ("a", "b", "c", "d", "e")
TASK = Classify(CLASSES)
SEED = torch.Generator().manual_seed(4)
IMAGES = torch.randn(4, 3, 32, 32, generator=SEED)
LABELS = torch.tensor([0, 3, 1, 4])
ITEMS = torch.tensor([2, 0, 5, 1])
IDENTITY = torch.eye(3)[None, :2].expand(4, -1, -1)
BOX = box(8, 8, 0.6, 3, 5)


def tiny(name="lvvit_micro_32", **arguments):
    torch.manual_seed(0)
    return xp.create_model(name, num_classes=5, **arguments)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    told = About(fingerprint="", keys="", classes=CLASSES, size=(32, 32), fit="crop", grid=(8, 8),
                 top=5)  # fmt: skip
    draft = Draft(tmp_path_factory.mktemp("labels") / "l.st", told, 6)
    logits = 3 * torch.randn(6, 5, 8, 8, generator=SEED)
    draft.write(np.arange(6), *strongest(logits, 5), State.LABELLED)
    return draft.finish()


def inputs(step: int = 0, warp=IDENTITY) -> Inputs:
    return Inputs(IMAGES, LABELS, (0, step, 0), 1 / 4, warp=warp, items=ITEMS)


# ---------------------------------------------------------------------- targets and loss


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 9), st.integers(1, 6), st.floats(0, 0.5))
def test_rows_are_softmax_with_smoothing_on_top(classes, patches, smoothing):
    whole, maps = torch.randn(3, classes), torch.randn(3, classes, patches)
    truth = torch.eye(classes)[torch.arange(3) % classes]
    target = token_label_target(truth, whole, maps, smoothing)
    assert target.shape == (3, classes, 2 + patches)
    assert torch.equal(target[:, :, 0], truth)
    off = smoothing / classes
    on = 1 - smoothing + off
    torch.testing.assert_close(target[:, :, 1], F.softmax(whole, 1) * on + off)
    torch.testing.assert_close(target[:, :, 2:], F.softmax(maps, 1) * on + off)
    total = target[:, :, 1:].sum(dim=1)
    torch.testing.assert_close(total, torch.full_like(total, 1 + off))


def by_hand(cls, patches, hole, target, w_cls, w_dense, truth):
    """The sheet's loss, picture by picture, in NumPy."""
    ce = lambda z, t: float(-(t * (z - np.log(np.exp(z).sum()))).sum())
    own = []
    for one in target:
        t = one[:, 1]
        if truth:
            rho = 0.5 if one[:, 0].argmax() == t.argmax() else 0.9
            t = rho * t + (1 - rho) * one[:, 0]
        own.append(t)
    own = np.array(own)
    if hole is not None:
        share = 1 - (hole.bottom - hole.top) * (hole.right - hole.left) / 4
        own = share * own + (1 - share) * own[::-1]
    first = np.mean([ce(z, t) for z, t in zip(cls, own, strict=True)])
    dense = [ce(patches[b, p], target[b, :, 2 + p]) for b in range(4) for p in range(4)]
    return w_cls * first + w_dense * np.mean(dense)


@pytest.mark.parametrize("hole", [None, Box(0, 1, 0, 2, 0.5), Box(0, 1, 1, 2, 0.75)])
@pytest.mark.parametrize("truth", [False, True])
def test_the_loss_is_the_sheet_s(hole, truth):
    rng = np.random.default_rng(0)
    cls, patches = rng.normal(size=(4, 5)), rng.normal(size=(4, 4, 5))
    one_hot = TASK.targets(LABELS, None, 0.1).numpy().astype(float)
    given = (one_hot, 3 * rng.normal(size=(4, 5)), rng.normal(size=(4, 5, 4)))
    given[1][0] = 4 * one_hot[0]
    given[1][1] = -4 * one_hot[1]
    target = token_label_target(*map(torch.from_numpy, given), smoothing=0.1).double()
    agree = (one_hot.argmax(1) == given[1].argmax(1)).mean()
    assert 0 < agree < 1
    found = token_label_loss(torch.from_numpy(cls), torch.from_numpy(patches), hole, target,
                             cls_weight=0.7, dense_weight=1.3, ground_truth=truth)  # fmt: skip
    expected = by_hand(cls, patches, hole, target.numpy(), 0.7, 1.3, truth)
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_without_maps_the_picture_s_label_is_repeated():
    cls, patches = torch.randn(4, 5), torch.randn(4, 9, 5)
    target = TASK.targets(LABELS, None, 0.1)
    repeated = torch.cat([target[:, :, None]] * 11, dim=2)
    for hole in (None, Box(0, 2, 0, 3, 1 / 3)):
        plain = token_label_losses(cls, patches, hole, target)
        for one, other in zip(plain, token_label_losses(cls, patches, hole, repeated), strict=True):
            torch.testing.assert_close(one, other)


def test_only_the_class_token_s_label_is_mixed():
    cls, patches = torch.randn(4, 5), torch.randn(4, 64, 5)
    target = torch.rand(4, 5, 66)
    plain = token_label_losses(cls, patches, None, target)
    mixed = token_label_losses(cls, patches, BOX, target)
    assert torch.equal(plain[1], mixed[1])
    assert not torch.allclose(plain[0], mixed[0])
    own = target[:, :, 1]
    expected = BOX.lam * own + (1 - BOX.lam) * own.flip(0)
    torch.testing.assert_close(class_target(target, BOX), expected)


# ---------------------------------------------------------------------- the objective


def test_the_objective_is_these_functions_on_the_store_s_maps(store):
    objective = TokenLabeling(tiny().eval(), TASK, smoothing=0.1, store=store).eval()
    given = inputs(5)
    out = objective(given, 0.0)
    hole = draw((8, 8), draws(0, 5, 0))
    assert 0 < hole.lam < 1
    maps = store.maps(ITEMS)
    target = token_label_target(TASK.targets(LABELS, None, 0.1), maps.mean((2, 3)),
                                maps.flatten(2), 0.1)  # fmt: skip
    dense = objective.model.forward_dense(IMAGES, hole)
    expected = token_label_loss(*dense, target)
    torch.testing.assert_close(out["loss"], expected, atol=1e-4, rtol=1e-4)
    parts = out["parts"]
    torch.testing.assert_close(parts["class"] + parts["patches"], out["loss"])
    assert not parts["class"].requires_grad


def test_a_mirrored_batch_has_mirrored_labels(store):
    objective = TokenLabeling(tiny(), TASK, smoothing=0.1, store=store)
    flip = torch.tensor([[[-1.0, 0, 0], [0, 1, 0]]]).expand(4, -1, -1)
    plain, mirrored = objective.target(inputs()), objective.target(inputs(warp=flip))
    grids = [t[:, :, 2:].unflatten(2, (8, 8)) for t in (plain, mirrored)]
    torch.testing.assert_close(grids[1], grids[0].flip(3), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(mirrored[:, :, :2], plain[:, :, :2], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(grids[0], grids[1], atol=1e-2)


def test_a_deeper_truth_a_picture_s_weight_and_the_options(store):
    rules = {"smoothing": 0.1, "mixer": None, "weights": (1.0, 2.0, 1.0, 3.0, 0.5), "deferred": 0.5}
    labels = {"path": str(store.path), "sha256": store.sha256}
    build = lambda options: TokenLabeling.build(tiny().eval(), TASK, rules, Given(options,
                                                labels=labels)).eval()  # fmt: skip
    plain, truth = build({"alpha": 0}), build({"alpha": 0, "truth": True})
    early, late = plain(inputs(), 0.0)["loss"], plain(inputs(), 0.6)["loss"]
    target = plain.target(inputs())
    terms = token_label_losses(*dense_forward(plain.model, IMAGES), target)
    counts = torch.tensor(rules["weights"])[LABELS]
    torch.testing.assert_close(early, sum(t.mean() for t in terms), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(late, sum((counts * t).mean() for t in terms), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(early, truth(inputs(), 0.0)["loss"])
    only = build({"alpha": 0, "cls": 0, "dense": 2})(inputs(), 0.0)
    torch.testing.assert_close(only["loss"], 2 * terms[1].mean(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["vit_micro_32", "crossvit_micro_32"])
def test_other_models_get_a_head_that_is_not_shipped(store, name):
    objective = TokenLabeling(tiny(name), TASK, smoothing=0.1, store=store)
    assert objective.aux is not None
    names = set(tiny(name).state_dict())
    assert set(objective.exported.state_dict()) == names == set(objective.averaged.state_dict())
    objective(inputs(1), 0.0)["loss"].backward()
    grads = {name: p.grad for name, p in objective.named_parameters()}
    assert all(g is not None and g.isfinite().all() for g in grads.values())
    assert grads["aux.weight"].abs().sum() > 0


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_a_plain_vit_computes_its_own_logits_and_mixes_as_lvvit_does(pool):
    model = tiny("vit_micro_32", global_pool=pool).eval()
    identity = torch.nn.Identity()
    with torch.no_grad():
        found = dense_forward(model, IMAGES, None, identity)
        torch.testing.assert_close(found.cls, model(IMAGES))
        tokens = model.fc_norm(model.forward_features(IMAGES)[:, 1:])
        torch.testing.assert_close(found.patches, tokens)
        whole = dense_forward(model, IMAGES, Box(0, 8, 0, 8, 0.0), identity)
        torch.testing.assert_close(whole.cls, found.cls.flip(0))
        torch.testing.assert_close(whole.patches, found.patches)
        mixed = dense_forward(model, IMAGES, BOX, identity)
        assert (mixed.cls - found.cls).abs().max() > 1e-3
    alone = StageSpec(64, (BlockSpec(heads=0, qk=0, value=0, hidden=96),) * 2)
    model = tiny("vit_micro_32", global_pool=pool, stages=(alone,)).eval()
    with torch.no_grad():  # no patch sees another: the way there and back changes nothing
        plain, mixed = (dense_forward(model, IMAGES, hole, identity) for hole in (None, BOX))
    torch.testing.assert_close(mixed.patches, plain.patches)


def test_a_reduced_student_still_has_logits_for_every_patch(store):
    reduced, _ = xp.reduce(tiny("vit_micro_32"), "tome", r=4)
    objective = TokenLabeling(reduced, TASK, store=store)
    out = objective(inputs(2), 0.0)
    out["loss"].backward()
    assert out["loss"].isfinite()


def test_crossvit_computes_its_own_logits():
    model = tiny("crossvit_micro_32").eval()
    with torch.no_grad():
        found = dense_forward(model, IMAGES, None, torch.nn.Linear(48, 5))
        torch.testing.assert_close(found.cls, model(IMAGES))
    assert found.patches.shape == (4, 64, 5)


# ---------------------------------------------------------------------- what cannot be


@pytest.mark.parametrize("options", [
    {"clss": 1}, {"cls": -1}, {"dense": "much"}, {"truth": 1}, {"alpha": float("nan")},
    {"cls": True}, {"alpha": float("inf")}, {"cls": 0, "dense": 0},
])  # fmt: skip
def test_options_are_checked(options):
    with pytest.raises(UsageError) as found:
        TokenLabeling.build(tiny(), TASK, {}, Given(options))
    assert found.value.do


def test_what_it_cannot_train_is_refused_with_the_reason(store):
    cases = (
        ("mixed pixels", tiny(), TASK, {"mixer": OneOf([Mixup(1.0)], [1.0])}),
        ("several labels", tiny(), MultiLabel(CLASSES), {}),
        ("token labels for a ResNet", tiny("resnet10t"), TASK, {"store": store}),
        ("without labels for a VisionTransformer", tiny("vit_micro_32"), TASK, {}),
        ("MixToken .* in a CrossViT", tiny("crossvit_micro_32"), TASK,
         {"store": store, "setting": Setting(alpha=1.0)}),
    )  # fmt: skip
    for match, model, task, more in cases:
        with pytest.raises(UsageError, match=match):
            TokenLabeling(model, task, **more)
    with pytest.raises(ValueError, match="want to know which pictures"):
        TokenLabeling(tiny(), TASK, store=store)(Inputs(IMAGES, LABELS, (0, 0, 0), 0.25), 0.0)
