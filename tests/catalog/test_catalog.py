"""Every paper of the catalog: it can be read, its files exist, outcomes are added to it; and every
file that opens with a paper is in the catalog."""

from __future__ import annotations

import ast
import re
import shutil
from pathlib import Path

import pytest

import crosspatch
from crosspatch import catalog
from crosspatch.catalog import Measured, entries, find, load, record, slugs
from crosspatch.errors import DataError, UsageError

ROOMS = Path(crosspatch.__file__).parent
ROOT = Path(__file__).parent.parent.parent
ARXIV = re.compile(r"arXiv\s+(\d{4}\.\d{4,5})")
OF_PAPERS = ("models", "tokens", "mixing", "objectives", "explain", "compress")
"""Rooms in which a file that opens with a paper is that paper's."""
SHEETS = {
    "ascan": "2411.04967", "astroformer": "2304.05350", "cat": "2106.05786", "cct": "2104.05704",
    "convnext": "2201.03545", "crossformer": "2108.00154", "crossvit": "2103.14899",
    "cuda-unlearnable": "2303.04278", "cvt": "2103.15808", "dcal": "2205.02151",
    "deit": "2012.12877", "deit-lt": "2404.02900", "dhvt": "2210.05958", "duoformer": "2506.12982",
    "dwnet": "2106.04263", "evovit": "2108.01390", "fcaformer": "2211.07198",
    "fmvit": "2311.05707", "hornet": "2207.14284", "maformer": "2209.01620", "mctf": "2403.10030",
    "medvitv2": "2502.13693", "metaformer": "2111.11418", "mixpro": "2304.12043",
    "nextvit": "2207.05501", "psvit": "2108.03428", "resformer": "2212.00776",
    "resizemix": "2012.11101", "s2aformer": "2505.22195", "scalekd": "2411.06786",
    "shift-equivariant": "2306.07470", "smt": "2307.08579", "spectformer": "2304.06446",
    "sret": "2111.05297", "stvit": "2303.08685", "swin": "2103.14030", "tic": "2310.04134",
    "token-labeling": "2104.10858",
}  # fmt: skip
"""The papers' own ids, as the descriptions that they were built from have them."""
FILES = sorted(
    str(path.relative_to(ROOMS)) for room in OF_PAPERS for path in (ROOMS / room).glob("*.py")
)
OUTCOME = Measured("a claim", "+1.2 points", (0.4, 2.0), "a CPU", "python x", "2026-01-01", "yes")


@pytest.mark.parametrize("slug", slugs())
def test_an_entry_says_what_a_reader_needs(slug):
    entry = load(slug)
    assert entry.title
    assert re.fullmatch(r"\d{4}\.\d{4,5}", entry.arxiv)
    assert entry.kinds
    assert entry.claims
    assert all(text.endswith(".") for text in (*entry.claims, *entry.departures))
    for one in entry.measured:
        assert one.command
        assert one.verdict
        assert re.fullmatch(r"\d{4}-\d{2}-\d{2}", one.date)


@pytest.mark.parametrize("slug", slugs())
def test_the_modules_of_an_entry_exist(slug):
    missing = [name for name in load(slug).modules if not (ROOMS / name).is_file()]
    assert missing == []


@pytest.mark.parametrize("slug", slugs())
def test_what_is_built_has_an_idea_files_tests_and_a_page(slug):
    entry = load(slug)
    assert len(entry.idea) == 5
    assert all(len(line) <= 92 and line.endswith(".") for line in entry.idea)
    if entry.status == "studied":
        return
    assert entry.modules
    assert entry.names
    assert entry.tests
    assert entry.docs
    assert [path for path in (*entry.tests, *entry.docs) if not (ROOT / path).is_file()] == []
    tests = "".join((ROOT / path).read_text(encoding="utf-8") for path in entry.tests)
    assert Path(entry.modules[0]).stem in tests, "its tests never name its file"


def test_ids_are_those_of_the_papers():
    assert {slug: load(slug).arxiv for slug in SHEETS} == SHEETS
    ids = [entry.arxiv for entry in entries()]
    assert len(ids) == len(set(ids))


def papers_of(path: str) -> set[str]:
    """arXiv ids in the first words of a file."""
    return set(ARXIV.findall(ast.get_docstring(ast.parse((ROOMS / path).read_text())) or ""))


@pytest.mark.parametrize("path", [path for path in FILES if papers_of(path)])
def test_a_file_that_opens_with_a_paper_is_in_the_catalog(path):
    of = [entry for entry in entries() if path in entry.modules]
    assert of, f"{path} is in no src/crosspatch/catalog/SLUG.toml"
    assert papers_of(path) & {entry.arxiv for entry in of}


def test_every_registered_model_and_method_is_found_by_its_name():
    import crosspatch.tokens.evovit  # noqa: F401 (its models register)
    from crosspatch.models import registry
    from crosspatch.tokens.spec import METHODS
    from crosspatch.training.mix import MIXER_OF
    from crosspatch.training.objective import OBJECTIVES

    registry.list_models()
    for name, entry in registry._ENTRIES.items():
        (found,) = find(name)
        file = str(Path(*entry.__module__.removeprefix("crosspatch.").split("."))) + ".py"
        assert file in found.modules, name
    for name in (*METHODS, *MIXER_OF, *OBJECTIVES):
        if name != "supervised":
            assert len(find(name)) == 1, name


def names(found):
    return [entry.slug for entry in found]


@pytest.mark.parametrize(
    ("word", "slug"),
    [
        ("crossvit", "crossvit"),
        (" CrossViT ", "crossvit"),
        ("crossvit_micro_32", "crossvit"),
        ("vit_small_patch16_224.augreg_in21k", "vit"),
        ("mctf:r=16", "mctf"),
        ("arXiv:2103.14899", "crossvit"),
        ("models/cct.py", "cct"),
        ("cct.py", "cct"),
        ("src/crosspatch/models/cct.py", "cct"),
        ("/somewhere/src/crosspatch/models/cct.py", "cct"),
        ("token merging", "tome"),
        ("drw", "ldam"),
    ],
)
def test_a_paper_is_found_by_what_one_knows_of_it(word, slug):
    assert names(find(word)) == [slug]


def test_a_file_of_several_papers_finds_all():
    assert {"deit", "deit-lt", "vit"} <= set(names(find("models/deit.py")))
    assert names(find("objectives/deit.py")) == ["deit"]


@pytest.mark.parametrize("word", ["", "..", "crosvit", "x.py", "models/", "../../etc/passwd", "*"])
def test_what_is_no_paper_is_refused(word):
    with pytest.raises(UsageError, match="no paper is called"):
        find(word)


def test_papers_of_a_kind_and_a_status():
    assert {"mixup", "deit", "token-labeling"} <= set(names(entries("mixing")))
    assert all("mixing" in one.kinds for one in entries("mixing"))
    assert set(names(entries(status="reconstruction"))) == {
        "ascan", "dcal", "fmvit", "maformer", "psvit", "s2aformer", "tic",
    }  # fmt: skip
    with pytest.raises(UsageError, match="--kind mixxing"):
        entries("mixxing")


def test_an_outcome_is_added_and_replaced(tmp_path):
    shutil.copy(catalog.HERE / "resizemix.toml", tmp_path)
    before = load("resizemix", tmp_path)
    record("resizemix", [OUTCOME], tmp_path)
    worse = Measured(**{**OUTCOME.__dict__, "verdict": "no"})
    record("resizemix", [worse, Measured(**{**OUTCOME.__dict__, "claim": "b"})], tmp_path)
    after = load("resizemix", tmp_path)
    assert [one.verdict for one in after.measured if one.claim == "a claim"] == ["no"]
    assert [one.claim for one in after.measured if one.claim == "b"] == ["b"]
    assert after.claims == before.claims
    assert after.idea == before.idea
    assert list(tmp_path.iterdir()) == [tmp_path / "resizemix.toml"]


@pytest.mark.parametrize("slug", [slug for slug in slugs() if load(slug).measured])
def test_writing_an_outcome_leaves_the_rest_of_a_file_as_it_is(slug, tmp_path):
    shutil.copy(catalog.HERE / f"{slug}.toml", tmp_path)
    record(slug, list(load(slug).measured), tmp_path)
    ours = (catalog.HERE / f"{slug}.toml").read_text(encoding="utf-8")
    assert (tmp_path / f"{slug}.toml").read_text(encoding="utf-8") == ours


def test_unknown_and_damaged_entries(tmp_path):
    with pytest.raises(UsageError, match="near it: resizemix"):
        load("resizemx")
    (tmp_path / "a.toml").write_text("title = ")
    with pytest.raises(DataError, match=r"a\.toml cannot be read"):
        load("a", tmp_path)
    text = (catalog.HERE / "resizemix.toml").read_text()
    (tmp_path / "b.toml").write_text(text.replace('"built"', '"done"'))
    with pytest.raises(DataError, match="status 'done'"):
        load("b", tmp_path)
