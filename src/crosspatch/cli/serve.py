# SPDX-License-Identifier: Apache-2.0
"""`crosspatch serve BUNDLE|RUN`: a model behind HTTP, for programs and with a page for people.

torch is never imported.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter, Token

from crosspatch.cli.options import Output, at_least
from crosspatch.errors import UsageError

if TYPE_CHECKING:
    from crosspatch.deploy.server.service import Service

MODEL = "A bundle (.onnx, .xml), or the folder of a run that was exported: its bundle.onnx."
SECRET = "CROSSPATCH_TOKEN"
"""The environment's word for --token: what is typed can be seen by others on this computer."""
NEEDED = ("fastapi", "uvicorn", "uvloop", "httptools", "prometheus_client", "python_multipart")
Engine = Literal["auto", "onnxruntime", "openvino", "openvino-bf16"]


def _share(hint: Any, tokens: Sequence[Token]) -> float:
    """A number from 0 to 1; raises UsageError."""
    text = tokens[0].value
    if not re.fullmatch(r"0?\.\d+|[01](\.0*)?", text):
        raise UsageError(f"--sure {text}", "a confidence from 0 to 1", "--sure 0.7")
    return float(text)


def _wait(hint: Any, tokens: Sequence[Token]) -> float:
    """Milliseconds; raises UsageError."""
    text = tokens[0].value
    if not re.fullmatch(r"\d{1,4}(\.\d+)?", text):
        raise UsageError(f"--max-wait-ms {text}", "milliseconds from 0 to 9999", "--max-wait-ms 2")
    return float(text)


def _port(hint: Any, tokens: Sequence[Token]) -> int:
    """A port; raises UsageError."""
    text = tokens[0].value
    if not re.fullmatch(r"\d{1,5}", text) or int(text) > 65535:
        raise UsageError(f"--port {text}", "a number from 0 (any) to 65535", "--port 8000")
    return int(text)


def serve(
    bundle: Annotated[Path, Parameter(help=MODEL)],
    /,
    *,
    port: Annotated[int, Parameter(converter=_port)] = 8000,
    host: str = "127.0.0.1",
    token: str | None = None,
    engine: Engine = "auto",
    threads: Annotated[int | None, at_least(1, "--threads 2")] = None,
    workers: Annotated[int | None, at_least(1, "--workers 2")] = None,
    sure: Annotated[float | None, Parameter(converter=_share, metavar="SHARE")] = None,
    max_wait_ms: Annotated[float, Parameter(converter=_wait, metavar="MS")] = 0.0,
    batch_api: bool = False,
    log: Annotated[str | None, Parameter(metavar="FILE|-", allow_leading_hyphen=True)] = None,
    quiet: bool = False,
    output: Output | None = None,
) -> int:
    """Answer pictures over HTTP, on this computer alone unless told otherwise.

    POST /predict takes a picture file as it is. GET / is a page to try it; /info, /livez, /readyz,
    /metrics and /openapi.json tell the rest. Ctrl-C ends it.

    Parameters
    ----------
    port
        Where it listens; 0 for any port that is free.
    host
        An address to listen on; 0.0.0.0 makes it reachable for others.
    token
        What requests must bring as Authorization: Bearer TOKEN (or CROSSPATCH_TOKEN, unseen).
    engine
        What computes. auto: the fastest that is installed, measured once per machine.
    threads
        Of the engine (left alone: measured).
    workers
        Processes that decode pictures (left alone: by the number of cores).
    sure
        Below this confidence an answer is "not sure" (left alone: the bundle's, else 0.5).
    max_wait_ms
        How long a picture may wait for others to be computed with.
    batch_api
        Offer /predict/batch for up to 16 pictures in one request.
    log
        Write the line about each request to this file instead of stderr; - is stdout.
    quiet
        No lines about requests.
    """
    output = output or Output()
    if log == "-" and output.json:
        raise UsageError(
            "--log - with --json", "stdout holds one JSON object alone", "--log FILE, or no --json"
        )
    _installed()
    path = _bundle(bundle)
    token = _token(token)

    from crosspatch.deploy.server import lifecycle

    listener = lifecycle.bind(host, port)
    address, local = lifecycle.address_of(listener), lifecycle.loopback(listener)
    line = _teller(log == "-" or output.json)
    if not local and token is None:
        line(f"warning   everybody who can reach {host} may use this server; --token TOKEN asks")
        line("          for a word first")
    line(f"opening   {path}")

    from crosspatch.deploy.server.page import page
    from crosspatch.deploy.server.service import Service

    def make(observe: Any) -> Service:
        return Service(
            path, engine=engine, threads=threads, workers=workers, max_wait_ms=max_wait_ms,
            threshold=sure, observe=observe,
        )  # fmt: skip

    with listener:
        return lifecycle.run(
            make,
            listener,
            page(),
            token=token,
            batch_api=batch_api,
            local=local,
            log=_log(log, quiet),
            ready=lambda service: _ready(service, address, token, output.json, line),
            told=lambda text: print(text, file=sys.stderr, flush=True),
        )


def _installed() -> None:
    """Raises UsageError where the extra `serve` is missing."""
    from importlib.util import find_spec

    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise UsageError(
            f"{', '.join(missing)} cannot be imported",
            "a server needs the packages of the extra serve",
            "pip install 'crosspatch[serve]'",
        )


def _bundle(path: Path) -> Path:
    """The bundle that a path names. Raises UsageError for a run without one."""
    from crosspatch.cli import words
    from crosspatch.cli.predict import existing_model

    existing_model(path)
    if not path.is_dir():
        return path
    found = path / "bundle.onnx"
    if found.is_file():
        return found
    others = sorted({*path.glob("*.onnx"), *path.glob("*.xml")})
    if others:
        do = words.command("crosspatch", "serve", others[0])
    else:
        do = words.command("crosspatch", "export", path)
    raise UsageError(
        f"{path} has no bundle.onnx",
        "a bundle, or a run that was exported: torch is not served",
        do,
    )


def _token(token: str | None) -> str | None:
    """What was typed or stands in the environment. Raises UsageError for what no header can say."""
    found = token if token is not None else os.environ.get(SECRET)
    if found is not None and not re.fullmatch(r"[!-~]{1,500}", found):
        raise UsageError(
            "the token is empty or has spaces or other letters in it",
            "letters, digits and marks of ASCII",
            "--token $(openssl rand -hex 16)",
        )
    return found


def _teller(to_stderr: bool) -> Any:
    """A function that shows a line."""

    def line(text: str) -> None:
        print(text, file=sys.stderr if to_stderr else sys.stdout, flush=True)

    return line


def _log(target: str | None, quiet: bool) -> Any:
    """Where lines about requests go. Raises UsageError for a file that cannot be written."""
    from crosspatch.deploy.server.logs import Log

    if quiet:
        return Log(None)
    if target is None or target == "-":
        return Log(sys.stdout if target else sys.stderr)
    try:
        return Log(open(target, "a", encoding="utf-8"))
    except OSError as error:
        raise UsageError(
            f"--log {target} cannot be written: {error.strerror}",
            "a file that you may write",
            "--log serve.jsonl",
        ) from error


def _ready(service: Service, address: str, token: str | None, as_json: bool, line: Any) -> None:
    """Say that requests are answered, and how to send one."""
    from crosspatch.cli import words
    from crosspatch.cli.screen import print_json

    info, setting = service.info, service.engine.setting
    decoding = words.plural(len(service.pids), "decoding process", "decoding processes")
    line(
        f"model     {info.architecture}, {words.plural(len(info.classes), 'class', 'classes')}, "
        f"{setting.describe()}, {decoding}"
    )
    line(f"ready     {address}")
    header = "" if token is None else "-H 'Authorization: Bearer TOKEN' "
    line(f"try       curl {header}--data-binary @cat.jpg {address}/predict")
    if as_json:
        print_json({
            "address": address, "pid": os.getpid(), "bundle": service.bundle.hash,
            "engine": setting._asdict(), "classes": list(info.classes),
            "token": token is not None,
        })  # fmt: skip
        sys.stdout.flush()
