"""Several processes of one team that call the same function; what they answer, as JSON."""

from __future__ import annotations

import importlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]


def together(world: int, where: str, folder: Path, **given) -> list:
    """What `module:function(**given)` returns in each of `world` processes, by rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    path = os.pathsep.join([*sys.path, str(TESTS)])
    common = {"PYTHONPATH": path, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    common |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1"}
    team = [
        subprocess.Popen(
            [sys.executable, __file__, where, json.dumps(given), str(folder / f"{rank}.json")],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    said = [process.communicate(timeout=120)[1] for process in team]
    assert [process.returncode for process in team] == [0] * world, "\n".join(said)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]


def _work() -> None:
    import crosspatch._torchvision  # noqa: F401

    from crosspatch.training import team

    where, given, out = sys.argv[1:]
    module, _, name = where.partition(":")
    call = getattr(importlib.import_module(module), name)
    with team.joined():
        answer = call(**json.loads(given))
    Path(out).write_text(json.dumps(answer))


if __name__ == "__main__":
    _work()
