"""The loop: it learns, and a run that was stopped ends with the numbers of one that was not."""

from __future__ import annotations

import os
import signal
import threading
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from crosspatch.errors import Interrupted, UsageError
from crosspatch.training import loop
from crosspatch.training.package import load_model
from crosspatch.training.reporter import Silent
from crosspatch.training.state import BEFORE, LAST, load_state, save_state
from support.loops import Stop, halt, same, table


def test_it_learns_and_reports(train, make_recipe):
    reporter = Stop()
    recipe = make_recipe(steps=84, mix=(), mix_prob=(), mix_alpha=())
    run, outcome = train("run", reporter, use=recipe)
    assert outcome.best["val_accuracy"] > 0.9
    assert outcome.final["step"] == outcome.steps == 84
    assert [row["step"] for row in outcome.rows] == recipe.evaluations()
    assert outcome.rows[-1]["train_loss"] < outcome.rows[0]["train_loss"]
    assert reporter.steps == list(range(1, 85))
    assert reporter.rows[-1]["remaining"] == 0
    assert all(row["val_low"] <= row["val_accuracy"] <= row["val_high"] for row in reporter.rows)
    assert len(table(run)) == 12
    model, classes, *_ = load_model(run.path)
    assert classes == ("row0", "row1", "row2")
    assert not model.training


def test_the_best_by_validation_is_kept(train, images):
    run, outcome = train("run")
    model = load_model(run.path).module
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    from crosspatch.tasks.classify import Classify
    from crosspatch.training.evaluation import predict_probabilities

    val = images.subset(order[58:].numpy())
    figures = Classify(images.classes).metrics(predict_probabilities(model, val), val.labels)
    assert figures["accuracy"] == outcome.best["val_accuracy"]
    assert figures["nll"] == pytest.approx(outcome.best["val_loss"], abs=1e-6)
    assert outcome.best["val_accuracy"] == max(row["val_accuracy"] for row in outcome.rows)


@pytest.mark.parametrize("at", [1, 7, 10, 28, 29])
def test_interrupted_and_resumed_equals_uninterrupted(train, at):
    whole, _ = train("whole")
    with pytest.raises(Interrupted, match=f"at step {at} of 30"):
        train("cut", Stop(at, halt()))
    torch.rand(7)
    cut, _ = train("cut", resume=True)
    same(whole, cut)


@pytest.mark.parametrize("at", [6, 15, 30])
def test_killed_after_an_older_state_and_resumed_equals_uninterrupted(train, at):
    whole, _ = train("whole")
    with pytest.raises(RuntimeError, match="killed"):
        train("cut", Stop(at, RuntimeError("killed")), save_seconds=0.0)
    reporter = Stop()
    cut, _ = train("cut", reporter, resume=True)
    same(whole, cut)
    if at == 6:
        assert "No state" in reporter.messages[0]
    else:
        assert reporter.steps[0] <= at


def test_what_others_draw_changes_nothing(train):
    class Drawing(Silent):
        def step(self, done, total, loss, images_per_second):
            torch.rand(done)
            np.random.default_rng().random()

    def weights(run):
        return load_file(run.model / "model.safetensors")

    (one, _), (two, _) = train("one"), train("two", Drawing())
    assert table(one) == table(two)
    assert all(torch.equal(value, weights(two)[name]) for name, value in weights(one).items())


def test_many_stops_in_one_run(train):
    whole, _ = train("whole")
    resume = False
    for at in (2, 5, 14, 16, 27):
        with pytest.raises(Interrupted):
            train("cut", Stop(at, halt()), resume=resume)
        resume = True
    same(whole, train("cut", resume=True)[0])


def test_a_stop_between_save_and_evaluation_loses_no_row(train):
    whole, _ = train("whole")
    stop = Stop()
    stop.epoch = lambda row: (_ for _ in ()).throw(RuntimeError("killed"))
    with pytest.raises(RuntimeError, match="killed"):
        # saved after every step, so the state of step 7 is written before its evaluation is done
        train("cut", stop, save_long_seconds=0.0)
    assert load_state(whole.path.parent / "cut" / "last")[1]["rows"] == []
    cut, _ = train("cut", resume=True)
    same(whole, cut)


def test_a_torn_state_falls_back_to_the_one_before(train):
    whole, _ = train("whole")
    with pytest.raises(Interrupted):
        train("cut", Stop(20, halt()), save_seconds=0.0)
    last = whole.path.parent / "cut" / "last"
    assert (last / BEFORE).exists()
    (last / LAST).write_bytes((last / LAST).read_bytes()[:-30])
    reporter = Stop()
    cut, _ = train("cut", reporter, resume=True)
    assert any("skipped" in message for message in reporter.messages)
    assert reporter.steps[0] < 20
    same(whole, cut)


def test_resuming_a_finished_run_changes_nothing(train):
    _, first = train("whole")
    reporter = Stop()
    _, again = train("whole", reporter, resume=True)
    assert reporter.steps == []
    assert again.best == first.best
    assert again.rows == first.rows


def test_other_settings_or_data_are_listed_on_resume(train, make_recipe):
    with pytest.raises(Interrupted):
        train("cut", Stop(3, halt()))
    with pytest.raises(UsageError, match=r"lr 0\.005 -> 0\.1; threads 1 -> 2"):
        train("cut", resume=True, use=make_recipe(lr=0.1, threads=2))
    with pytest.raises(UsageError, match="the pictures"):
        train("cut", resume=True, facts={"fingerprint": "other"})
    reporter = Stop()
    facts = {"fingerprint": "f", "versions": {"torch": "1"}}
    with pytest.raises(Interrupted):
        train("new", Stop(3, halt()), facts=facts)
    train("new", reporter, resume=True, facts={**facts, "versions": {"torch": "2"}})
    assert "torch was 1 and is 2" in reporter.messages[0]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_at_the_next_step(train, number):
    before = signal.getsignal(number)
    whole, _ = train("whole")
    stop = Stop(9, hook=lambda: os.kill(os.getpid(), number))
    with pytest.raises(Interrupted, match=f"{signal.Signals(number).name} at step 1[01] of 30"):
        train("cut", stop)
    assert signal.getsignal(number) is before
    same(whole, train("cut", resume=True)[0])


def test_a_signal_does_not_wait_for_a_slow_validation(train, monkeypatch):
    whole, _ = train("whole")

    def slow(*given, **how):
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(2000):
            time.sleep(0.01)
        raise AssertionError("it waited")

    with monkeypatch.context() as patch:
        patch.setattr(loop, "predict_probabilities", slow)
        with pytest.raises(Interrupted, match="SIGTERM at step 7 of 30"):
            train("cut")
    same(whole, train("cut", resume=True)[0])


def test_a_second_signal_quits_without_a_state(train):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train("cut", Stop(9, hook=twice))


def test_it_trains_outside_the_main_thread(train):
    found = []
    worker = threading.Thread(target=lambda: found.append(train("run")[1]))
    worker.start()
    worker.join()
    assert found[0].steps == 30


def test_no_average_no_clipping_and_fewer_pictures_than_a_batch(train, make_recipe):
    recipe = make_recipe(ema=0.0, clip=0.0, batch=500, steps=3, steps_per_epoch=1)
    run, outcome = train("run", use=recipe)
    assert outcome.steps == 3
    assert not any(name.startswith("ema/") for name in load_state(run.last)[0])
    with pytest.raises(Interrupted):
        train("cut", Stop(2, halt()), use=recipe)
    same(run, train("cut", resume=True, use=recipe)[0])


def test_a_run_by_deit_resumes_exactly_in_the_middle_of_an_epoch(train, make_recipe):
    recipe = make_recipe(
        schedule="epochs", repeats=3, decay=("token",), ema=0.0, clip=0.0, warmup=14,
        mix=("mixup-batch", "cutmix-batch"), mix_prob=(0.5, 0.5), mix_alpha=(0.8, 1.0),
    )  # fmt: skip
    whole, outcome = train("whole", use=recipe)
    assert [row["lr"] for row in outcome.rows][:2] == [1e-6, 1e-6]
    assert outcome.rows[2]["lr"] == pytest.approx(1e-6 + (5e-3 - 1e-6) / 2)
    for at in (10, 16):
        with pytest.raises(Interrupted):
            train(f"cut{at}", Stop(at, halt()), use=recipe)
        same(whole, train(f"cut{at}", resume=True, use=recipe)[0])


def test_repeats_change_what_an_epoch_sees(train, make_recipe):
    (one, _), (two, _) = train("one"), train("two", use=make_recipe(repeats=3))
    assert table(one) != table(two)


def test_a_state_from_before_a_setting_existed_is_resumed(train, monkeypatch):
    whole, _ = train("whole")
    with pytest.raises(Interrupted):
        train("cut", Stop(9, halt()))
    last = whole.path.parent / "cut" / "last"
    tensors, meta, _ = load_state(last)
    for name in ("schedule", "repeats", "decay"):
        del meta["recipe"][name]
    del meta["recipe"]["augment"]["pad"]
    save_state(last, tensors, meta)
    same(whole, train("cut", resume=True)[0])


def test_bf16_trains_and_resumes(train, make_recipe):
    recipe = make_recipe(precision="bf16", steps=9)
    whole, _ = train("whole", use=recipe)
    with pytest.raises(Interrupted):
        train("cut", Stop(5, halt()), use=recipe)
    same(whole, train("cut", resume=True, use=recipe)[0])


def test_a_set_that_is_shorter_than_planned_is_an_error(train, make_recipe):
    with pytest.raises(UsageError, match=r"epoch 1 ended after 7 steps.*9 steps"):
        train("run", use=make_recipe(steps_per_epoch=9))


def test_every_epoch_is_told_also_one_that_is_not_validated(train, make_recipe):
    reporter = Stop()
    run, outcome = train("run", reporter, use=make_recipe(steps=28, eval_every=2))
    assert [row["epoch"] for row in reporter.rows] == [1, 2, 3, 4]
    assert [row["val_accuracy"] is None for row in reporter.rows] == [True, False, True, False]
    assert [row["epoch"] for row in table(run)] == ["2", "4"]
    assert len(outcome.rows) == 2
