"""The page of a run: readable whatever the classes are called, however many there are, whatever is
missing."""

from __future__ import annotations

import dataclasses
import json
import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from crosspatch.errors import DataError
from crosspatch.report import curves, plain, tables
from crosspatch.report.mistakes import suspected, write_labels
from crosspatch.report.run import page, read_report, write_report
from crosspatch.report.story import Story, listed, named
from crosspatch.tasks.classify import Classify
from support.made_up import HOSTILE, probabilities, several, story


def shown(one: Story) -> str:
    html = page(one, suspected(one.rows), "label_errors.csv")
    assert not re.search(r"<(script|b>/|i>|u>|cpu|reason|remark)", html)
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#|label_errors\.csv)""", html)
    assert "\x1b" not in html
    html.encode()
    return html


def text_of(html: str) -> str:
    html = re.sub(r"<(style|svg).*?</\1>", "", html, flags=re.S)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", html))


def test_hostile_names_are_text() -> None:
    html = shown(story(HOSTILE))
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "\\x1b[31m\\n\\udc80" in html
    assert "x" * 60 not in html


@pytest.mark.parametrize(("count", "whole"), [(3, True), (20, True), (21, False), (1000, False)])
def test_few_and_many_classes(count: int, whole: bool) -> None:
    one = story([f"kind {place}" for place in range(count)], max(240, 2 * count))
    html = shown(one)
    rows = html.split('class="matrix"')[1].split("</table>")[0].count('scope="row"')
    assert rows == (count if whole else tables.GROUPS)
    assert ("all 1000 classes" in html) == (count == 1000)
    assert len(html) < 1_500_000


def test_the_first_screen_says_what_it_can_and_cannot_do() -> None:
    text = text_of(shown(story(["ash", "beech", "cedar", "date"])))
    head = text[: text.index("Class by class")]
    assert re.search(r"names about \d+ rightly", head)
    assert "<u>plain</u>, which takes seconds, gets 40.0 %".replace("<u>", "&lt;u&gt;").replace(
        "</u>", "&lt;/u&gt;") in head  # fmt: skip
    assert "It often misses ash (found 0 of 60)" in head
    assert "It never finds ash." in head
    assert "It takes ash for beech" in head
    assert "It is worse where pictures are dark (-40 points)" in head
    assert "It knows nothing but its classes" in head
    assert "more pictures of ash: from 0 % found to about 19 %" in head
    assert head.index("What it can do") < head.index("What it cannot do")


def test_a_training_that_brought_nothing_is_called_so() -> None:
    one = story(["a", "b", "c", "d"])
    one.report["baseline"]["linear_probe"]["test"]["accuracy"] = 0.95
    level, said = plain.against_baseline(one) or ("", "")
    assert level == "bad"
    assert "not been shown" in said


def test_a_report_without_evidence_or_run_is_a_page() -> None:
    bare = dataclasses.replace(story(["a", "b", "c"]), report={}, choosing=())
    text = text_of(shown(bare))
    for part in ("Worse pictures", "Speed and size", "What to collect", "How it was made"):
        assert part not in text
    assert "Always naming the commonest class would be right in 33.3 %" in text
    assert "No threshold makes it right in 80 %" in text


def test_several_labels() -> None:
    text = text_of(shown(several(HOSTILE)))
    assert "mean average precision" in text
    assert "it got every label right on about" in text
    assert "most labels wrong" in text
    assert "taken for what" not in text


def test_marks_of_percent_axes_have_the_digits_they_need() -> None:
    for highest, marks in ((1.0, "0 % 50 % 100 %"), (0.01, "0.0 % 0.5 % 1.0 %")):
        with curves.sketching(3, 3) as (_, panel):
            panel.set_ylim(0, highest)
            panel.set_yticks([0, highest / 2, highest])
            curves.percents(panel.yaxis)
            shown = [one.get_text() for one in panel.get_yticklabels()]
        assert " ".join(shown) == marks


def test_thresholds_that_lie_together_share_a_label(monkeypatch) -> None:
    one = story(["a", "b", "c"])
    places = [(0.8, 0.9, 0.8), (0.9, 0.88, 0.81), (0.95, 0.3, 0.97), (0.99, None, None)]
    found = [(wanted, SimpleNamespace(coverage=x, precision=y)) for wanted, x, y in places]
    monkeypatch.setattr(Story, "thresholds", lambda _: found)
    assert curves._apart(one, 0.5) == [("80, 90 %", (0.9, 0.8)), ("95 %", (0.3, 0.97))]


def test_no_picture_of_a_class_is_no_figure() -> None:
    probs, labels = probabilities(40, 3)
    kept = labels < 2
    task = Classify(["a", "b", "c"])
    rows = list(task.predictions(["k"] * int(kept.sum()), labels[kept], probs[kept], "all"))
    text = text_of(shown(Story("d", "all", task.metrics(probs[kept], labels[kept]), rows)))
    assert re.search(r"c 0 – –", text)


def test_groups_hold_every_class_once_and_those_confused_together() -> None:
    table = np.eye(30, dtype=int) * 10
    for place in range(0, 30, 3):  # ten threes
        table[place, place + 1] = table[place + 1, place + 2] = 8
    groups = tables.alike(table)
    assert sorted(label for group in groups for label in group) == list(range(30))
    assert {tuple(group) for group in groups} == {(i, i + 1, i + 2) for i in range(0, 30, 3)}


def test_suspected_labels_are_sure_and_most_suspicious_first(tmp_path) -> None:
    def row(path: str, label: str, said: str, sure: float) -> dict[str, Any]:
        return {
            "path": path,
            "label": label,
            "prediction": said,
            "correct": int(label == said),
            "confidence": f"{sure}",
            "label_probability": f"{sure if label == said else 0.01}",
        }

    rows = [
        row("1", "a", "a", 0.8),
        row("2", "b", "b", 0.9),
        row("=3", "b", "a", 0.85),
        row("4", "b", "a", 0.7),
        row("5", "a", "b", 0.95),
        row("6", "a", "c", 0.99),
    ]
    found = suspected(rows)
    assert [(one["path"], one["suggested"]) for one in found] == [("5", "b"), ("=3", "a")]
    assert found[0]["score"] == "0.9400"
    write_labels(tmp_path / "l.csv", found)
    assert (tmp_path / "l.csv").read_text().splitlines() == [
        "path,label,suggested,score", "5,a,b,0.9400", "=3,b,a,0.8400",
    ]  # fmt: skip
    assert suspected([]) == []


def test_names() -> None:
    assert named("a\nb") == "a\\nb"
    assert len(named("x" * 99)) == 40
    assert listed(["a", "b", "c"], 2) == "a, b and 1 more"


def test_a_run_that_cannot_be_read(tmp_path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        write_report(tmp_path)
    (tmp_path / "report.json").write_text("[]")
    with pytest.raises(DataError, match="not the report of a run"):
        read_report(tmp_path)
    empty = {"data": "x", "classes": [], "config": {}, "test": None, "val": None}
    (tmp_path / "report.json").write_text(json.dumps(empty))
    with pytest.raises(DataError, match="judged on no picture"):
        write_report(tmp_path)
