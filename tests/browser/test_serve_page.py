"""The server's page in a browser: every way in, every answer, and nothing that it must not do."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from deploy.test_export import write_run
from PIL import Image
from playwright.sync_api import Browser, Page, expect

from browser.windows import PHONE, WIDE, browsing, laws, window
from crosspatch.deploy.bundle import read_bundle
from crosspatch.deploy.engines import open_engine
from crosspatch.deploy.export import export
from crosspatch.deploy.predictor import Predictor
from crosspatch.deploy.server.limits import Limits
from crosspatch.deploy.server.page import page as document
from crosspatch.deploy.server.service import Answer, Ask, Refused, Service
from support.bundles import info
from support.hostile import oriented
from support.serving import Held, running

pytestmark = pytest.mark.long

OWN = ("<script>", "<form id", '<link rel="icon" href="data:')
"""What laws.js finds on no other page of ours; no form is ever sent."""
FAILED = "error: Failed to load resource: the server responded with a status of"
HOSTILE = (
    "<img src=x onerror=alert(1)>", "</script><script>alert(1)</script>", "\u202egnp.exe",
    "javascript:alert(1)", "a very long name " * 20,
)  # fmt: skip


def png(colour: int = 0, size: tuple[int, int] = (48, 32)) -> bytes:
    """A picture file; another colour makes other bytes."""
    stream = BytesIO()
    Image.new("RGB", size, (colour, 120, 255 - colour)).save(stream, "PNG")
    return stream.getvalue()


class Model(Held):
    """A service that answers as it was told: answers, by body, one after the other; `usual` where
    nothing was told."""

    def __init__(self, classes: tuple[str, ...] = ("red", "green", "blue"), **told: Any) -> None:
        super().__init__()
        self.info = info(classes=classes, check=(), **told)
        self.told: dict[bytes, list[Any]] = {}
        self.most = self.now = 0

    def usual(self, **given: Any) -> Answer:
        names = list(self.info.classes)
        shares = [0.75, 0.2, 0.05, *[0.0] * len(names)]
        patches = np.linspace(-0.5, 1, 24).reshape(4, 6).tolist() if self.explains else None
        answer = Answer(
            list(zip(names, shares, strict=False))[:5], None, 0.75, False, 0.5, 48, 32, "PNG",
            "0" * 64, 0.001, 0.002, 0.003, 1, png(200, (32, 24)), patches,
        )  # fmt: skip
        return answer._replace(**given)

    async def answer(self, ask: Ask) -> Answer:
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            await super().answer(ask)
        finally:
            self.now -= 1
        told = self.told.get(ask.body)
        found = told.pop(0) if told else self.usual()
        if isinstance(found, Refused):
            raise found
        return found


class Opened(NamedTuple):
    """A page of a running server. noted: what it did that it must not (see `window`)."""

    page: Page
    noted: list[str]

    @property
    def said(self) -> Any:
        return self.page.get_by_role("status")

    @property
    def cards(self) -> Any:
        return self.page.get_by_role("article")

    def choose(self, *files: tuple[str, bytes]) -> None:
        given = [{"name": n, "mimeType": "image/png", "buffer": b} for n, b in files]
        self.page.get_by_label("Choose pictures").set_input_files(given)

    def answered(self, count: int) -> None:
        expect(self.page.locator("article .told")).to_have_count(count)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with browsing() as found:
        yield found


@contextmanager
def opened(
    browser: Browser, service: Any, size: tuple[int, int] = WIDE, known: bool = True,
    served: dict[str, Any] | None = None, **options: Any,
) -> Iterator[Opened]:  # fmt: skip
    """A server around `service`, and its page. known: wait until it knows what is served."""
    with running(service, page=document(), **(served or {})) as server:
        url = f"http://127.0.0.1:{server.port}/"
        with window(browser, url, size, **options) as (page, noted):
            if known:
                expect(page.locator("#limits")).not_to_be_empty()
            yield Opened(page, noted)


def faults(page: Page) -> list[str]:
    """What `laws` finds, less what this page may have."""
    odd = "an element that should not be: "
    return [one for one in laws(page) if not one.removeprefix(odd).startswith(OWN)]


def sent(page: Page, kind: str, *files: tuple[str, bytes]) -> None:
    """A drop or a paste of files on the page."""
    page.evaluate(
        """([kind, files]) => {
          const given = new DataTransfer();
          for (const [name, bytes] of files)
            given.items.add(new File([new Uint8Array(bytes)], name, {type: 'image/png'}));
          const how = {bubbles: true, cancelable: true, dataTransfer: given, clipboardData: given};
          const drop = kind === 'drop', all = drop ? ['dragenter', 'dragover', 'drop'] : ['paste'];
          const Made = drop ? DragEvent : ClipboardEvent;
          for (const name of all) document.body.dispatchEvent(new Made(name, how));
        }""",
        [kind, [[name, list(body)] for name, body in files]],
    )


# ------------------------------------------------------------------ ways in


def test_chosen_dropped_and_pasted_pictures_become_cards_newest_first(browser: Browser) -> None:
    service = Model()
    with opened(browser, service) as (page, noted):
        here = Opened(page, noted)
        here.choose(("one.png", png(1)), ("two.png", png(2)))
        here.answered(2)
        sent(page, "drop", ("three.png", png(3)))
        here.answered(3)
        expect(page.locator("body.over")).to_have_count(0)
        sent(page, "paste", ("image.png", png(4)))
        here.answered(4)
        names = page.get_by_role("heading", level=2).all_inner_texts()
        assert names == ["pasted picture", "three.png", "two.png", "one.png"]
        assert {ask.body for ask in service.asks} == {png(number) for number in range(1, 5)}
        assert all(ask.seen and ask.top == 5 and not ask.explain for ask in service.asks)
        here.choose(("one.png", png(1)))  # the same once more
        here.answered(5)
        assert noted == []


def test_what_holds_no_picture_is_said(browser: Browser) -> None:
    with opened(browser, Model()) as here:
        sent(here.page, "paste")
        expect(here.said).to_contain_text("no picture in the clipboard")
        sent(here.page, "drop")
        expect(here.said).to_contain_text("No file was in what you dropped")
        assert here.cards.count() == 0


def test_many_at_once_are_asked_two_at_a_time_and_each_gets_its_own(browser: Browser) -> None:
    service = Model()
    for number in range(12):
        name = f"c{number}"
        service.told[png(number)] = [service.usual(predictions=[(name, 0.9)], confidence=0.9)]
    service.gate.clear()
    with opened(browser, service) as here:
        here.choose(*[(f"{number}.png", png(number)) for number in range(12)])
        expect(here.cards).to_have_count(12)
        time.sleep(0.3)
        assert len(service.asks) == 2
        service.gate.set()
        here.answered(12)
        assert service.most == 2
        for number, card in enumerate(reversed(here.cards.all())):
            assert card.get_by_role("heading").inner_text() == f"{number}.png"
            assert card.locator(".verdict").inner_text().startswith(f"c{number}:")


# ------------------------------------------------------------------ answers


def test_an_answer_is_shown_in_words_and_numbers(browser: Browser) -> None:
    with opened(browser, Model()) as here:
        here.choose(("cat.png", png()))
        here.answered(1)
        card = here.cards.first
        expect(card.locator(".verdict")).to_have_text("red: likely, 75.0 %")
        expect(card).to_contain_text("sure: at or above 50.0 %")
        rows = card.get_by_role("table").get_by_role("row")
        assert [row.inner_text().split() for row in rows.all()] == [
            ["red", "75.0", "%"], ["green", "20.0", "%"], ["blue", "5.0", "%"],
        ]  # fmt: skip
        bars = card.locator(".fill").evaluate_all("all => all.map((one) => one.style.width)")
        assert bars == ["75%", "20%", "5%"]
        expect(card).to_contain_text("2.0 ms reading the picture")
        expect(card).to_contain_text("PNG, 48 \u00d7 32 pixels")
        expect(here.said).to_have_text("cat.png: red: likely, 75.0 %.")
        assert here.page.get_by_role("button", name="Show where it looked").count() == 0


def test_not_sure_is_said_and_explained(browser: Browser) -> None:
    service = Model()
    shares = [("red", 0.36), ("green", 0.34), ("blue", 0.3)]
    doubtful = service.usual(predictions=shares, confidence=0.36, abstain=True)
    service.told[png()] = [doubtful]
    with opened(browser, service) as here:
        here.choose(("fog.png", png()))
        here.answered(1)
        expect(here.cards.first).to_contain_text("Not sure")
        expect(here.cards.first).to_contain_text("36.0 %, is below 50.0 %")
        expect(here.said).to_contain_text("Not sure. The best guess is red")
        assert not here.cards.first.get_by_text("\u2713").count()


def test_several_labels_are_those_that_reach_their_marks(browser: Browser) -> None:
    service = Model(task="multilabel", thresholds=(0.5, 0.1, 0.9))
    shares = [("red", 0.8), ("blue", 0.6), ("green", 0.2)]
    both = service.usual(predictions=shares, labels=[shares[0], shares[2]])
    none = service.usual(predictions=[("red", 0.3)], labels=[])
    service.told = {png(1): [both], png(2): [none]}
    with opened(browser, service) as here:
        here.choose(("a.png", png(1)))
        here.answered(1)
        card = here.cards.first
        expect(card.locator(".verdict")).to_have_text("red, 80.0 %; green, 20.0 %")
        said = [row.inner_text() for row in card.get_by_role("row").all()]
        assert ["has it not" not in one and "has it" in one for one in said] == [True, False, True]
        ticks = card.locator(".tick").evaluate_all("all => all.map((one) => one.style.left)")
        assert ticks == ["calc(50% - 1px)", "calc(90% - 1px)", "calc(10% - 1px)"]
        here.choose(("b.png", png(2)))
        here.answered(2)
        expect(here.cards.first.locator(".verdict")).to_have_text("none of the classes")


def test_the_picture_stands_upright_beside_what_the_model_saw(
    browser: Browser, tmp_path: Path
) -> None:
    """A real server: what it answers is what `crosspatch predict` answers."""
    run = write_run(tmp_path / "run", "vit")
    made = export(run, explain=True, out=tmp_path / "b.onnx")
    body = oriented(6)
    with Image.open(BytesIO(body)) as lying:
        wide, tall = lying.size
    bundle = read_bundle(made.path)
    shown = Predictor(open_engine(bundle), bundle.info.classes, bundle.info.preprocess)
    ((best, share),) = shown.predict([body]).top(1)[0] or []
    with opened(browser, Service(made.path, workers=1, threads=1)) as here:
        here.choose(("turned.jpg", body))
        here.answered(1)
        card = here.cards.first
        expect(card.locator(".verdict")).to_contain_text(f"{best}: ")
        expect(card.locator(".verdict")).to_contain_text(f"{100 * share:.1f} %")
        sizes = card.locator("img").evaluate_all(
            "all => all.map((one) => [one.naturalWidth, one.naturalHeight])"
        )
        assert sizes == [[tall, wide], [32, 32]]
        expect(card).to_contain_text(f"{tall} \u00d7 {wide} pixels")
        card.get_by_role("button", name="Show where it looked").click()
        assert card.locator("canvas").evaluate("one => [one.width, one.height]") == [8, 8]
        here.choose(("broken.jpg", b"\xff\xd8\xff\xe0 and nothing more"))
        here.answered(2)
        expect(here.cards.first).to_contain_text("422 unreadable")
        assert [one for one in here.noted if not one.startswith(FAILED)] == []


# ------------------------------------------------------------------ where it looked


def test_where_it_looked_is_drawn_patch_by_patch(browser: Browser) -> None:
    service = Model()
    service.explains = True
    with opened(browser, service) as here:
        here.choose(("a.png", png()))
        here.answered(1)
        assert service.asks[0].explain
        card, page = here.cards.first, here.page
        button = card.get_by_role("button", name="Show where it looked")
        expect(card.locator("canvas")).to_be_hidden()
        expect(card.get_by_label("Strength")).to_be_hidden()
        button.press("Enter")
        expect(button).to_have_attribute("aria-pressed", "true")
        expect(card.get_by_role("img", name="most came from row 4, column 6")).to_be_visible()
        colours = np.array(card.locator("canvas").evaluate(
            "one => [...one.getContext('2d').getImageData(0, 0, 6, 4).data]"
        )).reshape(4, 6, 4)  # fmt: skip
        scores = np.linspace(-0.5, 1, 24).reshape(4, 6)
        assert np.abs(colours[..., 3] - 255 * np.abs(scores)).max() <= 1
        assert (np.abs(colours[scores > 0.2][:, :3] - [213, 94, 0]) <= 3).all()
        assert (np.abs(colours[scores < -0.2][:, :3] - [0, 114, 178]) <= 3).all()
        box, under = (
            card.locator("canvas").bounding_box(),
            card.locator(".model img").bounding_box(),
        )
        assert box == under
        card.get_by_label("Strength").fill("30")
        assert card.locator("canvas").evaluate("one => getComputedStyle(one).opacity") == "0.3"
        assert faults(page) == []
        button.press("Space")
        expect(card.locator("canvas")).to_be_hidden()
        assert here.noted == []


# ------------------------------------------------------------------ what goes wrong


def test_errors_are_shown_with_their_hint_and_can_be_tried_again(browser: Browser) -> None:
    service = Model()
    service.told[png(1)] = [Refused("too_many_pixels", "the picture is huge", "make it smaller")]
    with opened(browser, service, served={"limits": Limits(body=5000)}) as here:
        here.choose(("a.png", png(1)))
        here.answered(1)
        card = here.cards.first
        expect(card).to_contain_text("The picture is huge.")
        expect(card).to_contain_text("Make it smaller.")
        expect(card).to_contain_text("422 too_many_pixels, request ")
        expect(here.said).to_contain_text("a.png: The picture is huge. Make it smaller.")
        card.get_by_role("button", name="Try again").click()
        expect(card.locator(".verdict")).to_contain_text("red")
        asked = len(service.asks)
        here.choose(("empty.png", b""), ("large.png", b"x" * 5001))
        here.answered(3)
        expect(here.cards.first).to_contain_text("5 kB")
        expect(here.cards.nth(1)).to_contain_text("This file is empty.")
        assert len(service.asks) == asked


def test_a_busy_server_is_asked_once_more_after_its_time(browser: Browser) -> None:
    service = Model()
    busy = [Refused("busy", "the queue is full", "ask later", 1) for _ in range(3)]
    service.told = {png(1): busy[:1], png(2): busy[1:]}
    with opened(browser, service) as here:
        began = time.monotonic()
        here.choose(("a.png", png(1)))
        expect(here.cards.first).to_contain_text("the server is busy; asking again in 1 s")
        expect(here.said).to_contain_text("busy")
        expect(here.cards.first.locator(".verdict")).to_contain_text("red")
        assert time.monotonic() - began > 1
        here.choose(("b.png", png(2)))
        expect(here.cards.first).to_contain_text("503 busy")
        assert len(service.asks) == 4


def test_a_server_that_is_gone_is_said(browser: Browser) -> None:
    with opened(browser, Model()) as here:
        here.page.route("**/predict*", lambda route: route.abort())
        here.choose(("a.png", png()))
        here.answered(1)
        expect(here.cards.first).to_contain_text("The server cannot be reached.")


def test_a_picture_that_was_removed_does_not_come_back(browser: Browser) -> None:
    service = Model()
    service.gate.clear()
    with opened(browser, service) as here:
        here.choose(("a.png", png(1)), ("b.png", png(2)))
        here.page.get_by_role("button", name="Remove b.png").click()
        expect(here.cards).to_have_count(1)
        focused = here.page.evaluate("document.activeElement.getAttribute('aria-label')")
        assert focused == "Remove a.png"
        service.gate.set()
        here.answered(1)
        here.choose(("c.png", png(3)))
        here.answered(2)
        here.page.get_by_role("button", name="Remove all").click()
        expect(here.cards).to_have_count(0)
        assert here.page.evaluate("document.activeElement.id") == "files"


def test_names_are_data(browser: Browser) -> None:
    service = Model(classes=HOSTILE)
    with opened(browser, service) as here:
        for number, name in enumerate(HOSTILE):
            here.choose((name.replace("/", "_")[:90] + ".png", png(number)))
        here.answered(len(HOSTILE))
        here.page.get_by_text("About this model").click()
        shown = here.page.locator("main").inner_text()
        assert HOSTILE[0] in shown
        assert HOSTILE[1] in shown
        assert "\u202e" not in shown
        assert here.page.locator("img[src=x]").count() == 0
        assert here.page.locator("script").count() == 1
        assert faults(here.page) == []
        assert here.noted == []


# ------------------------------------------------------------------ the token


def test_a_token_is_asked_for_and_kept_nowhere(browser: Browser) -> None:
    service = Model()
    with opened(browser, service, known=False, served={"token": "open-sesame"}) as here:
        page = here.page
        field = page.get_by_label("This server asks for a token.")
        expect(field).to_be_focused()
        here.choose(("a.png", png()))
        here.answered(1)
        assert service.asks == []
        field.fill("wrong")
        field.press("Enter")
        expect(page.get_by_text("does not take this token")).to_be_visible()
        field.fill("with a space")
        field.press("Enter")
        expect(page.get_by_text("no spaces")).to_be_visible()
        field.fill("open-sesame")
        page.get_by_role("button", name="Use it").press("Enter")
        expect(field).to_be_hidden()
        expect(here.cards.first.locator(".verdict")).to_contain_text("red")
        kept = page.evaluate("[localStorage.length, sessionStorage.length, document.cookie]")
        assert kept == [0, 0, ""]
        assert "open-sesame" not in page.content()
        assert "open-sesame" not in page.url
        page.reload()
        expect(field).to_be_visible()
        assert [one for one in here.noted if not one.startswith(FAILED)] == []


# ------------------------------------------------------------------ everybody can use it


def test_the_keyboard_reaches_everything(browser: Browser) -> None:
    service = Model()
    service.explains = True
    service.told[png(1)] = [Refused("unreadable", "no picture", "send one")]
    wanted = "input:not([type=password]), button, summary"
    with opened(browser, service) as here:
        page = here.page
        here.choose(("a.png", png(1)), ("b.png", png(2)))
        here.answered(2)
        page.get_by_role("button", name="Show where it looked").click()
        visible = page.locator(wanted).filter(visible=True).count()
        reached: list[int] = []
        page.get_by_role("heading", level=1).click()
        for _ in range(visible + 5):
            page.keyboard.press("Tab")
            at, ring = page.evaluate(
                """(wanted) => {
                  const one = document.activeElement;
                  const seen = one.classList.contains('unseen') ? one.nextElementSibling : one;
                  return [[...document.querySelectorAll(wanted)].indexOf(one),
                    getComputedStyle(seen).outlineStyle];
                }""",
                wanted,
            )
            if at >= 0:
                assert ring == "solid"
                reached.append(at)
        assert reached[:visible] == sorted(set(reached[:visible]))
        assert len(set(reached)) == visible


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("size", [WIDE, PHONE], ids=["wide", "phone"])
def test_it_is_readable_in_every_state(browser: Browser, size: tuple[int, int], theme: str) -> None:
    service = Model(classes=("red", "a class with a longer name than others", "blue"))
    service.explains = True
    doubtful = service.usual(confidence=0.3, abstain=True)
    service.told = {
        png(1): [Refused("unreadable", "no picture", "send one")],
        png(2): [doubtful],
    }
    with opened(browser, service, size, color_scheme=theme) as here:
        assert faults(here.page) == []
        long = "a_very_long_name_of_a_file_without_any_place_to_break_it_at_" * 3
        here.choose(("a.png", png(1)), ("b.png", png(2)), (f"{long}.png", png(3)))
        here.answered(3)
        here.cards.first.get_by_role("button", name="Show where it looked").click()
        assert faults(here.page) == []
        service.gate.clear()
        here.choose(("d.png", png(4)))
        expect(here.cards.first).to_contain_text("asking the server")
        assert faults(here.page) == []
        service.gate.set()
        here.answered(4)
        assert [one for one in here.noted if not one.startswith(FAILED)] == []


@pytest.mark.parametrize("size", [WIDE, PHONE], ids=["wide", "phone"])
def test_without_script_it_says_how_to_ask(browser: Browser, size: tuple[int, int]) -> None:
    with opened(browser, Model(), size, known=False, java_script_enabled=False) as here:
        text = here.page.locator("main").inner_text()
        assert "curl --data-binary @picture.jpg" in text
        assert "Choose pictures" not in text
        assert faults(here.page) == []
        assert here.noted == []


def test_nothing_moves_where_that_is_not_wanted(browser: Browser) -> None:
    moving = """() => [...document.querySelectorAll('*')].map((one) => getComputedStyle(one))
      .filter((one) => one.animationName !== 'none' || parseFloat(one.transitionDuration)).length"""
    for wish, moves in (("reduce", False), ("no-preference", True)):
        service = Model()
        service.gate.clear()
        with opened(browser, service, reduced_motion=wish) as here:
            here.choose(("a.png", png()))
            expect(here.cards.first).to_contain_text("asking the server")
            assert bool(here.page.evaluate(moving)) == moves
            service.gate.set()
            here.answered(1)


def test_the_document_is_one_and_its_policy_lets_nothing_else_run(browser: Browser) -> None:
    text = document().decode()
    assert not re.search(r'(?:src|href)="(?!data:)', text)
    assert not re.search(r"innerHTML|insertAdjacent|document\.write|eval\(|localStorage", text)
    assert "/* page.js */" not in text
    assert "/* page.css */" not in text
    with opened(browser, Model()) as here:
        done = here.page.evaluate(
            """() => new Promise((done) => {
              document.addEventListener('securitypolicyviolation',
                (event) => done(event.violatedDirective));
              const script = document.createElement('script');
              script.textContent = 'window.ran = true';
              document.body.append(script);
              setTimeout(() => done('nothing was refused'), 2000);
            })"""
        )
        assert done.startswith("script-src")
        assert here.page.evaluate("window.ran") is None
