# SPDX-License-Identifier: Apache-2.0
"""Labels that follow the attention, in the supervised objective."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import crosspatch as xp
from crosspatch.mixing import OneOf, draws, mixpro
from crosspatch.mixing.mixpro import MaskMix, attention_share, trust
from crosspatch.mixing.transmix import TransMix
from crosspatch.models.class_row import logits_and_class_rows
from crosspatch.objectives import Inputs, supervised
from crosspatch.objectives.supervised import Supervised
from crosspatch.tasks.classify import Classify

TASK = Classify("abc")
WEIGHTS = (0.5, 1.0, 1.5)


def inputs(count: int = 6) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, 3, 32, 32, generator=generator)
    return Inputs(images, torch.arange(count) % 3, (0, 4, 0), 1 / count)


def micro(name: str = "vit_micro_32"):
    torch.manual_seed(0)
    return xp.create_model(name, num_classes=3, img_size=32)


@pytest.mark.parametrize("weights", [(), WEIGHTS])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_progressive_labels_written_out(smoothing, weights):
    model, given, mixer = micro(), inputs(), MaskMix(cell=8, progressive=True)
    objective = Supervised(
        model, TASK, smoothing=smoothing, mixer=OneOf([mixer], [1.0]), weights=weights
    )
    found = objective(given, 0.0)["loss"]

    rng = draws(*given.draw)
    rng.random()  # which mixing
    images, mixing = mixer(given.images, rng)
    logits, (row,) = logits_and_class_rows(model, images)
    share = attention_share(row.attention, mixing.mask[:, 0, ::4, ::4].flatten(1))
    r, own, other = mixing.lam[0], given.labels, given.labels[mixing.partner]
    hard = F.one_hot(torch.stack([own, other]), 3) * (1 - smoothing) + smoothing / 3
    alpha = trust(r * hard[0] + (1 - r) * hard[1], logits)
    lam = alpha * share + (1 - alpha) * r
    scale = torch.tensor(weights or (1.0, 1.0, 1.0))
    ce = [F.cross_entropy(logits, y, reduction="none") * scale[y] for y in (own, other)]
    wanted = (lam * ce[0] + (1 - lam) * ce[1]).mean()
    assert found.item() == pytest.approx(wanted.item(), rel=1e-5)
    gradients = [torch.autograd.grad(x, model.head.weight)[0] for x in (found, wanted)]
    assert torch.allclose(*gradients, atol=1e-6)


def test_transmix_written_out():
    model, given, mixer = micro(), inputs(), TransMix()
    found = Supervised(model, TASK, smoothing=0.1, mixer=OneOf([mixer], [1.0]))(given, 0.0)["loss"]
    rng = draws(*given.draw)
    rng.random()
    images, mixing = mixer(given.images, rng)
    logits, (row,) = logits_and_class_rows(model, images)
    share = attention_share(row.attention, mixing.mask[:, 0, ::4, ::4].flatten(1))
    lam = (share + mixing.lam) / 2
    soft = F.one_hot(given.labels, 3) * 0.9 + 0.1 / 3
    wanted = TASK.loss(logits, lam[:, None] * soft + (1 - lam[:, None]) * soft.flip(0)).mean()
    assert found.item() == pytest.approx(wanted.item(), rel=1e-5)


@pytest.mark.parametrize("name", ["lvvit_micro_32", "crossvit_micro_32"])
@pytest.mark.parametrize("mixer", [MaskMix(cell=8, progressive=True), TransMix()])
def test_every_parameter_that_learnt_by_area_learns_by_attention(name, mixer):
    model, given = micro(name), inputs()
    objective = Supervised(model, TASK, mixer=OneOf([mixer], [1.0]))
    objective(given, 0.0)["loss"].backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None]
    assert missing == []
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("mixer", [MaskMix(cell=8), MaskMix(cell=8, progressive=True), TransMix()])
def test_by_any_rule_processes_ask_each_other_as_often(mixer, monkeypatch):
    """Each draws a mixing of its own: one that asked more often would wait for the others."""
    asked, plain = [], supervised.mean_weight
    monkeypatch.setattr(supervised, "mean_weight", lambda w: asked.append(1) or plain(w))
    objective = Supervised(micro(), TASK, mixer=OneOf([mixer], [1.0]), weights=WEIGHTS)
    objective.weighted_mean = True
    objective(inputs(), 0.0)["loss"].backward()
    assert len(asked) == 1


def test_one_pass_makes_logits_and_attention(monkeypatch):
    model, given = micro(), inputs()
    passes, embed = [], model.embed
    monkeypatch.setattr(model, "embed", lambda x, **how: passes.append(1) or embed(x, **how))
    mixer = OneOf([MaskMix(cell=8, progressive=True)], [1.0])
    Supervised(model, TASK, mixer=mixer)(given, 0.0)
    assert len(passes) == 1


@pytest.mark.long
def test_the_longer_it_learns_the_more_the_attention_counts(monkeypatch):
    """The scaled-down check: ever more labels by which the attention counts for more than half."""
    from sklearn.datasets import load_digits

    scans = load_digits()
    pictures = torch.from_numpy(np.kron(scans.images[:640] / 8 - 1, np.ones((4, 4)))).float()
    pictures, labels = pictures[:, None].expand(-1, 3, -1, -1), torch.from_numpy(scans.target)
    torch.manual_seed(0)
    model = xp.create_model("vit_micro_32", num_classes=10, depth=2)
    mixer = OneOf([MaskMix(cell=8, progressive=True)], [1.0])
    objective = Supervised(model, Classify(scans.target_names), smoothing=0.1, mixer=mixer)
    alphas, plain = [], mixpro.trust
    monkeypatch.setattr(mixpro, "trust", lambda *a: alphas.append(plain(*a)) or alphas[-1])
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
    grown = []
    for epoch in range(6):
        alphas.clear()
        for number, part in enumerate(torch.arange(640).split(64)):
            step = (0, 10 * epoch + number, 0)
            batch = Inputs(pictures[part], labels[part], step, 1 / 64)
            optimiser.zero_grad()
            objective(batch, epoch / 6)["loss"].backward()
            optimiser.step()
        grown.append((torch.cat(alphas) > 0.5).float().mean().item())
    assert grown[-1] > grown[2] > grown[0] + 0.05
