"""`crosspatch papers`: what one finds out of what one knows, in 80 columns and as JSON."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from crosspatch.catalog import load, slugs


def test_without_a_word_all_papers_are_listed(crosspatch):
    done = crosspatch("papers")
    assert done.code == 0
    for slug in slugs():
        assert f"  {slug} " in done.out
    assert "tokens/tome.py" in done.out
    assert "(reconstruction)" in done.out


@pytest.mark.parametrize("slug", slugs())
def test_a_paper_is_shown_in_80_columns(crosspatch, slug):
    done = crosspatch("papers", slug)
    entry = load(slug)
    words = " ".join(done.out.split())
    assert done.code == 0
    for text in (*entry.idea, *entry.claims, *entry.departures, *entry.modules, entry.arxiv):
        assert " ".join(text.split()) in words
    for one in entry.measured:
        assert one.verdict in words
        assert one.command in words.replace(" \\ ", " ")
    long = [line for line in done.out.splitlines() if len(line) > 80]
    assert all(" " not in line.strip() for line in long)


def test_json_is_one_object_of_everything(crosspatch):
    done = crosspatch("papers", "crossvit_micro_32", "--json")
    (paper,) = json.loads(done.out)["papers"]
    assert paper["slug"] == "crossvit"
    assert paper["address"] == "https://arxiv.org/abs/2103.14899"
    assert paper["measured"][0]["command"].startswith("python benchmarks/fusion.py")
    assert len(json.loads(crosspatch("papers", "--json").out)["papers"]) == len(slugs())


def test_kind_and_status_leave_papers_out(crosspatch):
    done = crosspatch("papers", "--kind", "mixing", "--json")
    found = {one["slug"] for one in json.loads(done.out)["papers"]}
    assert {"mixup", "deit"} <= found
    assert "crossvit" not in found
    done = crosspatch("papers", "--status", "reconstruction")
    assert "psvit" in done.out
    assert "tome" not in done.out
    assert "no paper is so" in crosspatch("papers", "--status", "smallest-form").out


@pytest.mark.parametrize(
    ("words", "got", "near"),
    [
        (["crosvit"], "no paper is called 'crosvit'", "crossvit"),
        (["--kind", "mixxing"], "--kind mixxing", "--kind mixing"),
        (["--status", "bilt"], "--status bilt", "--status built"),
        (["tome", "--kind", "model"], "tome is built, tokens", "crosspatch papers tome"),
        (["a\x1b[31m\nb"], "no paper is called", "crosspatch papers"),
    ],
)
def test_a_slip_is_told_with_what_is_near(crosspatch, words, got, near):
    done = crosspatch("papers", *words)
    assert done.code == 2
    assert got in done.err
    assert near in done.err
    assert "\x1b[31m" not in done.err
    assert len(done.err.splitlines()) == 3


def test_it_needs_no_torch():
    code = (
        "import sys; from crosspatch.cli.main import main; main(['papers', 'tome']);"
        "print('torch' in sys.modules, 'timm' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False False"
