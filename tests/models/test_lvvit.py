"""LV-ViT: goldens, the paper's figures, dense logits, MixToken's laws, the seams of the trunk."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import crosspatch as xp
from crosspatch.data.preprocess import Preprocess
from crosspatch.deploy.graph import Shipped, to_onnx, trace
from crosspatch.layers.block import BlockSpec
from crosspatch.layers.box import Box, box
from crosspatch.layers.linear import switched
from crosspatch.layers.reducer import Reducer
from crosspatch.layers.stage import StageSpec
from crosspatch.layers.tokens import Merge, apply_merge, order
from crosspatch.metrics.macs import count_macs
from crosspatch.mixing import draws
from crosspatch.mixing.mixtoken import draw
from crosspatch.models.lvvit import LVViT, checkpoint_filter_fn, swap
from crosspatch.models.registry import classifiers
from support import goldens

IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(3))
BOX = box(4, 4, 0.6, 2, 1)

# the sheet's table: width, heads, depth, lambda, millions of parameters at the first size, sizes
TABLE = {
    "lvvit_t": (240, 4, 12, 1, 8.53, (224,)),
    "lvvit_s": (384, 6, 16, 2, 26.15, (224, 384)),
    "lvvit_m": (512, 8, 20, 2, 55.83, (224, 384, 448)),
    "lvvit_l": (768, 12, 24, 3, 150.47, (448, 512)),
}
NAMED = [(name, side) for name, row in TABLE.items() for side in row[-1]]


def tiny(**arguments) -> LVViT:
    """16 patches, milliseconds; batch norms and heads that leave nothing at its start."""
    torch.manual_seed(0)
    shape = {"embed_dim": 24, "depth": 3, "num_heads": 3, "stem_width": 8, "num_classes": 5}
    model = LVViT(32, 8, **{**shape, **arguments})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


# ---------------------------------------------------------------------- goldens and figures


@pytest.mark.parametrize("products", ["off", "on"])
def test_lvvit_t_computes_what_the_authors_code_computes(products: str) -> None:
    golden = goldens.read("token-labeling/lvvit_t_224")
    model = xp.create_model(golden.meta["variant"]).eval()
    assert sum(p.numel() for p in model.parameters()) == golden.meta["params"]
    xp.load_released(model, golden.state_dict)
    with switched(products), torch.no_grad():
        assert goldens.relative_error(model(golden.images), golden.outputs["out"]) < 1e-4


@pytest.mark.parametrize("products", ["off", "on"])
def test_tokens_and_dense_logits_are_the_authors(products: str) -> None:
    golden = goldens.read("token-labeling/lvvit_t_64_dense")
    arguments = dict(golden.meta["build"])
    model = xp.create_model(arguments.pop("fn"), **arguments).eval()
    assert sum(p.numel() for p in model.parameters()) == golden.meta["params"]
    xp.load_released(model, golden.state_dict)
    with switched(products), torch.no_grad():
        state, _ = model.run(model.embed(golden.images))
        found = {
            "out": model(golden.images),
            "tokens": model.forward_features(golden.images),
            "aux": model.dense_logits(state),
        }
        assert torch.equal(model.forward_dense(golden.images).patches, found["aux"])
    for key, expected in golden.outputs.items():
        assert goldens.relative_error(found[key], expected) < 1e-4


def test_a_golden_notices_a_missing_auxiliary_head() -> None:
    golden = goldens.read("token-labeling/lvvit_t_64_dense")
    model = xp.create_model("lvvit_t", img_size=64, num_classes=10).eval()
    state = golden.state_dict
    state["aux_head.weight"] = torch.zeros_like(state["aux_head.weight"])
    xp.load_released(model, state)
    with torch.no_grad():
        assert goldens.relative_error(model(golden.images), golden.outputs["out"]) > 1e-2


@pytest.mark.parametrize(("name", "side"), NAMED)
def test_shapes_parameters_and_macs_of_the_table(name: str, side: int) -> None:
    width, heads, depth, lam, millions, sides = TABLE[name]
    with torch.device("meta"):
        model = xp.create_model(f"{name}_{side}")
        macs = count_macs(model, (3, side, side))
    block = model.blocks[-1]
    assert model.img_size == (side, side)
    assert (model.embed_dim, block.attn.num_heads, len(model.blocks)) == (width, heads, depth)
    assert getattr(block.ls2, "factor", 1.0) == getattr(block.ls1, "factor", 1.0) == 1 / lam
    if side == sides[0]:
        count = sum(p.numel() for p in model.parameters()) / 1e6
        assert count == pytest.approx(millions, abs=0.006)
    filters, patches = (128 if name == "lvvit_l" else 64), (side // 16) ** 2
    tokens = patches + 1
    stem = (side // 2) ** 2 * filters * (3 * 49 + 2 * 9 * filters) + patches * 64 * filters * width
    blocks = depth * (10 * tokens * width**2 + 2 * tokens**2 * width)
    assert macs == stem + blocks + tokens * width * 1000


@pytest.mark.parametrize(
    ("name", "arguments", "millions"),
    [("lvvit_l", {}, 150.02), ("lvvit_s", {"aux_head": False}, 25.77)],
)
def test_the_authors_entry_points_are_at_224(name: str, arguments: dict, millions: float) -> None:
    with torch.device("meta"):
        model = xp.create_model(name, **arguments)
    assert model.img_size == (224, 224)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.006)


def test_names_are_known_to_timm_with_their_preparation() -> None:
    model = timm.create_model("lvvit_micro_32", num_classes=3)
    assert model.pretrained_cfg["classifier"] == ("head", "aux_head")
    with torch.device("meta"):
        crops = [xp.create_model(f"lvvit_{size}").pretrained_cfg["crop_pct"] for size in "tsml"]
    assert crops == [0.9, 0.9, 1.0, 1.0]


# ---------------------------------------------------------------------- the two terms of the logits


def test_logits_are_the_class_tokens_and_half_the_patches_maximum() -> None:
    model = tiny()
    with torch.no_grad():
        cls, patches, found = model.forward_dense(IMAGES)
        tokens = model.forward_features(IMAGES)
        assert torch.equal(cls, model.head(tokens[:, 0]))
        assert torch.equal(patches, model.aux_head(tokens)[:, 1:])
        expected = cls + 0.5 * patches.max(dim=1).values
        torch.testing.assert_close(model(IMAGES), expected)
    assert found is None


def test_training_gives_logits_and_every_parameter_a_gradient() -> None:
    model = tiny(drop_path_rate=0.1).train()
    logits = model(IMAGES)
    assert logits.shape == (4, 5)
    logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    model.forward_dense(IMAGES, BOX)
    assert before == {name: set(vars(module)) for name, module in model.named_modules()}


def test_without_an_auxiliary_head_it_is_the_class_tokens_alone() -> None:
    model = tiny(aux_head=False)
    with torch.no_grad():
        tokens = model.forward_features(IMAGES)
        torch.testing.assert_close(model(IMAGES), model.head(tokens[:, 0]))
    assert "aux_head.weight" not in model.state_dict()
    assert model.get_classifier() is model.head
    with pytest.raises(ValueError, match="build with aux_head=True"):
        model.forward_dense(IMAGES)


def test_classifiers_and_their_removal() -> None:
    model = tiny()
    assert list(classifiers(model)) == ["head", "aux_head"]
    model.reset_classifier(7)
    assert model(IMAGES).shape == (4, 7)
    assert model.aux_head.out_features == 7
    features = model.forward_head(model.forward_features(IMAGES), pre_logits=True)
    model.reset_classifier(0)
    assert torch.equal(model(IMAGES), features)
    model.reset_classifier(0, "")
    assert torch.equal(model(IMAGES), model.forward_features(IMAGES))
    with pytest.raises(ValueError, match="expected '' or 'token'"):
        model.reset_classifier(3, "avg")


# ---------------------------------------------------------------------- residual scale, stem


def test_the_residual_scale_divides_both_branches_and_has_no_parameters() -> None:
    model, plain = tiny(skip_lam=4.0), tiny(skip_lam=1.0)
    assert list(model.state_dict()) == list(plain.state_dict())
    state = {
        name: value / 4 if ".attn.proj." in name or ".mlp.fc2." in name else value
        for name, value in model.state_dict().items()
    }
    plain.load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(model(IMAGES), plain(IMAGES), rtol=1e-4, atol=1e-5)


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(ValueError, match="both scale the branches"):
        tiny(init_values=0.1)
    with pytest.raises(ValueError, match="a number above 0"):
        tiny(skip_lam=0.0)
    with pytest.raises(ValueError, match="takes even patches"):
        LVViT(30, 5, num_classes=2)
    with pytest.raises(ValueError, match="cannot be built so") as caught:
        xp.create_model("lvvit_micro_32", dist_token=True)
    assert caught.value.exit_code == 2


@settings(max_examples=15, deadline=None)
@given(st.integers(8, 40), st.integers(8, 40), st.sampled_from([1, 4]), st.booleans())
def test_any_size_runs_and_the_remainder_is_not_seen(height, width, channels, plain) -> None:
    model = LVViT(
        (height, width), 8, channels, 3, embed_dim=8, depth=1, num_heads=1, stem_width=4,
        stem="patch" if plain else "lvvit",
    ).eval()  # fmt: skip
    image = torch.randn(2, channels, height, width)
    other = image.clone()
    other[:, :, height // 8 * 8 :] = 9.0
    other[:, :, :, width // 8 * 8 :] = 9.0
    with torch.no_grad():
        assert torch.equal(model(image), model(other))
        assert model.forward_dense(image).patches.shape == (2, (height // 8) * (width // 8), 3)


# ---------------------------------------------------------------------- MixToken


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 5), st.integers(0, 10_000))
def test_the_swap_is_its_own_inverse_and_moves_what_the_box_holds(rows, columns, batch, step):
    found = draw((rows, columns), draws(1, step))
    tokens = torch.arange(batch * rows * columns * 2.0).view(batch, rows * columns, 2)
    mixed = swap(tokens, (rows, columns), found)
    assert torch.equal(swap(mixed, (rows, columns), found), tokens)
    image, whole = (t.unflatten(1, (rows, columns)).clone() for t in (tokens, tokens))
    image[:, found.top : found.bottom, found.left : found.right] = whole.flip(0)[
        :, found.top : found.bottom, found.left : found.right
    ]
    assert torch.equal(mixed, image.flatten(1, 2))
    if batch % 2 == 0:
        moved = (mixed != tokens)[0, :, 0].double().mean()
        assert float(moved) == pytest.approx(1 - found.lam)


@pytest.mark.parametrize("step", range(6))
def test_an_identity_network_gives_the_unmixed_map_back(step: int) -> None:
    model = tiny(depth=0, num_classes=0, final_norm=False)
    found = draw(model.grid, draws(2, step))
    with torch.no_grad():
        plain = model.forward_dense(IMAGES).patches
        assert torch.equal(plain, model.embed(IMAGES).patches)
        assert torch.equal(model.forward_dense(IMAGES, found).patches, plain)


def test_every_patch_logit_stays_with_its_own_image() -> None:
    alone = StageSpec(24, (BlockSpec(heads=0, qk=0, value=0, hidden=48),) * 2)
    model = tiny(stages=(alone,))  # no patch sees another one
    with torch.no_grad():
        plain, mixed = model.forward_dense(IMAGES), model.forward_dense(IMAGES, BOX)
    torch.testing.assert_close(mixed.patches, plain.patches)
    assert mixed.box == BOX


def test_the_box_mixes_the_tokens_that_the_blocks_see() -> None:
    model, whole = tiny(), Box(0, 4, 0, 4, 0.0)
    with torch.no_grad():
        plain, exchanged = model.forward_dense(IMAGES), model.forward_dense(IMAGES, whole)
        mixed = model.forward_dense(IMAGES, BOX)
        nothing = model.forward_dense(IMAGES, Box(2, 2, 1, 3, 1.0))
    torch.testing.assert_close(exchanged.cls, plain.cls.flip(0))
    torch.testing.assert_close(exchanged.patches, plain.patches)
    torch.testing.assert_close(nothing.patches, plain.patches)
    assert (mixed.cls - plain.cls).abs().max() > 1e-2
    assert (mixed.patches - plain.patches).abs().max() > 1e-2


def test_a_box_needs_the_whole_grid() -> None:
    with pytest.raises(ValueError, match="12 patches for a grid of 4x4"):
        swap(torch.zeros(2, 12, 3), (4, 4), BOX)


# ---------------------------------------------------------------------- a host of reducers


class Reduce(Reducer):
    """Keeps the `left` patches that the class row likes best; the rest joins the last of them, or
    is dropped."""

    needs = frozenset({"class_row"})

    def __init__(self, left: int, *, merge: bool) -> None:
        super().__init__()
        self.left, self.merge = left, merge

    def active(self, block: int) -> bool:
        return block == 1

    def after_attention(self, state, block, stats):
        rank = order(stats.class_row.mean(dim=1)[:, state.n_prefix :]) + state.n_prefix
        prefix = torch.arange(state.n_prefix).expand(rank.shape[0], -1)
        keep = torch.cat([prefix, rank[:, : self.left]], dim=1)
        src = rank[:, self.left :] if self.merge else rank[:, :0]
        return apply_merge(state, Merge(keep, src, torch.full_like(src, keep.shape[1] - 1)))


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("registers", [0, 2])
def test_the_maximum_runs_over_what_is_left_and_dense_logits_over_the_grid(merge, registers):
    model = tiny(reg_tokens=registers)
    model.reducer = Reduce(6, merge=merge)
    with torch.no_grad():
        state, _ = model.run(model.embed(IMAGES))
        assert state.tokens.shape[1] == 1 + registers + 6
        tokens = model.norm(state.tokens)
        left = model.aux_head(tokens[:, 1 + registers :])
        expected = model.head(tokens[:, 0]) + 0.5 * left.max(dim=1).values
        torch.testing.assert_close(model(IMAGES), expected)
        dense = model.dense_logits(state)
        cls, patches, _ = model.forward_dense(IMAGES)
        torch.testing.assert_close(patches, dense)
        torch.testing.assert_close(cls + 0.5 * left.amax(dim=1), expected)
    assert dense.shape == (4, 16, 5)
    for picture, source, own in zip(dense, state.source, left, strict=True):
        for patch, token in zip(picture, source.tolist(), strict=True):
            wanted = own[token - 1 - registers] if token >= 0 else torch.zeros(5)
            torch.testing.assert_close(patch, wanted)
    assert bool((state.source < 0).any()) is not merge


def test_the_neutral_reducer_computes_what_no_reducer_does() -> None:
    class Neutral(Reducer):
        needs = frozenset({"keys", "class_row"})

    model = tiny()
    with torch.no_grad():
        before = model(IMAGES)
        model.reducer = Neutral()
        torch.testing.assert_close(model(IMAGES), before)


def test_a_reduced_network_trains_on_dense_logits_with_mixtoken() -> None:
    model = tiny().train()
    model.reducer = Reduce(6, merge=True)
    cls, patches, _ = model.forward_dense(IMAGES, BOX)
    (cls.square().mean() + patches.square().mean()).backward()
    assert all(p.grad is not None for p in model.parameters())


# ---------------------------------------------------------------------- released files


@pytest.mark.parametrize("wrapper", [None, "state_dict", "state_dict_ema", "model"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_released_files_load_in_every_wrapping(wrapper: str | None, prefix: str) -> None:
    source, target = tiny(), tiny(drop_path_rate=0.1)
    with torch.no_grad():
        target.head.weight.zero_()
    state = {prefix + name: value for name, value in source.state_dict().items()}
    xp.load_released(target, {wrapper: state, "epoch": 3} if wrapper else state)
    with torch.no_grad():
        assert torch.equal(target(IMAGES), source(IMAGES))


def test_the_average_goes_before_the_raw_weights() -> None:
    model = tiny()
    raw = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    given = checkpoint_filter_fn({"state_dict": raw, "state_dict_ema": model.state_dict()}, model)
    assert all(torch.equal(given[name], value) for name, value in model.state_dict().items())


def test_positions_are_resized_bicubically_and_the_class_position_kept() -> None:
    small, large = tiny(), LVViT(48, 8, embed_dim=24, depth=3, num_heads=3, stem_width=8)
    large.reset_classifier(5)
    table = small.pos_embed.detach()
    image = table[:, 1:].transpose(1, 2).unflatten(2, (4, 4))
    image = F.interpolate(image, size=(6, 6), mode="bicubic", align_corners=False)
    xp.load_released(large, {"state_dict": small.state_dict()})
    assert torch.equal(large.pos_embed[:, :1], table[:, :1])
    torch.testing.assert_close(large.pos_embed[:, 1:].detach(), image.flatten(2).transpose(1, 2))


# ---------------------------------------------------------------------- compiled and exported


@pytest.fixture(scope="module")
def micro() -> LVViT:
    torch.manual_seed(0)
    model = xp.create_model("lvvit_micro_32", num_classes=6).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(0.1 * torch.randn_like(parameter)).mul_(4 if "head" in name else 1)
    return model


@pytest.mark.long
def test_compiles_into_one_graph_dense_logits_too(micro: LVViT) -> None:
    with torch.no_grad():
        for forward, inputs in ((micro, (IMAGES,)), (micro.forward_dense, (IMAGES, BOX))):
            compiled = torch.compile(forward, fullgraph=True, backend="eager")
            torch.testing.assert_close(compiled(*inputs), forward(*inputs))
    torch.compiler.reset()


@pytest.mark.long
def test_onnx_runtime_computes_what_torch_does_at_any_batch(micro: LVViT) -> None:
    import onnxruntime

    shipped = Shipped(micro, Preprocess((32, 32), (32, 32)))
    made = to_onnx(trace(shipped)).SerializeToString()
    session = onnxruntime.InferenceSession(made, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    for count in (1, 2, 5):
        pictures = np.random.default_rng(count).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        with torch.no_grad():
            expected = shipped(torch.from_numpy(pictures)).numpy()
        (got,) = session.run(None, {name: pictures})
        assert np.abs(got - expected).max() < 1e-5
        assert np.ptp(expected, axis=1).min() > 0.02


@pytest.mark.long
def test_the_dense_logits_are_exported_too(micro: LVViT) -> None:
    class Dense(nn.Module):
        def __init__(self, model: LVViT) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.model.forward_dense(x)[:2]

    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(Dense(micro), (IMAGES,), dynamic_shapes=({0: batch},))
    with torch.no_grad():
        found, expected = program.module()(IMAGES[:1]), micro.forward_dense(IMAGES[:1])[:2]
    torch.testing.assert_close(tuple(found), expected, atol=1e-5, rtol=1e-4)
