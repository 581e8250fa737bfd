"""DeiT's losses: those of the authors' code, and what follows from their definition."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from crosspatch.mixing.deit import blend
from crosspatch.objectives.deit import hard_distillation, soft_cross_entropy, soft_distillation
from crosspatch.tasks.classify import Classify
from support import goldens

TASK = Classify([str(number) for number in range(10)])


@pytest.fixture(scope="module")
def golden():
    return {k: torch.from_numpy(v) for k, v in goldens.arrays("deit/recipe").items()}


def given(golden):
    names = ("student", "student_dist", "teacher", "soft_targets")
    return tuple(golden[name] for name in names)


def test_distillation_losses_are_the_authors(golden):
    for tau in (1, 3):
        hard = hard_distillation(*given(golden), alpha=0.5)
        assert hard.item() == pytest.approx(golden[f"loss_hard_tau{tau}"].item(), rel=1e-6)
        soft = soft_distillation(*given(golden), alpha=0.1, tau=tau)
        assert soft.item() == pytest.approx(golden[f"loss_soft_tau{tau}"].item(), rel=1e-6)


def test_targets_and_base_losses_of_the_task_are_the_authors(golden):
    labels, student = golden["labels"], golden["student"]
    smoothed = TASK.targets(labels, None, 0.1)
    assert torch.allclose(smoothed, golden["soft_targets"], rtol=1e-6)
    loss = TASK.loss(student, smoothed).mean().item()
    assert loss == pytest.approx(golden["base_soft_target_ce"].item(), rel=1e-6)
    assert loss == pytest.approx(golden["base_label_smoothing"].item(), rel=1e-6)
    _, mixing = blend(torch.zeros(4, 3, 2, 2), 0.3)
    mixed = TASK.targets(labels, mixing, 0.1)
    assert torch.allclose(mixed, golden["mix_targets_lam0.3_s0.1"], rtol=1e-6)


def test_without_the_teacher_s_part_the_base_loss_is_left(golden):
    base = soft_cross_entropy(golden["student"], golden["soft_targets"])
    assert hard_distillation(*given(golden), alpha=0.0).item() == pytest.approx(base.item())
    assert soft_distillation(*given(golden), alpha=0.0).item() == pytest.approx(base.item())


def test_per_picture_is_the_usual_batch_mean(golden):
    _, dist, teacher, _ = given(golden)
    wanted = F.kl_div(
        F.log_softmax(dist / 2, -1), F.softmax(teacher / 2, -1), reduction="batchmean"
    )
    found = soft_distillation(*given(golden), alpha=1.0, tau=2.0, per="picture")
    assert found.item() == pytest.approx(4 * wanted.item(), rel=1e-5)
    per_logit = soft_distillation(*given(golden), alpha=1.0, tau=2.0)
    assert found.item() == pytest.approx(10 * per_logit.item(), rel=1e-5)


def test_impossible_settings_are_refused(golden):
    with pytest.raises(ValueError, match="alpha"):
        hard_distillation(*given(golden), alpha=1.5)
    for wrong in ({"tau": 0.0}, {"per": "class"}, {"alpha": -0.1}):
        with pytest.raises(ValueError, match=r"alpha|tau"):
            soft_distillation(*given(golden), **wrong)
