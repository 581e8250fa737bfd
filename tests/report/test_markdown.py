"""Whatever is put into a Markdown page stays text: no tag, no link, one line, one cell."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import UndefinedError
from markupsafe import Markup

from crosspatch.report.markdown import arxiv, code, environment, head, row, text

HOSTILE = [
    "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "a|b", "`rm -rf`", "``a`b``",
    "# heading", "- item", "1. first", "---", "===", "[a](http://evil)", "![a](b)", "**bold**",
    "_a_", "~~a~~", "a\nb", "a\r\n\r\n# b", "\x1b[31mred", "a\u202eb", "a\udc80b", "\\|", "\\",
    "&lt;script&gt;", "https://evil.example", "www.evil.example", "a@b.example", "$x$", "|", "",
]  # fmt: skip


@pytest.mark.parametrize("hostile", HOSTILE)
@pytest.mark.parametrize("safe", [text, code])
def test_hostile_text_is_text(safe, hostile):
    made = str(safe(hostile))
    assert "\n" not in made
    assert "\r" not in made
    assert "\x1b" not in made
    assert "<" not in made
    assert made.isprintable()
    made.encode("utf-8")
    assert not re.search(r"(?<!\\)\|", made)
    bare = made if made == str(text(hostile)) else ""
    assert not re.search(r"(?<!\\)[`*_\[\]~]", bare)
    assert not re.match(r"\s*([-+#=]+|\d+[.)])(\s|$)", bare)
    assert not re.search(r"\w://|www\.\w|\w@\w", bare)


@given(st.text())
def test_any_text_stays_in_its_cell(value):
    line = str(row([value, 1]))
    assert "\n" not in line
    assert "<" not in line
    assert len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) == 3


@given(st.text(alphabet="abc 123.%,–()é"))
def test_plain_text_is_left_as_it_is(value):
    assert str(text(value)).replace("&#8203;", "") == value


def test_a_number_and_what_is_safe_are_left_as_they_are():
    assert text(-1.5) == "-1.5"
    assert text(Markup("[a](b)")) == "[a](b)"
    assert code("crossvit_micro_32") == "`crossvit_micro_32`"
    assert code("a`b") == "a\\`b"
    assert head(["a", "b|"]) == "| a | b\\| |\n|---|---:|"
    assert arxiv("2103.14899") == "[arXiv 2103.14899](https://arxiv.org/abs/2103.14899)"


def test_a_template_escapes_by_itself_and_misses_nothing():
    made = environment().from_string("{{ x }} {% for y in [x] %}{{ y }}{% endfor %}")
    assert made.render(x="<b>|") == "&lt;b&gt;\\| &lt;b&gt;\\|"
    with pytest.raises(UndefinedError):
        environment().from_string("{{ missing }}").render()
