"""A loss that spikes or is not finite: back to the last good state, and past the batches."""

from __future__ import annotations

import json
import math
import threading

import numpy as np
import pytest

from jaxdecoder.config import load
from jaxdecoder.errors import Stopped, UserError
from jaxdecoder.training import loop
from jaxdecoder.training.clock import EVALUATION, Clock
from jaxdecoder.training.faults import Fault, Skipped
from jaxdecoder.training.record import USUAL, Record
from jaxdecoder.training.single import Alone, train
from jaxdecoder.training.step import Metrics, next_token
from tests.runs import losses, write_config
from tests.test_resume import assert_same_bits, final_state


def poisoned(*batches):
    """An objective whose loss is not a number on these batches."""

    def objective(config):
        plain = next_token(config)

        def feed(stacked, step, rows):
            bad = np.isin(np.arange(step, step + len(stacked.weights)), batches)
            weights = np.where(bad[:, None, None], np.float32(np.nan), stacked.weights)
            return stacked._replace(weights=weights)

        return plain._replace(feed=feed)

    return objective


def test_a_run_goes_back_and_past_a_bad_batch(tmp_path, capsys):
    path = write_config(tmp_path)
    train(load(path), objective=poisoned(13))
    said = " ".join(capsys.readouterr().out.split())
    assert "step 14: the loss is nan" in said
    assert "back to step 12, past 2 batches (2 more rollbacks: train.rollbacks)" in said
    run = tmp_path / "run"
    assert json.loads((run / "skipped.json").read_text()) == [{"step": 12, "batches": 2}]
    found = losses(run)
    assert [key[0] for key in found if key[1] == "train_loss"] == list(range(1, 25))
    assert all(map(math.isfinite, found.values()))
    # The batches are those after the bad one: it is as if the corpus did not have it.
    taken = []

    class Watching(Alone):
        def batches(self, step, count):
            taken.extend(range(step, step + count))
            return super().batches(step, count)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jaxdecoder.training.single.Alone", Watching)
        train(load(path, ["--train.out", str(tmp_path / "again")]), objective=poisoned(13))
    assert taken == [*range(16), *range(14, 26)]


def test_a_run_that_is_stopped_after_a_rollback_skips_the_same(tmp_path, monkeypatch):
    path, cut, whole = write_config(tmp_path), tmp_path / "cut", tmp_path / "whole"
    train(load(path, ["--train.out", str(whole)]), objective=poisoned(6, 13))
    passed = loop._Course._passed

    def once(self, clock, step, state):
        passed(self, clock, step, state)
        if step == 16:
            monkeypatch.setattr(loop._Course, "_passed", passed)
            self.stop.requested = True
            passed(self, clock, step, state)

    monkeypatch.setattr(loop._Course, "_passed", once)
    given = load(path, ["--train.out", str(cut)])
    with pytest.raises(Stopped, match="stopped at step 16"):
        train(given, objective=poisoned(6, 13))
    train(given, objective=poisoned(6, 13))
    assert losses(cut) == losses(whole)
    assert_same_bits(final_state(cut), final_state(whole))


@pytest.mark.parametrize("allowed", [0, 2])
def test_a_run_that_keeps_failing_stops_at_the_last_good_state(tmp_path, allowed):
    config = load(write_config(tmp_path), ["--train.rollbacks", str(allowed)])
    with pytest.raises(UserError, match="the last good checkpoint is kept"):
        train(config, objective=poisoned(*range(13, 99)))
    assert max(step for step, _ in losses(tmp_path / "run")) <= 13 + allowed
    if allowed:
        assert len(json.loads((tmp_path / "run" / "skipped.json").read_text())) == allowed


def record(run, faults, start=0):
    config = load(write_config(run), ["--train.steps", "200", "--model.vocab-size", "257"])
    return Record(config, start, wrote=lambda *_: None, fault=faults.append, spike=2.0)


def metrics(values):
    array = np.asarray(values, np.float32)
    return Metrics(array, np.ones_like(array), np.ones_like(array))


def test_a_spike_is_far_above_what_is_usual_and_a_resumed_run_knows_it_too(tmp_path):
    (tmp_path / "run").mkdir()
    faults = []
    first = record(tmp_path, faults)
    first.add(0, metrics([9.0] + [3.0] * (USUAL - 2) + [4.9]))
    first.add(USUAL, metrics([4.99]))
    assert not faults
    first.add(USUAL + 1, metrics([5.01]))
    second = record(tmp_path, faults, start=USUAL + 1)
    second.add(USUAL + 1, metrics([5.01]))
    assert [fault.step for fault in faults] == [USUAL + 2] * 2
    assert [fault.what for fault in faults] == ["the loss is 5.0100, above 5.0000"] * 2


def test_a_list_of_skipped_batches_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "skipped.json").write_text('[{"step": 3')
    with pytest.raises(UserError, match=r"skipped\.json: cannot be read"):
        Skipped(tmp_path)


def test_batches_are_skipped_from_a_step_on(tmp_path):
    skipped = Skipped(tmp_path)
    skipped.add(10, 5)
    skipped.add(20, 1)
    for again in (skipped, Skipped(tmp_path)):
        assert [again.batch_of(step) for step in (0, 9, 10, 19, 20, 30)] == [0, 9, 15, 24, 26, 36]
    assert isinstance(Fault(3, "x"), UserError)


def test_the_watchdog_names_what_is_waited_for(tmp_path):
    (tmp_path / "run").mkdir()
    told, heard = [], threading.Event()

    def watchdog(text):
        told.append(text)
        if "evaluation" in text:
            heard.set()

    asked = Clock([record(tmp_path, [])], watchdog=watchdog, patience=0.05)
    with asked as clock, clock.on(EVALUATION):
        assert heard.wait(10)
    assert told[-1] == "no sign of life for 0 s: evaluation"
    assert clock.told()["evaluation_seconds"] >= 0.05
    assert clock.told()["memory_bytes"] > 0


def test_model_flop_utilisation_is_that_of_a_known_card(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    written = []
    config = load(write_config(tmp_path), ["--model.vocab-size", "257"])
    own = Record(config, 0, wrote=lambda step, line: written.append(line), fault=lambda f: None)
    device = type("Device", (), {"device_kind": "NVIDIA H200", "memory_stats": lambda self: None})
    monkeypatch.setattr("jaxdecoder.training.clock.jax.devices", lambda: [device()])
    clock = Clock([own])
    for step in (0, 1, 2):
        clock.add(step, metrics([3.0]))
    clock.catch_up()
    assert "model_flop_utilisation" not in written[0]
    for line in written[1:]:
        flops = line["tokens_per_second"] * clock.flops_a_token
        assert line["model_flop_utilisation"] == pytest.approx(flops / 989e12)
