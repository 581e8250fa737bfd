"""When a loss is not finite: named, gone back from, given up, and still the same numbers."""

from __future__ import annotations

import csv
import math
import signal
from collections import Counter

import pytest
import torch
from torch import nn

from crosspatch.data.loading import epoch_order
from crosspatch.errors import Interrupted, UsageError
from crosspatch.training import guard, loop, writer
from crosspatch.training.guard import NotFinite, Watch, boundary, factor, spoilt
from crosspatch.training.package import load_model
from crosspatch.training.state import BEFORE, GOOD, LAST, load_state, read_state
from crosspatch.training.stepper import Stepper
from support.loops import Spoil, Stop, halt, same

BAD = 11  # the twelfth step; validations are due after 7, 14, 21, 28 and 30


@pytest.fixture
def spoil(monkeypatch):
    return lambda **how: Spoil(monkeypatch, **how)


@pytest.fixture(autouse=True)
def only_finite_states(monkeypatch):
    """Whatever a test does: no state and no model with a value that is not finite is written."""

    def checked(write):
        def call(folder, what, *rest):
            tensors = what.state_dict() if isinstance(what, nn.Module) else what
            floats = {k: v for k, v in tensors.items() if v.is_floating_point()}
            assert [k for k, v in floats.items() if not v.isfinite().all()] == []
            return write(folder, what, *rest)

        return call

    for room, name in ((writer, "save_state"), (loop, "save_model")):
        monkeypatch.setattr(room, name, checked(getattr(room, name)))


def nan_table(run):
    with (run.path / "nan.csv").open() as file:
        return list(csv.DictReader(file))


def keys_of_step(images, step, batch=8):
    """The pictures of a step, as the order of its epoch gives them."""
    first = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:58]
    epoch, place = divmod(step, 7)
    order = epoch_order(58, epoch, 0)[place * batch : (place + 1) * batch]
    return [images.keys[int(first[i])] for i in order]


@pytest.mark.parametrize(("most", "tries"), [(0.5, 1), (0.125, 3)])
def test_it_goes_back_as_if_the_rate_had_been_lower(train, images, spoil, monkeypatch, most, tries):
    class Lower(Stepper):
        def __init__(self, *given):
            super().__init__(*given)
            self.cuts = [(7, 0.5)] * tries

    with monkeypatch.context() as patch:
        patch.setattr(loop, "Stepper", Lower)
        lower, _ = train("lower")
    reporter, bad = Stop(), spoil(most=most)
    run, outcome = train("run", reporter)
    assert bad.seen == tries
    assert outcome.steps == 30
    same(lower, run)
    rows, keys = nan_table(run), keys_of_step(images, BAD)
    assert [row["path"] for row in rows] == keys * tries
    assert Counter(row["try"] for row in rows) == {str(n + 1): 8 for n in range(tries)}
    assert {(row["step"], row["what"], row["value"], row["back_to"]) for row in rows} == {
        ("12", "loss", "nan", "7")
    }
    assert rows[-1]["rate_factor"] == str(0.5**tries)
    said = [text for text in reporter.messages if "nan" in text]
    assert len(said) == tries
    assert f"at step 12 ({', '.join(keys[:3])} and 5 more)" in said[0]
    load_model(run.path)


def test_after_three_tries_it_gives_up_and_says_what_to_try(train, images, spoil, tmp_path):
    bad = spoil()
    with pytest.raises(UsageError, match=r"nan at step 12 .*after 3 tries") as error:
        train("run")
    assert (error.value.exit_code, bad.seen) == (2, 4)
    assert keys_of_step(images, BAD)[0] in error.value.got
    assert "nan.csv" in error.value.expected
    assert "--lr 0.0003" in error.value.do
    table = (tmp_path / "run" / "nan.csv").read_text()
    assert table.count("\n") == 1 + 4 * 8
    load_model(tmp_path / "run")
    with pytest.raises(UsageError, match="after 3 tries"):
        train("run", resume=True)
    assert (tmp_path / "run" / "nan.csv").read_text() == table


EVERY_STEP, VALIDATIONS = {"save_long_seconds": 0.0}, {"save_seconds": 0.0}


@pytest.mark.parametrize("pace", [{}, EVERY_STEP, VALIDATIONS], ids=["never", "steps", "epochs"])
@pytest.mark.parametrize("at", [3, 10, 13, 20, 29])
def test_killed_and_resumed_equals_the_run_that_was_not(train, whole_run, spoil, pace, at):
    spoil(most=0.25)
    whole = whole_run("spoilt")
    with pytest.raises(RuntimeError, match="killed"):
        train("cut", Stop(at, RuntimeError("killed")), **pace)
    cut, _ = train("cut", resume=True, **pace)
    same(whole, cut)
    assert nan_table(cut) == nan_table(whole)


@pytest.mark.parametrize("at", [3, 7, 10, 11, 13, 20])
def test_interrupted_between_the_validation_and_the_bad_step(train, whole_run, spoil, tmp_path, at):
    spoil(most=0.25)
    whole = whole_run("spoilt")
    with pytest.raises(Interrupted):
        train("cut", Stop(at, halt()))
    assert load_state(tmp_path / "cut" / "last")[1]["step"] in (at, 7)
    same(whole, train("cut", resume=True)[0])


@pytest.mark.parametrize("which", [1, 2])
def test_killed_right_after_going_back(train, whole_run, spoil, which):
    spoil(most=0.25)
    whole = whole_run("spoilt")
    reporter = Stop()

    def message(text):
        reporter.messages.append(text)
        if len(reporter.messages) == which:
            raise RuntimeError("killed")

    reporter.message = message
    with pytest.raises(RuntimeError, match="killed"):
        train("cut", reporter)
    same(whole, train("cut", resume=True)[0])


def test_a_loss_read_seldom_is_found_at_the_same_step(train, whole_run, spoil, monkeypatch):
    spoil(most=0.25)
    whole = whole_run("spoilt")
    monkeypatch.setattr(Stepper, "reads_each_step", False)
    for name, seconds in (("epochs", 1e9), ("steps", 0.0)):
        run, _ = train(name, report_seconds=seconds)
        same(whole, run)
        assert nan_table(run) == nan_table(whole)


@pytest.mark.parametrize(("clip", "what", "step"), [(1.0, "gradient", 12), (0.0, "loss", 13)])
def test_a_gradient_that_is_not_finite(train, spoil, make_recipe, clip, what, step):
    spoil(most=0.5, what="gradient")
    run, outcome = train("run", use=make_recipe(clip=clip))
    assert outcome.steps == 30
    assert {(row["what"], row["step"]) for row in nan_table(run)} == {(what, str(step))}


@pytest.mark.parametrize("at", [13, 29])
@pytest.mark.parametrize("pace", [{}, EVERY_STEP], ids=["never", "steps"])
def test_weights_spoilt_by_the_last_step_before_a_validation(
    train, spoil, make_recipe, pace, at, images
):
    spoil(at=at, most=0.5, what="gradient")
    run, outcome = train("run", use=make_recipe(clip=0.0), **pace)
    rows = nan_table(run)
    assert {(row["what"], row["step"]) for row in rows} == {("weights", str(at + 1))}
    assert {row["back_to"] for row in rows} == {str(at // 7 * 7)}
    assert [row["path"] for row in rows] == keys_of_step(images, at)
    assert all(math.isfinite(row["val_loss"]) for row in outcome.rows)


def test_validation_pictures_that_the_model_cannot_judge_are_named(train, images, monkeypatch):
    real, calls = loop.predict_probabilities, []

    def one_bad(*given, **how):
        calls.append(1)
        probs = real(*given, **how)
        if len(calls) == 2:
            probs = probs.clone()
            probs[3] = math.nan
        return probs

    monkeypatch.setattr(loop, "predict_probabilities", one_bad)
    run, outcome = train("run")
    (row,) = nan_table(run)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    assert row["path"] == images.keys[int(order[58 + 3])]
    assert (row["what"], row["back_to"]) == ("validation", "7")
    assert outcome.steps == 30


def test_a_run_that_was_made_longer_goes_back_to_its_first_end(train, spoil, make_recipe):
    spoil(at=33, most=0.5)
    longer = make_recipe().longer(44)
    for name in ("whole", "cut"):
        train(name)
    whole, outcome = train("whole", resume=True, use=longer)
    assert outcome.steps == 44
    assert {row["back_to"] for row in nan_table(whole)} == {"30"}
    with pytest.raises(Interrupted):
        train("cut", Stop(32, halt()), resume=True, use=longer)
    same(whole, train("cut", resume=True, use=longer)[0])


def test_a_wish_to_stop_at_a_bad_step_leaves_a_good_state(train, spoil, monkeypatch):
    monkeypatch.setattr(Stepper, "reads_each_step", False)
    spoil(most=0.5)
    whole, _ = train("whole")
    stop = Stop(11, hook=lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(Interrupted, match="at step 0 of 30"):
        train("cut", stop)
    same(whole, train("cut", resume=True)[0])


def test_no_state_to_go_back_to_is_said(train, spoil, tmp_path):
    spoil()
    with pytest.raises(Interrupted):
        train("run", Stop(10, halt()))
    (tmp_path / "run" / "last" / GOOD).unlink()
    with pytest.raises(UsageError, match="no state from before is left"):
        train("run", resume=True)


def test_the_good_state_stays_behind_while_others_are_saved(train, tmp_path):
    with pytest.raises(Interrupted):
        train("run", Stop(20, halt()), save_seconds=0.0, save_long_seconds=0.0)
    last = tmp_path / "run" / "last"
    steps = [read_state(last / name)[1]["step"] for name in (GOOD, BEFORE, LAST)]
    assert steps == [14, 19, 20]


def test_states_of_a_try_that_was_given_up_are_not_used(train, tmp_path, recipe):
    with pytest.raises(Interrupted):
        train("run", Stop(10, halt()))
    last, same_run = tmp_path / "run" / "last", {"recipe": recipe.to_dict(), "fingerprint": "f"}

    def step(limit, cuts, same=same_run):
        found = guard.good_state(last, limit, cuts, same)
        return found and found[1]["step"]

    assert step(14, []) == 10
    assert step(10, [(10, 0.5)]) == 10
    assert step(14, [(7, 0.5)]) == 0
    assert step(9, []) == 0
    assert step(14, [], {"fingerprint": "other"}) is None


def test_the_first_bad_figure_is_found_among_many():
    watch, index = Watch(), torch.tensor([4, 2])
    watch.check()
    for step, value in enumerate((1.0, 2.0, math.inf, math.nan)):
        watch.note(step, "loss", torch.tensor(value), index + step)
    with pytest.raises(NotFinite) as found:
        watch.check()
    assert (found.value.step, found.value.value) == (2, math.inf)
    assert found.value.index.tolist() == [6, 4]
    watch.check()


def test_spoilt_tensors_are_named_and_great_sums_are_not_spoilt():
    fine = ("great", torch.full((9,), 3e38))
    assert spoilt([fine]) is None
    for value in (math.nan, math.inf, -math.inf):
        assert spoilt([fine, ("bad", torch.tensor([1.0, value, -value]))]) == "bad"


def test_the_rate_is_the_product_of_the_cuts_so_far():
    cuts = [(7, 0.5), (14, 0.5)]
    assert [factor(cuts, step) for step in (6, 7, 13, 14)] == [1, 0.5, 0.5, 0.25]
    assert [boundary([7, 14], step) for step in (6, 7, 13, 20)] == [0, 7, 7, 14]
