"""Whole trainings on a long tail: what is kept, resumed, and told."""

from __future__ import annotations

import json
from functools import partial

import pytest

from crosspatch.cli.main import main
from crosspatch.errors import Interrupted, UsageError
from crosspatch.training import session, start
from crosspatch.training.package import class_counts, read_config
from crosspatch.training.run import RunFolder
from support.loops import Stop, halt, same

DATA = "digits@lt:40"
TINY = {"model": "tiny", "size": 8, "batch": 32, "epochs": 2, "lr": 5e-3, "threads": 1}


@pytest.fixture(autouse=True)
def short_steps(monkeypatch):
    monkeypatch.setattr(session, "fit", partial(session.fit, report_seconds=0.0))


def trained(folder, reporter=None, data=DATA, resume=False, **settings):
    given = {} if resume else {**TINY, **settings}
    return session.train_run(data, folder, given, reporter, resume=resume)


@pytest.mark.parametrize(
    "settings",
    [
        {"balance": "drw", "sam": 0.05},
        {"objective": "ldam:margin=0.4", "sam": 0.05},
        {"objective": "logit-adjust:tau=1.5", "balance": "drw"},
    ],
)
def test_a_stopped_run_ends_bit_for_bit_as_one_that_was_not(tmp_path, settings):
    trained(tmp_path / "whole", **settings)
    with pytest.raises(Interrupted):
        trained(tmp_path / "cut", Stop(at=7, error=halt()), **settings)
    trained(tmp_path / "cut", resume=True)
    same(RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "cut"))


def test_a_run_knows_its_tail_and_tells_of_its_groups(tmp_path, capsys):
    summary = trained(tmp_path / "r", objective="ldam")
    groups = summary["test"]["groups"]
    assert [one["name"] for one in groups] == ["head", "middle", "tail"]
    assert [one["classes"] for one in groups] == [list("012"), list("3456"), list("789")]
    recalls = [row["recall"] for row in summary["test"]["classes"]]
    assert groups[2]["accuracy"] == pytest.approx(sum(recalls[7:]) / 3)
    config = RunFolder(tmp_path / "r").read_config()
    recipe = config["recipe"]
    assert (recipe["balance"], recipe["deferred"], recipe["objective"]) == ("drw", 0.8, "ldam")
    assert sum(recipe["class_weights"]) == pytest.approx(10, rel=1e-6)
    counts = recipe["class_counts"]
    assert max(counts) >= 30 * min(counts)
    assert list(class_counts(tmp_path / "r")) == counts
    report = json.loads((tmp_path / "r" / "report.json").read_text())
    assert report["test"]["groups"] == groups
    assert report["val"]["groups"]
    why = " ".join(config["why"]["reasons"])
    assert "@lt:40: training pictures are thinned" in why
    assert "All pictures count alike for 80% of the run" in why


def test_eval_tells_of_the_groups_and_of_the_same_pictures(tmp_path, capsys):
    summary = trained(tmp_path / "r")
    for data in (DATA, "digits"):
        assert main(["eval", str(tmp_path / "r"), data, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["images"] == summary["test"]["images"]
        assert [one["accuracy"] for one in found["groups"]] == [
            one["accuracy"] for one in summary["test"]["groups"]
        ]
    assert main(["eval", str(tmp_path / "r"), "digits"]) == 0
    text = capsys.readouterr().out
    assert "classes by their training pictures" in text
    path = tmp_path / "r" / "model" / "config.json"
    older = read_config(path.parent)
    del older["class_counts"]
    path.write_text(json.dumps(older))
    assert main(["eval", str(tmp_path / "r"), "digits", "--json"]) == 0
    assert "groups" not in json.loads(capsys.readouterr().out)


def test_another_tail_is_other_data(tmp_path):
    with pytest.raises(Interrupted):
        trained(tmp_path / "r", Stop(at=2, error=halt()))
    with pytest.raises(Exception, match="long tail"):
        trained(tmp_path / "r", data="digits@lt:20", resume=True)


def test_what_cannot_be_is_refused_before_a_picture_is_read(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="sampler"):
        trained(tmp_path / "r", objective="logit-adjust", balance="sampler")
    monkeypatch.setattr(start, "read_pictures", lambda *_: pytest.fail("read"))
    for settings, word in (
        ({"objective": "ldam:margin=0"}, "margin"),
        ({"objective": "logit-adjust:tau=-1"}, "tau"),
        ({"sam": -1.0}, "sam"),
    ):
        with pytest.raises(UsageError, match=word):
            trained(tmp_path / "r", **settings)


def test_even_classes_have_no_groups(opened, tmp_path):
    summary = trained(tmp_path / "r", data="stripes")
    assert "groups" not in summary["test"]
    assert class_counts(tmp_path / "r") == (16, 16, 16)
