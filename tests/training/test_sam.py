"""Sharpness-aware steps: the gradient at the top of the neighbourhood, and nothing else changed."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from crosspatch.data.loading import train_batches
from crosspatch.errors import UsageError
from crosspatch.training import plan
from crosspatch.training.objective import make_objective
from crosspatch.training.sam import ascent, sharpness_aware
from crosspatch.training.stepper import Stepper
from support.loops import Spoil, Stop, halt, same


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=8), st.floats(0.01, 1))
def test_the_ascent_has_the_length_of_the_radius_whatever_the_scale(values, rho):
    gradient = torch.tensor(values)
    if gradient.norm() < 1e-3:
        return
    found = torch.cat(ascent([gradient[:1], gradient[1:]], rho))
    assert float(found.norm()) == pytest.approx(rho, rel=1e-4)
    torch.testing.assert_close(torch.cat(ascent([gradient * 65536], rho)), found)


def test_no_gradient_and_a_gradient_that_is_not_finite_give_no_step():
    assert torch.equal(ascent([torch.zeros(3)], 0.1)[0], torch.zeros(3))
    assert torch.equal(ascent([torch.tensor([1.0, math.inf])], 0.1)[0], torch.zeros(2))
    assert torch.equal(ascent([torch.tensor([1.0, math.nan])], 0.1)[0], torch.zeros(2))


def test_the_gradient_is_that_at_the_top_and_the_weights_come_back():
    """On f(w) = sum a w^2 / 2 the gradient at w + e is a (w + rho g / |g|)."""
    module = torch.nn.Linear(4, 1, bias=False)
    module.register_buffer("seen", torch.zeros(()))
    curve, weights = torch.tensor([[1.0, 2.0, 3.0, 4.0]]), module.weight.detach().clone()

    def again():
        module.seen += 1
        (curve * module.weight.square() / 2).sum().backward()

    again()
    sharpness_aware(module, 0.5, again)
    slope = curve * weights
    torch.testing.assert_close(module.weight.grad, curve * (weights + 0.5 * slope / slope.norm()))
    assert torch.equal(module.weight, weights)
    assert float(module.seen) == 1


def steps(recipe, images, count=3):
    torch.set_num_threads(1)
    stepper = Stepper(recipe, make_objective(recipe, images.classes))
    batches = train_batches(images, recipe.batch, epoch=0, seed=recipe.seed)
    for step, batch in zip(range(count), batches, strict=False):
        stepper.step(batch, 0, step)
    return stepper


def test_a_tiny_radius_is_the_usual_step_for_both_passes_draw_the_same(images, recipe):
    """Dropout, drop path, mixing and statistics included: else the gradients would differ."""
    usual = replace(recipe, drop_path=0.2, mix_prob=(0.5, 0.5), ema=0.05)
    plain, tiny = steps(usual, images), steps(replace(usual, sam=1e-30), images)
    wide = steps(replace(usual, sam=0.5), images)
    first, second, third = (one.objective.state_dict() for one in (plain, tiny, wide))
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, msg=name)
    assert int(second["model.norm.num_batches_tracked"]) == 3
    assert not torch.allclose(third["model.head.weight"], first["model.head.weight"])
    assert float(plain.loss_sum) == pytest.approx(float(tiny.loss_sum), rel=1e-6)


def test_a_stopped_run_ends_bit_for_bit_as_one_that_was_not(recipe, train):
    use = replace(recipe, sam=0.05, drop_path=0.1)
    whole, _ = train("whole", use=use)
    with pytest.raises(type(halt())):
        train("cut", Stop(at=9, error=halt()), use=use)
    again, _ = train("cut", resume=True, use=use)
    same(whole, again)
    plain, _ = train("plain", use=replace(use, sam=0.0))
    with pytest.raises(AssertionError):
        same(whole, plain)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_loss_that_is_not_finite_still_lowers_the_rate(monkeypatch, recipe, train, what):
    Spoil(monkeypatch, at=11, most=0.6, what=what)
    told = Stop()
    run, outcome = train("spoilt", told, use=replace(recipe, sam=0.05))
    assert outcome.steps == recipe.steps
    assert [one for one in told.messages if "step 7" in one], told.messages
    assert f",{what}," in (run.path / "nan.csv").read_text()


@pytest.mark.parametrize("rho", [0, -0.1, math.nan, math.inf])
def test_a_radius_that_is_none_is_refused(rho, make_recipe):
    with pytest.raises(UsageError, match="sam"):
        plan.check_overrides({"sam": rho})
    if rho != 0:
        with pytest.raises(UsageError, match="sam"):
            make_recipe(sam=rho)


def test_the_plan_says_what_it_costs(monkeypatch):
    from types import SimpleNamespace

    from crosspatch.training.machine import look

    shape = (SimpleNamespace(median_side=32, aspect=1.0), 100, 3, look())
    recipe, reasons = plan.plan(*shape, {"sam": 0.05})
    assert recipe.sam == 0.05
    assert any("about twice as long" in one for one in reasons)
    assert not any("Sharpness" in one for one in plan.plan(*shape, {})[1])
