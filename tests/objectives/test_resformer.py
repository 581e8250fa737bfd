"""Training at several sizes: the golden loss, the equation by hand, mixing that agrees."""

from __future__ import annotations

from itertools import pairwise

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import crosspatch as xp
from crosspatch.errors import UsageError
from crosspatch.mixing import OneOf, draws
from crosspatch.mixing.cutmix import Cutmix
from crosspatch.mixing.deit import BatchCutmix, BatchMixup
from crosspatch.mixing.mixup import Mixup
from crosspatch.objectives import Given, Inputs
from crosspatch.objectives.resformer import LOSSES, TARGETS, MultiSize, consistency, whiten
from crosspatch.objectives.supervised import Supervised
from crosspatch.tasks.classify import Classify
from support import goldens

TASK = Classify("abcde")
LABELS = torch.tensor([0, 3, 1, 4])
RULES = {"smoothing": 0.0, "mixer": None, "weights": (), "deferred": 0.0}


def images(side: int, seed: int = 0, count: int = 4) -> torch.Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def inputs(*sides: int, step: int = 0) -> Inputs:
    first, *rest = [images(side, number) for number, side in enumerate(sides)]
    return Inputs(first, LABELS, (0, step, 0), 1 / 4, views=tuple(rest))


def model():
    torch.manual_seed(0)
    return xp.create_model("resformer_micro_32", num_classes=5, depth=2, stem="patch")


def drawn(size, count, seed):
    return goldens.Golden({"size": size, "batch": count, "channels": 1, "seed": seed}, {}).images


def test_the_loss_is_the_authors() -> None:
    golden = goldens.read("resformer/consistency_loss")
    teacher, student = (drawn((8, 8), 4, seed).reshape(4, 64) for seed in (0, 1))
    found = consistency(student, teacher).mean()
    assert float(found) == pytest.approx(float(golden.outputs["out"]), rel=1e-5)
    labels = torch.tensor([0, 3, 7, 9])
    total = F.cross_entropy(drawn((2, 5), 4, 2).reshape(4, 10), labels) + found
    assert float(total) == pytest.approx(float(golden.outputs["total"]), rel=1e-5)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("loss", LOSSES)
def test_each_size_learns_from_the_next_larger_one(loss: str, target: str) -> None:
    objective = MultiSize(model(), TASK, alpha=0.5, loss=loss, target=target)
    given = inputs(32, 24, 16)
    found = objective(given, 0.5)
    net, features, labelled = objective.model, [], 0.0
    for pictures in (given.images, *given.views):
        tokens = net.forward_features(pictures)
        logits = net(pictures)
        of = {"class": tokens[:, 0], "mean": tokens[:, 1:].mean(1), "logits": logits}
        features.append(of[target])
        labelled += F.cross_entropy(logits, LABELS)
    apart = 0.0
    for teacher, student in pairwise(features):
        wanted = (
            teacher if target == "logits" else F.layer_norm(teacher, teacher.shape[1:], eps=1e-6)
        )
        apart += {
            "smooth-l1": lambda s, t: F.smooth_l1_loss(s, t),
            "l2": lambda s, t: F.mse_loss(s, t),
            "cosine": lambda s, t: 1 - F.cosine_similarity(s, t).mean(),
            "kl": lambda s, t: F.kl_div(s.log_softmax(1), t.softmax(1), reduction="batchmean"),
        }[loss](student, wanted)
    torch.testing.assert_close(found["loss"], (labelled + 0.5 * apart) / 3)
    torch.testing.assert_close(found["parts"]["consistency"], apart / 2, rtol=1e-4, atol=1e-6)


def test_the_teacher_gets_no_gradient() -> None:
    student, teacher = (torch.randn(4, 6, requires_grad=True) for _ in range(2))
    consistency(student, teacher).sum().backward()
    assert teacher.grad is None
    assert student.grad is not None
    assert torch.allclose(whiten(teacher).var(1, unbiased=False), torch.ones(4), atol=1e-4)


def test_one_size_is_the_labels_alone() -> None:
    net = model()
    one, plain = MultiSize(net, TASK)(inputs(32), 0), Supervised(net, TASK)(inputs(32), 0)
    torch.testing.assert_close(one["loss"], plain["loss"])
    assert one["parts"] == {}


MIXERS = [Mixup(), Cutmix(), BatchMixup(), BatchCutmix(), OneOf([Cutmix(), Mixup()], [0.5, 0.3])]


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(MIXERS),
    st.integers(0, 10_000), st.integers(24, 64), st.integers(8, 24),
)  # fmt: skip
def test_every_size_is_mixed_alike(mixer, step, large, small) -> None:
    """The same partners, and the share and the box of the largest, to the rounding of pixels."""
    found = [mixer(images(side), draws(5, step))[1] for side in (large, small)]
    if found[0] is None:
        assert found[1] is None
        return
    one, two = found
    assert torch.equal(one.partner, two.partner)
    if one.mask is None:
        assert torch.equal(one.lam, two.lam)
        return
    for axis in (2, 3):
        for a, b in zip(one.mask, two.mask, strict=True):
            spans = []
            for mask in (a[0], b[0]):
                hole = (mask == 0).any(dim=3 - axis).nonzero().flatten()
                length = mask.shape[axis - 2]
                spans.append((hole[0] / length, (hole[-1] + 1) / length) if len(hole) else None)
            if spans[0] is None or spans[1] is None:
                continue
            for x, y in zip(*spans, strict=True):
                assert abs(x - y) <= 2.5 / small
    assert (one.lam - two.lam).abs().max() <= 6 / small


def test_mixed_sizes_share_the_labels_of_the_largest() -> None:
    net = model()
    mixer = OneOf([BatchMixup()], [1.0])
    given = inputs(32, 16, step=3)
    found = MultiSize(net, TASK, mixer=mixer, alpha=0)(given, 0)
    parts = []
    for pictures in (given.images, *given.views):
        mixed, mixing = mixer(pictures, draws(*given.draw))
        parts.append(TASK.loss(net(mixed), TASK.targets(LABELS, mixing, 0.0, None)).mean())
    torch.testing.assert_close(found["loss"], sum(parts) / 2)


@pytest.mark.parametrize("name", ["lvvit_micro_32", "vit_micro_32", "resnet18", "convnext_atto"])
def test_other_networks_of_several_sizes(name: str) -> None:
    torch.manual_seed(0)
    extra = {"dynamic_img_size": True} if "micro" in name else {}
    net = xp.create_model(name, num_classes=5, **extra)
    found = MultiSize(net, TASK)(inputs(64, 32) if "micro" not in name else inputs(32, 16), 0)
    found["loss"].backward()
    assert found["parts"]["consistency"] > 0
    assert all(p.grad is not None for p in net.parameters())


def test_what_cannot_be_is_refused() -> None:
    build = lambda net, **options: MultiSize.build(net, TASK, RULES, Given(options))
    assert build(model(), alpha=2, loss="kl", target="logits").alpha == 2
    for wrong in ({"alpha": -1}, {"alpha": "much"}, {"loss": "l3"}, {"target": "all"}, {"beta": 1},
                  {"alpha": float("nan")}):  # fmt: skip
        with pytest.raises(UsageError, match="smooth-l1"):
            build(model(), **wrong)
    with pytest.raises(UsageError, match="resizes everything"):
        build(xp.create_model("crossvit_micro_32", num_classes=5))
    with pytest.raises(UsageError, match="token reduction"):
        build(xp.reduce(xp.create_model("vit_micro_32", num_classes=5), "tome", r=2)[0])
    means = MultiSize(timm.create_model("resnet18", num_classes=5), TASK, target="mean")
    with pytest.raises(UsageError, match="without patch tokens"):
        means(inputs(32, 16), 0)
