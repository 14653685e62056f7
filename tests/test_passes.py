"""What every pass of compression shares: a new run, begun, gone on with, and like any other."""

from __future__ import annotations

import json
from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxdecoder.compression.passes import Made, run_pass
from jaxdecoder.errors import UserError
from jaxdecoder.training.optimizers import matrices
from jaxdecoder.training.runs import load_model, read_config

COMMAND = "python compress.py halve RUN NEW"


def text(config, params, tokenizer):
    return "a sample"


def pass_of(change, steps=0):
    """A pass that changes the weights and trains on."""

    def make(model, corpus):
        config = replace(
            model.config,
            train=replace(model.config.train, steps=steps),
            compression=replace(model.config.compression, keep_zeros=True),
        )
        return Made(config, change(model.params), {"noted": True})

    return make


def half_zero(params):
    def halve(weights, matrix):
        kept = np.arange(weights.size).reshape(weights.shape) % 2 == 0
        return weights * kept if matrix else weights

    return jax.tree.map(halve, params, matrices(params))


@pytest.fixture(scope="module")
def half(tiny_run, tmp_path_factory):
    """A run with half of its weights that trained on, and its summary."""
    out = tmp_path_factory.mktemp("half") / "run"
    make = pass_of(half_zero, steps=20)
    return out, run_pass(str(tiny_run), str(out), COMMAND, make, sampler=text)


def test_a_pass_that_changes_nothing_leaves_a_run_with_the_same_loss(tiny_run, tmp_path):
    before = json.loads((tiny_run / "summary.json").read_text())
    out = tmp_path / "same"
    summary = run_pass(str(tiny_run), str(out), COMMAND, pass_of(lambda w: w), sampler=text)
    assert summary["validation_loss"] == pytest.approx(before["validation_loss"], abs=1e-5)
    told = summary["compression"]
    assert told["noted"] is True
    assert told["before"] == told["at_once"]
    assert told["before"]["bytes"] == 4 * told["before"]["parameters"]
    assert read_config(out).compression.recipe == (COMMAND,)
    assert "a sample" in (out / "samples.txt").read_text()


def test_zeros_stay_zero_while_a_pass_trains_on_and_the_rest_moves(tiny_run, half):
    old, new = load_model(tiny_run).params, load_model(half[0], "last").params
    # Of float32 weights that training moves, none lands on zero by chance.
    for weights, kept in zip(jax.tree.leaves(new), jax.tree.leaves(half_zero(old)), strict=True):
        np.testing.assert_array_equal(weights == 0, kept == 0)
        assert not np.array_equal(weights, kept)


def test_a_pass_goes_on_where_it_stopped(tiny_run, half, tmp_path):
    make, calls, cut = pass_of(half_zero, steps=20), [], tmp_path / "cut"

    def counted(model, corpus):
        calls.append(1)
        return make(model, corpus)

    def stops(config):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_pass(str(tiny_run), str(cut), COMMAND, counted, sampler=text, objective=stops)
    summary = run_pass(str(tiny_run), str(cut), COMMAND, counted, sampler=text)
    assert len(calls) == 1
    assert summary["validation_loss"] == half[1]["validation_loss"]
    assert summary["compression"] == half[1]["compression"]


def test_a_pass_does_not_touch_the_run_of_another_command(tiny_run, half):
    with pytest.raises(UserError, match="made by another command"):
        run_pass(str(tiny_run), str(half[0]), COMMAND + " -x", pass_of(half_zero), sampler=text)


def test_recipes_of_a_chain_follow_one_another(half, tmp_path):
    run_pass(str(half[0]), str(tmp_path / "two"), "second", pass_of(half_zero), sampler=text)
    assert read_config(tmp_path / "two").compression.recipe == (COMMAND, "second")
