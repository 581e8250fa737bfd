"""What one hostile input is: what is sent, and which answer is right."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class Picture(NamedTuple):
    """A body that claims to be a picture. item: its number in the list of hostile inputs; make:
    its bytes; status: the right one, or two where nothing decides between them; why: which promise
    the status follows from; says: a pattern in the message."""

    item: int
    name: str
    make: Callable[[], bytes]
    status: tuple[int, ...]
    why: str
    says: str = ""

    def __str__(self) -> str:
        return f"{self.item}-{self.name}".replace(" ", "-")
