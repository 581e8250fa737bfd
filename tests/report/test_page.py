"""Pages: nothing that comes from outside is markup, and a figure wears the colours of its page."""

import re
from pathlib import Path

import pytest
from jinja2 import UndefinedError
from PIL import Image

from crosspatch.errors import UsageError, visible
from crosspatch.report import figures, page

HOSTILE = "<script>alert(1)</script>\"'&\udc80"


def drawn(said: str = "a line", label: str = "loss") -> str:
    with figures.drawing() as (figure, panel):
        panel.plot([1, 2, 3], [3, 1, 2], label=label)
        panel.legend()
        return figures.to_svg(figure, said)


@pytest.mark.parametrize("macro", ["finding('bad', x, x, x)", "stat(x, x, x)", "thumbs([(x, x)])"])
def test_what_comes_from_outside_is_escaped(macro: str) -> None:
    source = "{% import 'parts.html' as parts %}{{ parts." + macro + " }}"
    html = page._environment().from_string(source).render(x=HOSTILE)
    assert "<script" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;&#34;&#39;&amp;" in html


def test_a_table_escapes_and_sets_numbers_right() -> None:
    source = "{% import 'parts.html' as p %}{{ p.table(['a', 'b'], [[x, 3]], numbers=[1]) }}"
    html = page._environment().from_string(source).render(x=HOSTILE)
    assert "<script" not in html
    assert re.search(r'<td class="number"\s*>3</td>', html)


def test_a_value_that_is_missing_is_no_empty_page() -> None:
    with pytest.raises(UndefinedError):
        page._environment().from_string("{{ missing }}").render()


def test_the_frame_loads_nothing() -> None:
    html = page.render("base.html")
    assert "default-src 'none'" in html
    assert "<script" not in html
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)""", html)
    assert "prefers-color-scheme: dark" in html
    assert "@media print" in html


def test_a_figure_wears_the_colours_of_the_page() -> None:
    svg = drawn()
    assert not re.findall(r"#010[12]\d\d", svg)
    assert {"var(--s1)", "var(--ink)", "var(--rule)"} <= set(re.findall(r"var\(--\w+\)", svg))
    assert "DejaVu" not in svg


def test_a_figure_shows_names_as_they_are() -> None:
    svg = drawn(said=HOSTILE[:-1], label="$x$ <script>")
    assert "<script" not in svg
    assert "$x$ &lt;script&gt;" in svg


def test_parts_of_two_figures_have_different_names_and_the_same_figure_the_same() -> None:
    one, other = (set(re.findall(r'\bid="([^"]+)"', drawn(said))) for said in ("one", "other"))
    assert one
    assert not one & other
    assert drawn() == drawn()
    used = set(re.findall(r'(?:url\(|href=")#([\w-]+)', drawn("one")))
    assert used
    assert used <= one


def test_a_thumbnail_is_small_and_lies_in_the_page() -> None:
    address = page.thumbnail(Image.new("RGB", (400, 100), "red"), side=40)
    assert address.startswith("data:image/jpeg;base64,")
    assert len(address) < 1500


def test_a_page_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "report.html"
    page.write_page(target, "first")
    page.write_page(target, HOSTILE)
    assert target.read_text().startswith("<script>alert")
    assert [one.name for one in tmp_path.iterdir()] == ["report.html"]
    with pytest.raises(UsageError, match="cannot be written"):
        page.write_page(tmp_path / "none" / "report.html", "x")


def test_names_are_one_line_that_can_be_printed() -> None:
    assert visible("ünd\t\x1b[31m\u202e\udc80") == "ünd\\t\\x1b[31m\\u202e\\udc80"


def test_numbers_as_text() -> None:
    assert page.percent(0.9134) == "91.3 %"
    assert page.percent(None) == "–"
    assert page.between((0.887, 0.935)) == "88.7 to 93.5 %"
    assert page.count(1234) == "1,234"
    assert [page.size(n) for n in (12, 1740, 9.8e5, 1.74e6, 5e12)] == [
        "12 B", "1.7 kB", "980.0 kB", "1.7 MB", "5000.0 GB",
    ]  # fmt: skip
