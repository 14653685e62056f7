"""Passes one after another: a run is pruned, taught by what it was, quantized and sampled from."""

from __future__ import annotations

import time

import jax
import numpy as np
import pytest

from jaxdecoder.compression.passes import sizes
from jaxdecoder.config import load
from jaxdecoder.training.loop import train
from jaxdecoder.training.runs import load_model, read_config
from tests.runs import losses, script, write_config

HALF = ("--sparsity", "0.5", "--calibration-tokens", "2000")


def done(*arguments):
    process = script(*arguments)
    assert process.returncode == 0, process.output
    return process.output


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    """A folder with a trained run, `run`, and the same with half of its weights, `pruned`."""
    folder = tmp_path_factory.mktemp("chain")
    train(load(write_config(folder)))
    done("compress.py", "prune", folder / "run", folder / "pruned", *HALF)
    return folder


def taught(folder, out):
    """The command that teaches the pruned run."""
    return ("compress.py", "distill", folder / "run", folder / "pruned", out, "--steps", "60")


def test_a_chain_that_was_killed_in_its_middle_ends_as_the_undisturbed_one(pruned, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done(*taught(pruned, whole))
    process = script(*taught(pruned, killed), wait=False)
    metrics = killed / "metrics.jsonl"
    while process.poll() is None and (not metrics.exists() or metrics.read_text().count("\n") < 20):
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert not (killed / "summary.json").exists(), "it ended before it was killed"
    done(*taught(pruned, killed))
    assert losses(killed) == losses(whole)

    one, two = load_model(whole, "last"), load_model(killed, "last")
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(two.params), strict=True):
        np.testing.assert_array_equal(a, b)
    # Half of the matrices was zero when the student began, and is so still.
    assert sizes(two.params)["nonzero"] == sizes(load_model(pruned / "pruned").params)["nonzero"]

    packed = tmp_path / "packed"
    done("compress.py", "quantize", killed, packed)
    assert load_model(packed).config.model.packed
    commands = [line.split()[2] for line in read_config(packed).compression.recipe]
    assert commands == ["prune", "distill", "quantize"]
    assert "one two" in done("sample.py", packed, "--prompt", "one two", "--max-new-tokens", "20")
