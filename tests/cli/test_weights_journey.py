"""`crosspatch train --weights`: what is typed, what is said, what is refused; never a network."""

from __future__ import annotations

import json
import socket
import tomllib

import pytest
import torch
from safetensors.torch import save_file

from crosspatch.training.recipes import finetune


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    from huggingface_hub import constants

    def refuse(*_, **__):
        raise OSError("no network in tests")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(finetune, "RANGE", (1e-5, 0.1, 12))


def test_finetune_of_a_run_says_what_it_takes_and_can_be_used(
    crosspatch, digits_run, pictures, tmp_path
) -> None:
    run = tmp_path / "run"
    words = ("train", pictures, "--recipe", "finetune", "--weights", digits_run)
    answer = crosspatch(*words, "--epochs", 2, "--out", run)
    assert answer.code == 0, answer.err
    said = " ".join(answer.out.split())
    for part in (
        f"crossvit_micro_32 with the weights of {digits_run}, as asked.",
        "Rows of the head, by class name: 5 of 5 taken over.", "Peak rate ", "(--lr skips this)",
        "only the head learns", "looking for the rate",
    ):  # fmt: skip
        assert part in said
    recipe = tomllib.loads((run / "config.toml").read_text())["recipe"]
    assert recipe["head_rows"] == [0, 1, 2, 3, 4]
    assert recipe["weights"]["kind"] == "run"
    judged = crosspatch("eval", run, pictures, "--json")
    assert judged.json["accuracy"] > 0.5  # the head was taken: 5 classes, 2 epochs of 40 pictures
    assert crosspatch(*words, "--out", run, "--resume").code == 0


@pytest.mark.parametrize("recipe", ["small", "deit"])
def test_other_recipes_begin_with_weights_too(
    crosspatch, digits_run, pictures, tmp_path, recipe
) -> None:
    words = ("train", pictures, "--recipe", recipe, "--weights", digits_run, "--epochs", 1)
    answer = crosspatch(*words, "--size", 24, "--out", tmp_path / "run")
    assert answer.code == 0, answer.err
    assert "Positions are resized from 16x16 to 24x24 pixels." in " ".join(answer.out.split())
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["size"] == [24, 24]


def test_auto_without_a_network_goes_on_and_names_one_command(
    crosspatch, pictures, tmp_path
) -> None:
    words = ("train", pictures, "--recipe", "finetune", "--epochs", 1, "--out", tmp_path / "run")
    answer = crosspatch(*words)
    assert answer.code == 0, answer.err
    said = " ".join(answer.out.split())
    assert "Trained from scratch: crossvit_tiny_240.in1k could not be fetched" in said
    fetch = [line for line in answer.out.splitlines() if "hf download" in line]
    assert len(fetch) == 1
    assert fetch[0].endswith(": hf download timm/crossvit_tiny_240.in1k model.safetensors")


@pytest.mark.parametrize(
    ("typed", "code", "parts"),
    [
        (("--weights", "runs/none-1"), 3, ("runs/none-1 does not exist", "correct --weights")),
        (("--weights", "crossvit_tiny_241"), 2, ("crossvit_tiny_241", "crossvit_tiny_240")),
        (("--weights", "w.pth"), 3, ("keeps a pickle", "python -c")),
        (("--weights", "torn.safetensors"), 3, ("torn", "fetch it again")),
        (("--weights", "other.safetensors"), 3, ("unexpected: a", "--model")),
        (("--weights", "folder"), 3, ("config.json does not exist", "folder of a run")),
        (
            ("--weights", "deit_tiny_patch16_224"),
            3,
            ("could not be fetched", "no network in tests", "hf download"),
        ),
        (("--recipe", "finetune", "--weights", "none"), 2, ("--weights none", "--recipe small")),
    ],
)
def test_what_is_refused_has_three_parts_and_leaves_nothing(
    crosspatch, pictures, tmp_path, monkeypatch, typed, code, parts
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({}, "w.pth")
    (tmp_path / "torn.safetensors").write_bytes(b"\xff" * 40)
    save_file({"a": torch.zeros(2)}, "other.safetensors")
    (tmp_path / "folder").mkdir()
    answer = crosspatch("train", pictures, *typed, "--out", "run")
    assert answer.code == code, answer.err
    assert len(answer.err.strip().splitlines()) == 3
    assert all(part in answer.err for part in parts), answer.err
    assert "Traceback" not in answer.err
    assert not (tmp_path / "run").exists()
