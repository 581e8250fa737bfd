"""The docs: they build, their links lead somewhere, their Python runs, their commands are ours."""

from __future__ import annotations

import contextlib
import difflib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from cyclopts import CycloptsError

from crosspatch.cli.main import ROOMS, VERBS, app, main
from crosspatch.errors import CrosspatchError
from support import run_pages
from support.once import once, shared
from support.pages import DOCS, PAGES, ROOT, agrees, blocks, commands, inline, levelled, typed
from support.processors import plain_processor, without_bf16  # noqa: F401

SITE = ROOT / "mkdocs.yml"
FLAGS = (ROOT / "tests" / "cli" / "flags.txt").read_text(encoding="utf-8").splitlines()
ELSEWHERE = {"--help", "--debug", "--version"}
LINK = re.compile(r"\]\(([^)\s]+)\)")
MARKS = re.compile(r"|prints|not run: \w.{10,}|run(?:, long)?(?:, exit [1-5])?")


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


def in_order(entries: Any) -> Iterator[Path]:
    """The pages of a nav, as a reader comes to them."""
    for entry in entries:
        for value in entry.values():
            yield from in_order(value) if isinstance(value, list) else (DOCS / value,)


@pytest.fixture(scope="module")
def nav() -> list[Path]:
    return list(in_order(yaml.safe_load(SITE.read_text(encoding="utf-8"))["nav"]))


# ------------------------------------------------------------------ the site


def built(folder: Path, strict: bool = True) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "zensical", "build", *(["--strict"] if strict else [])]
    environment = {**os.environ, "NO_COLOR": "1"}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    shutil.copytree(DOCS, tmp_path / "docs")
    shutil.copy(SITE, tmp_path)
    return tmp_path


def test_the_site_builds_strictly_and_asks_nobody(copied: Path, nav: list[Path]) -> None:
    done = built(copied)
    assert done.returncode == 0, done.stdout + done.stderr
    for page in nav:
        html = (copied / "site" / page.relative_to(DOCS)).with_suffix(".html").read_text()
        outside = re.findall(r'(?:<script[^>]* src|<link[^>]* href|<img[^>]* src)="?https?:', html)
        assert outside == [], page
    assert (copied / "site" / "search.json").is_file()


@pytest.mark.parametrize("wrong", ["[a](nowhere.md)", "[a](tokens.md#nowhere)"])
def test_a_broken_link_is_no_site(copied: Path, wrong: str) -> None:
    with (copied / "docs" / "index.md").open("a") as file:
        file.write(f"\n{wrong}\n")
    done = built(copied)
    assert done.returncode != 0
    assert "does not exist" in done.stdout + done.stderr


def test_every_page_is_in_the_nav_and_every_verb_has_one(nav: list[Path]) -> None:
    assert sorted(nav) == sorted(DOCS.rglob("*.md"))
    pages = {page.stem for page in nav}
    assert {*VERBS, *ROOMS} <= pages
    assert {"models", "tokens", "mixing", "objectives", "tasks"} <= {
        page.stem for page in nav if page.parent.name == "seams"
    }


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_and_pictures_are_there(page: Path) -> None:
    """Plain Markdown is read without the site, too; the site cannot show what is not in docs/."""
    text = page.read_text(encoding="utf-8")
    for link in LINK.findall(re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.S)):
        if not re.match(r"https?:|#", link):
            target = (page.parent / link.partition("#")[0]).resolve()
            assert target.is_file(), link
            assert page.parent == ROOT or target.is_relative_to(DOCS), link
    assert page.parent == ROOT or r"\|" not in text, "the site shows the backslash"


def test_benchmarks_name_scripts_and_results_that_are_there() -> None:
    shown = set(inline(DOCS / "benchmarks.md"))
    room = ROOT / "benchmarks"
    scripts = {name.split()[0] for name in shown if re.match(r"\w+\.py", name)}
    figures = {name for name in shown if re.fullmatch(r"[\w*-]+\.(csv|md)", name)}
    assert [name for name in scripts if not (room / name).is_file()] == []
    assert [name for name in figures if not [*(room / "results").glob(name)]] == []
    helpers = {"hardware.py", "load.py", "mixing_figure.py", "serving.py"}
    assert {path.name for path in room.glob("*.py")} - helpers <= scripts


# ------------------------------------------------------------------ the Python


WITH_PYTHON = [page for page in PAGES if any(b.language == "python" for b in blocks(page))]


@pytest.fixture(scope="session")
def outcomes(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> dict[str, str]:
    """What went wrong on each page with Python: all of them in one process of their own."""

    def make(folder: Path) -> None:
        command = [sys.executable, run_pages.__file__, *map(str, WITH_PYTHON)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        folder.mkdir()
        (folder / "outcomes.json").write_text(done.stdout.splitlines()[-1])

    folder = once(shared(tmp_path_factory, worker_id) / "python-of-pages", make)
    return json.loads((folder / "outcomes.json").read_text())


@pytest.mark.parametrize("page", WITH_PYTHON, ids=named)
def test_the_python_of_a_page_runs(page: Path, outcomes: dict[str, str]) -> None:
    assert outcomes[str(page)] == ""


@pytest.mark.parametrize("page", WITH_PYTHON, ids=named)
def test_python_that_is_not_run_is_python_and_of_ours(page: Path) -> None:
    import crosspatch

    for block in blocks(page):
        if block.language == "python":
            compile(block.text, block.where, "exec")
            assert set(re.findall(r"\bxp\.(\w+)", block.text)) <= set(dir(crosspatch)), block.where


def test_few_blocks_are_not_run() -> None:
    skipped = [b.where for p in PAGES for b in blocks(p) if b.mark.startswith("not run:")]
    assert len(skipped) <= 5, skipped


def test_marks_are_known() -> None:
    unknown = [b.where for p in PAGES for b in blocks(p) if not MARKS.fullmatch(b.mark)]
    assert unknown == []


# ------------------------------------------------------------------ the commands


def parse(words: list[str]) -> None:
    app.parse_args(words, print_error=False, exit_on_error=False)


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_commands_can_be_typed(page: Path) -> None:
    """Every line `crosspatch …` of a page is read by the parser itself."""
    wrong = []
    for command in typed(page):
        try:
            parse(command.words)
        except (CycloptsError, CrosspatchError) as error:
            wrong.append(f"{command.where}: {error}")
    assert wrong == []


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_options_in_the_text_are_ours(page: Path) -> None:
    known = {word.rstrip(":") for row in FLAGS for word in row.split() if word.startswith("--")}
    for text in inline(page):
        if not re.match(r"(python|pip|ruff|git|make|zensical|mkdocs|torchrun|benchmarks/)", text):
            options = set(re.findall(r"(?<!\S)--[a-z][a-z0-9-]*", text))
            assert options <= known | ELSEWHERE, text


def test_a_stale_option_is_found() -> None:
    with pytest.raises(CycloptsError):
        parse(["train", "digits", "--epoch", "1"])


# ------------------------------------------------------------------ what they answer


def answered(words: list[str]) -> tuple[int, list[str]]:
    """Exit code and lines, of both streams as a terminal shows them."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        code = main(words)
    return code, out.getvalue().splitlines()


def check(pages: list[Path], wanted: Callable[[str], bool]) -> None:
    """Run the marked blocks of the pages, in a reader's order, and compare."""
    wrong = []
    for block in (b for page in pages for b in blocks(page)):
        if not block.mark.startswith("run") or not wanted(block.mark):
            continue
        expected = re.search(r"exit (\d)", block.mark)
        for command in commands(block):
            code, found = answered(command.words)
            if code != int(expected[1] if expected else 0) or not agrees(command.answer, found):
                lines = [command.answer, found, command.where, f"printed, exit {code}"]
                wrong += difflib.unified_diff(*lines, n=9, lineterm="")
    assert not wrong, "\n".join(wrong)


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")


def test_the_quick_commands_answer_as_shown(nav: list[Path], elsewhere: None) -> None:
    check(nav, lambda mark: "long" not in mark)


@pytest.mark.long
@pytest.mark.usefixtures("plain_processor")
def test_all_commands_answer_as_shown(nav: list[Path], elsewhere: None) -> None:
    check(nav, lambda mark: True)


def test_answers_are_compared_up_to_numbers() -> None:
    assert agrees(["a  12.5 %", "…", "z in 3 s"], ["a 7 %", "b", "c", "z in 1m05s"])
    assert agrees(["…", "a"], ["a"])
    assert not agrees(["a 12 %"], ["a 12 % b"])
    assert not agrees(["a", "…", "c"], ["a", "b"])
    assert levelled("sha256 0efedb8b, 1.7 MB, 2 times") == levelled("sha256 ab, 961.7 kB, 1 time")
