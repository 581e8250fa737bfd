"""Faults: the machine around a run. A full disk, a folder that cannot be written, another process,
a clock that jumps."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import time
from pathlib import Path

from crosspatch.training.state import load_state
from crosspatch.training.stepper import Stepper
from faults.stage import SETTINGS, Found, Hook, Stage, case
from support import kills

NEW_USER, NEW_MOUNTS, REMOUNT, READ_ONLY = 0x10000000, 0x20000, 32, 1


def _mount(kind: bytes, place: Path, flags: int, options: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(kind, str(place).encode(), kind, flags, options.encode()) != 0:
        raise OSError(ctypes.get_errno(), f"mount {place}")


def _own_disk(place: Path, kilobytes: int) -> Hook:
    """In a child: a tmpfs of this size at `place`, which no other process sees."""

    def hook() -> None:
        user, group = os.getuid(), os.getgid()
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(NEW_USER | NEW_MOUNTS) != 0:
            raise OSError(ctypes.get_errno(), "unshare")
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
        _mount(b"tmpfs", place, 0, f"size={kilobytes}k")

    return hook


DISK = 1 << 20  # kilobytes, when there is room


@case("a full disk (a small tmpfs), at the first state or later", 2)
def a_full_disk(stage: Stage, number: int) -> Found:
    disk, out = stage.new(), stage.new()
    disk.mkdir()
    state = (stage.whole / "last" / "last.safetensors").stat().st_size
    model = sum(path.stat().st_size for path in (stage.whole / "model").iterdir())
    room = (0.9, 2.6)[number] * state + 2 * model

    def play() -> None:
        """All in one child, as its disk ends with it."""
        _own_disk(disk, int(room) >> 10)()
        first = stage.run(disk / "run").must(2, "cannot be written", "room", "--resume")
        found = load_state(disk / "run" / "last")
        if (found is None and number) or list((disk / "run" / "last").glob(".writing*")):
            raise AssertionError(f"the last state is not there, or a torn one is: {first.text}")
        _mount(b"tmpfs", disk, REMOUNT, f"size={DISK}k")
        stage.run(disk / "run", *SETTINGS).must(0)
        shutil.copytree(disk / "run", out)

    _in_a_child(play)
    return Found("exit 2, said; the state before it whole; with room it went on", stage.lost(out))


@case("a folder that cannot be written, at the start or from the middle on", 2)
def a_read_only_folder(stage: Stage, number: int) -> Found:
    disk, out = stage.new(), stage.new()
    disk.mkdir()

    def lock(flags: int) -> None:
        _mount(b"tmpfs", disk, REMOUNT | flags, f"size={DISK}k")

    def play() -> None:
        _own_disk(disk, DISK)()
        if number:
            command = stage.start(disk / "run")
            stage.wait_for(disk / "run", command, 9)
            command.signal(signal.SIGTERM)
            command.wait().must(4)
        lock(READ_ONLY)
        words = ("--resume",) if number else SETTINGS
        stage.run(disk / "run", *words).must(2, "cannot be written: Read-only file system")
        lock(0)
        stage.run(disk / "run", *SETTINGS).must(0)
        shutil.copytree(disk / "run", out)

    _in_a_child(play)
    return Found("exit 2, said; when it could be written again it went on", stage.lost(out))


def _in_a_child(play: Hook) -> None:
    """`play` in a forked child that may mount; what it raises is raised here."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        code = 0
        try:
            play()
        except BaseException as error:
            os.write(write, f"{type(error).__name__}: {error}".encode()[-60000:])
            code = 1
        finally:
            os._exit(code)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        said = pipe.read().decode(errors="replace")
    _, status = os.waitpid(child, 0)
    if status:
        raise AssertionError(said)


@case("a second process on the folder of a run that trains")
def a_second_process(stage: Stage, number: int) -> Found:
    out, sleepy = stage.new(), kills.slow(Stepper, "step", 0.1)
    command = stage.start(out, hooks=(sleepy,))
    stage.wait_for(out, command, 1)
    stage.run(out, "--resume").must(2, f"process {command.pid} is training in")
    stage.run(out, *SETTINGS).must(2, f"process {command.pid} is training in")
    command.wait().must(0)
    return Found("exit 2, with the number of the first, which ended as ever", stage.lost(out))


CLOCKS = ("time", "monotonic", "perf_counter")
JUMPS = (86400.0, -86400.0, 3e8)


@case("the clocks jump: a day ahead, a day back, ten years ahead", len(JUMPS))
def the_clock_jumps(stage: Stage, number: int) -> Found:
    out = stage.new()

    def jump() -> None:
        step, shift = Stepper.step, [0.0]
        for name in CLOCKS:
            real = getattr(time, name)
            setattr(time, name, lambda real=real: real() + shift[0])

        def watched(stepper: Stepper, batch: object, epoch: int, at: int) -> None:
            shift[0] = JUMPS[number] if at >= 15 else 0.0
            step(stepper, batch, epoch, at)

        Stepper.step = watched

    killed = kills.in_step(22, "after")
    stage.run(out, hooks=(jump, killed)).must(-signal.SIGKILL)
    stage.run(out, *SETTINGS, hooks=(jump,)).must(0)
    return Found("nothing but times in its tables; killed too, it went on", stage.lost(out))
