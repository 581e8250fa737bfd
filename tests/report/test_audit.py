"""The page of an audit: at three and at a thousand classes, with names that would be markup."""

import re

import pytest

from crosspatch.report.audit import page

HOSTILE = "<script>alert(1)</script>\"'&\udc80\x1b[31m"


def found(classes: int, items: int = 3) -> dict:
    finding = {
        "level": "bad", "kind": "copies", "title": f"title {HOSTILE}", "text": f"text {HOSTILE}",
        "command": f"rm {HOSTILE}",
        "items": [{"path": f"{n} {HOSTILE}", "note": HOSTILE} for n in range(items)]
        + [{"paths": [HOSTILE, "b"], "note": HOSTILE}],
    }  # fmt: skip
    rows = [{"name": f"{n} {HOSTILE}", "all": n, "unreadable": 0, "train": n, "val": 0}
            for n in range(classes)]  # fmt: skip
    histogram = {"edges": [1.0, 2.0, 9.0], "counts": [3, 4], "unit": "pixels", "least": 1.0,
                 "median": 2.0, "greatest": 9.0, "log": True}  # fmt: skip
    return {
        "data": HOSTILE, "pictures": 10, "unreadable": 1, "seconds": 1.0, "needs_a_hand": True,
        "findings": [finding, {**finding, "level": "good", "items": []}], "classes": rows,
        "histograms": {"shorter side": histogram}, "modes": {"RGB": 10}, "formats": {"JPEG": 10},
        "files": [], "not_looked": [HOSTILE],
    }  # fmt: skip


@pytest.mark.parametrize("classes", [0, 3, 1000])
def test_names_are_never_markup(classes: int) -> None:
    html = page(found(classes), lambda path: "data:image/jpeg;base64,AAAA")
    assert "<script" not in html
    assert "rm &lt;script&gt;" in html
    assert "\\udc80\\x1b[31m" in html
    assert html.count("\x1b") == 2  # in the commands, which `data.findings.quoted` makes printable
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)""", html)
    assert html.count("<img") == 3 + 2
    assert ("all 1,000 classes" in html) == (classes == 1000)
    assert "One thing needs a hand" in html


def test_long_lists_are_folded_and_cut() -> None:
    html = page(found(3, items=2000), lambda path: None)
    assert "the first 300" in html
    assert "and 1,701 more" in html
    assert "<img" not in html


def test_nothing_found_is_said() -> None:
    html = page({**found(3), "findings": [], "histograms": {}})
    assert "Nothing was found that stands in the way" in html
