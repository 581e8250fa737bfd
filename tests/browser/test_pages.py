"""Every page in a browser: nothing runs or is fetched, nothing is cut off, all is readable."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser

from browser.made import ODD, PAGES
from browser.windows import INSTALL, PHONE, WIDE, browsing, chromium, laws, window
from support.once import once, shared

pytestmark = pytest.mark.long

SIZES = {"wide": WIDE, "phone": PHONE}
NO_SEARCH = "error: Failed to load resource: net::ERR_FILE_NOT_FOUND"
"""The docs' theme looks for a search that a site opened from a folder does not have. Its plugin for
that asks unpkg.com, so there is none."""
FRAMED = "<main><h1>a</h1>{}</main>"
FIGURE = "<svg role='img' aria-label='x'"
FOCUS = """(wanted) => {
  const one = document.activeElement;
  return [[...document.querySelectorAll(wanted)].indexOf(one), getComputedStyle(one).outlineStyle];
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with browsing() as found:
        yield found


@pytest.fixture
def opened(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, worker_id: str
) -> Path:
    """The page of a parameter, written by the first test process that opens one of its maker's."""
    name, make = request.param, PAGES[request.param]
    place = next(place for place, one in enumerate(dict.fromkeys(PAGES.values())) if one is make)

    def makes(folder: Path) -> None:
        folder.mkdir()
        make(folder)

    return once(shared(tmp_path_factory, worker_id) / f"pages-{place}", makes) / name


@pytest.mark.parametrize("script", [True, False], ids=["script", "no-script"])
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("opened", PAGES, indirect=True)
def test_it_is_readable(browser: Browser, opened: Path, size: str, theme: str, script: bool):
    site = opened.parent.name == "site"
    options = {"color_scheme": theme, "java_script_enabled": script}
    with window(browser, opened, SIZES[size], **options) as (page, noted):
        assert laws(page, site) == []
        assert [one for one in noted if not (site and one == NO_SEARCH)] == []


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("opened", PAGES, indirect=True)
def test_it_prints(browser: Browser, opened: Path, theme: str) -> None:
    """On paper nothing is folded, as nobody could unfold it."""
    with window(browser, opened, (760, 1000), color_scheme=theme) as (page, noted):
        page.emulate_media(media="print", color_scheme=theme)
        if opened.parent.name != "site":
            folded = page.locator("details:not([open]) > :not(summary)")
            assert all(one.bounding_box() for one in folded.all()[:5])
            assert laws(page) == []
        assert page.pdf(format="A4").startswith(b"%PDF")
        assert [one for one in noted if one != NO_SEARCH] == []


@pytest.mark.parametrize("opened", [p for p in PAGES if "site" not in p], indirect=True)
def test_the_keyboard_reaches_everything(browser: Browser, opened: Path) -> None:
    wanted = "details > summary, a[href]"
    with window(browser, opened) as (page, _):
        page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true })")
        places = page.locator(wanted).count()
        reached = set()
        for _ in range(3 * places + 60):  # boxes that scroll are stops, too
            page.keyboard.press("Tab")
            at, outline = page.evaluate(FOCUS, wanted)
            if at >= 0:
                assert outline != "none"
                reached.add(at)
            if len(reached) == places:
                break
        assert len(reached) == places


@pytest.mark.parametrize("opened", ["audit.html", "report.html", "three.html"], indirect=True)
def test_links_to_files_lead_somewhere(browser: Browser, opened: Path) -> None:
    with window(browser, opened) as (page, _):
        links = page.eval_on_selector_all("a[href]", "all => all.map(a => a.getAttribute('href'))")
        files = [link for link in links if not link.startswith("#")]
        assert [link for link in files if not (opened.parent / link).is_file()] == []


@pytest.mark.parametrize("opened", ["audit.html"], indirect=True)
def test_hostile_names_are_shown_as_they_are(browser: Browser, opened: Path) -> None:
    with window(browser, opened) as (page, _):
        text = page.locator("main").inner_text()
        assert all(name in text for name in ODD[:2])
        assert re.search(r"two\\nlines \\x1b\[31mred", text)


WRONG = {
    "wide where": '<p style="width: 3000px">x</p>',
    "2 h1": "<h1>b</h1>",
    "h3 below h1": "<h3>b</h3>",
    "without alt": '<img src="data:,">',
    "link to nowhere": '<a href="#none">x</a>',
    "should not be": "<script></script>",
    "P has onclick": '<p onclick="1">x</p>',
    "without a text": "<svg></svg>",
    "nothing under": "<h2>b</h2>",
    "contrast 1": '<p style="color: #eee; background: #fff">x</p>',
    "is cut off": f"{FIGURE} width='20'><text x='-9' y='50'>abc</text></svg>",
    "lies over": f"{FIGURE}><text y='50'>abc</text><text y='52'>abc</text></svg>",
    "too small": f"{FIGURE} width='50' viewBox='0 0 500 90'><text y='50'>abc</text></svg>",
    "control character": "<p>a\x1b</p>",
    "ids given twice": '<p id="a">x</p><p id="a">x</p>',
}  # fmt: skip


@pytest.mark.parametrize("said", WRONG)
def test_the_laws_can_fail(browser: Browser, tmp_path: Path, said: str) -> None:
    path = tmp_path / "page.html"
    path.write_text(f'<html lang="en"><title>x</title>{FRAMED.format(WRONG[said])}')
    with window(browser, path) as (page, _):
        assert said in " ".join(laws(page))


def test_what_a_page_does_is_noted(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text(
        "<script>alert(1); console.error('odd'); fetch('http://127.0.0.1:9/x')</script>"
    )
    with window(browser, path) as (page, noted):
        page.wait_for_timeout(200)
        assert {one.split(":")[0] for one in noted} == {"dialog", "error", "request"}


def test_without_a_browser_the_command_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(RuntimeError, match="apt-get install") as told:
        chromium()
    assert INSTALL in str(told.value)
