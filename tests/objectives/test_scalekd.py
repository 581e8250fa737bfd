"""ScaleKD: the authors' projectors and losses, what is read of networks, and its laws."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import crosspatch as xp
from crosspatch.errors import DataError, UsageError
from crosspatch.objectives import Given, Inputs
from crosspatch.objectives.scalekd import ScaleKD
from crosspatch.objectives.scalekd_heads import (
    DualView,
    Projector,
    dct,
    heads_for,
    inverse_dct,
    logit_mimicry,
    mimicry,
    without_mean,
)
from crosspatch.objectives.stages import Reader, probe_images
from crosspatch.objectives.supervised import Supervised
from crosspatch.objectives.teacher import Scale, Teacher
from crosspatch.tasks.classify import Classify
from support import goldens
from support.reductions import tiny_crossvit, tiny_host

TASK = Classify("abcde")
LABELS = torch.tensor([0, 3, 1, 3])
RULES = {"smoothing": 0.1, "mixer": None, "weights": (), "deferred": 0.0}
SAME = Scale((0.5,) * 3, (0.5,) * 3)


# ------------------------------------------------------------------ the authors' numbers


@pytest.mark.parametrize("name", ["projector_selfquery_7", "projector_v2_selfquery_14"])
def test_projectors_and_their_losses_are_the_authors(name):
    golden = goldens.read(f"scalekd/{name}")
    module = DualView(**golden.meta["build"])
    assert sum(p.numel() for p in module.parameters()) == golden.meta["params"]
    module.load_state_dict(golden.state_dict)
    shape = (golden.meta["batch"], 96, *golden.meta["size"])
    drawn = np.random.RandomState(77).standard_normal(shape).astype("float32")
    with torch.no_grad():
        tokens, losses = module.eval()(golden.images, torch.from_numpy(drawn))
    for view, found, loss in zip(("spat", "freq"), tokens, losses, strict=True):
        assert goldens.relative_error(found[:, :, ::4], golden.outputs[f"proj_{view}"]) < 1e-5
        assert loss.item() == pytest.approx(golden.outputs[f"loss_{view}"].item(), rel=1e-5)


def test_the_transforms_and_the_loss_of_the_answers_are_the_authors():
    golden = {k: torch.from_numpy(v) for k, v in goldens.arrays("scalekd/dct_kd").items()}
    assert goldens.relative_error(dct(golden["x"]), golden["dct"]) < 1e-5
    assert goldens.relative_error(inverse_dct(golden["dct"]), golden["inverse"]) < 1e-5
    assert torch.allclose(without_mean(golden["x"]), golden["no_dc"], atol=1e-5)
    for tau in (1, 4):
        found = 0.5 * logit_mimicry(golden["logit_s"], golden["logit_t"], tau).mean()
        assert found.item() == pytest.approx(golden[f"kd_T{tau}"].item(), rel=1e-5)


@settings(max_examples=20, deadline=None)
@given(h=st.integers(1, 9), w=st.integers(1, 9), seed=st.integers(0, 99))
def test_taking_the_first_coefficient_away_takes_the_mean_away(h, w, seed):
    x = torch.randn(2, 3, h, w, generator=torch.Generator().manual_seed(seed))
    found = dct(x)
    assert torch.allclose(inverse_dct(found), x, atol=1e-5)
    found[..., 0, 0] = 0
    assert torch.allclose(inverse_dct(found), without_mean(x), atol=1e-5)


def test_a_query_from_outside_comes_first():
    torch.manual_seed(0)
    own = Projector(6, 8, (2, 3), (4, 5), num_heads=2).eval()
    alone = Projector(6, 8, (2, 3), (4, 5), num_heads=2, self_query=False).eval()
    state = {k: v for k, v in own.state_dict().items() if k != "query.weight"}
    alone.load_state_dict(state)
    x, query = torch.randn(2, 6, 4, 5), torch.randn(2, 6, 8)
    assert own(x).shape == (2, 6, 8)
    assert torch.equal(own(x, query), alone(x, query))
    assert not torch.allclose(own(x, query), own(x))
    with pytest.raises(ValueError, match="query"):
        alone(x)


def test_grids_of_other_sizes_are_read_from_the_tensors():
    own = Projector(6, 8, (2, 3), (4, 5), num_heads=2).eval()
    assert own(torch.randn(2, 6, 9, 3), grid=(5, 4)).shape == (2, 20, 8)
    dual = DualView(6, 8, (2, 3), (4, 5), num_heads=2)
    tokens, losses = dual(torch.randn(2, 6, 7, 5), torch.randn(2, 8, 3, 4))
    assert [one.shape for one in tokens] == [(2, 12, 8)] * 2
    assert all(loss > 0 for loss in losses)
    assert [heads_for(n) for n in (768, 96, 30, 7, 1)] == [8, 8, 6, 7, 1]


def test_maps_of_one_direction_are_alike():
    x = torch.randn(3, 4, 5, 6)
    assert mimicry(3 * x, x, centred=False).abs().max() < 1e-5
    assert mimicry(3 * x + 7, x, centred=True).abs().max() < 1e-5
    assert mimicry(x + 7, x, centred=False).min() > 1
    assert torch.allclose(mimicry(-x, x, centred=False), torch.full((3,), 4.0 * 30))


# ------------------------------------------------------------------ what is read


@pytest.mark.parametrize(
    ("name", "size", "last"),
    [
        ("vit_micro_32", (32, 32), True),
        ("crossvit_micro_32", (32, 32), True),
        ("stvit_r_micro_32", (32, 32), True),
        ("psvit_micro_32", (32, 32), True),
        ("lvvit_micro_32", (32, 32), True),
        ("resnet10t", (64, 32), True),
        ("convnext_atto", (64, 64), True),
        ("pvt_v2_b0", (64, 64), True),
        ("mobilenetv3_small_050", (64, 64), True),
        ("eva02_tiny_patch14_224", (28, 28), False),
    ],
)
def test_reading_changes_no_answer(name, size, last):
    model = xp.create_model(name, num_classes=5, img_size=size).train()
    reader = Reader(model, size)
    assert model.training
    model.eval()
    with torch.no_grad():
        read, plain = reader(model, probe_images(size)), model(probe_images(size))
    assert torch.allclose(read.logits, plain, rtol=1e-4, atol=1e-5)
    assert (read.low.shape[1:], read.high.shape[1:]) == reader.shapes
    assert (reader.perceive is not None) == last
    assert bool(reader.why_not) != last
    if last:
        with torch.no_grad():
            found = reader.perceive(read.low, read)
        assert torch.allclose(found, read.high, rtol=1e-3, atol=1e-4)


def test_a_swin_that_timm_has_is_perceived_normalised():
    model = tiny_swin()
    reader = Reader(model, (64, 64))
    assert reader.perceive is not None
    with torch.no_grad():
        read = reader(model, probe_images((64, 64)))
    assert read.high.mean(dim=1).abs().max() < 1e-4  # a fresh LayerNorm's output
    assert read.low.shape[1:] == (64, 4, 4)


def tiny_swin():
    from timm.models.swin_transformer import SwinTransformer

    torch.manual_seed(1)
    return SwinTransformer(img_size=64, window_size=2, embed_dim=16, depths=(1, 1, 1, 1),
                           num_heads=(1, 1, 2, 2), num_classes=5).eval()  # fmt: skip


def test_a_reduced_network_is_read_and_not_gone_through():
    model = xp.reduce(tiny_host(), "tome", r=2)[0].eval()
    reader = Reader(model, model.img_size)
    assert reader.perceive is None
    assert "reduced" in reader.why_not
    with torch.no_grad():
        images = probe_images(model.img_size)
        assert torch.allclose(reader(model, images).logits, model(images), atol=1e-5)


def test_what_cannot_be_read_is_refused_with_the_reason():
    with pytest.raises(UsageError, match="Sequential names no maps"):
        Reader(nn.Sequential(nn.Conv2d(3, 4, 1)), (8, 8))
    other = xp.create_model("resnet10t", num_classes=5)
    other.forward = lambda x: 1 - type(other).forward(other, x)
    with pytest.raises(UsageError, match="is not its answer"):
        Reader(other, (32, 32))
    model = tiny_host()
    for asked in ((0,), (1, 1), (0, 99), (2, 1), (0.5, 1)):
        with pytest.raises(UsageError, match="student = "):
            Reader(model, model.img_size, asked)
    assert Reader(model, model.img_size, (0, 2)).places == (0, 2)


# ------------------------------------------------------------------ the objective


def inputs(model, count=4, step=0, seed=0) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, *model.img_size, generator=generator)
    return Inputs(images, LABELS[:count], (0, step, 0), 1 / count)


def teacher_of(module, size, seen, **how) -> Teacher:
    return Teacher(module, size, SAME, SAME, "runs/t", seen=seen, **how)


def built(host, module, size=(64, 64), order=(), **options):
    teacher = teacher_of(module, size, host.img_size, order=order)
    return ScaleKD.build(host, TASK, RULES, Given(options=options, teacher=teacher))


def student():
    torch.manual_seed(0)
    return xp.create_model("vit_micro_32", num_classes=5)


def test_the_total_is_the_papers_by_hand():
    model, swin = student().eval(), tiny_swin()
    objective = built(model, swin, tau=2.0, heads=[2, 4]).eval()
    batch = inputs(model)
    found = objective(batch, 0)
    with torch.no_grad():
        seen = F.interpolate(batch.images, (64, 64), mode="bicubic", align_corners=False)
        final, _ = swin.forward_intermediates(seen, indices=[2])
        target = final.permute(0, 3, 1, 2)
        read = objective.student(model, batch.images)
        total, heads = 0, objective.projectors
        for view, alpha in (("spatial", 0.08), ("frequency", 0.06)):
            low = heads[f"{view}_3"](read.low).transpose(1, 2).unflatten(2, (4, 4))
            u = swin.norm(swin.layers[3](low.permute(0, 2, 3, 1)))
            w = heads[f"{view}_4"](read.high, u.flatten(1, 2))
            w = w.transpose(1, 2).unflatten(2, (2, 2))
            for one in (u.permute(0, 3, 1, 2), w):
                total += alpha * mimicry(one, target, centred=view == "frequency").mean()
        logits = model(batch.images)
        labels = TASK.loss(logits, TASK.targets(LABELS, None, 0.1)).mean()
        answers = logit_mimicry(logits, swin(seen), 2.0).mean()
    assert torch.allclose(found["parts"]["features"], total, rtol=1e-4)
    assert torch.allclose(found["loss"], 0.5 * labels + 0.5 * answers + total, rtol=1e-4)
    assert objective.projectors["spatial_3"].pos_attention.heads == 2
    assert objective.projectors["frequency_4"].query is None


def test_the_student_is_as_it_was_and_the_teacher_too():
    model, swin = student(), tiny_swin()
    alone, before = copy.deepcopy(model), copy.deepcopy(swin.state_dict())
    objective = built(model, swin, spatial=[1.0, 0.0], frequency=0, kd=0.0).train()
    assert list(objective.projectors) == ["spatial_3"]
    assert objective.exported.state_dict().keys() == alone.state_dict().keys()
    with torch.no_grad():
        images = inputs(model).images
        assert torch.equal(objective.exported.eval()(images), alone.eval()(images))
    objective.train()
    features = objective.features(
        objective.student(model, inputs(model).images), objective.told(inputs(model).images)
    )
    features.sum().backward()
    assert all(p.grad is None for p in swin.parameters())
    assert all(torch.equal(v, before[k]) for k, v in swin.state_dict().items())
    assert not swin.training
    early = model.patch_embed.proj[0].weight.grad
    assert early is not None
    assert early.abs().max() > 0  # through the teacher's last stage
    assert not any(name.startswith("teacher") for name in objective.state_dict())


@pytest.mark.parametrize(
    ("who", "options"),
    [
        ("vit", {}), ("vit", {"perceive": False}), ("vit", {"frequency": [0.06, 0]}),
        ("vit", {"spatial": [0, 0.08]}), ("crossvit", {}), ("lvvit", {}), ("resnet", {}),
        ("reduced", {}), ("distilled", {}),
    ],
)  # fmt: skip
def test_every_host_leaves_no_parameter_unused(who, options):
    models = {
        "vit": student,
        "crossvit": tiny_crossvit,
        "lvvit": lambda: xp.create_model("lvvit_micro_32", num_classes=5),
        "resnet": lambda: xp.create_model("resnet10t", num_classes=5),
        "reduced": lambda: xp.reduce(student(), "tome", r=3)[0],
        "distilled": lambda: tiny_host(dist_token=True),
    }
    model = models[who]()
    model.img_size = getattr(model, "img_size", (64, 64))
    objective = built(model, tiny_swin(), **options).train()
    plain = Supervised(copy.deepcopy(model), TASK).train()
    plain(inputs(model), 0)["loss"].backward()
    idle = {n for n, p in plain.named_parameters() if p.grad is None}
    found = objective(inputs(model), 0)
    found["loss"].backward()
    assert {n for n, p in objective.named_parameters() if p.grad is None} <= idle
    assert found["loss"].isfinite()


def test_teachers_of_every_kind():
    for module, size in (
        (tiny_host(), tiny_host().img_size),
        (tiny_crossvit(), tiny_crossvit().img_size),
        (xp.create_model("resnet10t", num_classes=5), (48, 64)),
    ):
        model = student()
        found = built(model, module, size).train()(inputs(model), 0)["loss"]
        found.backward()
        assert found.isfinite()


def test_a_teacher_of_other_classes_gives_features_alone():
    model = student()
    objective = built(model, tiny_swin(), order=None)
    assert objective.kd == 0
    assert "its classes are others" in " ".join(objective.remarks)
    with pytest.raises(UsageError, match="whose classes are others"):
        built(model, tiny_swin(), order=None, kd=0.5)


def test_shares_of_a_batch_add_up():
    model = student()
    objective = built(model, tiny_swin()).eval()
    whole = inputs(model)
    parts = [whole._replace(images=whole.images[r], labels=whole.labels[r], scale=2 / 4)
             for r in (slice(0, 1), slice(1, 4))]  # fmt: skip
    found = sum(objective(p, 0)["loss"] for p in parts) / 2
    assert torch.allclose(found, objective(whole, 0)["loss"], rtol=1e-4)


def test_tables_of_the_heads_are_not_decayed():
    free = built(student(), tiny_swin()).no_decay()
    assert "projectors.spatial_3.pos_embed" in free
    assert "projectors.frequency_3.query.weight" in free
    assert "model.pos_embed" in free
    assert not any("attention" in name for name in free)


def test_a_teacher_that_diverged_is_named():
    swin, model = tiny_swin(), student()
    objective = built(model, swin)
    with torch.no_grad():
        swin.head.fc.bias[2] = float("inf")
    with pytest.raises(DataError, match="runs/t answers with numbers that are not finite"):
        objective(inputs(model), 0)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"alpha": 1}, "no option 'alpha'"),
        ({"spatial": -1}, "spatial = -1"),
        ({"spatial": [1, 2, 3]}, "spatial = 1/2/3"),
        ({"kd": 1.5}, "kd = 1.5"),
        ({"tau": 0}, "tau = 0"),
        ({"heads": 3}, "3 heads at stage 3"),
        ({"heads": 0}, "heads = 0"),
        ({"perceive": "maybe"}, "perceive = maybe"),
        ({"student": 3}, "student = 3"),
        ({"teacher": [9, 10]}, "teacher = 9/10"),
    ],
)
def test_options_that_cannot_be_are_refused(options, match):
    with pytest.raises(UsageError, match=match) as found:
        built(student(), tiny_swin(), **options)
    assert found.value.expected
    assert found.value.do


def test_the_features_come_nearer_step_by_step():
    torch.manual_seed(0)
    model = student().train()
    objective = built(model, tiny_swin(), kd=0.0).train()
    batch = inputs(model)
    optimiser = torch.optim.AdamW(objective.parameters(), lr=1e-3)
    losses = []
    for _ in range(24):
        found = objective(batch, 0)
        optimiser.zero_grad()
        found["loss"].backward()
        optimiser.step()
        losses.append(found["parts"]["features"].item())
    means = [sum(losses[i : i + 6]) / 6 for i in range(0, 24, 6)]
    assert means == sorted(means, reverse=True)
    assert means[-1] < 0.9 * means[0]


@pytest.mark.long
def test_over_two_hundred_steps_the_features_come_ever_nearer():
    """The scaled-down check of the method: a frozen Swin, a small ViT, pictures that come back."""
    torch.manual_seed(0)
    model = student().train()
    objective = built(model, tiny_swin(), kd=0.0).train()
    batches = [inputs(model, seed=seed) for seed in range(8)]
    optimiser = torch.optim.AdamW(objective.parameters(), lr=5e-4)
    losses = []
    for step in range(200):
        found = objective(batches[step % 8], step / 200)
        optimiser.zero_grad()
        found["loss"].backward()
        optimiser.step()
        losses.append(found["parts"]["features"].item())
    means = [sum(losses[i : i + 40]) / 40 for i in range(0, 200, 40)]
    assert means == sorted(means, reverse=True)
    assert means[-1] < 0.8 * means[0]
