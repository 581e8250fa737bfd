"""What the pages of the seams add, entered where they say, is known by its name."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import crosspatch as xp
from crosspatch.errors import UsageError
from crosspatch.objectives import Inputs
from crosspatch.tokens import spec
from crosspatch.training import objective
from support.pages import DOCS, blocks
from support.tiny import tiny_recipe


@pytest.fixture
def page(request: pytest.FixtureRequest) -> SimpleNamespace:
    """The names that the first block of a page defines: the paper's own."""
    source = blocks(DOCS / "seams" / f"{request.param}.md")[0]
    names: dict[str, Any] = {"__name__": "page"}
    exec(compile(source.text, source.where, "exec"), names)
    return SimpleNamespace(**names)


@pytest.mark.parametrize("page", ["tokens"], indirect=True)
def test_a_reduction_that_is_entered(page: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "crosspatch.tokens.loudest", page)
    monkeypatch.setitem(spec.METHODS, "loudest", "loudest:Loudest")
    method, options = spec.parse("loudest:keep=0.25")
    small, saved = xp.reduce(xp.create_model("vit_micro_32", num_classes=3), method, **options)
    assert small(torch.zeros(2, 3, 32, 32)).shape == (2, 3)
    assert [block.leaving for block in saved.blocks] == [65, 17, 17, 17]
    with pytest.raises(UsageError, match="above 0 and at most 1"):
        xp.reduce(xp.create_model("vit_micro_32"), "loudest", keep=0)


@pytest.mark.parametrize("page", ["mixing"], indirect=True)
@pytest.mark.parametrize("shape", [(1, 3, 4, 4), (5, 3, 3, 8), (4, 3, 6, 1)])
def test_a_mixing_keeps_what_it_says(page: Any, shape: tuple[int, ...]) -> None:
    from crosspatch.mixing import draws

    images = torch.rand(shape)
    mixed, (partner, lam, mask, _) = page.Halves()(images, draws(0, 7))
    assert torch.equal(mixed, page.Halves()(images, draws(0, 7))[0])
    assert mask.shape == (shape[0], 1, *shape[2:])
    torch.testing.assert_close(lam, mask.mean(dim=(1, 2, 3)))
    torch.testing.assert_close(mixed, mask * images + (1 - mask) * images[partner])


@pytest.mark.parametrize("page", ["objectives"], indirect=True)
def test_an_objective_that_is_entered(page: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "crosspatch.objectives.focal", page)
    monkeypatch.setitem(objective.OBJECTIVES, "focal", "focal:Focal")
    name, options = objective.resolve_objective({"objective": "focal:gamma=0"})
    recipe = tiny_recipe(
        model="vit_micro_32", objective=name, objective_args=options, mix=(), mix_prob=(),
        mix_alpha=(), drop_path=0.0,
    )  # fmt: skip
    ours = objective.make_objective(recipe, ("a", "b"))
    plain = objective.Supervised(ours.model, ours.task, smoothing=recipe.smoothing)
    inputs = Inputs(torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 1, 0]), (0, 0, 0), 1 / 4)
    torch.testing.assert_close(ours(inputs, 0.0)["loss"], plain(inputs, 0.0)["loss"])
    with pytest.raises(UsageError, match="gama"):
        objective.rehearse(tiny_recipe(objective="focal", objective_args={"gama": 1}), ("a",))


@pytest.mark.parametrize("page", ["tasks"], indirect=True)
def test_grades_are_soft_around_the_truth(page: Any) -> None:
    soft = page.Grades("abcd").targets(torch.tensor([1, 3]), None, 0.0)
    torch.testing.assert_close(soft.sum(dim=1), torch.ones(2))
    assert soft.argmax(dim=1).tolist() == [1, 3]
    assert soft[1, 2] > soft[1, 1] > soft[1, 0]
