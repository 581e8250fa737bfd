"""The frame of the command line: lazy verbs, exit codes, three-part errors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from crosspatch.cli import main as command_line
from crosspatch.cli.main import ROOMS, VERBS, app, main
from crosspatch.errors import DataError, Interrupted

HEAVY = ("torch", "torchvision", "timm", "numpy", "lightning", "torchmetrics", "sklearn", "PIL")

COMMANDS = [(verb,) for verb in VERBS] + [
    (room, verb) for room, (_, verbs) in ROOMS.items() for verb in verbs
]


def modules_after(code: str) -> tuple[set[str], float]:
    """The top-level modules that a fresh Python has loaded after `code`, and its CPU seconds."""
    report = (
        "import sys, time\n"
        "print('\\n', time.process_time(), *{name.split('.')[0] for name in sys.modules})"
    )
    answer = subprocess.run(
        [sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, check=True
    )
    seconds, *names = answer.stdout.splitlines()[-1].split()
    return set(names), float(seconds)


@pytest.mark.parametrize(
    ("code", "limit"),
    [
        ("import crosspatch", 0.3),
        ("from crosspatch.cli.main import main; main(['--help'])", 0.5),
        # the half second is for `crosspatch --help`; a verb with forty options has more to lay out
        *[
            (f"from crosspatch.cli.main import main; main({[*v, '--help']})", 0.75)
            for v in COMMANDS
        ],
    ],
)
def test_light_commands_load_nothing_heavy_and_answer_at_once(code: str, limit: float) -> None:
    took = []
    for _ in range(5):  # the best of five: other tests share the cores and their caches
        loaded, seconds = modules_after(code)
        assert not loaded & set(HEAVY)
        took.append(seconds)
        if seconds < limit:
            return
    pytest.fail(f"took {min(took):.2f} CPU seconds, the limit is {limit}")


def test_help_names_every_verb_and_fits_80_columns(capsys: pytest.CaptureFixture) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(verb in text for verb in (*VERBS, *ROOMS))
    for room, (_, verbs) in ROOMS.items():
        assert main([room, "--help"]) == 0
        text += (inside := capsys.readouterr().out)
        assert all(verb in inside for verb in verbs)
    for verb in COMMANDS:
        assert main([*verb, "--help"]) == 0
    text += capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80


def test_version(capsys: pytest.CaptureFixture) -> None:
    import crosspatch

    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == crosspatch.__version__


WRONG = [
    (["--seed", "train"], "no verb before --seed", "train, eval, predict", "crosspatch --help"),
    (["predict"], "RUN is missing", "predict needs it", "crosspatch predict --help"),
    (["predict", "no/such/run", "a"], "run does not exist", "crosspatch train wrote", "name that"),
    (["tran", "x"], "unknown verb 'tran'", "train, eval, predict", "crosspatch train x"),
    (["xyz"], "unknown verb 'xyz'", "train, eval, predict", "crosspatch --help"),
    (["data", "xyz"], "unknown verb 'xyz'", "the verbs are longtail", "crosspatch data --help"),
    (["data", "longtial", "x"], "unknown verb", "longtail", "crosspatch data longtail x"),
    (["data", "longtail"], "DATA is missing", "data longtail needs", "data longtail --help"),
    (["train"], "DATA is missing", "train needs it", "crosspatch train --help"),
    (["train", "x", "--epohs", "3"], "--epohs", "--epochs", "crosspatch train --help"),
    (["train", "x", "--qqqqq", "3"], "--qqqqq", "nothing like it", "crosspatch train --help"),
    (["train", "x", "y"], "too many arguments: y", "quotes", "crosspatch train --help"),
    (["train", "x", "--fit", "stretch"], "stretch", '"crop", "pad", "squash"', "--help"),
    (["train", "x", "--epochs", "0"], "--epochs 0", "1 or more", "--epochs 10"),
    (["train", "x", "--epochs", "many"], "--epochs many", "whole number", "--epochs 10"),
    (["train", "x", "--workers", "-1"], "--workers -1", "0 or more", "--workers 2"),
    (["train", "x", "--lr", "nan"], "--lr nan", "above zero", "--lr 0.001"),
    (["train", "x", "--lr", "-1"], "--lr -1", "above zero", "--lr 0.001"),
    (["train", "x", "--lr", "1", "--lr", "2"], "multiple times", "once", "--help"),
    (["train", "x", "--time", "10"], "--time '10'", "90s, 10m", "--time 10m"),
    (["train", "x", "--time", "0m"], "--time '0m'", "90s, 10m", "--time 10m"),
    (["train", "x", "--size", "4"], "--size '4'", "8 or more", "--size 32"),
    (["train", "x", "--size", "3x"], "--size '3x'", "height x width", "--size 32"),
    (["train", "x", "--resume", "--overwrite"], "--resume and --overwrite", "one", "leave one"),
    (["predict", "run"], "no picture is named", "files, folders", "crosspatch predict run"),
    (["predict", __file__, "a"], "is a file", "crosspatch train wrote", "name that folder first"),
    (["predict", "run", "a", "--topk", "0"], "--topk 0", "1 or more", "--topk 3"),
]


@pytest.mark.parametrize(("tokens", "got", "expected", "do"), WRONG)
def test_wrong_usage_is_told_in_three_parts(
    tokens: list[str], got: str, expected: str, do: str, capsys: pytest.CaptureFixture
) -> None:
    assert main(tokens) == 2
    streams = capsys.readouterr()
    first, second, third = streams.err.splitlines()
    assert first.startswith("error ")
    assert got in first
    assert expected in second
    assert third.startswith("try ")
    assert do in third
    assert streams.out == ""


def test_json_error_is_one_object_on_stdout(capsys: pytest.CaptureFixture) -> None:
    assert main(["train", "x", "--epochs", "0", "--json"]) == 2
    answer = json.loads(capsys.readouterr().out)
    assert answer == {
        "error": {
            "got": "--epochs 0",
            "expected": "a whole number of 1 or more",
            "do": "--epochs 10",
            "exit_code": 2,
        }
    }


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (DataError("a", "b", "c"), 3),
        (Interrupted("a", "b", "c"), 4),
        (KeyboardInterrupt(), 4),
        (ZeroDivisionError("oh"), 5),
    ],
)
def test_exit_codes(
    raised: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(tokens: list[str]) -> int:
        raise raised

    monkeypatch.setattr(command_line, "app", broken)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    assert main(["train", "x"]) == code


@pytest.mark.parametrize(
    "show",
    ["print('x' * 1_000_000)", "[Screen().line('x' * 100) for _ in range(9_999)]; done.touch()"],
)
def test_a_reader_that_has_seen_enough_is_no_error_and_stops_no_run(show, tmp_path) -> None:
    code = (
        "import sys, pathlib, crosspatch.cli.main as line\n"
        "from crosspatch.cli.screen import Screen\n"
        f"done = pathlib.Path({str(tmp_path / 'done')!r})\n"
        f"def app(tokens): {show}\n"
        "line.app = app\n"
        "sys.exit(line.main(['predict']))"
    )
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], text=True, **pipe) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(10)
        process.stdout.close()
        assert process.wait() == 0
        assert process.stderr.read() == ""
    assert (tmp_path / "done").exists() == ("done" in show)


def test_a_fault_of_ours_names_a_file_to_attach_and_shows_no_traceback(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    def broken(tokens: list[str]) -> int:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr(command_line, "app", broken)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert main(["train", "my pictures"]) == 5
    text = capsys.readouterr().err
    (file,) = tmp_path.glob("crosspatch-error-*.txt")
    assert "Traceback" not in text
    assert str(file) in text
    report = file.read_text()
    assert "crosspatch train 'my pictures'" in report
    assert "ZeroDivisionError: oh" in report

    assert main(["train", "x", "--debug"]) == 5
    assert "Traceback" in capsys.readouterr().err


def test_a_long_path_in_an_error_stays_on_one_line(capsys: pytest.CaptureFixture) -> None:
    path = "a/" * 80 + "b c"
    assert main(["train", "x", path]) == 2
    assert f"'{path}'" in capsys.readouterr().err


def flags(*words: str) -> list[str]:
    """`verb name hint default` of every argument of a verb."""
    found, verb = app, " ".join(words)
    for word in words:
        found = found[word]
    arguments = found.assemble_argument_collection(default_parameter=app.default_parameter)
    rows = []
    for argument in arguments:
        if argument.names != ("*",):
            hint = str(argument.hint).removeprefix("<class '").removesuffix("'>")
            default = argument.field_info.default
            shown = "required" if default is argument.field_info.empty else repr(default)
            rows.append(f"{verb} {'|'.join(argument.names)}: {hint} = {shown}")
    return rows


def test_the_flags_of_every_verb_are_frozen() -> None:
    """A flag is a promise: to add or change one, change flags.txt in the same commit."""
    now = [row for verb in COMMANDS for row in flags(*verb)]
    kept = (Path(__file__).parent / "flags.txt").read_text(encoding="utf-8").splitlines()
    assert now == kept
