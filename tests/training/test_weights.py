"""`--weights`: what each word means, what is refused and how, and that nothing asks the network."""

from __future__ import annotations

import json
import shlex
import shutil
import tomllib

import pytest
import torch
from safetensors.torch import load_file, save_file

import crosspatch as xp
from crosspatch.data.tensors import conversion
from crosspatch.errors import DataError, UsageError
from crosspatch.training import released
from crosspatch.training.package import load_model
from crosspatch.training.recipe import Recipe
from crosspatch.training.released import HUB_FILE, Release, release_of
from crosspatch.training.session import train_run
from crosspatch.training.weights import find
from support.hub import empty_cache, refuse_network
from support.runs import write_run

VIT = {"model": "vit_micro_32", "size": 32, "batch": 16, "epochs": 1, "threads": 1}
RELEASED = "deit_tiny_patch16_224"


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    refuse_network(monkeypatch)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of Hugging Face; `put(name, state)` enters a checkpoint."""
    return empty_cache(monkeypatch, tmp_path / "hub")


@pytest.fixture
def offline(monkeypatch):
    """The network does not answer, and how long it was waited for is noted."""
    waited = []

    def fetch(self, seconds):
        waited.append(seconds)
        raise DataError(f"{self.name} could not be fetched (no network)", "a network", self.command)

    monkeypatch.setattr(Release, "fetch", fetch)
    return waited


def recipe_of(run):
    return Recipe.from_dict(tomllib.loads((run / "config.toml").read_text())["recipe"])


def tensors(run):
    return load_file(run / "model" / "model.safetensors")


def looked(asked, model="vit_micro_32"):
    heard = []
    return find(str(asked), model, {}, heard, heard.append), heard


def test_none_is_from_scratch():
    assert looked("none") == (None, [])


def test_a_run_gives_model_size_and_preprocessing(opened, tmp_path):
    other = write_run(tmp_path / "other")
    for number, folder in enumerate((other, other / "model")):
        typed = {"weights": folder, "epochs": 1, "batch": 16, "lr": 1e-9, "ema": 0.0}
        train_run("stripes", tmp_path / f"r{number}", typed)
        recipe = recipe_of(tmp_path / f"r{number}")
        assert recipe.weights["kind"] == "run"
        assert recipe.weights["where"] == str(folder)
        assert len(recipe.weights["sha256"]) == 64
        assert (recipe.size, recipe.store) == ((32, 32), (36, 40))
        assert load_model(tmp_path / f"r{number}").preprocess == load_model(other).preprocess
        mine, theirs = tensors(tmp_path / f"r{number}"), tensors(other)
        parts = ("blocks", "cls_token", "pos_embed", "norm.")
        body = [name for name in mine if name.startswith(parts)]
        assert len(body) > 40
        assert all((mine[name] - theirs[name]).abs().max() < 1e-5 for name in body)


def test_a_run_at_another_size_has_its_positions_resized(opened, tmp_path):
    other = write_run(tmp_path / "other")
    typed = {"weights": other, "size": (24, 40), "epochs": 1, "batch": 16, "recipe": "small"}
    train_run("stripes", tmp_path / "r", typed)
    assert recipe_of(tmp_path / "r").size == (24, 40)
    assert tensors(tmp_path / "r")["pos_embed"].shape[1] == 1 + 6 * 10


def test_heads_of_a_run_are_matched_by_name_through_a_whole_training(opened, tmp_path):
    train_run("stripes", tmp_path / "first", {**VIT, "seed": 3})
    typed = {"weights": tmp_path / "first", "epochs": 1, "batch": 16, "lr": 1e-9, "seed": 3}
    train_run("stripes", tmp_path / "second", {**typed, "ema": 0.0})
    assert recipe_of(tmp_path / "second").head_rows == (0, 1, 2)
    one, two = (tensors(tmp_path / name)["head.weight"] for name in ("first", "second"))
    assert torch.allclose(one, two, atol=1e-5)


def test_pictures_that_a_run_or_one_before_it_was_trained_on_never_judge(opened, tmp_path):
    train_run("stripes", tmp_path / "first", {**VIT, "seed": 5})
    short = {"epochs": 1, "batch": 16, "recipe": "small"}
    refused = pytest.raises(UsageError, match=r"was trained on \d+ of the pictures.*add --seed 5")
    for place in (tmp_path / "first", tmp_path / "first" / "model"):
        with refused:
            train_run("stripes", tmp_path / "r", {**short, "weights": place})
    train_run("stripes", tmp_path / "second", {**short, "weights": tmp_path / "first", "seed": 5})
    config = tmp_path / "second" / "config.toml"
    text = config.read_text()
    mark = tomllib.loads(text)["run"]["fingerprint"]
    config.write_text(text.replace(mark, "0" * len(mark)))  # as if it had had other pictures
    with refused:
        train_run("stripes", tmp_path / "r", {**short, "weights": tmp_path / "second"})


def test_a_file_for_the_model_that_is_asked_for(opened, tmp_path):
    torch.manual_seed(1)
    theirs = xp.create_model("vit_micro_32", num_classes=7)
    save_file(theirs.state_dict(), tmp_path / "w.safetensors")
    typed = {**VIT, "weights": tmp_path / "w.safetensors", "lr": 1e-9, "ema": 0.0}
    train_run("stripes", tmp_path / "r", typed)
    mine = tensors(tmp_path / "r")
    assert torch.allclose(mine["blocks.0.attn.qkv.weight"], theirs.blocks[0].attn.qkv.weight,
                          atol=1e-6)  # fmt: skip
    assert recipe_of(tmp_path / "r").weights["kind"] == "file"
    reasons = tomllib.loads((tmp_path / "r" / "config.toml").read_text())["why"]["reasons"]
    assert any("head of 7 classes is left away" in one for one in reasons)
    with pytest.raises(DataError, match=r"do not fit CrossViT; missing: .* and \d+ more"):
        train_run("stripes", tmp_path / "s", {**typed, "model": "crossvit_micro_32"})
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("prepare", "error", "match"),
    [
        (lambda p: p.write_bytes(b"\x08\0\0\0\0\0\0\0{"), DataError, "torn"),
        (lambda p: p.write_bytes(b""), DataError, "torn"),
        (lambda p: save_file({"a": torch.zeros(1)}, p), DataError, "missing: .*unexpected: a"),
    ],
)
def test_damaged_and_foreign_files(opened, tmp_path, prepare, error, match):
    prepare(tmp_path / "w.safetensors")
    with pytest.raises(error, match=match):
        train_run("stripes", tmp_path / "r", {**VIT, "weights": tmp_path / "w.safetensors"})
    assert not (tmp_path / "r").exists()


def test_weights_that_are_not_finite(opened, tmp_path):
    other = write_run(tmp_path / "other")
    state = tensors(other)
    state["norm.weight"][0] = torch.nan
    save_file(state, other / "model" / "model.safetensors")
    for place in (other, other / "model" / "model.safetensors"):
        with pytest.raises(DataError, match=r"not finite: norm\.weight"):
            train_run("stripes", tmp_path / "r", {**VIT, "weights": place, "model": "vit_micro_32"})


def test_folders_that_are_no_run(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"config\.json does not exist"):
        looked(tmp_path / "empty")
    other = write_run(tmp_path / "other")
    with pytest.raises(UsageError, match="is of vit_micro_32, and --model says crossvit_micro_32"):
        find(str(other), "crossvit_micro_32", {"model": "crossvit_micro_32"}, [], print)
    (other / "model" / "model.safetensors").unlink()
    with pytest.raises(DataError, match=r"model\.safetensors does not exist"):
        looked(other)
    (other / "model" / "config.json").write_text(json.dumps({"architecture": "x"}))
    with pytest.raises(DataError, match="lacks"):
        looked(other)


def test_a_pickle_is_never_opened_and_the_command_that_converts_it_works(tmp_path):
    path = tmp_path / "a file's.pth"
    state = {"weight": torch.arange(6.0).view(2, 3).T, "tied": torch.ones(2)}
    torch.save({"model": state}, path)
    with pytest.raises(DataError, match="keeps a pickle") as refused:
        looked(path)
    command = refused.value.do.removeprefix("where you trust it: ")
    assert command == conversion(path)
    python, flag, code = shlex.split(command)
    assert (python, flag) == ("python", "-c")
    exec(code, {})
    assert torch.equal(load_file(path.with_suffix(".safetensors"))["weight"], state["weight"])
    (tmp_path / "x.npz").touch()
    with pytest.raises(DataError, match="is no safetensors file"):
        looked(tmp_path / "x.npz")


@pytest.mark.parametrize(
    ("asked", "error", "match"),
    [
        ("runs/nowhere", DataError, "runs/nowhere does not exist"),
        ("weights.safetensors", DataError, "does not exist"),
        ("deit_tiny_patch16_223", UsageError, "near: .*deit_tiny_patch16_224"),
        ("DeiT_tiny_patch16_224", UsageError, "near: .*deit_tiny_patch16_224"),
        ("deit_tiny_patch16_224.fb_in2k", UsageError, "has no checkpoint"),
        ("vit_micro_32", UsageError, "no released weights"),
        ("[a-z]*", UsageError, "no model or path"),
    ],
)
def test_words_that_mean_nothing(asked, error, match, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=match):
        looked(asked)


def test_near_names_of_a_misspelt_folder(tmp_path):
    (tmp_path / "photos-1").mkdir()
    with pytest.raises(DataError, match="near it are photos-1"):
        looked(tmp_path / "photo-1")


def test_a_released_checkpoint_comes_from_the_cache(opened, tmp_path, cache):
    torch.manual_seed(4)
    theirs = xp.create_model(RELEASED)
    cache(RELEASED, theirs.state_dict())
    for name in (RELEASED, f"{RELEASED}.fb_in1k"):
        found, _ = looked(name)
        assert (found.kind, found.where) == ("released", f"{RELEASED}.fb_in1k")
        assert found.shape["size"] == (224, 224)
        assert found.shape["mean"] == (0.485, 0.456, 0.406)
    typed = {"weights": RELEASED, "size": 32, "epochs": 1, "batch": 16, "lr": 1e-9, "ema": 0.0}
    train_run("stripes", tmp_path / "r", typed)
    recipe, mine = recipe_of(tmp_path / "r"), tensors(tmp_path / "r")
    assert (recipe.model, recipe.size) == (RELEASED, (32, 32))
    assert torch.allclose(mine["blocks.11.mlp.fc2.weight"], theirs.blocks[11].mlp.fc2.weight,
                          atol=1e-6)  # fmt: skip
    assert mine["pos_embed"].shape[1] == 1 + 2 * 2
    with pytest.raises(UsageError, match=f"is of {RELEASED}, and --model says vit_micro_32"):
        find(RELEASED, "vit_micro_32", {"model": "vit_micro_32"}, [], print)


def test_our_names_of_crossvit_mean_the_same_weights():
    ours, timms = release_of("crossvit_9_dagger_224"), release_of("crossvit_9_dagger_240.in1k")
    assert ours.repository == timms.repository == "timm/crossvit_9_dagger_240.in1k"
    assert ours.size == timms.size == (224, 224)
    assert release_of("crossvit_15_dagger_408").size == (384, 384)
    model = xp.create_model("crossvit_9_dagger_240", img_size=ours.size)
    plain = xp.create_model("crossvit_9_dagger_240")
    assert model.position_tables() == plain.position_tables()


def test_a_path_wins_over_a_name_and_that_is_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / RELEASED)
    found, _ = looked(RELEASED)
    assert found.kind == "run"
    assert "timm has a checkpoint of that name" in found.reasons[-1]


def test_a_name_that_cannot_be_fetched(cache, offline):
    with pytest.raises(DataError, match="could not be fetched"):
        looked(RELEASED)
    assert offline == [released.PATIENT]


def test_fetching_waits_no_longer_than_it_is_told(monkeypatch):
    import time

    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda url: time.sleep(5))
    began = time.perf_counter()
    with pytest.raises(DataError, match=r"no answer within 0\.2 s") as refused:
        release_of(RELEASED).fetch(0.2)
    assert time.perf_counter() - began < 2
    assert f"hf download timm/{RELEASED}.fb_in1k {HUB_FILE}" in refused.value.do

    def fail(url):
        raise OSError("Name or service not known")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", fail)
    with pytest.raises(DataError, match="Name or service not known"):
        release_of(RELEASED).fetch(5)


def test_fetched_by_name(monkeypatch, tmp_path):
    import huggingface_hub

    asked = []

    def download(repository, file):
        asked.append((repository, file))
        return str(tmp_path / file)

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda url: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert release_of(RELEASED).fetch(5) == tmp_path / HUB_FILE
    assert asked == [(f"timm/{RELEASED}.fb_in1k", HUB_FILE)]


def test_auto_takes_the_cache_then_the_network_then_nothing(cache, offline):
    none, reasons = looked("auto", "vit_micro_32")
    assert none is None
    assert "No released weights of vit_micro_32" in reasons[0]
    assert offline == []
    none, reasons = looked("auto", RELEASED)
    assert none is None
    assert offline == [released.QUICK]
    assert "could not be fetched" in reasons[0]
    assert reasons[1].endswith(f"hf download timm/{RELEASED}.fb_in1k {HUB_FILE}")
    cache(RELEASED, {"a": torch.zeros(1)})
    found, _ = looked("auto", RELEASED)
    assert found.kind == "released"
    assert len(offline) == 1


def test_finetune_without_weights_is_small(opened, tmp_path, cache, offline):
    train_run("stripes", tmp_path / "r", {"recipe": "finetune", "batch": 16, "epochs": 1})
    recipe = recipe_of(tmp_path / "r")
    assert (recipe.name, recipe.weights, recipe.freeze) == ("small", {}, 0)
    assert recipe.layer_decay == 1
    reasons = tomllib.loads((tmp_path / "r" / "config.toml").read_text())["why"]["reasons"]
    assert sum("could not be fetched" in one for one in reasons) == 1
    assert offline == [released.QUICK]
    again = train_run("stripes", tmp_path / "r", {"recipe": "finetune"}, resume=True)
    assert again["steps"] == recipe.steps


def test_a_run_killed_before_its_first_state_checks_the_weights(opened, tmp_path, monkeypatch):
    from crosspatch.training import session

    other = write_run(tmp_path / "other")
    typed = {"weights": other, "epochs": 1, "batch": 16, "recipe": "small"}

    def killed(*_, **__):
        raise RuntimeError("killed")

    whole = train_run("stripes", tmp_path / "whole", typed)
    with monkeypatch.context() as patch:
        patch.setattr(session, "fit", killed)
        with pytest.raises(RuntimeError, match="killed"):
            train_run("stripes", tmp_path / "r", typed)
    shutil.copytree(other, tmp_path / "kept")
    shutil.rmtree(other)
    with pytest.raises(DataError, match="no longer what the run was begun with"):
        train_run("stripes", tmp_path / "r", resume=True)
    write_run(other, seed=9)
    with pytest.raises(DataError, match="put it back"):
        train_run("stripes", tmp_path / "r", resume=True)
    shutil.rmtree(other)
    shutil.copytree(tmp_path / "kept", other)
    assert train_run("stripes", tmp_path / "r", resume=True)["test"] == whole["test"]
    assert all(torch.equal(v, tensors(tmp_path / "whole")[k])
               for k, v in tensors(tmp_path / "r").items())  # fmt: skip
