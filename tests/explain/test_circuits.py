"""Parts of every explainable network add up to its logits; other networks are refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import crosspatch as xp
from crosspatch.errors import UsageError
from crosspatch.explain import circuits
from crosspatch.explain.circuits import attribute, dla
from crosspatch.explain.forward import Part, Watch, explainable, logits
from support.explainable import MODELS, crossvit, pictures, trunk
from support.reductions import tiny_host


@pytest.mark.parametrize("name", MODELS)
def test_contributions_add_up_to_the_logits(name: str) -> None:
    model, images = MODELS[name](), pictures()
    found = attribute(model, images)
    with torch.no_grad():
        said = model(images)
    summed = torch.from_numpy(found.values.sum(axis=1)).float()
    assert (summed - said).abs().max() <= 1e-5 * said.abs().max()
    assert found.error < 1e-10
    assert len(set(found.parts)) == len(found.parts) == found.values.shape[1]
    assert len({part.name for part in found.parts}) == len(found.parts)


@pytest.mark.parametrize("name", MODELS)
def test_the_pass_that_shows_its_parts_is_the_networks_own(name: str) -> None:
    model, images = MODELS[name](), pictures()
    with torch.no_grad():
        mine, own = logits(explainable(model), images, Watch()), model(images)
    assert (mine - own).abs().max() <= 1e-5 * own.abs().max()


def test_a_difference_of_two_classes_per_picture_is_the_difference_of_logits() -> None:
    model, images = crossvit(), pictures()
    with torch.no_grad():
        said = model(images)
    a, b = said.argmax(dim=1), said.argmin(dim=1)
    found = dla(model, images, a, b)
    whole = (said.gather(1, a[:, None]) - said.gather(1, b[:, None])).double().numpy()
    assert found.values.sum(axis=1) == pytest.approx(whole, rel=1e-5)
    means = [abs(mean) for _, mean, _ in found.table()]
    assert means == sorted(means, reverse=True)
    assert len(means) == len(found.parts)


def test_the_network_is_left_as_it_was() -> None:
    model = trunk().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    attribute(model, pictures())
    assert model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert next(model.parameters()).dtype == torch.float32


def test_a_sum_that_is_not_the_logits_is_never_given(monkeypatch) -> None:
    own = circuits.logits
    monkeypatch.setattr(circuits, "logits", lambda *a: own(*a) + own(*a).detach() * 1e-3)
    monkeypatch.setattr(circuits, "_gathered", lambda leaves, slopes: (
        (), torch.ones(3, 1, 5, dtype=torch.float64), {}
    ))  # fmt: skip
    with pytest.raises(ArithmeticError, match="add up to something else"):
        attribute(trunk(), pictures())


def test_parts_have_names_that_people_read() -> None:
    assert Part("fine", "head", 0, 1).name == "fine block 0 head 1"
    assert Part("coarse", "fusion head", 2, 3).name == "coarse fusion 2 head 3"
    assert Part("", "norm bias").name == "norm bias"


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (lambda: xp.create_model("convnext_micro_32", num_classes=5), "is not a sum of parts"),
        (lambda: xp.reduce(tiny_host(), "tome", r=2)[0], "tokens are reduced"),
        (lambda: trunk(num_classes=0), "no classifier"),
        (lambda: trunk(global_pool=""), "without pooling"),
        (lambda: xp.create_model("evo_levit_128s", num_classes=5), "is not a sum of parts"),
        (lambda: torch.nn.Linear(3, 3), "is not a sum of parts"),
    ],
)
def test_other_networks_are_refused_with_the_reason(model, why: str) -> None:
    with pytest.raises(UsageError, match=why) as caught:
        explainable(model())
    assert "--model crossvit_micro_32" in caught.value.do


def test_a_class_that_is_not_there_is_refused() -> None:
    for wrong in (5, -1):
        with pytest.raises(UsageError, match="number from 0 to 4"):
            dla(trunk(), pictures(), 0, wrong)


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.floats(-3, 3), min_size=5, max_size=5))
def test_contributions_are_linear_in_the_direction(seed: int, weights: list[float]) -> None:
    model, images = MODELS["crossvit"](), pictures(1, seed)
    every = attribute(model, images).values
    one = attribute(model, images, torch.tensor([weights], dtype=torch.float64)).values
    assert one[..., 0] == pytest.approx(every @ weights, abs=1e-9)
