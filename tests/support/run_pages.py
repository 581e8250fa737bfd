"""`python run_pages.py PAGE…`: the Python of each page, top to bottom, in a module of its own.

A process of its own: pages register models. What a page prints is compared, up to numbers, with the
block marked `prints` below it. Answers {page: what went wrong, or ""} on the last line.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import json
import os
import sys
import tempfile
import traceback
import types
import warnings
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
warnings.simplefilter("ignore")

from support.pages import Block, agrees, blocks  # noqa: E402

PYTHON, PRINTS, SKIP = "python", "prints", "not run:"


def run_page(page: Path) -> None:
    """Raises what its blocks raise, AssertionError where they print something else."""
    module = types.ModuleType(f"page_{page.stem.replace('-', '_')}")
    sys.modules[module.__name__] = module  # a registered model is looked for in its module
    printed = ""
    for block in blocks(page):
        if block.mark == PRINTS:
            _compare(block, printed)
        if block.language == PYTHON:
            printed = "" if block.mark.startswith(SKIP) else _run(block, module)


def _run(block: Block, module: types.ModuleType) -> str:
    """What a block prints; tracebacks name the page and its line."""
    code = compile("\n" * (block.line - 1) + block.text, str(block.page), "exec")
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(code, module.__dict__)
    return out.getvalue()


def _compare(block: Block, printed: str) -> None:
    shown = block.text.splitlines()
    if not agrees(shown, printed.splitlines()):
        lines = difflib.unified_diff(shown, printed.splitlines(), "the page", "printed", "", "")
        raise AssertionError("\n".join([block.where, *lines]))


@contextlib.contextmanager
def _somewhere_else() -> Iterator[None]:
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        yield
        os.chdir(before)


def main() -> None:
    wrong = {}
    for name in sys.argv[1:]:
        page = Path(name).resolve()
        wrong[name] = ""
        with _somewhere_else():
            try:
                run_page(page)
            except Exception:
                wrong[name] = traceback.format_exc(limit=-3)
    print(json.dumps(wrong))


if __name__ == "__main__":
    main()
