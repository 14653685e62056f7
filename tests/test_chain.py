"""Passes one after another: a run is pruned, taught by what it was, quantized and sampled from."""

from __future__ import annotations

import time

import jax
import numpy as np
import pytest

from jaxdecoder.compression.passes import sizes
from jaxdecoder.training.runs import load_model, read_config
from tests.runs import here, losses, script

HALF = ("--sparsity", "0.5", "--calibration-tokens", "2000")


def done(*arguments):
    said = here(*arguments)
    assert said.returncode == 0, said.output
    return said.output


@pytest.mark.slow
def test_a_chain_that_was_killed_in_its_middle_ends_as_the_undisturbed_one(tiny_run, tmp_path):
    pruned, whole, killed = (tmp_path / name for name in ("pruned", "whole", "killed"))

    def taught(out):
        """The command that teaches the pruned run."""
        return ("compress.py", "distill", tiny_run, pruned, out, "--steps", "60")

    done("compress.py", "prune", tiny_run, pruned, *HALF)
    done(*taught(whole))
    process = script(*taught(killed), wait=False)
    metrics = killed / "metrics.jsonl"
    while process.poll() is None and (not metrics.exists() or metrics.read_text().count("\n") < 20):
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert not (killed / "summary.json").exists(), "it ended before it was killed"
    done(*taught(killed))
    assert losses(killed) == losses(whole)

    one, two = load_model(whole, "last"), load_model(killed, "last")
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(two.params), strict=True):
        np.testing.assert_array_equal(a, b)
    # Half of the matrices was zero when the student began, and is so still.
    assert sizes(two.params)["nonzero"] == sizes(load_model(pruned).params)["nonzero"]

    packed = tmp_path / "packed"
    done("compress.py", "quantize", killed, packed)
    assert load_model(packed).config.model.packed
    commands = [line.split()[2] for line in read_config(packed).compression.recipe]
    assert commands == ["prune", "distill", "quantize"]
    assert "one two" in done("sample.py", packed, "--prompt", "one two", "--max-new-tokens", "20")
