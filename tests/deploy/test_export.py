# SPDX-License-Identifier: Apache-2.0
"""Exports: every family of networks, what a file says and hides, and what is refused."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import crosspatch as xp
from crosspatch.data.augment import normalise
from crosspatch.data.preprocess import Preprocess
from crosspatch.deploy import export as room
from crosspatch.deploy import place as places
from crosspatch.deploy.bundle import KEY, check_pictures, read_bundle
from crosspatch.deploy.engines import open_engine
from crosspatch.deploy.export import EXCEPTIONS, bundle_info, export, export_model
from crosspatch.deploy.graph import Shipped, to_onnx, trace
from crosspatch.deploy.quantise import HEAD, LINEAR, PRODUCTS
from crosspatch.errors import DataError, UsageError
from crosspatch.layers.block import BlockSpec
from crosspatch.layers.reducer import Reducer
from crosspatch.layers.resize import FixedResize
from crosspatch.layers.stage import StageSpec
from crosspatch.layers.tokens import Merge, apply_merge, order
from crosspatch.models import registry
from crosspatch.training.package import Trained, save_model

CLASSES = ("ant", "bee", "cat")


class MergeFewest(Reducer):
    """Merges all but `left` patches into the first one, by the class row of block 0."""

    needs = frozenset({"class_row"})

    def __init__(self, left: int) -> None:
        super().__init__()
        self.left = left

    def after_attention(self, state, block, stats):
        if block:
            return state
        rank = order(stats.class_row.mean(dim=1)[:, state.n_prefix :]) + state.n_prefix
        prefix = torch.arange(state.n_prefix).expand(rank.shape[0], -1)
        keep = torch.cat([prefix, rank[:, : self.left]], dim=1)
        src = rank[:, self.left :]
        return apply_merge(state, Merge(keep, src, torch.full_like(src, state.n_prefix)))


SPECS = (
    BlockSpec(heads=3, qk=12, value=18, hidden=40),
    BlockSpec(heads=3, qk=0, value=12, hidden=0, shares=0),
    BlockSpec(heads=0, qk=0, value=0, hidden=16),
    BlockSpec(heads=2, qk=8, value=8, hidden=8, exists=False),
)
STAGES = (StageSpec(24, SPECS), StageSpec(32, SPECS[:1], stride=2))
SMALL_VIT = {"img_size": 16, "depth": 2, "embed_dim": 24}
ONE_EACH = {"depth": ((1, 1, 0),), "embed_dim": (24, 48), "num_heads": (2, 2)}
LARGER = {**ONE_EACH, "img_size": 48, "patch_size": (12, 16)}
SMALL_EVO = {"depth": (1, 1, 1), "keep_ratio": (1.0, 0.5, 0.5)}
FAMILIES = {
    "crossvit, cross": ("crossvit_micro_32", {**ONE_EACH, "img_size": 16}),
    "crossvit, class_token": ("crossvit_micro_32", {**ONE_EACH, "fusion": "class_token"}),
    "crossvit, all": ("crossvit_micro_32", {**ONE_EACH, "fusion": "all"}),
    "crossvit, none": ("crossvit_micro_32", {**ONE_EACH, "fusion": "none", "global_pool": "avg"}),
    "crossvit, patches of another size": ("crossvit_9_224", LARGER),
    "crossvit, dagger, deeper, oblong": (
        "crossvit_9_dagger_224",
        {**LARGER, "depth": ((1, 1, 1),), "img_size": (48, 64)},
    ),
    "crossvit, t2t": ("crossvit_9_224", {**LARGER, "stem": "t2t"}),
    "vit": ("vit_micro_32", {**SMALL_VIT, "img_size": 32}),
    "vit, merging": ("vit_micro_32", {**SMALL_VIT, "img_size": 32}),
    "vit, pooled": ("vit_micro_32", {**SMALL_VIT, "global_pool": "avg", "class_token": False}),
    "vit, max": ("vit_micro_32", {**SMALL_VIT, "global_pool": "max", "act_layer": "gelu_tanh"}),
    "vit, registers and scales": (
        "vit_micro_32",
        {**SMALL_VIT, "reg_tokens": 2, "init_values": 0.3, "qk_norm": True, "stem": "patch"},
    ),
    "vit, heterogeneous": ("vit_micro_32", {"img_size": 32, "stages": STAGES}),
    "deit, distilled": (
        "deit_tiny_distilled_patch16_224",
        {"img_size": 32, "depth": 1, "embed_dim": 24},
    ),
    "poolformer": ("poolformer_s12", {"img_size": 32, "embed_dims": (8, 16, 24, 32)}),
    "psvit": ("psvit_micro_32", {}),
    "resnet": ("resnet_micro_32", {}),
    "resnet, oblong, odd": ("resnet_micro_32", {"img_size": (26, 35)}),
    "resformer, oblong": ("resformer_micro_32", {"depth": 2, "img_size": (32, 24)}),
    "evo deit": (
        "evo_deit_tiny_patch16_224",
        {"img_size": 64, "depth": 3, "embed_dim": 24, "num_heads": 3},
    ),
    "lvvit": ("lvvit_micro_32", {"depth": 2}),
    "lvvit, merging": ("lvvit_micro_32", {"depth": 2}),
    "evo, stage-wise": ("evo_levit_micro_32", SMALL_EVO),
    "evo, layer-wise, oblong, odd": (
        "evo_levit_micro_32",
        {"depth": (1, 2, 1), "img_size": (36, 27), "stagewise": False},
    ),
    "evo, copy": ("evo_levit_micro_32", {**SMALL_EVO, "fast": "copy", "distillation": False}),
    "stvit-r": ("stvit_r_micro_32", {"released": True}),
    "stvit-r, detection, oblong": (
        "stvit_r_micro_32",
        {"img_size": (36, 44), "depths": (2, 6), "num_heads": (1, 2), "detection": True},
    ),
}
xp.list_models("crossvit*")  # registers them all
MICRO = [name for name in registry._ENTRIES if "_micro_" in name]
FAMILIES |= {n: (n, {}) for n in MICRO if n not in {name for name, _ in FAMILIES.values()}}
QUICK = ("crossvit, cross", "vit, merging", "vit, registers and scales")


def network(family: str) -> nn.Module:
    """A network with weights that leave no zero and no even answer."""
    name, arguments = FAMILIES[family]
    torch.manual_seed(0)
    model = xp.create_model(name, num_classes=3, **arguments).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.add_(0.1 * torch.randn_like(value)).mul_(8 if name.startswith("head") else 1)
    if family.endswith("merging"):
        model.reducer = MergeFewest(9)
    return model


def trained(family: str) -> Trained:
    model = network(family)
    preprocess = Preprocess(tuple(model.img_size), tuple(model.img_size), mean=(0.4, 0.5, 0.6))
    return Trained(model, CLASSES, preprocess, 1.7, 30)


def write_run(folder: Path, family: str = "vit", report: bool = True) -> Path:
    """A run folder with a network of that family, as a training leaves it."""
    made, (name, arguments) = trained(family), FAMILIES[family]
    config = {
        "architecture": name,
        "model_args": {"num_classes": 3, **arguments},
        "class_names": list(CLASSES),
        "preprocessing": made.preprocess.to_dict(),
        "transforms": [],
        "temperature": 1.7,
        "calibrated_on": 30,
    }
    save_model(folder / "model", made.module, config)
    if report:
        figures = {"accuracy": 0.9, "low": 0.8, "high": 0.95, "images": 40, "ece": 0.1}
        (folder / "report.json").write_text(json.dumps({"test": figures, "val": None}))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run and its fp32 bundle: read them, change nothing."""
    folder = write_run(tmp_path_factory.mktemp("export") / "run")
    export(folder)
    return folder


def pictures(size: tuple[int, int], count: int) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, *size, 3), dtype=np.uint8)


@pytest.fixture
def untraced(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports of `run` take the graph that lies there, which saves seconds."""

    def copied(shipped: Shipped, shop: Path, info: object) -> Path:
        return Path(shutil.copy(run / "bundle.onnx", shop / "whole.onnx"))

    monkeypatch.setattr(room, "_write_onnx", copied)


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=[] if f in QUICK else pytest.mark.long) for f in FAMILIES]
)
def test_every_family_is_exported_and_answers_as_torch_does(family: str, tmp_path: Path) -> None:
    made = trained(family)
    export_model(made.module, tmp_path / "b.onnx", bundle_info(made, family))
    engine = open_engine(read_bundle(tmp_path / "b.onnx"))
    shipped = Shipped(made.module, made.preprocess, made.temperature)
    for count in (1, 2, 7):
        images = pictures(made.preprocess.size, count)
        with torch.no_grad():
            expected = shipped(torch.from_numpy(images)).numpy()
        assert np.abs(engine.run(images) - expected).max() < 1e-5
        assert np.ptp(expected, axis=1).min() > 0.02
    assert [path.name for path in tmp_path.iterdir()] == ["b.onnx"]


def test_the_families_stand_for_every_registered_name() -> None:
    """A new backbone has to appear above, or in EXCEPTIONS with the reason why it fails."""
    kind = re.compile("[a-z]+")
    families = {kind.findall(name)[0] for name, _ in FAMILIES.values()}
    unknown = {
        name
        for name in registry._ENTRIES
        if kind.findall(name)[0] not in families and not any(fnmatch(name, p) for p in EXCEPTIONS)
    }
    assert not unknown


@pytest.mark.parametrize(
    ("name", "operator"),
    [
        ("nextvit_micro_32", "batch_norm"),
        ("convnext_micro_32", "mul"),
        ("convnext_isotropic_micro_32", "mul"),
    ],
)
def test_norms_and_scales_are_folded_into_weights(name: str, operator: str, monkeypatch) -> None:
    build = {} if "nextvit" in name else {"ls_init_value": 1.0}
    model = xp.create_model(name, num_classes=3, **build).eval()
    shipped = Shipped(model, Preprocess((32, 32), (32, 32)))

    def count() -> int:
        return sum(operator in str(node.target) for node in trace(shipped).graph.nodes)

    folded = count()
    monkeypatch.setattr(type(model), "for_inference", lambda self: self)
    assert folded < count()
    assert shipped.module is model


@pytest.mark.parametrize("pattern", EXCEPTIONS or ["none"])
def test_what_is_listed_as_an_exception_does_fail(pattern: str, tmp_path: Path) -> None:
    for name in registry._ENTRIES if EXCEPTIONS else ():
        if fnmatch(name, pattern):
            model = xp.create_model(name, num_classes=3).eval()
            size = tuple(model.img_size)
            made = Trained(model, CLASSES, Preprocess(size, size), 1.0, 0)
            with pytest.raises(DataError, match=EXCEPTIONS[pattern]):
                export_model(model, tmp_path / "b.onnx", bundle_info(made, name))


def test_a_graph_computes_what_training_and_evaluation_do() -> None:
    made = trained("vit")
    images = torch.from_numpy(pictures(made.preprocess.size, 3))
    with torch.no_grad():
        logits = made.module(normalise(images, made.preprocess))
        shipped = Shipped(made.module, made.preprocess, 1.7)(images)
    assert torch.equal(shipped, (logits / 1.7).softmax(dim=-1))


def test_a_bundle_says_what_the_run_knows(run: Path) -> None:
    bundle = read_bundle(run / "bundle.onnx")
    info, made = bundle.info, trained("vit")
    digest = hashlib.sha256((run / "model" / "model.safetensors").read_bytes()).hexdigest()
    assert (info.classes, info.preprocess) == (CLASSES, made.preprocess)
    assert (info.temperature, info.calibrated_on) == (1.7, 30)
    assert info.weights == digest
    assert info.parameters == sum(p.numel() for p in made.module.parameters())
    assert info.macs > 100_000
    expected = {"split": "test", "images": 40, "accuracy": 0.9, "low": 0.8, "high": 0.95}
    assert info.accuracy == expected
    assert info.versions["torch"].startswith("2.")
    answers = open_engine(bundle).run(check_pictures(info.preprocess.size))
    assert np.abs(answers - np.array(info.check)).max() < 1e-5


def test_the_file_is_lean_and_names_no_path(run: Path) -> None:
    model = onnx.load(run / "bundle.onnx")
    graph = model.graph
    assert not graph.value_info
    assert not any(part.metadata_props or part.doc_string for part in (*graph.node, graph))
    assert [entry.key for entry in model.metadata_props] == [KEY]
    contents = [tensor.SerializeToString() for tensor in graph.initializer if len(tensor.dims) > 1]
    assert len(contents) == len(set(contents))
    weights = (run / "model" / "model.safetensors").stat().st_size
    assert (run / "bundle.onnx").stat().st_size < weights + 60_000
    raw = (run / "bundle.onnx").read_bytes()
    here = Path(room.__file__).parent.parent
    words = (str(here), str(Path.home()), "site-packages", ".py", str(run))
    assert not [word for word in words if word.encode() in raw]


def test_products_are_named_after_their_modules(run: Path) -> None:
    """The last block projects queries of the class token alone: its `qkv` is two products."""
    named = {node.name for node in onnx.load(run / "bundle.onnx").graph.node}
    found = {name for name in named if name.startswith((LINEAR, HEAD))}
    parts = ("0.attn.qkv", "0.attn.proj", "0.mlp.fc1", "0.mlp.fc2", "1.attn", "1.attn#2",
             "1.attn.proj", "1.mlp.fc1", "1.mlp.fc2")  # fmt: skip
    assert found == {*(f"{LINEAR}blocks.{part}" for part in parts), f"{HEAD}head"}


def test_both_heads_and_no_pixels_are_told_apart() -> None:
    class Pixels(nn.Module):
        """Two ways to the logits, each from resized pixels through a Linear and a head."""

        img_size = (6, 6)

        def __init__(self) -> None:
            super().__init__()
            self.resize = FixedResize((4, 4), (6, 6))
            self.body = nn.Linear(48, 8)
            self.heads = nn.ModuleList(nn.Linear(8, 3) for _ in range(2))

        def forward(self, x):
            tokens = self.body(self.resize(x).flatten(1)[:, None]).relu()[:, 0]
            return torch.stack([head(tokens) for head in self.heads]).mean(dim=0)

    shipped = Shipped(Pixels(), Preprocess((6, 6), (6, 6))).eval()
    nodes = [node for node in to_onnx(trace(shipped)).graph.node if node.op_type in PRODUCTS]
    ours = [node.name for node in nodes if node.name.startswith((LINEAR, HEAD))]
    assert sorted(ours) == [f"{HEAD}heads.0", f"{HEAD}heads.1", f"{LINEAR}body"]
    assert len(nodes) == 5


def test_the_client_stands_beside_the_bundle(run: Path) -> None:
    source = Path(room.__file__).with_name("client.py")
    assert (run / "client.py").read_bytes() == source.read_bytes()


def test_openvinos_pair_says_and_computes_the_same(
    run: Path, tmp_path: Path, untraced: None
) -> None:
    made = export(run, "openvino", out=tmp_path / "b.xml")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.bin", "b.xml"]
    bundle = read_bundle(tmp_path / "b.xml")
    assert bundle.info == read_bundle(run / "bundle.onnx").info == made.info
    assert bundle.size == made.size
    images = pictures(made.info.preprocess.size, 5)
    expected = open_engine(read_bundle(run / "bundle.onnx")).run(images)
    assert np.abs(open_engine(bundle, "openvino").run(images) - expected).max() < 1e-5


def test_torchs_archive_computes_the_same_without_us(run: Path, tmp_path: Path) -> None:
    export(run, "torch", out=tmp_path / "b.pt2")
    extra = {KEY: ""}
    module = torch.export.load(tmp_path / "b.pt2", extra_files=extra).module()
    images = pictures((32, 32), 5)
    expected = open_engine(read_bundle(run / "bundle.onnx")).run(images)
    assert np.abs(module(torch.from_numpy(images)).detach().numpy() - expected).max() < 1e-5
    assert json.loads(extra[KEY])["classes"] == list(CLASSES)
    places.check_place(tmp_path / "b.pt2", "torch")  # ours, so it may be replaced
    assert str(Path(room.__file__).parent.parent).encode() not in (tmp_path / "b.pt2").read_bytes()


@pytest.mark.parametrize(
    ("ask", "says"),
    [
        ({"to": "onx"}, "--to onnx"),
        ({"to": "torch", "int8": True}, "--to onnx --int8"),
        ({"static": True}, "calibration"),
        ({"out": "{}"}, "is a folder"),
        ({"out": "{}/none/b.onnx"}, "no such folder"),
        ({"out": "{}/b.xml"}, r"b\.onnx"),
        ({"out": "{}/b", "to": "openvino"}, r"b\.xml"),
        ({"out": "{}/notes.onnx"}, "no bundle that crosspatch wrote"),
        ({"out": "{}/notes.pt2", "to": "torch"}, "no bundle that crosspatch wrote"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_any_work(
    run: Path, tmp_path: Path, ask: dict, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "load_model", lambda folder: pytest.fail("work was done"))
    for name in ("notes.onnx", "notes.pt2"):
        (tmp_path / name).write_text("mine")
    asked = {key: v.format(tmp_path) if key == "out" else v for key, v in ask.items()}
    with pytest.raises(UsageError, match=says):
        export(run, **asked)
    assert (tmp_path / "notes.onnx").read_text() == "mine"


def test_a_disk_that_cannot_be_written_is_said(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(room, "_traced", lambda shipped, info, finish: b"a graph")
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UsageError, match="No space left"):
        export(run, out=tmp_path / "b.onnx")
    assert not list(tmp_path.iterdir())


def test_a_graph_that_computes_something_else_leaves_nothing(
    tmp_path: Path, untraced: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, right = trained("vit"), room._answers
    info = bundle_info(made, "vit_micro_32")
    monkeypatch.setattr(room, "_answers", lambda shipped, images: right(shipped, images) + 2e-4)
    with pytest.raises(DataError, match=r"other probabilities than torch \(by 0\.0002\)"):
        export_model(made.module, tmp_path / "b.onnx", info)
    monkeypatch.setattr(room, "_answers", lambda shipped, images: right(shipped, images) * np.nan)
    with pytest.raises(DataError, match=r"by nan"):
        export_model(made.module, tmp_path / "b.onnx", info)
    assert not list(tmp_path.iterdir())


def test_a_network_that_cannot_be_traced_is_a_data_error(tmp_path: Path) -> None:
    class Moody(nn.Module):
        img_size = (8, 8)

        def forward(self, x):
            return x.mean((2, 3)) if x.mean().item() > 0 else x.amax((2, 3))

    made = trained("vit")
    with pytest.raises(DataError, match="vit_micro_32 cannot be exported") as caught:
        export_model(Moody(), tmp_path / "b.onnx", bundle_info(made, "vit_micro_32"))
    assert "\n" not in caught.value.got
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("report.json", None, "is missing"),
        ("report.json", "{", "is damaged"),
        ("report.json", '{"test": {"accuracy": 1}}', "is damaged"),
        ("report.json", '{"test": null, "val": null}', "tested on no picture"),
    ],
)
def test_a_run_without_figures_is_remarked(tmp_path: Path, name, text, says) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    figures, remarks = room._accuracy(tmp_path / name)
    assert figures is None
    assert says in remarks[0]


def test_a_run_without_whole_weights_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"config\.json does not exist"):
        export(tmp_path)
    shutil.copytree(run / "model", tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(DataError, match="missing or torn"):
        export(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_a_killed_export_left_is_removed_once_it_is_old(tmp_path: Path) -> None:
    import os

    for name, age in (("old", 2 * places.STALE), ("new", 0)):
        left = tmp_path / f".writing-bundle-{name}"
        left.mkdir()
        (left / "whole.onnx").write_text("half")
        then = left.stat().st_mtime - age
        os.utime(left, (then, then))
    with places.workshop(tmp_path / "b.onnx"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [".writing-bundle-new"]


def test_another_file_of_the_clients_name_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "client.py").write_text("print('mine')")
    assert "was not written" in places.write_client(tmp_path)[0]
    assert (tmp_path / "client.py").read_text() == "print('mine')"
    (tmp_path / "client.py").unlink()
    assert places.write_client(tmp_path) == places.write_client(tmp_path) == []
