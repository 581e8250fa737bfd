# SPDX-License-Identifier: Apache-2.0
"""`--teacher RUN|NAME`: which network a run learns from, and whether it can teach it.

The teacher is found and looked at before a picture is read; the recipe keeps its path and hash, so
that a run that is gone on with learns from the very same.
"""

from __future__ import annotations

from pathlib import Path

from crosspatch.errors import DataError, UsageError
from crosspatch.objectives.teacher import Scale, Teacher
from crosspatch.training.package import WEIGHTS, file_hash, load_model, model_folder
from crosspatch.training.pictures import Pictures
from crosspatch.training.recipe import Recipe
from crosspatch.training.weights import Found, refuse_seen


def find_teacher(asked: str) -> dict[str, str]:
    """What a recipe keeps of the teacher that was asked for.

    Raises UsageError or DataError for one that is not there or cannot be read.
    """
    path = Path(asked).expanduser()
    if not path.is_dir():
        raise UsageError(
            f"there is no run {asked}", "the folder of a trained run", "correct --teacher"
        )
    folder = model_folder(path)
    load_model(folder)
    record = {"kind": "run", "where": asked, "path": str(folder.resolve())}
    return record | {"sha256": file_hash(folder / WEIGHTS)}


def load_teacher(recipe: Recipe, classes: tuple[str, ...]) -> Teacher:
    """The teacher of a recipe, for a student of these classes.

    Raises DataError where its file is no longer the one that the run was begun with, UsageError
    where its classes are others.
    """
    folder = Path(recipe.teacher["path"])
    path = folder / WEIGHTS
    if not path.is_file() or file_hash(path) != recipe.teacher["sha256"]:
        raise DataError(
            f"{path} is no longer the teacher the run was begun with",
            f"the file whose sha256 is {recipe.teacher['sha256'][:16]}…",
            "put it back, or train anew with --overwrite",
        )
    trained = load_model(folder)
    if trained.classes != classes:
        raise UsageError(
            f"the teacher {recipe.teacher['where']} names other classes: "
            f"{', '.join(trained.classes[:5])}",
            f"a teacher of the same classes in the same order: {', '.join(classes[:5])}",
            "train a teacher on these data first",
        )
    own = Scale(tuple(trained.preprocess.mean), tuple(trained.preprocess.std))
    student = Scale(recipe.mean, recipe.std)
    where = recipe.teacher["where"]
    return Teacher(trained.module, trained.preprocess.size, own, student, where)


def refuse_taught(record: dict[str, str], pictures: Pictures) -> None:
    """Raises UsageError where the teacher was trained on pictures that would validate or test its
    student here."""
    if record.get("kind") == "run":
        refuse_seen(Found("run", record["where"], Path(record["path"]), record["sha256"]), pictures)
