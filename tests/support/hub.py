"""The cache of Hugging Face in a folder of the test, and a network that must not be asked."""

from __future__ import annotations

import socket

from safetensors.torch import save_file

from crosspatch.training.released import HUB_FILE, release_of


def empty_cache(monkeypatch, folder):
    """Lets the cache lie in `folder`; returns what enters a checkpoint: put(name, state)."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))

    def put(name, state):
        place = folder / f"models--{release_of(name).repository.replace('/', '--')}"
        (place / "snapshots" / "abc").mkdir(parents=True)
        (place / "refs").mkdir()
        (place / "refs" / "main").write_text("abc")
        save_file(state, place / "snapshots" / "abc" / HUB_FILE)

    return put


def refuse_network(monkeypatch):
    """Whatever asks for a network fails."""

    def refuse(*_, **__):
        raise AssertionError("a socket was opened")

    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)
