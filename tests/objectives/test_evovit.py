"""Evo-ViT's objective: two heads, and layers that are stages for two thirds of a training."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import crosspatch as xp
from crosspatch.objectives import Inputs
from crosspatch.objectives.evovit import TwoHeads, both_heads
from crosspatch.objectives.supervised import Supervised
from crosspatch.tasks.classify import Classify
from crosspatch.tokens.evovit import EvoViT
from crosspatch.tokens.host import attach, branch_names, hosts_of
from support.reductions import pictures, tiny_crossvit, tiny_host

LABELS = torch.tensor([0, 3, 4])
TASK = Classify("abcde")


def reduced(model=None, **options):
    """As `xp.reduce` makes it, without the count of multiply-adds, which takes longer."""
    torch.manual_seed(0)
    model = tiny_host() if model is None else model
    skipped = {i for i, name in enumerate(branch_names(model)) if options.pop(name, 0) is None}
    hosts = enumerate(hosts_of(model))
    attach(model, [None if i in skipped else EvoViT(host, **options) for i, host in hosts])
    return model


def inputs(scale: float = 1 / 3) -> Inputs:
    return Inputs(pictures(), LABELS, (0, 0, 0), scale)


def test_the_loss_is_the_mean_of_both_heads():
    model = reduced(tiny_host(global_pool="avg"), second_head=True)
    objective = TwoHeads(model, TASK, smoothing=0.1)
    found = objective(inputs(), 0.9)
    state, _ = model.run(model.embed(pictures()))
    logits = [model(pictures()), model.reducer.head_cls(model.reducer.norm_cls(state.tokens[:, 0]))]
    wanted = [F.cross_entropy(one, LABELS, label_smoothing=0.1).item() for one in logits]
    assert found["loss"].item() == pytest.approx(sum(wanted) / 2, rel=1e-5)
    assert [one.item() for one in found["parts"].values()] == pytest.approx(wanted, rel=1e-5)
    found["loss"].backward()
    assert all(p.grad is not None for p in model.parameters())
    assert objective(inputs(2 / 3), 0.9)["loss"].item() == pytest.approx(sum(wanted), rel=1e-5)


@pytest.mark.parametrize("second_head", [False, True])
def test_two_thirds_of_the_training_are_layer_wise(second_head):
    options = {"second_head": second_head, "normalise": True}
    model = reduced(**options).train()
    objective = TwoHeads(model, TASK)
    layers = reduced(**options, stagewise=False).train()
    layers.load_state_dict(model.state_dict())
    early, late = (objective(inputs(), p)["loss"].item() for p in (0.66, 0.67))
    assert early == pytest.approx(TwoHeads(layers, TASK)(inputs(), 1.0)["loss"].item(), rel=1e-6)
    assert late == pytest.approx(objective(inputs(), 1.0)["loss"].item(), rel=1e-6)
    assert early != pytest.approx(late, rel=1e-4)


def test_nothing_is_left_on_the_model():
    model = reduced(second_head=True).eval()
    with torch.no_grad():
        before = model(pictures())
        TwoHeads(model, TASK)(inputs(), 0.1)
        assert torch.equal(model(pictures()), before)
    assert model.reducer.stagewise
    objective = TwoHeads(model, TASK)
    assert objective.exported is model
    assert set(dict(objective.named_parameters())) == {
        f"model.{name}" for name, _ in model.named_parameters()
    }


def test_without_a_second_head_the_loss_is_the_supervised_one():
    model = reduced().train()
    found = TwoHeads(model, TASK, smoothing=0.1)(inputs(), 1.0)
    wanted = Supervised(model, TASK, smoothing=0.1)(inputs(), 1.0)
    assert found["loss"].item() == pytest.approx(wanted["loss"].item(), rel=1e-6)
    assert found["parts"] == {}


def test_the_branches_of_a_crossvit():
    for options in ({"second_head": True}, {"second_head": True, "fine": None}):
        model = reduced(tiny_crossvit(), **options).train()
        found = TwoHeads(model, TASK)(inputs(), 0.2)
        found["loss"].backward()
        names = [n for n, p in model.named_parameters() if "head_cls" in n and p.grad is not None]
        assert len(names) == (2 if "fine" in options else 4)
        first, second = both_heads(model.eval(), pictures(), layerwise=False)
        torch.testing.assert_close(first, model(pictures()))
        assert second.shape == first.shape


def test_another_model_is_refused():
    with pytest.raises(ValueError, match="without evovit"):
        TwoHeads(tiny_host(), TASK)
    with pytest.raises(ValueError, match="without evovit"):
        TwoHeads(xp.reduce(tiny_host(), "tome", r=2)[0], TASK)
