"""A run goes on in another way: what changes is said, what would make another is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest

from jaxdecoder.config import Config, load
from jaxdecoder.errors import UserError
from jaxdecoder.training import continuing, runs
from jaxdecoder.training.checkpoints import steps_in
from jaxdecoder.training.single import train
from tests.runs import losses, write_config
from tests.test_resume import assert_same_bits, final_state

CONSTANT = ("--optimizer.schedule", "constant")


@pytest.fixture
def ended(tiny_run, tmp_path):
    """A copy of a run of 24 steps under a cosine that has ended, and its config's path."""
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    return run, tiny_run / "config.toml"


def test_twice_as_many_steps_are_those_of_a_run_that_was_asked_for_them_at_once(tmp_path):
    config = write_config(tmp_path)
    given = [*CONSTANT, "--train.steps", "12", "--model.dropout", "0.1"]
    once, twice = tmp_path / "once", tmp_path / "twice"
    train(load(config, [*given, "--train.out", str(twice)]))
    given[3] = "24"
    summary = train(load(config, [*given, "--train.out", str(twice)]))
    train(load(config, [*given, "--train.out", str(once)]))
    assert summary["steps"] == 24
    assert json.loads((twice / "summary.json").read_text())["steps"] == 24
    assert losses(twice) == losses(once)
    assert_same_bits(final_state(twice), final_state(once))


def test_what_changed_is_said_and_kept_in_the_config(ended, capsys):
    run, path = ended
    given = ["--train.out", str(run), "--train.log-every", "3"]
    train(load(path, [*given, "--train.steps", "36", "--optimizer.learning-rate", "5e-3"]))
    said = " ".join(capsys.readouterr().out.split())
    assert "changed at step 24: train.steps: 24 there, 36 here" in said
    assert "going on at step 24" in said
    assert "the cosine schedule had decayed to 10% of its peak, and is drawn anew over 36" in said
    history = runs.read_config(run).train.history
    assert set(history) == {
        "step 24: train.steps = 24",
        "step 24: train.log_every = 1",
        "step 24: optimizer.learning_rate = 0.01",
    }
    # The same command again changes nothing, and another adds to the history.
    train(load(path, [*given, "--train.steps", "36", "--optimizer.learning-rate", "5e-3"]))
    assert runs.read_config(run).train.history == history
    assert "changed at" not in capsys.readouterr().out
    train(load(path, [*given, "--train.steps", "40", "--optimizer.learning-rate", "5e-3"]))
    assert runs.read_config(run).train.history == (*history, "step 36: train.steps = 36")
    assert steps_in(run / "checkpoints")[0] == 40
    assert [key for key in losses(run) if key[0] > 24 and key[1] == "train_loss"] == [
        (step, "train_loss") for step in range(27, 40, 3)
    ]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.d_model", "32"),
        ("data.tokenizer", "char"),
        ("train.seed", "1"),
        ("train.batch_size", "4"),
        ("optimizer.name", "muon"),
        ("optimizer.ema_decay", "0.5"),
    ],
)
def test_what_would_make_another_model_is_refused(ended, key, value):
    run, path = ended
    option = "--" + key.replace("_", "-")
    with pytest.raises(UserError, match=f"(?s){key}: .*--train.init-from .*run") as refused:
        train(load(path, ["--train.out", str(run), option, value, "--train.steps", "48"]))
    assert "train.steps" not in str(refused.value)
    assert runs.read_config(run).train.steps == 24
    assert (run / "summary.json").exists()


def test_fewer_steps_than_a_run_has_taken_are_refused(ended):
    run, path = ended
    with pytest.raises(UserError, match=r"train\.steps = 12: .*is at step 24 already"):
        train(load(path, ["--train.out", str(run), "--train.steps", "12"]))


def test_every_key_that_may_change_is_one():
    config = Config()
    for key in (*continuing.CHANGEABLE, *runs.FREE):
        section, name = key.split(".")
        assert name in {field.name for field in dataclasses.fields(getattr(config, section))}
    assert not set(continuing.CHANGEABLE) & set(runs.FREE)
