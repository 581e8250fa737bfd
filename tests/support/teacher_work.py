"""What the processes of a team do in `test_teacher`: each function runs in all of them."""

from __future__ import annotations

from crosspatch.data.loading import train_batches
from crosspatch.data.prepare import prepare
from crosspatch.training import team
from crosspatch.training.objective import make_objective
from crosspatch.training.stepper import FABRIC_PRECISION, Stepper
from crosspatch.training.teacher import find_teacher
from support.tiny import Stripes, tiny_recipe


def losses(teacher: str) -> dict[str, list[float]]:
    """The losses of four steps of each objective that has a teacher, computed in float64: what
    is left between one process and two is then not a matter of how a processor rounds."""
    FABRIC_PRECISION["fp32"] = "64-true"
    return {name: _losses(name, teacher) for name in ("distill", "scalekd")}


def _losses(name: str, teacher: str) -> list[float]:
    recipe = tiny_recipe(
        model="vit_micro_32", size=(32, 32), store=(36, 36), mix=(), mix_prob=(), mix_alpha=(),
        objective=name, teacher=find_teacher(teacher), devices=team.size(), steps=4,
    )  # fmt: skip
    images = prepare(Stripes(), recipe.preprocess).images
    objective = make_objective(recipe, images.classes)
    objective.teacher.module.double()
    stepper = Stepper(recipe, objective)
    found = []
    batches = train_batches(
        images, recipe.batch, epoch=0, seed=0, rank=team.rank(), world=team.size()
    )
    for step, batch in zip(range(4), batches, strict=False):
        stepper.reset_loss()
        stepper.step(batch, 0, step)
        found.append(float(stepper.loss_sum))
    return found
