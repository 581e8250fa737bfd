"""A headless Chromium from the system, and windows in it that note what a page does."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page, sync_playwright

INSTALL = "apt-get install --no-install-recommends chromium fonts-dejavu-core"
WIDE, PHONE = (1280, 900), (390, 844)
LAWS = (Path(__file__).parent / "laws.js").read_text(encoding="utf-8")


def chromium() -> str:
    """Where Chromium is. Raises RuntimeError with the command to type where there is none."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        found = shutil.which(name)
        if found:
            return found
    raise RuntimeError(f"no chromium on this machine: {INSTALL}")


@contextmanager
def browsing() -> Iterator[Browser]:
    """A browser without a screen."""
    with sync_playwright() as tool:
        browser = tool.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def window(
    browser: Browser, place: Path | str, size: tuple[int, int] = WIDE, **options: Any
) -> Iterator[tuple[Page, list[str]]]:
    """A page opened from the disk or from its server, and what it did that no page of ours does:
    asked anybody else for anything, opened a dialog, wrote an error. options: of playwright's
    `new_context`."""
    home = place.as_uri() if isinstance(place, Path) else place
    width, height = size
    context = browser.new_context(viewport={"width": width, "height": height}, **options)
    page, noted = context.new_page(), []
    page.on("dialog", lambda one: (noted.append(f"dialog: {one.message}"), one.dismiss()))
    page.on("pageerror", lambda one: noted.append(f"error: {one}"))
    page.on("console", lambda one: _console(one, noted))
    page.on("request", lambda one: _request(one.url, noted, home))
    page.on("popup", lambda one: noted.append(f"window: {one.url}"))
    page.goto(home, wait_until="load")
    yield page, noted
    context.close()


def _console(message: Any, noted: list[str]) -> None:
    if message.type in ("error", "warning"):
        noted.append(f"{message.type}: {message.text}")


def _request(url: str, noted: list[str], home: str) -> None:
    own = (home,) if home.startswith("http") else ("file:",)
    if not url.startswith((*own, "data:", "blob:")):
        noted.append(f"request: {url}")


def laws(page: Page, site: bool = False) -> list[str]:
    """What is wrong with a page as it is shown now; everything that is folded is opened first."""
    page.evaluate("""() => {
      for (const one of document.querySelectorAll('details')) one.open = true;
      for (const one of document.querySelectorAll('img')) one.loading = 'eager';
    }""")
    page.evaluate("""() => Promise.all([...document.images].map((one) => one.complete ||
      new Promise((done) => { one.onload = one.onerror = done; })))""")
    return page.evaluate(LAWS, {"site": site})
