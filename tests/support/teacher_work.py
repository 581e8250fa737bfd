"""What the processes of a team do in `test_teacher`: each function runs in all of them."""

from __future__ import annotations

from crosspatch.data.loading import train_batches
from crosspatch.data.prepare import prepare
from crosspatch.training import team
from crosspatch.training.objective import make_objective
from crosspatch.training.stepper import Stepper
from crosspatch.training.teacher import find_teacher
from support.tiny import Stripes, tiny_recipe


def losses(teacher: str) -> dict[str, list[float]]:
    """The losses of four steps of each objective that has a teacher."""
    return {name: _losses(name, teacher) for name in ("distill", "scalekd")}


def _losses(name: str, teacher: str) -> list[float]:
    recipe = tiny_recipe(
        model="vit_micro_32", size=(16, 16), store=(18, 18), mix=(), mix_prob=(), mix_alpha=(),
        objective=name, teacher=find_teacher(teacher), devices=team.size(), steps=4,
    )  # fmt: skip
    images = prepare(Stripes(), recipe.preprocess).images
    stepper = Stepper(recipe, make_objective(recipe, images.classes))
    found = []
    batches = train_batches(
        images, recipe.batch, epoch=0, seed=0, rank=team.rank(), world=team.size()
    )
    for step, batch in zip(range(4), batches, strict=False):
        stepper.reset_loss()
        stepper.step(batch, 0, step)
        found.append(float(stepper.loss_sum))
    return found
