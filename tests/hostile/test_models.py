"""Model files of strangers: what becomes of them at every public door, how fast, in how much
memory. Pickles are recognised and never run; what does not fit is refused before it is allocated.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import crosspatch as xp
from crosspatch.cli.main import main
from crosspatch.errors import CrosspatchError
from support import foreign, hostile
from support.foreign import HEADERS, PICKLES, RAN
from support.runs import CLASSES, write_run

SECONDS, MEGABYTES = 2.0, 300


@pytest.fixture(autouse=True)
def quiet(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run, a picture and labelled pictures; and everything imported that the commands import."""
    root = tmp_path_factory.mktemp("whole")
    write_run(root / "run")
    for number, name in enumerate(CLASSES):
        (root / "data" / name).mkdir(parents=True)
        for seed in range(2):
            shown = hostile.picture(hostile.CLASSES[number % 3], seed + number)
            (root / "data" / name / f"{seed}.png").write_bytes(hostile.saved(shown, "PNG"))
    shutil.copy(root / "data" / CLASSES[0] / "0.png", root / "a.png")
    assert main(["predict", str(root / "run"), str(root / "a.png")]) == 0
    assert main(["eval", str(root / "run"), str(root / "data"), "--no-page"]) in (0, 2)
    return root


@pytest.fixture
def run(whole, tmp_path) -> Path:
    shutil.copytree(whole / "run", tmp_path / "run")
    return tmp_path / "run"


def weights(run: Path) -> Path:
    return run / "model" / "model.safetensors"


@pytest.fixture
def bounded() -> Iterator[None]:
    """What happens meanwhile takes neither long nor much memory."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, began = _memory("VmRSS"), time.process_time()
    yield
    assert time.process_time() - began < SECONDS
    assert _memory("VmHWM") - before < MEGABYTES * 1000
    assert not Path(RAN).exists()


def _memory(name: str) -> int:
    """Of this process, in kB."""
    found = re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(found[1]) if found else 0


DOORS: dict[str, Callable[[Path, Path], list[object]]] = {
    "predict": lambda path, whole: ["predict", path, whole / "a.png"],
    "eval": lambda path, whole: ["eval", path, whole / "data"],
    "export": lambda path, whole: ["export", path],
}


def refused(words: list[object], capfd, says: str, codes: tuple[int, ...] = (3,)) -> None:
    """The command ends with three lines that say why, and with no other code."""
    capfd.readouterr()
    code = main([str(word) for word in words])
    answer = capfd.readouterr()
    told = " ".join(answer.err.split())
    assert code in codes, told
    assert re.search(says, told), told
    assert "Traceback" not in told
    assert len(answer.err.strip().splitlines()) == 3, answer.err
    assert answer.err.isascii() or not {"\x1b", "\u202e"} & set(answer.err)


# ------------------------------------------------------------------ 51, 52: files of weights


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("name", ["torch, zip", "os.system, protocol 4", "builtins.eval"])
def test_pickles_at_every_door(name, door, run, whole, capfd, bounded):
    make, says = PICKLES[name]
    weights(run).write_bytes(make())
    refused(DOORS[door](run, whole), capfd, says)


@pytest.mark.parametrize("name", PICKLES)
def test_pickles_are_known_by_content(name, run, whole, capfd, bounded):
    make, says = PICKLES[name]
    weights(run).write_bytes(make())
    with pytest.raises(CrosspatchError, match=says):
        xp.load(run)
    shutil.copy(weights(run), "w.safetensors")
    refused(
        ["train", whole / "data", "--weights", "w.safetensors", "--model", "vit_micro_32",
         "--out", "new"], capfd, says,
    )  # fmt: skip
    assert not Path("new").exists()


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("name", ["length 2^63", "a shape that overflows", "duplicate keys"])
def test_headers_at_every_door(name, door, run, whole, capfd, bounded):
    make, says = HEADERS[name]
    weights(run).write_bytes(make())
    refused(DOORS[door](run, whole), capfd, says)


@pytest.mark.parametrize("name", HEADERS)
def test_impossible_headers_are_refused_with_the_reason(name, run, capfd, bounded):
    make, says = HEADERS[name]
    weights(run).write_bytes(make())
    refused(["predict", run, "a.png"], capfd, says)
    with pytest.raises(CrosspatchError, match=says):
        xp.load(run)


def test_a_pipe_is_not_waited_for(run, capfd, bounded):
    weights(run).unlink()
    os.mkfifo(weights(run))
    refused(["predict", run, "a.png"], capfd, "no regular file")


# ------------------------------------------------------------------ 56: weights that are no numbers


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("door", DOORS)
def test_weights_that_are_no_numbers_are_named(value, door, run, whole, capfd, bounded):
    state = load_file(weights(run))
    state["blocks.1.attn.qkv.weight"][3, 5] = value
    save_file(state, weights(run))
    refused(DOORS[door](run, whole), capfd, r"not finite: blocks\.1\.attn\.qkv\.weight")


# ------------------------------------------------------------------ run folders


def changed(**arguments: Any) -> Callable[[dict], Any]:
    return lambda config: config["model_args"].update(arguments)


def put(**entries: Any) -> Callable[[dict], Any]:
    return lambda config: config.update(entries)


DEEP = "[" * 100_000
CONFIGS: dict[str, tuple[Callable[[dict], Any] | str, str]] = {
    "a width of ten million": (changed(embed_dim=10**7), "embed_dim = 10000000"),
    "a width that numbers may have": (changed(embed_dim=120_000), "does not fit|values is asked"),
    "a million blocks": (changed(depth=10**6), "depth = 1000000"),
    "a hundred thousand blocks": (changed(depth=10**5), "far more parts"),
    "pictures of 100,000 pixels": (changed(img_size=[10**5, 10**5]), "makes no sense"),
    "another width": (changed(embed_dim=96), "does not fit the network .* misshapen"),
    "fewer blocks": (changed(depth=1), "unexpected: "),
    "no such argument": (changed(nonsense=1), "cannot be built"),
    "an argument of another kind": (changed(embed_dim="wide"), "cannot be built"),
    "a width of 0": (changed(embed_dim=0), "cannot be built|does not fit"),
    "a negative depth": (changed(depth=-1), "cannot be built|does not fit"),
    "weights from the network": (changed(pretrained=True), "pretrained, which is about other"),
    "weights from a pickle": (changed(checkpoint_path="x.pth"), "checkpoint_path, which is about"),
    "weights from elsewhere": (
        changed(pretrained_cfg={"file": "/etc/passwd"}), "pretrained_cfg, which is about other",
    ),
    "a cache elsewhere": (changed(cache_dir="/tmp/x"), "cache_dir, which is about other files"),
    "a list of 10^5": (changed(embed_dim=[1] * 10**5), "more than 10,000 values"),
    "lists in lists": (changed(embed_dim=[[[[[1]]]]]), "cannot be built"),
    "an unknown architecture": (put(architecture="vit_mikro_32"), "vit_mikro_32"),
    "an architecture from the hub": (put(architecture="hf_hub:a/b"), "hf_hub:a/b"),
    "an architecture in a folder": (put(architecture="local-dir:/tmp"), "local-dir:/tmp"),
    "an architecture of a path": (put(architecture="../../x"), r"\.\./\.\./x"),
    "100,000 transforms": (
        put(transforms=[{"kind": "reduce", "method": "tome", "options": {}}] * 10**5),
        "larger than 1 MB|reduced already|not JSON",
    ),
    "an unknown transform": (put(transforms=[{"kind": "exec"}]), "the transform"),
    "a transform that is none": (put(transforms=[7]), "the transform 7"),
    "a class twice": (put(class_names=["a", "a", "b", "c"]), "two classes are called 'a'"),
    "a class of a megabyte": (put(class_names=["a" * 10**6, "b", "c", "d"]), "letters|larger than"),
    "a class of 5000 letters": (put(class_names=["a" * 5000, "b", "c", "d"]), "5,000 letters"),
    "a class that is a number": (put(class_names=[1, 2, 3, 4]), "classes must be names"),
    "no classes": (put(class_names=[]), "there are no classes"),
    "fewer classes": (put(class_names=["a", "b"]), "4 classes with other names"),
    "a temperature of 0": (put(temperature=0), "temperature 0"),
    "a temperature that is a word": (put(temperature="hot"), "makes no sense"),
    "a temperature of 1e400": ('{"temperature": 1e400}', "too great"),
    "thresholds": (put(thresholds=[0.5]), "thresholds"),
    "a task that is a list": (put(task=["classify"]), "has the task"),
    "preprocessing of another kind": (put(preprocessing={"size": "large"}), "makes no sense"),
    "preprocessing that is a list": (put(preprocessing=[]), "is a list"),
    "NaN": ('{"temperature": NaN}', "NaN is no number"),
    "nested 100,000 times": (DEEP, "nested too deeply"),
    "a number of 10^5 digits": ("9" * 10**5, "100000 digits"),
    "a key twice": ('{"task": 1, "task": 2}', "twice"),
    "no object": ("[]", "lacks|not JSON|is a"),
    "null": ("null", "not JSON|is a"),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_descriptions_of_runs(name, run, capfd, bounded):
    change, says = CONFIGS[name]
    path = run / "model" / "config.json"
    if isinstance(change, str):
        path.write_text(change)
    else:
        config = json.loads(path.read_text())
        change(config)
        path.write_text(json.dumps(config))
    refused(["predict", run, "a.png"], capfd, says)
    with pytest.raises(CrosspatchError, match=says):
        xp.load(run)


def test_a_description_of_a_gigabyte_is_not_read(run, capfd, bounded):
    with (run / "model" / "config.json").open("r+b") as file:
        file.truncate(1 << 30)
    refused(["predict", run, "a.png"], capfd, "larger than 1 MB")


def test_a_description_that_never_ends(run, capfd, bounded):
    path = run / "model" / "config.json"
    path.unlink()
    path.symlink_to("/dev/zero")
    refused(["predict", run, "a.png"], capfd, "does not exist")


def test_the_run_itself_answers(run, whole, bounded):
    """What all others differ from in one thing."""
    found = xp.load(run).predict([whole / "a.png", np.zeros((5, 5, 3), np.uint8)])
    assert found.probs.shape == (2, 4)
    assert not found.failures
    assert foreign.tensors({"a": foreign.one()}, bytes(8))[8:9] == b"{"
