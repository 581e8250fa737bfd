"""The plan: what is chosen for which data and machine, and that what was typed wins."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from crosspatch.errors import UsageError
from crosspatch.models.registry import list_models
from crosspatch.training.machine import Machine
from crosspatch.training.plan import (
    describe_augment,
    fit_to_time,
    plan,
    run_seconds,
    space_evaluations,
    with_steps,
)
from crosspatch.training.recipes import deit, small

CPU = Machine(cores=2, memory=8 << 30)
GPU = Machine(cores=16, memory=64 << 30, device="cuda", gpu="G", bf16=True)


@dataclass
class Sides:
    median_side: int = 32
    aspect: float = 1.0


CPU_SMALL, CPU_MIDDLE, CPU_LARGE = (row[1] for row in small.PRESETS_CPU)
GPU_SMALL, _, GPU_LARGE = (row[1] for row in small.PRESETS_GPU)


@pytest.mark.parametrize(
    ("side", "pictures", "machine", "model", "size"),
    [
        (32, 40_000, CPU, CPU_SMALL, 32),
        (28, 40_000, CPU, CPU_SMALL, 28),
        (8, 1_259, CPU, small.FEW_PRESET, 16),
        (20, 1_259, CPU, small.FEW_PRESET, 32),
        (40, 40_000, CPU, CPU_SMALL, 40),
        (41, 40_000, CPU, CPU_MIDDLE, 64),
        (81, 40_000, CPU, CPU_LARGE, 96),
        (500, 40_000, CPU, CPU_LARGE, 96),
        (32, 40_000, GPU, GPU_SMALL, 32),
        (500, 40_000, GPU, GPU_LARGE, 224),
        (500, 900, GPU, CPU_LARGE, 96),
    ],
)
def test_preset_follows_the_pictures(side, pictures, machine, model, size):
    recipe, reasons = plan(Sides(side), pictures, 10, machine)
    assert (recipe.model, recipe.size) == (model, (size, size))
    assert model in reasons[0]
    assert all(reason.endswith(".") for reason in reasons)


def test_every_preset_exists_at_its_sizes():
    known = set(list_models("crossvit*"))
    rows = (*small.PRESETS_CPU, *small.PRESETS_GPU)
    assert {small.FEW_PRESET, *(row[1] for row in rows)} <= known
    assert all(low <= high for _, _, low, high in rows)


def test_the_recipe_of_deit_has_the_authors_settings():
    recipe, reasons = plan(Sides(500), 1_281_167, 1000, GPU, {"recipe": "deit", "batch": 1024})
    assert (recipe.model, recipe.size) == ("deit_small_patch16_224", (224, 224))
    assert recipe.store == (256, 256)
    assert (recipe.lr, recipe.min_lr, recipe.weight_decay) == (1e-3, 1e-5, 0.05)
    assert (recipe.schedule, recipe.epochs, recipe.repeats) == ("epochs", 300, 3)
    assert recipe.warmup == 5 * recipe.steps_per_epoch
    assert (recipe.smoothing, recipe.drop_path, recipe.clip, recipe.ema) == (0.1, 0.1, 0, 0)
    assert (recipe.mix, recipe.mix_prob) == (("mixup-batch", "cutmix-batch"), (0.5, 0.5))
    assert recipe.augment.crop_scale == (0.08, 1.0)
    assert recipe.augment.rotate == pytest.approx(27)
    assert (recipe.augment.ops, recipe.augment.erase) == (2, 0.25)
    assert any("Repeated augmentation" in reason for reason in reasons)
    assert "strongly" in describe_augment(recipe)
    assert plan(Sides(500), 90_000, 9, CPU, {"recipe": "deit", "repeats": 1})[0].repeats == 1
    assert plan(Sides(500, 2.5), 90_000, 9, CPU, {"recipe": "deit"})[0].fit == "crop"


def test_the_recipe_of_deit_on_small_pictures_and_sets():
    recipe, _ = plan(Sides(28), 1_200, 10, CPU, {"recipe": "deit"})
    assert (recipe.model, recipe.size) == ("vit_micro_32", (32, 32))
    assert (recipe.augment.pad, recipe.augment.crop_scale) == (4 / 32, (1.0, 1.0))
    assert recipe.lr == pytest.approx(5e-4 * recipe.batch / 512)
    short = with_steps(recipe, 10 * recipe.steps_per_epoch)
    assert short.warmup == 2 * recipe.steps_per_epoch
    names = (deit.SMALL_PICTURES[1], deit.PRESET_CPU[1], deit.PRESET_GPU[1])
    assert all(list_models(name) for name in names)


def test_big_pictures_keep_room_for_crops():
    assert plan(Sides(500), 40_000, 10, CPU)[0].store == (110, 110)
    assert plan(Sides(500), 40_000, 10, CPU, {"fit": "squash"})[0].store == (96, 96)
    assert plan(Sides(32), 40_000, 10, CPU)[0].store == (32, 32)


@pytest.mark.parametrize(("aspect", "fit"), [(1.3, "crop"), (2.5, "pad"), (0.4, "pad")])
def test_long_pictures_are_kept_whole(aspect, fit):
    assert plan(Sides(500, aspect), 1000, 3, CPU)[0].fit == fit


def test_small_sets_have_small_batches_and_enough_steps():
    tiny, _ = plan(Sides(32), 60, 2, CPU)
    assert tiny.batch == 16
    assert tiny.steps_per_epoch == 3
    assert tiny.steps >= 200
    assert plan(Sides(32), 3, 2, CPU)[0].steps_per_epoch == 1


def test_what_was_typed_wins():
    typed = {
        "model": "crossvit_9_dagger_224", "size": (64, 48), "fit": "pad", "batch": 32, "epochs": 3,
        "lr": 3e-4, "seed": 7, "precision": "bf16", "compile": True, "flip": False,
        "drop_path": 0.3, "augment": {"erase": 0.25}, "workers": None,
    }  # fmt: skip
    recipe, reasons = plan(Sides(32), 640, 4, CPU, typed)
    assert (recipe.model, recipe.size, recipe.store) == (typed["model"], (64, 48), (64, 48))
    assert (recipe.batch, recipe.steps, recipe.lr, recipe.seed) == (32, 60, 3e-4, 7)
    assert recipe.precision == "bf16"
    assert recipe.compile
    assert not recipe.augment.flip
    assert recipe.augment.erase == 0.25
    assert recipe.drop_path == 0.3
    assert "3 epochs, as asked." in reasons
    assert plan(Sides(32), 640, 4, CPU, {"model": "vit_tiny_patch16_224"})[0].size == (224, 224)


@pytest.mark.parametrize(
    ("typed", "match"),
    [
        ({"epoch": 3}, "epochs"),
        ({"batch": 0}, "--batch 0"),
        ({"time": -1.0}, "--time"),
        ({"time": 60.0, "epochs": 3}, "both --time and --epochs"),
        ({"recipe": "smal"}, "--recipe small"),
        ({"recipe": "finetune", "weights": "none"}, "--weights none with the recipe finetune"),
        ({"recipe": "probe", "epochs": 3}, "--epochs with the recipe probe"),
        ({"recipe": "probe", "flip": True}, "--flip with the recipe probe"),
    ],
)
def test_bad_settings_are_refused(typed, match):
    with pytest.raises(UsageError, match=match):
        plan(Sides(32), 640, 4, CPU, typed)


@pytest.mark.parametrize("budget", [20.0, 300.0, 3000.0])
def test_a_time_budget_becomes_steps_that_fit(budget):
    recipe, _ = plan(Sides(32), 10_000, 10, CPU, {"time": budget})
    fitted, why = fit_to_time(recipe, 0.05, 1.5, budget)
    took = run_seconds(fitted, 0.05, 1.5)
    assert 0.75 * budget <= took <= 0.96 * budget
    assert "epochs" in why
    assert fitted.warmup < fitted.steps
    evaluating = (len(fitted.evaluations()) + 1) * 1.5
    assert evaluating < 0.12 * took + 3.1


def test_a_large_budget_is_not_wasted_and_a_tiny_one_refused():
    recipe, _ = plan(Sides(32), 1_000, 10, CPU, {"time": 1e6})
    fitted, why = fit_to_time(recipe, 0.01, 0.1, 1e6)
    assert fitted.steps == 400 * recipe.steps_per_epoch
    assert "seldom help" in why
    with pytest.raises(UsageError, match="left for training"):
        fit_to_time(recipe, 5.0, 10.0, 3.0)


def test_long_runs_are_regularised_more_unless_typed():
    recipe, _ = plan(Sides(32), 10_000, 10, CPU)
    short = with_steps(recipe, 5 * recipe.steps_per_epoch)
    long = with_steps(recipe, 200 * recipe.steps_per_epoch)
    assert short.drop_path <= long.drop_path
    assert not short.mix
    assert long.mix
    assert with_steps(recipe, 9, {"drop_path": 0.5}).drop_path == 0.5
    assert with_steps(recipe, 9).warmup < 9


def test_validation_is_spaced_when_it_is_dear():
    recipe, _ = plan(Sides(32), 1_000, 10, CPU)
    assert space_evaluations(recipe, 0.05, 0.01).eval_every == 1
    assert space_evaluations(recipe, 0.01, 10.0).eval_every > 5


def test_what_is_said_of_the_augmentation_is_that_of_the_final_length():
    recipe, reasons = plan(Sides(32), 10_000, 10, CPU, {"time": 1e6})
    assert not any("Training pictures" in reason for reason in reasons)
    assert describe_augment(recipe) == "Training pictures are mirrored and cropped a little."
    fitted, _ = fit_to_time(recipe, 0.01, 0.1, 1e6)
    told = "cropped, turned and tinted a little, mixed by mixup and cutmix."
    assert describe_augment(fitted) == f"Training pictures are mirrored and {told}"
