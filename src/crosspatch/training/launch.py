# SPDX-License-Identifier: Apache-2.0
"""Several processes for one training: begun by us (`--devices N`) or by torchrun.

Both tell each process its place in the same environment variables. Nothing here imports torch: the
process that launches only waits, hands signals on, and sees to it that no process outlives another.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from crosspatch.errors import CrosspatchError, Interrupted
from crosspatch.training.signals import handled

GRACE = 15.0  # seconds that the others have to end by themselves once one has ended
POLL = 0.05
SPEAK_LAST = 1.5  # seconds that a process which only lost another lets that one explain itself


class PeerLost(Interrupted):
    """Another process of this training has ended or does not answer (exit code 4)."""


def world() -> int:
    """How many processes were launched for this training, over all machines."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This process's number among them, from 0."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Its number among those of this machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world() -> int:
    """How many of them are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def machines() -> int:
    """On how many machines they are."""
    return max(1, world() // local_world())


_PARENT = os.getppid()


def orphaned() -> bool:
    """Whether what launched this process has ended."""
    return world() > 1 and os.getppid() != _PARENT


def speaks(last: bool = False) -> bool:
    """Whether this process is the one that tells the user how the training ended.

    The first one of a machine that asks may; `last`: it only knows that another one ended, and lets
    that one ask before.
    """
    if world() == 1:
        return True
    if last:
        time.sleep(SPEAK_LAST)
    try:
        os.close(os.open(_said(os.getppid()), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except FileExistsError:
        return False
    return True


@contextmanager
def one_voice() -> Iterator[None]:
    """Of several processes that fail, one tells the user why; the others end without a word."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if speaks(last=isinstance(error, PeerLost)):
            raise
        stopped = isinstance(error, KeyboardInterrupt)
        kind = Interrupted if stopped else CrosspatchError
        raise SystemExit(getattr(error, "exit_code", kind.exit_code)) from error


def _said(launcher: int) -> Path:
    turn = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    name = f"crosspatch-{launcher}-{os.environ.get('MASTER_PORT', '0')}-{turn}.said"
    return Path(tempfile.gettempdir()) / name


def launch(arguments: Sequence[str], count: int) -> int:
    """Run `crosspatch ARGUMENTS` in `count` processes of this machine; returns the exit code.

    SIGINT and SIGTERM go on to all of them. When one ends otherwise than well, the others have
    `GRACE` seconds to end too. The exit code is that of the one whose fault it was; 4 where one was
    killed, as the run can be resumed.
    """
    port = _free_port()
    common = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "NODE_RANK": "0",
    }
    said = Path(tempfile.gettempdir()) / f"crosspatch-{os.getpid()}-{port}-0.said"
    command = [sys.executable, "-m", "crosspatch", *arguments]
    team = [
        subprocess.Popen(
            command,
            env={**common, "RANK": str(number), "LOCAL_RANK": str(number)},
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # a signal of the terminal comes once, through us
        )
        for number in range(count)
    ]

    def hand_on(number: int, frame: object) -> None:
        for process in team:
            with suppress(ProcessLookupError):
                process.send_signal(number)

    try:
        with handled(hand_on, signal.SIGINT, signal.SIGTERM):
            culprit = _wait(team)
        return _verdict([int(process.returncode) for process in team], culprit, said.exists())
    finally:
        for process in team:
            with suppress(ProcessLookupError):
                process.kill()
        said.unlink(missing_ok=True)


def _wait(team: Sequence[subprocess.Popen]) -> int:
    """Waits until all have ended; the number of the one that first ended otherwise than well, or of
    the first one. See `launch`."""
    culprit, since = None, 0.0
    while any(process.poll() is None for process in team):
        now, bad = time.monotonic(), [n for n, process in enumerate(team) if process.returncode]
        if culprit is None and bad:
            culprit, since = bad[0], now
        if culprit is not None and now - since > GRACE:
            for process in team:
                process.kill()
        time.sleep(POLL)
    return culprit or 0


def _verdict(codes: Sequence[int], culprit: int, said: bool) -> int:
    """The exit code of all. Raises Interrupted where one was killed and none has said so."""
    faults = [code for code in codes if code > 0 and code != Interrupted.exit_code]
    if faults:
        return faults[0]
    if codes[culprit] < 0 and not said:
        raise Interrupted(
            f"process {culprit + 1} of {len(codes)} was ended by "
            f"{signal.Signals(-codes[culprit]).name}",
            "all processes at work; what was saved last is whole",
            "continue with the same command and --resume",
        )
    return Interrupted.exit_code if any(codes) else 0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
