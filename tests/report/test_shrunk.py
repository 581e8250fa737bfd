"""The page of a search for a smaller network: every candidate, what was chosen, names are text."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from crosspatch.deploy.shrink.choose import marked
from crosspatch.deploy.shrink.result import Budget, Shrunk, Speed
from crosspatch.deploy.shrink.words import chosen_words
from crosspatch.report.shrunk import headline, lead, shrunk_page, write_shrunk
from crosspatch.report.shrunk_figure import slower, tradeoff
from support.made_up import shrunk

NONE = Budget(max_drop=0.1, latency=1e-4)


def rows_of(html: str) -> list[str]:
    """The rows of the last table that holds candidates."""
    table = html[html.index('<div class="named">') : html.index("How it was measured")]
    table = table[table.index("<details><summary>all") :] if "<summary>all" in table else table
    return re.findall(r"<tr><td>.*?</tr>", table[: table.index("</table>")], re.S)


def chosen(found: Shrunk, key: str) -> Shrunk:
    return replace(found, chosen=key, rows=marked(found.rows, found.budget, key))


@pytest.mark.parametrize("count", [1, 4, 40])
def test_every_candidate_is_a_row_and_names_are_text(tmp_path: Path, count: int) -> None:
    found = shrunk(count)
    html = write_shrunk(tmp_path, found).read_text()
    assert (tmp_path / "shrunk.html").is_file()
    assert "<script" not in html
    assert "<b>a processor" not in html
    assert "<scales>" not in html
    assert "&lt;script&gt;alert(1)" in html
    assert len(rows_of(html)) == count
    assert html.count("<svg") == 1
    assert ("looked at once" in html) == bool(found.test)
    assert ("What was given up early" in html) == (count > 20)
    assert ("What there was no time for" in html) == (count > 20)


def test_of_many_the_first_table_shows_those_that_matter() -> None:
    found = shrunk(40)
    html = shrunk_page(found)
    first = html[html.index('<div class="named">') : html.index("<summary>all")]
    told = {found.chosen, found.base}
    expected = sum(one.on_front or one.key in told for one in found.rows)
    assert 0 < expected < 40
    assert len(re.findall(r"<tr><td>", first)) == expected


def test_the_headline_is_the_answer() -> None:
    found = shrunk(4)
    assert found.winner is not None
    assert found.winner.precision == "int8-static"
    assert headline(found) == "1.5 times as fast, 30 % of the size"
    assert "4.13 ms on 4 threads for a picture instead of 6.20 ms on 4 threads" in lead(found)
    assert "1.50 times as fast, 95 %: 1.46 to 1.55" in lead(found) or "95 %: 1.4" in lead(found)
    assert headline(chosen(found, found.base)) == "The network stays as it is"
    same = replace(found.rows[2], latency={
        n: t._replace(base=Speed(1.5, 0.9, 2.0)) for n, t in found.rows[2].latency.items()
    })  # fmt: skip
    unsure = replace(found, rows=(*found.rows[:2], same, found.rows[3]))
    assert headline(chosen(unsure, same.key)) == "About as fast, 30 % of the size"
    dynamic = found.rows[1].key
    assert headline(chosen(found, dynamic)) == "Slower (1.11 times as long), 28 % of the size"


def test_nothing_is_said_twice_and_nothing_is_lost() -> None:
    found = shrunk(4)
    assert found.winner is not None
    said = chosen_words(found.winner, found.original, found.budget, found.winner.pictures)
    test = "on 300 test pictures, looked at once: 96.0 % (93.1–97.7), the run as it is 96.7 %"
    html = shrunk_page(replace(found, words=[*said, test, "something else", *found.words]))
    assert "Chosen: as it is" not in html
    assert test[1:] not in html
    assert "<li>Something else.</li>" in html
    assert "<li>So few pictures cannot exclude a drop of more than 1 points" in html
    assert "<li>Int8-dynamic in onnxruntime is slower than float there.</li>" in html


def test_where_nothing_fits_it_says_so_and_gives_no_command() -> None:
    found = shrunk(4, NONE)
    assert not found.chosen
    html = shrunk_page(found)
    assert "Nothing fits the budget" in html
    assert "Nothing that was tried keeps a drop of at most 0.1 points and 0.10 ms" in html
    assert f"Nearest came the whole network in {found.row(found.nearest).engine}" in html
    assert "crosspatch serve" not in html
    assert "could be measured" in lead(replace(found, nearest=""))


@pytest.mark.parametrize(
    ("low", "high", "said"), [(0.8, 0.97, ", slower"), (0.9, 1.1, ", no faster"), (1.1, 1.3, "")]
)
def test_int8_that_is_slower_than_its_float_is_called_so(
    low: float, high: float, said: str
) -> None:
    found = shrunk(4)
    one = found.rows[1]
    speed = Speed((low + high) / 2, low, high)
    slow = replace(one, latency={n: t._replace(float_=speed) for n, t in one.latency.items()})
    html = shrunk_page(replace(found, rows=(found.rows[0], slow, *found.rows[2:])))
    row = next(row for row in rows_of(html) if "int8-dynamic" in row)
    assert f"{speed.median:.2f}x ({low:.2f} to {high:.2f}){said}<" in row
    assert slower(slow, found) == (high < 1)


def test_a_candidate_without_a_size_or_a_time_is_not_drawn_but_told() -> None:
    found = shrunk(4)
    lost = replace(found.rows[3], latency={}, dropped="lost 9 points after 200 pictures")
    html = shrunk_page(replace(found, rows=(*found.rows[:3], lost)))
    assert len(rows_of(html)) == 3
    assert "lost 9 points after 200 pictures" in html


def test_what_loses_very_much_does_not_press_the_rest_together() -> None:
    found = shrunk(4)
    spoilt = replace(found.rows[3], right=60, drop=0.85, low=0.8, high=0.9)
    rows = (*found.rows[:3], spoilt)
    svg = str(tradeoff(replace(found, rows=rows), rows, {one.key: 1 for one in rows}))
    marks = [float(text) for text in re.findall(r">(\d+(?:\.\d+)?) %<", svg)]
    assert min(marks) > 80


def test_the_page_of_a_budget_at_one_thread_shows_that_thread() -> None:
    found = shrunk(4, Budget(max_drop=1.0, latency=0.02, threads=1))
    assert "on 1 thread for a picture" in lead(found)
    assert "milliseconds for a picture, on 1 thread<" in shrunk_page(found)


def test_a_figure_without_whole_pictures_is_nowhere() -> None:
    """Where nothing could be measured to the end the page still tells why."""
    found = shrunk(4, NONE)
    rows = tuple(replace(one, latency={}, dropped="no engine could open it") for one in found.rows)
    html = shrunk_page(replace(found, rows=rows, nearest="", base=rows[0].key))
    assert "<svg" not in html
    assert html.count("no engine could open it") == 4
