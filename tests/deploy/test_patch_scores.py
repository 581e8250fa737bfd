# SPDX-License-Identifier: Apache-2.0
"""Scores of patches: what `explain` says, in every engine, and the answer stays as it was."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from deploy.test_export import pictures, write_run
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import crosspatch as xp
from crosspatch.cli.main import main
from crosspatch.data.preprocess import Preprocess
from crosspatch.deploy import export as room
from crosspatch.deploy.bundle import KEY, SURE, BundleInfo, read_bundle
from crosspatch.deploy.engines import open_engine
from crosspatch.deploy.export import export, sure_from
from crosspatch.deploy.patch_scores import Explained, spread, why_no_scores
from crosspatch.errors import DataError, UsageError
from crosspatch.explain import dla
from crosspatch.explain.attention import layout, written_from
from support.explainable import MODELS
from support.explainable import pictures as inputs

REFUSED = {
    "vit max": "by max",
    "vit of uneven blocks": "grids or widths of their own",
    "timm vit": "not built of attention",
    "lvvit": "largest of its patches",
    "crossvit all": "attention over all tokens",
}
RUNS = {
    "vit": (8, 8),
    "crossvit, cross": (4, 4),
    "deit, distilled": (2, 2),
    "vit, pooled": (4, 4),
    "crossvit, class_token": (8, 8),
    "crossvit, dagger, deeper, oblong": (4, 6),
}


@pytest.mark.parametrize("name", MODELS)
def test_scores_are_what_explain_says_or_refused_with_the_reason(name: str) -> None:
    model, images = MODELS[name](), inputs(3)
    usual = Preprocess((32, 32), (32, 32))
    if name in REFUSED:
        with pytest.raises(UsageError, match=REFUSED[name]):
            Explained(model, usual)
        return
    shipped = Explained(model, usual).eval()
    shipped.normalised = lambda image: image
    with torch.no_grad():
        _, found = shipped(images)
        best = model(images).argmax(dim=1)
    apart = written_from(layout(model, images), dla(model, images, best, sources=True))
    wanted = np.zeros((3, *shipped.grid))
    for one in apart.values():
        down, across = (
            spread(o, n).numpy() for o, n in zip(one.shape[1:], shipped.grid, strict=True)
        )
        wanted += down @ one @ across.T
    largest = np.abs(wanted).max()
    assert largest > 1e-4
    assert np.abs(found.numpy() - wanted).max() < 1e-4 * largest
    assert found.numpy().sum((1, 2)) == pytest.approx(
        sum(one.sum((1, 2)) for one in apart.values()), abs=1e-4 * np.abs(wanted).sum()
    )
    assert not any(module._forward_pre_hooks for module in model.modules())


@given(st.integers(1, 30), st.integers(1, 30))
def test_nothing_is_lost_on_another_grid(old: int, new: int) -> None:
    shares = spread(old, new).double()
    assert shares.shape == (new, old)
    assert (shares >= 0).all()
    assert shares.sum(dim=0).numpy() == pytest.approx(1, abs=1e-5)
    if old == new:
        assert shares.numpy() == pytest.approx(np.eye(old), abs=1e-5)
    flat = shares @ torch.full((old,), 1 / old).double()  # an even map stays even
    assert flat.numpy() == pytest.approx(1 / new, abs=1e-5)


def test_reduced_tokens_are_refused() -> None:
    model = xp.create_model("vit_micro_32", num_classes=3)
    assert why_no_scores(model) is None
    reduced, _ = xp.reduce(model, "mctf", r=4)
    assert "reduced" in (why_no_scores(reduced) or "")
    assert why_no_scores(xp.create_model("resnet_micro_32", num_classes=3)) is not None


@pytest.mark.parametrize("family", [
    pytest.param(one, marks=[] if one in ("vit", "crossvit, cross") else pytest.mark.long)
    for one in RUNS
])  # fmt: skip
def test_a_second_output_changes_no_answer(family: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", family)
    plain = open_engine(read_bundle(export(run, out=tmp_path / "p.onnx").path))
    made = export(run, explain=True, out=tmp_path / "e.onnx")
    pair = export(run, "openvino", explain=True, out=tmp_path / "e.xml")
    assert made.info.explains
    assert read_bundle(made.path).info == made.info
    shipped = room._shipped(room.load_model(run / "model").module, made.info)
    one = open_engine(read_bundle(made.path))
    other = open_engine(read_bundle(pair.path), "openvino")
    names = [node.name for node in onnx.load(made.path).graph.node if node.name.startswith("lin")]
    before = [n.name for n in onnx.load(tmp_path / "p.onnx").graph.node if n.name.startswith("lin")]
    assert {*before} <= {*names}
    for count in (1, 2, 3):
        images = pictures(made.info.preprocess.size, count)
        with torch.no_grad():
            wanted = shipped(torch.from_numpy(images))[1].numpy()
        assert wanted.shape == (count, *RUNS[family])
        for engine in (one, other):
            probabilities, patches = engine.explain(images)
            assert patches.dtype == np.float32
            assert np.abs(patches - wanted).max() < 1e-4 * max(1, np.abs(wanted).max())
            assert np.abs(probabilities - plain.run(images)).max() < 1e-5
            assert np.array_equal(engine.run(images), probabilities)
            kept = patches.copy()
            engine.explain(pictures(made.info.preprocess.size, 2))
            assert np.array_equal(patches, kept)
    with pytest.raises(UsageError, match="--explain"):
        plain.explain(images)


@pytest.fixture(scope="module")
def explained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with its explaining bundle: read them, change nothing."""
    run = write_run(tmp_path_factory.mktemp("explain") / "run")
    export(run, explain=True)
    return run


def test_int8_keeps_its_products_and_its_scores(explained: Path, tmp_path: Path) -> None:
    whole = open_engine(read_bundle(explained / "bundle.onnx"))
    plain = export(explained, int8=True, out=tmp_path / "p.onnx")
    made = export(explained, int8=True, explain=True, out=tmp_path / "q.onnx")
    assert made.info.explains
    first, second = (
        {node.name for node in onnx.load(one.path).graph.node if node.op_type == "MatMulInteger"}
        for one in (plain, made)
    )
    assert first <= second
    assert len(first) > 5
    images = pictures(made.info.preprocess.size, 8)
    probabilities, patches = open_engine(read_bundle(made.path)).explain(images)
    assert np.abs(probabilities - open_engine(read_bundle(plain.path)).run(images)).max() < 1e-6
    before, wanted = whole.explain(images)
    same = probabilities.argmax(axis=1) == before.argmax(axis=1)
    assert same.mean() > 0.5
    alike = [np.corrcoef(patches[i].ravel(), wanted[i].ravel())[0, 1] for i in np.flatnonzero(same)]
    assert np.median(alike) > 0.9


def test_who_does_not_ask_for_scores_needs_to_know_nothing(
    explained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size = read_bundle(explained / "bundle.onnx").info.preprocess.size
    folder = explained / "pictures"
    folder.mkdir()
    for number, pixels in enumerate(pictures(size, 3)):
        Image.fromarray(pixels).save(folder / f"{number}.png")
    bare = [sys.executable, "client.py", "bundle.onnx", "pictures/0.png"]
    said = subprocess.run(bare, cwd=explained, capture_output=True, text=True, check=True).stdout
    bundle = str(explained / "bundle.onnx")
    assert main(["predict", bundle, str(folder), "--json"]) == 0
    best = json.loads(capsys.readouterr().out)["predictions"][0]["top"][0]["class"]
    assert best in said
    assert main(["verify", bundle, str(folder)]) == 0


def test_what_cannot_be_is_refused_and_leaves_nothing(explained: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--to torch"):
        export(explained, "torch", explain=True, out=tmp_path / "a.pt2")
    run = write_run(tmp_path / "resnet", "resnet")
    with pytest.raises(UsageError, match="without --explain"):
        export(run, explain=True, out=tmp_path / "a.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["resnet"]


def test_a_graph_that_computes_other_scores_is_not_written(
    explained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(self, image):
        probabilities, patches = inner(self, image)
        return probabilities, patches if torch.compiler.is_compiling() else patches * 1.01

    inner = Explained.forward
    monkeypatch.setattr(Explained, "forward", other)
    with pytest.raises(DataError, match="scores of patches"):
        export(explained, explain=True, out=tmp_path / "a.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("lie", ["no scores", "scores"])
def test_a_graph_and_its_description_belong_together(
    explained: Path, tmp_path: Path, lie: str
) -> None:
    model = onnx.load(explained / "bundle.onnx")
    info = read_bundle(explained / "bundle.onnx").info
    if lie == "no scores":
        del model.graph.output[1]
    else:
        info = replace(info, explains=False)
    onnx.helper.set_model_props(model, {KEY: info.to_json()})
    onnx.save(model, tmp_path / "b.onnx")
    for engine in ("onnxruntime", "openvino"):
        with pytest.raises(DataError, match="patches float32"):
            open_engine(read_bundle(tmp_path / "b.onnx"), engine)


def test_the_description_keeps_to_what_older_readers_know(explained: Path) -> None:
    info = read_bundle(explained / "bundle.onnx").info
    assert json.loads(info.to_json())["explains"] is True
    plain = json.loads(replace(info, explains=False).to_json())
    assert not {"explains", "sure"} & set(plain)
    sure = replace(info, sure=0.75)
    assert BundleInfo.from_json(sure.to_json()).sure == 0.75
    for key, value in (("explains", 1), ("sure", 1.5), ("sure", "0.5"), ("sure", True)):
        with pytest.raises(DataError, match="makes no sense"):
            BundleInfo.from_json(json.dumps({**plain, key: value}))


@given(st.lists(st.tuples(st.floats(0.01, 1), st.booleans()), max_size=80))
def test_sure_is_the_lowest_confidence_that_holds(rows: list[tuple[float, bool]]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "predictions.csv"
        with table.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["path", "split", "confidence", "correct"])
            writer.writerows(["a", "val", f"{c:.6f}", int(right)] for c, right in rows)
            writer.writerows(["b", "test", "0.000001", 1] for _ in range(50))
        found = sure_from(table)
    rounded = [(float(f"{c:.6f}"), right) for c, right in rows]

    def holds(threshold: float) -> bool:
        kept = [right for c, right in rounded if c >= threshold]
        return len(kept) >= 20 and sum(kept) / len(kept) >= SURE

    possible = [c for c, _ in rounded if holds(c)]
    assert found == (min(possible) if possible else None)


@pytest.mark.parametrize(
    "text", [None, "", "path,split\na,val\n", "split,confidence,correct\nval,x,1\n"]
)
def test_without_a_whole_table_nobody_is_sure(tmp_path: Path, text: str | None) -> None:
    table = tmp_path / "predictions.csv"
    if text is not None:
        table.write_text(text)
    assert sure_from(table) is None
