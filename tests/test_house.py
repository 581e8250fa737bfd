"""The house itself: what is built, what an import costs, what stands where."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import crosspatch
from crosspatch import _torchvision, errors

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "src" / "crosspatch").rglob("*.py"))


def run(script: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_holds_every_room(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    expected = {str(path.relative_to(ROOT / "src")) for path in SOURCES}
    assert expected <= inside
    assert any(name.endswith("licenses/LICENSE") for name in inside)


def test_models_import_in_a_process_of_their_own() -> None:
    """The declared operators hold wherever timm and torchmetrics are imported through us."""
    run("import crosspatch.models, torchvision, timm, torchmetrics")
    run("import crosspatch as xp; xp.create_model; import torchvision, timm, torchmetrics")


def test_operators_are_declared_only_where_they_are_missing() -> None:
    script = (
        "import torch\n"
        "library = torch.library.Library('torchvision', 'FRAGMENT')\n"
        "library.define('nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')\n"
        "library.define('qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')\n"
        "import crosspatch._torchvision as shim\n"
        "print(shim._declared, shim.declare_missing_operators())\n"
    )
    assert run(script).strip() == "[] []"
    assert _torchvision.declare_missing_operators() == []  # a second call declares nothing


def test_every_import_of_torchvision_or_timm_comes_after_ours() -> None:
    for path in SOURCES:
        text = path.read_text()
        first = re.search(r"^\s*(?:from|import) (?:torchvision|timm|torchmetrics)\b", text, re.M)
        if first is None:
            continue
        ours = re.search(r"^\s*(?:import crosspatch\._torchvision|from crosspatch import _torch)",
                         text, re.M)  # fmt: skip
        assert ours is not None, path
        assert ours.start() < first.start(), path


def test_nothing_unpickles_and_nothing_is_left_undone() -> None:
    forbidden = (
        r"import pickle|pickle\.load|torch\.load\(|weights_only=False|TODO|FIXME|raise NotImpl"
    )
    for path in SOURCES:
        assert not re.search(forbidden, path.read_text()), path


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT / "src")))
def test_public_things_are_documented(path: Path) -> None:
    import ast

    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), "the file"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), node.name


def test_errors_have_three_parts_and_an_exit_code() -> None:
    import copy

    error = errors.DataError("got", "expected", "do")
    assert str(error) == "got. expected. do."
    assert copy.copy(error).do == "do"
    codes = [c.exit_code for c in (errors.UsageError, errors.DataError, errors.Interrupted)]
    assert codes == [2, 3, 4]
    assert errors.near("crosvit", ["crossvit", "swin"]) == "crossvit"


def test_unknown_names_of_the_package_are_refused() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        crosspatch.nonsense  # noqa: B018
    assert "create_model" in dir(crosspatch)
