"""`crosspatch serve`: as a newcomer types it, answered over HTTP, ended by Ctrl-C."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from crosspatch.cli import serve as verb
from support.serving import until


@contextmanager
def serving(*words: object, **environment: str) -> Iterator[tuple[subprocess.Popen, dict]]:
    """The command in a process of its own, and what it printed as JSON."""
    command = [sys.executable, "-m", "crosspatch", "serve", *map(str, words), "--json"]
    process = subprocess.Popen(
        [*command, "--port", "0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, **environment},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, process.communicate()[1]
        yield process, json.loads(line)
    finally:
        process.kill()
        process.communicate()


def ask(address: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, Any]:
    request = urllib.request.Request(address + path, body, headers)
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


def test_answers_are_those_of_predict_and_ctrl_c_ends_it(
    crosspatch, digits_bundle: Path, pictures: Path, tmp_path: Path
) -> None:
    files = sorted(pictures.glob("*/*.png"))[:6]
    log = tmp_path / "requests.jsonl"
    run = digits_bundle.parent
    words = [run, "--engine", "onnxruntime", "--threads", 1, "--log", log, "--sure", "0.9"]
    with serving(*words) as (process, told):
        address = told["address"]
        assert address.startswith("http://127.0.0.1:")
        assert told["classes"] == list("0123456789")
        said = crosspatch("predict", digits_bundle, *files, "--engine", "onnxruntime", "--json")
        for path, row in zip(files, said.json["predictions"], strict=True):
            status, answer = ask(address, "/predict?top_k=3", path.read_bytes())
            assert status == 200
            for mine, theirs in zip(answer["predictions"], row["top"], strict=True):
                assert mine["class"] == theirs["class"]
                assert mine["probability"] == pytest.approx(theirs["probability"], abs=2e-6)
            assert answer["abstain"] == (answer["confidence"] < 0.9)
            assert answer["bundle"] == told["bundle"]
        assert ask(address, "/readyz") == (200, {"ok": True})
        with urllib.request.urlopen(address, timeout=10) as page:
            assert b"<script" in page.read()
        if shutil.which("curl"):
            line = ["curl", "-s", "--data-binary", f"@{files[0]}", f"{address}/predict"]
            answer = json.loads(subprocess.run(line, capture_output=True, check=True).stdout)
            assert len(answer["predictions"]) == 5
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert process.returncode == 0
    assert out == ""
    assert "Traceback" not in err
    assert "ready     " in err
    assert f"curl --data-binary @cat.jpg {address}/predict" in err
    assert "Ctrl-C: finishing" in err
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["status"] for line in lines if line["path"] == "/predict"].count(200) >= 6


def test_nothing_of_torch_is_loaded_and_no_process_stays(digits_bundle: Path) -> None:
    with serving(digits_bundle, "--workers", 2, CROSSPATCH_TOKEN="a-word") as (process, told):
        maps = Path(f"/proc/{process.pid}/maps").read_text()
        assert "libtorch" not in maps
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert len(children) >= 2
        assert told["token"] is True
        assert ask(told["address"], "/info")[0] == 401
        assert ask(told["address"], "/info", Authorization="Bearer a-word")[0] == 200
        process.kill()
        process.communicate()
        until(
            lambda: (
                not any(
                    Path(f"/proc/{one}/cmdline").exists()
                    and Path(f"/proc/{one}/cmdline").read_bytes()
                    for one in children
                )
            )
        )


def test_a_public_address_is_warned_of_and_answers_to_any_name(digits_bundle: Path) -> None:
    with serving(digits_bundle, "--host", "0.0.0.0") as (process, told):
        assert ask(told["address"], "/readyz", Host="any.example")[0] == 200
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=20)
    assert "warning   everybody who can reach 0.0.0.0" in err
    assert "--token" in err
    with serving(digits_bundle, "--host", "0.0.0.0", "--token", "x") as (process, _):
        process.send_signal(signal.SIGTERM)
        assert "warning" not in process.communicate(timeout=20)[1]
    with serving(digits_bundle) as (_, told):
        assert ask(told["address"], "/readyz", Host="any.example")[0] == 421


def three(answer: Any, code: int) -> list[str]:
    """The three parts of an error."""
    assert answer.code == code
    got, expected, do = answer.err.splitlines()[-3:]
    assert got.startswith("error ")
    assert do.startswith("try ")
    return [got, expected, do]


def test_a_run_without_a_bundle_is_told_how_to_make_one(crosspatch, digits_run: Path) -> None:
    got, _, do = three(crosspatch("serve", digits_run), 2)
    assert "has no bundle.onnx" in got
    assert f"crosspatch export {digits_run}" in do


def test_a_port_that_is_taken_is_told_before_the_model_is_opened(
    crosspatch, digits_bundle: Path
) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        answer = crosspatch("serve", digits_bundle, "--port", port)
    got, _, do = three(answer, 2)
    assert f"port {port} of 127.0.0.1 is taken" in got
    assert f"--port {port + 1}" in do
    assert "opening" not in answer.out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--port", "70000"], "--port 70000"), (["--port", "http"], "--port http"),
        (["--sure", "2"], "--sure 2"), (["--sure", "nan"], "--sure nan"),
        (["--max-wait-ms", "-1"], "--max-wait-ms -1"), (["--workers", "0"], "--workers 0"),
        (["--token", ""], "the token is empty"), (["--token", "a b"], "the token is empty"),
        (["--host", "no.such.host.invalid"], "--host no.such.host.invalid"),
        (["--log", "no/such/folder/log"], "--log no/such/folder/log"),
        (["--log", "-", "--json"], "--log - with --json"),
    ],
)  # fmt: skip
def test_options_that_make_no_sense_are_told_in_three_parts(
    crosspatch, digits_bundle: Path, words: list[str], says: str
) -> None:
    answer = crosspatch("serve", digits_bundle, *words)
    assert says in three(answer, 2)[0]


def test_a_damaged_bundle_is_a_data_error(crosspatch, digits_bundle: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "bundle.onnx"
    damaged.write_bytes(digits_bundle.read_bytes()[:1000])
    three(crosspatch("serve", damaged, "--port", 0), 3)
    got, *_ = three(crosspatch("serve", tmp_path / "gone.onnx", "--port", 0), 2)
    assert "does not exist" in got


def test_a_missing_extra_is_told_with_its_command(
    crosspatch, digits_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verb, "NEEDED", ("uvicorn", "no_such_package"))
    got, _, do = three(crosspatch("serve", digits_bundle), 2)
    assert "no_such_package cannot be imported" in got
    assert "uvicorn" not in got
    assert "pip install 'crosspatch[serve]'" in do
